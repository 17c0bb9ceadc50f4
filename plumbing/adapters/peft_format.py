"""Adapters from and to PEFT: its two files, adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from plumbing.adapters import layers as adapter
from plumbing.adapters.attach import add_adapter, check_layer, names_aside, put_aside
from plumbing.adapters.trainable import find_others, lora_state_dict
from plumbing.program.errors import compile_pattern
from plumbing.program.files import check_finite, read_tensors, write_weights

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


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


def save_adapter(model, directory, base_model="", bias="none", also=None, rslora=False, write=write_weights):
    """Writes the adapters of `model` as PEFT does: adapter_config.json and adapter_model.safetensors.

    base_model: the base's name or path, kept in the config for PEFT's users. bias and also: what was trained
    next to the adapters, as in `mark_only_lora_as_trainable`. rslora: the scale is written as alpha / sqrt(r), PEFT's
    use_rslora; else the same scale is written as another alpha / r. write: what writes the two files. Raises
    ValueError if the model has no adapter, if its layers differ in rank or alpha, or if something that belongs to the
    adapter would be lost.
    """
    layers = adapter.lora_layers(model)
    kinds = {adapter.kind_of(layer, rslora) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"an adapter needs layers of one rank, alpha and dropout; here are {sorted(kinds)}")
    rank, alpha, dropout = kinds.pop()
    state = lora_state_dict(model, bias, also)
    whole = _whole_modules(model, find_others(model, bias, also))
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and name not in state]
    is_marked = not any(layer.weight.requires_grad for layer in layers.values())
    if is_marked and left_out:
        print(f"note: {left_out[0]} trains, and the file is written without it; `also` names what belongs there")
    state |= {n: t for n, t in model.state_dict().items() if any(n.startswith(f"{m}.") for m in whole)}
    lost = sorted(names_aside(model) - state.keys())
    if lost:
        raise ValueError(f'the adapter on this model brought {lost[0]} along: type bias="all", or name it in `also`')
    tensors = {}
    turned = _turned_weights(model)
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in layers:
            leaf = "base_layer.bias"
        elif leaf in ("lora_A", "lora_B"):
            leaf += ".weight"
        elif name in turned:
            tensor = tensor.t()
        tensors[f"{PEFT_PREFIX}{module}.{leaf}"] = tensor.detach().cpu().contiguous()
    classifies = any(m.rpartition(".")[2] in ("score", "classifier") for m in whole)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "base_model_name_or_path": base_model,
        "revision": None,  # load_adapter looks for it
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _shortest_targets(model, layers),
        # Hugging Face's GPT-2 keeps these weights as (in, out)
        "fan_in_fan_out": all(adapter.merges_itself(m) or adapter.is_conv1d(m) for m in layers.values()),
        "bias": bias,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": whole or None,
    }
    write(directory, ADAPTER_WEIGHTS, tensors, scale_note(config), ADAPTER_CONFIG, config)


def _turned_weights(model):
    """Names of the weights that Hugging Face keeps as (in, out), and a LoRALinear as (out, in)."""
    return {f"{name}.weight" for name, layer in model.named_modules() if adapter.merges_itself(layer)}


def scale_note(config):
    """What an adapter's tensors mean only together with."""
    return f"r={config['r']} lora_alpha={float(config['lora_alpha'])} use_rslora={bool(config.get('use_rslora'))}"


# --- reading ---------------------------------------------------------------------------------------

KNOWN = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save")
KNOWN += ("rank_pattern", "alpha_pattern")
# The tensors' names say which layers have an adapter. These keys say how training began or was run.
KNOWN += ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
KNOWN += ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "megatron_core")
KNOWN += ("inference_mode", "runtime_config", "eva_config", "qalora_group_size", "init_lora_weights")
STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # these leave the base model as it is


def find_adapter(directory):
    """The directory of the adapter: this one, or the only one in it, where PEFT puts an adapter with a name."""
    if not os.path.isdir(directory) or os.path.exists(os.path.join(directory, ADAPTER_CONFIG)):
        return directory
    inside = sorted(str(path.parent) for path in Path(directory).glob(f"*/{ADAPTER_CONFIG}"))
    if len(inside) > 1:
        raise ValueError(f"{directory} holds several adapters: name one, such as {inside[0]}")
    return inside[0] if inside else directory


def read_adapter_config(directory):
    """PEFT's config of an adapter. Raises FileNotFoundError, or ValueError for one that is damaged or whose A and B
    mean something else than plain LoRA: every key that is not known here must be unset."""
    path = os.path.join(directory, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
        numbers = [config["r"], config["lora_alpha"]]
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern, number in (config.get(key) or {}).items():
                compile_pattern(key, pattern)
                numbers.append(number)
        if not isinstance(config["r"], int) or not all(map(math.isfinite, numbers)):
            raise ValueError("r and lora_alpha must be numbers")
        if not 0 <= config.get("lora_dropout", 0.0) < 1:
            raise ValueError(f"lora_dropout={config['lora_dropout']} is no share")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise ValueError(f"{path} is damaged or no config of a LoRA adapter: {e}") from e
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in STARTS:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base model's weights too. In PEFT, "
            "model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=...) makes plain LoRA of it"
        )
    for key, value in config.items():
        if value and key not in KNOWN:
            raise ValueError(
                f"{path}: {key}={value!r} is more than plain LoRA, and is not read here. In PEFT, "
                "model.merge_and_unload() gives a model with the adapter in its weights"
            )
    return config


