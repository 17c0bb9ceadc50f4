"""Runs the assignment's experiments and writes its report: report.md and report.html.

    python -m tools.sweep configs/finetune_params_config.py --seeds=1,2,3
    python -m tools.sweep configs/finetune_params_config.py --ray=auto    on many machines: docs/machines.md
    python -m tools.sweep configs/finetune_mini_config.py --dry_run       the runs and their estimated minutes

Each run is train.py and then generate.py in a folder of its own. Runs that are done are kept, one that was stopped
goes on where it stopped, and one that fails has its reason in the report while the others go on (exit code 1).
"""

import contextlib
import json
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from statistics import mean

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from configurator import RUN_CONFIG, Config, configure, find_changes
from generate import SCORED
from lora import mark_only_lora_as_trainable
from model import GPT, GPTConfig
from plumbing.adapters.peft_format import ADAPTER_WEIGHTS
from plumbing.adapters.trainable import train_also
from plumbing.data.sources import find_source
from plumbing.data.token_cache import cache_folder
from plumbing.gpt2.base import check_vocabulary
from plumbing.gpt2.files import find_checkpoint, read_config
from plumbing.program.errors import first_line, one_line_errors
from plumbing.program.files import write_json
from plumbing.program.settings import fields_of, settings_of
from plumbing.running.machine import pick_device, pick_dtype
from plumbing.scoring.accuracy import wilson
from plumbing.scoring.plots import draw_curves, label_ends
from tools.bench import latency, machine, spread, timed
from tools.report import claims
from tools.report.page import draw, make_html, make_markdown, write_page
from tools.report.programs import run_here
from tools.report.ray_runs import run_on_ray
from tools.report.verdicts import bootstrap, seed_deviation
from train import evaluate, set_up, update

KINDS = "untuned,lora,full,lr_alpha,latency"
AGAINST = "LoRA, lr against alpha"
CLAIM = "a claim's training"


@dataclass
class SweepConfig(Config):
    """Runs the assignment's experiments and writes its report: report.md and report.html."""

    # --- sweep
    ranks: str = "1,16,128,196"  # of the LoRA runs, with commas; above the config's rank lr falls as 1 / sqrt(r)
    scale: float = 4.0  # alpha / rank of all of them
    seeds: str = "1"  # each run is made with each of these seeds, with commas
    full_lr: float = 0.0  # learning rate of full fine-tuning; 0: a fifth of lr
    only: str = KINDS  # what is run, with commas; and claims, the trainings that test what the LoRA papers claim
    jobs: int = 1  # runs side by side on a machine, by Ray: each with a GPU or its share of the cores
    ray: str | None = None  # auto: Ray's cluster, or a new one on this machine; HOST:PORT: that one
    sweep_dir: str | None = None  # where everything is written; None: out_dir with "-sweep"
    dry_run: bool = False  # only list the runs and their estimated minutes


@dataclass
class Run:
    """One training and its score: of a method ("LoRA", "full fine-tuning", "no tuning")."""

    name: str
    method: str
    config: Config

    @property
    def folder(self):
        return self.config.out_dir

    def path(self, name):
        return os.path.join(self.folder, name)

    def read(self, name):
        """A JSON file of the run (list of lines for .jsonl); None if it is not there or not whole."""
        with contextlib.suppress(OSError, ValueError), open(self.path(name), encoding="utf-8") as f:
            return [json.loads(line) for line in f] if name.endswith("l") else json.load(f)

    @property
    def metrics(self):
        return self.read("metrics.jsonl") or []

    @property
    def accuracy(self):
        return self.read("accuracy.json")

    def reached(self):
        """The last update of this very run's training in the folder; None if there is none."""
        stored = self.read(RUN_CONFIG)
        same = stored and not find_changes(settings_of(self.config), stored)
        return self.metrics[-1]["iter"] if same and self.metrics else None

    def done(self):
        if self.method == "no tuning":
            return bool(self.accuracy) and all(self.accuracy[key] == getattr(self.config, key) for key in SCORED)
        return bool(self.accuracy) and self.reached() == self.config.max_iters

    def commands(self, folder):
        """The programs that make the run in `folder`, which holds what this one does: they go on where it stopped."""
        if self.method == "no tuning":
            return [["generate.py", *flags(replace(self.config, out_dir=os.path.dirname(folder)))]]
        goes_on = self.reached() is not None
        if not goes_on:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path("accuracy.json"))  # another run's
        training = flags(replace(self.config, out_dir=folder, auto_resume=goes_on))
        return [["train.py", *training], ["generate.py", "--init_from=resume", f"--out_dir={folder}"]]


