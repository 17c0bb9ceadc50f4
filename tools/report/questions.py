"""The report of a sweep: a function answers each question of the assignment from the runs' own files."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean

import numpy as np

from configurator import Config
from dataloader import make_loader
from generate import ModelSampler
from plumbing.adapters.peft_format import ADAPTER_WEIGHTS
from plumbing.program.errors import first_line
from plumbing.program.files import whole_file
from plumbing.scoring.accuracy import wilson
from plumbing.scoring.loss_plot import draw_curves
from tools.report import claims
from tools.report.measured_run import losses_of
from tools.report.page import write_page
from tools.report.paint import draw, paint_over_rank
from tools.report.verdicts import estimate
from tools.runs.run import AGAINST, FULL, LORA, UNTUNED, PlannedRun, count_parameters


@dataclass
class Results:
    """What the questions are answered from."""

    config: Config  # the sweep's
    runs: list[PlannedRun]  # all that were planned, without those of the claims
    failed: dict[str, str]  # {name: reason}
    speeds: dict | None  # latency.json

    @cached_property
    def done(self) -> list[PlannedRun]:
        return [run for run in self.runs if run.done()]

    def of(self, method: str) -> list[PlannedRun]:
        """The runs of a method that are done."""
        return [run for run in self.done if run.method == method]

    @cached_property
    def lora(self) -> dict[int, list[PlannedRun]]:
        """{rank: its runs that are done}, without ranks that have none."""
        return group_by(self.of(LORA), lambda run: run.config.rank)

    @property
    def default(self) -> list[PlannedRun]:
        """LoRA's runs of the configuration's rank or, if it is not among the ranks, of the largest."""
        ranks = [run.config.rank for run in self.runs if run.method == LORA]
        rank = self.config.rank if self.config.rank in ranks else max(ranks, default=0)
        return self.lora.get(rank, [])

    def plot_curves(self, name: str, alt: str, groups: dict[str, list[PlannedRun]]) -> tuple:
        """The validation curves of {name: runs}, as a part of the page."""
        curves = {title: [run.curve for run in group] for title, group in groups.items()}
        paint = partial(draw_curves, curves=curves, what="validation loss")
        return draw(self.config.sweep_dir, name, alt, paint)


def write_report(config, runs: list[PlannedRun], failed: dict, speeds: dict | None, of_claims: tuple | None) -> None:
    """report.md, report.html and their pictures in config.sweep_dir. of_claims: the claims' verdicts, results and the
    minutes of a seed."""
    results = Results(config, runs, failed, speeds)
    summary = summarize(results)
    parts = []
    for title, needs, answer in QUESTIONS:
        if needs(results):
            parts += [("h2", title), *answer(results)]
    if of_claims:
        parts += claims.write_chapter(*of_claims, partial(draw, config.sweep_dir))
        summary.append(claims.count_verdicts(of_claims[0]))
    if failed:
        parts += [("h2", "Runs that failed"), ("table", [["run", "reason"], *map(list, failed.items())])]
    head = [("h1", "LoRA fine-tuning: the report")]
    if summary:
        head.append(("p", " ".join(summary)))
    made = f"{config.init_from} on {config.dataset}"
    if runs:
        examples = config.batch_size * config.gradient_accumulation_steps
        seeds = ", ".join(config.seeds.split(","))
        made += f", seeds {seeds}; {config.max_iters} updates of {examples} examples"
    head.append(("p", f"{made}. What is said of runs is read from their own files."))
    for name in ("report.md", "report.html"):
        write_page(os.path.join(config.sweep_dir, name), head + parts)


# --- the questions, in their order -----------------------------------------------------------------

QUESTIONS = []  # (title, what it needs, function)


def question(title: str, needs: Callable = lambda results: results.runs):
    """Registers a function, Results -> the parts below the title. Without what it needs the question is left out."""

    def register(answer: Callable[[Results], list]):
        QUESTIONS.append((title, needs, answer))
        return answer

    return register


@question("2.1 Inference latency", lambda results: results.speeds)
def answer_latency(results):
    shown = {name: results.speeds[name] for name in ("base", "unmerged", "merged")}
    rows = [[name, f"{v['median']:.1f}", f"{v['low']:.1f} to {v['high']:.1f}"] for name, v in shown.items()]
    base, unmerged, merged = (v["median"] for v in shown.values())
    text = (
        f"r = {results.speeds['rank']}, one text, 32 tokens after 52. The unmerged model computes its adapters' "
        f"extra products: it runs at {percent(unmerged / base)} of the base's speed. The merged one, which has the "
        f"base's shapes, runs at {percent(merged / base)}."
    )
    return [("table", [["model", "tokens/s (median)", "lowest to highest"], *rows]), ("p", text)]


@question("2.2 Validation loss", lambda results: results.default)
def answer_loss(results):
    run = results.default[0]
    name = f"r = {run.config.rank}"
    picture = results.plot_curves("loss.svg", f"validation loss of {name} over updates", {name: results.default})
    return [picture, ("p", describe_curve(run))]


@question("2.3 Share of parameters trained", lambda results: results.lora or results.of(FULL))
def answer_share(results):
    counts = {run.config.rank: count_parameters(run.config) for run in results.done if run.method != UNTUNED}
    rows = [[str(r or "full"), f"{n:,}", f"{total:,}", percent(n / total, 2)] for r, (n, total) in counts.items()]
    return [("table", [["r", "trained", "all", "share"], *rows])]


@question("2.4 Template", lambda results: True)
def answer_template(results):
    return [("code", results.config.template)]


@question("2.5 Accuracy without tuning", lambda results: results.of(UNTUNED))
def answer_untuned(results):
    (run,) = results.of(UNTUNED)
    text = (
        f"{percent(run.accuracy)} of {run.score['n']} test examples (95 % interval {show_interval([run])}); "
        f"{percent(run.score['garbage'])} of the answers name no label."
    )
    return [("p", text)]


@question("2.6 Results")
def answer_all(results):
    """The table of the methods and ranks."""
    compared = [run for run in results.runs if run.method != AGAINST]
    groups = group_by(compared, lambda run: (run.method, run.config.rank)).values()
    rows = [describe_group(group, results.failed) for group in groups]
    text = (
        "Loss and accuracy are means over the runs that are done. The accuracy's interval (Wilson) is what the size "
        "of the test set alone gives. Garbage: answers that name no label; they count as wrong. MB: of the adapter, "
        "or of the whole model."
    )
    if 0 < results.config.rank < max(results.lora, default=0):
        text += " Above the configuration's rank the learning rate falls as 1 / sqrt(r)."
    parts = [("table", [HEAD, *rows]), ("p", text)]
    if results.lora and results.of(FULL):
        parts.append(("p", compare_losses(results)))
    return parts


@question("2.7 Accuracy over the rank", lambda results: results.lora)
def answer_rank(results):
    accuracies = {rank: [100 * run.accuracy for run in group] for rank, group in results.lora.items()}
    levels = {method: 100 * mean_accuracy(results.of(method)) for method in (FULL, UNTUNED) if results.of(method)}
    paint = partial(paint_over_rank, lines={LORA: accuracies}, levels=levels, what="test accuracy (%)")
    top = highest(results.lora.values())
    best = mean_accuracy(top[0])
    text = f"r = {' and '.join(str(group[0].config.rank) for group in top)}: {percent(best)}"
    if len(results.lora) > len(top):
        text += ", the highest of these ranks"
    if results.of(FULL):
        text += f", {compare_points(best, mean_accuracy(results.of(FULL)))} full fine-tuning"
    if len(results.lora) > 1:
        text += ". It was chosen by this same test, which flatters the highest"
    picture = draw(results.config.sweep_dir, "accuracy.svg", "test accuracy over the rank", paint)
    return [picture, ("p", f"{text}.")]


@question("2.8 Validation loss of r = 1", lambda results: 1 in results.lora)
def answer_rank_one(results):
    """Beside r = 128 or, without that, the default rank."""
    ones = results.lora[1]
    others = results.lora.get(128) or results.default or ones
    pairs = [(a, b) for a in ones for b in others if a.config.seed == b.config.seed]
    groups = {f"r = {group[0].config.rank}": group for group in (ones, others)}
    picture = results.plot_curves("loss-r1.svg", "validation loss of r = 1 over updates", groups)
    return [picture, ("p", describe_curve(*(pairs[0] if pairs else ones[:1])))]


@question("2.9 Learning rate and alpha", lambda results: results.of(AGAINST) and results.default)
def answer_lr_alpha(results):
    """The default run and two in which the learning rate rises as alpha falls, or falls as it rises."""
    others = results.of(AGAINST)
    own = [run for run in results.default if run.config.seed == others[0].config.seed]
    if len(others) < 2 or not own:
        return [("p", "Of the three runs to compare, with one seed, one is missing.")]
    three = {f"lr {run.config.lr:g}, alpha {run.config.alpha:g}": run for run in (own[0], *others)}
    rows = [[name, f"{run.best_loss:.4f}", percent(run.accuracy)] for name, run in three.items()]
    groups = {name: [run] for name, run in three.items()}
    picture = results.plot_curves("lr-alpha.svg", "validation loss, learning rate against alpha", groups)
    apart = np.ptp([run.best_loss for run in three.values()])
    gained = own[0].curve[0][1] - own[0].best_loss
    seeds = [run.best_loss for run in results.default]
    text = (
        "B starts at zero and AdamW's steps have the size of lr whatever the gradient's, so alpha B grows as alpha "
        "times lr, which is the same in the three: to first order they should do the same. Their best losses lie "
        f"{apart:.4f} apart"
    )
    text += f", {percent(apart / gained, 2)} of what training gained." if gained > 0 else "."
    if len(seeds) > 1:
        text += f" Of the first, {len(seeds)} seeds lie {np.ptp(seeds):.4f} apart."
    return [("table", [["run", "best validation loss", "test accuracy"], *rows]), picture, ("p", text)]


# --- in words --------------------------------------------------------------------------------------


def summarize(results):
    """The report in three sentences: the best accuracy, what it cost, LoRA beside full fine-tuning."""
    full = results.of(FULL)
    groups = [group for group in (*results.lora.values(), full) if group]
    if not groups:
        return []
    best = highest(groups)
    top = best[0]
    trained, total = count_parameters(top[0].config)
    sentences = [
        f"Best is {' and '.join(map(name_of, best))}: {percent(mean_accuracy(top))} of {top[0].score['n']} test "
        f"examples (95 % interval {show_interval(top)}).",
        f"{'It' if len(best) == 1 else 'The first'} trains {trained:,} of {total:,} parameters "
        f"({percent(trained / total)}) in {mean(run.minutes for run in top):.1f} minutes.",
    ]
    if results.lora and full:
        lora = max(results.lora.values(), key=mean_accuracy)
        trained, _ = count_parameters(lora[0].config)
        sentences.append(
            f"{name_of(lora)} is {compare_points(mean_accuracy(lora), mean_accuracy(full))} full fine-tuning "
            f"({percent(mean_accuracy(full))}) at {percent(trained / total, 2)} of its parameters; its best "
            f"validation loss is {compare(mean_loss(lora), mean_loss(full))} full fine-tuning's."
        )
    return sentences


def compare_losses(results):
    """LoRA's validation losses minus those of full fine-tuning, over the same examples."""
    config = results.config
    full = {run.config.seed: run for run in results.of(FULL)}
    paired = {r: [run for run in group if run.config.seed in full] for r, group in results.lora.items()}
    paired = {r: group for r, group in paired.items() if len(group) > 1}
    if not paired:
        return "Losses are compared over two seeds or more that both have: type --seeds=1,2,3."
    gaps = []
    try:
        if claims.draws_validation(config):
            return "The seed draws the validation split, so validation losses are not compared example by example."
        for rank, group in paired.items():
            pair = {LORA: group, FULL: [full[run.config.seed] for run in group]}
            losses = {x: np.stack([losses_of_run(run, config.device) for run in runs]) for x, runs in pair.items()}
            gap = estimate(lambda means: means[LORA] - means[FULL], losses)
            gaps.append(f"r = {rank} {claims.show(gap)}")
    except (ValueError, OSError, RuntimeError) as e:  # data that is gone, or no memory: the rest needs neither
        return f"Validation losses could not be compared example by example here: {first_line(e)}"
    return (
        "LoRA's validation loss minus full fine-tuning's, seed by seed and example by example, with the 95 % "
        f"interval that these leave: {', '.join(gaps)}."
    )


