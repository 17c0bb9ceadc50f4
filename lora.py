"""Low-rank adaptation of linear layers, for any torch model.

    h = W0 x + b + (alpha / r) B A x        A: (r, in), B: (out, r)

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. 2021, section 4.1
(https://arxiv.org/abs/2106.09685). W0 is frozen; A starts random and B at zero, so the
adapted model starts as the base model, bit for bit.
"""

import contextlib
import json
import math
import os
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
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
        limit = min(self.in_features, self.out_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank={rank} does not fit a layer of {self.in_features} x {self.out_features}: "
                f"type a rank from 1 to {limit}"
            )
        self.lora_rank, self.lora_alpha = rank, alpha
        self.lora_scaling = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        like = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.reset_lora_parameters()
        self.train(self.training)

    def is_lora(self):
        """Whether the layer carries an adapter."""
        return hasattr(self, "lora_A")

    @property
    def has_weights_merged(self):
        return self._merged is not None

    def reset_parameters(self):
        super().reset_parameters()
        if self.is_lora():
            self.reset_lora_parameters()
            self.train(self.training)  # a merge of the old weights would be stale

    def reset_lora_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear's own weight
        nn.init.zeros_(self.lora_B)  # so the adapter starts as no change at all (section 4.1)

    def forward(self, x):  # (..., in) -> (..., out)
        weight = self.weight if self._merged is None else self._merged
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, weight.to(x.dtype), bias)
        if self._merged is None and self.is_lora():
            add_low_rank(out, self.lora_dropout(x), self.lora_A, self.lora_B, self.lora_scaling)
        return out

    def train(self, mode=True):
        super().train(mode)
        self._merged = None if mode or not self.is_lora() else self.merged_weight()
        return self

    @torch.no_grad()
    def merged_weight(self):
        """W0 + (alpha / r) B A in W0's dtype, rounded once: (out_features, in_features)."""
        delta = self.lora_scaling * (self.lora_B @ self.lora_A)
        return (self.weight + delta).to(self.weight.dtype)

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


def add_low_rank(out, x, lora_A, lora_B, scaling):  # (..., out), (..., in) -> (..., out)
    """out += scaling * B A x, in place and in x's dtype: the whole of LoRA's arithmetic."""
    z = F.linear(x, lora_A.to(x.dtype)).view(-1, lora_A.size(0))  # (N, r)
    out.view(-1, out.size(-1)).addmm_(z, lora_B.to(x.dtype).t(), alpha=scaling)
    return out


def lora_layers(model):
    """{qualified name: layer} of the layers that carry an adapter, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear) and m.is_lora()}


def _belongs(model, bias):
    """Whether a parameter's name is the adapters', or that of a bias that `bias` names."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias={bias!r}: type "none", "all" or "lora_only"')
    adapted = {f"{name}.bias" for name in lora_layers(model)}

    def belongs(name):
        is_bias = name.rpartition(".")[2] == "bias"
        return "lora_" in name or (bias == "all" and is_bias) or (bias == "lora_only" and name in adapted)

    return belongs


def mark_only_lora_as_trainable(model, bias="none"):
    """Freezes all but the adapters. bias: "none", "all" (every bias is trained) or "lora_only" (those
    of the adapted layers), as in loralib and PEFT. Raises ValueError for another word."""
    belongs = _belongs(model, bias)
    for name, param in model.named_parameters():
        param.requires_grad = belongs(name)


def lora_state_dict(model, bias="none"):
    """The adapters' tensors by their names in `model.state_dict()`, with the biases that `bias` names."""
    belongs = _belongs(model, bias)
    return {name: tensor for name, tensor in model.state_dict().items() if belongs(name)}


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


def save_adapter(model, directory, base_model="", bias="none"):
    """Writes the adapters of `model` as PEFT does: adapter_config.json and adapter_model.safetensors.

    base_model: the base's name or path, kept in the config for PEFT's users. Raises ValueError if the
    model has no adapter or its layers differ in rank or alpha.
    """
    layers = lora_layers(model)
    kinds = {(m.lora_rank, m.lora_alpha, m.lora_dropout.p) for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"an adapter needs layers of one rank, alpha and dropout; here are {sorted(kinds)}")
    rank, alpha, dropout = kinds.pop()
    tensors = {}
    for name, tensor in lora_state_dict(model, bias).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in layers:
            leaf = "base_layer.bias"
        elif leaf in ("lora_A", "lora_B"):
            leaf += ".weight"
        tensors[f"{PEFT_PREFIX}{module}.{leaf}"] = tensor.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _shortest_targets(model, layers),
        "fan_in_fan_out": True,  # Hugging Face's GPT-2 keeps these weights as (in, out)
        "bias": bias,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    os.makedirs(directory, exist_ok=True)
    with whole_file(os.path.join(directory, ADAPTER_WEIGHTS)) as f:
        f.write(save(tensors, metadata={"format": "pt"}))
    write_json(os.path.join(directory, ADAPTER_CONFIG), config)


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
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged or no adapter config: {e}") from e
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if config.get(key):
            raise ValueError(f"{path}: {key} is set, which is not read here")
    path = os.path.join(directory, ADAPTER_WEIGHTS)
    try:
        tensors = load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    plain = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        plain[re.sub(r"(lora_[AB])(\.default)?\.weight$", r"\1", name)] = tensor
    return config, plain


def load_adapter(model, directory):
    """Puts an adapter in PEFT's format on `model`: layers without one get it, of the file's rank and
    alpha; adapted layers that the file does not name go back to no change. Returns PEFT's config.

    Raises FileNotFoundError, or ValueError if the adapter was made for another model (then the model is
    as it was).
    """
    config, tensors = read_adapter(directory)
    where = os.path.join(directory, ADAPTER_WEIGHTS)
    state, modules = model.state_dict(), dict(model.named_modules())
    adapted = {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_A")}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        layer = modules.get(module)
        if leaf in ("lora_A", "lora_B") and isinstance(layer, LoRALinear):
            expected = (config["r"], layer.in_features) if leaf == "lora_A" else (layer.out_features, config["r"])
        elif name in state and leaf == "bias":
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
        modules[name].add_lora(config["r"], alpha, config.get("lora_dropout", 0.0))
    model.load_state_dict(tensors, strict=False)
    return config
