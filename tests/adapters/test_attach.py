"""attach_lora on models that others wrote: PEFT's numbers and files, and a base that comes back bit for bit.

python -m pytest tests/adapters/test_attach.py
"""

import copy
import itertools

import pytest
import torch
from conftest import close, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora import (
    attach_lora,
    detach_lora,
    load_adapter,
    mark_only_lora_as_trainable,
    merge_lora,
    save_adapter,
)
from model import GPT, GPTConfig
from plumbing.adapters.layers import lora_layers
from plumbing.adapters.trainable import parameter_report

OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 301, "n_positions": 64, "pad_token_id": 300}
CLS = r"classifier|score"


def gpt2():
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**SMALL, **OFF))


def roberta():
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=301, max_position_embeddings=70, **sizes, **off))


MODELS = {  # how to make it, our targets, PEFT's, whether its weights are (in, out)
    "gpt2": (gpt2, r"c_attn|attn\.c_proj", ["c_attn", "attn.c_proj"], True),
    "roberta": (roberta, "query|output", ["query", "output.dense"], False),
}


def lively(model, seed=3):
    """B is no longer zero, neither here nor in PEFT."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters(), key=lambda np: np[0].replace("base_model.model.", "")):
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def pair(kind, seed=3):
    """The same model with our hooks and under PEFT, the same adapters in both."""
    make, targets, theirs, transposed = MODELS[kind]
    ours, base = make(), make()
    attach_lora(ours, targets, rank=4, alpha=16)
    mark_only_lora_as_trainable(ours, also=CLS)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=theirs, fan_in_fan_out=transposed, task_type="SEQ_CLS", lora_dropout=0.0
    )
    return lively(ours, seed), lively(get_peft_model(base, config), seed)


def logits(model, idx):
    return model(idx).logits


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


# --- PEFT's numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_gradients_are_pefts(kind, training):
    """Otherwise a run by hooks learns something else than the same run in PEFT."""
    ours, theirs = pair(kind)
    idx, labels = tokens(5, 20), torch.tensor([0, 1, 1, 0, 1])
    for model in (ours, theirs):
        model.train(training)(idx, labels=labels).loss.backward()
    close(logits(ours, idx), logits(theirs, idx), atol=1e-5)
    assert not torch.allclose(
        logits(ours, idx), logits(MODELS[kind][0](), idx), atol=1e-3
    )  # the adapter says something
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    reference = {
        n.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    reference = {
        n.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B"): g for n, g in reference.items()
    }
    assert grads.keys() == reference.keys() and len(grads) > 8
    for name, grad in grads.items():
        close(grad, reference[name], atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_merging_for_evaluation_and_for_good(kind):
    """Otherwise evaluation, or the model that is handed on, is not the one that was trained."""
    ours, theirs = pair(kind)
    idx, before = tokens(5, 20), copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        unmerged, merged = logits(ours.train(), idx), logits(ours.eval(), idx)
        close(merged, unmerged, atol=1e-5)
        assert not torch.equal(merged, unmerged)  # it did merge: one product, rounded once
        for layer in lora_layers(ours).values():
            layer.lora_B.mul_(2)  # written while merged
        close(logits(ours, idx), logits(copy.deepcopy(ours).train(), idx), atol=1e-5)
        for layer in lora_layers(ours).values():
            layer.lora_B.div_(2)
        assert all(same_bits(t, before[n]) for n, t in ours.state_dict().items())
        close(logits(theirs.merge_and_unload(), idx), merged, atol=1e-5)
        merge_lora(ours)
        assert lora_layers(ours) == {} and ours.state_dict().keys() == MODELS[kind][0]().state_dict().keys()
        assert torch.equal(logits(ours, idx), merged)


def test_all_ones_rise_by_the_inputs_sum():
    """The material's own check: A and B all ones, r = 1, alpha = 4 raise every output by 4 times the input's sum."""
    model = nn.Sequential(nn.Linear(8, 5)).double()
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    before = model(x)
    attach_lora(model, "0", rank=1, alpha=4)
    nn.init.ones_(model[0].lora_A)
    nn.init.ones_(model[0].lora_B)
    for training, grad in itertools.product((True, False), repeat=2):
        with torch.set_grad_enabled(grad):
            close(model.train(training)(x), before + 4 * x.sum(-1, keepdim=True), atol=1e-12)
    model[0].lora_scaling = 3.0  # by hand: the evaluation that was merged before follows
    with torch.no_grad():
        close(model.eval()(x), before + 3 * x.sum(-1, keepdim=True), atol=1e-12)


def test_rank_stabilised_scale():
    """Otherwise `rslora` trains at another scale than PEFT's use_rslora."""
    model, x = nn.Sequential(nn.Linear(16, 9)), torch.randn(3, 16)
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=9, lora_alpha=5, target_modules=["0"], use_rslora=True)
    )
    attach_lora(model, "0", rank=9, alpha=5, rslora=True)
    close(lively(model)(x), lively(theirs)(x), atol=1e-5)


