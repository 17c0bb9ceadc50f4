"""LoRA: the numbers of loralib and PEFT, files that PEFT opens, and base weights that no cycle changes.

python -m pytest tests/test_lora.py
"""

import copy
import inspect
import json
import math
import os
import re
from collections import OrderedDict

import loralib
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import close, randomize, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora import LoRALinear, add_adapter, load_adapter, mark_only_lora_as_trainable, save_adapter
from model import GPT, GPTConfig
from plumbing.adapters.layers import lora_layers, merged_weight
from plumbing.adapters.trainable import lora_state_dict, parameter_report

IN, OUT = 16, 24


def same_bytes(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def raw(tensor):
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy())


def layer_pair(dtype=torch.float64, dropout=0.0):
    """Our layer and loralib's with the same random weights, B among them."""
    torch.manual_seed(0)
    theirs = loralib.Linear(IN, OUT, r=4, lora_alpha=6, lora_dropout=dropout, dtype=dtype)
    nn.init.normal_(theirs.lora_B)
    ours = LoRALinear(IN, OUT, dtype=dtype, lora_rank=4, lora_alpha=6, lora_dropout=dropout)
    ours.load_state_dict(theirs.state_dict())  # the names are loralib's too
    ours.lora_A.requires_grad = ours.lora_B.requires_grad = True
    return ours, theirs


def mode(training, *layers):  # loralib's train() returns None
    for layer in layers:
        layer.train(training)


@torch.no_grad()
def logits(model, idx):
    """At every position, of our model or of a transformers or PEFT one: (B, T, V)."""
    if isinstance(model, GPT):
        return model(idx, targets=torch.zeros_like(idx))[0].view(*idx.shape, -1)
    return model.eval()(idx).logits


# --- the layer -----------------------------------------------------------------------------------


def test_signature():
    """Otherwise scripts that construct the layer by position or by name break."""
    expected = {"in_features": inspect.Parameter.empty, "out_features": inspect.Parameter.empty, "bias": True}
    expected |= {"device": None, "dtype": None, "lora_rank": 0, "lora_alpha": 0.0, "lora_dropout": 0.0}
    parameters = inspect.signature(LoRALinear).parameters
    assert list(parameters) == list(expected)
    assert {name: p.default for name, p in parameters.items()} == expected
    layer = LoRALinear(IN, OUT, False, "cpu", torch.float64, 4, 6.0, 0.5)
    assert isinstance(layer, nn.Linear) and layer.bias is None and layer.weight.dtype == torch.float64
    assert layer.lora_A.shape == (4, IN) and layer.lora_B.shape == (OUT, 4) and layer.lora_scaling == 1.5
    assert layer.is_lora() and layer.lora_dropout.p == 0.5
    assert layer.train() is layer and not layer.has_weights_merged
    assert layer.eval() is layer and layer.has_weights_merged


def test_rank_zero_is_a_plain_linear():
    """Otherwise --rank=0 trains, draws or saves something else than nn.Linear does."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    torch.manual_seed(0)
    ours = LoRALinear(IN, OUT)
    assert not ours.is_lora()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, IN)
    for training in (True, False, True):
        assert torch.equal(ours.train(training)(x), plain(x)) and not ours.has_weights_merged


@pytest.mark.parametrize("rank", [17, -1])
def test_a_rank_that_cannot_be_is_named(rank):
    """Otherwise a rank beyond the layer's size costs memory and time for nothing, without a word."""
    with pytest.raises(ValueError, match=f"rank={rank} .*1 to 16"):
        LoRALinear(IN, OUT, lora_rank=rank)
    assert LoRALinear(IN, OUT, lora_rank=16).is_lora()


def test_fresh_adapter_is_kaiming_and_zero():
    """Otherwise training starts from another point than the paper's and loralib's."""
    torch.manual_seed(0)
    ours = LoRALinear(256, 64, lora_rank=32, lora_alpha=1)
    for _ in range(2):
        bound = math.sqrt(6 / ((1 + 5) * 256))  # He et al. 2015, with a = sqrt(5)
        assert 0.99 * bound < ours.lora_A.abs().max().item() <= bound
        assert ours.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not ours.lora_B.any()
        nn.init.ones_(ours.lora_A)
        nn.init.ones_(ours.lora_B)
        ours.reset_parameters()


