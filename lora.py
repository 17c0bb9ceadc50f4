"""Low-rank adaptation of linear layers, for any torch model.

    h = W0 x + b + (alpha / r) B A x        A: (r, in), B: (out, r)

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. 2021, section 4.1
(https://arxiv.org/abs/2106.09685). W0 is frozen; A starts random and B at zero, so the
adapted model starts as the base model, bit for bit.
"""

import contextlib
import hashlib
import json
import math
import os
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file names
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Linear):
    """`nn.Linear` that can carry a low-rank adapter: (..., in_features) -> (..., out_features).

    In training mode the adapter is computed beside the frozen weight (section 4.1). In eval mode it
    is merged: forward uses W0 + (alpha / r) B A, kept in a second tensor, so inference costs what the
    base model costs. W0 is never written, so no number of train/eval cycles can change it.

    lora_A is (lora_rank, in_features), lora_B is (out_features, lora_rank), both float32 (float64 for a
    float64 layer) whatever W0 is stored in; lora_scaling is lora_alpha / lora_rank; lora_dropout acts on
    the adapter's input. With lora_rank=0 it is a plain `nn.Linear`.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        lora_rank=0,
        lora_alpha=0.0,
        lora_dropout=0.0,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._merged = None  # W0 + scaling B A in eval mode: no parameter, no buffer, in no state dict
        if lora_rank:
            self.add_lora(lora_rank, lora_alpha, lora_dropout)

    def add_lora(self, rank, alpha, dropout=0.0):
        """Gives the layer a fresh adapter of this rank. Raises ValueError for a rank that cannot be."""
        add_adapter(self, rank, alpha, dropout)
        self.train(self.training)

    def is_lora(self):
        """Whether the layer carries an adapter."""
        return "lora_A" in self._parameters

    @property
    def has_weights_merged(self):
        return self._merged is not None

    def reset_parameters(self):
        super().reset_parameters()
        if self.is_lora():
            self.reset_lora_parameters()
            self.train(self.training)  # a merge of the old weights would be stale

    def reset_lora_parameters(self):
        reset_adapter(self)

    def forward(self, x):  # (..., in) -> (..., out)
        if self._merged is None and self.is_lora() and x.is_cpu and x.ndim == 2 and not self._needs_autograd():
            return BesideFrozen.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_scaling)
        weight = self.weight if self._merged is None else self._merged
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, weight.to(x.dtype), bias)
        if self._merged is None and self.is_lora():
            out = add_low_rank(out, x, self)
        return out

    def _needs_autograd(self):
        """Whether more trains, or happens, than `BesideFrozen` knows of (which is for CPUs: measured there alone)."""
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return trains or (self.training and self.lora_dropout.p > 0) or torch.compiler.is_compiling()

    def train(self, mode=True):
        super().train(mode)
        self._merged = None if mode or not self.is_lora() else merged_weight(self)
        return self

    def _apply(self, fn, recurse=True):
        # model.half(), .bfloat16(), .to(...) reach every parameter through here.
        kept = {n: p.detach() for n, p in self._parameters.items() if n.startswith("lora_")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            param = self._parameters[name]
            if param.dtype in (torch.float16, torch.bfloat16) and before.dtype != param.dtype:
                param.data = before.to(param.device)
        return self.train(self.training)  # the merged copy follows

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.train(self.training)  # a merge of the old weights would be stale

    def extra_repr(self):
        lora = f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}" if self.is_lora() else ""
        return super().extra_repr() + lora


# --- one layer's adapter -------------------------------------------------------------------------


def is_conv1d(layer):
    """Hugging Face's Conv1D: a linear layer that keeps its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def sizes(layer):
    """(out, in) of a linear layer."""
    return tuple(layer.weight.shape[::-1] if is_conv1d(layer) else layer.weight.shape)