# --- how much is trained -------------------------------------------------------------------------


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_material_counts_on_gpt2():
    """Otherwise a student's count does not agree with the material's: 12,288, and 3,545,088 without LoRA."""
    last_two = r"h\.1[01]\.attn\.c_attn"
    with torch.device("meta"):
        theirs = GPT2ForSequenceClassification(GPT2Config(pad_token_id=50256))
        peft = copy.deepcopy(theirs)
        ours = GPT(GPTConfig(n_classes=2, lora_rank=1, lora_alpha=4, lora_targets=last_two))
        whole = GPT(GPTConfig(n_classes=2))
        attach_lora(theirs, last_two, rank=1, alpha=4)
    for model in (theirs, ours):
        mark_only_lora_as_trainable(model, bias="lora_only", also="score|classifier")
        assert count(model) == 12_288
    mark_only_lora_as_trainable(whole, also=rf"score|{last_two}")
    assert count(whole) == 3_545_088
    options = {"target_modules": ["c_attn"], "layers_to_transform": [10, 11], "layers_pattern": "h"}
    options |= {"fan_in_fan_out": True, "bias": "lora_only", "task_type": "SEQ_CLS", "init_lora_weights": False}
    with torch.device("meta"):
        assert count(get_peft_model(peft, LoraConfig(r=1, lora_alpha=4, **options))) == 12_288


def test_material_counts_on_roberta():
    """Otherwise a student's count does not agree with the material's: 923,906 of 124,978,946."""
    with torch.device("meta"):
        base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        model = RobertaForSequenceClassification(RobertaConfig(**base))
        attach_lora(model, "query|output", rank=4, alpha=16)
    mark_only_lora_as_trainable(model, also="classifier")
    assert parameter_report(model).startswith("trainable params: 923,906 || all params: 124,978,946 ||")


# --- PEFT's files --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_cross_in_both_directions(kind, bias, tmp_path):
    """Otherwise work done by hooks cannot be served by PEFT, or PEFT's not be carried on here."""
    make, targets, _, _ = MODELS[kind]
    ours, idx = make(), tokens(5, 20)
    attach_lora(ours, targets, rank=4, alpha=16)
    mark_only_lora_as_trainable(ours, bias, also=CLS)
    lively(ours)
    with torch.no_grad():
        for name, param in ours.named_parameters():
            if param.requires_grad and "lora_" not in name:
                param.add_(0.05)
    expected = logits(ours, idx)
    save_adapter(ours, str(tmp_path / "ours"), bias=bias, also=CLS)
    there = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    close(logits(there, idx), expected, atol=1e-5)
    there.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = make()
        load_adapter(again, str(tmp_path / folder))
        close(logits(again, idx), expected, atol=1e-5)