@pytest.mark.parametrize("trained", ["", "weight", "bias"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (2, 1, 3, IN), (IN,), (0, IN)])
def test_unmerged_equals_loralib(shape, trained):
    """Otherwise training follows another gradient than LoRA's, with a frozen layer or what of it trains."""
    ours, theirs = layer_pair()
    for layer in (ours, theirs):
        for name in ("weight", "bias"):
            getattr(layer, name).requires_grad = name == trained
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mode(True, ours, theirs)
    out, reference = ours(x), theirs(y)
    close(out, reference)
    weights = torch.randn_like(reference)
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    close(x.grad, y.grad)
    for name, param in theirs.named_parameters():
        assert param.requires_grad == (getattr(ours, name).grad is not None)
        if param.requires_grad:
            close(getattr(ours, name).grad, param.grad)


def test_strided_input_equals_loralib():
    """Otherwise a transposed or sliced activation fails, or is read in the wrong order."""
    ours, theirs = layer_pair()
    x = torch.randn(7, 3, 2 * IN, dtype=torch.float64)
    for strided in (x.transpose(0, 1)[..., :IN], x[..., ::2], x[:1, :, :IN].expand(4, -1, -1)):
        assert not strided.is_contiguous()
        close(ours(strided), theirs(strided))


def test_dropout_equals_loralib():
    """Otherwise lora_dropout drops something else than the adapter's input."""
    ours, theirs = layer_pair(dropout=0.3)
    x = torch.randn(50, IN, dtype=torch.float64)
    mode(True, ours, theirs)
    torch.manual_seed(1)
    out = ours(x)
    torch.manual_seed(1)
    close(out, theirs(x))
    mode(False, ours, theirs)
    close(ours(x), theirs(x))  # none at inference
    assert not torch.allclose(out, ours(x))


def test_merged_equals_loralib():
    """Otherwise what is scored and served is not what was trained."""
    ours, theirs = layer_pair()
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    mode(False, ours, theirs)
    out, reference = ours(x), theirs(y)
    assert ours.has_weights_merged and theirs.merged
    close(out, reference)
    close(merged_weight(ours), theirs.weight)
    close(out, copy.deepcopy(ours).train()(x))  # merged or not, the same function
    out.square().sum().backward()
    reference.square().sum().backward()
    close(x.grad, y.grad)


