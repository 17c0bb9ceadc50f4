"""PYTEST_DONT_REWRITE  Part 1, lora.py: the layer, its merging, and what trains.

python -m pytest homework_tests/test_1_lora.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear, mark_only_lora_as_trainable

N_IN = 12
N_OUT = 7
RANK = 4
ALPHA = 10.0  # so the scale, 2.5, is neither 1 nor alpha


def new_layer(**settings):
    """A layer with an adapter that has learned nothing yet."""
    torch.manual_seed(0)
    layer = LoRALinear(N_IN, N_OUT, **({"lora_rank": RANK, "lora_alpha": ALPHA} | settings))
    assert hasattr(layer, "lora_A") and hasattr(layer, "lora_B"), (
        "a layer with lora_rank > 0 has no lora_A or no lora_B"
    )
    return layer


def tuned_layer():
    """A layer whose A and B are random, as after some training."""
    layer = new_layer()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    return layer


@torch.no_grad()
def B_A(layer):
    shapes = (tuple(layer.lora_B.shape), tuple(layer.lora_A.shape))
    assert shapes == ((N_OUT, RANK), (RANK, N_IN)), f"B and A have the shapes {shapes}: first make them right"
    assert hasattr(layer, "lora_scaling"), "the layer has no lora_scaling, the factor of B A x"
    return layer.lora_B @ layer.lora_A


def same(a, b):
    kinds = {type(a), type(b)}
    assert kinds <= {torch.Tensor, nn.Parameter}, f"tensors are asked for, not {', '.join(k.__name__ for k in kinds)}"
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def check(what, found, wanted, mistakes):
    """Fails with the mistake whose result was found, if it is one that is known."""
    assert found.shape == wanted.shape, f"{what} has the shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    if not same(found, wanted):
        known = [mistake for mistake, result in mistakes.items() if same(found, result)]
        far = (found - wanted).abs().max().item()
        raise AssertionError(f"{what}: {known[0] if known else f'it is off by up to {far:.3g}'}")


# --- __init__ --------------------------------------------------------------------------------------


def test_init_makes_A_and_B():
    layer = new_layer()
    A = tuple(layer.lora_A.shape)
    B = tuple(layer.lora_B.shape)
    hint = ""
    if N_IN in B or N_OUT in A:
        hint = "; A and B are swapped: A comes first and takes x down to r numbers, B takes these up again"
    assert A == (RANK, N_IN), f"lora_A has the shape {A}, not (r, in_features) = {(RANK, N_IN)}{hint}"
    assert B == (N_OUT, RANK), f"lora_B has the shape {B}, not (out_features, r) = {(N_OUT, RANK)}{hint}"
    names = {name for name, _ in layer.named_parameters()}
    assert {"lora_A", "lora_B"} <= names, "lora_A and lora_B must be nn.Parameter, or no optimizer finds them"
    other = new_layer(dtype=torch.float64)
    assert other.lora_A.dtype == torch.float64, (
        "a layer in float64 has lora_A in another dtype: see the argument dtype"
    )
    other = new_layer(device="meta")
    assert other.lora_A.device == other.lora_B.device == other.weight.device, (
        "A or B is on another device than weight: see the argument device"
    )


def test_init_scales_by_alpha_and_rank():
    layer = new_layer()
    scaling = getattr(layer, "lora_scaling", None)
    assert scaling is not None, "the layer has no lora_scaling, the factor of B A x"
    assert isinstance(scaling, (int, float)), f"lora_scaling is {scaling!r}, not a number"
    known = {
        ALPHA: "; alpha is not divided by r",
        ALPHA * RANK: ", which is alpha * r",
        RANK / ALPHA: ", which is r / alpha",
        1 / RANK: ", which is 1 / r",
        ALPHA / RANK**0.5: ", which is alpha / sqrt(r)",
    }
    assert scaling == ALPHA / RANK, (
        f"for alpha = {ALPHA:g} and r = {RANK} lora_scaling is {scaling:g}{known.get(scaling, '')}: "
        f"alpha / r = {ALPHA / RANK:g} was expected"
    )


def test_init_keeps_dropout():
    dropout = getattr(new_layer(lora_dropout=0.25), "lora_dropout", None)
    assert isinstance(dropout, nn.Dropout), f"lora_dropout is {dropout!r}, not an nn.Dropout"
    assert dropout.p == 0.25, f"lora_dropout drops a share of {dropout.p}; the layer was made with lora_dropout=0.25"


def test_init_says_that_nothing_is_merged():
    for layer in (new_layer(), LoRALinear(N_IN, N_OUT)):
        merged = getattr(layer, "has_weights_merged", None)
        assert merged is False, f"has_weights_merged of a new layer is {merged}, not False (with and without adapter)"


def test_init_without_rank_makes_no_adapter():
    layer = LoRALinear(N_IN, N_OUT, lora_rank=0, lora_alpha=ALPHA)
    assert not layer.is_lora(), "a layer with lora_rank=0 has a lora_A: it should be a plain nn.Linear"


# --- reset_parameters ------------------------------------------------------------------------------


def test_reset_makes_B_zero_and_A_random():
    layer = new_layer()
    for when in ("in a new layer", "after reset_parameters() of a tuned layer"):
        A = layer.lora_A.detach()
        B = layer.lora_B.detach()
        assert A.any() or not B.any(), f"A is zero and B is not {when}: asked for is a random A and a B of zeros"
        assert not B.any(), f"B is not zero {when}: so training does not start from the base model"
        assert A.any(), f"A and B are both zero {when}: then neither of them ever gets a gradient"
        assert A.unique().numel() > 1, f"all numbers of A are the same {when}: A is to be random"
        nn.init.ones_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
        layer.reset_parameters()


def test_reset_draws_A_as_nn_linear_draws_its_weight():
    torch.manual_seed(0)
    A = LoRALinear(1000, N_OUT, lora_rank=RANK, lora_alpha=ALPHA).lora_A.detach()
    assert A.shape == (RANK, 1000), f"lora_A has the shape {tuple(A.shape)}, not {(RANK, 1000)}"
    std = A.std().item()
    wanted = (1 / 3000) ** 0.5  # uniform between -1 / sqrt(in_features) and 1 / sqrt(in_features)
    sizes = {" (is a = sqrt(5) missing?)": (2 / 1000) ** 0.5, " (normal_ or randn?)": 1.0, " (rand?)": 12**-0.5}
    hint = "".join(text for text, size in sizes.items() if abs(std / size - 1) < 0.05)
    assert abs(std / wanted - 1) < 0.1, (
        f"for 1000 inputs the numbers of A have a standard deviation of {std:.3g}{hint}; of kaiming_uniform_ with "
        f"a = sqrt(5) it is {wanted:.3g}"
    )
    assert abs(A.mean().item()) < std / 4, f"the numbers of A have the mean {A.mean().item():.3g}, not 0"


def test_reset_draws_the_inherited_weight_too():
    layer = new_layer()
    nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert layer.weight.any(), "reset_parameters leaves weight as it was: the inherited part is to be drawn, too"
    plain = LoRALinear(N_IN, N_OUT)
    assert plain.weight.abs().max() < 1, "a layer without adapter has no weight as nn.Linear draws it"


# --- forward ---------------------------------------------------------------------------------------


def test_forward_is_the_formula():
    layer = tuned_layer()
    x = torch.randn(5, N_IN)
    W0 = layer.weight.detach()
    b = layer.bias.detach()
    s = layer.lora_scaling
    BA = B_A(layer)
    base = F.linear(x, W0, b)
    low_rank = F.linear(x, BA)
    mistakes = {
        "the adapter adds nothing": base,
        "B A x is not multiplied by lora_scaling": base + low_rank,
        "B A x is multiplied by lora_scaling twice": base + s * s * low_rank,
        "B A x is divided by r again": base + s / RANK * low_rank,
        "B A x is multiplied by alpha; lora_scaling is more than that": base + ALPHA * low_rank,
        "the bias is left out": base + s * low_rank - b,
        "the bias is there twice": base + s * low_rank + b,
        "W0 x + b is scaled as well": s * (base + low_rank),
        "W0 x + b is left out": s * low_rank,
    }
    check("forward", layer(x).detach(), base + s * low_rank, mistakes)


def test_forward_takes_any_shape():
    layer = tuned_layer()
    x = torch.randn(2, 3, N_IN)
    out = layer(x)
    assert tuple(out.shape) == (2, 3, N_OUT), (
        f"of x (2, 3, {N_IN}) forward makes {tuple(out.shape)}: asked is {(2, 3, N_OUT)}"
    )
    assert same(layer(x), layer(x)), "forward gives another output each time, although lora_dropout is 0"
    assert same(out[1], layer(x[1])), "forward computes something else in three dimensions than row by row"


def test_forward_starts_from_the_base_model():
    layer = new_layer()
    x = torch.randn(5, N_IN)
    assert same(layer(x), F.linear(x, layer.weight, layer.bias)), "a new layer's output is not the base's, W0 x + b"


def test_forward_adds_nothing_while_merged():
    layer = tuned_layer()
    layer.has_weights_merged = True
    x = torch.randn(5, N_IN)
    plain = F.linear(x, layer.weight, layer.bias)
    assert same(layer(x), plain), "forward adds B A x although it is merged into weight: the adapter counts twice"


def test_forward_without_adapter_is_nn_linear():
    layer = LoRALinear(N_IN, N_OUT)
    x = torch.randn(5, N_IN)
    assert same(layer(x), F.linear(x, layer.weight, layer.bias)), "a layer with lora_rank=0 does not compute W0 x + b"
    layer = LoRALinear(N_IN, N_OUT, bias=False)
    assert same(layer(x), F.linear(x, layer.weight)), "a layer with bias=False does not compute W0 x"


def test_forward_lets_gradients_through():
    layer = tuned_layer()
    layer.requires_grad_(True)
    layer(torch.randn(5, N_IN)).sum().backward()
    for name in ("lora_A", "lora_B"):
        grad = getattr(layer, name).grad
        assert grad is not None and grad.any(), (
            f"{name} gets no gradient: is something detached, or .data, in forward?"
        )


def test_forward_drops_in_front_of_A():
    """x, W0, b, A and B are ones: each output is 65 and, times 2, the number of x's 64 parts that are left."""
    torch.manual_seed(0)
    layer = LoRALinear(64, N_OUT, lora_rank=1, lora_alpha=1.0, lora_dropout=0.5)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    x = torch.ones(100, 64)
    base = torch.full((100, N_OUT), 65.0)
    nn.init.ones_(layer.lora_A)
    nn.init.zeros_(layer.lora_B)
    out = layer(x).detach()
    assert not (out == 0).any(), "lora_dropout is on the output: it sets numbers of h, which hold W0 x, to zero"
    assert same(out, base), "lora_dropout reaches W0 x, too: it is for the x that A reads, and W0 reads all of x"
    nn.init.ones_(layer.lora_B)
    added = layer(x).detach() - base
    assert not same(added, torch.full_like(added, 64)), "lora_dropout=0.5 drops nothing in training"
    one_mask = (added - added[:1]).abs() < 1e-3
    assert not one_mask.all(), "lora_dropout is on A, B or B A: all rows have one mask. It is for the x that A reads"
    all_or_nothing = (added.abs() < 1e-3) | ((added - added.max()).abs() < 1e-3)
    assert not all_or_nothing.all(), "lora_dropout is behind A or B: it is for the x that A reads"
    mean = added.mean().item()
    assert abs(mean - 64) < 4, (
        f"lora_dropout=0.5 changes the mean of B A x from 64 to {mean:.0f}; nn.Dropout keeps it"
    )
    counts = added / 2
    assert same(counts, counts.round()), "lora_dropout=0.5 drops another share than one half"


