"""What any layer with an adapter has in common, whoever wrote its class: lora_A, lora_B and lora_scaling.

Here and in the files about formats nothing more of a layer is used, so a lora.py of one's own works with them too.
"""

import contextlib
import math

import torch
from torch import nn


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{qualified name: layer} of the layers that carry an adapter, in the model's order."""
    return {name: module for name, module in model.named_modules() if "lora_A" in module._parameters}


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """{name: all its names} of the parameters that several modules hold, such as a head that is the word embedding
    too."""
    users = {}
    for module_name, module in model.named_modules():  # a module under several names comes once
        for leaf, param in module._parameters.items():
            users.setdefault(id(param), []).append(f"{module_name}.{leaf}")
    users.pop(id(None), None)
    return {name: names for names in users.values() if len(names) > 1 for name in names}


def merges_itself(layer) -> bool:
    """A LoRALinear, ours or one of your own: it adds B A x in its own forward pass, so it needs no hooks."""
    return hasattr(layer, "is_lora")


def is_conv1d(layer) -> bool:
    """Hugging Face's Conv1D: a linear layer that keeps its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def sizes(layer) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    return tuple(layer.weight.shape[::-1] if is_conv1d(layer) else layer.weight.shape)


def check_rank(rank: int, n_in: int, n_out: int, name: str = "a layer") -> None:
    """Raises ValueError for a rank that a layer of this size cannot have."""
    largest = min(n_in, n_out)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank={rank} does not fit {name} of {n_in} x {n_out}: type a rank from 1 to {largest}")


def factory_kwargs(weight: torch.Tensor) -> dict:
    """Device and dtype of an adapter for this weight: float32 even where the weight is bfloat16, since small updates
    would be lost in it; float64 for a float64 weight."""
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def copy_all(tensors: tuple, dtype: torch.dtype) -> tuple:
    copies = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


class CastAll(torch.autograd.Function):
    """dtype, tensors -> their copies in that dtype, and the same with their gradients on the way back."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.own_dtype = tensors[0].dtype
        return copy_all(tensors, dtype)

    @staticmethod
    def backward(ctx, *grads):
        return None, *copy_all(grads, ctx.own_dtype)


@contextlib.contextmanager
def cast_together(layers: list, dtype: torch.dtype):
    """Within it the layers' A and B are copies in `dtype`, all made at once, and no forward or backward pass casts
    them again: on a GPU two kernels, not four a layer. Gradients reach A and B in their own dtype."""
    adapted = [layer._parameters for layer in layers if "lora_A" in layer._parameters]  # merge_lora takes it away
    places = [(params, name) for params in adapted for name in ("lora_A", "lora_B")]
    own = [params[name] for params, name in places]
    if not own or own[0].dtype == dtype:
        yield
        return
    try:
        for (params, name), cast in zip(places, CastAll.apply(dtype, *own)):
            params[name] = cast
        yield
    finally:
        for (params, name), param in zip(places, own):
            params[name] = param


def kind_of(layer, rslora: bool = False) -> tuple[int, float, float]:
    """(rank, alpha, dropout) as they were typed: `lora_scaling` is alpha / r (rslora: alpha / sqrt(r)), rounded, and
    `lora_dropout` a number or an nn.Dropout."""
    rank = layer.lora_A.size(0)
    alpha = layer.lora_scaling * (math.sqrt(rank) if rslora else rank)
    typed = float(f"{alpha:.12g}")
    if layer_alpha(typed, rank, rslora) / rank == layer.lora_scaling:
        alpha = typed
    dropout = getattr(layer, "lora_dropout", 0.0)
    return rank, alpha, getattr(dropout, "p", dropout)


def layer_alpha(alpha: float, rank: int, rslora: bool = False) -> float:
    """The alpha of a layer, which scales by alpha / rank. rslora: the scale is alpha / sqrt(rank), which is
    alpha sqrt(rank) / rank ("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", Kalajdzievski 2023,
    https://arxiv.org/abs/2312.03732)."""
    return alpha * math.sqrt(rank) if rslora else alpha


def lora_arguments(config) -> dict:
    """The fields of GPTConfig that say which adapters a config's model has. No dropout: that is training's."""
    alpha = layer_alpha(config.alpha, config.rank, config.rslora)
    return {"lora_rank": config.rank, "lora_alpha": alpha, "lora_targets": config.lora_targets}


@torch.no_grad()
def merged_weight(layer) -> torch.Tensor:
    """W0 + (alpha / r) B A in W0's shape and dtype, rounded once."""
    w0 = getattr(layer, "_w0", None)
    if w0 is None and getattr(layer, "has_weights_merged", False):
        return layer.weight.detach()  # merged in place, by a lora.py of one's own
    w0 = layer.weight if w0 is None else w0
    if hasattr(layer, "delta_weight"):
        delta = layer.delta_weight()
    else:
        delta = layer.lora_scaling * layer.lora_B @ layer.lora_A
    delta = delta.t() if is_conv1d(layer) else delta
    return (w0 + delta).to(w0.dtype)