def add_adapter(layer, rank, alpha, dropout=0.0):
    """Registers a fresh lora_A and lora_B on a linear layer. Raises ValueError for a rank that cannot be."""
    n_out, n_in = sizes(layer)
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
            f"rank={rank} does not fit a layer of {n_in} x {n_out}: type a rank from 1 to {min(n_in, n_out)}"
        )
    layer.lora_rank, layer.lora_alpha = rank, alpha
    layer.lora_scaling = alpha / rank
    layer.lora_dropout = nn.Dropout(dropout).train(layer.training)
    like = {"device": layer.weight.device, "dtype": torch.promote_types(layer.weight.dtype, torch.float32)}
    layer.lora_A = nn.Parameter(torch.empty(rank, n_in, **like))
    layer.lora_B = nn.Parameter(torch.empty(n_out, rank, **like))
    reset_adapter(layer)


def reset_adapter(layer):
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as nn.Linear's own weight
    nn.init.zeros_(layer.lora_B)  # so the adapter starts as no change at all (section 4.1)


def drop_adapter(layer):
    """Takes the adapter off a layer; its own weight was never touched."""
    for handle in layer.__dict__.pop("_lora_hooks", ()):
        handle.remove()
    for name in ("lora_A", "lora_B", "lora_dropout", "lora_rank", "lora_alpha", "lora_scaling"):
        delattr(layer, name)
    layer._merged = None


def add_low_rank(out, x, layer):  # (..., out), (..., in) -> (..., out)
    """out += scaling * B A x, in place and in out's dtype: the whole of LoRA's arithmetic."""
    A, B = layer.lora_A.to(out.dtype), layer.lora_B.to(out.dtype)
    z = F.linear(layer.lora_dropout(x).to(out.dtype), A).view(-1, A.size(0))  # (N, r)
    # Two dimensions as they are: where a view is written in place, autograd copies the gradient.
    flat = out if out.ndim == 2 else out.view(-1, out.size(-1))
    flat.addmm_(z * layer.lora_scaling, B.t())
    return out


class BesideFrozen(torch.autograd.Function):
    """x W0^T + b + scaling (x A^T) B^T for W0 and b that do not train: (N, in) -> (N, out). What autograd makes of
    the same lines also keeps A and B in x's dtype and x A^T scaled, and adds up two gradients of x in another pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        weight = weight.to(x.dtype)
        z = F.linear(x, A.to(x.dtype))  # (N, r)
        ctx.save_for_backward(x, z, weight, A, B)
        ctx.scaling = scaling
        out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return out.addmm_(z, B.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, weight, A, B = ctx.saved_tensors
        dz = (dy @ B.to(dy.dtype)).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(dz, A.to(dy.dtype)) if ctx.needs_input_grad[0] else None
        return dx, None, None, (dz.t() @ x).to(A.dtype), (dy.t() @ (z * ctx.scaling)).to(B.dtype), None


@torch.no_grad()
def merged_weight(layer):
    """W0 + (alpha / r) B A in W0's shape and dtype, rounded once."""
    delta = layer.lora_scaling * (layer.lora_B @ layer.lora_A)
    return (layer.weight + (delta.t() if is_conv1d(layer) else delta)).to(layer.weight.dtype)


# --- any model's layers, by hooks ----------------------------------------------------------------


def attach_lora(model, targets, rank, alpha, dropout=0.0, rslora=False):
    """Puts an adapter on every `nn.Linear` and Hugging Face `Conv1D` of `model` whose qualified name the regular
    expression `targets` finds (`re.search`). Returns the names of the adapted layers; nothing is frozen here.

    Forward hooks add B A x to the layer's output. In eval mode without gradients the layer computes with its
    merged weight instead; its own is never written. rslora: scales by alpha / sqrt(rank) ("A Rank Stabilization
    Scaling Factor for Fine-Tuning with LoRA", Kalajdzievski 2023), kept as the alpha of the usual scale.

    Raises ValueError, before anything is changed, if nothing matches or a matching layer cannot be adapted.
    """
    if any(hasattr(m, "_orig_mod") for m in model.modules()):
        raise ValueError("the model is compiled already: attach_lora first, then torch.compile")
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    try:
        hit = {name: layer for name, layer in linear.items() if re.search(targets, name)}
    except re.error as e:
        raise ValueError(f"targets={targets}: no regular expression ({e})") from e
    if not hit:
        some = ", ".join(list(linear)[:4] + list(linear)[-1:]) or "none"
        raise ValueError(f"targets={targets}: matches no linear layer's name; there are {len(linear)}: {some}")
    for name, layer in hit.items():
        if "lora_A" in layer._parameters:
            raise ValueError(f"targets={targets}: {name} has an adapter already; detach_lora takes it off")
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(f"targets={targets}: nn.MultiheadAttention reads {name}.weight itself, past any hook")
        if not layer.weight.is_floating_point():
            raise ValueError(f"targets={targets}: {name} is stored in {layer.weight.dtype}, not in floating point")
        if not 1 <= rank <= min(sizes(layer)):
            raise ValueError(f"rank={rank} does not fit {name}, {sizes(layer)[1]} x {sizes(layer)[0]}")
    for layer in hit.values():
        _adapt(layer, rank, alpha * math.sqrt(rank) if rslora else alpha, dropout)
    return list(hit)