# --- the runs --------------------------------------------------------------------------------------


def numbers(config, key, least):
    try:
        values = [int(word) for word in getattr(config, key).split(",")]
        if min(values) < least or len(set(values)) < len(values):
            raise ValueError
        return values
    except ValueError:
        raise ValueError(f"{key}={getattr(config, key)}: type whole numbers with commas, such as 1,2,3") from None


def plan(config):
    """The runs of a SweepConfig, in their order."""
    kinds, ranks, seeds = config.only.split(","), numbers(config, "ranks", 1), numbers(config, "seeds", 0)
    if unknown := set(kinds) - {*KINDS.split(","), "claims"}:
        raise ValueError(f"only={config.only}: no part {min(unknown)!r}; type some of {KINDS},claims")
    base = Config(**{name: getattr(config, name) for name in fields_of(Config)})
    runs = []

    def add(name, method, seed, **settings):
        settings = {"seed": seed, "out_dir": os.path.join(config.sweep_dir, name), "wandb_run_name": name} | settings
        runs.append(Run(name, method, replace(base, **settings)))

    if "untuned" in kinds:  # generate.py writes into a folder "untuned"
        add("untuned", "no tuning", base.seed)
    for seed in seeds:
        for rank in ranks if "lora" in kinds else ():
            lr, alpha = rate(config, rank), config.scale * rank
            add(f"lora-r{rank}-seed{seed}", "LoRA", seed, rank=rank, lr=lr, alpha=alpha)
        if "full" in kinds:
            full = {"rank": 0, "lr": full_rate(config), "dropout": 0.0}
            add(f"full-seed{seed}", "full fine-tuning", seed, **full)
    rank = default_rank(config)
    for name, c in (("double-lr-half-alpha", 2), ("half-lr-double-alpha", 0.5)) if "lr_alpha" in kinds else ():
        settings = {"rank": rank, "lr": rate(config, rank) * c, "alpha": config.scale * rank / c}
        add(f"lora-r{rank}-{name}-seed{seeds[0]}", AGAINST, seeds[0], **settings)
    for setting, n in claims.plan() if "claims" in kinds else ():
        own = claims.make_settings(setting, config, full_rate(config), config.scale)
        add(claims.run_name(setting, n), CLAIM, seeds[0] + n, **own)
    return runs


def full_rate(config):
    """The learning rate of full fine-tuning."""
    return config.full_lr or config.lr / 5


def rate(config, rank):
    """The learning rate of a rank: alpha / r stays, so above the configuration's rank steps of one size in B move
    W further, by about sqrt(r), and the configuration's own rate would be too hot."""
    return float(f"{config.lr * math.sqrt(config.rank / rank):.2g}") if 0 < config.rank < rank else config.lr


def default_rank(config):
    """That of the configuration if it is among the ranks, else the largest."""
    ranks = numbers(config, "ranks", 1)
    return config.rank if config.rank in ranks else max(ranks)


def flags(config):
    return [f"--{key}={value}" for key, value in settings_of(config).items()]


def find_sources(config):
    """{what a setting names: its file or folder here}, of all that another machine may lack."""
    sources = {config.init_from: os.path.dirname(find_checkpoint(config.init_from)[0])}
    if config.dataset == "rt_reviews":
        find_source("rt_reviews")  # now it is in the cache
        sources["rt_reviews"] = cache_folder("rt_reviews")
    elif os.path.exists(config.dataset):
        sources[config.dataset] = config.dataset
    return sources


