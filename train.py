"""Fine-tunes GPT-2 with LoRA (or, with rank=0, all of its weights), evaluates, saves, logs.

    python train.py configs/finetune_params_config.py --rank=16
    python train.py --init_from=resume --out_dir=out
    python train.py configs/finetune_params_config.py --auto_resume=True    begins, or resumes from a checkpoint
    torchrun --standalone --nproc_per_node=2 train.py configs/finetune_params_config.py

In out_dir: adapter_model.safetensors and adapter_config.json (the best adapter, PEFT's format) or, without
LoRA, model.safetensors and config.json; checkpoint.pt (to resume from), train_config.json, metrics.jsonl,
loss.png, README.md. Training only computes losses; generate.py finds the accuracy.
"""

import contextlib
import itertools
import math
import operator
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import numpy as np
import torch
from torch import nn

from configurator import Config, Facts, configure
from dataloader import CustomDataLoader, make_loader
from plumbing.adapters.layers import cast_together, lora_arguments
from plumbing.adapters.own_lora import check_frozen, check_start
from plumbing.adapters.peft_format import ADAPTER_WEIGHTS, save_adapter
from plumbing.adapters.trainable import also_trained, parameter_report, train_also
from plumbing.gpt2 import cuda_graphs
from plumbing.gpt2.base import check_base, check_base_stays, fingerprint_base
from plumbing.gpt2.batch import Batch
from plumbing.gpt2.files import context_size
from plumbing.gpt2.memory import check_weights
from plumbing.program.errors import one_line_errors
from plumbing.program.files import make_folder, write_weights
from plumbing.program.stored_run import write_run
from plumbing.program.terminal import forgiving_output
from plumbing.running.checkpoint import Progress, begin_or_resume, check_same_data, locked_folder, write_metrics
from plumbing.running.endings import exit_diverged, explain_failure
from plumbing.running.machine import Processes, read_torchrun, seed_generator, start_machine
from plumbing.running.optimizers import build_optimizers
from plumbing.running.saving import Saver, Stopwatch, open_bar, print0
from plumbing.running.wandb_run import WandbRun
from plumbing.scoring.loss_plot import plot_losses
from plumbing.scoring.model_card import write_card

with one_line_errors(ImportError):  # a lora.py of your own may need a package
    from lora import mark_only_lora_as_trainable
    from model import GPT, LoRALinear


