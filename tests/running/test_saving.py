"""A thread writes a run's files while the loop goes on: what it writes is what was, in order, and all of it.

python -m pytest tests/running/test_saving.py
"""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import differences, finish, flags, here, read_checkpoint, resume, start, stop_after

import train
from plumbing.running import endings, saving
from plumbing.running.checkpoint import Progress, save_checkpoint
from plumbing.running.saving import Saver

LIMIT = 60  # seconds until a test that hangs fails


@pytest.fixture
def saver():
    config = SimpleNamespace(rank=2, save_interval=0)
    with Saver(SimpleNamespace(config=config, processes=SimpleNamespace(is_first=True)), Progress()) as saver:
        yield saver


def test_what_is_written_is_what_was(saver):
    """Lost if it fails: a checkpoint or an adapter mixes weights of several updates. The loop changes every tensor
    while the thread has not written yet."""
    may_write = threading.Event()
    written = []

    def write(name, state):
        assert may_write.wait(LIMIT)
        written.append([name, *(t.tolist() for t in state["tensors"]), state["list"]])

    tensors = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2).t(), torch.zeros((), dtype=torch.float16)]
    numbers = [1]
    saver.write(write, "first", {"tensors": [t.detach() for t in tensors], "list": numbers})
    saver.start()
    with torch.no_grad():
        for t in tensors:
            t += 1
    numbers.append(2)
    may_write.set()
    saver.write(write, "second", {"tensors": [t.detach() for t in tensors], "list": numbers})
    saver.finish()
    assert written == [
        ["first", [0, 0, 0], [[0, 0], [0, 0]], 0, [1]],
        ["second", [1, 1, 1], [[1, 1], [1, 1]], 1, [1, 2]],
    ]


def test_nothing_is_written_after_an_error(saver):
    """Lost if it fails: the best weights could not be written, and a checkpoint says that they were."""
    written = []

    def refuse():
        raise OSError("no space left")

    saver.write(refuse)
    saver.write(written.append, "a checkpoint")
    with pytest.raises(OSError, match="no space left"):
        saver.finish()
    with pytest.raises(OSError, match="no space left"):
        saver.save_or_stop(0)
    assert written == []
    saver.error = None  # it has been told


def test_the_loop_goes_on_while_a_checkpoint_is_written(place, monkeypatch):
    """Lost if it fails: a fast GPU waits for the disk after each evaluation. The first checkpoint is written when the
    third evaluation is over; the one between is left out, and the last one is not."""
    evaluations = []
    is_third = threading.Event()
    saved = []
    plain = train.evaluate

    def evaluate(run):
        evaluations.append(plain(run))
        if len(evaluations) == 3:
            is_third.set()
        return evaluations[-1]

    def save_late(out_dir, state):
        assert is_third.wait(LIMIT)
        saved.append(state["progress"]["iter"])
        save_checkpoint(out_dir, state)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(saving, "save_checkpoint", save_late)
    here(flags(place, "late", rank=2, alpha=8, max_iters=8, eval_interval=2, lr=1e-3))
    monkeypatch.undo()
    here(flags(place, "prompt", rank=2, alpha=8, max_iters=8, eval_interval=2, lr=1e-3))
    assert saved[0] == 0 and 2 not in saved and saved[-1] == 8
    assert differences(place / "prompt", place / "late") == []


def test_a_stopped_run_waits_for_its_checkpoint(place, monkeypatch, capsys):
    """Lost if it fails: a run says that it is saved, ends, and its last updates are not on the disk."""
    printed = []

    def save_slowly(out_dir, state):
        threading.Event().wait(0.3)
        printed.append(capsys.readouterr().out)
        save_checkpoint(out_dir, state)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(saving, "save_checkpoint", save_slowly)
        stop_after(patch, 3)
        here(flags(place, "stopped", rank=2, alpha=8, max_iters=8))
    assert end.value.code == 143
    assert "stopped at update 3" in capsys.readouterr().out and "stopped" not in "".join(printed)
    assert read_checkpoint(place / "stopped")["progress"]["iter"] == 3


def test_a_full_disk_ends_a_run_with_lora(place):
    """Lost if it fails: training goes on for hours and nothing of it is saved, or the last checkpoint is lost."""
    here(flags(place, "filled", rank=16, max_iters=4))
    good = (place / "filled" / "checkpoint.pt").read_bytes()
    # Hours of training, if the error were not noticed.
    again = ["train.py", *resume(place, "filled", max_iters=1_000_000, save_interval=1)]
    _, err = finish(start(*again, limit=len(good) // 2), code=2)
    assert "checkpoint.pt could not be written, it takes" in err and err.count("\n") == 1
    assert (place / "filled" / "checkpoint.pt").read_bytes() == good
    assert not list((place / "filled").glob("*.tmp"))


def test_best_weights_that_cannot_be_written_are_one_line(place, monkeypatch, capfd):
    """Lost if it fails: an adapter's folder that went read-only is a traceback from a thread, and exit code 0."""

    def refuse(*args):
        raise OSError(30, "Read-only file system", "adapter_model.safetensors")

    monkeypatch.setattr("plumbing.program.files.write_tensors", refuse)
    with pytest.raises(SystemExit) as end:
        train.main(flags(place, "refused", rank=2, alpha=8, max_iters=2))
    err = capfd.readouterr().err
    assert end.value.code == 2 and "Read-only file system" in err and "Traceback" not in err
    assert not (place / "refused" / "checkpoint.pt").exists()


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """Lost if it fails: a cluster sends SIGTERM to each process and torchrun passes it on, and the run ends without
    its checkpoint. A later one still ends the program at once."""
    killed = []
    now = [100.0]
    monkeypatch.setattr(endings, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(endings.os, "kill", lambda pid, number: killed.append(number))
    with endings.StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.1
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and killed == []
        now[0] += 5
        signal.raise_signal(signal.SIGTERM)
        assert killed == [signal.SIGTERM]
    with endings.StopSignals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert killed == [signal.SIGTERM, signal.SIGINT]
