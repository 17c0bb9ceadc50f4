"""Adapters from and to PEFT: its two files, adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
import re

import torch
from torch import nn

from plumbing.adapters.attach import add_adapter, check_layer, names_aside, put_aside, put_back
from plumbing.adapters.layers import (
    alpha_of,
    dropout_of,
    is_conv1d,
    layer_alpha,
    lora_layers,
    merges_itself,
    shared_parameters,
    sizes,
)
from plumbing.adapters.trainable import check_names, lora_state_dict
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
    layers = lora_layers(model)
    kinds = {(layer.lora_A.size(0), alpha_of(layer, rslora), dropout_of(layer)) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"an adapter needs layers of one rank, alpha and dropout; here are {sorted(kinds)}")
    rank, alpha, dropout = kinds.pop()
    state = lora_state_dict(model, bias, also)
    others = state.keys() - lora_state_dict(model, bias).keys()
    check_names(model, others, also)
    whole = _whole_modules(model, others)
    state |= {n: t for n, t in model.state_dict().items() if any(n.startswith(f"{m}.") for m in whole)}
    lost = sorted(names_aside(model) - state.keys())
    if lost:
        raise ValueError(f'the adapter on this model brought {lost[0]} along: type bias="all", or name it in `also`')
    tensors = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in layers:
            leaf = "base_layer.bias"
        elif leaf in ("lora_A", "lora_B"):
            leaf += ".weight"
        elif _is_turned(model, name):
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
        "fan_in_fan_out": all(merges_itself(m) or is_conv1d(m) for m in layers.values()),
        "bias": bias,
        "use_rslora": rslora,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": whole or None,
    }
    write(directory, ADAPTER_WEIGHTS, tensors, scale_note(config), ADAPTER_CONFIG, config)


def _is_turned(model, name):
    """Whether Hugging Face keeps this weight as (in, out), and our layer, ours or one of your own, as (out, in)."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and merges_itself(dict(model.named_modules()).get(module))


def scale_note(config):
    """What an adapter's tensors mean only together with."""
    return f"r={config['r']} lora_alpha={float(config['lora_alpha'])} use_rslora={bool(config.get('use_rslora'))}"


# --- reading ---------------------------------------------------------------------------------------

READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save")
READ += ("rank_pattern", "alpha_pattern")
# The tensors' names say which layers have an adapter. These keys say how training began or was run.
NOT_NEEDED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
NOT_NEEDED += ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "megatron_core")
NOT_NEEDED += ("inference_mode", "runtime_config", "eva_config", "qalora_group_size", "init_lora_weights")
STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # these leave the base model as it is


def find_adapter(directory):
    """The directory of the adapter: this one, or the only one in it, where PEFT puts an adapter with a name."""
    if os.path.exists(os.path.join(directory, ADAPTER_CONFIG)) or not os.path.isdir(directory):
        return directory
    inside = [
        entry.path for entry in os.scandir(directory) if os.path.exists(os.path.join(entry.path, ADAPTER_CONFIG))
    ]
    if len(inside) > 1:
        raise ValueError(f"{directory} holds several adapters: name one, such as {min(inside)}")
    return inside[0] if inside else directory