@dataclass
class Run:
    """What an update and an evaluation need."""

    config: Config
    processes: Processes
    dtype: torch.dtype  # of the arithmetic
    loader: CustomDataLoader
    model: GPT
    params: list[nn.Parameter]  # those that train
    optimizers: list
    # For float16, whose smallest number is 6e-8. The scaler multiplies the loss, and so all gradients, by a large
    # number, and divides the gradients by it before the step. In another dtype it changes nothing.
    scaler: torch.amp.GradScaler

    @property
    def global_batch(self) -> int:
        """Examples in an update, over all processes."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def n_batches(self) -> int:
        """Updates in an epoch."""
        return self.loader.n_batches("train", self.global_batch)


# --- the loop --------------------------------------------------------------------------------------


def train(config: Config) -> list[dict]:
    """Runs the training of a config. Returns the metrics of its evaluations: the lines of metrics.jsonl.

    Ends the program with one line: exit code 2 after a mistake, 3 where loss or gradient are not finite, 128 + its
    number after a signal.
    """
    with one_line_errors():
        run = set_up(config)
        progress = open_folder(run)
    print_start(run, progress)
    run_updates(run, progress)
    print_end(run, progress)
    if run.processes.is_first:
        write_card(config, run.loader)
    run.processes.leave()
    return progress.metrics


def run_updates(run: Run, progress: Progress) -> None:
    """From where `progress` stands up to max_iters updates."""
    config = run.config
    wandb = WandbRun(config, run.processes.is_first)
    batches = (list(micro_batches(run, indices)) for indices in draw_batches(run, progress.iter))
    batch = next(batches)
    watch = Stopwatch(progress.iter)

    with open_bar(run, progress) as bar, Saver(run, progress) as saver:
        while True:
            it = progress.iter
            is_last = it >= config.max_iters

            is_due = it % config.eval_interval == 0 or is_last
            is_done = it == progress.evaluated_at  # by the run that is resumed
            has_none = progress.best == math.inf  # at the start, or after a resume with another eval_iters
            if (is_due and not is_done) or has_none:
                speed = watch.updates_per_s(it)
                metrics = record(run, progress, evaluate(run), speed, saver)
                wandb.log(metrics, it)
                saver.save_after_evaluation(is_last)
                watch = Stopwatch(it)
            if is_last:
                break

            # update calls the saver just before its step (after a signal the program ends there, too): the weights
            # have just given a finite loss and gradient, so a run that resumes from them does not resume from NaN.
            # It computes this gradient again.
            loss, was_skipped, batch = update(run, batch, it, batches, saver)
            progress.losses.append(loss)
            progress.skipped += was_skipped
            progress.iter += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    wandb.finish()


def update(run: Run, batch: Iterable[tuple[Batch, float]], it: int, batches: Iterator | None = None, saver=None):
    """Update `it`, on a global batch as `micro_batches` cuts it. Returns its mean loss; whether the step was skipped,
    because float16's gradients overflowed; and the next of `batches`. Ends the program where loss or gradient are not
    finite. Python waits for a GPU once: for loss and gradient norm. float16's scaler makes it wait a second time."""
    processes = run.processes
    for group in itertools.chain(*(optimizer.param_groups for optimizer in run.optimizers)):
        group["lr"] = group["peak_lr"] * schedule(run.config, it)
    # Dropout depends on seed, update and process alone: a resumed run draws the same, and no random state is stored.
    # (The factors are primes: another seed, update or process rarely gives the same sum.)
    seed = run.config.seed * 1_000_003 + it * 1009 + processes.world_rank
    seed_generator(processes.device, seed % 2**63)

    # --- forward and backward
    loss = 0.0
    for piece, share in batch:
        part = share * compute_loss(run.model, piece)
        run.scaler.scale(part).backward()
        loss += part.detach()
    processes.sum_gradients(run.params)

    # --- clip
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.params, run.config.grad_clip or math.inf)
    following = next(batches, None) if batches else None  # made while a GPU computes what has been launched so far
    is_stopped = saver is not None and saver.is_stopped()
    loss, norm, n_stopped = processes.totals([loss, norm / processes.world_size, is_stopped])  # sums
    overflowed = run.scaler.is_enabled() and not math.isfinite(norm)  # float16 does, now and then
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflowed):
        exit_diverged(run.config, processes.is_first, it, f"loss {loss}, gradient norm {norm}")
    if saver:
        saver.save_or_stop(n_stopped)

    # --- step
    for optimizer in run.optimizers:
        if not overflowed:
            run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()  # after an overflow to a smaller scale
    if overflowed and run.scaler.get_scale() < 1:
        what = "float16's gradients overflow at any scale (--dtype=float32 has the range)"
        exit_diverged(run.config, processes.is_first, it, what)
    return loss, overflowed, following


def compute_loss(model: GPT, batch: Batch) -> torch.Tensor:
    """Mean loss over a batch's targets. The prefix that the prompts share goes through the model once, with its
    gradient, and every row continues from it."""
    options = {"prefix": batch.prefix, "scored": batch.scored, "class_weights": batch.class_weights}
    # Inside, every layer's A and B are copies in the compute dtype, all made at once: on a GPU by two kernels in all.
    with cast_together(model.adapted if model.training else [], model.compute_dtype):
        _, loss = model(batch.idx, batch.targets, **options)
    return loss


def micro_batches(run: Run, indices: np.ndarray) -> Iterator[tuple[Batch, float]]:
    """The global batch in pieces of batch_size examples, of each piece this process's part; and its share of all
    scored tokens. Labels differ in length, so a mean of means is not the mean: 8 reviews with 17 scored tokens, out
    of 32 reviews with 70, count 17 / 70."""
    n_scored = run.loader.n_scored("train", indices)
    size = run.config.batch_size
    for start in range(0, len(indices), size):
        mine = indices[start : start + size][run.processes.world_rank :: run.processes.world_size]
        if len(mine):
            share = run.loader.n_scored("train", mine) / n_scored
            batch = run.loader.batch("train", mine)
            # --compile on a GPU records the kernels once for each shape. Rows of 16, 32 ... tokens have few shapes.
            if cuda_graphs.are_used(run.config, run.processes.device):
                batch = batch.widen(cuda_graphs.STEP, run.model.config.block_size)
            yield batch.to(run.processes.device), share


