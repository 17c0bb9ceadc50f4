"""wandb offline, without a key or a network, hung or killed: training goes on.

python -m pytest tests/running/test_wandb_run.py
"""

import os
import pty
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import REPO, finish, flags, here, read_metrics, start


@pytest.fixture(scope="module", autouse=True)
def hanging(place):
    """A run beside the other tests, for wandb waits a while: its server takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, nobody answers
        settings = {"rank": 2, "alpha": 8, "max_iters": 2, "wandb_log": True}
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        env |= {"WANDB_API_KEY": "0" * 40, "HOME": str(place)}
        # Seconds to wait: for the run, for an answer; and no telemetry of wandb's own, which waits for 20 more.
        env |= {"WANDB_INIT_TIMEOUT": "1", "WANDB_HTTP_TIMEOUT": "1", "WANDB_ERROR_REPORTING": "false"}
        yield start("train.py", *flags(place, "wandb-hangs", **settings), **env)


def test_a_name_without_logging_is_noted(place, capsys):
    """Otherwise the handout's --wandb_run_name does nothing, without a word."""
    here(flags(place, "named", rank=2, alpha=8, max_iters=1, wandb_run_name="r2"))
    assert capsys.readouterr().out.count("--wandb_log=True") == 1


def test_wandb_offline_writes_a_run(place):
    """Otherwise a user without network or account loses the dashboard that wandb_log=True promises."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 2, "wandb_log": True, "wandb_run_name": "a-name"}
    finish(start("train.py", *flags(place, "wandb", **settings), WANDB_MODE="offline", HOME=str(place)))
    (run,) = (place / "wandb").glob("wandb/offline-run-*/*.wandb")
    logged = run.read_bytes()
    assert b"val_loss" in logged and b"a-name" in logged


def test_training_goes_on_without_wandb(place):
    """Otherwise a missing key or network, found after the data were read and the model built, ends the run."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 2, "wandb_log": True}
    os.makedirs(place / "home")  # no key of the user's is found here
    env = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "",
        "HOME": place / "home",
    }
    out, _ = finish(start("train.py", *flags(place, "no-wandb", **settings), **{k: str(v) for k, v in env.items()}))
    notes = [line for line in out.splitlines() if "wandb is off" in line]
    assert len(notes) == 1 and "WANDB_MODE=offline" in notes[0]
    assert (place / "no-wandb" / "adapter_model.safetensors").exists()


def test_training_goes_on_when_wandb_dies(place):
    """Otherwise a run of hours ends where wandb's own process is killed, as it is when memory is short."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 60, "eval_interval": 5, "wandb_log": True}
    run = start(
        "train.py", *flags(place, "wandb-dies", **settings), WANDB_MODE="offline", HOME=str(place), TMPDIR=str(place)
    )
    while not (place / "wandb-dies" / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert run.poll() is None, run.communicate()
    core = [p for p in psutil.Process(run.pid).children(recursive=True) if "wandb" in " ".join(p.cmdline())]
    assert core
    for process in core:
        process.kill()
    out, _ = finish(run)
    assert len([line for line in out.splitlines() if "wandb is off" in line]) == 1
    assert read_metrics(place / "wandb-dies")[-1]["iter"] == 60


def test_training_goes_on_when_wandb_hangs(place, hanging):
    """Otherwise a server that takes the connection and never answers holds a GPU for nothing."""
    out, _ = finish(hanging)
    assert len([line for line in out.splitlines() if "wandb is off" in line]) == 1
    assert (place / "wandb-hangs" / "adapter_model.safetensors").exists()


def on_a_terminal(argv, env, timeout=120):
    """(exit code, what it wrote) of a program whose three streams are a terminal at which nobody types."""
    leader, follower = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = subprocess.Popen([sys.executable, *argv], cwd=REPO, env=env, **streams)
    os.close(follower)
    said = []

    def read():
        try:
            while data := os.read(leader, 4096):
                said.append(data)
        except OSError:  # the program has ended
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
        reader.join()
        os.close(leader)
    return code, b"".join(said).decode(errors="replace")


def test_a_terminal_without_a_key_is_asked_nothing(place):
    """Lost if it fails: a run that was left alone on a terminal stands at wandb's prompt in the morning."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 2, "wandb_log": True}
    (place / "no-key").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    env |= {"HOME": str(place / "no-key"), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    code, said = on_a_terminal(["train.py", *flags(place, "terminal", **settings)], env)
    assert code == 0, said
    assert said.count("wandb is off") == 1 and "best validation loss" in said
    assert (place / "terminal" / "adapter_model.safetensors").exists()
