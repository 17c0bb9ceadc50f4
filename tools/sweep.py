"""Runs the assignment's experiments and writes its report: report.md and report.html.

    python -m tools.sweep configs/finetune_params_config.py --seeds=1,2,3
    python -m tools.sweep configs/finetune_params_config.py --ray=auto    on many machines: docs/machines.md
    python -m tools.sweep configs/finetune_mini_config.py --dry_run       the runs and their estimated minutes
    python -m tools.sweep configs/finetune_mini_config.py --only=claims --jobs=auto    what the papers claim

Each run is train.py and then generate.py in a folder of its own. Runs that are done are kept, a run that was stopped
goes on where it stopped, and one that fails has its reason in the report while the others go on (exit code 1).
"""

import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from statistics import mean

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from configurator import Config, configure
from dataloader import make_loader
from generate import ModelSampler
from plumbing.data.sources import find_source
from plumbing.data.token_cache import cache_folder
from plumbing.gpt2.base import check_vocabulary
from plumbing.gpt2.files import context_size, find_model
from plumbing.program.errors import one_line_errors
from plumbing.program.files import make_folder, whole_file, write_json
from plumbing.program.settings import fields_of, setting
from plumbing.program.terminal import forgiving_output
from plumbing.running.machine import pick_device, pick_dtype
from tools.report import claims
from tools.report.measured_run import measure_text
from tools.report.questions import write_report
from tools.runs.measure import describe_machine, spread, time_latency, timed
from tools.runs.ray_runs import run_on_ray
from tools.runs.run import AGAINST, CLAIM, FULL, LORA, UNTUNED, PlannedRun, run_here
from train import evaluate, micro_batches, set_up, update

KINDS = "untuned,lora,full,lr_alpha,latency"
SMALL = 2e8  # bytes of a base that a core can train by itself
BESIDE = 0.15  # minutes of a claim's training beside its updates: to start and to be measured, seen on 2 cores


@dataclass
class SweepConfig(Config):
    """Runs the assignment's experiments and writes its report: report.md and report.html."""

    # --- sweep
    ranks: str = "1,16,128,196"  # of the LoRA runs, with commas; above the config's rank lr falls as 1 / sqrt(r)
    scale: float = 4.0  # alpha / rank of all of them
    seeds: str = "1"  # each run is made with each of these seeds, with commas
    full_lr: float = 0.0  # learning rate of full fine-tuning; 0: a fifth of lr
    only: str = KINDS  # what is run, with commas; and claims, the trainings that test what the LoRA papers claim
    minutes: float = setting(60, least=0)  # for the claims: as many seeds, from the first of `seeds` on, as fit
    jobs: int | str = 1  # runs side by side, by Ray, each with a GPU or its share of the cores; auto: what suits
    ray: str | None = None  # auto: Ray's cluster, or a new one on this machine; HOST:PORT: that one
    sweep_dir: str | None = None  # where everything is written; None: out_dir with "-sweep"
    dry_run: bool = False  # only list the runs and their estimated minutes


