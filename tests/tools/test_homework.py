"""The homework that homework.py makes: what is empty in it, and what its grader says of answers, right and wrong.

python -m pytest tests/tools/test_homework.py
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from tools import homework
from tools.homework import SPOILERS, definitions, make_homework

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ("lora.py", "model.py", "dataloader.py", "train.py", "generate.py")
STUDENT = ROOT / "tests" / "student_lora.py"
PARTS = {file: f"homework_tests/test_{i}_{file}" for i, file in enumerate(CHAPTERS, 1)}
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
    "build_model": "test_build_model_",
    "ModelSampler.get_accuracy": "test_accuracy_",
}

# Runs the parts of the grader on a copy, once for each change, in forks: torch is imported once.
GRADE = """
import glob, importlib, json, os, sys
import numpy, pytest, tiktoken, torch, torch._decomp

class Reports:
    def __init__(self):
        self.failed = {}
        self.passed = []
    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[1]
        if report.failed:
            self.failed[name] = report.longreprtext
        elif report.when == "call":
            self.passed.append(name)

sys.path.insert(0, os.getcwd())
for path in glob.glob("plumbing/*.py"):
    importlib.import_module(path[:-3].replace("/", "."))
for job in json.load(open(sys.argv[1])):
    old = {path: open(path).read() for path in job["changes"]}
    for path, text in job["changes"].items():
        open(path, "w").write(text)
    if os.fork() == 0:
        reports = Reports()
        pytest.main(["-p", "no:cacheprovider", "--rootdir=.", "-c", os.devnull, *job["arguments"]], [reports])
        json.dump([reports.failed, reports.passed], open(job["result"], "w"))
        os._exit(0)
    os.wait()
    for path, text in old.items():
        open(path, "w").write(text)
"""


def grade(folder, tmp, *variants):
    """[(failed {test: message}, passed [test])] of a copy. A variant: (what other files say, pytest's arguments)."""
    jobs = []
    for i, (changes, arguments) in enumerate(variants):
        jobs.append({"changes": changes, "arguments": list(arguments), "result": str(tmp / f"{i}.json")})
    (tmp / "jobs.json").write_text(json.dumps(jobs))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", GRADE, tmp / "jobs.json"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(Path(job["result"]).read_text()) for job in jobs]


# --- solutions -------------------------------------------------------------------------------------


def source_of(path, name):
    """The source of a function or method of a file."""
    text = path.read_text("utf-8")
    node = dict(definitions(ast.parse(text)))[name]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def replaced(path, name, function):
    """A file's text with another source for a function or method."""
    text = path.read_text("utf-8")
    node = dict(definitions(ast.parse(text)))[name]
    lines = text.splitlines()
    lines[node.lineno - 1 : node.end_lineno] = function.splitlines()
    return "\n".join(lines) + "\n"


def put(path, name, function):
    path.write_text(replaced(path, name, function), "utf-8")


def exchange(text, words):
    """The text with each key of `words` replaced by its value, all at once."""
    assert all(word in text for word in words)
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], text)


