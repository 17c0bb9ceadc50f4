"""A GPT-2 model's files: where they lie (a name, a directory, the hub); Hugging Face's layout read and written."""

import json
import os
import re

import torch

from plumbing.program.files import check_finite, find_asset, find_copy, read_tensors, write_weights
from plumbing.program.hub import fetch_model

# What a user types: the repository on the hub.
HUB_MODELS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
SIZES = {"block_size": "n_positions"} | {key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
COMPUTED = {  # key of config.json: the values that mean what is computed here, the default first
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
CONV1D = re.compile(r"(attn\.c_attn|c_proj|mlp\.c_fc)\.weight$")  # stored by Hugging Face as (in, out)
MASK = re.compile(r"\.attn\.(masked_)?bias$")
HEADS = ("lm_head.weight", "score.weight")  # the vocabulary's, a classifier's


def find_model(name):
    """(config.json, [safetensors files]) of a model's name or directory; from the hub's cache if it is there."""
    name = find_copy(name)
    if name in HUB_MODELS:
        # transformers fills the cache under the short name, if that was typed there.
        directory = fetch_model(f"init_from={name}", (HUB_MODELS[name], name), ["config.json", "model.safetensors"])
    elif name == "gpt2-mini":
        directory = find_asset("gpt2-mini")
    elif os.path.isdir(name):
        directory = name
    else:
        known = ", ".join([*HUB_MODELS, "gpt2-mini"])
        raise FileNotFoundError(f"init_from={name}: no such directory; type one that exists, or one of {known}")
    whole, index = (os.path.join(directory, f"model.safetensors{end}") for end in ("", ".index.json"))
    files = ["model.safetensors"]
    if os.path.exists(index) and not os.path.exists(whole):  # transformers too takes the whole file first
        try:
            with open(index, encoding="utf-8") as f:
                files = sorted({os.path.basename(file) for file in json.load(f)["weight_map"].values()})
            files[0]  # there is one
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is damaged: {e!r}") from e
    paths = [os.path.join(directory, file) for file in ["config.json", *files]]
    for path in paths:
        if not os.path.isfile(path):
            hint = " (python -m tools.pretrain makes one)" if name == "gpt2-mini" else ""
            raise FileNotFoundError(f"init_from={name}: {path} is missing{hint}")
    return paths[0], paths[1:]


def context_size(name):
    """Tokens that a model's positions reach."""
    return read_model_config(find_model(name)[0])["block_size"]


def read_model_config(path):
    """GPTConfig's fields from a Hugging Face config.json; ValueError for what this GPT-2 does not compute."""
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged or no GPT-2 config: {e!r}") from e
    for key, value in sizes.items():
        if type(value) is not int or value < 1:  # True is an int too
            raise ValueError(f"{path}: {SIZES[key]}={value!r} is no size")
    for key, values in (COMPUTED | {"n_inner": (4 * sizes["n_embd"], None)}).items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key}={config[key]!r}, but this GPT-2 computes with {values[0]!r}")
    if config.get("architectures") == ["GPT2ForSequenceClassification"]:
        sizes["n_classes"] = len(config.get("id2label") or (0, 1))  # transformers leaves two classes out
    return sizes


def read_weights(files: list, n_head: int, expected: dict, dtype) -> dict:
    """{parameter: tensor} of a checkpoint's files in `dtype`, each (out, in). expected: {parameter: shape}. Raises
    FileNotFoundError, or ValueError naming the file and what is wrong with it."""
    state = {}
    tied = {}  # the head and the word embedding, as stored
    for path in files:
        for key, tensor in read_tensors(path, f"n_head={n_head}"):
            key = full_name(key)
            if key in ("lm_head.weight", "transformer.wte.weight"):
                tied[key] = tensor
            if key not in expected and (key in HEADS or MASK.search(key)):
                continue  # what is tied or not asked for, and the causal mask of old checkpoints
            tensor = tensor.t() if CONV1D.search(key) and tensor.dim() == 2 else tensor
            if tuple(tensor.shape) != expected.get(key):
                raise ValueError(
                    f"{path} does not fit its config.json: {key} is {tuple(tensor.shape)}, "
                    f"expected {expected.get(key, 'nothing')}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {key} is stored in {tensor.dtype}, which is no floating point")
            tensor = tensor.to(dtype).contiguous()
            if key in state and not torch.equal(state[key], tensor):
                raise ValueError(f"{path}: {key} is there a second time, with other values")
            state[key] = tensor
            check_finite(tensor, key, path)
    directory = os.path.dirname(files[0])
    missing = sorted(expected.keys() - state.keys() - {"score.weight"})
    if missing:
        raise ValueError(f"{directory} is not whole: {missing[0]} is missing")
    if len(tied) == 2 and "score.weight" not in expected:  # a classifier has no use for the head
        coarsest = min((tensor.dtype for tensor in tied.values()), key=lambda dtype: dtype.itemsize)
        if not torch.equal(*(tensor.to(coarsest) for tensor in tied.values())):  # a rounded one is the same
            raise ValueError(
                f"{directory} has a head of its own: lm_head.weight differs from wte.weight, but GPT-2's head is its "
                "word embedding; type another --init_from"
            )
    return state


def full_name(key):
    """A tensor's name with "transformer.", which some files leave out."""
    return key if key.startswith(("transformer.", *HEADS)) else f"transformer.{key}"


def write_model(directory: str, config, tensors: dict, dtype=None, write=write_weights) -> None:
    """Hugging Face's GPT-2 layout: config.json and model.safetensors. config: a GPTConfig; tensors: {parameter:
    tensor}, each (out, in); dtype: that of the file (None: as the tensors are); write: what writes the files."""
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().t() if CONV1D.search(name) else tensor.detach()
        stored[name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
    settings = {
        "architectures": ["GPT2ForSequenceClassification" if config.n_classes else "GPT2LMHeadModel"],
        "n_ctx": config.block_size,
        "torch_dtype": str(stored["transformer.wte.weight"].dtype).removeprefix("torch."),
    }
    settings |= {key: values[0] for key, values in COMPUTED.items()}
    settings |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
    if config.n_classes:
        settings["id2label"] = {i: f"LABEL_{i}" for i in range(config.n_classes)}
        settings["pad_token_id"] = config.vocab_size - 1
    write(directory, "model.safetensors", stored, f"n_head={config.n_head}", "config.json", settings)
