"""Pre-trains a small GPT-2 on plain text, as gpt2-mini was: by train.py's own loop.

    python -m tools.pretrain --dataset=reviews.parquet
    python -m tools.pretrain --init_from=resume --out_dir=out-pretrain

The model is written into out_dir in Hugging Face's format: a base for train.py's --init_from.
"""

import glob
import hashlib
import itertools
import math
import os
import re
import sys
from dataclasses import dataclass

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

from configurator import Config, configure
from model import GPT, GPTConfig, LoRALinear
from plumbing.data.readers import read_columns
from plumbing.data.token_cache import cache_folder, hash_files, read_meta, whole_folder, write_meta
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.base import check_base, check_base_stays
from plumbing.gpt2.batch import Batch, find_scored
from plumbing.program.errors import one_line_errors
from plumbing.program.settings import CALL, MODEL, RUN, setting
from plumbing.program.terminal import forgiving_output
from plumbing.running.checkpoint import check_same_data, locked_folder
from plumbing.running.endings import explain_failure
from plumbing.running.machine import start_machine
from plumbing.running.optimizers import build_optimizers
from train import Run, make_run, open_folder, print_end, print_start, run_updates


@dataclass
class PretrainConfig(Config):
    """Pre-trains a small GPT-2 on plain text. The defaults are those of gpt2-mini."""

    # --- pre-training
    init_from: str = "scratch"  # scratch, resume, or a model to go on with
    out_dir: str = setting("out-pretrain", kept=CALL)  # where everything is written
    dataset: str = setting("rt_reviews", kept=RUN)  # a file or directory of text (txt, csv, jsonl, parquet)
    label_names: str | None = None  # not used
    rank: int = setting(0, least=0, most=0, kept=MODEL)  # every weight is trained
    dropout: float = setting(0.0, least=0, most=0.999, kept=RUN)  # on embeddings, attention and residuals
    n_layer: int = setting(6, least=1, kept=MODEL)  # layers (n_layer to block_size: for init_from=scratch)
    n_head: int = setting(4, least=1, kept=MODEL)  # attention heads
    n_embd: int = setting(256, least=1, kept=MODEL)  # width
    block_size: int = setting(1024, least=1, kept=MODEL)  # context in tokens
    lowercase_share: float = setting(0.33, least=0, most=1, kept=RUN)  # of the texts: lower-cased, spaced punctuation
    train_context: int = setting(256, least=1, kept=RUN)  # tokens in a training row
    n_sampled: int = setting(3000, least=0, kept=RUN)  # softmax over the batch's words and so many others; 0: all
    max_iters: int = setting(5000, least=1)  # updates: 41 million tokens
    lr: float = setting(2e-3, least=0)  # peak learning rate of AdamW
    muon_lr: float = setting(0.02, least=0, kept=RUN)  # that of Muon, for the blocks' matrices; 0: AdamW for all
    warmup_iters: int = setting(100, least=0)  # updates over which the learning rate rises
    decay_share: float = setting(0.7, least=0, most=1)  # last share of the run: lr falls to 0 in it
    eval_interval: int = setting(250, least=1)  # updates between evaluations
    eval_iters: int = setting(75, least=0)  # batches of 1,024 tokens in an evaluation; 0: the whole validation split
    save_interval: int = setting(50, least=0)  # updates between checkpoints; 0: only after evaluations


# --- the model and its optimizers ------------------------------------------------------------------


class SampledGPT(GPT):
    """A GPT whose loss is over some of the vocabulary in training: the whole costs more than the layers."""

    n_sampled = 0

    def forward(self, idx, targets=None, **options):
        if targets is None or not (self.training and self.n_sampled):
            return super().forward(idx, targets, **options)
        scored = find_scored(targets)  # all, but where rows are filled up
        x = self.hidden(idx).flatten(0, 1)[scored]  # (N, C)
        logits, targets = sample_softmax(self.lm_head.weight, x, targets.flatten()[scored], self.n_sampled)
        return logits, F.cross_entropy(logits.float(), targets)


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


def add_muon(config, model) -> list:
    """AdamW, and Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the blocks' matrices.
    Raises ValueError where torch has none."""
    if not config.muon_lr:
        return build_optimizers(config, model)
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon_lr={config.muon_lr} needs torch 2.9, this is {torch.__version__}; type --muon_lr=0")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    for group in muon.param_groups:
        group["peak_lr"] = config.muon_lr
    return [*build_optimizers(config, model, left_out=matrices), muon]


# --- the text --------------------------------------------------------------------------------------

SPLITS = ("train", "validation")
VALIDATION_SHARE = 656 / 65536  # 1 % of the documents


