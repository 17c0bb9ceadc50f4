"""Which parameters train beside the adapters, and how many."""

import re

import torch
from torch import nn

from plumbing.adapters.layers import lora_layers, shared_parameters
from plumbing.program.errors import compile_pattern


def _belongs(model, bias, also):
    """A function that says whether a parameter's name is an adapter's, that of a bias that `bias` names, or one that
    the regular expression `also` finds."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias={bias!r}: type "none", "all" or "lora_only"')
    also = compile_pattern("trainable", also) if also else None
    biases_of_adapted = {f"{name}.bias" for name in lora_layers(model)}

    def belongs(name):
        if "lora_" in name:
            return True
        if bias == "all" and name.rpartition(".")[2] == "bias":
            return True
        if bias == "lora_only" and name in biases_of_adapted:
            return True
        return bool(also and also.search(name))

    return belongs


def trainable_names(model: nn.Module, bias: str = "none", also: str | None = None) -> set[str]:
    """Names of the parameters that train: the adapters', and those that `bias` ("none", "all" or "lora_only", as in
    loralib and PEFT) and `also` (a regular expression) name. Raises ValueError if `also` finds nothing."""
    belongs = _belongs(model, bias, also)
    names = [name for name, _ in model.named_parameters()]
    if also and not any(re.search(also, name) for name in names):
        some = ", ".join([*names[:2], *names[-2:]])
        raise ValueError(f"trainable={also}: matches no parameter's name, such as {some}")
    return {name for name in names if belongs(name)}


def train_also(model: nn.Module, bias: str = "none", also: str | None = None) -> None:
    """Makes trainable, next to what trains already, the parameters that `bias` and `also` name. Raises ValueError if
    `also` finds nothing, or what no adapter's file can hold."""
    names = trainable_names(model, bias, also)
    if lora_layers(model):
        check_names(model, names - trainable_names(model, bias), also)
    for name, param in model.named_parameters():
        if name in names:
            param.requires_grad = True


def check_names(model, names, also):
    """Raises ValueError for a name that an adapter's file has no place for. It has a layer whole or its adapter, not
    both. And it has a parameter that several modules hold once: who loads it would change them all, or one alone."""
    for tied in shared_parameters(model):
        for name in tied:
            if name in names:
                raise ValueError(
                    f"trainable={also}: {name} is one tensor with {next(n for n in tied if n != name)}, which no "
                    "adapter's file can hold; name other parameters, or train without LoRA (--rank=0)"
                )
    for name in sorted(names):
        module = name.rpartition(".")[0]
        if module in lora_layers(model):
            raise ValueError(
                f"trainable={also}: {name} belongs to a layer with an adapter, and PEFT's files hold no layer twice; "
                "name other parameters (--lora_bias trains biases), or train without LoRA (--rank=0)"
            )


def lora_state_dict(model: nn.Module, bias: str = "none", also: str | None = None) -> dict[str, torch.Tensor]:
    """The adapters' tensors by their names in `model.state_dict()`, with those that `bias` and `also` name."""
    belongs = _belongs(model, bias, also)
    own = dict(model.named_parameters())  # a module under several names has one name here
    return {name: tensor for name, tensor in model.state_dict().items() if name in own and belongs(name)}


def parameter_report(model: nn.Module) -> str:
    """How much is trained, in the words of PEFT's `print_trainable_parameters`."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def also_trained(config) -> str | None:
    """What trains next to the adapters, as one regular expression: the user's own, and a classifier's new head."""
    patterns = [r"^score\."] if config.task == "classify" else []
    if config.trainable:
        patterns.append(config.trainable)
    return "|".join(patterns) or None