def exercises(folder):
    """{exercise: its file} of a copy."""
    found = {}
    for file in CHAPTERS:
        for name, node in definitions(ast.parse((folder / file).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and f"exercise {name}:" in ast.unparse(node):
                found[name] = file
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("homework") / "copy"
    make_homework(str(folder))
    return folder


@pytest.fixture(scope="module")
def solved(copy):
    """A copy with every exercise solved, by the solution's own functions. Where these lean on what the copy has not,
    the merging and the label's search, a student's stand in their place, or what was left out is put back."""
    folder = copy.parent / "solved"
    make_homework(str(folder))
    for name, file in exercises(folder).items():
        function = source_of(ROOT / file, name)
        if name == "LoRALinear.eval":
            function = "    def eval(self):\n        return self.train(False)"
        elif name.startswith("LoRALinear."):
            function = source_of(STUDENT, name)
        put(folder / file, name, function)
    put(folder / "plumbing" / "labels.py", "find_label", source_of(ROOT / "plumbing" / "labels.py", "find_label"))
    return folder


# --- the copy --------------------------------------------------------------------------------------


def test_copy_has_no_solution_in_it(copy):
    """Lost if it fails: a student finds an exercise solved in the copy, or cannot find it."""
    assert exercises(copy).keys() == TESTS.keys()
    for file in ("homework.py", "tests", "sweep.py", "docs/teaching.md", "plumbing/mergeable.py", "examples"):
        assert not (copy / file).exists()
    for file, names in SPOILERS.items():
        there = dict(definitions(ast.parse((ROOT / file).read_text("utf-8"))))
        left = dict(definitions(ast.parse((copy / file).read_text("utf-8"))))
        for name in names:
            assert name in there, f"{file} has no {name} any more"
            assert name not in left or "left out" in ast.unparse(left[name].body[-1])
    names = {name for name, _ in definitions(ast.parse((copy / "lora.py").read_text("utf-8")))}
    assert names == {name for name in TESTS if "lora" in name.lower()} | {"LoRALinear", "LoRALinear.is_lora"}
    code = "".join(path.read_text("utf-8") for path in [*copy.glob("*.py"), *copy.glob("plumbing/*.py")])
    for line in ("lora_B @", "zeros_(self.lora_B)", "addmm_(z", "lora_B.to("):
        assert line not in code


IMPORTS = """
import importlib
from pathlib import Path
import pytest

FILES = [*Path.cwd().glob("*.py"), *Path.cwd().glob("plumbing/*.py")]

@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_import(path):
    name = ".".join(path.relative_to(Path.cwd()).with_suffix("").parts)
    assert Path(importlib.import_module(name).__file__) == path
"""


def test_copy_imports_and_each_test_is_red(copy, tmp_path):
    """Lost if it fails: the copy does not start at all, or a test is green before anything is done."""
    (tmp_path / "test_imports.py").write_text(IMPORTS)
    (broken, imported), (failed, passed) = grade(copy, tmp_path, ({}, [str(tmp_path)]), ({}, PARTS.values()))
    assert not broken and len(imported) > 20
    assert not passed
    assert all(any(test.startswith(start) for test in failed) for start in TESTS.values())
    assert failed["test_init_makes_A_and_B"].startswith("still empty: LoRALinear.")
    assert failed["test_accuracy_wants_whole_words"].startswith("still empty: ModelSampler.get_accuracy: ")


def test_solutions_are_green(solved, tmp_path):
    """Lost if it fails: a right answer is called wrong, a student's or the repository's own."""
    ((failed, passed),) = grade(solved, tmp_path, ({}, PARTS.values()))
    assert not failed and len(passed) > 40
    ((failed, own),) = grade(ROOT, tmp_path, ({}, PARTS.values()))
    assert not failed and own == passed


def test_each_exercise_alone_is_red(copy, solved, tmp_path):
    """Lost if it fails: a place that was left empty is not noticed where the others are filled."""
    found = exercises(copy)
    variants = []
    for name, file in found.items():
        left_empty = replaced(solved / file, name, source_of(copy / file, name))
        variants.append(({file: left_empty}, [PARTS[file], "-k", TESTS[name]]))
    for name, (failed, _) in zip(found, grade(solved, tmp_path, *variants)):
        assert any(f"still empty: {name}: " in text for text in failed.values()), name


def test_notebook_runs_up_to_the_first_exercise(copy, monkeypatch):
    """Lost if it fails: a student's notebook stops for another reason than the exercise."""
    notebook = nbformat.read(copy / "notebooks" / "lora_gpt2_colab.ipynb", 4)
    assert not re.search(r"sweep|bench|tests/", str(notebook.cells))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(copy)}})
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