def test_step_zero_is_the_base_model():
    """Otherwise fine-tuning does not start from the model that the user chose."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = LoRALinear(IN, OUT, dtype=dtype, lora_rank=4, lora_alpha=6), torch.randn(50, IN, dtype=dtype)
        base = F.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer.train()(x), base) and torch.equal(layer.eval()(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_cycles_change_no_bit(dtype):
    """Otherwise every evaluation during training wears the base weights away, as it does in loralib."""
    ours, theirs = layer_pair(dtype)
    before, base = {n: raw(t) for n, t in ours.state_dict().items()}, raw(theirs.weight)
    x = torch.randn(2, IN, dtype=dtype)
    first = ours.eval()(x)
    for _ in range(1000):
        mode(True, ours, theirs)
        mode(False, ours, theirs)
    assert {n: raw(t) for n, t in ours.state_dict().items()} == before
    assert torch.equal(ours(x), first)
    mode(True, ours, theirs)
    assert raw(ours.weight) == base
    assert raw(theirs.weight) != base  # so this test sees drift where there is some


def test_saved_bytes_do_not_depend_on_the_mode(checkpoint, tmp_path):
    """Otherwise a checkpoint that was saved after an evaluation holds the adapter twice."""
    layer = layer_pair(torch.float32)[0]
    assert safetensors.torch.save(layer.train().state_dict()) == safetensors.torch.save(layer.eval().state_dict())
    model = randomize(GPT.from_pretrained(checkpoint, lora_rank=4, lora_alpha=8))
    for training in (True, False):
        save_adapter(model.train(training), str(tmp_path / f"adapter{training}"))
        model.save_pretrained(str(tmp_path / f"model{training}"))
    for kind in ("adapter", "model"):
        one, other = tmp_path / f"{kind}True", tmp_path / f"{kind}False"
        assert len(os.listdir(one)) == 2 and sorted(os.listdir(one)) == sorted(os.listdir(other))
        for name in os.listdir(one):
            assert (one / name).read_bytes() == (other / name).read_bytes()


CHANGES = {  # what happens to a layer while it is merged
    "eval again": lambda layer: layer.eval(),
    "another A": lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.randn_like(layer.lora_A))),
    "another B": lambda layer: setattr(layer, "lora_B", nn.Parameter(torch.randn_like(layer.lora_B))),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "float32 and back": lambda layer: layer.float().double(),
    "the same device": lambda layer: layer.to("cpu"),
    "a copy": copy.deepcopy,
    "its own state": lambda layer: layer.load_state_dict(layer.state_dict()),
    "its own state, assigned": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True),
    "a container's train and eval": lambda layer: nn.Sequential(layer).train().eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_merged_is_the_change_while_not(change):
    """Otherwise what a layer computes depends on the mode that it was in when it was changed."""
    results = []
    for training in (True, False):
        torch.manual_seed(0)
        layer = layer_pair()[0].train(training)
        torch.manual_seed(1)
        changed = CHANGES[change](layer)
        layer = changed if isinstance(changed, LoRALinear) else layer
        x = torch.randn(5, IN, dtype=torch.float64)
        state = {name: raw(tensor) for name, tensor in layer.state_dict().items()}
        results.append((layer.train()(x), layer.eval()(x), state))
        close(layer.weight, layer.state_dict()["weight"] + 1.5 * layer.lora_B @ layer.lora_A)
        layer.train()
        assert {name: raw(tensor) for name, tensor in layer.state_dict().items()} == state
    (unmerged, merged, state), (unmerged_after, merged_after, state_after) = results
    close(unmerged_after, unmerged, atol=1e-6)
    close(merged_after, merged, atol=1e-6)
    close(merged, unmerged, atol=1e-6)
    assert state == state_after or "float32" in change


def test_two_layers_with_one_weight_are_not_merged_into_it_twice():
    """Otherwise eval() of a model with shared weights changes W0 for good, without a word."""
    one = layer_pair()[0]
    other = layer_pair()[0]
    other.weight = one.weight
    before = raw(one.weight)
    one.eval()
    with pytest.raises(ValueError, match="share a weight"):
        other.eval()
    one.train()
    other.train()
    assert raw(one.weight) == before and raw(other.weight) == before


def test_changes_while_merged_refresh_the_merge():
    """Otherwise a model in eval mode goes on with the adapter that it had before."""
    ours, theirs = layer_pair()
    x = torch.randn(5, IN, dtype=torch.float64)
    stale = LoRALinear(IN, OUT, dtype=torch.float64, lora_rank=4, lora_alpha=6).eval()
    whole = nn.Sequential(stale)
    stale.load_state_dict(ours.state_dict())
    mode(False, theirs)
    close(stale(x), theirs(x))
    adapter = {f"0.{n}": torch.randn_like(t) for n, t in ours.state_dict().items() if "lora_" in n}
    whole.load_state_dict(adapter, strict=False)  # the adapter alone, through a model around the layer
    delta = 1.5 * adapter["0.lora_B"] @ adapter["0.lora_A"]
    close(whole(x), x @ (ours.weight + delta).T + ours.bias)
    stale.reset_parameters()
    close(stale(x), F.linear(x, stale.weight, stale.bias))  # B is zero again
    assert stale.has_weights_merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_float32(dtype):
    """Otherwise a bf16 base rounds the adapter, and small updates are lost."""
    ours = layer_pair(torch.float32)[0]
    before = copy.deepcopy(ours)
    assert not torch.equal(before.lora_A, before.lora_A.to(dtype).float())  # rounding would show
    for training in (True, False):
        model = nn.Sequential(copy.deepcopy(ours).train(training))
        model = model.bfloat16() if dtype == torch.bfloat16 else model.half()
        layer, x = model[0], torch.randn(3, IN, dtype=dtype)
        w0 = layer.state_dict()["weight"]  # in eval mode `weight` itself is merged
        assert same_bytes(w0, before.weight.to(dtype)) and isinstance(layer.lora_A, nn.Parameter)
        assert same_bytes(layer.lora_A, before.lora_A) and same_bytes(layer.lora_B, before.lora_B)
        exact = before.weight.to(dtype).double() + 1.5 * before.lora_B.double() @ before.lora_A.double()
        half_a_step = 0.51 * torch.finfo(dtype).eps * exact.abs()  # rounded once, at the end
        assert ((merged_weight(layer).double() - exact).abs() <= half_a_step + torch.finfo(dtype).tiny).all()
        out = model(x)
        assert out.dtype == dtype
        exact_out = x.double() @ exact.T + before.bias.to(dtype).double()
        close(out.double(), exact_out, atol=4 * torch.finfo(dtype).eps * exact_out.abs().max().item())
    fresh = LoRALinear(IN, OUT, dtype=dtype, lora_rank=4, lora_alpha=6)
    assert fresh.weight.dtype == dtype and fresh.lora_A.dtype == fresh.lora_B.dtype == torch.float32


def test_deepcopy_is_independent():
    """Otherwise the copy that one keeps of the best model changes with the one that trains on."""
    ours = layer_pair()[0]
    x = torch.randn(5, IN, dtype=torch.float64)
    for training in (True, False):
        reference = ours.train(training)(x).detach()
        twin = copy.deepcopy(ours)
        assert twin.training == training and torch.equal(twin(x), reference)
        with torch.no_grad():
            twin.train().lora_B.zero_()
            twin.weight.zero_()
        twin.train(training)
        assert torch.equal(ours(x), reference) and torch.equal(twin(x), ours.bias.expand(5, -1))


# --- what is trained -----------------------------------------------------------------------------


def network(adapted):
    parts = {"adapted": adapted, "norm": nn.LayerNorm(OUT), "plain": nn.Linear(OUT, 4)}
    return nn.Sequential(OrderedDict(inner=nn.Sequential(OrderedDict(parts))))


def trained(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trainable_set_is_loralibs(bias):
    """Otherwise more is trained than the user pays for, or less than she asked for."""
    ours, theirs = (network(layer) for layer in layer_pair())
    assert not theirs.inner.adapted.weight.requires_grad
    mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    assert trained(ours) == trained(theirs)
    assert lora_state_dict(ours, bias).keys() == loralib.lora_state_dict(theirs, bias).keys()
    assert len(trained(ours)) == {"none": 2, "lora_only": 3, "all": 5}[bias]
    mark_only_lora_as_trainable(ours)  # and back
    assert trained(ours) == {"inner.adapted.lora_A", "inner.adapted.lora_B"}


@pytest.mark.parametrize("bias", ["None", "lora", "", None])
def test_a_wrong_bias_word_is_named(bias):
    """Otherwise a mistyped word silently trains another set of parameters."""
    model = network(layer_pair()[0])
    before = trained(model)
    with pytest.raises(ValueError, match=re.escape(repr(bias)) + ".*lora_only"):
        mark_only_lora_as_trainable(model, bias)
    assert trained(model) == before


def test_parameter_report_on_gpt2_medium():
    """Otherwise the share that is trained is not the one that the task states."""
    with torch.device("meta"):  # shapes only
        model = GPT(GPTConfig(n_layer=24, n_head=16, n_embd=1024, lora_rank=128, lora_alpha=512))
    mark_only_lora_as_trainable(model)
    expected = "trainable params: 18,874,368 || all params: 373,697,536 || trainable%: 5.0507"
    assert parameter_report(model) == expected


def test_parameter_report_is_pefts(hf, checkpoint, capsys):
    """Otherwise the report cannot be compared with PEFT's, line by line."""
    model = GPT.from_pretrained(checkpoint, lora_rank=4, lora_alpha=8)
    mark_only_lora_as_trainable(model)
    peft_model(hf, r=4).print_trainable_parameters()
    assert parameter_report(model) == capsys.readouterr().out.strip()


