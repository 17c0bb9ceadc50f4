"""GPT-2's tokenizer, from the table of merges that ships here: no download, no second vocabulary to mix up."""

import base64
import functools
import os
from itertools import chain

import tiktoken

from plumbing.files import ASSETS


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding: 50,257 tokens, end-of-text is the last."""
    ranks = {}
    with open(os.path.join(ASSETS, "gpt2.tiktoken"), "rb") as f:
        for line in f:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def end_of_text() -> int:
    """The token between two texts. It also ends an answer, and fills the end of short rows."""
    return gpt2_encoding().eot_token


def encode_all(texts, pool):
    """Token ids of many texts, by the threads of `pool`. tiktoken's own batches cost more than they save where texts
    are short."""
    encode = gpt2_encoding().encode_ordinary
    parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    return list(chain.from_iterable(pool.map(lambda part: [encode(text) for text in part], parts)))