def test_command_line(tmp_path):
    """Lost if it fails: a student's work is written over, or a teacher meets a traceback."""

    def run(*arguments):
        command = [sys.executable, "-m", "tools.homework", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("hw").returncode == 0
    assert (tmp_path / "hw" / "homework_tests" / "test_1_lora.py").exists()
    for arguments in (["hw"], [], ["a", "b"], ["--help"], ["no/such/parent"]):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["hw"]


# --- usual mistakes --------------------------------------------------------------------------------

MARK = """def mark_only_lora_as_trainable(model, bias="none", also=None):
    for name, param in model.named_parameters():
        {line}
    return model"""

PROMPT = """    def _add_instruction_finetuning(self, rec):
        word = self.label_names[rec["label"]]
        rec["instr_tuned_text"] = {value}
        return rec"""

LOADS = "self.load_data(), self.load_model()"
ACCURACY = """    def get_accuracy(self):
        {loads}
        config = self.config
        names = self.loader.label_names
        labels = self.loader.splits[config.split].labels.tolist()
        self.generated = generate_labels(config, self.model, self.loader, config.split, self.answer_tokens)
        self.found = [next((i for i, name in enumerate(names) if name in {where}), None) for text in self.generated]
        pairs = [(i, label) for i, label in zip(self.found, labels) if {counts}]
        return sum(i == label for i, label in pairs) / len(pairs)"""

MISTAKES = [  # what is wrong; the exercise; its function, or what is put for what in it; a test and its message
    (
        "alpha is not divided by r",
        "LoRALinear.__init__",
        {"lora_alpha / lora_rank": "lora_alpha"},
        "test_init_scales_by_alpha_and_rank",
        "alpha is not divided by r",
    ),
    (
        "A and B are swapped",
        "LoRALinear.__init__",
        {"lora_A": "lora_B", "lora_B": "lora_A"},
        "test_init_makes_A_and_B",
        "A and B are swapped",
    ),
    (
        "B is not zero",
        "LoRALinear.reset_parameters",
        {"nn.init.zeros_(self.lora_B)": "nn.init.kaiming_uniform_(self.lora_B)"},
        "test_reset_makes_B_zero_and_A_random",
        "B is not zero in a new layer",
    ),
    (
        "W0 trains",
        "mark_only_lora_as_trainable",
        MARK.format(line="param.requires_grad |= 'lora_' in name"),
        "test_mark_chooses_A_and_B",
        "W0 trains",
    ),
    (
        "merged twice",
        "LoRALinear.train",
        {"mode == self.has_weights_merged": "(self.has_weights_merged or not mode)"},
        "test_train_false_merges",
        "the adapter is merged twice",
    ),
    (
        "not un-merged",
        "LoRALinear.train",
        {"mode == self.has_weights_merged": "not mode and not self.has_weights_merged"},
        "test_train_true_unmerges",
        "still merged in it: it was not un-merged",
    ),
    (
        "dropout on the output",
        "LoRALinear.forward",
        {"self.lora_dropout(x)": "x", "return out": "return self.lora_dropout(out) if self.is_lora() else out"},
        "test_forward_drops_in_front_of_A",
        "lora_dropout is on the output",
    ),
    (
        "merged without the scale",
        "LoRALinear.train",
        {"self.lora_scaling * ": ""},
        "test_train_false_merges",
        "merged without its scale",
    ),
    (
        "garbage is left out",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads=LOADS, where="text[:40]", counts="i is not None"),
        "test_accuracy_counts_garbage_as_wrong",
        "garbage is left out of the count",
    ),
    (
        "a label found anywhere",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads=LOADS, where="text", counts="True"),
        "test_accuracy_reads_the_first_characters_only",
        "a label was found anywhere in the answer",
    ),
    (
        "a label inside another word",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads=LOADS, where="text[:40]", counts="True"),
        "test_accuracy_wants_whole_words",
        "was found inside another word",
    ),
    (
        "a word cut after 40 characters",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads=LOADS, where="text[:40]", counts="True"),
        "test_accuracy_reads_the_first_characters_only",
        "ends in a label that is part of a longer word",
    ),
    (
        "no data loaded",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads="", where="text[:40]", counts="True"),
        "test_accuracy_is_the_share_of_right_answers",
        "before load_data() was called",
    ),
    (
        "no model loaded",
        "ModelSampler.get_accuracy",
        ACCURACY.format(loads="self.load_data()", where="text[:40]", counts="True"),
        "test_accuracy_is_the_share_of_right_answers",
        "does not call load_model()",
    ),
    (
        "A on the CPU",
        "LoRALinear.__init__",
        {"torch.empty((lora_rank, in_features), device=device": "torch.empty((lora_rank, in_features)"},
        "test_init_makes_A_and_B",
        "is on another device than weight",
    ),
    (
        "the label before the text",
        "CustomDataLoader._add_instruction_finetuning",
        PROMPT.format(value="word + self.template.format(text=rec['text'], label='')"),
        "test_prompt_holds_text_and_label_in_their_places",
        "the label comes before the text",
    ),
    (
        "biases are not frozen",
        "mark_only_lora_as_trainable",
        MARK.format(line="param.requires_grad = 'weight' not in name"),
        "test_mark_chooses_A_and_B",
        "a bias trains",
    ),
]


@pytest.fixture(scope="module")
def graded(copy, solved, tmp_path_factory):
    """(failed, passed) of each wrong solution, which is right but for its one mistake."""
    files = exercises(copy)
    variants = []
    for _, name, change, _, _ in MISTAKES:
        file = files[name]
        function = change if isinstance(change, str) else exchange(source_of(STUDENT, name), change)
        variants.append(({file: replaced(solved / file, name, function)}, [PARTS[file], "-k", TESTS[name]]))
    return grade(solved, tmp_path_factory.mktemp("mistakes"), *variants)


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=[what.replace(" ", "_") for what, *_ in MISTAKES])
def test_a_mistake_is_named(i, graded):
    """Lost if it fails: a student with this mistake is called right, or is not told what differs."""
    _, _, _, test, message = MISTAKES[i]
    failed, _ = graded[i]
    assert test in failed
    assert message in failed[test], failed[test]
