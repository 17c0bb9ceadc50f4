"""Keys and values of tokens that went through the model before, so that none is computed twice; where the next tokens
stand, and what they may look at."""

import math

import torch


class KVCache:
    """Keys and values of the tokens seen before, for each layer (B or 1, H, T, D).

    A model call with `past=cache` continues after them and appends its own. One row serves a batch of any size.
    `real` (B, T) is False at padding, which no token looks at and which takes no position. None: every token is real.
    """

    def __init__(self):
        self.layers = []
        self.real = None

    @property
    def length(self) -> int:
        return self.layers[0][0].size(2) if self.layers else 0

    def fork(self) -> "KVCache":
        """A cache that goes on from here and leaves this one as it is. Nothing is copied."""
        other = KVCache()
        other.layers = list(self.layers)
        other.real = self.real
        return other

    def keep(self, rows: torch.Tensor) -> None:
        """Only the rows of these numbers stay."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        if self.real is not None:
            self.real = self.real[rows]

    def extend(self, layer, k, v):  # (B, H, T, D) -> (B, H, past + T, D)
        if layer == len(self.layers):  # this layer's first tokens
            self.layers.append((k, v))
        else:
            past_k, past_v = self.layers[layer]
            self.layers[layer] = (put_before(past_k, k), put_before(past_v, v))
        return self.layers[layer]

    def place(self, B: int, T: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions (B, T) of T new tokens in each of B rows, and the mask of what they may look at, of `like`'s
        dtype: (T, past + T), or (B, 1, T, past + T) where rows have padding. None: there is nothing before them."""
        K = self.length + T
        mask = causal_mask(T, K, like) if self.length else None
        if self.real is None:
            return torch.arange(self.length, K, device=like.device).expand(B, T), mask
        n_real = self.real.sum(1, keepdim=True)  # (B, 1)
        self.real = torch.cat([self.real, self.real.new_ones(B, T)], dim=1)  # (B, past + T)
        mask = mask.masked_fill(~self.real[:, None, None, :], -math.inf)
        return n_real + torch.arange(T, device=like.device), mask


def causal_mask(T: int, K: int, like: torch.Tensor) -> torch.Tensor:
    """(T, K): the last T of K tokens look at themselves and at those before them, where it is 0, and at no other,
    where it is minus infinity."""
    return torch.full((T, K), -math.inf, dtype=like.dtype, device=like.device).triu(K - T + 1)


def put_before(past, new):  # (B or 1, H, P, D), (B, H, T, D) -> (B, H, P + T, D)
    return torch.cat([past.expand(new.size(0), -1, -1, -1), new], dim=2)