def make_runs(config, runs):
    """Makes the runs that are not done. Returns {name: reason} of those that failed."""
    failed = {}
    places = {}
    left = [run for run in runs if not run.done()]
    wandb = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    wandb["WANDB_RUN_GROUP"] = os.path.basename(os.path.normpath(config.sweep_dir))
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", disable=None)
    with one_line_errors(), bar:
        if left and (config.ray or config.jobs > 1):
            on_gpu = config.device in ("auto", "cuda")
            events = run_on_ray(left, config.ray, config.jobs, on_gpu, find_sources(config), wandb)
        else:
            events = run_here(left, wandb)
        for name, place, reason in events:
            if reason:
                failed[name] = reason
                tqdm.write(f"{name} failed: {reason}")
            if place:
                places[name] = place
            else:
                places.pop(name, None)
                bar.update()
            bar.set_postfix_str(", ".join(f"{name} on {place}" for name, place in places.items()))
    return failed


def seconds_an_update(config):
    """(seconds of an update, of an evaluation), measured on three batches, the first a warm-up, and on one."""
    run = set_up(config)
    batches = run.loader.order("train", run.global_batch, 0)[:3]
    times = [timed(run.processes.device, update, run, batch, 0)[0] for batch in batches]
    return mean(times[1:] or times), timed(run.processes.device, evaluate, run)[0]


def list_runs(runs):
    """Prints the runs and about how long each will take."""
    speed, total = {}, 0.0
    for run in runs:
        config = run.config
        says, kind = "done", (config.rank == 0, config.batch_size, config.gradient_accumulation_steps)
        if not run.done() and run.method != "no tuning" and kind not in speed:
            speed[kind] = seconds_an_update(config)
        if not run.done():
            estimate = 0.0
            if run.method != "no tuning":
                update_seconds, evaluation_seconds = speed[kind]
                n_evaluations = 1 + math.ceil(config.max_iters / config.eval_interval)
                estimate = (config.max_iters * update_seconds + n_evaluations * evaluation_seconds) / 60
            says, total = f"about {estimate:.1f} min of training", total + estimate
        print(f"{run.name:45} {says}")
    print(f"{len(runs)} runs, about {total:.0f} min of training and evaluation; start and scoring come on top")


def measure_latency(config):
    """tokens/s of the base, the merged and the unmerged model: 32 tokens after 52, one text."""
    device = pick_device(config.device)
    rank = default_rank(config)
    shape = replace(config, rank=rank, alpha=config.scale * rank, device=device)
    shape.dtype = str(pick_dtype(device, config.dtype)).removeprefix("torch.")
    systems = {"base": latency(replace(shape, rank=0), False)}
    systems |= {"unmerged": latency(shape, True), "merged": latency(shape, False)}
    times = {name: [] for name in systems}
    for i in range(12):
        for name, run in systems.items():  # by turns, so that the machine's moods hit all alike
            seconds = timed(device, run, "generate")[0]
            if i:  # the first is a warm-up
                times[name].append(32 / seconds)
    return {"rank": rank, "machine": machine(device), "turns": times} | {
        name: spread(values) for name, values in times.items()
    }


# --- what the runs say -----------------------------------------------------------------------------


def minutes(run):
    """Of training, evaluation aside, by the run's own metrics."""
    pairs = [(a, b) for a, b in zip(run.metrics, run.metrics[1:]) if "examples_per_s" in b]
    examples = run.config.batch_size * run.config.gradient_accumulation_steps
    return sum((b["iter"] - a["iter"]) * examples / b["examples_per_s"] for a, b in pairs) / 60


def count_parameters(config):
    """(trained, all) of a run."""
    lora = {"lora_rank": config.rank, "lora_alpha": config.alpha, "lora_targets": config.lora_targets}
    with torch.device("meta"):  # shapes only
        model = GPT(GPTConfig(**read_config(find_checkpoint(config.init_from)[0]), **lora))
    if config.rank:
        mark_only_lora_as_trainable(model)
    elif config.trainable:
        model.requires_grad_(False)
    train_also(model, config.lora_bias, config.trainable)
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


def curve(run):
    return [(m["iter"], m["val_loss"]) for m in run.metrics]


def best(run):
    return min(m["val_loss"] for m in run.metrics)


