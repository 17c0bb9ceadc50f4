"""The same adapter on a model that others wrote: attached by forward hooks, taken off, folded in."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.adapters import layers as adapter
from plumbing.program.errors import compile_pattern


def attach_lora(
    model: nn.Module, targets: str, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
) -> list[str]:
    """Puts an adapter on every `nn.Linear` and Hugging Face `Conv1D` of `model` if the regular expression `targets`
    finds something in its full name (`re.search`). Returns the names of the adapted layers. It does not change which
    parameters train: call mark_only_lora_as_trainable afterwards. rslora: scales by alpha / sqrt(rank).

    Raises ValueError, before anything is changed, if nothing matches or a matching layer cannot be adapted.
    """
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError("the model is compiled already: attach_lora first, then torch.compile")
    pattern = compile_pattern("targets", targets)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or adapter.is_conv1d(m)}
    chosen = {name: layer for name, layer in linear.items() if pattern.search(name)}
    if not chosen:
        names = list(linear)
        listed = ", ".join([*names[:4], *names[4:][-1:]]) or "none"  # the head comes last
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
    """A new adapter on one layer. A LoRALinear that was made with rank 0 needs only A and B: its own forward pass
    then adds (alpha / r) B A x. Any other layer gets two hooks, functions that torch calls before and after its
    forward pass: `cover_weight` and `add_to_output`."""
    training = layer.training
    layer.train()  # a LoRALinear with weights that are merged takes its W0 back
    n_out, n_in = adapter.sizes(layer)
    like = adapter.factory_kwargs(layer.weight)
    A = torch.empty(rank, n_in, **like)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as nn.Linear draws its weight
    layer.lora_A = nn.Parameter(A)
    layer.lora_B = nn.Parameter(torch.zeros(n_out, rank, **like))
    layer.lora_scaling = alpha / rank
    layer.lora_dropout = nn.Dropout(dropout)
    if not adapter.merges_itself(layer) and not hasattr(layer, "_lora_hooks"):  # load_adapter may only exchange A, B
        layer._merged = None
        layer._lora_hooks = (
            layer.register_forward_pre_hook(cover_weight),
            # After an error too (always_call), or the weight would stay covered.
            layer.register_forward_hook(add_to_output, with_kwargs=True, always_call=True),
        )
    layer.train(training)


def cover_weight(layer, args):
    """Before a forward pass without gradients, in evaluation: `layer.weight` reads as W0 + (alpha / r) B A, which is
    as fast as W0 alone. (torch.compile cannot follow a weight that is exchanged.)"""
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
    """After the layer's forward pass: out += (alpha / r) B A x, in place and in out's dtype, which is one pass over
    `out` less than by the plain formula. Or, where the weight is covered, its cover is taken off."""
    cover = layer.__dict__.pop("weight", None)  # W0 is in sight again
    if cover is not None or out is None:  # None after an error in the forward pass
        return
    x = next(iter((*args, *kwargs.values())))  # (..., in): the layer's one input, by place or by name
    A = layer.lora_A.to(out.dtype)
    B = layer.lora_B.to(out.dtype)
    z = F.linear(layer.lora_dropout(x).to(out.dtype), A).view(-1, A.size(0))  # (N, r)
    # A tensor of two dimensions stays as it is: where a view is written in place, autograd copies the gradient.
    flat = out if out.ndim == 2 else out.view(-1, out.size(-1))
    flat.addmm_(z * layer.lora_scaling, B.t())


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
    """Keeps the base's biases and whole modules of these names, which an adapter's file is about to replace, after
    what an earlier file has replaced is back. No parameter, no buffer, in no state dict."""
    put_back(model)
    state = model.state_dict()
    for name in names:
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).__dict__.setdefault("_put_aside", {})[leaf] = state[name].clone()


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
    tied = adapter.shared_parameters(model)
    for name in layers:
        modules = [n.removesuffix(".weight") for n in tied.get(f"{name}.weight", ())]
        if modules:
            raise ValueError(
                f"{' and '.join(modules)} share a weight: merging {name}'s adapter would change them all"
            )
    for layer in layers.values():
        merged = adapter.merged_weight(layer)
        drop_adapter(layer)
        layer.weight.data = merged
    for module in model.modules():
        module.__dict__.pop("_put_aside", None)  # an adapter's biases and modules are the model's own now
