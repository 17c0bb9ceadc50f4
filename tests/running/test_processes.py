"""Several processes, and machines that are switched off: the result is that of one.

python -m pytest tests/running/test_processes.py
"""

import os
import shutil
import socket
import time

import psutil
import pytest
from conftest import (
    REPO,
    Forked,
    finish,
    flags,
    here,
    largest_difference,
    one_line_of,
    read_metrics,
    start,
    write_reviews,
)


@pytest.mark.parametrize(
    "world, n_train, n_validation, batch_size, accumulation",
    [(2, 48, 12, 8, 1), (2, 41, 12, 5, 2), (3, 41, 13, 4, 2)],
    ids=["even", "odd", "three"],
)
def test_several_processes_equal_one(place, world, n_train, n_validation, batch_size, accumulation):
    """Otherwise a result does not carry over to a second device, or an example is lost or counted twice in the
    validation loss where their number does not divide; in the last two cases a process even has no example of an
    epoch's last batch."""
    name = f"processes-{world}-{n_train}"
    data = place / f"reviews-{name}"
    shutil.copytree(place / "reviews", data)
    write_reviews(data / "train.csv", n_train)
    write_reviews(data / "validation.csv", n_validation)
    settings = {"dataset": data, "rank": 4, "alpha": 16, "max_iters": 12, "eval_interval": 4, "warmup_iters": 2}
    settings |= {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    settings |= {"dropout": 0, "lr": 1e-3}
    settings |= {"grad_clip": 7}  # bites in some updates and not in others: else Adam hides a gradient's size
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # as torchrun sets them
    argv = ["train.py", *flags(place, f"{name}-many", **settings)]
    many = [start(*argv, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(world)]
    one = here(flags(place, name, **settings))
    for process in many:
        finish(process)
    assert largest_difference(place / name, place / f"{name}-many") < 1e-5
    for a, b in zip(one, read_metrics(place / f"{name}-many"), strict=True):
        for key in ("iter", "epoch", "val_loss", *(["train_loss"] if a["iter"] else [])):
            assert a[key] == pytest.approx(b[key], abs=1e-5), (key, a, b)


def test_processes_of_two_dtypes_are_refused(place):
    """Lost if it fails: a T4 computes in float16, with a scaled loss, an A100 beside it in bfloat16, and the sum of
    their gradients is that of neither."""
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    argv = [flags(place, "dtypes", dtype=dtype, max_iters=2) for dtype in ("float32", "bfloat16")]
    many = [start("train.py", *a, RANK=rank, LOCAL_RANK=rank, **common) for rank, a in enumerate(argv)]
    for process in many:
        _, err = finish(process, code=2)
        assert "bfloat16 and float32" in err
    assert not (place / "dtypes" / "train_config.json").exists()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def switch_off(machine):
    """torchrun and the processes that it started end at once."""
    for process in [machine, *psutil.Process(machine.pid).children(recursive=True)]:
        process.kill()
    machine.wait()


def test_a_machine_that_is_switched_off_and_on_again(place):
    """Otherwise training over several machines gives another result than on one, or ends with the first that fails.
    Two machines: two torchruns that share no folder; gloo between them."""
    settings = {"rank": 4, "alpha": 16, "max_iters": 90, "eval_interval": 10, "warmup_iters": 2, "batch_size": 8}
    settings |= {"dropout": 0, "lr": 1e-3, "auto_resume": True}
    port = free_port()

    def machine(i):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr=127.0.0.{i + 1}"]
        torchrun += [f"--rdzv-conf=is_host={i == 0},keep_alive_interval=1", "train.py"]
        # Without the second, torch 2.13 does not let a machine back in.
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [*torchrun, *flags(place, f"machine-{i}", **settings)]
        return Forked(command, REPO, env, None, log=place / f"machine-{i}.log")

    machines = [machine(0), machine(1)]
    try:
        while (
            not (place / "machine-0" / "metrics.jsonl").exists() or read_metrics(place / "machine-0")[-1]["iter"] < 20
        ):
            assert machines[0].poll() is None, (place / "machine-0.log").read_text()
            time.sleep(0.01)
        switch_off(machines[1])
        killed_at = read_metrics(place / "machine-0")[-1]["iter"]
        machines[1] = machine(1)
        one = here(flags(place, "one-machine", **settings))
        codes = [process.wait(timeout=120) for process in machines]
        assert codes == [0, 0], (place / "machine-0.log").read_text() + (place / "machine-1.log").read_text()
    finally:
        for process in machines:
            if process.poll() is None:
                switch_off(process)
    said = (place / "machine-0.log").read_text()
    assert killed_at < 90 and "from update 0 to 90" in said
    assert any(f"from update {it} to 90" in said for it in range(20, 90))
    assert not (place / "machine-1" / "checkpoint.pt").exists()
    assert largest_difference(place / "one-machine", place / "machine-0") < 1e-5
    for a, b in zip(one, read_metrics(place / "machine-0"), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


SUM = """
import sys
import torch
import torch.distributed as dist
from types import SimpleNamespace
from plumbing.running import machine
processes = machine.Processes(SimpleNamespace(device="cpu", batch_size=8))
machine.SUM_BYTES = 4000  # a thousand numbers
torch.manual_seed(processes.world_rank)
params = [torch.nn.Parameter(torch.empty(n, 3)) for n in (1, 100, 900, 300, 2, 33, 1, 333, 1)]
for p in params[1:]:  # the first has no gradient in this process
    p.grad = torch.randn(p.shape)
flat = torch.cat([torch.zeros(3), *(p.grad.flatten() for p in params[1:])])
dist.all_reduce(flat)
largest, cat = [], torch.cat
torch.cat = lambda tensors: largest.append(sum(t.nbytes for t in tensors)) or cat(tensors)
addresses = [p.grad.data_ptr() for p in params[1:]]
processes.sum_gradients(params)
assert torch.equal(flat, cat([p.grad.flatten() for p in params]))
assert [p.grad.data_ptr() for p in params[1:]] == addresses and 2 <= len(largest) and max(largest) <= 4000, largest
processes.leave()
"""


def test_gradients_are_summed_in_pieces():
    """Lost if it fails: full tuning over several GPUs takes the memory of one more model than the table says, or a
    gradient is another one than in one sum."""
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for process in [start("-c", SUM, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]:
        finish(process)


def test_more_processes_than_examples_end_in_one_line(place, monkeypatch, capfd):
    """Otherwise processes without work hang or divide by zero on a machine that is paid by the hour."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    assert "batch_size=1" in one_line_of(capfd, flags(place, "crowd", batch_size=1))


def test_a_rank_in_the_environment_is_not_torchruns(place):
    """Lost if it fails: the run of `export RANK; for RANK in 1 16; do python train.py --rank=$RANK` is lost."""
    for rank in ("16", ""):
        out, _ = finish(start("train.py", *flags(place, f"rank-{rank}", rank=2, alpha=8, max_iters=2), RANK=rank))
        assert (place / f"rank-{rank}" / "adapter_model.safetensors").exists()
        assert out.count("RANK=") == bool(rank)
    _, err = finish(start("train.py", *flags(place, "half"), WORLD_SIZE="2"), code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and "unset WORLD_SIZE" in err
    assert not (place / "half").exists()
