"""The same adapter on a model that others wrote: attached by forward hooks, taken off, folded in."""

from collections.abc import Iterable

import torch
from torch import nn

from plumbing.adapters import layers as adapter
from plumbing.program.errors import compile_pattern


def attach_lora(
    model: nn.Module, targets: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
) -> list[str]:
    """Puts an adapter on every `nn.Linear` and Hugging Face `Conv1D` of `model` if the regular expression `targets`
    finds something in its full name (`re.search`). Returns the names of the adapted layers. It does not change which
    parameters train: call mark_only_lora_as_trainable afterwards.

    rslora: scales by alpha / sqrt(rank) ("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    Kalajdzievski 2023). add_adapter divides by rank, so layer_alpha gives it alpha sqrt(rank).

    Raises ValueError, before anything is changed, if nothing matches or a matching layer cannot be adapted.
    """
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError("the model is compiled already: attach_lora first, then torch.compile")
    pattern = compile_pattern("targets", targets)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or adapter.is_conv1d(m)}
    chosen = {name: layer for name, layer in linear.items() if pattern.search(name)}
    if not chosen:
        names = list(linear)
        examples = names if len(names) <= 5 else [*names[:4], names[-1]]
        listed = ", ".join(examples) or "none"
        raise ValueError(f"targets={targets}: matches no linear layer's name; there are {len(names)}: {listed}")
    for name, layer in chosen.items():
        if "lora_A" in layer._parameters:
            raise ValueError(f"targets={targets}: {name} has an adapter already; detach_lora takes it off")
        check_layer(layer, name, f"targets={targets}")
        n_out, n_in = adapter.sizes(layer)
        adapter.check_rank(rank, n_in, n_out, name)
    for layer in chosen.values():
        add_adapter(layer, rank, adapter.layer_alpha(alpha, rank, rslora), dropout)
    return list(chosen)


def check_layer(layer: nn.Module, name: str, where: str) -> None:
    """Raises ValueError for a layer that cannot get an adapter. where: the line's beginning."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention's, our heads
        raise ValueError(f"{where}: this model reads {name}.weight itself, without calling the layer")
    if not layer.weight.is_floating_point():
        raise ValueError(f"{where}: {name} is stored in {layer.weight.dtype}, not in floating point")


def add_adapter(layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """A new adapter on one layer. In a LoRALinear that was made with rank 0 it is enough to set A and B: is_lora() is
    then true, and its own forward pass adds (alpha / r) B A x. Any other layer gets two hooks, functions that torch
    calls before and after its forward pass. `add_to_output` adds (alpha / r) B A x to what the layer computes. In
    evaluation without gradients `cover_weight` hides the layer's weight behind W0 + (alpha / r) B A instead, which is
    as fast as W0 alone."""
    training = layer.training
    layer.train()  # a LoRALinear with weights that are merged takes its W0 back
    layer.lora_A, layer.lora_B = adapter.new_matrices(layer, rank)
    layer.lora_scaling = alpha / rank
    layer.lora_dropout = nn.Dropout(dropout)
    is_hooked = hasattr(layer, "_lora_hooks")  # then load_adapter replaces A and B of a layer that has an adapter
    if not adapter.merges_itself(layer) and not is_hooked:
        layer._merged = None
        layer._lora_hooks = (
            layer.register_forward_pre_hook(cover_weight),
            # After an error too (always_call), or the weight would stay covered.
            layer.register_forward_hook(add_to_output, with_kwargs=True, always_call=True),
        )
    layer.train(training)


def cover_weight(layer, args):
    """Before a forward pass without gradients, in evaluation: `layer.weight` reads as W0 + (alpha / r) B A."""
    # (torch.compile cannot follow a weight that is exchanged.)
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        layer._merged = None  # in training it would only take memory
        return
    # W0 + (alpha / r) B A is computed again only if W0, A or B was replaced (another data_ptr) or changed in place
    # (another _version), or if the scale was.
    state = [(t.data_ptr(), t._version, t.dtype) for t in (layer.weight, layer.lora_A, layer.lora_B)]
    state.append(layer.lora_scaling)
    if layer._merged is None or layer._merged[0] != state:
        layer._merged = (state, adapter.merged_weight(layer))
    # Parameters are kept in layer._parameters, where Python looks only if layer.__dict__ has no such name. So this
    # tensor hides the parameter until add_to_output takes it away.
    layer.__dict__["weight"] = layer._merged[1]


def add_to_output(layer, args, kwargs, out):
    """After the layer's forward pass: adds (alpha / r) B A x, or takes the cover off its weight."""
    cover = layer.__dict__.pop("weight", None)  # W0 is in sight again
    if cover is None and out is not None:  # out is None after an error in the forward pass
        x = next(iter((*args, *kwargs.values())))  # the layer's one input, by place or by name
        return adapter.add_low_rank(out, x, layer)
    return None  # to torch: the output stays as it is


def drop_adapter(layer: nn.Module) -> None:
    """Takes the adapter off one layer; W0 is as it always was."""
    training = layer.training
    layer.train()
    for handle in layer.__dict__.pop("_lora_hooks", ()):
        handle.remove()
    layer.__dict__.pop("_merged", None)
    for name in ("lora_A", "lora_B", "lora_dropout", "lora_scaling"):
        delattr(layer, name)
    layer.train(training)


def put_aside(model: nn.Module, names: Iterable[str]) -> None:
    """Keeps the base's biases and whole modules of these names, which an adapter's file is about to replace. What is
    aside already is the base's. No parameter, no buffer, in no state dict."""
    state = model.state_dict()
    for name in names:
        module, _, leaf = name.rpartition(".")
        aside = model.get_submodule(module).__dict__.setdefault("_put_aside", {})
        if leaf not in aside:
            aside[leaf] = state[name].clone()


def names_aside(model: nn.Module) -> set[str]:
    """The names of what an adapter's file has replaced."""
    modules = model.named_modules()
    return {f"{name}.{leaf}" for name, module in modules for leaf in module.__dict__.get("_put_aside", ())}


def put_back(model: nn.Module) -> None:
    """The base's own biases and modules, in the place of an adapter's."""
    for module in model.modules():
        aside = module.__dict__.pop("_put_aside", None)
        if aside:
            module.load_state_dict(aside, strict=False)


def detach_lora(model: nn.Module) -> None:
    """Takes every adapter off, with the biases and modules that its file brought: the model computes what it did
    before, bit for bit."""
    for layer in adapter.lora_layers(model).values():
        drop_adapter(layer)
    put_back(model)


def merge_lora(model: nn.Module) -> None:
    """Folds every adapter into its layer's weight, once and for all, and takes it off. Raises ValueError, before
    anything is changed, for a weight that another layer shares."""
    layers = adapter.lora_layers(model)
    for names in adapter.shared_parameters(model):
        modules = [name.removesuffix(".weight") for name in names]
        for module in modules:
            if module in layers:
                raise ValueError(
                    f"{' and '.join(modules)} share a weight: merging {module}'s adapter would change them all"
                )
    for layer in layers.values():
        merged = adapter.merged_weight(layer)
        drop_adapter(layer)
        layer.weight.data = merged
    for module in model.modules():
        module.__dict__.pop("_put_aside", None)  # an adapter's biases and modules are the model's own now
