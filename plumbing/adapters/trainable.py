"""Which parameters train beside the adapters, and how many."""

import torch
from torch import nn

from plumbing.adapters.layers import lora_layers, shared_parameters
from plumbing.program.errors import compile_pattern


def adapter_names(model: nn.Module, bias: str = "none", also: str | None = None) -> set[str]:
    """Names of the parameters that are an adapter's: A and B, and those that `bias` ("none", "all" or "lora_only", as
    in loralib and PEFT) and `also` (a regular expression) name. Raises ValueError if `also` finds nothing."""
    names = [name for name, _ in model.named_parameters()]  # a module under several names has one name here
    biases = {
        "none": set(),
        "all": {name for name in names if name.rpartition(".")[2] == "bias"},
        "lora_only": {f"{name}.bias" for name in lora_layers(model)}.intersection(names),
    }
    if bias not in biases:
        raise ValueError(f"bias={bias!r}: type {', '.join(biases)}")
    found = set(filter(compile_pattern("trainable", also).search, names)) if also else set()
    if also and not found:
        some = ", ".join([*names[:2], *names[-2:]])
        raise ValueError(f"trainable={also}: matches no parameter's name, such as {some}")
    return biases[bias] | found | {name for name in names if "lora_" in name}


def trainable_names(model: nn.Module, bias: str = "none", also: str | None = None) -> set[str]:
    """Names of the parameters that train: the adapter's. (The homework leaves this function out.)"""
    return adapter_names(model, bias, also)


def train_also(model: nn.Module, bias: str = "none", also: str | None = None) -> None:
    """Makes trainable, next to what trains already, the parameters that `bias` and `also` name. Raises ValueError if
    `also` finds nothing, or what no adapter's file can hold."""
    names = trainable_names(model, bias, also)
    if lora_layers(model):
        find_others(model, bias, also)
    for name, param in model.named_parameters():
        param.requires_grad |= name in names


def find_others(model: nn.Module, bias: str, also: str | None) -> set[str]:
    """Names of the parameters that `also` alone names. Raises ValueError for one that an adapter's file has no place
    for. It has whole modules, but not the whole model. It has a layer whole or its adapter, not both. And it has a
    parameter that several modules hold once: who loads it would change them all, or one alone."""
    others = adapter_names(model, bias, also) - adapter_names(model, bias)
    adapted = lora_layers(model)
    tied = shared_parameters(model)
    for name in sorted(others, key=lambda name: (name not in tied, name)):
        if name in tied:
            twin = next(n for n in tied[name] if n != name)
            problem = f"is one tensor with {twin}, which no adapter's file can hold; name other parameters"
        elif "." not in name:
            problem = "is the model's own, in no module that an adapter's file could hold; name other parameters"
        elif name.rpartition(".")[0] in adapted:
            problem = "belongs to a layer with an adapter, and PEFT's files hold no layer twice; "
            problem += "name other parameters (--lora_bias trains biases)"
        else:
            continue
        raise ValueError(f"trainable={also}: {name} {problem}, or train without LoRA (--rank=0)")
    return others


def lora_state_dict(model: nn.Module, bias: str = "none", also: str | None = None) -> dict[str, torch.Tensor]:
    """The adapters' tensors by their names in `model.state_dict()`, with those that `bias` and `also` name."""
    names = adapter_names(model, bias, also)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def parameter_report(model: nn.Module) -> str:
    """How much is trained, in the words of PEFT's `print_trainable_parameters`."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


def also_trained(config) -> str | None:
    """What trains next to the adapters, as one regular expression: the user's own, and a classifier's new head."""
    head = r"^score\." if config.task == "classify" else None
    return "|".join(filter(None, (head, config.trainable))) or None