def draw_batches(run: Run, it: int) -> Iterator[np.ndarray]:
    """The indices of each global batch from update `it` on, epoch after epoch. An epoch's order follows from the seed
    and its number, so a resumed run goes on with the examples that would have come."""
    while True:
        epoch, place = divmod(it, run.n_batches)
        for indices in run.loader.order("train", run.global_batch, epoch)[place:]:
            yield indices
            it += 1


def schedule(config: Config, it: int) -> float:
    """The learning rate at update `it` as a share of its peak: a linear rise, a plateau, a linear fall to 0.

    The rise keeps the first steps small, while AdamW's moments know few gradients; the fall lets the weights settle.
    With warmup_iters=20, decay_share=0.9 and max_iters=320: 0.05, 0.1 ... 1 at update 19, 1 up to update 32, then
    down by 1 / 288 an update.
    """
    rise = (it + 1) / max(1, config.warmup_iters)
    fall = (config.max_iters - it) / max(1.0, config.decay_share * config.max_iters)
    return min(1.0, rise, fall)


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss over the validation split's targets, or over eval_iters batches of it, evenly spread."""
    loader = run.loader
    processes = run.processes
    batches = loader.order("validation", loader.batch_size)
    n_wanted = run.config.eval_iters
    # They are sorted from short to long texts. We cut the list into n_wanted parts and take the middle of each.
    if 0 < n_wanted < len(batches):
        batches = [batches[int((i + 0.5) * len(batches) / n_wanted)] for i in range(n_wanted)]
    losses = []
    counts = []
    run.model.eval()  # merges the adapters, too: an evaluation costs what the base model costs
    with cuda_graphs.left_out(run.config, processes.device):
        for indices in batches[processes.world_rank :: processes.world_size]:
            batch = loader.batch("validation", indices).to(processes.device)
            losses.append(compute_loss(run.model, batch))
            counts.append(loader.n_scored("validation", indices))
    run.model.train()
    losses = torch.stack(losses).tolist() if losses else []  # Python waits for a GPU here, and not at each batch
    total, count = processes.totals([sum(map(operator.mul, losses, counts)), sum(counts)])
    return total / count


# --- what a run is made of -------------------------------------------------------------------------


def set_up(config: Config) -> Run:
    """Data, model and optimizers of a config. Raises ValueError or OSError for what cannot be loaded."""
    if config.predict is not None:
        raise ValueError(f"--predict={config.predict} is for generate.py --init_from=resume, after the training")
    processes, dtype = start_machine(config, LoRALinear)  # a lora.py of your own may know float32 alone
    torch.manual_seed(config.seed)
    check_base(config)
    loader = make_loader(config, context_size(config.init_from))
    check_same_data(config, loader)
    n_classes = len(loader.label_names) if config.task == "classify" else 0
    model = build_model(config, processes.device, dtype, n_classes)
    return make_run(config, processes, dtype, loader, model)


def make_run(config: Config, processes: Processes, dtype: torch.dtype, loader, model: GPT) -> Run:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(config, model)
    scaler = torch.amp.GradScaler(processes.device.split(":")[0], enabled=dtype == torch.float16)
    # A scaler is made ready by its first scale(). A process may have no example in its first update, and unscale_
    # would then fail.
    scaler.scale(torch.zeros((), device=processes.device))
    if config.compile:
        cuda_graphs.compile_model(model, config, processes.device)
    return Run(config, processes, dtype, loader, model, params, optimizers, scaler)


# task
def build_model(config: Config, device: str, dtype: torch.dtype, n_classes: int = 0) -> GPT:
    """The base model of a config on its device, with new adapters, the right parameters trainable. (In a resumed run
    config.init_from is that run's base: `configure` has put it in the place of "resume".)"""
    options = lora_arguments(config) | {"lora_dropout" if config.rank else "dropout": config.dropout}
    also = also_trained(config)
    # What is frozen is stored in the compute dtype from the start; what trains stays float32.
    is_frozen = config.rank > 0 and config.lora_bias == "none" and not also
    stored = dtype if is_frozen else torch.float32
    model = GPT.from_pretrained(config.init_from, dtype=stored, n_classes=n_classes, **options)
    if config.rank:
        mark_only_lora_as_trainable(model)
        check_frozen(model)
        check_start(model)
    elif config.trainable:  # without LoRA: all is frozen here, and train_also frees what the pattern names
        model.requires_grad_(False)
    # A separate call: mark_only_lora_as_trainable of your own lora.py may have no other argument than the model.
    if config.lora_bias != "none" or also:
        train_also(model, config.lora_bias, also)
    check_weights(model, device)
    return model.to(device).set_dtype(dtype)


