"""When a run saves and what it shows meanwhile: checkpoints, the bar, lines above it."""

import math
import time

from tqdm import tqdm

from plumbing.running.checkpoint import save_checkpoint
from plumbing.running.endings import StopSignals, exit_stopped

FULL_SAVE_SECONDS = 180  # without LoRA: at least so long between the checkpoints of two evaluations


class Saver:
    """Writes checkpoints: after evaluations, every save_interval updates, and after Ctrl-C or SIGTERM, which it
    listens to in a `with` block."""

    def __init__(self, run, progress):
        self.run = run
        self.progress = progress
        self.signals = StopSignals()
        self.saved_it = None  # the update at which the last one was written
        self.saved_at = -math.inf  # seconds

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *error):
        self.signals.__exit__(*error)

    def save_after_evaluation(self, is_last: bool) -> None:
        # Without LoRA a checkpoint is three times the model, 4.3 GB for gpt2-medium: not at each evaluation.
        if self.run.config.rank or is_last or time.monotonic() - self.saved_at > FULL_SAVE_SECONDS:
            self.save()
            self.saved_at = time.monotonic()

    def is_stopped(self) -> bool:
        """Whether a signal came to this process."""
        return self.signals.received is not None

    def save_or_stop(self, n_stopped: float) -> None:
        """Saves if it is due. Saves and ends the program after a signal in any of the processes."""
        config = self.run.config
        it = self.progress.iter
        is_due = config.save_interval > 0 and it % config.save_interval == 0
        if (n_stopped or is_due) and self.saved_it != it:
            self.save()
        if n_stopped:
            command = f"python train.py --init_from=resume --out_dir={config.out_dir}"
            print0(self.run, f"stopped at update {it}, saved; to go on: {command}")
            exit_stopped(self.signals.received)

    def save(self) -> None:
        run = self.run
        if run.processes.is_first:
            save_checkpoint(run.config.out_dir, self.progress, run.model, run.optimizers, run.scaler)
        self.saved_it = self.progress.iter


class Stopwatch:
    """How fast the updates are, from update `it` on, in this process."""

    def __init__(self, it: int):
        self.it = it
        self.began = time.perf_counter()

    def updates_per_s(self, it: int) -> float:
        return (it - self.it) / (time.perf_counter() - self.began)


def open_bar(run, progress) -> tqdm:
    disable = None if run.processes.is_first else True  # None: tqdm shows a bar if it writes to a terminal
    return tqdm(total=run.config.max_iters, initial=progress.iter, unit="update", disable=disable)


def print0(run, text: str) -> None:
    """Prints above the bar, on the first process alone."""
    if run.processes.is_first:
        tqdm.write(text)
