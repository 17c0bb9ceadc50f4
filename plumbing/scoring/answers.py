"""From many prompts to answers: which ones go together, their keys and values, how probable each label is."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.batch import IGNORE, pad
from plumbing.gpt2.kv_cache import KVCache

PART = 50  # batches of prompts that are sorted by length together, so that little is padding


def order_by_length(prompts: list[list[int]], size: int) -> list[np.ndarray]:
    """The indices of each batch: prompts of like length together, so that little is padding."""
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def read_batches(model, prompts: list[list[int]], size: int) -> Iterator[tuple]:
    """(indices, their last tokens, a KVCache of all tokens before them), batch after batch, as `read_prompts` gives
    them. The tokens that every prompt begins with go through the model once."""
    starts = [prompt[:-1] for prompt in prompts] or [[]]  # what follows is predicted from a prompt's last token
    pairs = zip(min(starts), max(starts))  # in the order of a dictionary these two differ first
    prefix = [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    cache = KVCache()
    if prefix:  # called for what it writes into the cache: keys and values
        model.hidden(torch.tensor([prefix], device=next(model.parameters()).device), cache)
    for indices in order_by_length(prompts, size):
        yield indices, *read_prompts(model, [prompts[i][len(prefix) :] for i in indices], cache)


def read_prompts(model, prompts: list[list[int]], past: KVCache) -> tuple[torch.Tensor, KVCache]:
    """Prompts of any lengths -> their last tokens (B, 1), and a KVCache of all tokens before them.

    past: the tokens that stand before every prompt. It may be empty, and it stays as it is.
    """
    device = next(model.parameters()).device
    cache = past.fork()
    idx = pad(prompts, 0).to(device)  # (B, T)
    T = idx.size(1)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    if T > 1:
        model.hidden(idx[:, :-1], cache, scored=idx.new_zeros(1))  # one state: only the cache is needed
        # Places from a prompt's last token on must not be seen.
        columns = torch.arange(cache.length, device=device)
        cache.real = columns < (cache.length - (T - 1) + lengths - 1)[:, None]  # (B, before + T - 1)
    return idx.gather(1, lengths[:, None] - 1), cache


def score_labels(model, last: torch.Tensor, past: KVCache, labels: list[list[int]]) -> torch.Tensor:
    """(B, n_labels): the probability of each label as the whole answer, among the labels, so that a row sums to 1.

    last (B, 1), past: as `read_prompts` gives them. labels: the tokens of each, the last one being end-of-text.
    With P(label) = P(first token) P(second token | first) ... P(end-of-text | label), a share is P(label) / the sum
    over all labels ("Language Models are Few-Shot Learners", Brown et al. 2020, section 2.4, compares labels so).
    """
    B = len(last)
    cache = past.fork()
    first = torch.tensor([label[0] for label in labels], device=last.device)  # (n_labels,)
    log_p = score_tokens(model, model.last_states(last, cache), first.expand(B, -1))  # (B, n_labels)
    for i, label in enumerate(labels):
        tokens = torch.tensor([label], device=last.device).expand(B, -1)  # (B, k): " pos", "itive", end-of-text
        x = model.hidden(tokens[:, :-1], cache.fork())  # (B, k - 1, C)
        log_p[:, i] += score_tokens(model, x.flatten(0, 1), tokens[:, 1:].reshape(-1, 1)).view(B, -1).sum(1)
    return log_p.softmax(-1)


def score_tokens(model, x, tokens):  # (N, C), (N, m) -> (N, m)
    """The logarithms of the tokens' probabilities after states x."""
    logits = model.exact_logits(x, tokens)  # (N, V)
    return logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)


@torch.no_grad()
def share_classes(model, prompts: list[list[int]], batch_size: int) -> list[list[float]]:
    """The shares that a classifier gives to its classes, for each text."""
    device = next(model.parameters()).device
    shares = [None] * len(prompts)
    for indices in order_by_length(prompts, batch_size):
        batch = [prompts[i] for i in indices]
        ends = [[IGNORE] * (len(prompt) - 1) + [0] for prompt in batch]  # the last token has seen the whole text
        logits, _ = model(pad(batch, end_of_text()).to(device), pad(ends, IGNORE).to(device))  # (B, n_classes)
        for i, row in zip(indices, logits.float().softmax(-1).tolist()):
            shares[i] = row
    return shares


def in_parts(examples, size):
    """Lists of `size` examples, under a bar on a terminal."""
    with tqdm(total=len(examples), disable=None, unit="example") as bar:
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            yield part
            bar.update(len(part))


def decode(tokens: list[int]) -> str:
    """The text before end-of-text."""
    return gpt2_encoding().decode(list(itertools.takewhile(lambda token: token != end_of_text(), tokens)))