# --- train and eval --------------------------------------------------------------------------------


def check_merged(layer, W0, when):
    BA = B_A(layer)
    s = layer.lora_scaling
    mistakes = {
        "the adapter is not merged, weight is still W0": W0,
        "the adapter is merged without its scale": W0 + BA,
        "the adapter is merged twice": W0 + 2 * s * BA,
        "the adapter is subtracted": W0 - s * BA,
        "W0 is lost": s * BA,
    }
    check(f"weight {when}", layer.weight.detach(), W0 + s * BA, mistakes)
    assert layer.has_weights_merged is True, f"has_weights_merged is {layer.has_weights_merged} {when}"


def check_unmerged(layer, W0, when):
    delta = layer.lora_scaling * B_A(layer)
    mistakes = {
        "the adapter is still merged in it: it was not un-merged": W0 + delta,
        "the adapter was un-merged without its scale": W0 + delta - B_A(layer),
        "the adapter was taken out, but it was not in": W0 - delta,
        "the adapter was added": W0 + 2 * delta,
    }
    check(f"weight {when}", layer.weight.detach(), W0, mistakes)
    assert layer.has_weights_merged is False, f"has_weights_merged is {layer.has_weights_merged} {when}"


def test_train_false_merges():
    layer = tuned_layer()
    W0 = layer.weight.detach().clone()
    result = layer.train(False)
    assert not layer.training, (
        "after train(False) the layer is still in training mode: the inherited train is missing"
    )
    check_merged(layer, W0, "after train(False), which is what model.eval() calls")
    assert result is layer, "train returns something else than self"
    layer.train(False)
    check_merged(layer, W0, "after train(False) twice")