# --- PEFT's files --------------------------------------------------------------------------------


def peft_model(hf, **config):
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(hf), LoraConfig(task_type="CAUSAL_LM", **defaults | config))


def peft_trained(hf, directory, **config):
    """An adapter as a user of PEFT makes it: a few steps, then save_pretrained."""
    model, idx = peft_model(hf, **config), tokens(4, 16, seed=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(4):
        model(idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory, save_embedding_layers=False)  # else it asks the hub about the base
    return model


@pytest.mark.parametrize("targets", [r"attn\.c_(attn|proj)$", r"c_proj$", r"h\.1\..*c_fc$"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_peft_opens_our_adapter(hf, checkpoint, tmp_path, targets, bias):
    """Otherwise an adapter that was trained here can be served only here."""
    model = randomize(GPT.from_pretrained(checkpoint, lora_rank=4, lora_alpha=6, lora_targets=targets))
    if bias == "all":
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith("bias"):
                    param.add_(0.1)
    save_adapter(model, str(tmp_path), base_model=checkpoint, bias=bias)
    theirs = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path)
    idx = tokens(2, 30)
    close(logits(theirs, idx), logits(model, idx), atol=1e-4)
    assert not torch.allclose(logits(hf, idx), logits(model, idx), atol=1e-2)  # the adapter says something
    assert theirs.peft_config["default"].base_model_name_or_path == checkpoint
    layers = {
        name.removeprefix("base_model.model.") for name, _ in theirs.named_modules() if name.endswith(".lora_A")
    }
    assert layers == {f"{name}.lora_A" for name in lora_layers(model)}  # PEFT adapts these and no others


FROM_PEFT = {
    "the task's layers": {},
    "c_attn alone": {"target_modules": ["c_attn"]},
    "rank-stabilised": {"use_rslora": True, "r": 9},
    "the MLP, every bias": {"target_modules": ["c_fc", "mlp.c_proj"], "bias": "all"},
}


@pytest.mark.parametrize("kind", FROM_PEFT)
@pytest.mark.parametrize("rank", [0, 8])
def test_we_open_pefts_adapter(hf, checkpoint, tmp_path, kind, rank):
    """Otherwise the adapters that users have from PEFT give other texts here."""
    theirs, idx = peft_trained(hf, tmp_path / "theirs", **FROM_PEFT[kind]), tokens(2, 30)
    model = randomize(GPT.from_pretrained(checkpoint, lora_rank=rank, lora_alpha=3))
    reference = logits(theirs, idx)
    assert not torch.allclose(reference, logits(hf, idx), atol=1e-2)
    for training in (True, False):
        config = load_adapter(model.train(training), str(tmp_path / "theirs"))
        close(logits(model, idx), reference, atol=1e-4)
    assert config["r"] == FROM_PEFT[kind].get("r", 4) and config["lora_alpha"] == 6
    if kind == "rank-stabilised":  # saved again, it still scales as it did
        save_adapter(model, str(tmp_path / "ours"))
        again = PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path / "ours")
        close(logits(again, idx), reference, atol=1e-4)


def test_our_adapter_comes_back_bit_for_bit(checkpoint, tmp_path):
    """Otherwise a run that is continued from its adapter does not continue the same model."""
    model = randomize(GPT.from_pretrained(checkpoint, lora_rank=4, lora_alpha=6, lora_dropout=0.1))
    save_adapter(model, str(tmp_path))
    again = GPT.from_pretrained(checkpoint)
    load_adapter(again, str(tmp_path))
    ours, theirs = lora_state_dict(model), lora_state_dict(again)
    assert len(ours) == 12 and ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)
    kinds = {(m.lora_A.size(0), m.lora_scaling, m.lora_dropout.p) for m in lora_layers(again).values()}
    assert kinds == {(4, 1.5, 0.1)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 6
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_is_no_one_adapter_cannot_be_saved(checkpoint, tmp_path):
    """Otherwise a file is written that loads as something else."""
    model = GPT.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="an adapter needs"):
        save_adapter(model, str(tmp_path))
    add_adapter(model.transformer.h[0].attn.c_attn, 4, 8)
    add_adapter(model.transformer.h[1].attn.c_attn, 2, 8)
    with pytest.raises(ValueError, match="one rank"):
        save_adapter(model, str(tmp_path))
    assert os.listdir(tmp_path) == []


