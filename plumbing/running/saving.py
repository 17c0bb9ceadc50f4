"""When a run saves and what it shows meanwhile: checkpoints, the bar, lines above it."""

import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait

from tqdm import tqdm

from plumbing.running.checkpoint import collect_state, copy_state, save_checkpoint
from plumbing.running.endings import StopSignals

FULL_SAVE_SECONDS = 180  # without LoRA: at least so long between the checkpoints of two evaluations


class Saver:
    """Writes checkpoints: after evaluations, every save_interval updates, and after Ctrl-C or SIGTERM, which it
    listens to in a `with` block.

    A thread writes the files, one after the other, while the loop goes on: so a checkpoint on the disk is never newer
    than the best weights that go with it. At the block's end all is written.
    """

    def __init__(self, run, progress):
        self.run = run
        self.progress = progress
        self.signals = StopSignals()
        self.saved_it = None  # the update at which the last one was written
        self.saved_at = -math.inf  # seconds
        self.thread = ThreadPoolExecutor(1)
        self.error = None  # the thread's; it writes nothing after it
        self.calls = []  # what it is to do next: (function, arguments)
        self.last = {}  # {function: the Future of its last call}
        self.copies = {}  # {function: the tensors of its last call}

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, *error):
        self.start()
        self.thread.shutdown()
        self.signals.__exit__(kind, *error)
        if kind is None:
            self.check()

    def write(self, function, *args) -> None:
        """Copies the tensors in args as they are now, for function(*args) in the first process's thread. Waits only
        for the same function's last call."""
        if self.run.processes.is_first:
            self.wait_for(function)
            self.calls.append((function, copy_state(args, self.copies.setdefault(function, {}))))

    def start(self) -> None:
        """Lets the thread write. Not before all is copied: it would slow that down."""
        for function, args in self.calls:
            self.last[function] = self.thread.submit(self._call, function, args)
        self.calls = []

    def _call(self, function, args):
        try:
            if self.error is None:
                function(*args)
        except BaseException as e:
            self.error = e

    def wait_for(self, *functions) -> None:
        """Waits for their last calls."""
        wait([self.last[function] for function in functions if function in self.last])
        self.check()

    def check(self) -> None:
        """Raises what went wrong in the thread."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Waits until all is written."""
        self.start()
        self.wait_for(*self.last)

    def save_after_evaluation(self, is_last: bool) -> None:
        if self.run.config.rank:
            # Evaluations may come faster than a disk writes.
            is_due = save_checkpoint not in self.last or self.last[save_checkpoint].done()
        else:
            # Without LoRA a checkpoint is three times the model, 4.3 GB for gpt2-medium: not at each evaluation.
            is_due = time.monotonic() - self.saved_at > FULL_SAVE_SECONDS
        if is_due or is_last:
            self.save()
            self.saved_at = time.monotonic()
        self.start()

    def is_stopped(self) -> bool:
        """Whether a signal came to this process."""
        return self.signals.received is not None

    def save_or_stop(self, n_stopped: float) -> None:
        """Saves if it is due. Saves and ends the program after a signal in any of the processes, or an error in the
        thread."""
        self.check()
        config = self.run.config
        it = self.progress.iter
        is_due = config.save_interval > 0 and it % config.save_interval == 0
        if (n_stopped or is_due) and self.saved_it != it:
            self.save()
        if n_stopped:
            self.finish()
            command = f"python train.py --init_from=resume --out_dir={config.out_dir}"
            print0(self.run, f"stopped at update {it}, saved; to go on: {command}")
            # As the shell expects. A process may have got none while another did.
            sys.exit(128 + (self.signals.received or signal.SIGTERM))

    def save(self) -> None:
        if self.run.processes.is_first:
            out_dir, state = self.run.config.out_dir, collect_state(self.run, self.progress)
            if self.run.config.rank:
                self.write(save_checkpoint, out_dir, state)
            else:  # a copy would be three times the model
                self.finish()
                save_checkpoint(out_dir, state)
        self.start()
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
