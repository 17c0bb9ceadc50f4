"""torch's attention; on Apple's mps, where it has been silently wrong, written out.

It was wrong where no gradient is kept: for permuted inputs, for masks that all heads share, for the causal mask in
bfloat16 (pytorch issues 163597, 181133, 184180, 195910).
"""

import torch
import torch.nn.functional as F


def scaled_dot_product_attention(q, k, v, mask=None, dropout=0.0, is_causal=False):
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D), k and v (B, H, K, D) -> (B, H, T, D). mask: True where a token
    may look, of a shape that broadcasts to (B, H, T, K)."""
    if q.device.type == "mps":
        return attend_plainly(q, k, v, mask, dropout, is_causal)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)


def attend_plainly(q, k, v, mask, dropout, is_causal):
    """The same in plain products; the softmax in float32."""
    scores = (q * q.size(-1) ** -0.5) @ k.mT  # (B, H, T, K)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v
