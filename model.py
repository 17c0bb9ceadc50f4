"""GPT-2, written out, with LoRA in its linear layers.

"Language Models are Unsupervised Multitask Learners", Radford et al. 2019, section 2.3, and its code: pre-norm
blocks, tanh-GELU, learned positions, the output head tied to the word embedding. Module names are Hugging Face's
(`transformer.h.0.attn.c_attn` ...), so checkpoints map by name.

Shapes: B rows of T tokens, C = n_embd, H heads of D = C / H, V = vocab_size; K tokens are looked at, N places scored.
Between the layers x is flat, a row for each token: (R, C), R = B T (P + B T after a prefix of P tokens, see below).
Numbers behind shapes are gpt2-medium's with 8 reviews: B = 8, T = 52, R = 416, C = 1024, H = 16, D = 64, V = 50257.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear
from plumbing.adapters.layers import lora_layers, merged_weight
from plumbing.adapters.own_lora import check_layers, draw_adapter
from plumbing.gpt2.batch import find_scored
from plumbing.gpt2.files import find_model, read_model_config, read_weights, write_model
from plumbing.gpt2.kv_cache import KVCache, causal_mask, put_before
from plumbing.program.errors import compile_pattern

LONG = 512  # tokens: beyond this, attention written out takes more time and memory than torch's fused kernel


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
    lora_targets: str = r"attn\.c_(attn|proj)$"  # regular expression: the linear layers that get an adapter
    n_classes: int = 0  # > 0: a linear `score` of that many classes in place of the vocabulary's head

    def lora(self, name: str) -> dict:
        """LoRALinear's arguments for the layer of this name: rank 0 where `lora_targets` does not find it."""
        found = compile_pattern("lora_targets", self.lora_targets).search(name)
        rank = self.lora_rank if found else 0
        return {"lora_rank": rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


# --- attention -------------------------------------------------------------------------------------


def attend(q, k, v, mask=None, dropout=0.0):  # (B, H, T, D), k and v (B, H, K, D) -> (B, H, T, D)
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al. 2017, section 3.2.1):
    softmax(q k^T / sqrt(D) + mask) v. mask: 0 where a token may look and minus infinity elsewhere, of a shape that
    broadcasts to (B, H, T, K). None: T = K tokens, and each looks at itself and at those before it."""
    if is_fused(q, k.size(2)):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q)
    scores = (q / math.sqrt(q.size(-1))) @ k.mT + mask  # (8, 16, 52, 64) @ (8, 16, 64, 52) -> (8, 16, 52, 52)
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v


def is_fused(q, K):
    """Whether torch's fused kernel computes attention to K tokens. It never holds all the weights. On Apple's mps it
    has been wrong without an error (pytorch issues 163597, 181133, 184180, 195910)."""
    return q.is_cuda or (q.is_cpu and K > LONG)


def split_heads(qkv):  # (B, T, 3, H, D) -> q, k and v, each (B, H, T, D)
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def join_heads(y):  # (B, H, T, D) -> (B T, C)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


class Attention(nn.Module):
    # task
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        name = f"transformer.h.{layer}.attn"
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = LoRALinear(C, 3 * C, **config.lora(f"{name}.c_attn"))  # query, key and value in one product
        self.c_proj = LoRALinear(C, C, **config.lora(f"{name}.c_proj"))
        self.resid_dropout = nn.Dropout(config.dropout)

    # seen: what the tokens see besides themselves (class Seen, below); seen.P is 0 without a shared prefix.
    def forward(self, x, seen, scored=None):  # (R, C) -> (R, C), or (N, C) of the scored places
        qkv = self.c_attn(x).view(len(x), 3, self.n_head, -1)  # (416, 1024) -> (416, 3072) -> (416, 3, 16, 64)
        dropout = self.dropout if self.training else 0.0
        if seen.P:
            y = attend_with_prefix(qkv, seen, dropout)  # (R, C); below
        else:
            q, k, v = split_heads(qkv.unflatten(0, (seen.B, -1)))  # each (8, 16, 52, 64)
            if seen.past is not None:
                k, v = seen.past.extend(self.layer, k, v)
            y = join_heads(attend(q, k, v, seen.mask, dropout))  # (416, 1024)
        if scored is not None:
            y = y[scored]
        return self.resid_dropout(self.c_proj(y))


# --- the other layers ------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    def forward(self, x):  # weights that train are float32 while x may be bfloat16
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Head(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """Never called: only its weight is read. attach_lora refuses this base class, as its hooks would do nothing."""


class MLP(nn.Module):
    # task
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        name = f"transformer.h.{layer}.mlp"
        self.c_fc = LoRALinear(C, 4 * C, **config.lora(f"{name}.c_fc"))
        self.c_proj = LoRALinear(4 * C, C, **config.lora(f"{name}.c_proj"))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (416, 1024) -> (416, 4096)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config, layer)

    def forward(self, x, seen, scored=None):  # (R, C) -> (R, C), or (N, C) of the scored places
        y = self.attn(self.ln_1(x), seen, scored)
        if scored is not None:  # only now: the keys and values of attention came from every token
            x = x[scored]
        x = x + y
        return x + self.mlp(self.ln_2(x))


# --- a prefix that all rows share ------------------------------------------------------------------


@dataclass
class Seen:
    """What the tokens of a call see besides themselves, the same in every layer.

    The prompts of a batch begin with the same P tokens, the prefix. It goes through each layer once, in the same
    matrix multiplications as the rows: x is (P + B T, C), first the prefix, then the rows. Of 8 reviews that begin
    with the same 18 of their 52 tokens, R = 18 + 8 * 34 = 290 tokens are computed, not 8 * 52 = 416. Without dropout
    every number and gradient is the same, to rounding. (A pass of its own for the prefix, through a KVCache, took 1
    to 16 % longer on two CPU cores.)
    """

    B: int
    T: int  # without the prefix
    P: int  # 0: no prefix
    past: KVCache | None  # keys and values of earlier calls; then there is no prefix
    mask: torch.Tensor | None = None  # as for attend
    places: torch.Tensor | None = None  # (P + B T,): the tokens of x among those of whole rows; for the fused kernel

    def look_at_prefix(self, like: torch.Tensor) -> None:
        """Each row sees the prefix before it. like: a tensor of x's dtype and device."""
        P, T = self.P, self.T
        if is_fused(like, P + T):
            whole = torch.arange(self.B * (P + T), device=like.device).view(self.B, P + T)
            self.places = torch.cat([whole[0, :P], whole[:, P:].flatten()])  # P = 2, T = 1, B = 2: 0, 1, 2, 5
        else:
            self.mask = causal_mask(T, P + T, like)