def _adapt(layer, rank, alpha, dropout):
    """A fresh adapter on a layer of any kind."""
    if isinstance(layer, LoRALinear):
        return layer.add_lora(rank, alpha, dropout)
    add_adapter(layer, rank, alpha, dropout)
    layer._merged = None
    if not hasattr(layer, "_lora_hooks"):
        layer._lora_hooks = (
            layer.register_forward_pre_hook(_cover_weight),
            layer.register_forward_hook(_add_to_output, with_kwargs=True, always_call=True),
        )


def _cover_weight(layer, args):
    """Before a forward pass that only evaluates: `layer.weight` reads as the merged weight."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        layer._merged = None
        return
    state = [(t.data_ptr(), t._version, t.dtype) for t in (layer.weight, layer.lora_A, layer.lora_B)]
    if layer._merged is None or layer._merged[0] != state:  # written since
        layer._merged = state, merged_weight(layer)
    layer.__dict__["weight"] = layer._merged[1]  # found before the parameter of that name, which stays


def _add_to_output(layer, args, kwargs, out):
    """After it: the parameter is uncovered, or B A x added."""
    if layer.__dict__.pop("weight", None) is None and out is not None:  # None: the pass raised an error
        return add_low_rank(out, next(iter((*args, *kwargs.values()))), layer)


def detach_lora(model):
    """Takes every adapter off: the model computes what it did before, bit for bit."""
    for layer in lora_layers(model).values():
        drop_adapter(layer)


def merge_lora(model):
    """Folds every adapter into its layer's weight, once and for all, and takes it off. Raises ValueError, before
    anything is changed, for a weight that another layer shares."""
    layers, seen = lora_layers(model), {}
    for module_name, module in model.named_modules():
        for param in module._parameters.values():
            seen.setdefault(id(param), []).append(module_name)
    for name, layer in layers.items():
        if len(sharing := seen[id(layer.weight)]) > 1:
            raise ValueError(
                f"{' and '.join(sharing)} share a weight: merging {name}'s adapter would change them all"
            )
    for layer in layers.values():
        layer.weight.data = merged_weight(layer)
        drop_adapter(layer)


# --- which parameters train ----------------------------------------------------------------------


def lora_layers(model):
    """{qualified name: layer} of the layers that carry an adapter, in the model's order."""
    return {n: m for n, m in model.named_modules() if "lora_A" in m._parameters}


def _belongs(model, bias, also):
    """Whether a parameter's name is an adapter's, that of a bias that `bias` names, or one that `also` finds."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias={bias!r}: type "none", "all" or "lora_only"')
    adapted = {f"{name}.bias" for name in lora_layers(model)}

    def belongs(name):
        is_bias = name.rpartition(".")[2] == "bias"
        if "lora_" in name or (bias == "all" and is_bias) or (bias == "lora_only" and name in adapted):
            return True
        return bool(also and re.search(also, name))

    return belongs


def mark_only_lora_as_trainable(model, bias="none", also=None):
    """Freezes all but the adapters. bias: "none", "all" (every bias is trained) or "lora_only" (those
    of the adapted layers), as in loralib and PEFT. also: a regular expression; parameters whose names it finds
    are trained too, such as "score|classifier". Raises ValueError for another word, or if `also` finds nothing."""
    belongs, names = _belongs(model, bias, also), [name for name, _ in model.named_parameters()]
    try:
        if also and not any(re.search(also, name) for name in names):
            some = ", ".join([*names[:2], *names[-2:]])
            raise ValueError(f"trainable={also}: matches no parameter's name, such as {some}")
    except re.error as e:
        raise ValueError(f"trainable={also}: no regular expression ({e})") from e
    for name, param in model.named_parameters():
        param.requires_grad = belongs(name)


def lora_state_dict(model, bias="none", also=None):
    """The adapters' tensors by their names in `model.state_dict()`, with those that `bias` and `also` name."""
    belongs, same = _belongs(model, bias, also), dict(model.named_parameters())  # a shared module has one name here
    return {name: tensor for name, tensor in model.state_dict().items() if name in same and belongs(name)}