class TextLoader:
    """Documents one after another with end-of-text between, cut into rows of `context` tokens that are shuffled
    again in each epoch. 1 % of the documents, chosen by their content, are the validation split.

    `digest` tells the content of the text. Tokens lie in the cache as a memory map, in a folder named after the
    content and the way it was read.
    Raises ValueError, naming the value, for text that cannot be used.
    """

    def __init__(self, dataset, context=256, text_field="text", lowercase_share=0.0, seed=1337):
        self.context = context
        self.seed = seed
        self.batch_size = max(1, 1024 // context)  # of an evaluation: every token is scored over the whole vocabulary
        self.label_names = self.word_of = None  # plain text has none
        self.drawn = ()  # the documents of each split follow from their content, whatever the seed
        if not os.path.exists(dataset):
            raise ValueError(f"dataset={dataset}: no such file or directory; pretrain reads local text")
        files = [dataset]
        if os.path.isdir(dataset):
            files = sorted(f for f in glob.glob(os.path.join(glob.escape(dataset), "*")) if os.path.isfile(f))
        self.digest = hash_files(files)
        folder = cache_folder("text", f"4 {text_field} {lowercase_share} {self.digest}")
        self.meta = read_meta(folder) or tokenise_text(files, folder, text_field, lowercase_share)
        self.tokens = {}
        for split in SPLITS:
            n = self.meta[f"{split}_tokens"]
            if n <= 2 * context + 1:
                raise ValueError(f"dataset={dataset}: {n} {split} tokens are too few for rows of {context}")
            self.tokens[split] = np.memmap(os.path.join(folder, f"{split}.bin"), np.uint16, "r")

    def batch(self, split, starts):
        """The Batch of the rows that begin at these tokens: each token's target is the next one."""
        rows = np.stack([self.tokens[split][start : start + self.context + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        no_prefix = torch.empty(1, 0, dtype=torch.long)
        return Batch(no_prefix, rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def order(self, split, size, epoch=None):
        """Arrays of `size` rows' starts each, shuffled by seed and epoch; without an epoch as they stand."""
        last = len(self.tokens[split]) - self.context - 1
        starts = np.arange(0, last, self.context)
        if epoch is not None:  # the first token moves with the epoch, so cuts fall elsewhere
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(self.context))
            starts = rng.permutation(np.arange(offset, last, self.context))
        return [starts[i * size : (i + 1) * size] for i in range(self.n_batches(split, size))]

    def n_batches(self, split, size):
        # The least that any epoch has, so that every epoch has as many.
        return max(1, (len(self.tokens[split]) - 2 * self.context - 1) // self.context // size)

    def n_scored(self, split, starts):
        return len(starts) * self.context

    def bits_per_byte(self, split, loss):
        """A loss in nats per token as bits per byte of text, which no tokeniser can flatter."""
        return loss / math.log(2) * self.meta[f"{split}_tokens"] / max(1, self.meta[f"{split}_bytes"])


def tokenise_text(files, folder, text_field, lowercase_share):
    """Writes the token files of both splits into `folder`. Returns what its meta.json says."""
    sizes = {f"{split}_{unit}": 0 for split in SPLITS for unit in ("tokens", "bytes")}
    with whole_folder(folder) as new:
        for column, _ in itertools.chain.from_iterable(read_columns(path, (text_field,)) for path in files):
            prepared = [prepare_text(text or "", lowercase_share) for text in column.to_pylist()]
            for split in SPLITS:
                texts = [text for its, text in prepared if its == split]
                rows = gpt2_encoding().encode_ordinary_batch(texts, num_threads=os.cpu_count())
                with open(os.path.join(new, f"{split}.bin"), "ab") as f:
                    f.writelines(np.array([*row, end_of_text()], np.uint16).tobytes() for row in rows)
                sizes[f"{split}_tokens"] += sum(map(len, rows)) + len(rows)
                sizes[f"{split}_bytes"] += sum(len(text.encode()) for text in texts)
        return write_meta(new, **sizes)


def prepare_text(text, lowercase_share):
    """(split, text) of a document; its own hash decides on the split and on the spelling."""
    text = re.sub(r"<br\s*/?>", "\n", text).strip()
    digest = hashlib.sha256(text.encode()).digest()
    split = "validation" if int.from_bytes(digest[2:4], "big") / 65536 < VALIDATION_SHARE else "train"
    if digest[1] / 256 < lowercase_share:
        text = lowercase_spaced(text)
    return split, text


def lowercase_spaced(text):
    """As the reviews of `rotten_tomatoes` are written: "it's a charming , often affecting journey ." """
    text = re.sub(r"\s*(--|[.,!?;:()\"])\s*", r" \1 ", text.lower())
    return re.sub(r" +", " ", text).strip()


# --- the program -----------------------------------------------------------------------------------


def set_up(config: PretrainConfig) -> Run:
    """Text, model and optimizers. Raises ValueError or OSError for what cannot be had."""
    processes, dtype = start_machine(config, LoRALinear)
    check_base(config)
    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
        model = SampledGPT(GPTConfig(**sizes, dropout=config.dropout))
    else:
        model = SampledGPT.from_pretrained(config.init_from, dropout=config.dropout)
    model.n_sampled = config.n_sampled
    model = model.to(processes.device).set_dtype(dtype)
    context = min(config.train_context, model.config.block_size)
    loader = TextLoader(config.dataset, context, config.text_field, config.lowercase_share, config.seed)
    check_same_data(config, loader)
    run = make_run(config, processes, dtype, loader, model)
    run.optimizers = add_muon(config, model)
    return run


def main(config: PretrainConfig) -> None:
    with one_line_errors():
        check_base_stays(config)
    with locked_folder(config.out_dir), explain_failure(config):
        with one_line_errors():
            run = set_up(config)
            progress = open_folder(run)
        print_start(run, progress)
        run_updates(run, progress)
        print_end(run, progress)
    bits = run.loader.bits_per_byte("validation", progress.best)
    print(f"{bits:.4f} bits a byte after {progress.iter * run.global_batch * run.loader.context:,} tokens")


if __name__ == "__main__":
    with forgiving_output():
        main(configure(sys.argv[1:], cls=PretrainConfig))