def attend_with_prefix(qkv, seen, dropout):  # (P + B T, 3, H, D) -> (P + B T, C)
    """The prefix attends to itself, each row to the prefix and to itself."""
    prefix_qkv, row_qkv = qkv.split([seen.P, seen.B * seen.T])
    row_qkv = row_qkv.unflatten(0, (seen.B, -1))  # (B, T, 3, H, D)
    # For the fused kernel. A GPU often finishes sooner than Python launches its kernels. Attention of whole rows,
    # prefix and all, takes 10 kernels a layer instead of 17.
    if seen.places is not None:
        whole_qkv = torch.cat([prefix_qkv.expand(seen.B, -1, -1, -1, -1), row_qkv], dim=1)  # (B, P + T, 3, H, D)
        y = join_heads(attend(*split_heads(whole_qkv), dropout=dropout))  # (B (P + T), C)
        return y.index_select(0, seen.places)
    # A copy: a view would keep all of qkv in memory until the backward pass.
    prefix_q, prefix_k, prefix_v = split_heads(prefix_qkv.clone()[None])  # each (1, H, P, D)
    q, k, v = split_heads(row_qkv)  # each (B, H, T, D)
    k = put_before(prefix_k, k)  # (B, H, P + T, D)
    v = put_before(prefix_v, v)
    prefix_y = attend(prefix_q, prefix_k, prefix_v, None, dropout)
    y = attend(q, k, v, seen.mask, dropout)
    return torch.cat([join_heads(prefix_y), join_heads(y)])


# --- the model -------------------------------------------------------------------------------------