def test_train_true_unmerges():
    layer = tuned_layer()
    W0 = layer.weight.detach().clone()
    layer.train()
    check_unmerged(layer, W0, "after train() of a layer that was not merged")
    layer.train(False)
    result = layer.train()
    assert layer.training, "after train() the layer is not in training mode: the inherited train is missing"
    check_unmerged(layer, W0, "after train(False) and train()")
    assert result is layer, "train returns something else than self"
    layer.train()
    check_unmerged(layer, W0, "after train() twice")


def test_train_merges_what_was_learned_since():
    layer = tuned_layer()
    W0 = layer.weight.detach().clone()
    for cycle in range(10):
        layer.train(False)
        check_merged(layer, W0, f"in the {cycle + 1}. evaluation")
        layer.train()
        check_unmerged(layer, W0, f"after the {cycle + 1}. evaluation")
        nn.init.normal_(layer.lora_B)  # as an update would


def test_train_changes_no_output():
    layer = tuned_layer()
    x = torch.randn(5, N_IN)
    before = layer(x).detach()
    layer.train(False)
    assert same(layer(x), before), "the merged layer gives another output than the unmerged one"


def test_train_leaves_W0_frozen():
    layer = tuned_layer()
    layer.requires_grad_(False)
    weight = layer.weight
    layer.train(False)
    layer.train()
    assert not layer.weight.requires_grad, "after merging and back, weight.requires_grad is True: W0 would train"
    assert layer.weight is weight, "weight is another parameter after merging: change its numbers, weight.data, alone"


