"""A lora.py of one's own in place of ours: it trains as ours does, or one line says before training what differs.

Each check names a layer. ours: what the handout asks for, and what everything here relies on.
"""

import contextlib

import torch
from torch import nn

from plumbing.adapters.layers import lora_layers


def draw_adapter(layer, dtype) -> None:
    """Real A and B for a layer that was made on the meta device, drawn by its own reset_parameters or, where that
    leaves one of them as it was, by its constructor. The layer's weight is still on that device, where nothing is
    drawn; `dtype` is the one that it will have."""
    for name in ("lora_A", "lora_B"):
        old = getattr(layer, name)
        new = torch.full(old.shape, torch.nan, dtype=torch.promote_types(dtype, torch.float32))
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
    layer.reset_parameters()
    undrawn = [param for param in (layer.lora_A, layer.lora_B) if param.isnan().all()]
    if undrawn:
        with torch.device("cpu"):
            made = type(layer)(layer.in_features, layer.out_features, lora_rank=layer.lora_A.size(0), lora_alpha=1.0)
        for param in undrawn:
            drawn = made.lora_A if param is layer.lora_A else made.lora_B
            param.data = drawn.data.to(param.dtype)


def check_layers(model, layer_class: type, rank: int) -> None:
    """Raises ValueError for layers of another shape than the handout's."""
    for name, layer in model.named_modules():
        if not isinstance(layer, layer_class):
            continue
        if getattr(layer, "bias", None) is None:
            raise ValueError(f"lora.py: {name} has lost its bias: LoRALinear(..., bias=True) has one, as nn.Linear")
        if "lora_A" not in layer._parameters:
            continue
        for key, words, expected in (
            ("lora_A", "(lora_rank, in_features)", (rank, layer.in_features)),
            ("lora_B", "(out_features, lora_rank)", (layer.out_features, rank)),
        ):
            found = getattr(layer, key, None)
            shape = "missing" if found is None else tuple(found.shape)
            if shape != expected:
                raise ValueError(f"lora.py: {name}.{key} is {shape}, and should be {words} = {expected}")
        if not isinstance(getattr(layer, "lora_scaling", None), (int, float)):
            raise ValueError(f"lora.py: {name}.lora_scaling is no number, and should be lora_alpha / lora_rank")


def check_frozen(model) -> None:
    """Raises ValueError if mark_only_lora_as_trainable has left something else than A and B trainable, or neither."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = {f"{name}.{key}" for name in lora_layers(model) for key in ("lora_A", "lora_B")}
    others = [name for name in trained if "lora_" not in name]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"lora.py: after mark_only_lora_as_trainable {others[0]}{more} would train too, and their training would "
            "be lost: only A and B are saved; set requires_grad = False for all others (--rank=0 trains every weight)"
        )
    untrained = sorted(adapters.difference(trained))
    if untrained:
        raise ValueError(f"lora.py: after mark_only_lora_as_trainable {untrained[0]} does not train")


def check_start(model) -> None:
    """Raises ValueError if B A is not zero in a layer that was made anew: training would not start from the base. And
    for a class of one's own that computes something else than the formula."""
    for name, layer in lora_layers(model).items():
        A = layer.lora_A.detach()
        B = layer.lora_B.detach()
        if not (A.isfinite().all() and B.isfinite().all()):
            problem = "values that are not finite: reset_parameters sets A and B"
        elif A.any() and B.any():
            problem = "B A other than zero, so not from the base model: reset_parameters sets B to zero"
        elif not A.any() and not B.any():
            problem = "A and B zero, so neither can learn: draw A at random"
        else:
            continue
        raise ValueError(f"lora.py: {name} starts with {problem}")
    if not getattr(layer, "mixes_dtypes", False):
        check_formula(type(layer))


@torch.no_grad()
def check_formula(layer_class: type) -> None:
    """Raises ValueError if a small layer without dropout is not nn.Linear while B is zero; if A and B then add
    nothing, or something else in eval(), in a second eval() or in train() after it; or if lora_scaling does not scale
    what they add."""
    layer = layer_class(7, 5, lora_rank=2, lora_alpha=3.0, lora_dropout=0.0)
    numbers = torch.Generator().manual_seed(0)
    for param in (layer.weight, layer.bias, layer.lora_A, layer.lora_B):
        param.normal_(generator=numbers)
    x = torch.randn(3, 7, generator=numbers)
    plain = nn.functional.linear(x, layer.weight, layer.bias)

    def added(mode):
        layer.train(mode)
        return layer(x.clone()) - plain

    B = layer.lora_B.clone()
    layer.lora_B.zero_()
    found = {"is not nn.Linear where B is zero": (added(True), torch.zeros(3, 5))}
    layer.lora_B.copy_(B)
    delta = added(True)
    found["adds something else in eval() than in train()"] = (added(False), delta)
    found["adds something else in eval() that is called twice"] = (added(False), delta)
    found["adds something else in train() after eval()"] = (added(True), delta)
    with contextlib.suppress(AttributeError):  # of a property, which follows from alpha
        layer.lora_scaling *= 2
        found["adds something that lora_scaling does not scale"] = (added(True), 2 * delta)
    for what, (value, expected) in found.items():
        if not torch.allclose(value, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(f"lora.py: LoRALinear {what}")
    if not delta.any():
        raise ValueError("lora.py: LoRALinear adds nothing of A and B")
