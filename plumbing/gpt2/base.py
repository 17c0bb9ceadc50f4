"""The base of a run: its words are GPT-2's, it is not written over, and it stays the one that the run began with."""

import base64
import hashlib
import json
import os
import re

import torch

from plumbing.gpt2.files import MASK, find_model, full_name, read_model_config
from plumbing.program.files import find_asset, open_tensors

N_TOKENS = 50257  # of GPT-2's vocabulary
PADDED = 50304  # nanoGPT's vocabulary: the next multiple of 64


def check_base(config) -> None:
    """Raises ValueError for a base that a run cannot begin with, or that is no longer the one it began with."""
    if config.facts:
        check_same_weights(config.init_from, config.facts.base, config.out_dir)
    else:
        check_vocabulary(config.init_from)
        check_base_stays(config)


def check_vocabulary(name: str) -> None:
    """Raises ValueError for a base of another vocabulary than GPT-2's, whose token ids are all that is used here."""
    if name == "scratch":
        return
    config = find_model(name)[0]
    n = read_model_config(config)["vocab_size"]
    if n < N_TOKENS:
        raise ValueError(f"init_from={name}: vocab_size={n}, but texts are made of GPT-2's {N_TOKENS:,} tokens")
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
    paths = [os.path.join(os.path.dirname(config), file) for file in names]
    found = [path for path in paths if os.path.exists(path)]
    if found and not is_gpt2s(found[0]):
        raise ValueError(
            f"init_from={name}: {found[0]} is another tokenizer than GPT-2's, which is all that is used here; type a "
            "model of GPT-2's vocabulary"
        )
    if n > PADDED and not found:
        print(f"note: init_from={name} has {n:,} tokens and no tokenizer's file: taken to begin with GPT-2's")


def is_gpt2s(path):
    """Whether a tokenizer's file gives GPT-2's ids to every 97th of its tokens, as far as they are plain letters."""
    try:
        with open(path, encoding="utf-8") as f:
            vocabulary = json.load(f)
        if isinstance(vocabulary["model"], dict):  # tokenizer.json; in vocab.json "model" is a word
            vocabulary = vocabulary["model"]["vocab"]
        with open(find_asset("gpt2.tiktoken"), "rb") as f:
            tokens = [base64.b64decode(line.split()[0]) for line in f]
        plain = [i for i in range(0, len(tokens), 97) if re.fullmatch(rb" ?[!-~]+", tokens[i])]
        return all(vocabulary[tokens[i].decode().replace(" ", "Ġ")] == i for i in plain)
    except (ValueError, LookupError, TypeError):  # no JSON; a list of pairs; a word that is missing
        return False


def check_base_stays(config) -> None:
    """Raises ValueError where a run that trains all weights would write them over its base."""
    if config.facts or config.rank or config.init_from == "scratch" or not os.path.isdir(config.out_dir):
        return
    config_path, files = find_model(config.init_from)
    for path in (config_path, *files, *map(os.path.realpath, files)):
        if os.path.samefile(os.path.dirname(path), config.out_dir):
            raise ValueError(
                f"out_dir={config.out_dir} is the base itself, which rank=0 would write over; type another --out_dir"
            )


def fingerprint_base(name: str) -> dict[str, str] | None:
    """What tells a base's weights from others of the same sizes: {dtype: SHA-256 of some values of every tensor,
    rounded to it}; None for "scratch". The same weights in other files, or in another order, give the same.
    (Runs keep it: who takes other values gives the fact another name, so that older runs still open.)"""
    if name == "scratch":
        return None
    samples = {}
    for path in find_model(name)[1]:
        with open_tensors(path) as f:
            for key in f.keys():  # noqa: SIM118  (not a dict)
                if full_name(key) != "lm_head.weight" and not MASK.search(key):
                    samples[full_name(key)] = take_some(f, key)
    names = " ".join(sorted(samples)).encode()
    values = torch.cat([samples[key] for key in sorted(samples)])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rounded = {str(dtype).removeprefix("torch."): values.to(dtype).float() for dtype in dtypes}
    return {dtype: hashlib.sha256(names + v.numpy().tobytes()).hexdigest() for dtype, v in rounded.items()}


def take_some(file, key, n=64):
    """A stored vector, or n values of the first, the middle and the last row of a matrix, as float32: the rest of it
    is not read."""
    stored = file.get_slice(key)
    size = stored.get_shape()
    if len(size) != 2:
        return file.get_tensor(key).flatten().float()
    rows, columns = size
    places = [(0, 0), (rows // 2, max(0, columns - n) // 2), (rows - 1, max(0, columns - n))]
    return torch.cat([stored[row : row + 1, start : start + n].flatten().float() for row, start in places])


def check_same_weights(name: str, then: dict | None, out_dir: str) -> None:
    """Raises ValueError if a checkpoint's weights are no longer those that the run in out_dir knows: `then`, of
    fingerprint_base, or None for an older run. Weights that were saved in half precision meanwhile are the same: one
    side is the other's rounding."""
    now = then and fingerprint_base(name)
    if then and now["float32"] not in then.values() and then["float32"] not in now.values():
        raise ValueError(
            f"{name} holds other weights than those that the run in {out_dir} knows; put the old ones back, or start "
            "another run with another --out_dir"
        )
