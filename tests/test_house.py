"""The house: imports run one way, rooms stay small, and what the pages name is there.

python -m pytest tests/test_house.py
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENT = {"LoRALinear", "mark_only_lora_as_trainable"}  # all that the handout's lora.py has
FLOORS = [  # a file imports from its own room and from those of lower floors
    {"plumbing/program"},
    {"plumbing/adapters", "plumbing/gpt2", "plumbing/running"},
    {"plumbing/data"},
    {"plumbing/scoring"},
    {"lora"},
    {"model", "dataloader", "configurator"},
    {"train", "generate"},
    {"tools/runs", "tools/grading"},
    {"tools/report"},
    {"tools"},
]
FLOOR_OF = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
LISTED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
NAMES = [name for name in LISTED.stdout.split() if (ROOT / name).exists()]
FILES = [name for name in NAMES if name.endswith(".py") and re.match(r"(plumbing|tools)/|\w+\.py$", name)]
FILES = [name for name in FILES if not name.startswith("tools/homework_tests/")]
ROOMS = sorted({str(Path(name).parent) for name in FILES} - {"."})
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*/*.md")]
ELSEWHERE = {"convert_hf_to_gguf.py"}  # of llama.cpp
PAGES.append(ROOT / "tools" / "homework_tests" / "README.md")


def room_of(file):
    return file.removesuffix(".py") if "/" not in file else str(Path(file).parent)


def imports(file):
    """(file of ours, name) of each import, wherever it stands; name is None for a whole module."""
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        pairs = []
        if isinstance(node, ast.Import):
            pairs = [(alias.name, None) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            pairs = [(node.module, alias.name) for alias in node.names]
        for module, name in pairs:
            path = module.replace(".", "/")
            for target, what in ((f"{path}/{name}.py", None), (f"{path}.py", name), (f"{path}/__init__.py", name)):
                if target in FILES:
                    yield target, what
                    break


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file):
    """Lost if it fails: a chapter cannot be read, or replaced by one's own, without those that come after it."""
    room = room_of(file)
    for target, name in imports(file):
        there = room_of(target)
        assert there == room or FLOOR_OF[there] < FLOOR_OF[room], f"{file} imports {target}"
        if room in ("model", "train", "generate") and there == "lora":
            assert name in ASSIGNMENT


def test_no_circle():
    """Lost if it fails: two files can only be read together."""
    graph = {file: {target for target, _ in imports(file)} for file in FILES}
    while leaves := [file for file, targets in graph.items() if not targets & graph.keys()]:
        for file in leaves:
            del graph[file]
    assert not graph


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_says_what_it_is_for(room):
    """Lost if it fails: who looks for a piece of the program has to open every file."""
    files = [file for file in FILES if str(Path(file).parent) == room]
    assert len([file for file in files if not file.endswith("__init__.py")]) <= 8
    line = (ROOT / room / "__init__.py").read_text("utf-8").strip()
    assert line.startswith('"""') and line.endswith('"""') and "\n" not in line


def test_what_is_installed_is_all_there_is():
    """Lost if it fails: after `pip install -e .` one of the chapters cannot be imported."""
    settings = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"py-modules = \[(.*?)\]", settings, re.DOTALL).group(1)
    assert set(re.findall(r'"(\w+)"', listed)) == {path.stem for path in ROOT.glob("*.py")}
    assert 'include = ["plumbing*"]' in settings  # tools is a name that others have too


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_what_a_page_names_is_there(page):
    """Lost if it fails: a reader follows a link into nothing, or types a command whose file is missing."""
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
        target, _, section = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE)
            assert section in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles], link
    for name in set(re.findall(r"\w[\w/]*\.(?:py|yaml|ipynb)\b", text)) - ELSEWHERE:
        assert any(f"/{there}".endswith(f"/{name}") for there in NAMES), name
    for module in re.findall(r"python -m ((?:tools|plumbing)[\w.]*)", text):
        assert f"{module.replace('.', '/')}.py" in FILES, module