def read_adapter(directory):
    """(config, tensors) of an adapter in PEFT's format, the names without PEFT's prefix.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing, damaged or not plain LoRA.
    """
    directory = find_adapter(directory)
    config = read_adapter_config(directory)
    path = os.path.join(directory, ADAPTER_WEIGHTS)
    pickle = os.path.join(directory, "adapter_model.bin")
    if os.path.exists(pickle) and not os.path.exists(path):
        raise ValueError(
            f"{pickle} is a pickle, which can run code and is not read; this makes {ADAPTER_WEIGHTS} of it: "
            f"python -c \"import torch; from safetensors.torch import save_file; save_file(torch.load('{pickle}', "
            f"weights_only=True), '{path}')\""
        )
    plain = {}
    for name, tensor in read_tensors(path, scale_note(config)):
        if re.search(r"\.(modules_to_save|original_module)\.", name):
            continue  # with bias="all" PEFT writes a saved module's biases two times more
        name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        check_finite(tensor, name, path)
        plain[re.sub(r"(lora_[AB])(\.default)?\.weight$", r"\1", name)] = tensor
    return config, plain


def rank_and_alpha(config, name):
    """Of the layer of this name, as PEFT reads rank_pattern and alpha_pattern. The scale is alpha / rank."""

    def look_up(key, default):
        patterns = config.get(key) or {}
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", name)), default)

    rank = look_up("rank_pattern", config["r"])
    alpha = look_up("alpha_pattern", config["lora_alpha"])
    return rank, adapter.layer_alpha(alpha, rank, bool(config.get("use_rslora")))


def load_adapter(model, directory):
    """Puts an adapter in PEFT's format on `model`: layers without one get it, of the file's rank and alpha;
    adapted layers that the file does not name go back to no change. Biases and `modules_to_save` come along, the
    base's own are put aside: another adapter begins from them, and detach_lora puts them back. Returns PEFT's config.

    Raises FileNotFoundError, or ValueError if the adapter was made for another model (then the model is as it was).
    """
    config, tensors = read_adapter(directory)
    if "revision" in config:  # PEFT has always written it; before we did, our files had these weights as (out, in)
        turned = _turned_weights(model)
        tensors = {name: t.t() if name in turned else t for name, t in tensors.items()}
    where = os.path.join(find_adapter(directory), ADAPTER_WEIGHTS)
    adapted = {name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))}
    _check_tensors(model, config, tensors, adapted, where)
    put_aside(model, (name for name in tensors if "lora_" not in name))
    modes = {}
    for name in sorted(adapted | adapter.lora_layers(model).keys()):
        layer = model.get_submodule(name)
        modes[layer] = layer.training
        layer.train()  # a merged layer takes its W0 back
        rank, alpha = rank_and_alpha(config, name)
        if "lora_A" not in layer._parameters or (len(layer.lora_A), layer.lora_scaling) != (rank, alpha / rank):
            add_adapter(layer, rank, alpha)
        nn.init.zeros_(layer.lora_B)  # no change, where the file does not name this layer
        dropout = config.get("lora_dropout", 0.0)
        is_number = isinstance(getattr(layer, "lora_dropout", None), (int, float))  # in a lora.py of one's own
        layer.lora_dropout = dropout if is_number else nn.Dropout(dropout)
    model.load_state_dict(tensors, strict=False)
    for layer, training in modes.items():
        layer.train(training)
    return config


def _check_tensors(model, config, tensors, adapted, where):
    """Raises ValueError unless each tensor has a place in the model, in its shape, each adapted layer A and B, and no
    tensor goes into two modules at once, such as a head of its own into a head that is the word embedding too."""
    saved = tuple(f".{name}." for name in config.get("modules_to_save") or ())
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2] == "bias" or any(part in f".{name}" for part in saved)
    }
    needed = {}
    modules = dict(model.named_modules())
    for name in adapted:
        layer = modules.get(name)
        if isinstance(layer, nn.Linear) or adapter.is_conv1d(layer):
            check_layer(layer, name, where)
            n_out, n_in = adapter.sizes(layer)
            rank, _ = rank_and_alpha(config, name)
            needed |= {f"{name}.lora_A": (rank, n_in), f"{name}.lora_B": (n_out, rank)}
    shapes |= needed
    for name in sorted(tensors.keys() | needed.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        here = shapes.get(name, "nothing")
        if found != here:
            raise ValueError(f"{where} was cut, or made for another model: {name} is {found}, expected {here}")
    if not adapted:
        raise ValueError(f"{where} is not whole: any lora_A is missing")
    tied = adapter.shared_parameters(model)
    for name in (name for name in tensors if "lora_" not in name):
        for other in tied.get(name, ()):
            if other not in tensors or not torch.equal(tensors[other], tensors[name]):
                raise ValueError(
                    f"{where}: {name} is one tensor with {other} in this model, and would change both; untie them "
                    "first, or train the adapter without it in modules_to_save"
                )