# --- what a run writes -----------------------------------------------------------------------------


def open_folder(run: Run) -> Progress:
    """The progress from which the run goes on. Writes its settings, including those typed when resuming, so each
    later resume keeps these too."""
    progress = begin_or_resume(run)
    if run.processes.is_first:
        make_folder(run.config.out_dir)
        write_config(run)
    return progress


def write_config(run: Run, model: dict[str, str] | None = None) -> None:
    """train_config.json: the run's settings, and what it has found out."""
    before = run.config.facts  # check_base has compared a resumed run's base with this
    base = before.base if before and before.base else fingerprint_base(run.config.init_from)
    dtype = str(run.dtype).removeprefix("torch.")
    facts = Facts(base, model, run.loader.digest, dtype, run.loader.label_names, run.loader.word_of)
    write_run(run.config, asdict(facts))


def record(run: Run, progress: Progress, val_loss: float, updates_per_s: float, saver: Saver) -> dict:
    """Prints an evaluation, adds it to the progress and to metrics.jsonl, and keeps the weights if they are the best.
    Returns its line of metrics.jsonl. Ends the program where the loss is not finite."""
    it = progress.iter
    if not math.isfinite(val_loss):
        exit_diverged(run.config, run.processes.is_first, it, f"validation loss {val_loss}")
    metrics = {"iter": it, "epoch": it / run.n_batches, "val_loss": val_loss}
    if progress.losses:
        metrics["train_loss"] = sum(progress.losses) / len(progress.losses)
    if updates_per_s:  # none were made since a run was resumed
        metrics["examples_per_s"] = updates_per_s * run.global_batch
    if run.scaler.is_enabled():
        metrics["skipped"] = float(progress.skipped)
    shown = [f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
    print0(run, f"update {it}: " + ", ".join(shown))
    progress.metrics.append(metrics)
    progress.losses = []
    if val_loss < progress.best:
        progress.best = val_loss
        save_best(run, saver)
    saver.write(write_metrics, run.config.out_dir, progress.metrics)
    return metrics


def save_best(run: Run, saver: Saver) -> None:
    """The adapter in PEFT's format or, without LoRA, the model in Hugging Face's."""
    config = run.config
    write = partial(saver.write, write_weights)  # a copy, in a thread: the loop goes on
    if run.processes.is_first and config.rank:
        options = {"bias": config.lora_bias, "also": also_trained(config), "rslora": config.rslora, "write": write}
        save_adapter(run.model, config.out_dir, config.init_from, **options)
    elif run.processes.is_first:
        run.model.save_pretrained(config.out_dir, dtype=run.dtype, write=write)


# --- the program -----------------------------------------------------------------------------------


def print_start(run: Run, progress: Progress) -> None:
    print0(run, parameter_report(run.model))
    dtype = str(run.dtype).removeprefix("torch.")
    updates = f"from update {progress.iter} to {run.config.max_iters}"
    print0(run, f"{run.processes.device} {dtype}, {run.n_batches} updates an epoch, {updates}")


def print_end(run: Run, progress: Progress) -> None:
    """Draws loss.png and prints where the best weights are."""
    if not run.processes.is_first:
        return
    folder = run.config.out_dir
    if run.config.rank == 0:
        write_config(run, model=fingerprint_base(folder))
    plot_losses(progress.metrics, os.path.join(folder, "loss.png"))
    path = os.path.join(folder, ADAPTER_WEIGHTS if run.config.rank else "model.safetensors")
    print0(run, f"best validation loss {progress.best:.4f}, plotted in {folder}/loss.png")
    print0(run, f"saved: {path} ({os.path.getsize(path) / 1e6:.2f} MB)")


def main(argv: list[str]) -> None:
    config = configure(argv)
    with one_line_errors():
        check_base_stays(config)  # before anything is written there
        is_first = read_torchrun()[0] == 0
    with locked_folder(config.out_dir) if is_first else contextlib.nullcontext(), explain_failure(config):
        train(config)


if __name__ == "__main__":
    with forgiving_output():
        main(sys.argv[1:])