def edit_config(directory, **changes):
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))


def without_a_tensor(directory):
    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    del tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")


def flip(path):
    """One bit of the last tensor, which no length and no header shows."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DAMAGE = {  # what happened to the directory: (how, error, the file its message names)
    "another width": (lambda d: save_small(d, n_embd=32), ValueError, WEIGHTS),
    "more layers": (lambda d: save_small(d, n_layer=4), ValueError, WEIGHTS),
    "another rank in the config": (lambda d: edit_config(d, r=8), ValueError, WEIGHTS),
    "a tensor gone": (without_a_tensor, ValueError, WEIGHTS),
    "weights cut": (lambda d: os.truncate(d / WEIGHTS, 9000), ValueError, WEIGHTS),
    "weights empty": (lambda d: os.truncate(d / WEIGHTS, 0), ValueError, WEIGHTS),
    "a bit flipped": (lambda d: flip(d / WEIGHTS), ValueError, WEIGHTS),
    "weights gone": (lambda d: os.remove(d / WEIGHTS), FileNotFoundError, WEIGHTS),
    "config gone": (lambda d: os.remove(d / CONFIG), FileNotFoundError, CONFIG),
    "config cut": (lambda d: os.truncate(d / CONFIG, 30), ValueError, CONFIG),
    "config no JSON": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe{"), ValueError, CONFIG),
    "config a list": (lambda d: (d / CONFIG).write_text("[]"), ValueError, CONFIG),
    "no rank": (lambda d: edit_config(d, r=None), ValueError, CONFIG),
    "not LoRA": (lambda d: edit_config(d, peft_type="IA3"), ValueError, CONFIG),
    "DoRA": (lambda d: edit_config(d, use_dora=True), ValueError, CONFIG),
}


def save_small(directory, **sizes):
    """The adapter of a model of another shape."""
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 301, "block_size": 64} | sizes
    save_adapter(GPT(GPTConfig(**shape, lora_rank=4, lora_alpha=8)), str(directory))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_named_and_leaves_the_model(checkpoint, tmp_path, damage):
    """Otherwise half of a wrong adapter is on the model, or the user cannot tell which file is wrong."""
    save_adapter(randomize(GPT.from_pretrained(checkpoint, lora_rank=4, lora_alpha=6)), str(tmp_path))
    how, error, named = DAMAGE[damage]
    how(tmp_path)
    for rank in (0, 2):
        model = randomize(GPT.from_pretrained(checkpoint, lora_rank=rank, lora_alpha=6)).eval()
        idx = tokens(1, 8)
        before, said = {n: raw(t) for n, t in model.state_dict().items()}, logits(model, idx)
        with pytest.raises(error) as caught:
            load_adapter(model, str(tmp_path))
        assert str(tmp_path / named) in str(caught.value)
        assert {n: raw(t) for n, t in model.state_dict().items()} == before
        assert torch.equal(logits(model, idx), said)


# --- adapters as they come in the wild -------------------------------------------------------------

MORE_THAN_LORA = {  # what PEFT writes, and the key that says so
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "aLoRA": ({"alora_invocation_tokens": [5, 7]}, r"alora_invocation_tokens=\[5, 7\]"),
    "a bias of B's own": ({"lora_bias": True}, "lora_bias=True"),
    "new tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices="),
}


@pytest.mark.parametrize("kind", MORE_THAN_LORA)
def test_an_adapter_that_is_more_than_lora_is_refused(hf, checkpoint, tmp_path, kind):
    """Otherwise A and B are read as plain LoRA's, and the model says something else than it does in PEFT."""
    config, says = MORE_THAN_LORA[kind]
    peft_model(hf, **config).save_pretrained(tmp_path, save_embedding_layers=False)
    model = GPT.from_pretrained(checkpoint)
    before = {n: raw(t) for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=says) as caught:
        load_adapter(model, str(tmp_path))
    assert "In PEFT" in str(caught.value) and "damaged" not in str(caught.value)
    assert {n: raw(t) for n, t in model.state_dict().items()} == before