def describe_curve(run, other):
    """What is to be seen in a validation curve, beside another one's."""
    points = curve(run)
    (_, first), (last_at, last), (low_at, low) = points[0], points[-1], min(points, key=lambda p: p[1])
    late = [p for p in points if p[0] >= 0.75 * last_at]
    fall = late[0][1] - last
    lines = [
        f"r = {run.config.rank} begins at {first:.4f} and is lowest, {low:.4f}, at update {low_at} of {last_at}."
    ]
    if last > low * 1.01:
        lines.append(f"It has risen by {last - low:.4f} since: it overfits, and the best weights are kept.")
    elif fall > last * 0.01:
        lines.append(f"It still falls at the end: by {fall:.4f} over its last quarter.")
    else:
        lines.append(f"It is flat at the end: its last quarter changes it by {abs(fall):.4f}.")
    if other and other.metrics and other is not run:
        theirs = dict(curve(other))
        shared = [p for p in points if p[0] and p[0] in theirs]
        above = sum(loss > theirs[it] for it, loss in shared)
        gap = low - best(other)
        lines.append(
            f"It lies above r = {other.config.rank}'s at {above} of {len(shared)} evaluations; its best loss is "
            f"{abs(gap):.4f} {'higher' if gap > 0 else 'lower'}."
        )
    return " ".join(lines)


def tell_losses(config, lora, full):
    """In words: the validation losses of {r: LoRA's runs} beside those of full fine-tuning, of the same examples.
    Raises ValueError, OSError or RuntimeError where data cannot be read any more, or the model has no room."""
    if claims.draws_validation(config):
        return "The seed draws the validation split, so validation losses are not compared example by example."
    groups = {rank: group for rank, group in {0: full, **lora}.items() if group}
    losses = {r: np.stack([claims.losses_of_run(run.folder, config.device) for run in g]) for r, g in groups.items()}
    deviation = seed_deviation(losses)
    gaps = {r: bootstrap(lambda means, r=r: means[r] - means[0], losses, deviation) for r in losses if r}
    seeds = " and seeds" if deviation else ""
    return (
        "LoRA's validation loss minus full fine-tuning's, example by example, with the 95 % interval that "
        f"examples{seeds} leave: " + ", ".join(f"r = {r} {claims.show(gap)}" for r, gap in gaps.items()) + "."
    )


def percent(p, digits=1):
    return f"{100 * p:.{digits}f} %"


def method_rows(runs, failed):
    """The table of question 2.6: one row for each method and rank, over its seeds."""
    groups, rows = {}, []
    for run in runs:
        if run.method != AGAINST:
            groups.setdefault((run.method, run.config.rank), []).append(run)
    for (method, rank), group in groups.items():
        lora, tuned, config = method == "LoRA", method != "no tuning", group[0].config
        done = [run for run in group if run.done()]
        lost = "; ".join(f"{run.name}: {failed.get(run.name, 'not run')}" for run in group if not run.done())
        numbers = [str(rank), f"{config.alpha:g}"] if lora else ["", ""]
        row = [method, *numbers, f"{config.lr:g}" if tuned else ""]
        if not done:
            rows.append([*row, "", "", "", lost, "", "", "", "", ""])
            continue
        trained, total = count_parameters(config)
        row += [f"{trained * tuned:,}", percent(trained * tuned / total, 2)]
        row.append(f"{mean(map(best, done)):.4f}" if tuned else "")
        scores = [run.accuracy for run in done]
        p = mean(score["accuracy"] for score in scores)
        low, high = wilson(p, scores[0]["n"])
        row += [f"{percent(p)} {lost}".strip(), f"{percent(low)} to {percent(high)}"]
        row.append(", ".join(f"{100 * score['accuracy']:.1f}" for score in scores))
        row.append(percent(mean(score["garbage"] for score in scores)))
        row += [f"{mean(map(minutes, done)):.1f}" if tuned else ""]
        path = done[0].path(ADAPTER_WEIGHTS if lora else "model.safetensors")
        rows.append([*row, f"{os.path.getsize(path) / 1e6:.2f}" if tuned else ""])
    return rows


