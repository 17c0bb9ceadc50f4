"""The house: imports run one way, and what the pages name is there.

python -m pytest tests/test_house.py
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENT = {"LoRALinear", "mark_only_lora_as_trainable"}  # all that the handout's lora.py has
CHAPTERS = {  # what each may import, besides plumbing
    "lora": set(),
    "model": {"lora"},
    "dataloader": set(),
    "configurator": set(),
    "train": {"model", "dataloader", "configurator", "lora"},
    "generate": {"model", "dataloader", "configurator", "lora"},
}
ABOUT_LORA = {"peft_format"}  # of plumbing: those that may import lora.py
TOOLS = {path.stem for path in ROOT.glob("*.py")} - CHAPTERS.keys()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*/*.md")]
PAGES.append(ROOT / "homework_tests" / "README.md")


def imports(path):
    """(module, name) of each import in a file, wherever it stands; name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module.split(".")[0], alias.name) for alias in node.names)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")], ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    """Lost if it fails: a chapter cannot be read, or replaced by one's own, without those that come after it."""
    ours = [(module, name) for module, name in imports(path) if module in CHAPTERS.keys() | TOOLS]
    modules = {module for module, _ in ours}
    if path.parent.name == "plumbing":
        assert modules <= ({"lora"} if path.stem in ABOUT_LORA else set())
    elif path.stem in CHAPTERS:
        assert modules <= CHAPTERS[path.stem]
    if path.stem in ("model", "train", "generate"):
        assert {name for module, name in ours if module == "lora"} <= ASSIGNMENT


def test_what_is_installed_is_all_there_is():
    """Lost if it fails: after `pip install -e .` one of the chapters or tools cannot be imported."""
    listed = re.search(r"py-modules = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL).group(1)
    assert set(re.findall(r'"(\w+)"', listed)) == CHAPTERS.keys() | TOOLS


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
    for name in re.findall(r"[\w/]+\.(?:py|yaml|ipynb)\b", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "tests", "plumbing")), name
