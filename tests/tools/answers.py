"""What the homework's tests share: a handout, answers to its exercises, and the grader on them."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

from conftest import start

from tools.grading.submissions import FILES
from tools.homework import definitions, make_homework

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "tests" / "student_lora.py"
FOLDER = tempfile.TemporaryDirectory(prefix="nanolora-homework-")

MARK = """def mark_only_lora_as_trainable(model):
    for name, param in model.named_parameters():
        param.requires_grad = "lora_" in name
    return model"""

ACCURACY = r"""    def get_accuracy(self):
        import re

        self.load_data()
        self.load_model()
        names = self.loader.label_names
        labels = self.loader.splits[self.config.split].labels.tolist()
        self.generated = self.answer_split()
        words = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
        self.found = []
        for text in self.generated:
            match = pattern.search(text)
            word = match[0].casefold() if match and match.end() <= 40 else None
            self.found.append(next((i for i, name in enumerate(names) if name.casefold() == word), None))
        self.result = tabulate(self.found, labels, names)
        pairs = list(zip(self.found, labels))
        return sum(i == label for i, label in pairs) / len(pairs)"""


# --- sources ---------------------------------------------------------------------------------------


def source_of(path, name):
    """The source of a function or method of a file."""
    text = path.read_text("utf-8")
    node = dict(definitions(ast.parse(text)))[name]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def replaced(text, name, function):
    """A file's text with another source for a function or method."""
    node = dict(definitions(ast.parse(text)))[name]
    lines = text.splitlines()
    lines[node.lineno - 1 : node.end_lineno] = function.splitlines()
    return "\n".join(lines) + "\n"


def exchange(text, words):
    """The text with each key of `words` replaced by its value, all at once."""
    assert all(word in text for word in words), (words, text)
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], text)


@functools.cache
def handout():
    """A folder with the handout. Tests leave it as it is."""
    make_homework(f"{FOLDER.name}/handout")
    return Path(FOLDER.name, "handout")


@functools.cache
def exercises():
    """{exercise: its file} of the handout."""
    found = {}
    for file in FILES:
        for name, node in definitions(ast.parse((handout() / file).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and f"exercise {name}:" in ast.unparse(node):
                found[name] = file
    return found


def answer(name):
    """A right answer: the solution's own where it leans on nothing that the handout has not, else a student's."""
    if name == "LoRALinear.eval":
        return "    def eval(self):\n        return self.train(False)"
    if name.startswith("LoRALinear."):
        return source_of(STUDENT, name)
    students = {"mark_only_lora_as_trainable": MARK, "ModelSampler.get_accuracy": ACCURACY}
    return students.get(name) or source_of(ROOT / exercises()[name], name)


@functools.cache
def solved():
    """{file: its text} with every exercise solved."""
    texts = {file: (handout() / file).read_text("utf-8") for file in FILES}
    for name, file in exercises().items():
        texts[file] = replaced(texts[file], name, answer(name))
    return texts


def with_answer(name, function):
    """The files of a right submission but for one answer: its source, or {words of the right one: others}."""
    function = function if isinstance(function, str) else exchange(answer(name), function)
    file = exercises()[name]
    return {file: replaced(solved()[file], name, function)}


# --- grades ----------------------------------------------------------------------------------------

GRADE = """
import json, sys
from pathlib import Path
from tools.grading.submissions import grade_all

copy, parts, limit = json.loads(sys.argv[1])
for part, folders in parts.items():
    submissions = {Path(folder).name: Path(folder) for folder in folders}
    for name, results, _ in grade_all(submissions, Path(copy), [int(part)], 2, limit):
        print(json.dumps([name, results[int(part)]]))
"""


def write(folder, files):
    folder.mkdir(parents=True)
    for name, text in (solved() | files).items():
        (folder / name).write_text(text, "utf-8")
    return folder


def run(program, *arguments, python=None, **env):
    """A program in the repository's folder, and how it ended: a fork, which spares the import of torch, or a process
    of `python`."""
    if python:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | env
        command = [python, *program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    process = start(*program, *arguments, **env)
    out, err = process.communicate(timeout=600)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def grade(folder, cases, limit=60):
    """{case: {test: None or a message}}. cases: {case: (the files that differ from a right submission, a part)}."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = {}
    for i, (files, part) in enumerate(cases.values()):
        parts.setdefault(part, []).append(str(write(folder / str(i), files)))
    done = run(["-c", GRADE], json.dumps([str(handout()), parts, limit]))
    assert done.returncode == 0, done.stdout + done.stderr
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    return {case: results[str(i)] for i, case in enumerate(cases)}
