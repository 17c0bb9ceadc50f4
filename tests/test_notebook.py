"""The Colab notebook runs from top to bottom, here on the shipped model with few steps.

python -m pytest tests/test_notebook.py
"""

import os

import nbclient
import nbformat

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(REPO, "notebooks", "lora_gpt2_colab.ipynb")


def test_notebook_runs_and_is_stored_without_outputs(tmp_path, monkeypatch):
    """Lost if it fails: whoever opens the notebook in a browser is stopped by an error in a cell."""
    notebook = nbformat.read(PATH, 4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
    for name in os.listdir(REPO):  # a folder of its own: outputs stay out of the repository
        if not name.startswith(".") and not name.startswith("out"):
            os.symlink(os.path.join(REPO, name), tmp_path / name)
    monkeypatch.setenv("NANOLORA_STEPS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [str(o) for cell in notebook.cells for o in cell.get("outputs", [])]
    for words in ("garbage", "val_loss", "image/png", "2.7 Accuracy over the rank", "adapter_model.safetensors"):
        assert any(words in o for o in shown), words
    assert not [o for o in shown if "error:" in o or "Traceback" in o]
