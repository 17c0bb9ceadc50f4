"""bench.py: what is measured is what was asked for.

python -m pytest tests/tools/test_bench.py
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from configurator import configure
from tools import bench


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
    seconds, result = bench.timed("cuda:1", lambda x: events.append("work") or x, 5)
    assert events == ["cuda:1", "work", "cuda:1"] and seconds >= 0 and result == 5
    assert bench.peak_memory("cuda:1") == 20
    assert bench.machine("cuda:1")["gpu"] == "the name of cuda:1"
    assert bench.machine("cpu")["gpu"] == "none"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_is_measured_at_every_batch_size(dtype, monkeypatch):
    """Otherwise the table's larger batches have nothing beside them, or losses are compared that may differ."""
    seen = {}

    @contextlib.contextmanager
    def running(bench, systems):
        yield {name: SimpleNamespace(close=lambda: None) for name in systems}

    def alternate(bench, case, pipes, jobs):
        seen[case] = set(pipes)
        return {name: [(1.0, 5.0 if "batch 8" in case else len(name), None)] for name in pipes}

    monkeypatch.setattr(bench, "running", running)
    monkeypatch.setattr(bench, "alternate", alternate)
    for name in ("add_share", "add_rows"):
        monkeypatch.setattr(bench, name, lambda *a: None)
    monkeypatch.setattr(bench, "settings", lambda *a: bench.Config())
    monkeypatch.setattr(bench, "batches", lambda *a: [])
    whole = SimpleNamespace(config=bench.BenchConfig(), device="cpu", dtypes=[dtype], parts=["train"])
    bench.train_part(whole)
    assert whole.losses == [5.0, 5.0]  # of the first step
    assert len(seen) == 8
    for case, systems in seen.items():
        assert {f"ours, {dtype}", f"{bench.PEER}, {dtype}"} <= systems, case
        assert (f"{bench.PEER}, float32" in systems) == (dtype == "float32" or "batch 8" in case), case
