"""The optimizers are those whose names they have, and float16 leaves out what overflows.

python -m pytest tests/running/test_optimizers.py
"""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    flags,
    here,
    leaves,
)
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2LMHeadModel

import train
from configurator import Config, configure
from plumbing.running import machine
from plumbing.running.machine import Processes
from plumbing.running.optimizers import AdamW


def test_adamw_is_torchs(place):
    """Otherwise the optimizer that every run depends on is another than the one it is called, or forgets its moments
    on resuming."""

    def made(cls, state=None, **options):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (9,), (3, 3))]
        groups = [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1:2], "weight_decay": 0.0}]
        optimizer = cls(groups, lr=0.01, betas=(0.9, 0.95), **options)
        for i in range(8):
            if i == 4 and state is not None:  # as on resuming
                optimizer = cls(groups, lr=1.0, betas=(0.5, 0.5), **options)
                optimizer.load_state_dict(state)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) if i > 1 or p.shape != (3, 3) else None
            optimizer.param_groups[0]["lr"] = 0.01 * (i + 1)
            optimizer.step()
            optimizer.zero_grad()
            if i == 3:
                state = state and copy.deepcopy(optimizer.state_dict())
        return params, optimizer.state_dict()

    for resumed in (None, True):
        ours, state = made(AdamW, resumed)
        theirs, their_state = made(torch.optim.AdamW, fused=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        assert leaves(state["state"]) == leaves(their_state["state"])


def test_lora_plus_gives_the_groups_and_rates_of_peft(place):
    """Otherwise --lora_plus=16 is another method than the paper's."""
    settings = {"rank": 4, "alpha": 8, "lr": 1e-3, "weight_decay": 0.1, "lora_plus": 16, "lora_bias": "lora_only"}
    run = train.set_up(configure(flags(place, "plus", **settings)))
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True, bias="lora_only"
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(place / "base"), lora)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, **options)

    def rates(optimizer, model):
        names = {
            p: re.sub(r"base_model\.model\.|base_layer\.|\.default\.weight", "", n)
            for n, p in model.named_parameters()
        }
        groups = [(names[p], g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
        return sorted(groups)

    (ours,) = run.optimizers
    assert rates(ours, run.model) == rates(theirs, model) and len(rates(ours, run.model)) == 12
    peaks = {g["lr"]: g["peak_lr"] for g in ours.param_groups}
    assert peaks == {1e-3: 1e-3, 0.016: 0.016}
    full = train.set_up(configure(flags(place, "plus-full", **settings | {"rank": 0, "lora_bias": "none"})))
    assert {g["lr"] for g in full.optimizers[0].param_groups} == {1e-3}  # without LoRA there is no B


def test_float16_skips_are_counted_and_shown(place, capsys, monkeypatch):
    """Otherwise a float16 run that drops half of its updates looks like one that learns slowly."""
    scalers = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, init_scale=2.0**40)
            scalers.append(self)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    # Refused on CPUs, for its speed.
    monkeypatch.setattr(machine, "pick_dtype", lambda *args, **options: torch.float16)
    settings = {"rank": 2, "alpha": 8, "batch_size": 8, "max_iters": 48, "eval_interval": 24, "lr": 1e-2}
    metrics = here(flags(place, "float16", **settings))
    halved = 40 - math.log2(scalers[0].get_scale())  # each skip halves the scale
    assert metrics[-1]["skipped"] == halved > 2
    assert f"skipped {halved:.4f}" in capsys.readouterr().out
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"]  # and the updates after them count


@pytest.fixture
def overflowing(monkeypatch):
    """A run of two optimizers in float16 on a CPU, whose first parameter's gradient is infinite where it is 1."""

    def loss(params, batch):
        return (params[0] - 1).sqrt().sum() + params[1].sum()

    def make(scale=2.0**10):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizers = [torch.optim.SGD([{"params": [p], "peak_lr": 0.1}], lr=0.1) for p in params]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        processes = Processes(Config(device="cpu"))
        run = {"config": Config(out_dir="nowhere"), "params": params, "model": params, "optimizers": optimizers}
        return SimpleNamespace(**run, scaler=scaler, processes=processes)

    monkeypatch.setattr(train, "compute_loss", loss)
    return make


def test_where_one_gradient_overflows_no_optimizer_steps(overflowing):
    """Otherwise clipping spreads AdamW's infinite gradient over Muon's matrices, and they become NaN for good."""
    run = overflowing()
    _, was_skipped, _ = train.update(run, [(None, 1.0)], 30)
    assert was_skipped
    assert all(torch.equal(p, torch.ones(3)) and p.grad is None for p in run.params)
    assert run.scaler.get_scale() == 2.0**9
    run.params[0].data.fill_(2.0)
    _, was_skipped, _ = train.update(run, [(None, 1.0)], 30)
    assert not was_skipped
    assert (run.params[0] < 2).all() and (run.params[1] < 1).all()


def test_overflow_without_end_ends_the_run(overflowing, capsys):
    """Otherwise the scale falls to 0 and every later update is left out, to the end of the run."""
    with pytest.raises(SystemExit) as ended:
        train.update(overflowing(scale=1.0), [(None, 1.0)], 30)
    assert ended.value.code == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--dtype=float32" in error and "update 30" in error


def test_a_process_without_examples_in_its_first_update_goes_on(place, monkeypatch):
    """Otherwise torchrun in float16 ends in the scaler's assertion where a first batch is short."""
    monkeypatch.setattr(machine, "pick_dtype", lambda *args, **options: torch.float16)
    config = configure(flags(place, "short", rank=2, alpha=8, max_iters=2))
    run = train.set_up(config)
    for p in run.params:  # what the other processes' sum gives it, after no scaled loss of its own
        p.grad = torch.zeros_like(p)
    assert train.update(run, [], 0) == (0.0, False, None)
