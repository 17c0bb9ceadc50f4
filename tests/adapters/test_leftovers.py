"""What an adapter may hold, and what it leaves behind: nothing, when it is exchanged or taken off.

python -m pytest tests/adapters/test_leftovers.py
"""

import copy
import functools
import json
import math
import shutil

import pytest
import student_lora
import torch
from conftest import tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import train
from configurator import make_config
from lora import attach_lora, detach_lora, load_adapter, mark_only_lora_as_trainable, merge_lora, save_adapter
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


@pytest.mark.parametrize("also", ["wpe", "ln_f", r"wpe|ln_", r"h\.0\.ln_1", "mlp", r"h\.1\.mlp\.c_fc\.bias"])
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


@pytest.mark.parametrize("also", [r"h\.1\.attn\.c_proj", r"h\.0\.", r"c_attn\.bias$", r"c_attn\.weight$"])
def test_a_layer_with_an_adapter_is_not_trained_whole_too(base, tmp_path, also):
    """Lost if it fails: a run trains to its end, and PEFT cannot open its adapter."""
    config = make_config(init_from=base, rank=2, trainable=also, out_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"trainable=.*--rank=0"):
        train.build_model(config, "cpu", torch.float32)
    model = by_hooks(base)
    attach_lora(model, "attn", rank=2, alpha=4)
    with pytest.raises(ValueError, match="trainable="):
        save_adapter(model, str(tmp_path / "adapter"), also=also)
    assert not list(tmp_path.iterdir())