def test_train_works_without_adapter():
    layer = LoRALinear(N_IN, N_OUT)
    W0 = layer.weight.detach().clone()
    for mode in (False, True):
        layer.train(mode)
        assert layer.training is mode, f"after train({mode}) a layer without adapter has training = {layer.training}"
        assert same(layer.weight, W0), f"train({mode}) changes the weight of a layer that has no adapter"


def test_eval_merges_once():
    layer = tuned_layer()
    W0 = layer.weight.detach().clone()
    result = layer.eval()
    assert not layer.training, "after eval() the layer is still in training mode"
    check_merged(layer, W0, "after eval()")
    assert result is layer, "eval returns something else than self"
    layer.eval()
    check_merged(layer, W0, "after eval() twice")
    layer.train(False)
    check_merged(layer, W0, "after eval() and train(False)")


# --- mark_only_lora_as_trainable -------------------------------------------------------------------


def test_mark_chooses_A_and_B():
    for before in (True, False):
        layers = [nn.Embedding(9, N_IN), new_layer(), nn.LayerNorm(N_OUT), LoRALinear(N_OUT, 5), nn.Linear(5, 2)]
        model = nn.Sequential(*layers).requires_grad_(before)
        result = mark_only_lora_as_trainable(model)
        trains = {name for name, param in model.named_parameters() if param.requires_grad}
        missing = {"1.lora_A", "1.lora_B"} - trains
        assert not missing, (
            f"{', '.join(sorted(missing))} must train and does not (requires_grad was {before} before)"
        )
        biases = sorted(name for name in trains if name.endswith("bias"))
        weights = sorted(name for name in trains if name.endswith("weight"))
        assert "1.weight" not in weights, "W0 trains: the weight next to A and B must be frozen"
        assert not weights, f"{', '.join(weights)} trains: only A and B do, wherever the parameter lies"
        assert not biases, f"a bias trains ({', '.join(biases)}): biases are frozen as the weights are"
        assert result is model, "the model is not returned"
