"""What is shown is what runs: the formulas of lora.py and model.py compute in training and in scoring.

python -m pytest tests/test_what_runs.py
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import tokens

import lora
import model as chapter
from lora import mark_only_lora_as_trainable
from model import GPT, GPTConfig, attend, causal_mask
from plumbing.adapters.layers import cast_together
from plumbing.gpt2.batch import Batch


def close(ours, reference):
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("P, B, T", [*itertools.product((0, 1, 5), (1, 3), (1, 4)), (12, 8, 40), (9, 2, 130)])
def test_attention_written_out_is_torchs_own(P, B, T, monkeypatch):
    """Otherwise training on a CPU is of another model than on a GPU, where torch's fused kernel computes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_embd=16, n_head=2, vocab_size=50, block_size=200)).double()
    idx, prefix = tokens(B, T) % 50, tokens(1, P) % 50
    weights = torch.randn(B, T, 16, dtype=torch.float64)
    used = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: used.append(1) or fused(*a, **o))

    def run():
        model.zero_grad()
        states = model.hidden(idx, prefix=prefix)
        (states * weights).sum().backward()
        return [states.detach(), *(p.grad.clone() for p in model.transformer.parameters())]

    plain = run()
    assert not used  # the formula ran
    monkeypatch.setattr(chapter, "LONG", 0)
    torchs = run()
    assert len(used) == 2  # once a layer, prefix or not
    for ours, reference in zip(plain, torchs):
        close(ours, reference)


@pytest.mark.parametrize("K", [1, 7])
def test_one_query_looks_at_everything(K):
    """Otherwise each new token is written without the text before it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (1, K, K))
    close(attend(q, k, v, causal_mask(1, K, q)), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_runs_the_lines_of_lora_py(checkpoint, monkeypatch, dropout):
    """Otherwise a reader studies one forward pass, and another one trains."""
    model = GPT.from_pretrained(checkpoint, lora_rank=2, lora_alpha=4, lora_dropout=dropout)
    mark_only_lora_as_trainable(model)
    products = []
    linear = F.linear
    monkeypatch.setattr(lora.F, "linear", lambda *args: products.append(args[1].shape) or linear(*args))
    _, loss = model.train()(tokens(2, 5), tokens(2, 5))
    loss.backward()
    layers = [layer for layer in model.modules() if isinstance(layer, lora.LoRALinear) and layer.is_lora()]
    assert len(layers) == 6
    for layer in layers:
        assert layer.lora_B.grad.any()
        assert products.count(layer.lora_A.shape) >= 1 and products.count(layer.lora_B.shape) >= 1
    n_low_rank = sum(2 in shape for shape in products)
    assert n_low_rank == 2 * len(layers)  # x A^T and z B^T, once a layer
    products.clear()
    model.eval()(tokens(2, 5), tokens(2, 5))
    assert products and not any(2 in shape for shape in products)  # merged: W0 + (alpha / r) B A alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_cast_together_give_the_same_bits(checkpoint, dtype):
    """Otherwise an update trains other numbers than the layers of lora.py by themselves."""
    model = GPT.from_pretrained(checkpoint, lora_rank=2, lora_alpha=6)
    mark_only_lora_as_trainable(model).set_dtype(dtype).train()
    own = dict(model.named_parameters())
    batch = Batch(tokens(1, 3), tokens(2, 5), tokens(2, 5))
    found = []
    for layers in ([], model.adapted):
        model.zero_grad()
        with cast_together(layers, dtype):
            _, loss = model(batch.idx, batch.targets, prefix=batch.prefix)
        loss.backward()
        assert all(p is own[name] for name, p in model.named_parameters())
        found.append([loss.detach(), *(p.grad.clone() for p in own.values() if p.requires_grad)])
    assert len(found[0]) == 1 + 2 * 6
    for ours, reference in zip(*found):
        assert ours.dtype == torch.float32 and torch.equal(ours, reference)


def test_an_evaluation_leaves_the_weights_where_they_are(checkpoint):
    """Otherwise CUDA graphs are recorded anew after each evaluation, or compute with memory that is freed."""
    model = GPT.from_pretrained(checkpoint, lora_rank=2, lora_alpha=6).set_dtype(torch.bfloat16).train()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.eval()(tokens(2, 5))
    model.train()
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
