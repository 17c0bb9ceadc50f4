"""What the LoRA papers claim, tested here: the trainings, a rule for each claim, the report's chapter.

    python -m tools.sweep configs/finetune_mini_config.py --only=claims --minutes=60 --jobs=auto

Each rule states a figure that decides its claim, and the margin to which it must be known. The verdict follows from
the figure's interval over paired seeds and paired examples, corrected for the number of claims (see verdicts.py).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import mean

import numpy as np

from dataloader import make_loader
from plumbing.gpt2.files import context_size
from plumbing.program.errors import UserError, first_line
from tools.report import directions, paint
from tools.report.verdicts import (
    FAILS,
    HOLDS,
    LEVEL,
    MISSING,
    N_BLOCKS,
    OPEN,
    Estimate,
    Part,
    Vertex,
    correct,
    estimate,
    estimate_mean,
    judge,
    student,
)
from tools.runs.run import MEASURES

# --- the trainings ---------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Setting:
    """What a training has of its own. lr, alpha, batch and length are multiples: of the configuration's learning rate
    (without LoRA, of the sweep's for full fine-tuning), of the alpha that its scale gives r = 16, of the task's batch
    and number of examples.

    task "text" scores every word, "label" the label alone. One bit a review is learned by any rank in any layer; its
    27 words are not, so most claims are tested on words."""

    rank: int = 16
    lr: float = 2  # near the best on words, of r = 16 and of full fine-tuning
    alpha: float = 1
    batch: float = 1
    length: float = 1
    targets: str = ""  # the layers, a regular expression; "": the configuration's
    rslora: bool = False
    lora_plus: float = 1
    task: str = "text"

    def __repr__(self) -> str:
        words = [self.task, f"r{self.rank}" if self.rank else "full"]
        words += [f"{key}{getattr(self, key):g}" for key in ("lr", "alpha", "batch", "length")]
        words += [place for place, setting in PLACES.items() if self.targets and setting.targets == self.targets]
        words += ["rslora"] * self.rslora + ["plus"] * (self.lora_plus != 1)
        return "-".join(words)


def curve(*rates, **fixed) -> list[Setting]:
    """Over learning rates that double."""
    return [Setting(lr=rate, **fixed) for rate in rates]


# For GPT-2 of any width C a rank takes 6 C parameters a layer in attention, 10 C in the MLP and 2 C in attention's
# output: these ranks make it 96 C (the MLP's 100 C).
PLACES = {
    "attention": Setting(16, targets=r"attn\.c_(attn|proj)$"),
    "MLP": Setting(10, targets=r"mlp\.c_(fc|proj)$"),
    "output": Setting(48, targets=r"attn\.c_proj$"),
}
LORA = curve(1, 2, 4, 8)
FULL = curve(0.5, 1, 2, 4, 8, rank=0)
# Curves that are wide enough for their best rates to contradict each claim about them.
SAME_ALPHA = {1: curve(1, 2, 4, rank=1), 4: curve(1, 2, 4, 8, rank=4), 16: LORA, 64: curve(1, 2, 4, 8, rank=64)}
SAME_SCALE = {4: curve(2, 4, 8, 16, rank=4, alpha=0.25), 16: LORA, 64: curve(0.5, 1, 2, 4, 8, rank=64, alpha=4)}
TRADES = [Setting(lr=4, alpha=0.5), Setting(lr=1, alpha=2)]
BATCHES = {  # {size: (LoRA, full)}
    0.25: (curve(1, 2, 4, batch=0.25), curve(0.5, 1, 2, rank=0, batch=0.25)),
    4: (curve(2, 4, 8, batch=4), curve(2, 4, 8, rank=0, batch=4)),
}
LENGTHS = {  # {number of examples: (r = 1, r = 16)}
    0.25: (curve(2, 4, 8, rank=1, length=0.25), curve(2, 4, 8, 16, length=0.25)),
    1: (SAME_ALPHA[1], LORA),
}
# At r = 16 a quarter of alpha over sqrt(r) is the configuration's own scale.
STABLE = {4: Setting(4, alpha=0.25, rslora=True), 64: Setting(64, alpha=0.25, rslora=True)}
PLAIN = {4: Setting(4), 64: Setting(64)}
PLUS = curve(0.25, 0.5, 1, 2, lora_plus=16)
SMALL, LARGE = Setting(8), Setting(64)
LABEL_LORA = curve(0.5, 1, 2, task="label")
LABEL_FULL = curve(1, 2, 4, rank=0, task="label")


def list_settings() -> list[Setting]:
    """Every training of the claims, once; each is made with every seed."""
    groups = [LABEL_LORA, LABEL_FULL, LORA, FULL, PLUS, TRADES, PLACES.values(), [SMALL, LARGE]]
    groups += [STABLE.values(), PLAIN.values(), *SAME_ALPHA.values(), *SAME_SCALE.values()]
    groups += [*itertools.chain(*BATCHES.values(), *LENGTHS.values())]
    return list(dict.fromkeys(itertools.chain(*groups)))


def run_name(setting: Setting, seed: int) -> str:
    return f"claims-{setting}-seed{seed}"


def make_settings(setting: Setting, config, full_lr: float, scale: float) -> dict:
    """The keys of Config of a training. On words it takes a sixteenth of the configuration's updates with half of its
    batch; on labels, a quarter of its updates."""
    on_words = setting.task == "text"
    batch = config.batch_size * config.gradient_accumulation_steps // (2 if on_words else 1) * setting.batch
    n_updates = config.max_iters // (16 if on_words else 4) / setting.batch * setting.length
    n_updates = max(2, round(n_updates))
    steps = max(1, round(batch / config.batch_size))
    settings = {"rank": setting.rank, "rslora": setting.rslora, "lora_plus": setting.lora_plus}
    settings |= {"lr": setting.lr * (config.lr if setting.rank else full_lr), "alpha": setting.alpha * scale * 16}
    settings |= {"batch_size": max(1, round(batch / steps)), "gradient_accumulation_steps": steps}
    settings |= {"max_iters": n_updates, "eval_interval": n_updates, "warmup_iters": n_updates // 10}
    settings["eval_iters"] = 1  # it only tells the last weights from the first
    settings["loss_on"] = "all" if on_words else "label"
    settings["lora_targets"] = setting.targets or config.lora_targets
    settings["dropout"] = config.dropout if setting.rank else 0.0
    return settings


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


# --- what the trainings left -----------------------------------------------------------------------


class Undecided(Exception):
    """Why nothing can be said of a claim, whatever its interval."""


@dataclass
class Results:
    """What the rules judge. What a failed training would have left is not in it, and asking for it is a KeyError."""

    measures: dict[tuple[Setting, int], dict]  # {(setting, its seed's number): what measured_run.py wrote}
    folders: dict[tuple[Setting, int], str]
    base: np.ndarray  # (n,): the untuned model's loss of each text
    lr: float  # the configuration's learning rates, and its batch in examples
    full_lr: float
    batch: int
    turns: dict[str, list[float]] = field(default_factory=dict)  # {"base", "merged", "unmerged"}: tokens/s

    def seeds(self, *settings: Setting) -> list[int]:
        """The seeds that all of these settings have. Raises KeyError for a setting that has none, or too few."""
        found = {s: {n for known, n in self.measures if known == s} for s in settings}
        if shared := set.intersection(*found.values()):
            return sorted(shared)
        raise KeyError(min(settings, key=lambda s: len(found[s])))

    def losses(self, *settings: Setting, what: str = "") -> dict[Setting, np.ndarray]:
        """{setting: (seeds, examples)}. what: "text", "label" or, by default, what its training was scored by."""
        seeds = self.seeds(*settings)
        return {s: np.stack([self.measures[s, n][what or s.task] for n in seeds]) for s in settings}

    def means(self, *settings: Setting) -> dict[Setting, float]:
        return {s: float(x.mean()) for s, x in self.losses(*settings).items()}

    def rate(self, setting: Setting) -> float:
        return setting.lr * (self.lr if setting.rank else self.full_lr)

    # --- the best of a curve

    def best(self, curve: list[Setting]) -> Setting:
        """That of the lowest loss."""
        means = self.means(*curve)
        return min(curve, key=means.get)

    def vertex(self, curve: list[Setting]) -> Vertex:
        found = Vertex.of(curve, self.losses(*curve))
        if found is None:
            best = self.best(curve)
            end, wanted = ("lowest", "Lower") if best == curve[0] else ("highest", "Higher")
            batch = f" and {best.batch:g} times the batch" if best.batch != 1 else ""
            what = f"r = {best.rank}" if best.rank else "full fine-tuning"
            raise Undecided(
                f"With {what}{batch} the best of the learning rates tried is the {end}, "
                f"{paint.write_rate(self.rate(best))}. {wanted} ones would decide."
            )
        return found

    def best_rate(self, curve: list[Setting]) -> float:
        return self.rate(curve[0]) * 2 ** self.vertex(curve).place()

    def margin(self, task: str = "text") -> float:
        """A difference of losses that matters: MARGIN of what full fine-tuning gains on words, or of its loss on
        labels, where nearly all of the gain is to learn which words are labels at all."""
        if task == "label":
            return MARGIN * self.vertex(LABEL_FULL).loss()
        return MARGIN * (float(self.base.mean()) - self.vertex(FULL).loss())

    # --- comparisons

    def estimate(self, statistic: Callable, *settings: Setting) -> Estimate:
        return estimate(statistic, self.losses(*settings))

    def gap(self, setting: Setting, other: Setting) -> Estimate:
        """The setting's loss minus the other's."""
        return self.estimate(lambda m: m[setting] - m[other], setting, other)

    def compare_lowest(self, curve: list[Setting], other: list[Setting]) -> Estimate:
        """The lowest loss of a curve minus the other's."""
        a, b = self.vertex(curve), self.vertex(other)
        return self.estimate(lambda m: a.loss(m) - b.loss(m), *curve, *other)

    def compare_rates(self, curve: list[Setting], other: list[Setting]) -> Estimate:
        """log2 of how many times the curve's best learning rate is the other's."""
        a, b = self.vertex(curve), self.vertex(other)
        apart = math.log2(self.rate(curve[0]) / self.rate(other[0]))
        return self.estimate(lambda m: a.place(m) - b.place(m) + apart, *curve, *other)

    # --- pictures

    def paint_over_rank(self, lines: dict[str, dict[int, Setting]]) -> Callable:
        """How to paint the losses of {name: {rank: setting}}."""
        losses = {name: {r: self.losses(s)[s].mean(axis=1) for r, s in line.items()} for name, line in lines.items()}
        return partial(paint.paint_over_rank, lines=losses, levels={}, what=paint.LOSS)

    def paint_curves(self, curves: dict[str, list[Setting]]) -> Callable:
        """How to paint the losses of {name: settings} over their learning rates."""
        lines = {}
        for name, curve in curves.items():
            points = [(self.rate(s), loss) for s, loss in self.means(*curve).items()]
            lines[name] = (points, self.best_rate(curve))
        return partial(paint.paint_rates, lines=lines)


def gather(runs: dict, seeds: list[int], config, full_lr: float, base: np.ndarray, turns: dict) -> Results:
    """Results from the runs that are done, {name: PlannedRun}. seeds: those of the claims."""
    batch = config.batch_size * config.gradient_accumulation_steps
    results = Results({}, {}, base, config.lr, full_lr, batch, turns)
    for setting, (n, seed) in itertools.product(list_settings(), enumerate(seeds)):
        run = runs.get(run_name(setting, seed))
        if run is not None and run.done():
            results.folders[setting, n] = run.folder
            with np.load(run.path(MEASURES)) as found:
                results.measures[setting, n] = dict(found)
    return results


# --- the claims ------------------------------------------------------------------------------------

MARGIN = 0.05  # "as good as": it gives away at most so much
DOUBLING = 1.0  # the margin of a learning rate, as log2: twice or half


@dataclass
class Finding:
    """What a rule says. parts: what must hold, each figure known to the margin. here: the measurement in words, with
    {} in the place of each of the figures {name: estimate}. write: how these are written, as in `show`. paint: how to
    paint the claim's picture; without it, that is of the figures with their intervals, over an axis of this name."""

    parts: list[Part]
    margin: float
    here: str
    figures: dict[str, Estimate]
    axis: str = "difference of the losses"
    paint: Callable | None = None
    write: int | Callable = 4
    options: dict = field(default_factory=dict)  # paint.draw's

    def tell(self, level: float) -> str:
        """The measurement, with intervals at this level."""
        return self.here.format(*(show(e, self.write, level) for e in self.figures.values()))

    def draw(self, level: float, plot: Callable, *words: str) -> tuple:
        """The picture, with intervals at this level. words: its file and what it shows."""
        if self.paint:
            return plot(*words, self.paint, **self.options)
        rows = [(name, e.value, *e.interval(level)) for name, e in self.figures.items()]
        differences = partial(paint.paint_differences, rows=rows, what=self.axis)
        return plot(*words, differences, size=(5.4, 1 + 0.6 * len(rows)))


CLAIMS = []


@dataclass
class Claim:
    """Decorates a rule, Results -> Finding, and puts it on the list of claims. The rule's docstring is what the claim
    says and, below that, what the paper measured and how this differs. source: who says so. noise: the standard
    deviation by which a seed moves the figure, that which the examples leave, and the margin, all seen with the
    shipped configuration: from these the plan says what it will be able to see."""

    number: str
    source: str
    noise: tuple[float, float, float]

    def __call__(self, rule: Callable) -> Callable:
        text = rule.__doc__ or rule.__name__.replace("_", " ")  # python -OO leaves out docstrings
        self.words, _, paper = text.partition(".\n\n")
        self.paper = " ".join(paper.split())
        self.rule = rule
        CLAIMS.append(self)
        return rule


def compare_growth(results, pairs: dict[str, tuple], whose: str, than: str, until: str) -> Finding:
    """A claim that the lowest loss of one curve falls behind another's from the first pair of curves to the second.
    pairs: {name: (curve, other)}. until: the words of the growth."""
    vertices = [tuple(map(results.vertex, curves)) for curves in pairs.values()]
    gaps = {name: results.compare_lowest(*curves) for name, curves in pairs.items()}

    def grow(m):
        before, after = (one.loss(m) - other.loss(m) for one, other in vertices)
        return after - before

    growth = results.estimate(grow, *itertools.chain(*itertools.chain(*pairs.values())))
    shown = ", ".join(f"{name}: {{}}" for name in gaps)
    here = f"{whose} lowest loss minus {than}, {shown}; {until}: {{}}."
    figures = gaps | {"growth": growth}
    return Finding([Part(growth, at_least=0)], results.margin(), here, figures, f"{whose} loss minus {than}")


def compare_best_rates(results, curves: dict[str, list[Setting]], pair: tuple, here: str, **bounds) -> Finding:
    """A claim on how many times the best rate of the first of a pair of curves is that of the second. curves: {name:
    one to paint}. here: words with {} for the best rate of each, and for the ratio."""
    times = results.compare_rates(*pair)
    picture = results.paint_curves(curves)
    here = here.format(*(paint.write_rate(results.best_rate(c)) for c in curves.values()), "{}")
    parts = [Part(times, **bounds)]
    return Finding(parts, DOUBLING, here, {"times": times}, paint=picture, write=lambda x: f"{2**x:.2g}")


def compare_rates_over_rank(results, curves: dict[int, list[Setting]], **bounds) -> Finding:
    named = {f"r = {r}": curves[r] for r in (4, 16, 64)}
    here = "Best rates: r = 4: {}, r = 16: {}, r = 64: {}; that of r = 64 is {} times that of r = 4."
    return compare_best_rates(results, named, (curves[64], curves[4]), here, **bounds)


HU = "Hu et al. 2021"
SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"
BIDERMAN = "Biderman et al. 2024, LoRA Learns Less and Forgets Less"


@Claim("1", f"{HU}, section 5; {SCHULMAN}", noise=(0.0018, 0.00075, 0.01))
def reaches_full(results):
    """LoRA reaches full fine-tuning.

    Accuracy or BLEU of RoBERTa to GPT-3 on GLUE, E2E and others after full training. Here: the label's loss
    after equally many updates, each at the lowest point of three learning rates."""
    gap = results.compare_lowest(LABEL_LORA, LABEL_FULL)
    margin = results.margin("label")
    lora, full = (results.vertex(curve).loss() for curve in (LABEL_LORA, LABEL_FULL))
    here = f"Lowest losses: LoRA {lora:.4f}, full fine-tuning {full:.4f}; the difference: {{}}."
    return Finding([Part(gap, at_most=margin)], margin, here, {"LoRA minus full": gap})


@Claim("2", f"{HU}, section 7.2, table 6", noise=(0.0036, 0, 0.019))
def small_rank_is_enough(results):
    """A very small rank is enough.

    WikiSQL and MultiNLI with GPT-3, where r = 1 is about as accurate as r = 64. Here: the loss of a review's
    own words, which hold more than a label's one bit."""
    gap = results.compare_lowest(SAME_ALPHA[1], LORA)
    margin = results.margin()
    here = "r = 1's lowest loss minus that of r = 16, alpha the same: {}."
    lines = {"LoRA, each at its best rate": {r: results.best(c) for r, c in SAME_ALPHA.items()}}
    return Finding([Part(gap, at_most=margin)], margin, here, {"gap": gap}, paint=results.paint_over_rank(lines))


@Claim("3a", f"{HU}, section 7.1, table 5", noise=(0.0046, 0.0021, 0.019))
def several_beat_one(results):
    """Several attention matrices with a small rank beat one with a large rank.

    Query, key, value, output and combinations of them in GPT-3. Here: GPT-2 holds query, key and value in one
    matrix with one A, so all four, r = 16, are compared with the output alone, r = 48: as many parameters, at
    one learning rate."""
    gap = results.gap(PLACES["attention"], PLACES["output"])
    here = "Loss of all of attention minus that of its output alone: {}."
    return Finding([Part(gap, at_most=0)], results.margin(), here, {"attention minus output": gap})


@Claim("3b", SCHULMAN, noise=(0.0093, 0.0041, 0.019))
def mlp_beats_attention(results):
    """The MLP matters more than attention.

    Llama and Qwen, LoRA on the MLP against LoRA on attention, also at equal parameters. Here: r = 10 against r
    = 16, at one learning rate."""
    gap = results.gap(PLACES["MLP"], PLACES["attention"])
    here = "Loss of the MLP alone minus that of attention alone: {}."
    return Finding([Part(gap, at_most=0)], results.margin(), here, {"MLP minus attention": gap})


@Claim("4a", SCHULMAN, noise=(0.077, 0.036, 1))
def ten_times_the_rate(results):
    """LoRA's best learning rate is about 10 times that of full fine-tuning.

    A factor of 9.8 over 14 models, and about 15 in trainings of under a hundred updates. Here: one model, and
    40 updates with the shipped configuration. About 10 is taken as 5 to 20."""
    curves = {"r = 16": LORA, "full": FULL}
    here = "Best rate with r = 16: {}, without LoRA: {}; {} times."
    return compare_best_rates(results, curves, (LORA, FULL), here, at_least=math.log2(5), at_most=math.log2(20))


@Claim("4b", SCHULMAN, noise=(0.086, 0.0031, 1))
def rate_stays(results):
    """With alpha / r and one alpha the best learning rate hardly depends on the rank.

    Ranks 1 to 512, with 1 / r argued for the first updates and seen later on. Here: r = 4 and 64 in short
    trainings. Hardly: by less than twice."""
    return compare_rates_over_rank(results, SAME_ALPHA, at_least=-1, at_most=1)


@Claim("4c", "follows from 4b", noise=(0.099, 0, 1))
def rate_falls(results):
    """With one alpha / r the best learning rate falls with the rank.

    Not measured there. It follows: at the same alpha / r a larger rank moves the weight further in one step."""
    return compare_rates_over_rank(results, SAME_SCALE, at_most=0)


@Claim("5", f"{HU}, section 4.1; the assignment, question 2.9", noise=(0.0048, 0.00071, 0.019))
def rate_is_alpha(results):
    """Learning rate and alpha are nearly redundant.

    With Adam, and the initialization scaled, they call tuning alpha roughly the same as tuning the rate. The
    assignment asks what happens if one is doubled and the other halved. Here: both ways round."""
    alone = [results.gap(s, Setting()).value for s in (LORA[0], LORA[2])]  # half and twice the rate, alpha as it was
    if max(map(abs, alone)) < results.margin():
        raise Undecided("The learning rate alone, halved or doubled, moves the loss by less than the margin.")
    gaps = {f"lr x {s.lr / 2:g}, alpha x {s.alpha:g}": results.gap(s, Setting()) for s in TRADES}
    margin = results.margin()
    shown = "; ".join(f"{name}: {{}}" for name in gaps)
    here = f"Loss minus the configuration's: {shown}. With the rate alone: {alone[0]:+.4f} and {alone[1]:+.4f}."
    parts = [Part(gap, -margin, margin) for gap in gaps.values()]
    return Finding(parts, margin, here, gaps, "loss minus the configuration's")


@Claim("6", SCHULMAN, noise=(0.012, 0.0029, 0.019))
def large_batches(results):
    """LoRA tolerates large batches less well than full fine-tuning.

    In some scenarios, and a higher rank does not help. Measured there: the loss over batch sizes on reasoning
    data. Here: r = 16, equally many examples, so 16 times as many updates with the small batch, each at the
    lowest point of three rates."""
    pairs = {f"batch {round(size * results.batch / 2)}": curves for size, curves in BATCHES.items()}
    return compare_growth(results, pairs, "LoRA's", "full's", "from the small to the large batch")


@Claim("7", "Kalajdzievski 2023, rsLoRA", noise=(0.0052, 0.00066, 0.019))
def stable_ranks(results):
    """With alpha / sqrt(r) a higher rank gains more than with alpha / r.

    Llama 2 over ranks 4 to 2,048 at one learning rate: with alpha / r they end alike, with alpha / sqrt(r)
    higher ranks end lower. Here: r = 4 and 64 at one rate, which need not be the best, both scales equal at r =
    16."""
    gaps = {name: results.gap(ranks[64], ranks[4]) for name, ranks in (("stable", STABLE), ("plain", PLAIN))}
    four = [*STABLE.values(), *PLAIN.values()]
    more = results.estimate(lambda m: m[STABLE[64]] - m[STABLE[4]] - (m[PLAIN[64]] - m[PLAIN[4]]), *four)
    here = "r = 64's loss minus r = 4's: {} with alpha / sqrt(r), {} with alpha / r; the difference of the two: {}."
    lines = {
        "alpha / sqrt(r)": {4: STABLE[4], 16: Setting(), 64: STABLE[64]},
        "alpha / r": {4: PLAIN[4], 16: Setting(), 64: PLAIN[64]},
    }
    picture = results.paint_over_rank(lines)
    return Finding([Part(more, at_most=0)], results.margin(), here, gaps | {"more": more}, paint=picture)


@Claim("8", "Hayou et al. 2024, LoRA+", noise=(0.0047, 0.0009, 0.019))
def plus_is_faster(results):
    """A higher learning rate for B than for A speeds learning up.

    Up to twice the speed, to equal accuracy, for RoBERTa, GPT-2 and Llama. Here: the loss after equally few
    updates, ratio 16 against 1, each at the lowest point of four rates."""
    gap = results.compare_lowest(PLUS, LORA)
    here = "The lowest loss of ratio 16 minus that of ratio 1: {}."
    picture = results.paint_curves({"ratio 1": LORA, "ratio 16": PLUS})
    return Finding([Part(gap, at_most=0)], results.margin(), here, {"gap": gap}, paint=picture)


@Claim(
    "9", f"{HU}, section 4.1; the assignment, question 2.1", noise=(0.001, 0.017, 0.05)
)  # that of turns, not of seeds
def merged_is_free(results):
    """No added latency once merged.

    By construction. Here: tokens a second of generation, base and merged by turns, on a machine that does
    nothing beside it. None: less than 5 %."""
    turns = results.turns
    speed = {name: estimate_mean(np.log(np.divide(turns[name], turns["base"]))) for name in ("merged", "unmerged")}
    here = "Tokens a second over the base's: merged {}, unmerged {}."
    parts = [Part(speed["merged"], at_least=math.log(0.95))]
    return Finding(parts, 0.05, here, speed, "log of the speed over the base's", write=lambda x: f"{math.exp(x):.3f}")


@Claim("10", f"{HU}, section 7.2, figure 3", noise=(0.012, 0, 0.1))
def shared_directions(results):
    """Two ranks find one direction in common, and share the others less.

    GPT-3, query and value: A's first direction of r = 8 and that of r = 64 have a similarity above 0.5, the
    others do not. Here: all adapted layers, with two seeds, so that the two A begin with different numbers."""
    seeds = results.seeds(SMALL, LARGE)
    if len(seeds) < 3:
        raise Undecided("It takes three seeds: with two, both pairs are of the same two.")
    first, others, layers = [], [], []
    for n, other in zip(seeds, seeds[1:] + seeds[:1]):
        found = study(results.folders[SMALL, n], results.folders[LARGE, other])
        layers += found
        first.append(mean(float(x.similarity_A[0, 0]) for x in found))
        # 8 phi(8, 8) is what all eight share with the other's first eight, phi(1, 8) what the first does.
        others.append(mean(float(8 * x.similarity_A[7, 7] - x.similarity_A[0, 7]) / 7 for x in found))
    first, others = estimate_mean(first), estimate_mean(others)
    here = (
        "Similarity of A's first directions at r = 8 and r = 64, mean over layers: {}, of directions 2 to 8 with the "
        "other's first 8: {}. Shared: above 0.5."
    )
    words = {"rows": "first i of r = 8", "columns": "first j of r = 64"}
    picture = partial(paint.paint_similarity, maps=directions.mean_similarity(layers), **words)
    options = {"panels": 3, "size": (5.4, 2.4)}
    parts = [Part(first, at_least=0.5), Part(others, at_most=0.5)]
    figures = {"first": first, "others": others}
    return Finding(parts, 0.1, here, figures, paint=picture, write=2, options=options)


@Claim("11", f"{HU}, section 7.3, table 7", noise=(0.013, 0, 0.2))
def not_stressed(results):
    """LoRA's update lies along directions that W0 has, but not along those it stresses.

    GPT-3's query: W0 is larger along the update's directions than along random ones, and much smaller than
    along its own. Here: all adapted layers, as logarithms of ratios."""
    per_seed = [study(results.folders[Setting(), n]) for n in results.seeds(Setting())]
    more = estimate_mean([mean(math.log(x.stressed / x.random) for x in layers) for layers in per_seed])
    nearer = [mean(math.log(x.own / x.stressed) - math.log(x.stressed / x.random) for x in ls) for ls in per_seed]
    nearer = estimate_mean(nearer)
    here = (
        "|U^T W0 V| along the update's directions over that along random ones, as a logarithm: {}; how much nearer "
        "it is to random than to W0's own: {}."
    )
    picture = partial(paint.paint_stress, layers=[(x.own, x.stressed, x.random) for x in per_seed[0]])
    figures = {"more": more, "nearer": nearer}
    return Finding([Part(e, at_least=0) for e in figures.values()], 0.2, here, figures, paint=picture, write=2)


@Claim("12", BIDERMAN, noise=(2.4, 0, 0.22))
def forgets_less(results):
    """LoRA forgets less than full fine-tuning.

    Llama 2 after code and mathematics, scored on other tasks. Here: what models that were trained on labels
    alone still know of the reviews' words, where both reach the same loss on labels."""
    apart = results.compare_lowest(LABEL_LORA, LABEL_FULL)
    margin = results.margin("label")
    if max(map(abs, apart.interval())) > margin:
        raise Undecided(
            f"It is not known that both reach the same loss on labels, to {margin:.4f}: {show(apart)} at 95 %."
        )
    labels = results.losses(*LABEL_LORA, *LABEL_FULL)
    words = results.losses(*LABEL_LORA, *LABEL_FULL, what="text")
    base = float(results.base.mean())

    def forget(curve, seeds):
        """The loss of words at the best rate for labels, above the untuned model's."""
        at = results.vertex(curve).place({s: labels[s][seeds].mean() for s in curve})
        return float(np.interp(at, range(len(curve)), [words[s][seeds].mean() for s in curve])) - base

    n_seeds = len(words[LABEL_LORA[0]])
    seeds = np.arange(n_seeds)
    lora, full = (forget(curve, seeds) for curve in (LABEL_LORA, LABEL_FULL))
    if max(lora, full) <= 0:
        raise Undecided("Neither forgets.")
    others = [np.delete(seeds, n) for n in seeds]
    without = [forget(LABEL_LORA, rest) - forget(LABEL_FULL, rest) for rest in others]
    gap = estimate_mean([n_seeds * (lora - full) - (n_seeds - 1) * x for x in without])
    here = f"Words' loss above the untuned model's {base:.2f}: LoRA {lora:+.2f}, full {full:+.2f}; "
    here += "LoRA's minus full's: {}."
    figures = {"LoRA minus full": gap}
    return Finding([Part(gap, at_most=0)], MARGIN * base, here, figures, "difference of the words' losses")


def count_at_best(results, key: str) -> tuple[np.ndarray, np.ndarray]:
    """A count of measured_run.py's of LoRA and of full fine-tuning, each near its best rate: the mean over layers of
    each seed."""
    pair = [curve[round(results.vertex(curve).place())] for curve in (LORA, FULL)]
    seeds = results.seeds(*pair)
    return tuple(np.array([results.measures[s, n][key].mean() for n in seeds]) for s in pair)


@Claim("13", BIDERMAN, noise=(0.0032, 0, 0.5))
def rank_of_update(results):
    """Full fine-tuning's update has 10 to 100 times the rank that LoRA is given.

    The directions that hold 90 % of the update's variance, in Llama 2 after billions of tokens, over usual
    ranks. Here: that number over r = 16, in short trainings. A matrix of gpt2-mini has 256 directions at
    most."""
    lora, full = count_at_best(results, "directions")
    times = estimate_mean(np.log10(full / 16))
    here = f"Mean over layers: full {full.mean():.1f}, {{}} times 16. LoRA itself uses {lora.mean():.1f}."
    figures = {"full over 16": times}
    return Finding([Part(times, 1, 2)], 0.5, here, figures, "log10 of the ratio", write=lambda x: f"{10**x:.1f}")


@Claim("14", "Shuttleworth et al. 2024, LoRA vs Full Fine-tuning: An Illusion of Equivalence", noise=(0.042, 0, 0.25))
def intruders(results):
    """LoRA leaves intruder dimensions, full fine-tuning does not.

    First singular vectors of the tuned weight that are near to none of W0's, in RoBERTa and Llama after long
    trainings. Here: of the first ten of each layer those with no cosine above 0.6, after short trainings."""
    lora, full = (estimate_mean(counts, floor=1 / 24) for counts in count_at_best(results, "intruders"))
    here = "Of ten a layer: LoRA {}, full fine-tuning {}. Some: 0.25 or more."
    parts = [Part(lora, at_least=0.25), Part(full, at_most=0.25)]
    return Finding(parts, 0.25, here, {"LoRA": lora, "full": full}, "intruders, of ten a layer", write=2)


@Claim("15", f"{SCHULMAN}; {BIDERMAN}", noise=(0.047, 0, 0.019))
def capacity(results):
    """A small rank falls behind as the data grow.

    Ranks 1 to 512 leave the curve of full fine-tuning one after the other, over up to about a million examples.
    Here: r = 1 beside r = 16 after a quarter and after all of a short training."""
    pairs = {f"{100 * length:.0f} % of the examples": curves for length, curves in LENGTHS.items()}
    return compare_growth(results, pairs, "r = 1's", "that of r = 16", "growth")


def study(folder, other=None):
    """The anatomy of a run's adapter, layer by layer."""
    adapter = directions.Adapter(folder)
    base = directions.Base(adapter.config["base_model_name_or_path"])
    return list(directions.study(adapter, base, directions.Adapter(other) if other else None))


# --- verdicts --------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """A claim with its verdict. here: the measurement in words. level: at which it is judged. width: half of its
    interval, the widest of its parts'."""

    claim: Claim
    verdict: str
    here: str
    level: float = math.nan
    width: float = math.inf
    finding: Finding | None = None

    @property
    def is_sharp(self) -> bool:
        """Whether the figure is measured more sharply than the claim's margin."""
        return self.finding is not None and self.width <= self.finding.margin

    @property
    def is_small(self) -> bool:
        """Whether a claim about which of two is lower has no difference as large as the margin."""
        (part, *more) = self.finding.parts
        ends = map(abs, part.estimate.interval(self.level))
        return not more and 0 in (part.at_least, part.at_most) and max(ends) <= self.finding.margin


def judge_all(results: Results) -> list[Verdict]:
    """The verdict of each claim, Holm's correction over all of them. A claim whose trainings are not all there is not
    measured."""
    verdicts = []
    for one in CLAIMS:
        try:
            verdicts.append(Verdict(one, OPEN, "", finding=one.rule(results)))
        except Undecided as e:
            verdicts.append(Verdict(one, OPEN, str(e)))
        except KeyError as e:
            verdicts.append(Verdict(one, MISSING, f"{e.args[0]} is not there."))
        except (ValueError, OSError) as e:  # a base that is gone, say: one claim must not cost the others
            verdicts.append(Verdict(one, MISSING, first_line(e)))
    measured = [v for v in verdicts if v.finding]
    judged = [judge(v.finding.parts) for v in measured]
    for v, (verdict, p), at in zip(measured, judged, correct([p for _, p in judged], len(CLAIMS))):
        v.level = at
        v.verdict = verdict if p <= at else OPEN
        v.width = max(part.estimate.half_width(at) for part in v.finding.parts)
        v.here = v.finding.tell(at)
        if v.verdict == OPEN and v.is_small:
            v.here += " No difference as large as the margin."
    return verdicts


def show(e: Estimate, write: int | Callable = 4, level: float = LEVEL) -> str:
    """An estimate and its interval. write: digits after the point, or how a figure is written."""
    value, low, high = (write(x) if callable(write) else f"{x:+.{write}f}" for x in (e.value, *e.interval(level)))
    return f"{value} ({low} to {high})" if e.freedom else f"{value} (one seed: no interval)"


# --- before the trainings --------------------------------------------------------------------------


def visible(of_seed: float, of_examples: float, n_seeds: int, n_draws: int = 4000) -> float:
    """The difference that so many seeds show nine times in ten, at the strictest level of Holm's correction. It is
    drawn: the figure, its standard error and that error's degrees of freedom come out higher or lower by chance. The
    quantile is a little above 0.9, since the noise is not known better than from a few seeds (a simulation, `make
    slow`, finds nine in ten)."""
    rng = np.random.default_rng(0)
    freedoms = n_seeds - 1, N_BLOCKS - 1
    true = of_seed**2 / n_seeds, of_examples**2
    seeds, examples = (x * rng.chisquare(f, n_draws) / f for x, f in zip(true, freedoms))
    total = seeds + examples
    freedom = np.round(total**2 / (seeds**2 / freedoms[0] + examples**2 / freedoms[1]), 1)
    t = {f: student(LEVEL / len(CLAIMS), f) for f in set(freedom)}
    moved = math.sqrt(sum(true)) * rng.standard_normal(n_draws)
    return float(np.quantile(np.array([t[f] for f in freedom]) * np.sqrt(total) - moved, 0.95))


def describe_plan(n_seeds: int) -> list[str]:
    """A line for each claim: what so many seeds will show, by the noise seen with the shipped configuration."""
    lines = []
    for one in CLAIMS:
        *noise, margin = one.noise
        lines.append(f"{one.number:>3} {one.words}: shows {visible(*noise, n_seeds):.2g}, where {margin:.2g} matters")
    return lines


# --- the chapter -----------------------------------------------------------------------------------


def count_verdicts(verdicts: list[Verdict]) -> str:
    """One sentence: how many claims hold."""
    words = {  # of one, of several
        HOLDS: ("holds here", "hold here"),
        FAILS: ("does not", "do not"),
        OPEN: ("is not told apart by this data", "are not told apart by this data"),
        MISSING: ("was not measured", "were not measured"),
    }
    numbers = {name: sum(v.verdict == name for v in verdicts) for name in words}
    counts = [f"{n} {words[name][n > 1]}" for name, n in numbers.items() if n]
    n_sharp = sum(v.is_sharp for v in verdicts)
    return (
        f"Of {len(verdicts)} claims of the LoRA papers {', '.join(counts)}; {n_sharp} are measured more sharply than "
        "their margin."
    )


def write_chapter(verdicts: list[Verdict], results: Results, minutes: float, plot: Callable) -> list[tuple]:
    """The chapter as parts of a page. minutes: that one seed's trainings took. plot(name, alt, paint, **options) is
    paint.draw."""
    n_seeds = len({n for _, n in results.measures})
    text = (
        f"Each training is made with up to {n_seeds} seeds. Losses are compared seed by seed and example by example, "
        "other figures over seeds. A figure is followed by its interval. Over all claims together a verdict is false "
        f"with a probability of about {100 * LEVEL:.0f} % at most (Holm's correction): so the clearest claim has an "
        f"interval of {100 * (1 - LEVEL / len(CLAIMS)):.1f} %, each less clear one a narrower one, down to 95 %. The "
        "margin is what a difference must be to matter. It was set beforehand, and half of the interval should be "
        f"narrower: {100 * MARGIN:.0f} % of full fine-tuning's loss on labels, or of its gain on words; twice the "
        "learning rate; 5 % of the speed; a tenth of the similarity's scale; a ratio of 1.2 in claim 11; half of the "
        "range that claims 13 and 14 speak of."
    )
    table = [["claim", "the paper, and here", "measured", "half of its interval, margin", "verdict"]]
    pictures = []
    for v in verdicts:
        title = f"{v.claim.number}. {v.claim.words}"
        table.append([f"{title} ({v.claim.source})", v.claim.paper, v.here, tell_width(v, minutes), v.verdict])
        if v.finding:
            picture = v.finding.draw(v.level, plot, f"claim-{v.claim.number}.svg", v.claim.words)
            pictures += [("h3", f"{title}: {v.verdict}"), picture]
    return [("h2", "What the papers claim, and what these runs say"), ("p", text), ("table", table), *pictures]


def tell_width(v: Verdict, minutes: float) -> str:
    """Half of the interval beside the margin and, where it is wider, about what would make it as narrow."""
    if not math.isfinite(v.width):
        return ""
    margin = v.finding.margin
    text = f"{v.width:.2g} at {100 * (1 - v.level):.1f} %, {margin:.2g}"
    if v.is_sharp:
        return text
    needed = [part.estimate.count_seeds(margin, v.level) for part in v.finding.parts]
    if None in needed:
        return f"{text}; more examples would do, not seeds"
    return f"{text}; about {max(needed)} seeds would do, {minutes * max(needed):.0f} minutes"
