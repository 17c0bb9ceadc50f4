"""The handout that homework.py makes: what is empty in it, and that right answers are called right.

python -m pytest tests/tools/test_homework.py
"""

import ast
import os
import re
import shutil

import nbclient
import nbformat
import pytest
from answers import ROOT, exercises, grade, handout, replaced, run, solved, source_of
from conftest import finish, start

from tools import homework
from tools.grading.submissions import FILES
from tools.homework import SPOILERS, definitions, make_homework

TESTS = {  # exercise: how the names of its tests begin
    "LoRALinear.__init__": "test_init_",
    "LoRALinear.reset_parameters": "test_reset_",
    "LoRALinear.forward": "test_forward_",
    "LoRALinear.train": "test_train_",
    "LoRALinear.eval": "test_eval_",
    "mark_only_lora_as_trainable": "test_mark_",
    "Attention.__init__": "test_attention_",
    "MLP.__init__": "test_mlp_",
    "CustomDataLoader._add_instruction_finetuning": "test_prompt_",
    "CustomDataLoader._inputs_and_targets": "test_targets_",
    "build_model": "test_build_model_",
    "ModelSampler.get_accuracy": "test_accuracy_",
}


def code_of(folder):
    return [path for path in folder.rglob("*.py") if "homework_tests" not in path.parts]


def test_copy_has_no_solution_in_it():
    """Lost if it fails: a student finds an exercise solved in the copy, or cannot find it."""
    copy = handout()
    assert exercises().keys() == TESTS.keys()
    for file in ("tools/homework.py", "tests", "tools/grading", "docs/teaching.md", "tools/sweep.py", "examples"):
        assert not (copy / file).exists()
    assert not list(copy.rglob("mergeable.py"))
    for file, names in SPOILERS.items():
        there = dict(definitions(ast.parse((ROOT / file).read_text("utf-8"))))
        left = dict(definitions(ast.parse((copy / file).read_text("utf-8"))))
        for name in names:
            assert name in there, f"{file} has no {name} any more"
            assert name not in left or "left out" in ast.unparse(left[name].body[-1])
    names = {name for name, _ in definitions(ast.parse((copy / "lora.py").read_text("utf-8")))}
    assert names == {name for name in TESTS if "lora" in name.lower()} | {"LoRALinear", "LoRALinear.is_lora"}
    code = "".join(path.read_text("utf-8") for path in code_of(copy))
    for line in (
        "lora_B @",
        "zeros_(self.lora_B)",
        "addmm_(",
        "lora_B.to(",
        "lora_scaling = ",
        "nn.Dropout(lora_",
        "tokens[n_given:]",
    ):
        assert line not in code, line


def test_copy_speaks_of_nothing_that_it_has_not():
    """Lost if it fails: a student looks for a program or a page that was not handed out."""
    copy = handout()
    for path in [path for path in copy.rglob("*") if path.suffix in (".py", ".md", ".ipynb", ".yaml")]:
        text = path.read_text("utf-8")
        assert not re.search(r"\bsweep|\bbench|tests/test_(?!\d)", text), path
        for link in re.findall(r"\]\((?!https?:|#)([^)#]*)", text) if path.suffix == ".md" else ():
            assert (path.parent / link).exists(), f"{path}: {link}"
    page = (copy / "README.md").read_text("utf-8")
    assert "sqrt(5)" in page and "self.loader.splits[self.config.split].labels" in page


def test_copy_imports():
    """Lost if it fails: the copy does not start at all."""
    names = [".".join(path.relative_to(handout()).with_suffix("").parts) for path in code_of(handout())]
    names = [name.removesuffix(".__init__") for name in names if not name.startswith("configs")]
    program = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    out, _ = finish(start("-c", program, *names, cwd=handout()))
    assert len(names) > 30 and all(line.startswith(str(handout())) for line in out.splitlines())


def test_grades_of_empty_and_of_right_answers(tmp_path):
    """Lost if it fails: a test is green before anything is done, a right answer is called wrong, or a place that was
    left empty is not noticed where the others are filled."""
    parts = range(1, len(FILES) + 1)
    empty = {file: (handout() / file).read_text("utf-8") for file in FILES}
    cases = {f"empty {part}": (empty, part) for part in parts} | {f"right {part}": ({}, part) for part in parts}
    for name, file in exercises().items():
        left_empty = replaced(solved()[file], name, source_of(handout() / file, name))
        cases[name] = ({file: left_empty}, FILES.index(file) + 1)
    graded = grade(tmp_path / "submissions", cases)
    tests = {}
    for part in parts:
        tests |= graded[f"empty {part}"]
        assert not any(graded[f"right {part}"].values()), graded[f"right {part}"]
    assert all(tests.values())
    assert all(any(test.startswith(start) for test in tests) for start in TESTS.values())
    assert tests["test_init_makes_A_and_B"].startswith("still empty: LoRALinear.")
    assert tests["test_accuracy_wants_whole_words"].startswith("still empty: ModelSampler.get_accuracy: ")
    for name in TESTS:
        assert any(f"still empty: {name}: " in message for message in graded[name].values() if message), name


def test_the_repository_passes_its_own_grader():
    """Lost if it fails: the solution is not what is asked for."""
    options = ["-p", "no:cacheprovider", "--ignore=tools/homework_tests/test_6_accuracy.py"]
    done = run(["-m", "pytest"], *options, "tools/homework_tests")
    assert done.returncode == 0, done.stdout


def test_notebook_runs_up_to_the_first_exercise(monkeypatch):
    """Lost if it fails: a student's notebook stops for another reason than the exercise."""
    notebook = nbformat.read(handout() / "notebooks" / "lora_gpt2_colab.ipynb", 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(handout())}})
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"exercise LoRALinear\.__init__"):
        client.execute()


def test_a_lost_mark_is_an_error(tmp_path, monkeypatch):
    """Lost if it fails: after a change to a chapter the solution is handed out, and nobody notices."""
    shutil.copytree(ROOT, tmp_path / "repository", ignore=shutil.ignore_patterns(".*", "out*", "tests"))
    for file, name in (("lora.py", "def eval"), ("generate.py", "def get_accuracy")):
        path = tmp_path / "repository" / file
        path.write_text(
            re.sub(rf"(    # task\n)?(    {name}.*?)(  # task)?\n", r"\2\n", path.read_text("utf-8")), "utf-8"
        )
    monkeypatch.setattr(homework, "HERE", tmp_path / "repository")
    with pytest.raises(
        ValueError, match=r"no function with `# task` for LoRALinear.eval, ModelSampler.get_accuracy of"
    ):
        make_homework(str(tmp_path / "copy"))
    assert os.listdir(tmp_path) == ["repository"]