# --- plots -----------------------------------------------------------------------------------------


def paint_curves(curves):
    """Validation curves of {name: [runs]}."""
    return lambda ax, colors: draw_curves(
        ax, {name: list(map(curve, runs)) for name, runs in curves.items()}, colors, "validation loss"
    )


def paint_accuracy(lora, levels):
    """Accuracy over r: {r: [accuracies]}, with levels {name: accuracy} as lines. One that lies far below the rest,
    such as that of a base which names no label, would flatten it and is only named."""

    def paint(ax, colors):
        means = [mean(accuracies) for accuracies in lora.values()]
        seen = [a for accuracies in lora.values() for a in accuracies]
        near = {name: level for name, level in levels.items() if level > min(seen) - 0.1}
        seen += near.values()
        margin = 0.15 * (max(seen) - min(seen)) + 0.005
        right = len(lora) - 0.7
        ax.set(xlabel="rank r", ylabel="test accuracy (%)", xlim=(-0.3, right))
        ax.set_ylim(100 * (min(seen) - margin), 100 * (max(seen) + margin))
        ax.set_xticks(range(len(lora)), [str(r) for r in lora])
        points = [(x, 100 * a) for x, accuracies in enumerate(lora.values()) for a in accuracies]
        ax.plot(*zip(*points), "o", color=colors[0], markersize=5, alpha=0.5)
        ax.plot([100 * a for a in means], color=colors[0])
        ends = [(right, 100 * means[-1], "LoRA", colors[0])]
        for (name, level), color in zip(near.items(), colors[1:]):
            ax.axhline(100 * level, color=color, linestyle="--", linewidth=1.2)
            ends.append((right, 100 * level, name, color))
        label_ends(ax, ends)
        if far := [f"{name} {percent(level)}" for name, level in levels.items() if name not in near]:
            ax.set_title("below this plot: " + ", ".join(far), loc="right", fontsize=9)

    return paint


# --- the report ------------------------------------------------------------------------------------


def compare_points(accuracy, other):
    """How an accuracy stands to another one, as both are shown: to a tenth of a point."""
    gap = round(100 * accuracy, 1) - round(100 * other, 1)
    if abs(gap) < 0.05:
        return "as good as"
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"


def summarize(done):
    """The report in three sentences: the best accuracy, what it cost, LoRA beside full fine-tuning."""
    groups = {}
    for run in done:
        if run.method in ("LoRA", "full fine-tuning"):
            groups.setdefault((run.method, run.config.rank), []).append(run)
    if not groups:
        return []

    def score(key):
        return mean(run.accuracy["accuracy"] for run in groups[key])

    def name(key):
        return f"LoRA with r = {key[1]}" if key[1] else key[0]

    top = max(groups, key=score)
    first = groups[top][0]
    n = first.accuracy["n"]
    low, high = wilson(score(top), n)
    trained, total = count_parameters(first.config)
    sentences = [
        f"Best is {name(top)}: {percent(score(top))} of {n} test examples (95 % interval {percent(low)} to "
        f"{percent(high)}).",
        f"It trains {trained:,} of {total:,} parameters ({percent(trained / total)}) in "
        f"{mean(map(minutes, groups[top])):.1f} minutes.",
    ]
    lora = [key for key in groups if key[1]]
    if lora and len(lora) < len(groups):
        best_lora, full = max(lora, key=score), next(key for key in groups if not key[1])
        gap = mean(map(best, groups[best_lora])) - mean(map(best, groups[full]))
        trained, _ = count_parameters(groups[best_lora][0].config)
        loss = f"{abs(gap):.4f} {'higher' if gap > 0 else 'lower'}" if round(gap, 4) else "the same"
        sentences.append(
            f"{name(best_lora)} is {compare_points(score(best_lora), score(full))} full fine-tuning "
            f"({percent(score(full))}) at {percent(trained / total, 2)} of its parameters; its best validation loss "
            f"is {loss}."
        )
    return sentences


