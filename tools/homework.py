"""The handout, made from the solution: a copy of the repository with its exercises empty, and their grader.

    python -m tools.homework DIRECTORY
    python -m tools.homework grade SUBMISSION... --out=grades.csv
    python -m tools.homework gradescope OUT.zip

A function with the comment `# task` at its def, or above it, is an exercise. Its signature and docstring stay; its
body becomes an error that says what homework_tests/README.md asks for. For the teacher: docs/teaching.md.
"""

import ast
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

from plumbing.program.errors import UserError, one_line_errors
from tools.grading.gradescope import write_autograder

HERE = Path(__file__).resolve().parents[1]
# The other programs, the tests and the README answer what is asked: they are not copied.
COPIED = ["lora.py", "model.py", "dataloader.py", "train.py", "generate.py", "configurator.py", "constraints.txt"]
COPIED += ["requirements.txt", "LICENSE", "assets/**/*", "configs/*.py", "docs/data.md", "docs/data_kinds.md"]
COPIED += ["notebooks/*", "plumbing/**/*.py", "tools/homework_tests/*"]
# What would give an exercise away. A function becomes an error, since other files import it; the rest is cut.
SPOILERS = {
    "lora.py": ["LoRALinear.delta_weight"],
    "plumbing/adapters/attach.py": ["add_adapter", "add_to_output"],
    "plumbing/adapters/layers.py": ["merged_weight"],
    "plumbing/adapters/trainable.py": ["trainable_names"],
    "plumbing/data/labels.py": ["find_label"],
}
CALLED = {"LoRALinear", "mark_only_lora_as_trainable"}  # where an exercise calls these, only the calls are cut


def make_homework(directory: str) -> None:
    """Writes the copy into a new directory. UserError if it is there or a mark is missing; KeyError if a text is."""
    if Path(directory).exists():
        raise UserError(f"{directory} is there already: type the name of a new directory")
    with tempfile.TemporaryDirectory(dir=Path(directory).absolute().parent) as new:
        copy = Path(new) / "copy"
        copy.mkdir()
        page = (HERE / "tools/homework_tests/README.md").read_text("utf-8")
        items = re.findall(r"^- `([\w.]+)`: (.*(?:\n  .*)*)", page, re.MULTILINE)
        asked = {name: " ".join(text.split()) for name, text in items}  # {exercise: what is asked}
        for path in [path for pattern in COPIED for path in HERE.glob(pattern) if path.is_file()]:
            name = path.relative_to(HERE).as_posix()
            to = copy / name.removeprefix("tools/")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
            if path.suffix == ".py" and name in {*COPIED, *SPOILERS}:
                to.write_text(empty(path.read_text("utf-8"), asked, SPOILERS.get(name, ())), "utf-8")
            elif path.suffix == ".ipynb":  # without the cells that call what is not copied
                notebook = json.loads(path.read_text("utf-8"))
                others = re.compile("sweep|bench|tests/")
                notebook["cells"] = [cell for cell in notebook["cells"] if not others.search("".join(cell["source"]))]
                to.write_text(json.dumps(notebook, indent=1) + "\n", "utf-8")
        (copy / "homework_tests/README.md").rename(copy / "README.md")
        (copy / "plumbing/adapters/mergeable.py").unlink()
        for path in (copy / "docs").glob("*.md"):  # where a link's page is not copied, its words stay
            link = re.compile(r"\[([^]]*)\]\(((?!https?:)[^)#]+)[^)]*\)")
            text = path.read_text("utf-8")
            path.write_text(link.sub(lambda m: m[0] if (copy / "docs" / m[2]).exists() else m[1], text), "utf-8")
        if asked:
            raise UserError(f"no function with `# task` for {', '.join(asked)} of homework_tests/README.md")
        copy.rename(directory)