def test_a_key_of_a_later_peft_is_refused(hf, checkpoint, tmp_path):
    """Otherwise the next variant of LoRA that PEFT learns is read as plain LoRA again."""
    peft_trained(hf, tmp_path)
    for value, refused in ((None, False), (False, False), ({}, False), (2, True), ({"a": 1}, True)):
        edit_config(tmp_path, use_somelora=value)
        if refused:
            with pytest.raises(ValueError, match="use_somelora="):
                load_adapter(GPT.from_pretrained(checkpoint), str(tmp_path))
        else:
            load_adapter(GPT.from_pretrained(checkpoint), str(tmp_path))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern_are_read_right(hf, checkpoint, tmp_path, rslora):
    """Otherwise an adapter whose layers differ in rank or alpha, as PEFT can make it, scales wrongly here."""
    patterns = {"rank_pattern": {"h.1.attn.c_attn": 7, "c_proj": 2}, "alpha_pattern": {r"h\.[02]\.attn\.c_attn": 20}}
    theirs = peft_trained(hf, tmp_path, use_rslora=rslora, **patterns)
    model = GPT.from_pretrained(checkpoint)
    load_adapter(model, str(tmp_path))
    idx = tokens(2, 30)
    close(logits(model, idx), logits(theirs, idx), atol=1e-4)
    ranks = {name.split(".", 2)[2]: layer.lora_A.size(0) for name, layer in lora_layers(model).items()}
    assert ranks["1.attn.c_attn"] == 7 and ranks["0.attn.c_attn"] == 4 and ranks["0.attn.c_proj"] == 2


