"""A base is what it says it is: its head, its numbers, its words, and it stays the one that a run began with.

python -m pytest tests/gpt2/test_bases.py
"""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from conftest import tokens
from safetensors.torch import load_file, save_file

from lora import load_adapter, save_adapter
from model import GPT


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of the small GPT-2 that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "base")


def rewrite(directory, change, name="model.safetensors"):
    """Lets `change` edit the tensors of a file, which is saved anew by the library alone."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)


def error_line(action):
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a head of its own ---------------------------------------------------------------------------


def add_head(scale, dtype=torch.float32):
    def change(tensors):
        tensors["lm_head.weight"] = (scale * tensors["transformer.wte.weight"]).to(dtype)

    return change


@pytest.mark.parametrize("name", ["model.safetensors", "b.safetensors"])
def test_a_head_of_its_own_is_refused(base, name):
    """Lost if it fails: a model whose head is its own is read with another one, and writes other words."""
    if name != "model.safetensors":  # in a shard of its own, read before the embedding
        save_file({"lm_head.weight": torch.zeros(301, 64)}, base / "a.safetensors")
        os.rename(base / "model.safetensors", base / name)
        index = {"weight_map": {"lm_head.weight": "a.safetensors", "transformer.wte.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        rewrite(base, add_head(1.5))
    line = error_line(lambda: GPT.from_pretrained(str(base)))
    assert str(base) in line and "lm_head.weight" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_is_the_embedding_is_read(checkpoint, base, dtype):
    """Lost if it fails: models whose files hold the tied head a second time, rounded or not, are shut out."""
    rewrite(base, add_head(1, dtype))
    for compute in (torch.float32, torch.bfloat16):
        found, plain = (GPT.from_pretrained(str(d), dtype=compute) for d in (base, checkpoint))
        assert torch.equal(found.lm_head.weight, plain.lm_head.weight)


def test_a_classifier_needs_no_head(base):
    """Lost if it fails: a body that is sound cannot be given a classifier, for a head that is thrown away."""
    rewrite(base, add_head(1.5))
    assert GPT.from_pretrained(str(base), n_classes=2).score.weight.shape == (2, 64)


# --- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias"]
)
def test_a_model_with_nan_is_refused(base, name, value):
    """Lost if it fails: a spoiled model is scored as a table of garbage, or its training is called diverged."""

    def spoil(tensors):
        tensors[name].view(-1)[-2] = float(value)

    rewrite(base, spoil)
    for dtype in (torch.float32, torch.bfloat16):
        line = error_line(partial(GPT.from_pretrained, str(base), dtype=dtype))
        assert str(base / "model.safetensors") in line and name in line


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "bias"])
def test_an_adapter_with_nan_is_refused(checkpoint, tmp_path, leaf, value):
    """Lost if it fails: a spoiled adapter answers garbage, and the base is blamed for it."""
    model = GPT.from_pretrained(checkpoint, lora_rank=2, lora_alpha=4)
    save_adapter(model, str(tmp_path), bias="all")
    before = model(tokens(2, 9))[0]

    def spoil(tensors):
        key = next(key for key in tensors if leaf in key)
        tensors[key].view(-1)[0] = float(value)

    rewrite(tmp_path, spoil, "adapter_model.safetensors")
    assert "adapter_model.safetensors" in error_line(lambda: load_adapter(model, str(tmp_path)))
    assert torch.equal(model(tokens(2, 9))[0], before)


def test_infinity_in_an_old_causal_mask_is_none(checkpoint, base):
    """Lost if it fails: an old file is refused for a mask that is not read."""
    rewrite(base, lambda tensors: tensors.update({"h.0.attn.masked_bias": torch.tensor(float("-inf"))}))
    assert torch.equal(GPT.from_pretrained(str(base)).lm_head.weight, GPT.from_pretrained(checkpoint).lm_head.weight)