def parameter_report(model):
    """How much is trained, in the words of PEFT's `print_trainable_parameters`."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to, beside `path`; flushed to the disk and renamed at the end. So `path` is
    always whole: the old one until then, the new one after."""
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise


def write_tensors(path, tensors, note):
    """A safetensors file; in its metadata, which other readers pass over, its tensors' SHA-256 and a note: what the
    config file beside it must say."""
    check = hashlib.sha256()
    for name in sorted(tensors):
        add_to_check(check, name, tensors[name])
    data = memoryview(save(tensors, metadata={"format": "pt", "sha256": check.hexdigest(), "config": note}))
    n = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(bytes(data[8:n])), sort_keys=True).encode()  # else in an order by chance
    header += b" " * (-len(header) % 8)
    with whole_file(path) as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.write(data[n:])


def read_tensors(path, note):
    """(name, tensor) pairs of a safetensors file. Raises ValueError, naming the file, if it is damaged, or if its own
    note differs; that its bytes are not those that were written shows at the end."""
    check = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as f:
            names, metadata = sorted(f.keys()), f.metadata() or {}
        expected = metadata.get("sha256")
        if metadata.get("config", note) != note:
            raise ValueError(f"{path} was written with {metadata['config']}, the config beside it says {note}")
        for name in names:
            with safe_open(path, framework="pt") as f:  # anew: the mapped pages of those already copied are freed
                tensor = f.get_tensor(name)
            if expected:
                add_to_check(check, name, tensor)
            yield name, tensor
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or cut short: {e}") from e
    if expected and check.hexdigest() != expected:
        raise ValueError(f"{path} is damaged: its tensors are not those that were written (SHA-256 differs)")


def add_to_check(check, name, tensor):
    check.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    check.update(tensor.reshape(-1).view(torch.uint8).numpy())


def write_json(path, value):
    with whole_file(path) as f:
        f.write((json.dumps(value, indent=2) + "\n").encode())


def _shortest_targets(model, adapted):
    """The shortest name endings that name exactly the adapted layers: PEFT's `target_modules`."""
    names = [name for name, _ in model.named_modules()]
    targets = set()
    for name in adapted:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            ending = ".".join(parts[-n:])
            hits = {other for other in names if other == ending or other.endswith("." + ending)}
            if hits <= adapted.keys():
                break
        targets.add(ending)
    return sorted(targets)


def _whole_modules(model, names):
    """The outermost modules that hold these parameters and no other: PEFT's `modules_to_save`."""
    every, found = [name for name, _ in model.named_parameters()], set()
    for name in names:
        parts = name.split(".")[:-1]
        while len(parts) > 1 and all(n in names for n in every if n.startswith(".".join(parts[:-1]) + ".")):
            parts.pop()
        found.add(".".join(parts))
    return sorted(found)


