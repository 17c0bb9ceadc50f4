"""What an adapter may hold, and what it leaves behind: nothing, when it is exchanged or taken off.

python -m pytest tests/adapters/test_leftovers.py
"""

import pytest
import torch
from conftest import tokens
from peft import PeftModel
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import train
from configurator import make_config
from lora import attach_lora, load_adapter, mark_only_lora_as_trainable, save_adapter
from model import GPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 301, "n_positions": 64}
OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leftovers") / "base"
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, **OFF, bos_token_id=300, eos_token_id=300, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def by_hand(base):
    return GPT.from_pretrained(base).eval()


def by_hooks(base):
    return GPT2LMHeadModel.from_pretrained(base).eval()


def logits(model, idx=None):
    idx = tokens(3, 12) if idx is None else idx
    with torch.no_grad():
        out = model(idx)
    return out[0][:, -1] if isinstance(out, tuple) else out.logits[:, -1]


# --- what an adapter cannot hold -----------------------------------------------------------------


@pytest.mark.parametrize("also", ["wte", ".", r"transformer\.w", "lm_head|ln_f|wte"])
def test_a_tied_embedding_is_refused_before_the_first_update(base, tmp_path, also):
    """Lost if it fails: a run trains to its end, and its adapter opens nowhere."""
    config = make_config(init_from=base, rank=2, trainable=also, out_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight") as caught:
        train.build_model(config, "cpu", torch.float32)
    assert "\n" not in str(caught.value) and "--rank=0" in str(caught.value)
    for model in (by_hand(base), by_hooks(base)):
        attach_lora(model, "c_attn", rank=2, alpha=4)
        with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
            save_adapter(model, str(tmp_path / "adapter"), also=also)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("also", ["wpe", "ln_f", r"wpe|ln_", r"h\.0\.ln_1"])
def test_what_is_not_tied_goes_on(base, tmp_path, also):
    """Lost if it fails: positions and norms, which many train next to LoRA, are refused along with the embedding."""
    config = make_config(init_from=base, rank=2, trainable=also, out_dir=str(tmp_path / "out"))
    model = train.build_model(config, "cpu", torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1)
    save_adapter(model, str(tmp_path), also=also)
    expected = logits(model.eval())
    for other in (by_hand(base), by_hooks(base)):
        load_adapter(other, str(tmp_path))
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-3)
    peft = PeftModel.from_pretrained(by_hooks(base), tmp_path).eval()
    torch.testing.assert_close(logits(peft), expected, rtol=0, atol=1e-3)


def test_a_tied_embedding_trains_where_all_is_saved(base, tmp_path):
    """Lost if it fails: without LoRA, or as a classifier that has no head of words, the embedding cannot be tuned."""
    config = make_config(init_from=base, rank=0, trainable="wte", out_dir=str(tmp_path))
    model = train.build_model(config, "cpu", torch.float32)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    config = make_config(init_from=base, rank=2, trainable="wte", task="classify", out_dir=str(tmp_path))
    model = train.build_model(config, "cpu", torch.float32, n_classes=2)
    save_adapter(model, str(tmp_path), also=train.also_trained(config))
    load_adapter(GPT.from_pretrained(base, n_classes=2), str(tmp_path))


def test_tied_biases_are_no_obstacle(tmp_path):
    """Lost if it fails: bias="all" on a masked language model, with its bias under two names, is refused."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=60, **sizes))
    attach_lora(model, "query", rank=2, alpha=4)
    mark_only_lora_as_trainable(model, bias="all")
    save_adapter(model, str(tmp_path), bias="all")
