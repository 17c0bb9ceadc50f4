"""Answers to many prompts: what the model writes, and how probable each label is, from one cache of the prompts."""

import itertools

import numpy as np
import torch
from tqdm import tqdm

from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.batch import IGNORE, pad
from plumbing.gpt2.kv_cache import KVCache


@torch.no_grad()
def answer_prompts(config, model, prompts, max_new_tokens, labels) -> tuple[list[str], list[list[float]]]:
    """What the model writes after each prompt (a list of token ids), and each label's share, in the prompts' order.

    labels: the tokens of each label, the last one being end-of-text.
    """
    cache = KVCache()
    prefix = shared_start(prompts)
    if prefix:  # the tokens that every prompt begins with go through the model once
        model.hidden(torch.tensor([prefix], device=next(model.parameters()).device), cache)
    texts = [None] * len(prompts)
    shares = [None] * len(prompts)
    options = {"temperature": config.temperature, "top_k": config.top_k, "stop": end_of_text()}
    words = [decode_answer(label) for label in labels]
    is_greedy = config.temperature == 0
    may_be_written = torch.tensor([is_greedy and len(label) - 1 <= max_new_tokens for label in labels])  # (n_labels,)
    for indices in order_by_length(prompts, config.batch_size):
        last, past = read_prompts(model, [prompts[i][len(prefix) :] for i in indices], cache)
        rows, is_written = score_labels(model, last, past, labels)  # (B, n_labels) each
        # Where the likeliest tokens spell a label, that is what the model writes. Only the others are left to write.
        is_written &= may_be_written.to(is_written.device)
        others = ~is_written.any(1)  # (B,)
        if others.any():
            if past.real is not None:
                past.keep(others)
            out = model.generate(last[others], max_new_tokens, past=past, **options)  # (others, 1 + new)
            for i, tokens in zip(indices[others.cpu().numpy()], out[:, 1:].tolist()):
                texts[i] = decode_answer(tokens)
        for i, row, label in zip(indices, rows.tolist(), is_written.int().argmax(1).tolist()):
            shares[i] = row
            if texts[i] is None:
                texts[i] = words[label]
    return texts, shares


def shared_start(prompts):
    """The tokens that all prompts begin with, but for a last one of each: what follows is predicted from it."""
    starts = [prompt[:-1] for prompt in prompts] or [[]]
    pairs = zip(min(starts), max(starts))  # in the order of a dictionary these two differ first
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def order_by_length(prompts, size):
    """The indices of each batch: prompts of like length together, so that little is padding."""
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def decode_answer(tokens: list[int]) -> str:
    """The text before end-of-text."""
    if end_of_text() in tokens:
        tokens = tokens[: tokens.index(end_of_text())]
    return gpt2_encoding().decode(tokens)


# --- a label's share -------------------------------------------------------------------------------


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


def score_labels(
    model, last: torch.Tensor, cache: KVCache, labels: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors (B, n_labels): the probability of each label as the whole answer, among the labels, so that a row
    sums to 1; and whether each of its tokens is the likeliest of all tokens.

    last (B, 1), cache: as `read_prompts` gives them. labels: the tokens of each, the last one being end-of-text.
    With P(label) = P(first token) P(second token | first) ... P(end-of-text | label), a share is P(label) / the sum
    over all labels ("Language Models are Few-Shot Learners", Brown et al. 2020, section 2.4, compares labels so).
    """
    B = len(last)
    cache = cache.fork()
    first = torch.tensor([label[0] for label in labels], device=last.device)  # (n_labels,)
    log_p, likeliest = score_tokens(model, model.hidden(last, cache)[:, -1], first.expand(B, -1))
    for i, label in enumerate(labels):
        tokens = torch.tensor([label], device=last.device).expand(B, -1)  # (B, k): " pos", "itive", end-of-text
        x = model.hidden(tokens[:, :-1], cache.fork())  # (B, k - 1, C)
        rest_log_p, rest_likeliest = score_tokens(model, x.flatten(0, 1), tokens[:, 1:].reshape(-1, 1))
        log_p[:, i] += rest_log_p.view(B, -1).sum(1)
        likeliest[:, i] &= rest_likeliest.view(B, -1).all(1)
    return log_p.softmax(-1), likeliest


def score_tokens(model, x, tokens):  # (N, C), (N, m) -> (N, m), (N, m)
    """The logarithms of the tokens' probabilities after states x, and which token is the likeliest of all."""
    logits = model.head(x)  # (N, V)
    precise = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype != precise:
        # Near -100, where the real GPT-2's logits lie, bfloat16's numbers are 0.5 apart. So those that matter are
        # computed again, as `pick_likeliest` does.
        matter = torch.cat([logits.topk(16).indices, tokens], dim=1)  # (N, 16 + m)
        weights = model.lm_head.weight[matter].to(precise)  # (N, 16 + m, C)
        exact = (weights @ x.to(precise)[:, :, None])[..., 0]
        logits = logits.to(precise).scatter_(1, matter, exact)
    found = logits.gather(1, tokens)  # (N, m)
    return found - logits.logsumexp(1, keepdim=True), found == logits.amax(1, keepdim=True)


# --- a classifier's answers -------------------------------------------------------------------------


@torch.no_grad()
def classify_prompts(config, model, prompts) -> list[list[float]]:
    """The shares that a classifier gives to its classes, for each prompt."""
    device = next(model.parameters()).device
    shares = [None] * len(prompts)
    for indices in order_by_length(prompts, config.batch_size):
        batch = [prompts[i] for i in indices]
        ends = [[IGNORE] * (len(prompt) - 1) + [0] for prompt in batch]  # the last token has seen the whole text
        logits, _ = model(pad(batch, end_of_text()).to(device), pad(ends, IGNORE).to(device))  # (B, n_classes)
        for i, row in zip(indices, logits.float().softmax(-1).tolist()):
            shares[i] = row
    return shares


@torch.no_grad()
def find_classes(config, model, loader, split) -> list[int]:
    """The class that a classifier finds likeliest for each text of a split, in the split's order."""
    device = next(model.parameters()).device
    found = [None] * len(loader.splits[split])
    for indices in tqdm(loader.order(split, config.batch_size), disable=None, unit="batch"):
        batch = loader.batch(split, indices).to(device)
        # The targets only say where each text ends: the logits do not depend on their values.
        logits, _ = model(batch.idx, batch.targets)  # (B, n_classes)
        for i, label in zip(indices, logits.argmax(-1).tolist()):
            found[i] = label
    return found
