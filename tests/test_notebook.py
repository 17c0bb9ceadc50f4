"""The Colab notebook runs from top to bottom, here on the shipped model with few steps.

python -m pytest tests/test_notebook.py
"""

import os
import shutil
import subprocess
import zipfile

import nbclient
import nbformat
import pytest
from conftest import REPO, write_python

PATH = os.path.join(REPO, "notebooks", "lora_gpt2_colab.ipynb")


@pytest.fixture
def old_torchao(tmp_path):
    """A folder with a package torchao of the version that Colab has, which peft raises ImportError for."""
    folder = tmp_path / "packages"
    (folder / "torchao").mkdir(parents=True)
    (folder / "torchao" / "__init__.py").write_text('__version__ = "0.10.0"\n')
    (folder / "torchao-0.10.0.dist-info").mkdir()
    (folder / "torchao-0.10.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    return folder


def test_notebook_runs_and_is_stored_without_outputs(tmp_path, monkeypatch, old_torchao):
    """Lost if it fails: whoever opens the notebook in a browser is stopped by an error in a cell."""
    notebook = nbformat.read(PATH, 4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    for name in os.listdir(REPO):  # a folder of its own: outputs stay out of the repository
        if not name.startswith(".") and not name.startswith("out") and name != "configs":
            os.symlink(os.path.join(REPO, name), tmp_path / name)
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "finetune_mini_config.py"
    config.write_text(config.read_text().replace('"rt_reviews"', '"few.csv"'))  # its test set is scored five times
    words = ("a dull film", "a fine film")
    rows = [f"{words[i % 2]} number {i},{i % 2},{('train', 'validation', 'test')[i // 2 % 3]}" for i in range(90)]
    (tmp_path / "few.csv").write_text("\n".join(["text,label,split", *rows]))
    monkeypatch.setenv("NANOLORA_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(old_torchao))
    if os.path.exists("/proc/self/fd"):  # Linux: what the cells start are forks, which spare ten imports of torch
        write_python(tmp_path / "python")
        monkeypatch.setenv("FORKED_PYTHON", str(tmp_path / "python"))
        notebook.cells[1].source += "\nsys.executable = os.environ['FORKED_PYTHON']"
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")  # the last cell's tests would take minutes on a GPU
    (field,) = [cell for cell in notebook.cells if "check_gpu = False" in cell.source]
    field.source = field.source.replace("check_gpu = False", "check_gpu = True")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [str(o) for cell in notebook.cells for o in cell.get("outputs", [])]
    # What a program prints may come in pieces, which end anywhere.
    shown += ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook.cells]
    words_of_cells = ("garbage", "val_loss", "image/png", "2.7 Accuracy over the rank", "adapter_model.safetensors")
    for words in (*words_of_cells, "image/svg+xml"):
        assert any(words in o for o in shown), words
    assert any("test_the_benchmark_runs" in o for o in shown), shown[-1]
    assert not [o for o in shown if "error:" in o or "Traceback" in o]


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Runs the first cell in an empty folder as its form was filled in. Returns the commands that it ran."""
    code = nbformat.read(PATH, 4).cells[1].source
    monkeypatch.chdir(tmp_path)

    def run(repository=""):
        commands = []

        def record(command, check):
            assert check
            commands.append(command[1:])  # without the program's place
            if command[0] == "git":
                os.makedirs(command[-1])
                for name, text in (("lora.py", ""), ("requirements.txt", "torch>=2.6\nnumpy>=1.26\n")):
                    with open(os.path.join(command[-1], name), "w") as f:
                        f.write(text)

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", record)
            exec(code.replace('repository = ""', f"repository = {repository!r}"), {})
        return commands

    return run


INSTALL = ["-m", "pip", "install", "-q", "numpy>=1.26"]  # torch is here already


def test_first_cell_says_what_to_type(first_cell):
    """Lost if it fails: in an empty Colab the next cells fail one by one, and nobody says why."""
    with pytest.raises(FileNotFoundError, match=r"address above, or upload its zip"):
        first_cell()


def test_first_cell_clones_the_address(first_cell):
    """Lost if it fails: the form's address is not used, or Colab's torch is replaced, which takes minutes."""
    address = "https://example.org/someone/nanolora"
    assert first_cell(address) == [["clone", "-q", address, "nanolora"], INSTALL]
    assert os.path.exists("lora.py")


def test_first_cell_unpacks_an_uploaded_zip(tmp_path, first_cell):
    """Lost if it fails: who has no address, but a copy of the repository, cannot run the notebook, or finds the files
    of another zip among those of the repository."""
    with zipfile.ZipFile(tmp_path / "holidays.zip", "w") as f:
        f.writestr("beach.txt", "")
    with zipfile.ZipFile(tmp_path / "nanolora-main.zip", "w") as f:
        f.writestr("nanolora-main/lora.py", "")
        f.writestr("nanolora-main/requirements.txt", "torch>=2.6\nnumpy>=1.26\n")
    assert first_cell() == [INSTALL]
    assert os.path.exists("lora.py")
    assert not list(tmp_path.rglob("beach.txt"))
