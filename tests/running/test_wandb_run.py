"""wandb offline, without a key or a network, hung or killed: training goes on.

python -m pytest tests/running/test_wandb_run.py
"""

import os
import socket
import time

import psutil
from conftest import finish, flags, read_metrics, start


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


def test_training_goes_on_when_wandb_hangs(place):
    """Otherwise a server that takes the connection and never answers holds a GPU for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, nobody answers
        settings = {"rank": 2, "alpha": 8, "max_iters": 2, "wandb_log": True}
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        env |= {"WANDB_API_KEY": "0" * 40, "HOME": str(place)}
        out, _ = finish(start("train.py", *flags(place, "wandb-hangs", **settings), **env))
    assert len([line for line in out.splitlines() if "wandb is off" in line]) == 1
    assert (place / "wandb-hangs" / "adapter_model.safetensors").exists()


def test_training_goes_on_when_wandb_dies(place):
    """Otherwise a run of hours ends where wandb's own process is killed, as it is when memory is short."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 150, "eval_interval": 5, "wandb_log": True}
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
    assert read_metrics(place / "wandb-dies")[-1]["iter"] == 150