def test_a_head_of_its_own_does_not_go_into_the_embedding(hf, checkpoint, tmp_path):
    """Otherwise loading a trained output head changes what the words mean at the input, without a word."""
    theirs = peft_model(hf, modules_to_save=["lm_head"])
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = GPT.from_pretrained(checkpoint)
    before = raw(model.transformer.wte.weight)
    with pytest.raises(ValueError, match=r"lm_head\.weight is one tensor with transformer\.wte\.weight"):
        load_adapter(model, str(tmp_path))
    assert raw(model.transformer.wte.weight) == before and not lora_layers(model)


def test_an_adapter_with_a_name_is_found(hf, checkpoint, tmp_path):
    """Otherwise what PEFT saved under an adapter's name looks like nothing at all."""
    peft_trained(hf, tmp_path / "one")
    os.rename(tmp_path / "one", tmp_path / "two")
    os.makedirs(tmp_path / "out")
    os.rename(tmp_path / "two", tmp_path / "out" / "mine")
    model = GPT.from_pretrained(checkpoint)
    load_adapter(model, str(tmp_path / "out"))
    direct = GPT.from_pretrained(checkpoint)
    load_adapter(direct, str(tmp_path / "out" / "mine"))
    assert torch.equal(logits(model, tokens(1, 9)), logits(direct, tokens(1, 9)))
    peft_trained(hf, tmp_path / "out" / "other")
    with pytest.raises(ValueError, match=r"several adapters: name one, such as .*mine"):
        load_adapter(model, str(tmp_path / "out"))


def test_a_pickled_adapter_is_refused_with_the_line_that_converts_it(hf, checkpoint, tmp_path):
    """Otherwise a user with an older adapter is told that a file is missing, and not what to do."""
    theirs = peft_trained(hf, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    os.remove(tmp_path / WEIGHTS)
    model = GPT.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="is a pickle") as caught:
        load_adapter(model, str(tmp_path))
    command = re.search(r'python -c "(.*)"$', str(caught.value))[1]
    exec(command)  # as the user would run it
    load_adapter(model, str(tmp_path))
    close(logits(model, tokens(1, 9)), logits(theirs, tokens(1, 9)), atol=1e-4)