def report(config, runs, failed, speeds):
    """The report as (kind, content) pairs, the questions in their order, then the claims. Draws the plots."""
    of_claims = {run.name: run for run in runs if run.method == CLAIM}
    runs = [run for run in runs if run.method != CLAIM]
    parts, done, seeds = [], [run for run in runs if run.done()], numbers(config, "seeds", 0)
    ranks, rank = numbers(config, "ranks", 1), default_rank(config)
    lora = {r: [run for run in done if run.method == "LoRA" and run.config.rank == r] for r in ranks}
    default, ones = lora[rank], lora.get(1, [])

    def title(text):
        parts.append(("h2", text))

    def say(text):
        parts.append(("p", text))

    def table(head, rows):
        parts.append(("table", [head.split(", "), *rows]))

    def picture(name, alt, paint, **options):
        draw(os.path.join(config.sweep_dir, f"{name}.svg"), paint, **options)
        return "plot", (f"{name}.svg", alt)

    def plot(name, alt, paint):
        parts.append(picture(name, alt, paint))

    parts.append(("h1", "LoRA fine-tuning: the report"))
    summary = summarize(done)
    examples = config.batch_size * config.gradient_accumulation_steps
    length = (
        f", seeds {', '.join(map(str, seeds))}; {config.max_iters} updates of {examples} examples" if runs else ""
    )
    say(f"{config.init_from} on {config.dataset}{length}. Every number is read from the runs' own files.")
    if speeds:
        title("2.1 Inference latency")
        shown = {name: speeds[name] for name in ("base", "unmerged", "merged")}
        rows = [[n, f"{v['median']:.1f}", f"{v['low']:.1f} to {v['high']:.1f}"] for n, v in shown.items()]
        table("model, tokens/s (median), lowest to highest", rows)
        base, unmerged, merged = (v["median"] for v in shown.values())
        say(
            f"r = {speeds['rank']}, one text, 32 tokens after 52. Beside the base, the unmerged model runs at "
            f"{percent(unmerged / base)} of the speed, for its adapters' extra products, the merged one at "
            f"{percent(merged / base)}: its matrices have the base's shapes."
        )
    if default:
        title("2.2 Validation loss")
        plot("loss", f"validation loss of r = {rank} over updates", paint_curves({f"r = {rank}": default}))
        say(describe_curve(default[0], None))
    counts = {run.config.rank: count_parameters(run.config) for run in done if run.method != "no tuning"}
    if counts:
        title("2.3 Share of parameters trained")
        rows = [
            [str(r) if r else "full", f"{n:,}", f"{total:,}", percent(n / total, 2)]
            for r, (n, total) in counts.items()
        ]
        table("r, trained, all, share", rows)
    title("2.4 Template")
    parts.append(("code", config.template))
    if untuned := [run for run in done if run.method == "no tuning"]:
        title("2.5 Accuracy without tuning")
        score = untuned[0].accuracy
        low, high = (percent(p) for p in score["interval"])
        say(
            f"{percent(score['accuracy'])} of {score['n']} test examples (95 % interval {low} to {high}); "
            f"{percent(score['garbage'])} of the answers name no label."
        )
    if runs:
        title("2.6 Results")
        head = "method, r, alpha, lr, trained, share, validation loss, test accuracy, 95 % interval, each seed, "
        head += "garbage, minutes, MB"
        table(head, method_rows(runs, failed))
        say(
            "Loss and accuracy are means over the seeds, the accuracy's interval (Wilson) what the size of the test "
            "set alone gives. Garbage: answers that name no label; they count as wrong. MB: of the adapter, or of "
            "the whole model. Above the configuration's rank the learning rate falls as 1 / sqrt(r), or training "
            "would be too hot."
        )
    full = [run for run in done if run.method == "full fine-tuning"]
    if full and any(lora.values()):
        try:
            say(tell_losses(config, lora, full))
        except (ValueError, OSError, RuntimeError) as e:  # data or memory may lack here: the rest needs neither
            say(f"Validation losses could not be compared example by example here: {first_line(e)}")
    scores = {r: [run.accuracy["accuracy"] for run in group] for r, group in lora.items() if group}
    means = {r: mean(accuracies) for r, accuracies in scores.items()}
    if means:
        title("2.7 Accuracy over the rank")
        levels = {}
        for method in ("full fine-tuning", "no tuning"):
            if group := [run.accuracy["accuracy"] for run in done if run.method == method]:
                levels[method] = mean(group)
        plot("accuracy", "test accuracy over the rank", paint_accuracy(scores, levels))
        top = max(means, key=means.get)
        text = f"r = {top} is best with {percent(means[top])}"
        if "full fine-tuning" in levels:
            text += f", {compare_points(means[top], levels['full fine-tuning'])} full fine-tuning"
        say(text + ".")
    if ones:
        title("2.8 Validation loss of r = 1")
        other = lora.get(128) or default
        curves = {"r = 1": ones, f"r = {other[0].config.rank}": other} if other else {"r = 1": ones}
        plot("loss-r1", "validation loss of r = 1 over updates", paint_curves(curves))
        say(describe_curve(ones[0], other[0] if other else None))
    moved = [run for run in done if run.method == AGAINST]
    if moved and default:
        title("2.9 Learning rate and alpha")
        three = {f"lr {run.config.lr:g}, alpha {run.config.alpha:g}": run for run in (default[0], *moved)}
        rows = [[name, f"{best(run):.4f}", percent(run.accuracy["accuracy"])] for name, run in three.items()]
        table("run, best validation loss, test accuracy", rows)
        curves = {name: [run] for name, run in three.items()}
        plot("lr-alpha", "validation loss, learning rate against alpha", paint_curves(curves))
        losses, fell = [best(run) for run in three.values()], default[0].metrics[0]["val_loss"] - best(default[0])
        apart = max(losses) - min(losses)
        text = f"Their best losses lie {apart:.4f} apart, {percent(apart / fell, 2)} of what training gained."
        if len(default) > 1:
            text += f" The seed alone moves it by {max(map(best, default)) - min(map(best, default)):.4f}."
        say(
            text
            + " B starts at zero and AdamW's steps have the size of lr whatever the gradient's, so alpha B grows as "
            "alpha times lr, which is the same in the three: to first order they are one knob."
        )
    if of_claims:
        results = claims.gather(of_claims, config, full_rate(config), speeds.get("turns", {}))
        judged = claims.judge_all(results)
        parts += claims.write_chapter(judged, results, picture)
        summary.append(claims.count_verdicts(judged))
    if summary:
        parts.insert(1, ("p", " ".join(summary)))
    if failed:
        title("Runs that failed")
        table("run, reason", [[name, reason] for name, reason in failed.items()])
    return parts


