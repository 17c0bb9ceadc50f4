"""A batch of token ids, as every loader makes it and the model takes it."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

IGNORE = -1  # a target that is not scored


@dataclass
class Batch:
    """What a forward pass needs. The shared prefix (1, P) comes before every row of idx (B, T); targets (B, T) are
    IGNORE where nothing is scored. class_weights (n_classes,), if any, weigh a classifier's targets. scored (N,): the
    places of the scored targets in targets.flatten(), found before the batch goes to a GPU."""

    prefix: torch.Tensor
    idx: torch.Tensor
    targets: torch.Tensor
    class_weights: torch.Tensor | None = None
    scored: torch.Tensor | None = None

    def __post_init__(self):
        if self.scored is None:
            self.scored = find_scored(self.targets)

    def to(self, device):
        # On mps a copy that is not waited for reads memory that is freed by then (pytorch issues 139550, 189690).
        on_cuda = torch.device(device).type == "cuda"
        return Batch(*(t if t is None else t.to(device, non_blocking=on_cuda) for t in vars(self).values()))

    def widen(self, step: int, block_size: int) -> "Batch":
        """The same, its rows padded to a multiple of `step` tokens, within the context: an epoch has fewer shapes."""
        T = self.idx.size(1)
        n = min(-T % step, block_size - self.prefix.size(1) - T)
        # A place counts the tokens of the rows before its own, and those have n more each.
        places = {"scored": self.scored + self.scored // T * n}
        return replace(self, idx=F.pad(self.idx, (0, n)), targets=F.pad(self.targets, (0, n), value=IGNORE), **places)


def find_scored(targets: torch.Tensor) -> torch.Tensor:  # (B, T) -> (N,)
    """The places in targets.flatten() that are scored, in reading order."""
    return (targets.flatten() >= 0).nonzero()[:, 0]


def pad(rows, value):
    """Lists of numbers as one tensor (B, T): `value` fills the ends of the rows that are shorter than the longest."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
