"""GPT-2's tokenizer, from the table of merges that ships here: no download, no second vocabulary to mix up."""

import binascii
import functools
import os
import re

import numpy as np
import tiktoken

from plumbing.program.files import find_asset

END = "<|endoftext|>"


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, end-of-text is the last."""
    with open(find_asset("gpt2.tiktoken"), "rb") as f:
        words = f.read().split()  # token, rank, token, rank ...
    ranks = dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2])))
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={END: 50256},
        explicit_n_vocab=50257,
    )


def end_of_text() -> int:
    """The token between two texts. It also ends an answer, and fills the end of short rows."""
    return gpt2_encoding().eot_token


def find_shared_head(texts):
    """Characters at the start of all texts that can be tokenised once for all: the tokens of a text are those of its
    head and those of its rest. The pattern above, read from left to right, always ends a piece between a letter and a
    space."""
    shared = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071 (character by character it shall be)
    ends = [match.start() for match in re.finditer(r"(?<=[A-Za-z]) ", shared)]
    return ends[-1] if ends else 0


def start_encoding(texts, pool):
    """Lets the threads of `pool` tokenise many texts. Returns futures of what `encode_part` returns, in a row."""
    n_head = find_shared_head(texts)
    head = gpt2_encoding().encode_ordinary(texts[0][:n_head])
    parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    return [pool.submit(encode_part, part, head, n_head) for part in parts]


def encode_part(texts, head, n_head):
    """(token ids of texts that begin with the tokens `head`, n_head characters, with end-of-text after each; how many
    each text has). One call for all: Python does other work meanwhile, which it cannot where each text is a call."""
    joined = END.join([*(text[n_head:] for text in texts), ""])
    if joined.count(END) > len(texts):  # a text has these characters itself, and there they are no token
        rows = [[*gpt2_encoding().encode_ordinary(text), end_of_text()] for text in texts]
        return np.concatenate(rows), np.array([len(row) - 1 for row in rows])
    ids = gpt2_encoding().encode_to_numpy(joined, allowed_special={END}, disallowed_special=())
    ends = np.flatnonzero(ids == end_of_text())
    starts = np.concatenate([[0], ends[:-1] + 1])
    ids = np.insert(ids, np.repeat(starts, len(head)), np.tile(head, len(texts)))
    return ids, ends - starts + len(head)


@functools.cache
def token_bytes():
    """How many bytes each token has."""
    encoding = gpt2_encoding()
    return np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])


def count_last(ids, ends, n_bytes):
    """How many tokens hold the last n_bytes of each text. ends: where the texts end in ids."""
    n_tokens = np.zeros_like(ends)
    left = n_bytes.copy()
    while (open_ := left > 0).any():
        n_tokens[open_] += 1
        left[open_] -= token_bytes()[ids[ends[open_] - n_tokens[open_]]]
    return n_tokens
