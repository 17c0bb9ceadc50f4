"""A student's lora.py, as the handout asks for it: two names, the merge in place, and nothing else."""

import math

import torch
from torch import nn


class LoRALinear(nn.Linear):
    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        lora_rank=0,
        lora_alpha=0.0,
        lora_dropout=0.0,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.has_weights_merged = False
        if lora_rank > 0:
            self.lora_dropout = nn.Dropout(lora_dropout)
            self.lora_scaling = lora_alpha / lora_rank
            self.lora_A = nn.Parameter(torch.empty((lora_rank, in_features), device=device, dtype=dtype))
            self.lora_B = nn.Parameter(torch.empty((out_features, lora_rank), device=device, dtype=dtype))
            self.lora_A.requires_grad = False
            self.lora_B.requires_grad = False
            self.reset_parameters()

    def is_lora(self):
        return hasattr(self, "lora_A")

    def reset_parameters(self):
        nn.Linear.reset_parameters(self)
        if self.is_lora():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x):
        out = nn.Linear.forward(self, x)
        if self.is_lora() and not self.has_weights_merged:
            out = out + self.lora_scaling * (self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T)
        return out

    def train(self, mode=True):
        nn.Linear.train(self, mode)
        if self.is_lora() and mode == self.has_weights_merged:
            sign = -1 if mode else 1
            self.weight.data += sign * self.lora_scaling * (self.lora_B @ self.lora_A).detach()
            self.has_weights_merged = not mode
        return self


def mark_only_lora_as_trainable(model):
    for name, param in model.named_parameters():
        param.requires_grad = "lora_" in name