class GPT(nn.Module):
    """The language model; with config.n_classes > 0 a classifier on the last token's state."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        self.config = config
        self.compute_dtype = None  # None: that of the word embedding
        self.transformer = nn.ModuleDict(
            {
                "wte": make_embedding(config.vocab_size, config.n_embd),
                "wpe": make_embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, eps=1e-5),
            }
        )
        if config.n_classes:
            self.score = Head(config.n_embd, config.n_classes, bias=False)
        else:
            self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
            self.lm_head.weight = self.transformer.wte.weight  # tied
        self.adapted = list(lora_layers(self).values())
        if config.lora_rank and not self.adapted:
            raise ValueError(
                f"lora_targets={config.lora_targets!r} matches no layer, such as transformer.h.0.attn.c_attn, or "
                "LoRALinear has no nn.Parameter lora_A"
            )
        if self.transformer.wte.weight.device.type != "meta":  # meta: shapes without numbers (from_pretrained)
            self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, param in self.named_parameters():
            if name.endswith("c_proj.weight"):  # residual projections start smaller (section 2.3)
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, past=None, prefix=None, class_weights=None, scored=None):
        """idx (B, T) token ids -> (logits, loss), as nanoGPT's.

        Without targets: logits (B, 1, V) of the last position, and None.
        With targets: logits (N, V) of the scored positions alone, in reading order, and their mean cross-entropy.

        targets (B, T)  at each position the id that should follow; negative where nothing is scored. A classifier's
                        are classes, at each text's last token.
        past            a KVCache of earlier tokens. Rows may differ in length: it knows their positions and padding.
        prefix (1, P)   token ids before every row; not beside a past. Gradient flows through past and prefix.
        class_weights   (n_classes,): the mean is a weighted one
        scored (N,)     the scored targets' places in targets.flatten(), where they are known. Without it they are
                        found here, and Python waits for the GPU to say how many there are.
        """
        if targets is None:
            logits = self.head(self.last_states(idx, past, prefix))  # (B, V)
            return logits[:, None], None
        # Only at 2 of a review's 52 places is the next token scored: 2 times 50,257 logits, not 52 times.
        if scored is None:
            scored = find_scored(targets)
        logits = self.head(self.hidden(idx, past, prefix, scored))  # (N, V)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = None if class_weights is None else class_weights.to(precise.dtype)
        return logits, F.cross_entropy(precise, targets.flatten()[scored], weight)

    def hidden(self, idx, past=None, prefix=None, scored=None) -> torch.Tensor:
        """The last layer's normalised states: idx (B, T) -> (B, T, C). With scored (N,), places in idx.flatten(), the
        last layer computes these alone: -> (N, C). past, prefix: as above. Raises ValueError beyond the context."""
        B, T = idx.shape
        P = 0 if prefix is None else prefix.size(1)
        n_before = P + (0 if past is None else past.length)
        if n_before + T > self.config.block_size:
            raise ValueError(f"{n_before + T} tokens exceed the context of {self.config.block_size}")
        if past is not None and P:
            raise ValueError("a prefix or a past, not both")
        t = self.transformer
        like = torch.empty(0, dtype=self.compute_dtype or t.wte.weight.dtype, device=idx.device)  # x has its dtype
        seen = Seen(B, T, P, past)
        tokens = idx.flatten()  # (R,)
        pos = torch.arange(P, P + T, device=idx.device).repeat(B)  # (R,): where each token stands
        if past is not None:  # the rows go on after its tokens, and may look at them
            pos, seen.mask = past.place(B, T, like)
            pos = pos.flatten()
        elif P:
            seen.look_at_prefix(like)
            tokens = torch.cat([prefix.flatten(), tokens])  # (P + B T,)
            pos = torch.cat([torch.arange(P, device=idx.device), pos])
        x = F.embedding(tokens, t.wte.weight) + F.embedding(pos, t.wpe.weight)  # (P + B T, C)
        x = t.drop(x.to(like.dtype))
        for block in t.h[:-1]:
            x = block(x, seen)
        if scored is not None:
            return t.ln_f(t.h[-1](x, seen, P + scored))  # (N, C)
        x = t.ln_f(t.h[-1](x, seen))  # (P + B T, C)
        return x[P:].unflatten(0, (B, T))  # (B, T, C)

    def last_states(self, idx, past=None, prefix=None):  # (B, T) -> (B, C), each row's last
        B, T = idx.shape
        return self.hidden(idx, past, prefix, scored=torch.arange(T - 1, B * T, T, device=idx.device))

    def head(self, x: torch.Tensor) -> torch.Tensor:  # (..., C) -> (..., V), or (..., n_classes)
        head = self.score if self.config.n_classes else self.lm_head
        return F.linear(x, head.weight.to(x.dtype))

    # --- writing

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, past=None) -> torch.Tensor:
        """Continues idx (B, T) by up to max_new_tokens: returns (B, T + n), n at most max_new_tokens.

        temperature 0 takes the likeliest token; top_k samples among the k likeliest. After the token `stop` the rest
        of its row is filled with `stop`. past: a KVCache of tokens before idx, left as it is. A text that fills the
        context goes on from its last block_size / 2 tokens; with past it raises ValueError.
        """
        B, T = idx.shape
        size = self.config.block_size
        n_prompt = T + (0 if past is None else past.length)
        if past is not None and n_prompt + max_new_tokens - 1 > size:  # the last new token is not read again
            raise ValueError(f"{n_prompt} prompt tokens and {max_new_tokens} new ones exceed the context of {size}")
        cache = KVCache() if past is None else past.fork()
        out = idx.new_full((B, max_new_tokens), 0 if stop is None else stop)
        rows = torch.arange(B, device=idx.device)  # those that are still being written
        new = idx[:, -size:]
        for n in range(max_new_tokens):
            if cache.length == size:  # the context is full: each text starts again from its last tokens
                cache = KVCache()
                new = torch.cat([idx, out[:, :n]], dim=1)[rows, -(size // 2) :]
            token = self.pick_token(self.last_states(new, cache), temperature, top_k)  # (rows, C) -> (rows,)
            out[rows, n] = token
            is_last = n + 1 == max_new_tokens
            if stop is not None and not is_last:  # a finished row costs nothing more
                goes_on = (token != stop).nonzero()[:, 0]  # Python waits for the GPU here, and nowhere else
                if len(goes_on) == 0:
                    return torch.cat([idx, out[:, : n + 1]], dim=1)
                if len(goes_on) < len(rows):
                    rows = rows[goes_on]
                    token = token[goes_on]
                    cache.keep(goes_on)
            new = token[:, None]
        return torch.cat([idx, out], dim=1)

    def pick_token(self, x, temperature, top_k):  # (B, C) -> (B,)
        if temperature == 0:
            return self.exact_logits(x).argmax(-1)
        logits = self.head(x).float() / temperature  # (B, V)
        if top_k:
            least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    def exact_logits(self, x, words=None):  # (B, C), (B, m) -> (B, V)
        """Logits to compare. bfloat16 has 8 bits: near -100, where the real GPT-2's logits lie, its numbers are 0.5
        apart, and two words often get the same one. So those of the 16 likeliest words, and of `words`, are computed
        again in float32. (We never saw as many as 16 within one step of the best.)"""
        logits = self.head(x)
        precise = torch.promote_types(logits.dtype, torch.float32)
        if logits.dtype == precise:
            return logits
        likeliest = logits.topk(min(16, logits.size(-1))).indices  # (B, 16)
        words = likeliest if words is None else torch.cat([likeliest, words], dim=1)
        weights = self.lm_head.weight[words].to(precise)  # (B, 16 + m, C)
        exact = (weights @ x.to(precise)[:, :, None])[..., 0]  # (B, 16 + m)
        return logits.to(precise).scatter(1, words, exact)

    # --- storage

    def set_dtype(self, dtype: torch.dtype) -> "GPT":
        """Computes in `dtype`. Frozen parameters are stored in it; adapters and what trains stay float32."""
        self.compute_dtype = dtype
        training = self.training
        self.train()  # nothing is merged while the weights change
        for name, param in self.named_parameters():
            if not param.requires_grad and "lora_" not in name:
                param.data = param.data.to(dtype)
        return self.train(training)

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype = torch.float32, **overrides) -> "GPT":
        """A model from Hugging Face's GPT-2 layout: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (from the hub,
        cached), "gpt2-mini" (ships here) or a directory. Only safetensors, never a pickle.

        overrides: fields of GPTConfig (lora_rank, dropout ...). Raises FileNotFoundError, or ValueError naming the
        file and what is wrong with it.
        """
        config_path, files = find_model(name)
        config = GPTConfig(**(read_model_config(config_path) | overrides))
        with torch.device("meta"):  # shapes only: no time is spent on weights that are about to be replaced
            model = cls(config)
        check_layers(model, LoRALinear, config.lora_rank)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_" not in n}
        state = read_weights(files, config.n_head, shapes, dtype)
        if config.n_classes and "score.weight" not in state:  # a new head on a language model
            state["score.weight"] = torch.randn(config.n_classes, config.n_embd, dtype=dtype) * 0.02
        for layer in lora_layers(model).values():
            draw_adapter(layer, dtype)  # A and B get their numbers here; float32, or float64 if dtype is float64
        # assign: the tensors of `state` become the parameters. Parameters on the meta device have no memory to copy
        # numbers into. strict=False: `state` has no A and B, which draw_adapter has made.
        model.load_state_dict(state, strict=False, assign=True)
        if not config.n_classes:
            model.lm_head.weight = model.transformer.wte.weight  # one tensor again
        return model

    def save_pretrained(self, directory: str, dtype: torch.dtype | None = None, **options) -> None:
        """Writes Hugging Face's GPT-2 layout: config.json and model.safetensors, adapters merged in.
        dtype: that of the file (None: as the parameters are). options: write_model's."""
        merged = {f"{name}.weight": merged_weight(layer) for name, layer in lora_layers(self).items()}
        tensors = {n: merged.get(n, p) for n, p in self.named_parameters() if "lora_" not in n}
        write_model(directory, self.config, tensors, dtype, **options)


def make_embedding(n, n_embd):
    """Without nn.Embedding's random numbers: drawing them takes a second, and they are replaced anyway."""
    return nn.Embedding.from_pretrained(torch.empty(n, n_embd), freeze=False)
