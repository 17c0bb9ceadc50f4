"""Logits over some of the vocabulary: for pre-training, where the whole of it costs more than the layers."""

import math

import torch
import torch.nn.functional as F


def sample_softmax(weight, x, targets, n_sampled: int):  # (V, C), (N, C), (N,) -> (N, U + n_sampled), (N,)
    """Logits over the U words that are targets here and n_sampled (or a few more) other words instead of all V,
    and the targets' places among them.

    Each sampled word stands for (V - U) / n_sampled others: the logarithm of that is added to its logit. So the
    softmax's denominator is estimated without bias ("On Using Very Large Target Vocabulary", Jean et al. 2015,
    section 3).
    """
    V = len(weight)
    is_target = torch.zeros(V, dtype=torch.bool, device=x.device)
    is_target[targets] = True
    others = (~is_target).nonzero()[:, 0]
    # U + n_sampled is rounded up to a multiple of n_sampled / 3. So there are few different sizes, and memory
    # that was freed fits again: else a long run grows by gigabytes.
    n_sampled += -(n_sampled + V - len(others)) % max(1, n_sampled // 3)
    sampled = others[torch.randperm(len(others), device=x.device)[:n_sampled]]
    words = torch.cat([is_target.nonzero()[:, 0], sampled])
    bias = x.new_zeros(len(words))
    bias[len(words) - len(sampled) :] = math.log(max(1, len(others)) / max(1, len(sampled)))
    logits = F.linear(x, weight[words].to(x.dtype), bias)
    return logits, is_target.cumsum(0)[targets] - 1  # the n-th word that is a target has place n - 1
