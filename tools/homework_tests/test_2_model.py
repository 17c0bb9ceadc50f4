"""PYTEST_DONT_REWRITE  Part 2, model.py: which layers of GPT-2 have an adapter.

python -m pytest homework_tests/test_2_model.py
"""

import re

import torch

from lora import LoRALinear
from model import GPT, GPTConfig

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "block_size": 16}


def new_model(**settings):
    torch.manual_seed(0)
    config = GPTConfig(**SIZES, lora_rank=2, lora_alpha=6.0, lora_dropout=0.25, **settings)
    try:
        return GPT(config)
    except ValueError as e:  # GPT looks for lora_A in its layers
        hint = "LoRALinear wants what config.lora returns; config.lora a full name as transformer.h.0.attn.c_attn"
        raise AssertionError(f"with lora_targets={config.lora_targets!r} no layer has an adapter: {hint}") from e


def adapted(model):
    """Names of the layers that have an adapter, without the block's number."""
    return {name.split(".", 3)[3] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def test_attention_has_its_two_adapters():
    found = adapted(new_model())
    missing = {"attn.c_attn", "attn.c_proj"} - found
    assert not missing, f"{', '.join(sorted(missing))} has no adapter: query, key, value and the output projection do"
    assert found == {"attn.c_attn", "attn.c_proj"}, (
        f"{', '.join(sorted(found))} have an adapter: by default attention alone does; config.lora(NAME) knows it"
    )


def test_attention_layers_have_their_sizes():
    attn = new_model().transformer.h[0].attn
    for name, wanted in (("c_attn", (48, 16)), ("c_proj", (16, 16))):
        layer = getattr(attn, name)
        assert isinstance(layer, LoRALinear), f"attn.{name} is a {type(layer).__name__}, not a LoRALinear"
        shape = tuple(layer.weight.shape)
        assert shape == wanted, f"with C = 16 the weight of attn.{name} is {shape}, not (out, in) = {wanted}"
        assert layer.bias is not None, f"attn.{name} has no bias; GPT-2's layers have one"


def test_mlp_layers_have_their_sizes():
    mlp = new_model().transformer.h[0].mlp
    for name, wanted in (("c_fc", (64, 16)), ("c_proj", (16, 64))):
        shape = tuple(getattr(mlp, name).weight.shape)
        assert shape == wanted, f"with C = 16 the weight of mlp.{name} is {shape}, not (out, in) = {wanted}"


def test_attention_and_mlp_follow_lora_targets():
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{name}"
        model = new_model(lora_targets=f"^{re.escape(name)}$")
        found = sorted(name for name, layer in model.named_modules() if hasattr(layer, "lora_A"))
        assert found == [name], (
            f"with lora_targets for {name} alone, adapters are on {', '.join(found)}: config.lora wants each layer's "
            "own full name, with the block's number"
        )


def test_attention_passes_on_alpha_and_dropout():
    for block in new_model().transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj):
            assert hasattr(layer, "lora_scaling"), "attn.c_attn or attn.c_proj has no adapter"
            assert layer.lora_scaling == 3.0, (
                f"rank 2 and alpha 6 give a layer with lora_scaling {layer.lora_scaling}"
            )
            assert layer.lora_dropout.p == 0.25, f"lora_dropout = 0.25 gives a layer with {layer.lora_dropout}"


def test_adapters_of_attention_and_mlp_change_nothing_at_first():
    test_attention_layers_have_their_sizes()
    test_mlp_layers_have_their_sizes()
    idx = torch.tensor([[15496, 11, 314, 716]])
    with torch.no_grad():
        base, _ = GPT.from_pretrained("gpt2-mini").eval()(idx)
        model = GPT.from_pretrained("gpt2-mini", lora_rank=2, lora_alpha=6.0, lora_targets="c_(attn|proj|fc)$")
        logits, _ = model.eval()(idx)
    far = (logits - base).abs().max().item()
    assert far < 1e-3, f"gpt2-mini with new adapters gives other logits than without, by up to {far:.3g}"