def empty(source: str, asked: dict[str, str], spoilers: list[str]) -> str:
    """A file's source without the bodies of its exercises and without its spoilers."""
    source = re.sub(r".*import MergeableLinear\n", "", source)
    source = re.sub(r"\(MergeableLinear\):.*", "(nn.Linear):", source)
    lines = source.splitlines()
    cuts = []  # (first line, last line, what comes in their place), counted from 1
    for name, node in definitions(ast.parse(source)):
        above, header = lines[node.lineno - 2 : node.lineno]
        if "# task" in (above.strip(), header[-6:]):
            first = node.lineno - (above.strip() == "# task")
            cuts.append((first, node.lineno, [header.partition("  #")[0] + "  # task"]))
            cuts.append(cut_body(lines, node, f"exercise {name}: {asked.pop(name)}"))
        elif name in spoilers and isinstance(node, ast.FunctionDef) and "." not in name:
            cuts.append(cut_body(lines, node, "left out: it is part of an exercise, to be written there"))
        elif name in spoilers:
            cuts.append((with_comments(lines, node), node.end_lineno, []))
    for first, last, new in sorted(cuts, reverse=True):
        lines[first - 1 : last] = new
    return "\n".join([*lines, ""])


def definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """(name, node) of a file's classes and functions, and of the classes' methods."""
    nodes = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    methods = [(f"{c.name}.{m.name}", m) for c in classes for m in c.body if isinstance(m, ast.FunctionDef)]
    return [(node.name, node) for node in nodes] + methods


def cut_body(lines: list[str], node: ast.FunctionDef, problem: str) -> tuple[int, int, list[str]]:
    """An error in place of the calls, or of all that follows the docstring and the inherited constructor."""
    statements = [s for s in ast.walk(node) if isinstance(s, (ast.Assign, ast.Expr))]
    calls = [s for s in statements if CALLED & {n.id for n in ast.walk(s) if isinstance(n, ast.Name)}]
    n_kept = (ast.get_docstring(node) is not None) + (node.name == "__init__")
    cut = calls or node.body[n_kept:]
    text = [f"    {part!r}" for part in textwrap.wrap(problem, 90, drop_whitespace=False)]
    error = [" " * cut[0].col_offset + line for line in ("raise NotImplementedError(", *text, ")")]
    return with_comments(lines, cut[0]), cut[-1].end_lineno, error


def with_comments(lines: list[str], node: ast.stmt) -> int:
    """The line on which the blank lines and comments before a statement begin."""
    first = node.lineno
    while not lines[first - 2].strip() or lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first


def grade(submissions: list[str], out: str = "", parts: str = "1,2,3,4,5,6", jobs: str = "", limit: str = "120"):
    """Grades folders or zip files, each named after its student: a line of `out` for each."""
    paths = {Path(text).stem: Path(text) for text in submissions}
    wrong = [text for text in submissions if not (Path(text).is_dir() or zipfile.is_zipfile(text))]
    if not paths or wrong:
        raise UserError(f"{', '.join(wrong) or 'no submission'}: type folders or zip files, one for each student")
    if len(paths) < len(submissions):
        raise UserError("two submissions have one name: name each folder or zip file after its student")
    if not out.endswith(".csv") or Path(out).exists() or Path(out).with_suffix(".jsonl").exists():
        raise UserError(f"--out={out}: type the name of a new file, such as --out=grades.csv")
    try:
        chosen, jobs, limit = {*map(int, parts.split(","))}, int(jobs or os.cpu_count()), float(limit)
    except ValueError:
        jobs = 0
    if not (jobs > 0 and limit > 0 and chosen <= {1, 2, 3, 4, 5, 6}):
        raise UserError("type --parts=1,2,3 (of 1 to 6), --jobs=4 (processes) and --limit=120 (seconds a part)")
    from tools.grading.submissions import write_grades  # not before: this imports torch

    with tempfile.TemporaryDirectory() as new:
        make_homework(f"{new}/copy")
        write_grades(out, paths, Path(new, "copy"), sorted(chosen), jobs, limit)


def main(arguments: list[str]) -> None:
    flags = dict(text.lstrip("-").partition("=")[::2] for text in arguments if text.startswith("-"))
    match [text for text in arguments if not text.startswith("-")]:
        case ["grade", *submissions] if flags.keys() <= {"out", "parts", "jobs", "limit"}:
            grade(submissions, **flags)
        case ["gradescope", out] if not flags:
            if Path(out).exists():
                raise UserError(f"{out} is there already: type the name of a new file")
            with tempfile.TemporaryDirectory() as new:
                make_homework(f"{new}/copy")
                write_autograder(out, Path(new, "copy"))
        case [directory] if not flags and directory not in ("grade", "gradescope"):
            make_homework(directory)
            print(f"{directory}: its README.md says what is asked; docs/teaching.md is for the teacher")
        case _:
            raise UserError("type python -m tools.homework NEW_DIRECTORY, grade or gradescope: docs/teaching.md")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
