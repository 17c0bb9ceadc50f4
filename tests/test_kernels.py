"""The fast paths for CPUs against the plain functions that they replace, in float64, values and gradients.

python -m pytest tests/test_kernels.py
"""

import itertools

import pytest
import torch

from lora import LoRALinear
from model import Layout, attend_with_prefix
from plumbing import cpu_kernels


def close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def run(function, inputs, weights):
    """(value, gradients) of (function(*inputs) * weights).sum()."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    (out * weights).sum().backward()
    return out.detach(), [t.grad for t in inputs]


@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_is_the_plain_one(bias, monkeypatch):
    """Otherwise training on a CPU follows another gradient than LoRA's."""
    torch.manual_seed(0)
    layers = []
    for kind in (LoRALinear, cpu_kernels.FastLoRALinear):
        torch.manual_seed(1)
        layer = kind(16, 24, bias, dtype=torch.float64, lora_rank=4, lora_alpha=6)
        layer.requires_grad_(False)
        torch.nn.init.normal_(layer.lora_B)
        layers.append(layer)
    used = []
    apply = cpu_kernels.FrozenLinearWithLoRA.apply
    monkeypatch.setattr(cpu_kernels.FrozenLinearWithLoRA, "apply", lambda *a: used.append(1) or apply(*a))
    x = torch.randn(7, 16, dtype=torch.float64)
    weights = torch.randn(7, 24, dtype=torch.float64)

    def through(layer):
        def function(x, A, B):
            del layer.lora_A, layer.lora_B  # plain tensors in their place, so that gradients reach them
            layer._parameters["lora_A"] = A
            layer._parameters["lora_B"] = B
            return layer(x)

        return function

    A = layers[0].lora_A.detach().clone()
    B = layers[0].lora_B.detach().clone()
    plain, plain_grads = run(through(layers[0]), (x, A, B), weights)
    assert not used
    fast, fast_grads = run(through(layers[1]), (x, A, B), weights)
    assert used  # the fast path is the one that ran
    close(fast, plain)
    for ours, reference in zip(fast_grads, plain_grads):
        close(ours, reference)


@pytest.mark.parametrize("P, B, T", [*itertools.product((0, 1, 5), (1, 3), (1, 4)), (12, 8, 40), (9, 2, 130)])
def test_fast_attention_is_the_plain_one(P, B, T, monkeypatch):
    """Otherwise training on a CPU is of another model than the one that is scored."""
    torch.manual_seed(0)
    qkv = torch.randn(P + B * T, 3, 2, 8, dtype=torch.float64)
    weights = torch.randn(P + B * T, 16, dtype=torch.float64)
    mask = torch.ones(T, P + T, dtype=torch.bool).tril(P) if P and T > 1 else None
    layout = Layout(B, T, P, None, mask)
    plain, plain_grad = run(lambda t: attend_with_prefix.__wrapped__(t, layout), (qkv,), weights)
    used = []
    apply = cpu_kernels.PrefixAttention.apply
    monkeypatch.setattr(cpu_kernels.PrefixAttention, "apply", lambda *a: used.append(1) or apply(*a))
    fast, fast_grad = run(lambda t: attend_with_prefix(t, layout), (qkv,), weights)
    assert used
    close(fast, plain)
    close(fast_grad[0], plain_grad[0])