def save_adapter(model, directory, base_model="", bias="none", also=None):
    """Writes the adapters of `model` as PEFT does: adapter_config.json and adapter_model.safetensors.

    base_model: the base's name or path, kept in the config for PEFT's users. bias and also: what was trained
    beside the adapters, as told to `mark_only_lora_as_trainable`. Raises ValueError if the model has no adapter
    or its layers differ in rank or alpha.
    """
    layers = lora_layers(model)
    kinds = {(m.lora_rank, m.lora_alpha, m.lora_dropout.p) for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"an adapter needs layers of one rank, alpha and dropout; here are {sorted(kinds)}")
    rank, alpha, dropout = kinds.pop()
    state = lora_state_dict(model, bias, also)
    plain = lora_state_dict(model, bias)
    whole = _whole_modules(model, state.keys() - plain.keys())
    state |= {n: t for n, t in model.state_dict().items() if any(n.startswith(f"{m}.") for m in whole)}
    tensors = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in layers:
            leaf = "base_layer.bias"
        elif leaf in ("lora_A", "lora_B"):
            leaf += ".weight"
        tensors[f"{PEFT_PREFIX}{module}.{leaf}"] = tensor.detach().cpu().contiguous()
    classifies = any(m.rpartition(".")[2] in ("score", "classifier") for m in whole)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _shortest_targets(model, layers),
        # Hugging Face's GPT-2 keeps these weights as (in, out)
        "fan_in_fan_out": all(isinstance(m, LoRALinear) or is_conv1d(m) for m in layers.values()),
        "bias": bias,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": whole or None,
    }
    os.makedirs(directory, exist_ok=True)
    write_tensors(os.path.join(directory, ADAPTER_WEIGHTS), tensors, scale_note(config))
    write_json(os.path.join(directory, ADAPTER_CONFIG), config)


def scale_note(config):
    """What an adapter's tensors mean only together with."""
    return f"r={config['r']} lora_alpha={float(config['lora_alpha'])} use_rslora={bool(config.get('use_rslora'))}"


def read_adapter(directory):
    """(config, tensors) of an adapter in PEFT's format, the names without PEFT's prefix.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing, damaged or not LoRA.
    """
    path = os.path.join(directory, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        if not (isinstance(config["r"], int) and isinstance(config["lora_alpha"], (int, float))):
            raise ValueError("r and lora_alpha must be numbers")
        if not 0 <= config.get("lora_dropout", 0.0) < 1:
            raise ValueError(f"lora_dropout={config['lora_dropout']} is no share")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged or no adapter config: {e}") from e
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is set, which is not read here")
    plain, path = {}, os.path.join(directory, ADAPTER_WEIGHTS)
    for name, tensor in dict(read_tensors(path, scale_note(config))).items():
        if re.search(r"\.(modules_to_save|original_module)\.", name):
            continue  # with bias="all" PEFT writes a saved module's biases two times more
        name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        plain[re.sub(r"(lora_[AB])(\.default)?\.weight$", r"\1", name)] = tensor
    return config, plain


def load_adapter(model, directory):
    """Puts an adapter in PEFT's format on `model`: layers without one get it, of the file's rank and alpha;
    adapted layers that the file does not name go back to no change. Biases and `modules_to_save` come along.
    Returns PEFT's config.

    Raises FileNotFoundError, or ValueError if the adapter was made for another model (then the model is
    as it was).
    """
    config, tensors = read_adapter(directory)
    where = os.path.join(directory, ADAPTER_WEIGHTS)
    state, modules = model.state_dict(), dict(model.named_modules())
    whole = tuple(f".{name}." for name in config.get("modules_to_save") or ())
    adapted = {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_A")}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        layer = modules.get(module)
        if leaf in ("lora_A", "lora_B") and (isinstance(layer, nn.Linear) or is_conv1d(layer)):
            n_out, n_in = sizes(layer)
            expected = (config["r"], n_in) if leaf == "lora_A" else (n_out, config["r"])
        elif name in state and (leaf == "bias" or any(m in f".{name}" for m in whole)):
            expected = tuple(state[name].shape)
        else:
            raise ValueError(f"{where} was made for another model: {name} has no place in this one")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{where} was made for another model: {name} is {tuple(tensor.shape)}, here {expected}")
    missing = [
        f"{m}.{leaf}" for m in sorted(adapted) for leaf in ("lora_A", "lora_B") if f"{m}.{leaf}" not in tensors
    ]
    if missing or not adapted:
        raise ValueError(f"{where} is not whole: {missing[0] if missing else 'any lora_A'} is missing")
    # alpha / sqrt(r), the rank-stabilised scale, is alpha sqrt(r) / r
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    for name in adapted | lora_layers(model).keys():
        _adapt(modules[name], config["r"], alpha, config.get("lora_dropout", 0.0))
    model.load_state_dict(tensors, strict=False)
    return config
