"""Tokenised once: examples lie in files that are mapped into memory, so five million rows start in seconds.

A folder of the cache is named after all that its content follows from. It is whole or not there: it is written under
another name first, and a SHA-256 in its meta.json shows damage.
"""

import collections.abc
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
from filelock import FileLock, Timeout

from plumbing.program.files import explain_unwritable, find_cache, put_in_place

CACHE = find_cache()


# --- a split's examples --------------------------------------------------------------------------


@dataclass
class Example:
    """One record as tokens: the first n_prompt are the prompt, the rest the label and end-of-text. A classifier's
    example is its text alone: all of it is prompt."""

    tokens: list
    n_prompt: int
    label: int
    text: str


class Examples(collections.abc.Sequence):
    """A split's examples, read from memory-mapped files when they are asked for.

    chosen: an array of row numbers, if only those rows take part. The files stay as they are.
    """

    def __init__(self, folder, chosen=None):
        self.folder = folder
        self.chosen = chosen
        # Where tokens and text begin, n_prompt, label; after the last example the ends.
        self.index = np.memmap(os.path.join(folder, "index"), np.int64, "r").reshape(-1, 4)
        self.tokens = np.memmap(os.path.join(folder, "tokens"), np.uint16, "r")
        self.texts = np.memmap(os.path.join(folder, "texts"), np.uint8, "r")
        rows = slice(None) if chosen is None else chosen
        self.lengths = np.diff(self.index[:, 0]).astype(np.int32)[rows]
        self.n_prompt = self.index[:-1, 2][rows]
        self.labels = self.index[:-1, 3][rows]

    def divide(self, n, seed):
        """(n of these examples, the others), in the files' order. The choice follows from the seed and the number of
        examples alone; a larger n holds those of a smaller one."""
        rows = np.arange(len(self)) if self.chosen is None else self.chosen
        shuffled = np.random.default_rng(seed).permutation(len(self))
        return tuple(Examples(self.folder, rows[np.sort(places)]) for places in (shuffled[:n], shuffled[n:]))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        row = i if self.chosen is None else self.chosen[i]
        (token, text, n_prompt, label), (token_end, text_end, _, _) = self.index[row : row + 2].tolist()
        tokens = self.tokens[token:token_end].tolist()
        return Example(tokens, n_prompt, label, self.texts[text:text_end].tobytes().decode())


class ExampleWriter:
    """Writes a split's examples as the files that `Examples` reads. `stack` closes the files and keeps the folder."""

    def __init__(self, stack, folder):
        self.folder = stack.enter_context(whole_folder(folder))
        paths = [os.path.join(self.folder, name) for name in ("index", "tokens", "texts")]
        self.files = [stack.enter_context(open(path, "wb")) for path in paths]  # noqa: SIM115
        self.n = 0
        self.n_cut = 0
        self.end = np.zeros(4, np.int64)  # of tokens and texts so far
        self.shared = None  # the first tokens that all prompts so far have in common

    def add(self, tokens, lengths, n_prompt, labels, texts):
        """Examples one after another. tokens (all of them): uint16; the rest has one item for each example."""
        encoded = [text.encode() for text in texts]
        n_bytes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        index = np.stack([np.cumsum(lengths) - lengths, np.cumsum(n_bytes) - n_bytes, n_prompt, labels], axis=1)
        # What all prompts share, short of one token, so that every row has a prompt token of its own, to predict the
        # label from.
        shared = tokens[: n_prompt[0]].tolist() if self.shared is None else self.shared
        same = ((tokens[index[:, 0] + i] == token).all() for i, token in enumerate(shared[: n_prompt.min() - 1]))
        self.shared = [token for token, is_same in zip(shared, itertools.takewhile(bool, same))]
        index[:, :2] += self.end[:2]
        self.end[:2] += lengths.sum(), n_bytes.sum()
        self.n += len(texts)
        for f, data in zip(self.files, (index.astype(np.int64), tokens.astype(np.uint16), b"".join(encoded))):
            f.write(data)

    def finish(self, shares_prefix, **meta):
        """shares_prefix: whether the prompts' common head may be run once; not where its tokens are scored."""
        for f, data in zip(self.files, (self.end, b"", b"\0")):  # an empty file cannot be mapped
            f.write(data)
            f.flush()
        return write_meta(self.folder, prefix=self.shared if shares_prefix else [], n_cut=self.n_cut, **meta)


# --- folders that are whole ----------------------------------------------------------------------


def cache_folder(name, key=None):
    """The folder `name` of the cache or, of what follows from a text `key`, one for each key."""
    if CACHE.startswith("~"):
        raise ValueError("there is no home directory to keep data in; NANOLORA_CACHE=DIRECTORY names a folder")
    if key is not None:
        name += f"-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return os.path.join(CACHE, name)


@contextlib.contextmanager
def take_turns(dataset):
    """Of several processes that want a data set at once, one tokenises it; the others wait, and find it done. Where
    there are no locks, or in ten minutes no turn comes, each does it for itself."""
    lock = FileLock(cache_folder("turn", dataset) + ".lock", timeout=600)
    with contextlib.suppress(OSError, NotImplementedError, Timeout):  # no locks here, or no turn
        os.makedirs(CACHE, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to write into, which takes the name `folder` when all is written. Another process may be first:
    then its folder stays, with the same content."""
    with explain_unwritable(CACHE, "NANOLORA_CACHE"):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        new = tempfile.mkdtemp(dir=CACHE)
        try:
            yield new
            try:
                put_in_place(new, folder)
            except OSError:
                if not os.path.exists(folder):
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)


def write_meta(folder, **meta):
    """The last file of a folder: meta.json, with a SHA-256 of itself and of the other files. Returns `meta`."""
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta | {"sha256": hash_folder(folder, meta)}, f)
    return meta


def read_meta(folder):
    """The meta.json of a folder that is whole; None for one that is not there, or damaged: that one is removed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        if meta.pop("sha256") == hash_folder(folder, meta):
            return meta
    shutil.rmtree(folder, ignore_errors=True)
    return None


def hash_folder(folder, meta):
    names = sorted(name for name in os.listdir(folder) if name != "meta.json")
    content = hash_files(os.path.join(folder, name) for name in names) + json.dumps(meta, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def hash_files(paths):
    """SHA-256 of files' kinds and contents."""
    digest = hashlib.sha256()
    for path in paths:
        name = path.lower()
        kind = os.path.splitext(name.removesuffix(".gz"))[1] + (".gz" if name.endswith(".gz") else "")
        digest.update(kind.encode())
        with open(path, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