def write_report(config, runs, failed, speeds):
    parts = report(config, runs, failed, speeds)
    write_page(os.path.join(config.sweep_dir, "report.md"), make_markdown(parts))
    write_page(os.path.join(config.sweep_dir, "report.html"), make_html(parts, config.sweep_dir))


def main(config):
    with one_line_errors():
        config.sweep_dir = config.sweep_dir or config.out_dir + "-sweep"
        if config.run or config.task != "instruct":
            raise ValueError("a sweep fine-tunes a base model by instructions: type another --init_from or --task")
        if config.jobs < 1:
            raise ValueError(f"jobs={config.jobs}: type at least 1")
        pick_dtype(pick_device(config.device), config.dtype)
        check_vocabulary(config.init_from)
        runs = plan(config)
        if "claims" in config.only.split(","):
            claims.check_splits(config)
        if config.dry_run:
            list_runs(runs)
            return
        os.makedirs(config.sweep_dir, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = make_runs(config, runs)
    path, speeds = os.path.join(config.sweep_dir, "latency.json"), None
    if {"latency", "claims"} & set(config.only.split(",")):
        if not os.path.exists(path):
            write_json(path, measure_latency(config))
        with open(path, encoding="utf-8") as f:
            speeds = json.load(f)
    with one_line_errors():
        write_report(config, runs, failed, speeds)
    print(f"written: {config.sweep_dir}/report.html, {config.sweep_dir}/report.md")
    if failed:
        print("\n".join(f"error: {name}: {reason}" for name, reason in failed.items()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(configure(sys.argv[1:], cls=SweepConfig, trains=False))
