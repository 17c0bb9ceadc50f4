"""Keys and values of tokens that went through the model before, so that none is computed twice."""

import torch


class KVCache:
    """Keys and values of the tokens seen before, for each layer (B or 1, H, T, D).

    A model call with `past=cache` continues after them and appends its own. One row serves a batch of any size.
    `real` (B, T) is False at padding; None means that every position is real.
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
        """Only these rows (bool or int, one dimension) stay."""
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


def put_before(past, new):  # (B or 1, H, P, D), (B, H, T, D) -> (B, H, P + T, D)
    return torch.cat([past.expand(new.size(0), -1, -1, -1), new], dim=2)