def losses_of_run(run, device):
    """The validation losses of a finished run's best weights, example by example; kept in its folder as
    val_losses.npy."""
    path = run.path("val_losses.npy")
    weights = [run.path(name) for name in (ADAPTER_WEIGHTS, "model.safetensors")]
    written = max(os.path.getmtime(file) for file in weights if os.path.exists(file))
    if not os.path.exists(path) or os.path.getmtime(path) < written:
        sampler = ModelSampler(run.folder, device=device)
        sampler.load_model()
        loader = make_loader(sampler.config, sampler.block_size, wanted=("validation",))
        losses = losses_of(sampler, loader, "validation")
        with whole_file(path) as f:
            np.save(f, losses)
    return np.load(path)


def describe_curve(run, other=None):
    """What a validation curve shows, also beside another run's."""
    curve = run.curve
    first = curve[0][1]
    last_at, last = curve[-1]
    low_at, low = min(curve, key=lambda point: point[1])
    text = f"With seed {run.config.seed} r = {run.config.rank} begins at {first:.4f} and is lowest, {low:.4f}, "
    text += f"at update {low_at} of {last_at}."
    # Where the last quarter begins or, with few evaluations, at the last one before it.
    since, before = max(point for point in curve if point[0] <= 0.75 * last_at)
    if low_at == 0:
        text += " Training has not lowered it."
    elif last > low * 1.01:
        text += f" It has risen by {last - low:.4f} since, and the best weights are kept."
    elif since == 0:
        pass  # one evaluation after the start tells nothing about the end
    elif before - last > last * 0.01 and low_at == last_at:
        text += f" It still falls at the end: by {before - last:.4f} since update {since}."
    else:
        text += f" It is flat at the end: since update {since} it has changed by {abs(before - last):.4f}."
    if other and other is not run:
        theirs = dict(other.curve)
        above = [loss > theirs[it] for it, loss in curve if it and it in theirs]
        if above:
            text += f" It lies above r = {other.config.rank}'s at {sum(above)} of {len(above)} evaluations."
        text += f" Its best loss is {compare(low, other.best_loss)} that of r = {other.config.rank}."
    return text