def test_weights_that_older_versions_wrote_turned_are_read(base, tmp_path):
    """Lost if it fails: a run of an older version answers with its weights turned, or not at all."""
    model = train.build_model(
        make_config(init_from=base, rank=2, lora_targets="c_attn", trainable="c_proj", out_dir=str(tmp_path)),
        "cpu",
        torch.float32,
    )
    torch.nn.init.normal_(model.transformer.h[0].attn.c_proj.weight)  # square: its shape does not tell
    save_adapter(model, str(tmp_path), also="c_proj")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["revision"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    turned = {n: t.t().contiguous() if n.endswith("c_proj.weight") else t for n, t in tensors.items()}
    save_file(turned, path)
    other = by_hand(base)
    load_adapter(other, str(tmp_path))
    assert torch.equal(logits(other), logits(model.eval()))


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


# --- what an adapter leaves ----------------------------------------------------------------------

KINDS = {  # what an adapter of PEFT's brings beside A and B
    "plain": {"target_modules": ["c_attn"]},
    "all biases": {"target_modules": ["c_attn"], "bias": "all"},
    "their biases": {"target_modules": ["attn.c_proj"], "bias": "lora_only", "r": 3},
    "modules": {"target_modules": ["c_attn", "c_fc"], "modules_to_save": ["ln_f", "wpe"]},
    "layers": {"target_modules": ["c_attn"], "modules_to_save": ["mlp", "attn.c_proj"]},
    "both": {"target_modules": ["c_fc"], "bias": "all", "modules_to_save": ["ln_1"]},
}


HEAD = {"target_modules": ["c_attn", "lm_head"]}


def peft_adapter(base, folder, kind, seed=1):
    """An adapter that PEFT made and saved, in which all that it holds differs from the base."""
    made, found = make_peft_adapter(base, kind, seed)
    shutil.copytree(made, folder)
    return str(folder), found


@functools.cache
def make_peft_adapter(base, kind, seed):
    options = {"r": 2, "lora_alpha": 5, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | KINDS.get(kind, HEAD)
    model = get_peft_model(by_hooks(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.2 * torch.randn(param.shape, generator=generator))
    folder = f"{base}-{kind}-{seed}"
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, logits(model.eval())


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, expected):
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", ["all biases", "modules", "both"])
@pytest.mark.parametrize("make", [by_hand, by_hooks])
def test_a_second_adapter_is_what_it_is_alone(base, tmp_path, make, first, second):
    """Lost if it fails: whoever serves two adapters in turn gets answers that are neither's."""
    a, _ = peft_adapter(base, tmp_path / "a", first)
    b, theirs = peft_adapter(base, tmp_path / "b", second, seed=2)
    alone = make(base)
    load_adapter(alone, b)
    torch.testing.assert_close(logits(alone), theirs, rtol=1e-4, atol=1e-3)
    model = make(base)
    before = bits(model)
    for folder in (a, b, a, a, b):
        load_adapter(model, folder)
    assert torch.equal(logits(model), logits(alone)) and torch.equal(logits(model.train()), logits(alone.train()))
    detach_lora(model)
    assert same_bits(model, before)


@pytest.mark.parametrize("make", [by_hand, by_hooks])
@pytest.mark.parametrize("kind", KINDS)
def test_detaching_gives_the_base_bit_for_bit(base, tmp_path, make, kind):
    """Lost if it fails: an adapter that was tried on a model stays in it, in part."""
    a, _ = peft_adapter(base, tmp_path / "a", kind)
    model = make(base)
    before, expected = bits(model), logits(model)
    load_adapter(model, a)
    assert not torch.equal(logits(model), expected)
    brought = {name for name in before if not torch.equal(model.state_dict()[name], before[name])}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in brought:
                param.add_(1)  # as further training does
    twin = copy.deepcopy(model)
    for found in (model, twin):
        detach_lora(found)
        assert same_bits(found, before) and torch.equal(logits(found), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_aside_follows_the_model_into_another_dtype(base, tmp_path, dtype):
    """Lost if it fails: after model.bfloat16() another adapter, or none, is served on biases of the first."""
    a, _ = peft_adapter(base, tmp_path / "a", "both")
    model = by_hooks(base)
    load_adapter(model, a)
    model.to(dtype)
    detach_lora(model)
    assert same_bits(model, bits(by_hooks(base).to(dtype)))


def test_merging_for_good_makes_it_the_models_own(base, tmp_path):
    """Lost if it fails: a merged model loses half of its adapter as soon as another one is loaded and taken off."""
    a, theirs = peft_adapter(base, tmp_path / "a", "both")
    b, _ = peft_adapter(base, tmp_path / "b", "modules")
    model = by_hooks(base)
    load_adapter(model, a)
    merge_lora(model)
    merged = bits(model)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-3)
    load_adapter(model, b)
    detach_lora(model)
    assert same_bits(model, merged)


@pytest.mark.parametrize("make", [by_hand, by_hooks])
@pytest.mark.parametrize("kind", ["all biases", "modules"])
def test_what_an_adapter_brought_is_not_left_out_when_it_is_saved(base, tmp_path, make, kind):
    """Lost if it fails: an adapter that was opened and saved again is another one, without a word."""
    a, theirs = peft_adapter(base, tmp_path / "a", kind)
    model = make(base)
    load_adapter(model, a)
    with pytest.raises(ValueError, match=r"bias|ln_f"):
        save_adapter(model, str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    save_adapter(model, str(tmp_path / "b"), bias="all", also="ln_f|wpe")
    other = make(base)
    load_adapter(other, str(tmp_path / "b"))
    torch.testing.assert_close(logits(other), theirs, rtol=1e-4, atol=1e-3)


def test_an_adapter_on_the_head_is_refused_where_the_head_is_not_called(base, tmp_path):
    """Lost if it fails: the adapter is on the model and changes nothing."""
    a, theirs = peft_adapter(base, tmp_path / "a", "head")
    model = by_hooks(base)
    load_adapter(model, a)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-3)
    model = by_hand(base)
    for attempt in (lambda: load_adapter(model, a), lambda: attach_lora(model, "lm_head", rank=2, alpha=4)):
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            attempt()
    assert same_bits(model, bits(by_hand(base)))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"c_attn": math.nan}},
        {"rank_pattern": {"(": 2}},
    ],
    ids=repr,
)
def test_numbers_that_are_none_and_patterns_that_are_none(base, tmp_path, changes):
    """Lost if it fails: a spoiled config answers garbage, or ends in a traceback."""
    a, _ = peft_adapter(base, tmp_path / "a", "plain")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = by_hand(base)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(model, a)
    assert same_bits(model, bits(by_hand(base)))


