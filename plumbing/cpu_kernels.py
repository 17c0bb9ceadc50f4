"""Hand-written backward passes for training on a CPU. Each equals a plain function, which a test compares it with.

FastLoRALinear     lora.LoRALinear
fast_on_cpu        a decorator for model.attend_with_prefix
"""

import functools
import math

import torch
import torch.nn.functional as F

from lora import LoRALinear
from plumbing.adapter import add_low_rank

LONGEST = 512  # tokens: beyond that the weights of attention, which are computed whole, cost more than they save
SHORT = 128  # tokens: up to that they are kept for the backward pass, with 4 % more speed; then they are made again


class FastLoRALinear(LoRALinear):
    """The same numbers as `LoRALinear` in fewer passes over memory. A lora.py of one's own runs as it is."""

    def forward(self, x):  # (N, in) -> (N, out)
        plain = not getattr(self, "mixes_dtypes", False)
        if plain or x.ndim != 2 or self.has_weights_merged or not self.is_lora():
            return super().forward(x)
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        drops = self.training and self.lora_dropout.p > 0
        if x.is_cpu and not trains and not drops and not torch.compiler.is_compiling():
            return FrozenLinearWithLoRA.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_scaling)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return add_low_rank(F.linear(x, self.weight.to(x.dtype), bias), x, self)


class FrozenLinearWithLoRA(torch.autograd.Function):
    """x W0^T + b + scaling (x A^T) B^T for W0 and b that do not train: (N, in) -> (N, out).

    What autograd makes of the same lines also keeps A and B in x's dtype and x A^T scaled, and adds up two gradients
    of x in another pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        weight = weight.to(x.dtype)
        z = F.linear(x, A.to(x.dtype))  # (N, r)
        ctx.save_for_backward(x, z, weight, A, B)
        ctx.scaling = scaling
        out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return out.addmm_(z, B.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, weight, A, B = ctx.saved_tensors
        dz = (dy @ B.to(dy.dtype)).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(dz, A.to(dy.dtype)) if ctx.needs_input_grad[0] else None
        dA = (dz.t() @ x).to(A.dtype)
        dB = (dy.t() @ (z * ctx.scaling)).to(B.dtype)
        return dx, None, None, dA, dB, None


def fast_on_cpu(plain):
    """Lets `plain(qkv, layout, dropout)` run by `PrefixAttention` where that is the same and faster: torch's fused
    kernel is five times slower backward on a CPU."""

    @functools.wraps(plain)
    def attend(qkv, layout, dropout=0.0):
        if qkv.is_cpu and qkv.requires_grad and not dropout and layout.P + layout.T <= LONGEST:
            return PrefixAttention.apply(qkv, layout.B, layout.T)
        return plain(qkv, layout, dropout)

    return attend


class PrefixAttention(torch.autograd.Function):
    """qkv (P + B T, 3, H, D) for H heads, a prefix of P tokens first -> (P + B T, H D).

    The prefix's keys and values are not repeated for each row: all rows meet them in one product, and the sum over
    the rows in their gradient is part of a product too.
    """

    @staticmethod
    def forward(ctx, qkv, B, T):
        n, _, H, D = qkv.shape
        P = n - B * T
        prefix = qkv[:P].permute(1, 2, 0, 3).contiguous()  # (3, H, P, D)
        rows = qkv[P:].permute(1, 2, 0, 3).contiguous()  # (3, H, B T, D)
        probs, prefix_probs = attention_weights(prefix, rows, T)
        pv = prefix[2]
        v = rows[2]
        y = probs[..., :P].reshape(H, B * T, P) @ pv  # (H, B T, D)
        y.view(-1, T, D).baddbmm_(probs[..., P:], v.view(-1, T, D))
        kept = (probs, prefix_probs) if P + T <= SHORT else ()
        ctx.save_for_backward(prefix, rows, *kept)
        ctx.T = T
        return torch.cat([prefix_probs @ pv, y], dim=1).transpose(0, 1).reshape(n, H * D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        prefix, rows, *kept = ctx.saved_tensors
        T = ctx.T
        _, H, P, D = prefix.shape
        N = rows.size(2)
        probs, prefix_probs = kept or attention_weights(prefix, rows, T)
        pq, pk, pv = prefix
        q, k, v = rows
        dy = dy.view(-1, H, D).transpose(0, 1)  # (H, P + B T, D)
        dpy = dy[:, :P].contiguous()
        dy = dy[:, P:].contiguous()
        d_prefix = torch.empty_like(prefix)
        d_rows = torch.empty_like(rows)

        def by_row(t):  # (H, B T, D) -> (H B, T, D)
            return t.view(-1, T, D)

        # The rows' queries, keys and values.
        dscores = torch.cat([dy @ pv.mT, (by_row(dy) @ by_row(v).mT).view(H, N, T)], dim=2).view_as(probs)
        dscores = torch._softmax_backward_data(dscores, probs, -1, probs.dtype).mul_(D**-0.5)
        far = dscores[..., :P].reshape(H, N, P)  # towards the prefix
        near = dscores[..., P:].contiguous()  # (H B, T, T), within the row
        torch.bmm(far, pk, out=d_rows[0])
        by_row(d_rows[0]).baddbmm_(near, by_row(k))
        torch.bmm(near.mT, by_row(q), out=by_row(d_rows[1]))
        torch.bmm(probs[..., P:].mT, by_row(dy), out=by_row(d_rows[2]))

        # The prefix's: from itself, and from all rows.
        dscores = torch._softmax_backward_data(dpy @ pv.mT, prefix_probs, -1, probs.dtype).mul_(D**-0.5)
        torch.bmm(dscores, pk, out=d_prefix[0])
        torch.baddbmm(dscores.mT @ pq, far.mT, q, out=d_prefix[1])
        far_probs = probs[..., :P].reshape(H, N, P)
        torch.baddbmm(prefix_probs.mT @ dpy, far_probs.mT, dy, out=d_prefix[2])
        return torch.cat([d_prefix, d_rows], dim=2).permute(2, 0, 1, 3), None, None


def attention_weights(prefix, rows, T):  # (3, H, P, D), (3, H, B T, D)
    """(H B, T, P + T) and (H, P, P): how much each token takes from which, of the rows and within the prefix."""
    pq, pk, _ = prefix
    q, k, _ = rows
    H, P, D = pq.shape
    far = q @ pk.mT  # (H, B T, P)
    near = (q.view(-1, T, D) @ k.view(-1, T, D).mT).view(H, -1, T)
    scores = torch.cat([far, near], dim=2).view(-1, T, P + T)
    weights = torch.add(causal_bias(T, P + T, q), scores, alpha=D**-0.5).softmax(-1)
    return weights, torch.add(causal_bias(P, P, q), pq @ pk.mT, alpha=D**-0.5).softmax(-1)


def causal_bias(T, K, like):
    """(T, K): 0 where the last T of K tokens may look, else minus infinity."""
    return torch.full((T, K), -math.inf, dtype=like.dtype, device=like.device).triu_(K - T + 1)