def test_adapter_crosses_from_the_hand_built_classifier(tmp_path):
    """Otherwise a classifier that train.py made is not transformers' GPT2ForSequenceClassification."""
    gpt2().save_pretrained(tmp_path / "base")
    options = {"lora_rank": 4, "lora_alpha": 16, "lora_targets": MODELS["gpt2"][1]}
    ours = lively(GPT.from_pretrained(str(tmp_path / "base"), **options))
    idx = tokens(5, 20)
    last = torch.full_like(idx, -1)
    last[:, -1] = 0
    expected = ours(idx, last)[0]
    save_adapter(ours, str(tmp_path / "adapter"), also=CLS)
    theirs = gpt2()
    load_adapter(theirs, str(tmp_path / "adapter"))
    close(logits(theirs, idx), expected, atol=1e-5)
    peft = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    close(logits(peft, idx), expected, atol=1e-5)
    ours.save_pretrained(str(tmp_path / "merged"))
    close(logits(GPT2ForSequenceClassification.from_pretrained(tmp_path / "merged"), idx), expected, atol=1e-5)


# --- the base stays the base ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_detaching_after_training_brings_the_base_back(kind, dtype):
    """Otherwise trying LoRA on a model costs the model."""
    model, idx = MODELS[kind][0]().to(dtype), tokens(5, 20)
    names, before = model.state_dict().keys(), logits(model.eval(), idx)
    adapted = attach_lora(model, MODELS[kind][1], rank=4, alpha=16)
    assert adapted == list(lora_layers(model)) and names < model.state_dict().keys()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(logits(model, idx), before)  # B is zero: step 0 is the base, bit for bit
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model.train()(idx, labels=torch.tensor([0, 1, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(idx)  # merged
    assert not torch.equal(logits(model.eval(), idx), before)
    detach_lora(model)
    assert model.state_dict().keys() == names and torch.equal(logits(model, idx), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_error_inside_a_merged_layer_uncovers_the_weight():
    """Otherwise one bad batch in evaluation leaves merged weights where W0 was."""
    model = nn.Sequential(nn.Linear(8, 5))
    attach_lora(model, "0", rank=2, alpha=2)
    lively(model).eval()
    weight = model[0].weight
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert model[0].weight is weight


def test_keyword_input_and_autocast():
    """Otherwise a layer called by keyword, or under the Trainer's bf16, fails or loses its adapter."""
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(3, 8)
    attach_lora(model, "0", rank=2, alpha=2)
    expected = lively(model)(x)
    close(model[0](input=x), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, atol=0.05)


# --- models that are not plain -------------------------------------------------------------------


def test_one_layer_used_twenty_times(tmp_path):
    """A layer under twenty names has one adapter, saved once."""
    layer = nn.Linear(8, 8)
    model = nn.Sequential(*[layer] * 20)
    assert attach_lora(model, ".", rank=2, alpha=2) == ["0"]
    lively(model)
    x = torch.randn(3, 8)
    expected = x
    for _ in range(20):
        expected = expected @ (layer.weight + layer.lora_B @ layer.lora_A).t() + layer.bias
    close(model(x), expected, atol=1e-4)
    save_adapter(model, str(tmp_path))
    other = nn.Sequential(*[copy.deepcopy(layer)] * 20)
    detach_lora(other)
    load_adapter(other, str(tmp_path))
    assert torch.equal(other(x), model(x))
    merge_lora(model)
    close(model(x), expected, atol=1e-4)


def test_twenty_layers_with_one_weight():
    """Each has its own adapter; folding one in would change them all, so that is refused and nothing is changed."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    for layer in model:
        layer.weight = model[0].weight
    attach_lora(model, ".", rank=2, alpha=2)
    lively(model)
    x = torch.randn(3, 8)
    with torch.no_grad():
        close(model.eval()(x), model.train()(x), atol=1e-4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0 and 1 .*share a weight"):
        merge_lora(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_tied_head_is_not_folded_into_the_embedding():
    """Otherwise merging an adapter of the output head changes what the words mean at the input."""
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    attach_lora(model, "lm_head", rank=2, alpha=2)
    with pytest.raises(ValueError, match=r"transformer\.wte and lm_head share a weight"):
        merge_lora(model)


def test_layer_that_two_patterns_hit():
    """In one expression it is adapted once; a second adapter on it is refused, and nothing is changed."""
    model = roberta()
    assert len(attach_lora(model, "query|self.query", rank=2, alpha=2)) == 2
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"targets=query\|value: .*query has an adapter already"):
        attach_lora(model, "query|value", rank=2, alpha=2)
    assert set(model.state_dict()) == names


def test_compiled_model():
    """Attached first, a compiled model trains and evaluates with its adapter; after compiling, it is refused."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 8)
    attach_lora(model, ".", rank=2, alpha=2)
    expected = lively(model)(x)
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(x), expected, atol=1e-5)
    compiled(x).sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in lora_layers(model).values())
    with torch.no_grad():
        close(compiled.eval()(x), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"attach_lora first, then torch\.compile"):
        attach_lora(torch.compile(nn.Sequential(nn.Linear(8, 8))), ".", rank=2, alpha=2)


def test_deepcopy_is_independent():
    """Otherwise a copy kept for comparison changes with the model that is trained."""
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(3, 8)
    attach_lora(model, "0", rank=2, alpha=2)
    twin = copy.deepcopy(lively(model))
    expected = model(x)
    nn.init.ones_(model[0].lora_B)
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    detach_lora(twin)
    assert not twin[0]._forward_hooks and model[0]._forward_hooks


@pytest.mark.parametrize(
    "targets, rank, says",
    [
        ("no_such", 2, r"targets=no_such: matches no linear layer's name; there are \d+: roberta.encoder"),
        ("embeddings", 2, "matches no linear layer's name"),
        ("(", 2, "no regular expression"),
        ("query", 65, "rank=65 does not fit .*query of 64 x 64"),
        ("query", 0, "rank=0 does not fit"),
    ],
)
def test_what_cannot_be_adapted_is_named(targets, rank, says):
    """Otherwise a typing error trains nothing, silently."""
    model = roberta()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=says):
        attach_lora(model, targets, rank=rank, alpha=2)
    assert set(model.state_dict()) == names and not lora_layers(model)


def test_multihead_attention_is_refused():
    """torch's MultiheadAttention reads its projection's weight without calling the layer: a hook would do nothing."""
    with pytest.raises(ValueError, match=r"out_proj\.weight itself"):
        attach_lora(nn.MultiheadAttention(8, 2), "out_proj", rank=2, alpha=2)


def test_trainable_that_finds_nothing_is_named():
    """Otherwise a misspelt head stays at its random start."""
    model = roberta()
    attach_lora(model, "query", rank=2, alpha=2)
    with pytest.raises(ValueError, match="trainable=clasifier: matches no parameter's name"):
        mark_only_lora_as_trainable(model, also="clasifier")


def test_what_trains_and_is_not_saved_is_told(tmp_path, capsys):
    """Lost if it fails: a trained classifier is not in the adapter's file, by a typo or because nobody named it."""
    model = lively(roberta())
    attach_lora(model, "query", 4, 16)
    mark_only_lora_as_trainable(model, also="classifier")
    with pytest.raises(ValueError, match="trainable=clasifier: matches no parameter's name"):
        save_adapter(model, str(tmp_path / "typo"), also="clasifier")
    save_adapter(model, str(tmp_path / "without"))
    assert "note: classifier.dense.weight trains, and the file is written without it" in capsys.readouterr().out
    save_adapter(model, str(tmp_path / "with"), also="classifier")
    assert capsys.readouterr().out == ""


def test_a_parameter_of_the_model_itself_has_no_place_in_a_file(tmp_path):
    """Lost if it fails: the file of a model with a class token of its own opens nowhere."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model.cls_token = nn.Parameter(torch.zeros(8))
    attach_lora(model, "^0$", 2, 4)
    with pytest.raises(ValueError, match="cls_token is the model's own"):
        save_adapter(model, str(tmp_path), also="cls_token")
    assert not list(tmp_path.iterdir())
