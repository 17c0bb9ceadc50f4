"""One training and its score in a folder of its own: what makes it, whether it is done, what its files say."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from configurator import Config
from model import GPT, GPTConfig
from plumbing.adapters.layers import lora_arguments
from plumbing.adapters.trainable import trainable_names
from plumbing.gpt2.files import find_model, read_model_config
from plumbing.program.files import ROOT
from plumbing.program.settings import settings_of
from plumbing.program.stored_run import RUN_CONFIG, find_changes
from plumbing.scoring.accuracy import SCORED

UNTUNED = "no tuning"
LORA = "LoRA"
FULL = "full fine-tuning"
AGAINST = "LoRA, lr against alpha"
CLAIM = "a claim's training"
MEASURES = "measures.npz"  # of a claim's training: what measured_run.py finds


@dataclass
class PlannedRun:
    """One training and its score. method: one of the five above."""

    name: str
    method: str
    config: Config

    # --- how it is made

    def commands(self, folder: str) -> list[list[str]]:
        """The programs that make the run in `folder`. That is self.folder or, on another machine, a copy of it. They
        go on where it stopped."""
        if self.method == UNTUNED:  # generate.py writes into a folder "untuned"
            return [["generate.py", *flags(replace(self.config, out_dir=os.path.dirname(folder)))]]
        goes_on = self.reached() is not None
        if not goes_on:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(MEASURES if self.method == CLAIM else "accuracy.json"))  # another run's
        training = flags(replace(self.config, out_dir=folder, auto_resume=goes_on))
        if self.method == CLAIM:
            return [["tools/report/measured_run.py", *training]]
        return [["train.py", *training], ["generate.py", "--init_from=resume", f"--out_dir={folder}"]]

    def reached(self) -> int | None:
        """The last evaluated update of this very run in the folder; None if there is none."""
        stored = self.read(RUN_CONFIG)
        same = stored and not find_changes(settings_of(self.config), stored)
        return self.metrics[-1]["iter"] if same and self.metrics else None

    def done(self) -> bool:
        score = self.score
        if self.method == UNTUNED:
            return bool(score) and all(score[key] == getattr(self.config, key) for key in SCORED)
        has_result = os.path.exists(self.path(MEASURES)) if self.method == CLAIM else score
        return bool(has_result) and self.reached() == self.config.max_iters

    # --- what its files say

    @property
    def folder(self) -> str:
        return self.config.out_dir

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def read(self, name: str):
        """A JSON file of the run (a list of lines for .jsonl); None if it is not there or not whole."""
        with contextlib.suppress(OSError, ValueError), open(self.path(name), encoding="utf-8") as f:
            return [json.loads(line) for line in f] if name.endswith("l") else json.load(f)

    @property
    def metrics(self) -> list[dict]:
        return self.read("metrics.jsonl") or []

    @property
    def score(self) -> dict | None:
        return self.read("accuracy.json")

    @property
    def accuracy(self) -> float:
        return self.score["accuracy"]

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(update, validation loss) of each evaluation."""
        return [(m["iter"], m["val_loss"]) for m in self.metrics]

    @property
    def best_loss(self) -> float:
        return min(loss for _, loss in self.curve)

    @property
    def minutes(self) -> float:
        """Of training without evaluation, by the run's own speed."""
        batch = self.config.batch_size * self.config.gradient_accumulation_steps
        timed = [pair for pair in pairwise(self.metrics) if "examples_per_s" in pair[1]]
        return sum((now["iter"] - before["iter"]) * batch / now["examples_per_s"] for before, now in timed) / 60


def flags(config: Config) -> list[str]:
    """The settings as a command line."""
    return [f"--{key}={value}" for key, value in settings_of(config).items()]


def count_parameters(config: Config) -> tuple[int, int]:
    """(trained, all) of a run with these settings."""
    with torch.device("meta"):  # shapes only
        model = GPT(GPTConfig(**read_model_config(find_model(config.init_from)[0]), **lora_arguments(config)))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sizes
    if config.rank or config.trainable:
        trained = trainable_names(model, config.lora_bias, config.trainable)
    return sum(sizes[name] for name in trained), sum(sizes.values())


# --- making them ----------------------------------------------------------------------------------

# Linux can end a child whose parent was killed: 1 is PR_SET_PDEATHSIG, 9 SIGKILL. It outlives execv.
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); e = sys.executable; os.execv(e, [e, *sys.argv[1:]])"


@contextlib.contextmanager
def start_program(program: str, flags: list[str], log: str, environment: dict) -> Iterator[subprocess.Popen]:
    """A program of ours as a process, its output added to the file `log`. At the block's end it has ended: by
    itself, or by SIGTERM, on which a training saves. Raises RuntimeError, with its last words, if it failed."""
    tie = ["-c", TIED] if sys.platform == "linux" else []
    command = [sys.executable, *tie, os.path.join(ROOT, program), *flags]
    with open(log, "a+", encoding="utf-8", errors="replace") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=os.environ | environment, **streams)
        try:
            yield child
            child.wait()
        finally:
            child.terminate()
            child.wait()
        if child.returncode:
            output.seek(0)
            lines = re.findall(r"[^\r\n]+", output.read())
            errors = [line for line in lines if line.startswith("error:")] or lines or ["no message"]
            raise RuntimeError(f"{program} ended with exit code {child.returncode}: {errors[-1].strip()}")


def run_here(runs: list[PlannedRun], environment: dict) -> Iterator[tuple[str, str | None, str | None]]:
    """Makes runs one after another. Yields (name, place, None) where one begins and (name, None, reason) where it
    ends; the reason is None if all is well."""
    for run in runs:
        yield run.name, "this machine", None
        reason = None
        try:
            os.makedirs(run.folder, exist_ok=True)
            for program, *flags in run.commands(run.folder):
                with start_program(program, flags, os.path.join(run.folder, "log.txt"), environment):
                    pass
        except (RuntimeError, OSError) as e:
            reason = str(e)
        yield run.name, None, reason
