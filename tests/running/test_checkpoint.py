"""A run's folder and the checkpoint in it: locked while a run writes there, whole on a full disk, and named in one
line where it is damaged or another run's.

python -m pytest tests/running/test_checkpoint.py
"""

import shutil
import time

import pytest
import torch
from conftest import finish, flags, here, one_line_of, read_checkpoint, resume, start
from filelock import FileLock, SoftFileLock

from plumbing.running.checkpoint import hash_state, locked_folder


def test_a_second_run_in_the_same_folder_is_refused(place):
    """Lost if it fails: two runs write over each other's files, and neither says so."""
    argv = ["train.py", *flags(place, "shared", max_iters=4)]
    first = start(*argv, "--max_iters=100000", "--eval_interval=100000")
    try:
        while not (place / "shared" / "checkpoint.pt").exists():
            time.sleep(0.05)
            assert first.poll() is None, first.communicate()
        before = (place / "shared" / "checkpoint.pt").read_bytes()
        _, err = finish(start(*argv), code=2)
        assert "another run is writing there" in err and err.count("\n") == 1
        assert (place / "shared" / "checkpoint.pt").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    finish(start(*argv))  # a killed run leaves no lock behind


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(38, "Function not implemented")])
def test_a_file_system_without_locks_is_no_obstacle(place, monkeypatch, capsys, error):
    """Lost if it fails: on a cluster's file system without locks no run can be started, or each is told that another
    one is writing there."""

    def acquire(self, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with locked_folder(str(place / "unlocked")):
        pass
    out = capsys.readouterr().out
    assert out.startswith("note: ") and str(place / "unlocked") in out and out.count("\n") == 1


def test_a_lock_file_that_no_process_holds_is_no_obstacle(place, monkeypatch, capsys):
    """Lost if it fails: where filelock makes do with a file that exists, a run that was killed cannot be resumed."""
    out_dir = place / "left-over"
    out_dir.mkdir()
    (out_dir / ".lock").write_text("a killed run's")
    monkeypatch.setattr("plumbing.running.checkpoint.FileLock", SoftFileLock)
    with locked_folder(str(out_dir)):
        pass
    assert "its file system has no locks" in capsys.readouterr().out


def test_full_disk(place):
    """Lost if it fails: a full disk costs the last good checkpoint too, or does not say what is missing."""
    here(flags(place, "full", rank=0, max_iters=4))
    good = (place / "full" / "checkpoint.pt").read_bytes()
    again = ["train.py", *resume(place, "full", max_iters=8)]
    _, err = finish(start(*again, limit=len(good) // 2), code=2)
    assert "checkpoint.pt could not be written, it takes" in err and "MB" in err and "Traceback" not in err
    assert (place / "full" / "checkpoint.pt").read_bytes() == good
    assert not list((place / "full").glob("*.tmp"))
    finish(start(*again))


# --- damaged, or another run's --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(place):
    """The folder of a short run."""
    here(flags(place, "run", max_iters=1))
    return place / "run"


def test_a_checkpoint_of_another_model_is_named(place, run, tmp_path, capfd):
    """Otherwise mixed-up files train on from a model that is neither."""
    shutil.copytree(run, tmp_path / "run")
    here(flags(place, tmp_path / "other", rank=2, alpha=8, max_iters=1))
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "run" / "checkpoint.pt")
    line = one_line_of(capfd, resume(tmp_path, "run"))
    assert "checkpoint.pt" in line and "lora_A" in line


@pytest.mark.parametrize("changed", ["no skipped", "one more", "no scaler"])
def test_a_checkpoint_of_another_version_is_named(place, run, tmp_path, capfd, changed):
    """Otherwise whoever updates the program in the middle of a run meets a traceback, or loses a count."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    state = read_checkpoint(tmp_path / "run")
    del state["sha256"]
    if changed == "no skipped":
        del state["progress"]["skipped"]
    elif changed == "one more":
        state["progress"]["epoch"] = 3
    else:
        del state["scaler"]
    torch.save(state | {"sha256": hash_state(state)}, path)
    line = one_line_of(capfd, resume(tmp_path, "run"))
    assert str(path) in line and "another version" in line and "--out_dir" in line
