"""What a run promises when it is killed, when the disk is full, and when another run wants its folder.

python -m pytest tests/running/test_robust.py
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock, SoftFileLock

from model import GPT, GPTConfig
from plumbing.data.token_cache import whole_folder
from plumbing.program.errors import one_line_errors
from plumbing.program.files import write_json
from plumbing.running.checkpoint import lock_folder

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64)).save_pretrained(str(folder / "base"))
    rows = [{"text": f"film {i}", "label": "yes" if i % 2 else "no"} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def start(place, *flags, limit=None):
    """train.py on the small model; no file may grow beyond `limit` bytes."""
    argv = [f"--init_from={place}/base", f"--dataset={place}/rows.jsonl", "--device=cpu", "--eval_interval=2"]
    argv = [*argv, "--batch_size=8", "--max_iters=4", "--label_names=None"]
    if "--init_from=resume" not in flags:
        argv += ["--rank=16", "--alpha=64"]
    argv += flags
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    cap = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=REPO, env=env, text=True, preexec_fn=cap, **pipes
    )


def test_killed_again_and_again():
    """Lost if it fails: a run that a machine took down is another run than the one that was started."""
    done = subprocess.run(
        [sys.executable, "tests/soak.py", "20"], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills, every run ended in the unbroken run's bits" in done.stdout


def test_a_second_run_in_the_same_folder_is_refused(place):
    """Lost if it fails: two runs write over each other's files, and neither says so."""
    first = start(place, f"--out_dir={place}/shared", "--max_iters=100000", "--eval_interval=100000")
    try:
        while not (place / "shared" / "checkpoint.pt").exists():
            time.sleep(0.05)
            assert first.poll() is None, first.communicate()
        before = (place / "shared" / "checkpoint.pt").read_bytes()
        second = start(place, f"--out_dir={place}/shared")
        _, err = second.communicate(timeout=100)
        assert second.returncode == 2 and "another run is writing there" in err and err.count("\n") == 1
        assert (place / "shared" / "checkpoint.pt").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    third = start(place, f"--out_dir={place}/shared")  # a killed run leaves no lock behind
    assert third.wait(100) == 0


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(38, "Function not implemented")])
def test_a_file_system_without_locks_is_no_obstacle(place, monkeypatch, capsys, error):
    """Lost if it fails: on a cluster's file system without locks no run can be started, or each is told that another
    one is writing there."""

    def acquire(self, **options):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    lock_folder(str(place / "unlocked"))
    out = capsys.readouterr().out
    assert out.startswith("note: ") and str(place / "unlocked") in out and out.count("\n") == 1


def test_a_lock_file_that_no_process_holds_is_no_obstacle(place, monkeypatch, capsys):
    """Lost if it fails: where filelock makes do with a file that exists, a run that was killed cannot be resumed."""
    out_dir = place / "left-over"
    out_dir.mkdir()
    (out_dir / ".lock").write_text("a killed run's")
    monkeypatch.setattr("plumbing.running.checkpoint.FileLock", SoftFileLock)
    lock_folder(str(out_dir))
    assert "its file system has no locks" in capsys.readouterr().out


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


def test_full_disk(place):
    """Lost if it fails: a full disk costs the last good checkpoint too, or does not say what is missing."""
    first = start(place, f"--out_dir={place}/full", "--rank=0")
    assert first.wait(100) == 0
    good = (place / "full" / "checkpoint.pt").read_bytes()
    size = len(good) // 2
    again = ["--init_from=resume", f"--out_dir={place}/full", "--max_iters=8"]
    second = start(place, *again, limit=size)
    _, err = second.communicate(timeout=100)
    assert second.returncode == 2, err
    assert "checkpoint.pt could not be written, it takes" in err and "MB" in err and "Traceback" not in err
    assert (place / "full" / "checkpoint.pt").read_bytes() == good
    assert not list((place / "full").glob("*.tmp"))
    third = start(place, *again)
    assert third.wait(100) == 0