def compare(value, other, digits=4, unit=""):
    """How a loss compares with another one, as both are shown."""
    gap = round(value, digits) - round(other, digits)
    size = f"{abs(gap):.{digits}f}"
    return f"{size}{unit} {'above' if gap > 0 else 'below'}" if float(size) else "the same as"


def compare_points(accuracy, other):
    return compare(100 * accuracy, 100 * other, 1, " points")


HEAD = ["method", "r", "alpha", "lr", "trained", "share", "validation loss", "test accuracy", "95 % interval"]
HEAD += ["each seed", "garbage", "minutes", "MB"]


def describe_group(group, failed):
    """A row of the table: the runs of a method and rank, over their seeds. What does not apply stays empty."""
    method = group[0].method
    config = group[0].config
    done = [run for run in group if run.done()]
    lost = "; ".join(f"{run.name}: {failed.get(run.name, 'not run')}" for run in group if run not in done)
    row = {"method": method, "test accuracy": lost}
    if method == LORA:
        row |= {"r": str(config.rank), "alpha": f"{config.alpha:g}"}
    if method != UNTUNED:
        row["lr"] = f"{config.lr:g}"
    if done:
        trained, total = count_parameters(config)
        trained = 0 if method == UNTUNED else trained
        row |= {"trained": f"{trained:,}", "share": percent(trained / total, 2)}
        row["test accuracy"] = f"{percent(mean_accuracy(done))} {lost}".strip()
        row["95 % interval"] = show_interval(done)
        row["each seed"] = ", ".join(f"{100 * run.accuracy:.1f}" for run in done)
        row["garbage"] = percent(mean(run.score["garbage"] for run in done))
    if done and method != UNTUNED:
        row["validation loss"] = f"{mean_loss(done):.4f}"
        row["minutes"] = f"{mean(run.minutes for run in done):.1f}"
        size = os.path.getsize(done[0].path(ADAPTER_WEIGHTS if method == LORA else "model.safetensors"))
        row["MB"] = f"{size / 1e6:.2f}"
    return [row.get(name, "") for name in HEAD]


# --- groups of runs, one for each seed -------------------------------------------------------------


def group_by(runs, key):
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def name_of(group):
    rank = group[0].config.rank
    return f"LoRA with r = {rank}" if rank else FULL


def mean_accuracy(group):
    return mean(run.accuracy for run in group)


def highest(groups):
    """Those whose mean accuracy is the highest, as it is shown."""
    shown = [round(100 * mean_accuracy(group), 1) for group in groups]
    return [group for group, points in zip(groups, shown) if points == max(shown)]


def mean_loss(group):
    return mean(run.best_loss for run in group)


def show_interval(group):
    """The 95 % interval of their mean accuracy."""
    low, high = wilson(mean_accuracy(group), group[0].score["n"])
    return f"{percent(low)} to {percent(high)}"


def percent(share, digits=1):
    return f"{100 * share:.{digits}f} %"
