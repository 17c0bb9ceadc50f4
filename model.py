"""GPT-2, written out, with LoRA in its linear layers.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019, section 2.3: pre-norm
blocks, tanh-GELU, learned positions, the output head tied to the word embedding. Module names are
Hugging Face's (`transformer.h.0.attn.c_attn` ...), so checkpoints map by name. Shapes: B examples,
T tokens, C = n_embd, V = vocab_size, N scored positions.
"""

import contextlib
import ctypes
import json
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear, lora_layers, merged_weight, read_tensors, write_json, write_tensors

HUB_MODELS = {  # what a user types: the repository on the hub
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
MINI = os.path.join(ASSETS, "gpt2-mini")
ATTENTION = r"attn\.c_(attn|proj)$"  # QKV and output projection: the adapted layers of the original task
CONV1D = re.compile(r"(attn\.c_attn|c_proj|mlp\.c_fc)\.weight$")  # stored by Hugging Face as (in, out)


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings, attention and residuals
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_targets: str = ATTENTION  # regular expression: the linear layers that get an adapter
    n_classes: int = 0  # > 0: a linear `score` of that many classes in place of the vocabulary's head


class KVCache:
    """Keys and values of the tokens seen before, per layer (B or 1, n_head, T, head_dim).

    A model call with `past=cache` continues after them and appends its own. One row serves a batch of
    any size. `real` (B, T) is False at padding; None means that every position is real.
    """

    def __init__(self):
        self.layers = []
        self.real = None

    @property
    def length(self):
        return self.layers[0][0].size(2) if self.layers else 0

    def fork(self):
        """A cache that goes on from here and leaves this one as it is. Nothing is copied."""
        other = KVCache()
        other.layers, other.real = list(self.layers), self.real
        return other

    def keep(self, rows):
        """Only these rows (bool or int, one dimension) stay."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        self.real = None if self.real is None else self.real[rows]

    def extend(self, layer, k, v):  # (B, n_head, T, head_dim) -> (B, n_head, past + T, head_dim)
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            pk, pv = self.layers[layer]
            self.layers[layer] = (before(pk, k), before(pv, v))
        return self.layers[layer]


def before(past, new):  # (B or 1, n_head, P, head_dim), (B, n_head, T, head_dim) -> (B, n_head, P + T, head_dim)
    return torch.cat([past.expand(new.size(0), -1, -1, -1), new], dim=2)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):  # weights that train are float32 while x may be bf16
        w, b = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, w, b, self.eps)


def linear(config, name, n_in, n_out):
    """A linear layer, with an adapter if `config.lora_targets` finds its name."""
    try:
        rank = config.lora_rank if re.search(config.lora_targets, name) else 0
    except re.error as e:
        raise ValueError(f"lora_targets={config.lora_targets}: no regular expression ({e})") from e
    return LoRALinear(n_in, n_out, lora_rank=rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)


def attention(q, k, v, mask, dropout):  # (B, n_head, T, head_dim), k and v (B, n_head, P + T, head_dim)
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2.1); mask is
    True where a query may look, None for causal."""
    causal = mask is None and q.size(2) == k.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


class TrainingAttention(torch.autograd.Function):
    """The same for training on a CPU, where torch's fused kernel is five times slower backward: qkv (P + B T, 3,
    H, D) for H heads, a prefix of P tokens first, -> (P + B T, H D).

    The prefix's keys and values are not repeated for each row: all rows meet them in one product, and the sum
    over the rows in their gradient is part of a product too.
    """

    @staticmethod
    def forward(ctx, qkv, B, T):
        n, _, H, D = qkv.shape
        P = n - B * T
        prefix = qkv[:P].permute(1, 2, 0, 3).contiguous()  # (3, H, P, D)
        rows = qkv[P:].permute(1, 2, 0, 3).contiguous()  # (3, H, B T, D)
        probs, prefix_probs = attention_weights(prefix, rows, T)
        pv, v = prefix[2], rows[2]
        y = probs[..., :P].reshape(H, B * T, P) @ pv  # (H, B T, D)
        y.view(-1, T, D).baddbmm_(probs[..., P:], v.view(-1, T, D))
        ctx.save_for_backward(prefix, rows)  # the weights are made again: 5 % of the memory for 3 % of the time
        ctx.T = T
        return torch.cat([prefix_probs @ pv, y], dim=1).transpose(0, 1).reshape(n, H * D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        prefix, rows = ctx.saved_tensors
        (_, H, P, D), T, N = prefix.shape, ctx.T, rows.size(2)
        probs, prefix_probs = attention_weights(prefix, rows, T)
        (pq, pk, pv), (q, k, v) = prefix, rows
        dy = dy.view(-1, H, D).transpose(0, 1)  # (H, P + B T, D)
        dpy, dy = dy[:, :P].contiguous(), dy[:, P:].contiguous()
        d_prefix, d_rows = torch.empty_like(prefix), torch.empty_like(rows)

        def by_row(t):  # (H, B T, D) -> (H B, T, D)
            return t.view(-1, T, D)

        dscores = torch.cat([dy @ pv.mT, (by_row(dy) @ by_row(v).mT).view(H, N, T)], dim=2).view_as(probs)
        dscores = torch._softmax_backward_data(dscores, probs, -1, probs.dtype).mul_(D**-0.5)
        dp_far, near = dscores[..., :P].reshape(H, N, P), dscores[..., P:].contiguous()  # (H, B T, P), (H B, T, T)
        torch.bmm(dp_far, pk, out=d_rows[0])
        by_row(d_rows[0]).baddbmm_(near, by_row(k))
        torch.bmm(near.mT, by_row(q), out=by_row(d_rows[1]))
        torch.bmm(probs[..., P:].mT, by_row(dy), out=by_row(d_rows[2]))

        dscores = torch._softmax_backward_data(dpy @ pv.mT, prefix_probs, -1, probs.dtype).mul_(D**-0.5)
        torch.bmm(dscores, pk, out=d_prefix[0])
        torch.baddbmm(dscores.mT @ pq, dp_far.mT, q, out=d_prefix[1])
        far = probs[..., :P].reshape(H, N, P)
        torch.baddbmm(prefix_probs.mT @ dpy, far.mT, dy, out=d_prefix[2])
        return torch.cat([d_prefix, d_rows], dim=2).permute(2, 0, 1, 3), None, None


def attention_weights(prefix, rows, T):  # (3, H, P, D), (3, H, B T, D)
    """(H B, T, P + T) and (H, P, P): how much each token takes from which, of the rows and within the prefix."""
    (pq, pk, _), (q, k, _) = prefix, rows
    H, P, D = pq.shape
    scores = [q @ pk.mT, (q.view(-1, T, D) @ k.view(-1, T, D).mT).view(H, -1, T)]
    scores = torch.cat(scores, dim=2).view(-1, T, P + T)
    weights = torch.add(causal_bias(T, P + T, q), scores, alpha=D**-0.5).softmax(-1)
    return weights, torch.add(causal_bias(P, P, q), pq @ pk.mT, alpha=D**-0.5).softmax(-1)


def causal_bias(T, K, like):
    """(T, K): 0 where the last T of K tokens may look, else minus infinity."""
    return torch.full((T, K), -math.inf, dtype=like.dtype, device=like.device).triu_(K - T + 1)


def embedding(n, n_embd):
    """Without nn.Embedding's own random numbers: on the meta device they cost a second of imports."""
    return nn.Embedding.from_pretrained(torch.empty(n, n_embd), freeze=False)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        name, C = f"transformer.h.{layer}.attn", config.n_embd
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = linear(config, f"{name}.c_attn", C, 3 * C)  # query, key and value in one product
        self.c_proj = linear(config, f"{name}.c_proj", C, C)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, shape, past=None, mask=None, rows=None):
        (B, T), C, dropout = shape, x.size(1), self.dropout if self.training else 0.0
        P = len(x) - B * T
        qkv = self.c_attn(x).view(-1, 3, self.n_head, C // self.n_head)  # (P + B T, 3, n_head, head_dim)
        if x.device.type == "cpu" and qkv.requires_grad and past is None and not dropout and P + T <= 512:
            y = TrainingAttention.apply(qkv, B, T)
            return self.resid_dropout(self.c_proj(y if rows is None else y[P + rows]))
        q, k, v = qkv[P:].unflatten(0, shape).permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_dim)
        if past is not None:
            k, v = past.extend(self.layer, k, v)
        if P:
            pq, pk, pv = qkv[None, :P].permute(2, 0, 3, 1, 4)  # each (1, n_head, P, head_dim)
            k, v = before(pk, k), before(pv, v)
        y = attention(q, k, v, mask, dropout).transpose(1, 2).reshape(B * T, C)
        if rows is not None:
            y = y[rows]  # (N, C)
        elif P:
            y = torch.cat([attention(pq, pk, pv, None, dropout).transpose(1, 2).reshape(P, C), y])
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        name, C = f"transformer.h.{layer}.mlp", config.n_embd
        self.c_fc = linear(config, f"{name}.c_fc", C, 4 * C)
        self.c_proj = linear(config, f"{name}.c_proj", 4 * C, C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config, layer)

    def forward(self, x, shape, past=None, mask=None, rows=None):  # (P + B T, C) -> the same; with rows (N, C)
        y = self.attn(self.ln_1(x), shape, past, mask, rows)
        x = y + (x if rows is None else x[len(x) - shape[0] * shape[1] :][rows])
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.config = config
        self.compute_dtype = None  # None: that of the word embedding
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding(config.vocab_size, config.n_embd),
                "wpe": embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        if config.n_classes:
            self.score = nn.Linear(config.n_embd, config.n_classes, bias=False)
        else:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.lm_head.weight = self.transformer.wte.weight  # tied
        if config.lora_rank and not lora_layers(self):
            raise ValueError(
                f"lora_targets={config.lora_targets!r} matches no layer, such as transformer.h.0.attn.c_attn"
            )
        if self.transformer.wte.weight.device.type != "meta":
            self.apply(self._init_weights)
            for name, param in self.named_parameters():
                if name.endswith("c_proj.weight"):  # residual projections start smaller (section 2.3)
                    nn.init.normal_(param, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    # --- forward ---------------------------------------------------------------------------------

    def hidden(self, idx, past=None, rows=None, prefix=None):
        """The last layer's normalised states: idx (B, T) of token ids -> (B, T, C). With rows (N,), places in
        the flattened idx: of those alone, (N, C); the last layer then computes little more than they need.

        prefix (1, P): tokens before every row, in place of past. They go through the layers once, in the same
        products as the rows: x is (P + B T, C), the prefix first.
        """
        B, T = idx.shape
        P = past.length if past is not None else 0 if prefix is None else prefix.size(1)
        if self.config.block_size < P + T:
            raise ValueError(f"{P + T} tokens exceed the context of {self.config.block_size}")
        pos, mask, real = torch.arange(P, P + T, device=idx.device), None, past.real if past is not None else None
        if real is not None:
            pos = pos - P + real.sum(1, keepdim=True)  # (B, T): padding takes no position
            past.real = real = torch.cat([real, real.new_ones(B, T)], dim=1)
        if P and (T > 1 or real is not None):
            mask = torch.ones(T, P + T, dtype=torch.bool, device=idx.device).tril(P)
            mask = mask if real is None else mask & real[:, None, None, :]  # (B, 1, T, P + T)
        pos = pos.expand(B, T).flatten()
        if prefix is not None:
            idx, pos = (
                torch.cat([prefix.flatten(), idx.flatten()]),
                torch.cat([torch.arange(P, device=pos.device), pos]),
            )
        t = self.transformer
        x = F.embedding(idx.flatten(), t.wte.weight) + F.embedding(pos, t.wpe.weight)  # (P + B T, C)
        x = t.drop(x.to(self.compute_dtype or x.dtype))
        for block in t.h[:-1]:
            x = block(x, (B, T), past, mask)
        x = t.ln_f(t.h[-1](x, (B, T), past, mask, rows))
        return x if rows is not None else x[len(x) - B * T :].unflatten(0, (B, T))

    def head(self, x):  # (..., C) -> (..., V), or (..., n_classes)
        return F.linear(x, (self.score if self.config.n_classes else self.lm_head).weight.to(x.dtype))

    def forward(self, idx, targets=None, past=None, prefix=None, n_sampled=0, class_weights=None):
        """idx (B, T) token ids -> (logits, loss), as nanoGPT's.

        Without targets: logits (B, 1, V) of the last position, loss None. With targets (B, T), each the
        id that should follow or negative where nothing is scored: logits (N, V) of the scored positions
        alone, in reading order, and their mean cross-entropy. past: a KVCache to continue from, or
        prefix (1, P): token ids before every row; gradient flows into both. n_sampled > 0: see `sampled_softmax`.
        A classifier's targets are classes, at each text's last token; class_weights (n_classes,) make the mean
        a weighted one.
        """
        B, T = idx.shape
        if targets is None:
            last = torch.arange(T - 1, B * T, T, device=idx.device)
            return self.head(self.hidden(idx, past, last, prefix))[:, None], None
        rows = (targets.flatten() >= 0).nonzero()[:, 0]
        x, targets = self.hidden(idx, past, rows, prefix), targets.flatten()[rows]  # (N, C), (N,)
        if n_sampled:
            logits, targets = self.sampled_softmax(x, targets, n_sampled)
        else:
            logits = self.head(x)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = None if class_weights is None else class_weights.to(precise.dtype)
        return logits, F.cross_entropy(precise, targets, weight)

    def sampled_softmax(self, x, targets, n_sampled):
        """Logits over the batch's own targets and n_sampled (or a few more) other words instead of all V, and the
        targets' places among them: (N, C), (N,) -> (N, U + n_sampled), (N,).

        Each sampled word stands for (V - U) / n_sampled others, so the softmax's denominator is estimated
        without bias ("On Using Very Large Target Vocabulary", Jean et al. 2015, section 3).
        """
        own = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=x.device)
        own[targets] = True
        others = (~own).nonzero()[:, 0]
        # A few more, so that sizes recur and freed memory serves again: else a long run grows by gigabytes.
        n_sampled += -(n_sampled + self.config.vocab_size - len(others)) % max(1, n_sampled // 3)
        sampled = others[torch.randperm(len(others), device=x.device)[:n_sampled]]
        words = torch.cat([own.nonzero()[:, 0], sampled])
        bias = x.new_zeros(len(words))
        bias[len(words) - len(sampled) :] = math.log(max(1, len(others)) / max(1, len(sampled)))
        logits = F.linear(x, self.lm_head.weight[words].to(x.dtype), bias)
        return logits, own.cumsum(0)[targets] - 1

    # --- generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, past=None, lengths=None):
        """Continues idx (B, T) by up to max_new_tokens: returns (B, T + n), n at most max_new_tokens.

        temperature 0 takes the likeliest token; top_k samples among the k likeliest. A row ends at the
        token `stop`, with which the rest of the row is filled. past: a KVCache of tokens before idx,
        left as it is. lengths (B,): idx is padded on the right beyond them. A text that outgrows the
        context goes on from its last half.
        """
        B, T = idx.shape
        size = self.config.block_size
        slides = past is None and lengths is None
        if not slides and (past.length if past else 0) + T + max_new_tokens - 1 > size:
            raise ValueError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the context of {size}")
        cache = past.fork() if past is not None else KVCache()
        prompt = idx[:, -size:] if slides else idx
        last = (prompt.size(1) if lengths is None else lengths) - 1
        x = self.hidden(prompt, cache, torch.arange(B, device=idx.device) * prompt.size(1) + last)  # (B, C)
        if lengths is not None:
            columns = torch.arange(cache.length, device=idx.device)
            cache.real = columns < (cache.length - T + lengths)[:, None]
        out = idx.new_full((B, max_new_tokens), stop if stop is not None else 0)
        rows = torch.arange(B, device=idx.device)  # those still being written
        for n in range(max_new_tokens):
            token = pick_token(self.head(x), temperature, top_k)  # (rows,)
            out[rows, n] = token
            if stop is not None and (ended := token == stop).any():
                rows, token = rows[~ended], token[~ended]
                cache.keep(~ended)  # a finished row costs nothing more
                if len(rows) == 0:
                    return torch.cat([idx, out[:, : n + 1]], dim=1)
            if n + 1 == max_new_tokens:
                break
            if cache.length == size:
                cache = KVCache()
                token = torch.cat([idx, out[:, : n + 1]], dim=1)[rows, -(size // 2) :]
            else:
                token = token[:, None]
            x = self.hidden(token, cache)[:, -1]
        return torch.cat([idx, out], dim=1)

    # --- storage ---------------------------------------------------------------------------------

    def set_dtype(self, dtype):
        """Computes in `dtype`: frozen parameters are stored in it, those that train stay float32."""
        self.compute_dtype = dtype
        for param in self.parameters():
            if not param.requires_grad:
                param.data = param.data.to(dtype)
        return self.train(self.training)  # merged copies follow

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, **overrides):
        """A model from Hugging Face's GPT-2 layout: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (from
        the hub, cached), "gpt2-mini" (ships here) or a directory. Only safetensors, never a pickle.

        overrides: fields of GPTConfig (lora_rank, dropout ...). Raises FileNotFoundError, or ValueError
        naming the file and what is wrong with it.
        """
        config_path, files = find_checkpoint(name)
        config = GPTConfig(**(read_config(config_path) | overrides))
        with torch.device("meta"):  # no time spent on weights that are about to be replaced
            model = cls(config)
        wanted = {n: p for n, p in model.named_parameters() if "lora_" not in n}
        state = {}
        for path in files:
            for key, tensor in read_tensors(path, f"n_head={config.n_head}"):
                key = key if key.startswith(("transformer.", "score.")) else f"transformer.{key}"
                if key == "transformer.lm_head.weight" or re.search(r"\.attn\.(masked_)?bias$", key):
                    continue  # tied, and the causal mask of old checkpoints
                if key == "score.weight" and not config.n_classes:
                    continue  # a classifier's, of which only the body is asked for
                tensor = tensor.t() if CONV1D.search(key) and tensor.dim() == 2 else tensor
                expected = tuple(wanted[key].shape) if key in wanted else "nothing"
                if tuple(tensor.shape) != expected:
                    raise ValueError(
                        f"{path} does not fit its config.json: {key} is {tuple(tensor.shape)}, expected {expected}"
                    )
                state[key] = tensor.to(dtype).contiguous()
        if config.n_classes and "score.weight" not in state:  # a new head on a language model
            state["score.weight"] = torch.randn(config.n_classes, config.n_embd, dtype=dtype) * 0.02
        missing = sorted(wanted.keys() - state.keys())
        if missing:
            raise ValueError(f"{os.path.dirname(config_path)} is not whole: {missing[0]} is missing")
        model.load_state_dict(state, strict=False, assign=True)
        if not config.n_classes:
            model.lm_head.weight = model.transformer.wte.weight  # assigning broke the tie
        for layer in lora_layers(model).values():
            layer.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
        return model

    def save_pretrained(self, directory, dtype=None):
        """Writes Hugging Face's GPT-2 layout: config.json and model.safetensors, adapters merged in.
        dtype: that of the file (None: as the parameters are)."""
        merged = {f"{name}.weight": merged_weight(layer) for name, layer in lora_layers(self).items()}
        tensors = {}
        for name, param in self.named_parameters():
            if "lora_" not in name:
                tensor = merged.get(name, param).detach()
                tensor = tensor.t() if CONV1D.search(name) else tensor
                tensors[name] = tensor.to("cpu", dtype or tensor.dtype).contiguous()
        c = self.config
        config = {
            "architectures": ["GPT2ForSequenceClassification" if c.n_classes else "GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_positions": c.block_size,
            "n_ctx": c.block_size,
            "vocab_size": c.vocab_size,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_embd": c.n_embd,
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "resid_pdrop": c.dropout,
            "bos_token_id": c.vocab_size - 1,
            "eos_token_id": c.vocab_size - 1,
            "tie_word_embeddings": True,
            "torch_dtype": str(tensors["transformer.wte.weight"].dtype).removeprefix("torch."),
        }
        if c.n_classes:
            config |= {"id2label": {i: f"LABEL_{i}" for i in range(c.n_classes)}, "pad_token_id": c.vocab_size - 1}
        os.makedirs(directory, exist_ok=True)
        write_tensors(os.path.join(directory, "model.safetensors"), tensors, f"n_head={self.config.n_head}")
        write_json(os.path.join(directory, "config.json"), config)


def pick_token(logits, temperature, top_k):  # (B, V) -> (B,)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# --- finding and reading checkpoints -------------------------------------------------------------


def find_checkpoint(name):
    """(config.json, [safetensors files]) of a model's name or directory; from the hub's cache if it is there."""
    if name in HUB_MODELS:
        from huggingface_hub import snapshot_download

        wanted = {"repo_id": HUB_MODELS[name], "allow_patterns": ["config.json", "model.safetensors"]}
        try:
            directory = snapshot_download(local_files_only=True, **wanted)
            cached = os.path.exists(os.path.join(directory, "model.safetensors"))
        except OSError:  # not in the cache
            cached = False
        try:
            directory = directory if cached else snapshot_download(**wanted)
        except Exception as e:  # the client's own, and those of the HTTP library that its version uses
            reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
            raise FileNotFoundError(
                f"init_from={name}: cannot reach the hub for {HUB_MODELS[name]} ({reason}). Offline, the same runs "
                "on the shipped model: python train.py configs/finetune_mini_config.py"
            ) from e
    elif name == "gpt2-mini":
        directory = MINI
    elif os.path.isdir(name):
        directory = name
    else:
        known = ", ".join([*HUB_MODELS, "gpt2-mini"])
        raise FileNotFoundError(f"init_from={name}: no such directory; type one that exists, or one of {known}")
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                files = sorted(set(json.load(f)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is damaged: {e!r}") from e
    else:
        files = ["model.safetensors"]
    paths = [os.path.join(directory, os.path.basename(f)) for f in ["config.json", *files]]
    for path in paths:
        if not os.path.isfile(path):
            hint = " (run configs/pretrain_mini_config.py to make it)" if name == "gpt2-mini" else ""
            raise FileNotFoundError(f"init_from={name}: {path} is missing{hint}")
    return paths[0], paths[1:]


def context_size(name):
    """Tokens that a checkpoint's positions reach; None for "scratch"."""
    return None if name == "scratch" else read_config(find_checkpoint(name)[0])["block_size"]


def read_config(path):
    """GPTConfig's fields from a Hugging Face config.json; ValueError for what this GPT-2 does not compute."""
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged or no GPT-2 config: {e!r}") from e
    for key, values in COMPUTED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key}={config[key]!r}, but this GPT-2 computes {values[0]!r}")
    if config.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise ValueError(f"{path}: n_inner={config['n_inner']}, but this GPT-2's MLP is {4 * sizes['n_embd']} wide")
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {SIZES[key]}={value!r} is no size")
    if config.get("architectures") == ["GPT2ForSequenceClassification"]:
        sizes["n_classes"] = len(config.get("id2label") or (0, 1))  # transformers leaves two classes out
    return sizes


SIZES = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
COMPUTED = {  # key: the values that mean what is computed here, the default first
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}


# --- where and in what to compute ----------------------------------------------------------------


def keep_memory():
    """Freed tensors stay with the process: glibc would give large ones back and fault them in again at each
    step, a third of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not shrunk


def pick_device(device="auto"):
    """ "auto": cuda, else mps, else cpu. ValueError if the device cannot be had."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device={device}: not on this machine ({str(e).splitlines()[0]}); type --device=cpu") from e
    return device


def pick_dtype(device, dtype="auto"):
    """ "auto": bfloat16 where the hardware multiplies in it, float16 on older GPUs, else float32."""
    on_cuda = device.startswith("cuda")
    bf16_cuda = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        if on_cuda:
            dtype = "bfloat16" if bf16_cuda else "float16"
        else:
            cpu_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            dtype = "bfloat16" if device == "cpu" and cpu_bf16() else "float32"
    elif dtype == "bfloat16" and on_cuda and not bf16_cuda:
        raise ValueError(f"dtype=bfloat16: {torch.cuda.get_device_name()} has none; type --dtype=float16")
    elif dtype == "float16" and not on_cuda:
        raise ValueError(f"dtype=float16 is orders of magnitude too slow on {device}; type --dtype=auto")
    return getattr(torch, dtype)
