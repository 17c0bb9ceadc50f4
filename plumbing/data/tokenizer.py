"""GPT-2's tokenizer, from the table of merges that ships here: no download, no second vocabulary to mix up."""

import base64
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
    ranks = {}
    with open(find_asset("gpt2.tiktoken"), "rb") as f:
        for line in f:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
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
    """Lets the threads of `pool` tokenise many texts. Returns futures: their results, in a row, are the token ids of
    each text."""
    n_head = find_shared_head(texts)
    head = gpt2_encoding().encode_ordinary(texts[0][:n_head])
    parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    return [pool.submit(encode_part, part, head, n_head) for part in parts]


def encode_part(texts, head, n_head):
    """Token ids of texts that begin with the tokens `head`, n_head characters. One call for all, with end-of-text
    between them: Python does other work meanwhile, which it cannot where each text is a call."""
    joined = END.join(text[n_head:] for text in texts)
    if joined.count(END) >= len(texts):  # a text has these characters itself, and there they are no token
        return [gpt2_encoding().encode_ordinary(text) for text in texts]
    ids = gpt2_encoding().encode_to_numpy(joined, allowed_special={END}, disallowed_special=())
    ends = np.flatnonzero(ids == end_of_text()).tolist()
    return [head + ids[i:end].tolist() for i, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)])]