def test_a_refused_adapter_changes_nothing(base, tmp_path):
    """Lost if it fails: after an error the model answers as neither adapter does."""
    a, _ = peft_adapter(base, tmp_path / "a", "both")
    model = by_hooks(base)
    load_adapter(model, a)
    before = bits(model)
    with pytest.raises(FileNotFoundError):
        load_adapter(model, str(tmp_path / "none"))
    assert same_bits(model, before)
    detach_lora(model)
    assert same_bits(model, bits(by_hooks(base)))


def test_what_is_aside_is_in_no_file(base, tmp_path):
    """Lost if it fails: a saved model holds tensors that no other program knows."""
    a, _ = peft_adapter(base, tmp_path / "a", "both")
    model = by_hand(base)
    load_adapter(model, a)
    names = {n for n, _ in model.named_parameters() if "lora_" not in n} | {"lm_head.weight"}
    assert {n for n in model.state_dict() if "lora_" not in n} == names
    model.save_pretrained(str(tmp_path / "whole"))
    merged = by_hooks(str(tmp_path / "whole"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-3)


# --- how PEFT's training began -------------------------------------------------------------------

STARTS = [True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_leaves_the_base_is_read_and_no_other(base, tmp_path, start):
    """Lost if it fails: plain LoRA is refused for how it began, or A and B are put on a base that they do not fit."""
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(by_hooks(base), LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, **options))
    whole = by_hooks(base).state_dict()
    found = theirs.base_model.model.state_dict()
    its_base = {n: t for name, t in found.items() if (n := name.replace(".base_layer.", ".")) in whole}
    leaves_base = its_base.keys() == whole.keys() and all(torch.equal(t, whole[n]) for n, t in its_base.items())
    with torch.no_grad():
        for param in theirs.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    for make in (by_hand, by_hooks):
        model = make(base)
        if leaves_base:
            load_adapter(model, str(tmp_path))
            torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-4, atol=1e-3)
        else:
            with pytest.raises(ValueError, match="init_lora_weights"):
                load_adapter(model, str(tmp_path))
    assert leaves_base == (str(start).lower().split("_")[0] not in ("pissa", "olora"))


@pytest.mark.parametrize("dropout", ["a module", "a number"])
def test_a_students_merged_layer_takes_its_base_back_first(tmp_path, dropout):
    """Lost if it fails: a second adapter on a layer that merges in place is added to the first one, for good."""

    class Layer(student_lora.LoRALinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if dropout == "a number":
                del self.lora_dropout
                self.lora_dropout = 0.0

        def forward(self, x):
            p = self.lora_dropout if dropout == "a number" else self.lora_dropout.p
            return x @ self.weight.T + self.bias + (0 if p or self.has_weights_merged else self.update(x))

        def update(self, x):
            return self.lora_scaling * (x @ self.lora_A.T @ self.lora_B.T)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Layer(8, 8, lora_rank=2, lora_alpha=4))
    w0 = model[0].weight.detach().clone()
    for name in ("one", "two"):
        torch.nn.init.normal_(model[0].lora_B)
        save_adapter(model, str(tmp_path / name))
    for name in ("one", "two"):
        load_adapter(model, str(tmp_path / name))
        model.eval()
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        delta = 2 * tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
        x = torch.randn(3, 8)
        torch.testing.assert_close(model(x), x @ (w0 + delta).T + model[0].bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.train()[0].weight, w0, atol=1e-5, rtol=0)
