"""Device and dtype: what is chosen, and that a device which computes wrongly is not.

python -m pytest tests/test_machine.py
"""

import os
from types import SimpleNamespace

import pytest
import torch

from plumbing import machine

LIES = {
    "the loss": lambda loss, grad, idx: [loss + 0.1, grad, idx],
    "a gradient": lambda loss, grad, idx: [loss, torch.cat([grad[1:], grad[:1]]), idx],
    "token ids": lambda loss, grad, idx: [loss, grad, idx.flip(0)],
    "not a number": lambda loss, grad, idx: [loss, grad * float("nan"), idx],
    "an error": None,
}


@pytest.fixture
def fake_mps(monkeypatch):
    """A machine that says it has mps, whose results are the CPU's as `lie` changes them."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    honest = machine.try_device

    def set_lie(lie):
        def run(device):
            results = honest("cpu")
            if device == "cpu":
                return results
            if lie is None:
                raise RuntimeError("no kernel for this operator")
            return lie(*results)

        monkeypatch.setattr(machine, "try_device", run)

    return set_lie


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_lies_is_passed_over(fake_mps, lie, capsys):
    """Otherwise a driver's bug trains garbage for hours, without an error."""
    fake_mps(LIES[lie])
    assert machine.pick_device() == "cpu"
    assert capsys.readouterr().out.startswith("note: mps computes wrong numbers here (")


def test_an_honest_device_is_taken(fake_mps, capsys):
    """Otherwise nobody with an accelerator gets it without a flag."""
    fake_mps(lambda *results: list(results))
    assert machine.pick_device() == "mps"
    assert not capsys.readouterr().out


def test_layers_of_one_dtype_get_float32(capsys):
    """Otherwise a lora.py of one's own ends in an error about dtypes on machines with bfloat16."""
    assert machine.pick_dtype("cpu", "auto", mixed=False) == torch.float32
    assert not capsys.readouterr().out
    assert machine.pick_dtype("cpu", "bfloat16", mixed=False) == torch.float32
    assert "float32 instead of bfloat16" in capsys.readouterr().out


class FewGPUs:
    """torch.cuda of a machine with two GPUs."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_is_one_line(monkeypatch, device):
    """Otherwise a wrong --nproc_per_node ends in as many tracebacks as there are processes."""
    monkeypatch.setattr(torch, "cuda", FewGPUs)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc_per_node=2"):
        machine.Processes(SimpleNamespace(device=device, batch_size=8))


def test_several_processes_do_not_share_one_accelerator(monkeypatch):
    """Otherwise torchrun on a Mac ends in a traceback from inside gloo."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"device=mps: .*--device=cpu"):
        machine.Processes(SimpleNamespace(device="mps", batch_size=8))


def test_deterministic_refuses_what_is_not():
    """Otherwise --deterministic is a word, and two runs on a GPU differ all the same."""
    machine.compute_deterministically()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
