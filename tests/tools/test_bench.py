"""The benchmark: what is measured is what was asked for.

python -m pytest tests/tools/test_bench.py
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, start

from configurator import configure
from tools import bench
from tools.runs import launches, measure


def test_its_own_flags_are_read():
    """Otherwise the benchmark ends before it begins: its config has no run to resume, as that of train.py has."""
    config = configure(["--quick", "--steps=3"], cls=bench.BenchConfig, trains=False)
    assert config.quick and config.steps == 3


def test_a_named_gpu_is_the_one_that_is_measured(monkeypatch):
    """Otherwise --device=cuda:1 waits for cuda:0, and its figures are those of launching work, not of doing it."""
    memory = {"cuda:0": 10, "cuda:1": 20}
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device="cuda:0": events.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device="cuda:0": memory[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device="cuda:0": f"the name of {device}")
    seconds, result = measure.timed("cuda:1", lambda x: events.append("work") or x, 5)
    assert events == ["cuda:1", "work", "cuda:1"] and seconds >= 0 and result == 5
    assert measure.peak_memory("cuda:1") == 20
    assert measure.describe_machine("cuda:1")["gpu"] == "the name of cuda:1"
    assert measure.describe_machine("cpu")["gpu"] == "none"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_is_measured_at_every_batch_size(dtype, monkeypatch):
    """Otherwise the table's larger batches have nothing beside them, or losses are compared that may differ."""
    seen = {}

    @contextlib.contextmanager
    def running(systems, device):
        yield dict.fromkeys(systems)

    def measure(case, workers, jobs):
        seen[case] = set(workers)
        return {name: [(1.0, 5.0 if "batch 8" in case else len(name), None)] for name in workers}

    monkeypatch.setattr(bench, "running", running)
    whole = SimpleNamespace(config=bench.BenchConfig(only="train"), dtypes=[dtype], measure=measure)
    whole.device, whole.on_gpu = "cpu", False
    whole.settings = lambda shape, rank, size, dtype: bench.Config(dtype=dtype)
    whole.batches = lambda *a: []
    bench.measure_training(whole)
    assert whole.losses == [5.0, 5.0]  # of the first step
    assert len(seen) == 8
    for case, systems in seen.items():
        assert {f"{who}, {kind}" for who in ("ours", bench.PEER) for kind in (dtype, "float32")} <= systems, case


def test_help_says_how_the_program_is_started():
    """Lost if it fails: who copies the usage line, python bench.py, gets no such file."""
    out, _ = finish(start("-m", "tools.bench", "--help"))
    assert out.startswith("usage: python -m tools.bench [configs/FILE.py] [--key=value ...]\n")
    out, _ = finish(start("train.py", "--help"))
    assert out.startswith("usage: python train.py [configs/FILE.py] [--key=value ...]\n")


def test_an_update_launches_no_more_kernels_than_it_did(tmp_path, monkeypatch):
    """Otherwise the GPU's training, which waits for launches, becomes slower, and no test on a CPU tells."""
    config = bench.Config(init_from=launches.save_narrow(tmp_path), rank=4, alpha=16, dropout=0.05, dtype="bfloat16")
    config.device = "cpu"
    monkeypatch.setattr("model.LONG", 0)  # set by `launches`, and put back here
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    count = launches.launches(launches.train_narrow, config)
    count(None)  # AdamW's moments are made
    assert count(None)[1] <= 1300
