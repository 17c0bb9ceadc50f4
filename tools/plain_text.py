"""Plain text, packed into rows of one length: for pre-training, where every token is scored."""

import contextlib
import glob
import hashlib
import itertools
import math
import os
import re

import numpy as np
import torch

from plumbing.data.readers import read_rows
from plumbing.data.sources import need_column
from plumbing.data.token_cache import cache_folder, hash_files, read_meta, whole_folder, write_meta
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.batch import Batch

SPLITS = ("train", "validation")
VALIDATION_SHARE = 656 / 65536  # 1 % of the documents


class TextLoader:
    """Documents one after another with end-of-text between, cut into rows of `context` tokens that are shuffled
    again in each epoch. 1 % of the documents, chosen by their content, are the validation split.

    `digest` tells the content of the text. Tokens lie in the cache as a memory map, in a folder named after the
    content and the way it was read.
    Raises ValueError, naming the value, for text that cannot be used.
    """

    def __init__(self, dataset, batch_size=32, context=256, text_field="text", lowercase_share=0.0, seed=1337):
        self.context = context
        self.seed = seed
        self.batch_size = batch_size
        self.eval_batch_size = max(1, 1024 // context)  # every token is scored over the whole vocabulary
        if not os.path.exists(dataset):
            raise ValueError(f"dataset={dataset}: no such file or directory; pretrain reads local text")
        files = [dataset]
        if os.path.isdir(dataset):
            files = sorted(f for f in glob.glob(os.path.join(glob.escape(dataset), "*")) if os.path.isfile(f))
        self.digest = hash_files(files)
        folder = cache_folder("text", f"4 {text_field} {lowercase_share} {self.digest}")
        self.meta = read_meta(folder) or tokenise_text(files, folder, text_field, lowercase_share)
        self.tokens = {}
        for split in SPLITS:
            n = self.meta[f"{split}_tokens"]
            if n <= 2 * context + 1:
                raise ValueError(f"dataset={dataset}: {n} {split} tokens are too few for rows of {context}")
            self.tokens[split] = np.memmap(os.path.join(folder, f"{split}.bin"), np.uint16, "r")

    def split_is_drawn(self, split: str) -> bool:
        """False: the documents of each split follow from their content, whatever the seed."""
        return False

    def batch(self, split, starts):
        """The Batch of the rows that begin at these tokens: each token's target is the next one."""
        rows = np.stack([self.tokens[split][start : start + self.context + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        no_prefix = torch.empty(1, 0, dtype=torch.long)
        return Batch(no_prefix, rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def order(self, split, size, epoch=None):
        """Arrays of `size` rows' starts each, shuffled by seed and epoch; without an epoch as they stand."""
        starts = self._starts(split, epoch)
        return [starts[i * size : (i + 1) * size] for i in range(self.n_batches(split, size))]

    def _starts(self, split, epoch):
        """Where the rows of an epoch begin; the first token moves with the epoch, so cuts fall elsewhere."""
        last = len(self.tokens[split]) - self.context - 1
        if epoch is None:
            return np.arange(0, last, self.context)
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.context))
        return rng.permutation(np.arange(offset, last, self.context))

    def n_batches(self, split, size):
        # The least that any epoch has, so that every epoch has as many.
        return max(1, (len(self.tokens[split]) - 2 * self.context - 1) // self.context // size)

    def n_scored(self, split, starts):
        return len(starts) * self.context

    def bits_per_byte(self, split, loss):
        """A loss in nats per token as bits per byte of text, which no tokeniser can flatter."""
        return loss / math.log(2) * self.meta[f"{split}_tokens"] / max(1, self.meta[f"{split}_bytes"])


def tokenise_text(files, folder, text_field, lowercase_share):
    """Writes the token files of both splits into `folder`. Returns what its meta.json says."""
    encoding = gpt2_encoding()
    n_bytes = dict.fromkeys(SPLITS, 0)
    with whole_folder(folder) as new, contextlib.ExitStack() as stack:
        out = {s: stack.enter_context(open(os.path.join(new, f"{s}.bin"), "wb")) for s in SPLITS}
        rows = ((path, row) for path in files for _, row in read_rows(path, (text_field,)))
        while part := list(itertools.islice(rows, 10_000)):
            texts = {split: [] for split in SPLITS}
            for path, row in part:
                need_column(row, "text_field", text_field, path)
                split, text = prepare_text(row[text_field] or "", lowercase_share)
                texts[split].append(text)
            for split, documents in texts.items():
                n_bytes[split] += sum(len(text.encode()) for text in documents)
                for tokens in encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count()):
                    out[split].write(np.array([*tokens, end_of_text()], np.uint16).tobytes())
        meta = {}
        for split, f in out.items():
            f.flush()
            meta |= {f"{split}_tokens": f.tell() // 2, f"{split}_bytes": n_bytes[split]}
        return write_meta(new, **meta)


def prepare_text(text, lowercase_share):
    """(split, text) of a document; its own hash decides on the split and on the spelling."""
    text = re.sub(r"<br\s*/?>", "\n", text).strip()
    digest = hashlib.sha256(text.encode()).digest()
    split = "validation" if int.from_bytes(digest[2:4], "big") / 65536 < VALIDATION_SHARE else "train"
    if digest[1] / 256 < lowercase_share:
        text = lowercase_spaced(text)
    return split, text


def lowercase_spaced(text):
    """As the reviews of `rotten_tomatoes` are written: "it's a charming , often affecting journey ." """

    def space(mark):
        return f" {' '.join(mark[1]) if mark[1] == '...' else mark[1]} "

    text = re.sub(r"\s*(\.\.\.|--|[.,!?;:()\"])\s*", space, text.lower())
    return re.sub(r" +", " ", text).strip()
