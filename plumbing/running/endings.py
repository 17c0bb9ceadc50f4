"""How a run ends before its last update: stopped, diverged, out of memory. Each is one line and an exit code."""

import contextlib
import os
import signal
import sys
import time
from typing import NoReturn

import torch

from plumbing.program.errors import UserError, one_line_errors


class StopSignals:
    """`with StopSignals() as signals`: the first Ctrl-C or SIGTERM only sets `signals.received`, to its number, so
    that a run can end between two updates. A second one ends the program at once, unless it is a SIGTERM within a
    second: torchrun passes on one that a cluster has sent to each process already."""

    def __init__(self):
        self.received = None
        self.received_at = 0.0  # seconds

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        if self.received is None:
            self.received_at = time.monotonic()
            self.received = number
        elif number == signal.SIGINT or time.monotonic() - self.received_at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def exit_diverged(config, is_first: bool, it: int, what: str) -> NoReturn:
    """what: the values that are no finite numbers."""
    if is_first:
        advice = f"try a lower --lr than {config.lr:g}; what was saved until then is in {config.out_dir}"
        print(f"error: {what} at update {it}; {advice}", file=sys.stderr)
    sys.exit(3)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def explain_failure(config):
    """A full disk and too little memory end the program in one line that says how to go on; exit code 2."""
    with one_line_errors(UserError):
        try:
            yield
        except OSError as e:
            raise UserError(f"{e}; --init_from=resume goes on from the last checkpoint") from e
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            again = "" if config.facts is None else "start another run, with another --out_dir; "
            # A smaller batch with the same global batch: of the largest divisor up to its half.
            sizes = range(config.batch_size // 2, 0, -1)
            batch_size = next((n for n in sizes if config.batch_size % n == 0), 1)
            steps = config.gradient_accumulation_steps * (config.batch_size // batch_size)
            flags = f"--batch_size={batch_size} --gradient_accumulation_steps={steps}"
            raise UserError(f"out of memory; {again}the same training in smaller pieces: {flags}") from e