def main(config: SweepConfig) -> None:
    with one_line_errors():
        config.sweep_dir = config.sweep_dir or config.out_dir + "-sweep"
        check(config)
        runs = plan(config)
        if config.dry_run:
            list_runs(config, runs)
            return
        left = [run for run in runs if not run.done()]
        # A mistake in the data shows before the first run. `check` has read it for the claims; Ray's machines read
        # their own.
        if left and not config.ray and not asks_claims(config):
            make_loader(left[-1].config, context_size(config.init_from))
        make_folder(config.sweep_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = make_runs(config, runs)
    chapter = make_claims(config, failed) if asks_claims(config) else None
    speeds = measure_latency(config) if {"latency", "claims"} & set(config.only.split(",")) else None
    with one_line_errors():
        write_report(config, runs, failed, speeds, chapter)
    print(f"written: {config.sweep_dir}/report.html, {config.sweep_dir}/report.md")
    if failed:
        print("\n".join(f"error: {name}: {reason}" for name, reason in failed.items()), file=sys.stderr)
        sys.exit(1)


def check(config):
    """Raises ValueError or OSError for settings with which every run would fail."""
    if config.facts or config.task != "instruct":
        raise ValueError("a sweep fine-tunes a base model by instructions: type another --init_from or --task")
    if unknown := set(config.only.split(",")) - {*KINDS.split(","), "claims"}:
        raise ValueError(f"only={config.only}: no part {min(unknown)!r}; type some of {KINDS},claims")
    pick_dtype(pick_device(config.device), config.dtype)
    check_vocabulary(config.init_from)
    if asks_claims(config):
        claims.check_splits(config)
    count_jobs(config)


def asks_claims(config):
    return "claims" in config.only.split(",")


def count_jobs(config):
    """How many runs are made side by side. A small model does not keep several cores busy: two trainings of gpt2-mini
    with a thread each are half as fast again as one with two threads."""
    if str(config.jobs).isdecimal() and int(config.jobs):
        return int(config.jobs)
    if config.jobs != "auto":
        raise ValueError(f"jobs={config.jobs}: type a number from 1 on, or auto")
    if pick_device(config.device).startswith("cuda"):
        return torch.cuda.device_count()
    if sum(map(os.path.getsize, find_model(config.init_from)[1])) > SMALL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- which runs ------------------------------------------------------------------------------------


def plan(config: SweepConfig) -> list[PlannedRun]:
    """The runs in their order."""
    kinds = config.only.split(",")
    ranks = read_numbers(config, "ranks", 1)
    seeds = read_numbers(config, "seeds", 0)
    runs = []
    if "untuned" in kinds:
        runs.append(plan_run(config, "untuned", UNTUNED, seed=config.seed))
    for seed in seeds:
        for rank in ranks if "lora" in kinds else ():
            settings = {"rank": rank, "lr": rate(config, rank), "alpha": config.scale * rank}
            runs.append(plan_run(config, f"lora-r{rank}-seed{seed}", LORA, seed=seed, **settings))
        if "full" in kinds:
            settings = {"rank": 0, "lr": full_rate(config), "dropout": 0.0}
            runs.append(plan_run(config, f"full-seed{seed}", FULL, seed=seed, **settings))
    if "lr_alpha" in kinds:
        rank = default_rank(config)
        for what, times in (("double-lr-half-alpha", 2), ("half-lr-double-alpha", 0.5)):
            settings = {"rank": rank, "lr": rate(config, rank) * times, "alpha": config.scale * rank / times}
            runs.append(plan_run(config, f"lora-r{rank}-{what}-seed{seeds[0]}", AGAINST, seed=seeds[0], **settings))
    return runs


def plan_claims(config, seeds):
    """The claims' trainings, seed by seed."""
    runs = []
    for seed, training in itertools.product(seeds, claims.list_settings()):
        settings = claims.make_settings(training, config, full_rate(config), config.scale)
        runs.append(plan_run(config, claims.run_name(training, seed), CLAIM, seed=seed, **settings))
    return runs


def plan_run(config, name, method, **settings):
    values = {key: getattr(config, key) for key in fields_of(Config)} | settings
    values |= {"out_dir": os.path.join(config.sweep_dir, name), "wandb_run_name": name}
    return PlannedRun(name, method, Config(**values))


def claim_seeds(config, minutes):
    """The seeds whose trainings fit into the claims' time, two at least. minutes: what those of one seed take."""
    first = read_numbers(config, "seeds", 0)[0]
    return list(range(first, first + max(2, int(config.minutes / minutes))))


def read_numbers(config, key, least):
    """The different whole numbers of a setting such as 1,16,128."""
    try:
        values = [int(word) for word in getattr(config, key).split(",")]
        if min(values) < least or len(set(values)) < len(values):
            raise ValueError
        return values
    except ValueError:
        raise ValueError(f"{key}={getattr(config, key)}: type whole numbers with commas, such as 1,2,3") from None


def full_rate(config):
    """The learning rate of full fine-tuning."""
    return config.full_lr or config.lr / 5


def rate(config, rank):
    """The learning rate of a rank. alpha / r stays the same, so at a higher rank a step in B moves W further, by
    about sqrt(r). Above the configuration's rank its own rate would be too high."""
    return float(f"{config.lr * math.sqrt(config.rank / rank):.2g}") if 0 < config.rank < rank else config.lr


def default_rank(config):
    """The configuration's if it is among the ranks, or the largest of these."""
    ranks = read_numbers(config, "ranks", 1)
    return config.rank if config.rank in ranks else max(ranks)


# --- how long they will take -----------------------------------------------------------------------


def list_runs(config, runs):
    """Prints the runs and about how long each will take."""
    speeds = {}  # {kind of run: (seconds of an update, of an evaluation)}
    total = 0.0
    if asks_claims(config):
        of_claims = plan_claims(config, read_numbers(config, "seeds", 0)[:1])
        n_threads = torch.get_num_threads()
        torch.set_num_threads(max(1, n_threads // count_jobs(config)))
        minutes = sum(estimate_minutes(run.config, speeds) + BESIDE for run in of_claims) / count_jobs(config)
        torch.set_num_threads(n_threads)
        seeds = claim_seeds(config, minutes)
        print(f"claims: {len(of_claims)} trainings a seed, about {minutes:.0f} min; {len(seeds)} seeds fit")
        for line in claims.describe_plan(len(seeds)):
            print(line)
    for run in runs:
        says = "done"
        if not run.done():
            minutes = 0.0 if run.method == UNTUNED else estimate_minutes(run.config, speeds)
            total += minutes
            says = f"about {minutes:.1f} min of training"
        print(f"{run.name:45} {says}")
    print(f"{len(runs)} runs, about {total:.0f} min of training and evaluation; start and scoring come on top")


def estimate_minutes(config, speeds):
    """Of a run's training and evaluation. Of each kind of runs two updates after a warm-up, and one evaluation, are
    measured once."""
    kind = (config.rank == 0, config.batch_size, config.gradient_accumulation_steps, config.loss_on)
    if kind not in speeds:
        run = set_up(config)
        device = run.processes.device
        batches = run.loader.order("train", run.global_batch, 0)[:3]
        times = [timed(device, update, run, micro_batches(run, indices), 0)[0] for indices in batches]
        speeds[kind] = mean(times[1:] or times), timed(device, evaluate, run)[0]
    update_seconds, evaluation_seconds = speeds[kind]
    n_evaluations = 1 + math.ceil(config.max_iters / config.eval_interval)
    return (config.max_iters * update_seconds + n_evaluations * evaluation_seconds) / 60


# --- making them -----------------------------------------------------------------------------------


def make_runs(config, runs):
    """Makes the runs that are not done, several side by side by Ray. Returns {name: reason} of those that failed."""
    failed = {}
    left = [run for run in runs if not run.done()]
    environment = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    environment["WANDB_RUN_GROUP"] = os.path.basename(os.path.normpath(config.sweep_dir))
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", disable=None)
    with one_line_errors(), bar:
        events = run_here(left, environment)
        jobs = count_jobs(config)
        if left and (config.ray or jobs > 1):
            on_gpu = config.device in ("auto", "cuda")
            events = run_on_ray(left, config.ray, jobs, on_gpu, find_sources(config), environment)
        for name, place, reason in events:
            if reason:
                failed[name] = reason
                tqdm.write(f"{name} failed: {reason}")
            if place:
                bar.set_postfix_str(f"{name} on {place}")
            else:
                bar.update()
    return failed


def make_claims(config, failed):
    """Makes the claims' trainings: those of the first seed, which tell how long a seed takes, and then those of as
    many seeds as fit. Adds to `failed`. Returns what a report tells of them: verdicts, results, a seed's minutes."""
    path = os.path.join(config.sweep_dir, "claims.json")
    runs = plan_claims(config, read_numbers(config, "seeds", 0)[:1])
    n_left = sum(not run.done() for run in runs)
    minutes = config.minutes or 1.0  # where nothing is measured: two seeds
    if n_left and not os.path.exists(path):
        began = time.monotonic()
        failed |= make_runs(config, runs)
        if any(run.done() for run in runs):
            write_json(path, {"minutes": (time.monotonic() - began) / 60 * len(runs) / n_left})
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            minutes = json.load(f)["minutes"]
        runs = plan_claims(config, claim_seeds(config, minutes))
        failed |= make_runs(config, runs)
    with one_line_errors():
        by_name = {run.name: run for run in runs}
        seeds = claim_seeds(config, minutes)
        turns = measure_latency(config)["turns"]  # only now: a GPU is shared with no training
        results = claims.gather(by_name, seeds, config, full_rate(config), measure_base(config), turns)
        return claims.judge_all(results), results, minutes


def measure_base(config):
    """The untuned model's loss of each text."""
    path = os.path.join(config.sweep_dir, "base_text.npy")
    if not os.path.exists(path):
        sampler = ModelSampler(config=config)
        sampler.load_model()
        losses = measure_text(sampler)
        with whole_file(path) as f:
            np.save(f, losses)
    return np.load(path)


def find_sources(config):
    """{what a setting names: its file or folder here}, of all that another machine may lack."""
    sources = {config.init_from: os.path.dirname(find_model(config.init_from)[0])}
    if config.dataset == "rt_reviews":
        find_source("rt_reviews")  # now it is in the cache
        sources["rt_reviews"] = cache_folder("rt_reviews")
    elif os.path.exists(config.dataset):
        sources[config.dataset] = config.dataset
    return sources


def measure_latency(config):
    """Tokens a second of the base, the merged and the unmerged model: measured once, then read from latency.json."""
    path = os.path.join(config.sweep_dir, "latency.json")
    if not os.path.exists(path):
        rank = default_rank(config)
        seconds = time_latency(replace(config, rank=rank, alpha=config.scale * rank), "generate", 21)
        turns = {name: [32 / s for s in times] for name, times in seconds.items()}
        found = {"rank": rank, "machine": describe_machine(pick_device(config.device)), "turns": turns}
        write_json(path, found | {name: spread(speeds) for name, speeds in turns.items()})
    with open(path, encoding="utf-8") as f:
        return json.load(f)


if __name__ == "__main__":
    with forgiving_output():
        main(configure(sys.argv[1:], cls=SweepConfig, trains=False))
