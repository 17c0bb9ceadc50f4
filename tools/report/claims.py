"""What the LoRA papers claim, tested here: the trainings, a rule for each claim, the report's chapter.

    python -m tools.sweep configs/finetune_mini_config.py --only=claims

Each rule computes its verdict from the runs' losses of the same validation examples, compared pair by pair, with the
interval that examples and seeds leave (tools/report/verdicts.py).
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataloader import make_loader
from generate import ModelSampler
from plumbing.adapters.peft_format import ADAPTER_WEIGHTS
from plumbing.gpt2.files import context_size
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import whole_file
from plumbing.scoring.accuracy import wilson
from tools.report import directions
from tools.report.paint import (
    LOSS,
    paint_differences,
    paint_over_rank,
    paint_rates,
    paint_similarity,
    paint_stress,
    write_rate,
)
from tools.report.verdicts import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Estimate,
    bootstrap,
    bootstrap_mean,
    find_best_rate,
    judge,
    ratio,
    seed_deviation,
)

# --- the trainings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a training has of its own. lr, alpha and batch are multiples of the configuration's: of its learning rate
    (without LoRA, of the sweep's for full fine-tuning), of the alpha that its scale gives r = 16, of its batch."""

    rank: int = 16
    lr: float = 1
    alpha: float = 1
    batch: float = 1
    targets: str = ""  # the layers, a regular expression; "": the configuration's
    rslora: bool = False
    lora_plus: float = 1

    @property
    def name(self) -> str:
        words = [f"r{self.rank}" if self.rank else "full"]
        words += [f"{key}{getattr(self, key):g}" for key in ("lr", "alpha", "batch") if getattr(self, key) != 1]
        words += [place for place, setting in PLACES.items() if self.targets and setting.targets == self.targets]
        words += ["rslora"] * self.rslora
        words += ["plus"] * (self.lora_plus != 1)
        return "-".join(words).replace("query, key, value", "qkv")


def curve(rates=(0.25, 0.5, 1, 2, 4), **fixed) -> list[Setting]:
    return [Setting(lr=rate, **fixed) for rate in rates]


# For GPT-2 of any width C a rank takes 6 C parameters a layer in attention, 10 C in the MLP, 16 C in both, 4 C in the
# product of query, key and value and 2 C in attention's output: these ranks make it 96 C (the MLP's 100 C).
PLACES = {
    "attention": Setting(16, targets=r"attn\.c_(attn|proj)$"),
    "MLP": Setting(10, targets=r"mlp\.c_(fc|proj)$"),
    "all": Setting(6, targets=r"\.c_(attn|proj|fc)$"),
    "query, key, value": Setting(24, targets=r"attn\.c_attn$"),
    "output": Setting(48, targets=r"attn\.c_proj$"),
}
LORA = curve()
FULL = curve(rank=0)
SAME_ALPHA = {4: curve((0.5, 1, 2, 4), rank=4), 16: LORA, 64: curve((0.5, 1, 2, 4), rank=64)}  # scale: alpha / r
SAME_SCALE = {4: curve((0.5, 1, 2, 4), rank=4, alpha=0.25), 16: LORA, 64: curve((0.25, 0.5, 1, 2), rank=64, alpha=4)}
RANKS = {rank: Setting(rank) for rank in (1, 2, 4, 16, 64, 128)}
TRADES = [Setting(lr=2, alpha=0.5), Setting(lr=0.5, alpha=2)]
BATCHES = {  # {size: (LoRA, full)}, over the learning rates that may suit it
    0.25: (curve((0.5, 1), batch=0.25), curve((0.5, 1), rank=0, batch=0.25)),
    1: (LORA, FULL),
    4: (curve((1, 2, 4), batch=4), curve((1, 2, 4), rank=0, batch=4)),
}
# At r = 16 a quarter of alpha over sqrt(r) is the configuration's own scale.
STABLE = {rank: Setting(rank, alpha=0.25, rslora=True) for rank in (4, 64, 128)} | {16: Setting()}
PLUS = curve((0.125, 0.25, 0.5), lora_plus=16)
SMALL, LARGE = Setting(8), Setting(64)