def read_adapter_config(directory):
    """PEFT's config of an adapter. Raises FileNotFoundError, or ValueError for one that is damaged or whose A and B
    mean something else than plain LoRA: every key that is not known here must be unset."""
    path = os.path.join(directory, ADAPTER_CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        patterns = [*(config.get("rank_pattern") or {}).values(), *(config.get("alpha_pattern") or {}).values()]
        numbers = [config["r"], config["lora_alpha"], *patterns]
        if not isinstance(config["r"], int) or not all(map(math.isfinite, numbers)):
            raise ValueError("r and lora_alpha must be numbers")
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in config.get(key) or ():
                compile_pattern(key, pattern)
        if not 0 <= config.get("lora_dropout", 0.0) < 1:
            raise ValueError(f"lora_dropout={config['lora_dropout']} is no share")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise ValueError(f"{path} is damaged or no adapter config: {e}") from e
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    start = config.get("init_lora_weights", True)
    if str(start).lower() not in STARTS:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base model's weights too. In PEFT, "
            "model.save_pretrained(DIRECTORY, path_initial_model_for_weight_conversion=...) makes plain LoRA of it"
        )
    for key, value in config.items():
        if key not in READ + NOT_NEEDED and value:
            raise ValueError(
                f"{path}: {key}={value!r} is not read here, it is more than plain LoRA. In PEFT, "
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

    def look_up(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default

    rank = look_up(config.get("rank_pattern"), config["r"])
    alpha = look_up(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, layer_alpha(alpha, rank, bool(config.get("use_rslora")))


def load_adapter(model, directory):
    """Puts an adapter in PEFT's format on `model`: layers without one get it, of the file's rank and alpha;
    adapted layers that the file does not name go back to no change. Biases and `modules_to_save` come along, the
    base's own are put aside: another adapter begins from them, and detach_lora puts them back. Returns PEFT's config.

    Raises FileNotFoundError, or ValueError if the adapter was made for another model (then the model is as it was).
    """
    config, tensors = read_adapter(directory)
    if "revision" in config:  # PEFT has always written it; before we did, our files had these weights as (out, in)
        tensors = {name: t.t() if _is_turned(model, name) else t for name, t in tensors.items()}
    where = os.path.join(find_adapter(directory), ADAPTER_WEIGHTS)
    modules = dict(model.named_modules())
    adapted = {name.rpartition(".")[0] for name in tensors if name.endswith(".lora_A")}
    shapes = _expected_shapes(model, config, tensors)
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{where} was made for another model: {name} has no place in this one")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{where} was made for another model: {name} is {tuple(tensor.shape)}, here {shapes[name]}"
            )
    needed = [f"{module}.{leaf}" for module in sorted(adapted) for leaf in ("lora_A", "lora_B")]
    missing = [name for name in needed if name not in tensors]
    if missing or not adapted:
        raise ValueError(f"{where} is not whole: {missing[0] if missing else 'any lora_A'} is missing")
    for name in adapted:
        check_layer(modules[name], name, where)
    _check_shared(model, tensors, where)
    put_back(model)  # what an earlier adapter's file has replaced
    put_aside(model, (name for name in tensors if "lora_" not in name))
    for name in adapted | lora_layers(model).keys():
        _fit_adapter(modules[name], *rank_and_alpha(config, name), config.get("lora_dropout", 0.0))
    model.load_state_dict(tensors, strict=False)
    return config


def _expected_shapes(model, config, names):
    """{name: shape} of those of the names that have a place in the model."""
    modules = dict(model.named_modules())
    state = model.state_dict()
    saved = tuple(f".{name}." for name in config.get("modules_to_save") or ())
    shapes = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        layer = modules.get(module)
        if leaf in ("lora_A", "lora_B") and (isinstance(layer, nn.Linear) or is_conv1d(layer)):
            n_out, n_in = sizes(layer)
            rank, _ = rank_and_alpha(config, module)
            shapes[name] = (rank, n_in) if leaf == "lora_A" else (n_out, rank)
        elif name in state and (leaf == "bias" or any(part in f".{name}" for part in saved)):
            shapes[name] = tuple(state[name].shape)
    return shapes


def _check_shared(model, tensors, where):
    """Raises ValueError for a tensor that would go into two modules at once, such as a head of its own into a head
    that is the word embedding too."""
    for names in shared_parameters(model):
        given = [name for name in names if name in tensors]
        same = all(torch.equal(tensors[name], tensors[given[0]]) for name in given)
        if given and "lora_" not in given[0] and (len(given) < len(names) or not same):
            raise ValueError(
                f"{where}: {given[0]} is one tensor with {next(n for n in names if n != given[0])} in this model, "
                "and would change both; untie them first, or train the adapter without it in modules_to_save"
            )


def _fit_adapter(layer, rank, alpha, dropout):
    """An adapter of this kind on the layer: the one that is there, or a new one."""
    lora_A = getattr(layer, "lora_A", None)
    if lora_A is not None and lora_A.size(0) == rank and layer.lora_scaling == alpha / rank:
        nn.init.zeros_(layer.lora_B)  # no change, where the file does not name this layer
        layer.lora_dropout = nn.Dropout(dropout).train(layer.training)
        return
    add_adapter(layer, rank, alpha, dropout)
