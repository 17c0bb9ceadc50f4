"""Files are whole or the old ones, on Windows too.

python -m pytest tests/program/test_files.py
"""

import errno
import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags, here, resume
from safetensors.torch import load_file

import generate
import train
from configurator import configure
from plumbing.data.token_cache import whole_folder
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.gpt2.files import find_model
from plumbing.program import files
from plumbing.program.errors import one_line_errors
from plumbing.program.files import write_json


@pytest.fixture
def windows(monkeypatch):
    """os.replace as Windows has it while another program has the old file open: `refusals` times, then it works."""
    state = SimpleNamespace(refusals=0, waited=[])
    plain = os.replace

    def replace(new, old):
        if state.refusals > 0:
            state.refusals -= 1
            raise PermissionError(13, "Access is denied", new, 5, old)
        plain(new, old)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", state.waited.append)
    return state


def test_a_file_that_is_open_elsewhere_for_a_moment_is_replaced_after_it(tmp_path, windows):
    """Lost if it fails: on Windows a virus scanner that looks at the last checkpoint ends the run."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    windows.refusals = 3
    write_json(path, "new")
    assert json.loads(path.read_text()) == "new"
    windows.refusals = 2
    with whole_folder(tmp_path / "folder") as new:
        (Path(new) / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"
    assert len(windows.waited) == 5


def test_a_file_that_stays_open_elsewhere_is_one_line(tmp_path, windows, capsys):
    """Lost if it fails: on Windows a metrics.jsonl that is open in an editor is a traceback, or is lost."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    windows.refusals = 99
    with pytest.raises(SystemExit) as end, one_line_errors():
        write_json(path, "new")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert str(path) in error and "close the program that has it open" in error and error.count("\n") == 1
    assert json.loads(path.read_text()) == "old"
    assert os.listdir(tmp_path) == ["file.json"]


# --- folders and what ships ----------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_link_into_nowhere_as_out_dir_is_one_line(place, tmp_path, capsys, inside):
    """Lost if it fails: a link to a disk that is not mounted is "File exists"."""
    os.symlink(tmp_path / "not-mounted", tmp_path / "link")
    for program in ("train", "generate"):
        argv = flags(place, "link", out_dir=f"{tmp_path}/link{inside}", rank=2, alpha=8, max_iters=2)
        with pytest.raises(SystemExit) as stop:
            train.main(argv) if program == "train" else generate.main(configure(argv, trains=False))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert str(tmp_path / "link") in err and str(tmp_path / "not-mounted") in err
    (tmp_path / "not-mounted").mkdir()  # as the line says
    train.main(flags(place, "link", out_dir=f"{tmp_path}/link{inside}", rank=2, alpha=8, max_iters=2))
    assert (tmp_path / "not-mounted" / inside.strip("/") / "adapter_model.safetensors").exists()


def test_an_install_without_what_ships_says_what_to_do(monkeypatch, tmp_path, capsys):
    """Lost if it fails: after a plain `pip install .` the first command ends in a path that nobody knows."""
    monkeypatch.setattr(files, "ASSETS", str(tmp_path / "assets"))
    gpt2_encoding.cache_clear()
    for use in (gpt2_encoding, lambda: find_model("gpt2-mini")):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            use()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "pip install -e ." in err


def test_safetensors_reads_what_is_written(tmp_path):
    """Lost if it fails: an adapter or a model opens in no other program, or with other numbers."""
    dtypes = (torch.uint8, torch.bfloat16, torch.float32, torch.bool, torch.float16, torch.int64, torch.float64)
    tensors = {f"{i}": torch.arange(3 * i).reshape(3, i).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"n": torch.tensor(7, dtype=torch.int32), "across": torch.randn(3, 2).t()}
    files.write_tensors(tmp_path / "one", tensors, "a note")
    files.write_tensors(tmp_path / "other", dict(reversed(tensors.items())), "a note")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    for read in (load_file(tmp_path / "one"), dict(files.read_tensors(tmp_path / "one", "a note"))):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


# --- the clock -----------------------------------------------------------------------------------


def test_a_full_disk_names_the_file(monkeypatch, tmp_path):
    """Lost if it fails: "No space left on device", and nobody knows of which disk."""

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"run\.json"):
        write_json(str(tmp_path / "run.json"), {})
    assert not os.listdir(tmp_path)


def test_a_clock_that_is_set_back_changes_nothing(place, monkeypatch):
    """Lost if it fails: where the clock is set back during a run without LoRA, no checkpoint is saved for hours, or a
    speed is negative."""
    now = itertools.count(2e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr("plumbing.running.saving.FULL_SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "save_best", lambda *args: None)  # the weights, not the checkpoint
    saved = []
    save = "plumbing.running.saving.save_checkpoint"
    monkeypatch.setattr(save, lambda out_dir, state: saved.append(state["progress"]["iter"]))
    monkeypatch.setattr(train, "print_end", lambda *args: None)
    metrics = here(flags(place, "clock", rank=0, max_iters=4, eval_interval=1))
    assert saved == [0, 1, 2, 3, 4]
    assert all(line["examples_per_s"] > 0 for line in metrics[1:])
    monkeypatch.undo()
    now = itertools.count(2e9, -1000)
    here(flags(place, "clock-lora", rank=2, alpha=8, max_iters=2))
    monkeypatch.setattr(time, "time", lambda: next(now))
    generate.main(configure(resume(place, "clock-lora"), trains=False))
    assert json.loads((place / "clock-lora" / "accuracy.json").read_text())["seconds"] >= 0