def plan() -> list[tuple[Setting, int]]:
    """Every training of the claims, and whether it has the first seed (0) or the second (1). What several claims ask
    for is made once."""
    once = [*LORA, *FULL, *(s for curves in (SAME_ALPHA, SAME_SCALE) for group in curves.values() for s in group)]
    once += [s for pair in BATCHES.values() for group in pair for s in group] + [SMALL]
    once += [*RANKS.values(), *PLACES.values(), *STABLE.values()]
    # A second seed for what decides a verdict.
    twice = [*LORA[1:4], *FULL[1:4], RANKS[1], LARGE, RANKS[128], *TRADES, STABLE[4], STABLE[128], *PLUS]
    twice += [PLACES["attention"], PLACES["MLP"], PLACES["output"]]
    return [(s, 0) for s in dict.fromkeys(once + twice)] + [(s, 1) for s in dict.fromkeys(twice)]


def run_name(setting: Setting, n: int) -> str:
    """The folder of the training with the first (0) or the second seed (1)."""
    return f"claims-{setting.name}{'-again' if n else ''}"


def count_updates(config) -> int:
    """Those of a training: a quarter of the configuration's, a multiple of 4."""
    return max(4, config.max_iters // 16 * 4)


def make_settings(setting: Setting, config, full_lr: float, scale: float) -> dict:
    """The keys of Config of a training."""
    n_updates = max(2, round(count_updates(config) / setting.batch))
    settings = {"rank": setting.rank, "rslora": setting.rslora, "lora_plus": setting.lora_plus}
    settings |= {"lr": setting.lr * (config.lr if setting.rank else full_lr), "alpha": setting.alpha * scale * 16}
    settings |= {"max_iters": n_updates, "eval_interval": n_updates, "warmup_iters": n_updates // 10}
    settings["eval_iters"] = 1  # it only tells the last weights from the first; compute_losses takes the whole split
    if setting.batch > 1:
        settings["gradient_accumulation_steps"] = round(config.gradient_accumulation_steps * setting.batch)
    else:
        settings["batch_size"] = max(1, round(config.batch_size * setting.batch))
    if setting.targets:
        settings["lora_targets"] = setting.targets
    if not setting.rank:
        settings["dropout"] = 0.0
    return settings


# --- what the trainings left -----------------------------------------------------------------------


def draws_validation(config) -> bool:
    """Whether the validation split follows from the seed: then runs of two seeds have no example in common to compare
    them by."""
    return "validation" in make_loader(config, context_size(config.init_from)).drawn


def check_splits(config) -> None:
    """Raises UserError for data by which runs of two seeds cannot be compared."""
    if draws_validation(config):
        raise UserError(
            f"dataset={config.dataset}: claims are compared over seeds, and here the seed draws the validation "
            "split; name the splits by files (train.csv, validation.csv, test.csv) or a column split"
        )


@torch.no_grad()
def compute_losses(sampler: ModelSampler) -> np.ndarray:
    """(n,): each validation example's mean loss over its scored tokens, in nats, in the split's order."""
    sampler.load_model()
    loader = make_loader(sampler.config, sampler.block_size, wanted=("validation",))
    losses = np.empty(len(loader.splits["validation"]))
    for indices in loader.order("validation", loader.batch_size):
        batch = loader.batch("validation", indices).to(sampler.device)
        logits, _ = sampler.model(batch.idx, batch.targets, prefix=batch.prefix)  # (N, V) of the scored places
        scored = batch.targets >= 0  # (B, T), N of them True
        each = F.cross_entropy(logits.float(), batch.targets[scored], reduction="none")  # (N,)
        rows = scored.nonzero()[:, 0]  # (N,): whose token it is
        sums = each.new_zeros(len(indices)).index_add(0, rows, each)
        losses[indices] = (sums / scored.sum(1)).cpu().numpy()
    return losses


def losses_of_run(folder: str, device: str) -> np.ndarray:
    """The validation losses of a finished run's best weights, example by example; kept in its folder as
    val_losses.npy."""
    path = os.path.join(folder, "val_losses.npy")
    weights = [os.path.join(folder, name) for name in (ADAPTER_WEIGHTS, "model.safetensors")]
    written = max(os.path.getmtime(file) for file in weights if os.path.exists(file))
    if not os.path.exists(path) or os.path.getmtime(path) < written:
        losses = compute_losses(ModelSampler(folder, device=device))
        with whole_file(path) as f:
            np.save(f, losses)
    return np.load(path)


@dataclass
class Results:
    """What the rules judge. A setting whose training failed is not in it, and asking for it is a KeyError."""

    losses: dict[Setting, np.ndarray]  # (seeds, validation examples)
    accuracies: dict[Setting, list[float]]  # on the test split, one for each seed
    n_test: int
    lr: float  # the configuration's learning rates, and its batch in examples
    full_lr: float
    batch: int
    n_examples: int  # that each training sees
    folders: dict[tuple[Setting, int], str]  # of (setting, 0 or 1 for its seed)
    turns: dict[str, list[float]]  # {"base", "merged", "unmerged"}: tokens/s, turn by turn

    @functools.cached_property
    def deviation(self) -> float:
        return seed_deviation(self.losses)

    def estimate(self, statistic: Callable, *settings: Setting) -> Estimate:
        return bootstrap(statistic, {s: self.losses[s] for s in settings}, self.deviation)

    def gap(self, setting: Setting, other: Setting) -> Estimate:
        """The setting's loss minus the other's."""
        return self.estimate(lambda means: means[setting] - means[other], setting, other)

    def loss(self, setting: Setting) -> float:
        return float(self.losses[setting].mean())

    def paint_over_rank(self, lines: dict[str, dict[int, Setting]]) -> Callable:
        """How to paint the losses of {name: {rank: setting}}."""
        losses = {name: {r: self.losses[s].mean(axis=1) for r, s in line.items()} for name, line in lines.items()}
        return partial(paint_over_rank, lines=losses, levels={}, what=LOSS)

    def best(self, settings: list[Setting]) -> Setting:
        return min(settings, key=self.loss)

    def rate(self, setting: Setting) -> float:
        return setting.lr * (self.lr if setting.rank else self.full_lr)

    def tell(self, setting: Setting) -> str:
        """Loss and accuracy of a setting, over its seeds."""
        p = mean(self.accuracies[setting])
        low, high = wilson(p, self.n_test)
        return f"{self.loss(setting):.4f} (accuracy {100 * p:.1f} %, {100 * low:.1f} to {100 * high:.1f})"


def lowest(means: dict, settings: list[Setting]) -> float:
    return min(means[s] for s in settings)


def show_times(e: Estimate) -> str:
    """A ratio of learning rates, either of which may lie beyond those that were tried."""
    if math.isnan(e.value):
        return "an unknown ratio"
    value = f"{e.value:.2g} times" if 0 < e.value < math.inf else "beyond what was tried"
    if e.low <= 0 and math.isinf(e.high):
        return f"{value} (nothing excluded)"
    if e.low <= 0:
        return f"{value} ({e.high:.2g} or less)"
    return f"{value} ({e.low:.2g} or more)" if math.isinf(e.high) else f"{value} ({e.low:.2g} to {e.high:.2g})"


def show(e: Estimate, digits: int = 4) -> str:
    return f"{e.value:+.{digits}f} ({e.low:+.{digits}f} to {e.high:+.{digits}f})"


def gather(runs: dict, config, full_lr: float, turns: dict) -> Results:
    """Results from the runs that are done, {name: PlannedRun}."""
    losses, accuracies, folders = {}, {}, {}
    n_test = 0
    for setting, n in tqdm(plan(), unit="run", desc="validation losses", disable=None):
        run = runs.get(run_name(setting, n))
        if run is None or not run.done():
            continue
        folders[setting, n] = run.config.out_dir
        losses.setdefault(setting, []).append(losses_of_run(run.config.out_dir, config.device))
        accuracies.setdefault(setting, []).append(run.accuracy)
        n_test = run.score["n"]
    batch = config.batch_size * config.gradient_accumulation_steps
    losses = {setting: np.stack(rows) for setting, rows in losses.items()}
    n_examples = count_updates(config) * batch
    return Results(losses, accuracies, n_test, config.lr, full_lr, batch, n_examples, folders, turns)


# --- the claims ------------------------------------------------------------------------------------

MARGIN = 0.05  # "as good as": its loss is at most so much higher, as a share of the other's


@dataclass
class Verdict:
    """What a rule says: the measurement in words, the verdict, and how to paint it (see paint.draw)."""

    here: str
    verdict: str
    paint: Callable | None = None
    size: tuple = (5.4, 3.6)  # inches
    panels: int = 1


def paint_rows(rows, what="difference of the losses"):
    """How to paint intervals one below the other, and the size of that picture."""
    return partial(paint_differences, rows=rows, what=what), (5.4, 1 + 0.6 * len(rows))


CLAIMS = []  # (number, the claim's words, source, rule)


def claim(number: str, words: str, source: str):
    """Puts a rule, Results -> Verdict, on the list of claims."""

    def register(rule):
        CLAIMS.append((number, words, source, rule))
        return rule

    return register


HU = "Hu et al. 2021"
SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"


@claim("1", "LoRA reaches full fine-tuning", f"{HU}, section 5; {SCHULMAN}")
def reaches_full(results):
    lora, full = results.best(LORA), results.best(FULL)
    gap = results.estimate(lambda m: lowest(m, LORA) - lowest(m, FULL), *LORA, *FULL)
    here = (
        f"Each at its best learning rate: LoRA {results.tell(lora)}, full fine-tuning {results.tell(full)}. LoRA's "
        f"loss minus the other: {show(gap)}."
    )
    rows = [("LoRA minus full", gap)]
    return Verdict(here, judge(gap, at_most=MARGIN * results.loss(full)), *paint_rows(rows))


@claim("2", "A very small rank is enough", f"{HU}, section 7.2, table 6")
def small_rank_is_enough(results):
    large = [RANKS[16], RANKS[64], RANKS[128]]
    gaps = {r: results.estimate(lambda m, r=r: m[RANKS[r]] - lowest(m, large), RANKS[r], *large) for r in (1, 2, 4)}
    here = "Alpha and learning rate are the same for all. Loss minus that of the best of r = 16, 64, 128: "
    here += ", ".join(f"r = {r}: {show(gap)}" for r, gap in gaps.items())
    here += f". r = 1: {results.tell(RANKS[1])}; r = 16: {results.tell(RANKS[16])}. The verdict is on r = 1."
    verdict = judge(gaps[1], at_most=MARGIN * results.loss(results.best(large)))
    return Verdict(here, verdict, results.paint_over_rank({"LoRA": RANKS}))


def compare_places(results):
    """Each place's loss minus that of all linear layers, for the picture of both claims about places."""
    every = PLACES["all"]
    return [(f"{name}, r = {s.rank}", results.gap(s, every)) for name, s in PLACES.items() if s != every]


@claim("3a", "Several attention matrices with a small rank beat one with a large rank", f"{HU}, section 7.1, table 5")
def several_beat_one(results):
    several, one = PLACES["attention"], PLACES["output"]
    gap = results.gap(several, one)
    here = (
        f"Equal numbers of trained parameters: all of attention, r = 16, {results.tell(several)}; its output alone, "
        f"r = 48, {results.tell(one)}: {show(gap)}. GPT-2 holds query, key and value in one matrix, so query and "
        "value alone are not tried."
    )
    return Verdict(here, judge(gap, at_most=0), *paint_rows(compare_places(results), "loss minus all layers'"))


@claim("3b", "The MLP matters more than attention", SCHULMAN)
def mlp_beats_attention(results):
    mlp, attention = PLACES["MLP"], PLACES["attention"]
    gap = results.gap(mlp, attention)
    here = (
        f"About equal numbers of trained parameters: the MLP alone, r = 10, {results.tell(mlp)}; attention "
        f"alone, r = 16, {results.tell(attention)}: {show(gap)}. All layers, r = 6: {results.tell(PLACES['all'])}."
    )
    return Verdict(here, judge(gap, at_most=0))  # its picture is that of the claim before


def best_rate(results, means, settings):
    return find_best_rate([results.rate(s) for s in settings], [means[s] for s in settings])


def tell_rate(results, settings):
    """The best learning rate of a curve, in words."""
    rate = best_rate(results, {s: results.loss(s) for s in settings}, settings)
    if rate == 0:
        return f"{write_rate(results.rate(settings[0]))} or less"
    return f"{write_rate(results.rate(settings[-1]))} or more" if math.isinf(rate) else write_rate(rate)


def paint_curves(results, curves):
    """{name: settings} as losses over learning rates, for paint_rates."""
    lines = {}
    for name, settings in curves.items():
        points = [(results.rate(s), results.loss(s)) for s in settings]
        lines[name] = (points, best_rate(results, {s: results.loss(s) for s in settings}, settings))
    return partial(paint_rates, lines=lines)


@claim(
    "4a", "LoRA's best learning rate is about 10 times that of full fine-tuning", f"{SCHULMAN} (9.8 over 14 models)"
)
def ten_times_the_rate(results):
    times = results.estimate(lambda m: ratio(best_rate(results, m, LORA), best_rate(results, m, FULL)), *LORA, *FULL)
    here = (
        f"Best rate with r = 16: {tell_rate(results, LORA)}, without LoRA: {tell_rate(results, FULL)}; "
        f"{show_times(times)}. About 10 is taken as 5 to 20."
    )
    return Verdict(here, judge(times, 5, 20), paint_curves(results, {"r = 16": LORA, "full": FULL}))


def rate_over_rank(results, curves):
    """How many times the best rate of the largest rank is that of the smallest, and all of them in words."""
    low, high = curves[4], curves[64]
    times = results.estimate(lambda m: ratio(best_rate(results, m, high), best_rate(results, m, low)), *low, *high)
    rates = ", ".join(f"r = {r}: {tell_rate(results, settings)}" for r, settings in curves.items())
    return times, f"Best rates: {rates}; from r = 4 to 64 {show_times(times)}."


@claim("4b", "With alpha / r and one alpha the best learning rate hardly depends on the rank", SCHULMAN)
def rate_stays(results):
    times, here = rate_over_rank(results, SAME_ALPHA)
    curves = {f"r = {r}": settings for r, settings in SAME_ALPHA.items()}
    return Verdict(f"{here} Hardly: by less than twice.", judge(times, 0.5, 2), paint_curves(results, curves))


@claim("4c", "With one alpha / r the best learning rate falls with the rank", SCHULMAN)
def rate_falls(results):
    times, here = rate_over_rank(results, SAME_SCALE)
    curves = {f"r = {r}": settings for r, settings in SAME_SCALE.items()}
    return Verdict(here, judge(times, at_most=1), paint_curves(results, curves))


@claim("5", "Learning rate and alpha are nearly redundant", "the assignment, question 2.9")
def rate_is_alpha(results):
    own = Setting()
    gaps = {s: results.gap(s, own) for s in TRADES}
    names = {s: f"lr x {s.lr:g}, alpha x {s.alpha:g}" for s in TRADES}
    margin = MARGIN * results.loss(own)
    here = f"The configuration's: {results.tell(own)}. Loss minus that: "
    here += "; ".join(f"{names[s]}: {show(gap)}, {results.tell(s)}" for s, gap in gaps.items()) + "."
    verdicts = [judge(gap, -margin, margin) for gap in gaps.values()]
    verdict = FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS
    rows = [(names[s], gap) for s, gap in gaps.items()]
    return Verdict(here, verdict, *paint_rows(rows, "loss minus the configuration's"))


@claim("6", "LoRA tolerates large batches less well than full fine-tuning", SCHULMAN)
def large_batches(results):
    def gap(means, batch):
        lora, full = BATCHES[batch]
        return lowest(means, lora) - lowest(means, full)

    settings = {batch: [*lora, *full] for batch, (lora, full) in BATCHES.items()}
    gaps = {b: results.estimate(lambda m, b=b: gap(m, b), *group) for b, group in settings.items()}
    growth = results.estimate(lambda m: gap(m, 4) - gap(m, 0.25), *settings[0.25], *settings[4])
    shown = {b: f"batch {round(b * results.batch)}" for b in gaps}
    here = "LoRA's loss minus that of full fine-tuning, each at the best of the rates tried, equal examples: "
    here += ", ".join(f"{shown[b]}: {show(e)}" for b, e in gaps.items())
    here += f". From the smallest to the largest: {show(growth)}."
    rows = [(shown[b], e) for b, e in gaps.items()]
    return Verdict(here, judge(growth, at_least=0), *paint_rows(rows, "LoRA's loss minus full's"))


@claim("7", "With alpha / sqrt(r) higher ranks keep learning", "Kalajdzievski 2023, rsLoRA")
def stable_ranks(results):
    gain = results.gap(STABLE[128], STABLE[4])
    plain = results.gap(RANKS[128], RANKS[4])
    here = (
        f"r = 128's loss minus r = 4's: {show(gain)} with alpha / sqrt(r), {show(plain)} with alpha / r. r = 128: "
        f"{results.tell(STABLE[128])} and {results.tell(RANKS[128])}."
    )
    ranks = sorted(STABLE)
    lines = {"alpha / sqrt(r)": {r: STABLE[r] for r in ranks}, "alpha / r": {r: RANKS[r] for r in ranks}}
    return Verdict(here, judge(gain, at_most=0), results.paint_over_rank(lines))


@claim("8", "A higher learning rate for B than for A speeds learning up", "Hayou et al. 2024, LoRA+, ratio 16")
def plus_is_faster(results):
    plus, plain = results.best(PLUS), results.best(LORA)
    gap = results.estimate(lambda m: lowest(m, PLUS) - lowest(m, LORA), *PLUS, *LORA)
    here = (
        f"After equal updates, each at the best of its rates: ratio 16, {write_rate(results.rate(plus))} for A, "
        f"{results.tell(plus)}; ratio 1, {write_rate(results.rate(plain))}, {results.tell(plain)}: {show(gap)}."
    )
    return Verdict(here, judge(gap, at_most=0), paint_curves(results, {"ratio 1": LORA, "ratio 16": PLUS}))


@claim("9", "No added latency once merged", f"{HU}, section 4.1; the assignment, question 2.1")
def merged_is_free(results):
    pairs = {
        name: bootstrap_mean([a / b for a, b in zip(results.turns[name], results.turns["base"])])
        for name in ("merged", "unmerged")
    }
    here = "Tokens a second over the base's: " + ", ".join(
        f"{name} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for name, e in pairs.items()
    )
    rows = [(name, Estimate(*(x - 1 for x in (e.value, e.low, e.high)))) for name, e in pairs.items()]
    paint = paint_rows(rows, "speed over the base's, minus 1")
    return Verdict(f"{here}. None: less than 5 %.", judge(pairs["merged"], at_least=0.95), *paint)


@claim("10", "The directions that a small rank finds are those that a large rank finds first", f"{HU}, section 7.2")
def shared_directions(results):
    # Two seeds: with one, both A would be drawn from the same random numbers.
    small, large, twin = (results.folders[key] for key in ((SMALL, 0), (LARGE, 1), (LARGE, 0)))
    layers = study(small, large)
    twins = study(twin, large)
    first = bootstrap_mean([float(x.similarity_A[0, 7]) for x in layers])
    first_update = mean(float(x.similarity[0, 7]) for x in layers)
    by_chance = mean(8 / x.n_in for x in layers)
    here = (
        f"How much of the first direction of r = 8's A lies within the first 8 of r = 64's, mean over {len(layers)} "
        f"layers: {first.value:.2f} ({first.low:.2f} to {first.high:.2f}); of random matrices {by_chance:.2f}; of "
        f"the update's own first direction {first_update:.2f}. The paper's measure of shared: above 0.5."
    )
    maps = [("r = 8 and r = 64", directions.mean_similarity(layers, 8, 64)[0][1])]
    two = dict(directions.mean_similarity(twins, 64, 64))
    maps += [("two seeds of r = 64", two["A"]), ("random", two["random"])]
    paint = partial(paint_similarity, maps=maps, rows="first i", columns="first j")
    return Verdict(here, judge(first, at_least=0.5), paint, (5.4, 2.4), 3)


@claim("11", "What LoRA adds is not what W0 already stresses", f"{HU}, section 7.3, table 7")
def not_stressed(results):
    layers = study(results.folders[Setting(), 0])
    # On a log scale: how much nearer W0's part along the update is to that along random directions than to its own.
    nearer = bootstrap_mean([math.log(x.own / x.stressed) - math.log(x.stressed / x.random) for x in layers])
    own, stressed, by_chance = (mean(getattr(x, key) for x in layers) for key in ("own", "stressed", "random"))
    factor = mean(x.amplification for x in layers)
    here = (
        f"Mean over {len(layers)} layers of |U^T W0 V|: {stressed:.2f} along the update's 16 directions, "
        f"{by_chance:.2f} along random ones, {own:.2f} along W0's own; the update is {factor:.2f} times the first. "
        f"Nearer to random than to its own, as a logarithm of ratios: {show(nearer, 2)}."
    )
    paint = partial(paint_stress, layers=[(x.own, x.stressed, x.random) for x in layers])
    return Verdict(here, judge(nearer, at_least=0), paint)


def study(folder, other=None):
    """The anatomy of a run's adapter, layer by layer."""
    adapter = directions.Adapter(folder)
    base = directions.Base(adapter.config["base_model_name_or_path"])
    return list(directions.study(adapter, base, directions.Adapter(other) if other else None))


# --- the chapter -----------------------------------------------------------------------------------


def judge_all(results: Results) -> list[tuple]:
    """(number, words, source, Verdict) of each claim; a claim whose trainings are not all there is not measured."""
    rows = []
    for number, words, source, rule in CLAIMS:
        try:
            verdict = rule(results)
        except KeyError as e:
            key = e.args[0]
            what = getattr(key[0] if isinstance(key, tuple) else key, "name", key)
            verdict = Verdict(f"{what} is not there.", MISSING)
        except (ValueError, OSError) as e:  # a base that is gone, say: one claim must not cost the others
            verdict = Verdict(first_line(e), MISSING)
        rows.append((number, words, source, verdict))
    return rows


def count_verdicts(rows: list[tuple]) -> str:
    """One sentence: how many claims hold."""
    verdicts = [verdict.verdict for *_, verdict in rows]
    words = {  # of one, of several
        HOLDS: ("holds here", "hold here"),
        FAILS: ("does not", "do not"),
        OPEN: ("is not told apart by this data", "are not told apart by this data"),
        MISSING: ("was not measured", "were not measured"),
    }
    numbers = {name: verdicts.count(name) for name in words}
    counts = [f"{n} {words[name][n > 1]}" for name, n in numbers.items() if n]
    return f"Of {len(rows)} claims of the LoRA papers {', '.join(counts)}."


def write_chapter(rows: list[tuple], results: Results, plot: Callable) -> list[tuple]:
    """The chapter as parts of a page. plot(name, alt, paint, **options) is paint.draw."""
    parts = [("h2", "What the papers claim, and what these runs say")]
    n_examples = next(iter(results.losses.values())).shape[1] if results.losses else 0
    text = (
        f"Each training sees {results.n_examples:,} examples, a quarter of the configuration's, with one seed or "
        f"two. Losses are of the same {n_examples:,} validation examples, in nats a scored token, compared pair by "
        "pair. A figure is followed by its 95 % interval: over the examples (bootstrap) and over seeds, which move a "
        f"run's loss by {results.deviation:.4f} (standard deviation). As good as: at most {100 * MARGIN:.0f} % more "
        "loss."
    )
    parts.append(("p", text))
    table = [["claim", "source", "here", "verdict"]]
    table += [[f"{number}. {words}", source, v.here, v.verdict] for number, words, source, v in rows]
    parts.append(("table", table))
    for number, words, _, verdict in rows:
        if verdict.paint:
            parts.append(("h3", f"{number}. {words}: {verdict.verdict}"))
            parts.append(plot(f"claim-{number}.svg", words, verdict.paint, panels=verdict.panels, size=verdict.size))
    return parts
