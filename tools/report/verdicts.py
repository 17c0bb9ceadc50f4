"""What a few runs can tell apart: an interval over seeds and examples, a verdict from it, Holm's correction."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HOLDS = "holds here"
FAILS = "does not hold here"
OPEN = "not told apart by this data"
MISSING = "not measured"
LEVEL = 0.05  # of all verdicts together
N_BLOCKS = 40  # groups of examples


# --- an estimate and its interval ------------------------------------------------------------------


@dataclass
class Estimate:
    """A figure with its standard error and that error's degrees of freedom. No freedom: nothing is known of it.
    n: its seeds. of_examples: the part of the error that more seeds would leave."""

    value: float
    error: float = math.inf
    freedom: float = 0.0
    n: int = 1
    of_examples: float = 0.0

    def half_width(self, level: float = LEVEL) -> float:
        """Half of the interval that misses the true value with probability `level`."""
        return student(level, self.freedom) * self.error if self.freedom else math.inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        half = self.half_width(level)
        return self.value - half, self.value + half

    def count_seeds(self, margin: float, level: float) -> int | None:
        """About how many seeds make half of the interval as narrow as the margin; None if no number of them does."""
        of_seed = max(self.error**2 - self.of_examples**2, 0) * self.n
        for n in (*range(2, 30), *range(30, 1000, 10)):
            if foresee(math.sqrt(of_seed), self.of_examples, n).half_width(level) <= margin:
                return n
        return None


def foresee(of_seed: float, of_examples: float, n: int) -> Estimate:
    """What n seeds will know of a figure that a seed moves by of_seed, the examples by of_examples (deviations)."""
    squares = of_seed**2 / n, of_examples**2
    total = sum(squares)
    freedom = total**2 / (squares[0] ** 2 / (n - 1) + squares[1] ** 2 / (N_BLOCKS - 1)) if total else n - 1
    return Estimate(0.0, math.sqrt(total), freedom, n, of_examples)


def student_mass(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """(t, P(|T| < t)) of Student's distribution on a grid. In the angle atan(t / sqrt(freedom)) the density is a
    power of the cosine, over a range that is finite."""
    angles = np.linspace(0, math.pi / 2, 20_001)[:-1]
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.tan(angles) * math.sqrt(freedom), mass / mass[-1]


def student(level: float, freedom: float) -> float:
    """t with P(|T| > t) = level."""
    t, mass = student_mass(max(freedom, 1))
    return float(np.interp(1 - level, mass, t))


def student_tail(t: float, freedom: float) -> float:
    """P(|T| > t)."""
    grid, mass = student_mass(max(freedom, 1))
    return float(1 - np.interp(t, grid, mass))


def estimate_mean(values, floor: float = 0.0) -> Estimate:
    """The mean of independent measurements, such as one a seed, with its t interval. floor: the least that a
    measurement is taken to be uncertain by, such as the step of a count."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()))
    return Estimate(float(values.mean()), max(float(values.std(ddof=1)), floor) / math.sqrt(n), n - 1, n)


def estimate_table(table) -> Estimate:
    """The mean of a table (seeds, blocks of examples), where other seeds and other examples would give another one.

    Two crossed random effects. With the mean squares of seeds, of blocks and of what is left, the variance of the
    mean is (MS_seeds + max(MS_blocks - MS_rest, 0)) / (S G): what differs by seed and example at once is in both,
    and counted once. So Dorfman, Berbaum and Metz 1992 compare methods by many readers and many cases. The degrees
    of freedom are Satterthwaite's."""
    S, G = table.shape
    mean = float(table.mean())
    if S < 2:
        return Estimate(mean)
    of_seeds, of_blocks = table.mean(1), table.mean(0)
    seeds = G * of_seeds.var(ddof=1)
    blocks = S * of_blocks.var(ddof=1)
    rest = ((table - of_seeds[:, None] - of_blocks + mean) ** 2).sum() / ((S - 1) * (G - 1))
    freedoms = [(seeds, S - 1)]
    if blocks > rest:
        freedoms += [(blocks, G - 1), (rest, (S - 1) * (G - 1))]
    total = seeds + max(blocks - rest, 0)
    freedom = total**2 / sum(x**2 / n for x, n in freedoms) if total else S - 1
    return Estimate(mean, math.sqrt(total / (S * G)), freedom, S, math.sqrt(max(blocks - rest, 0) / (S * G)))


def estimate(statistic: Callable, losses: dict) -> Estimate:
    """statistic({setting: mean loss}), a function of numbers and of arrays, over paired seeds and paired examples.

    losses: {setting: (S, N)}, the same S seeds and N examples in each. The examples lie in blocks. The pseudo-value
    of a seed's block is what leaving it out changes (Tukey's jackknife); for a difference of losses it is that
    block's own difference."""
    S, n = next(iter(losses.values())).shape
    block_of = np.arange(n) % min(N_BLOCKS, n)
    member = np.eye(block_of.max() + 1)[block_of]  # (N, G)
    sizes = member.sum(0)  # (G,)
    n_cells = S * len(sizes)
    whole = {s: x.mean() for s, x in losses.items()}
    without = {s: (x.sum() - x @ member) / (x.size - sizes) for s, x in losses.items()}  # (S, G)
    return estimate_table(n_cells * statistic(whole) - (n_cells - 1) * statistic(without))


# --- the best of a curve ---------------------------------------------------------------------------


@dataclass
class Vertex:
    """The lowest point of losses over learning rates that double from one to the next: of the parabola through the
    lowest of them, over all seeds and examples, and its two neighbors. Real curves rise faster on the right, so a
    place is right to a part of a doubling, not to the last digit."""

    names: list  # the settings, by learning rate
    middle: int  # the place of the lowest
    means: dict | None = None  # {setting: loss}, over all seeds and examples

    @classmethod
    def of(cls, curve: list, losses: dict) -> "Vertex | None":
        """None if the lowest is the first or the last: the best rate lies there or beyond."""
        means = {name: float(losses[name].mean()) for name in curve}
        i = int(np.argmin([*means.values()]))
        return None if i in (0, len(curve) - 1) else cls(curve, i, means)

    def _fit(self, means):
        """(slope, curvature) at the middle, for rates a step of 1 apart."""
        before, middle, after = (means[name] for name in self.names[self.middle - 1 : self.middle + 2])
        return (after - before) / 2, before - 2 * middle + after

    def place(self, means: dict | None = None):
        """log2 of the best rate over the curve's first."""
        slope, curvature = self._fit(means or self.means)
        return self.middle - slope / curvature

    def loss(self, means: dict | None = None):
        """The lowest loss."""
        means = means or self.means
        slope, curvature = self._fit(means)
        return means[self.names[self.middle]] - slope**2 / (2 * curvature)


# --- verdicts --------------------------------------------------------------------------------------


@dataclass
class Part:
    """Says that a figure lies from at_least to at_most."""

    estimate: Estimate
    at_least: float = -math.inf
    at_most: float = math.inf

    def p_values(self) -> tuple[float, float]:
        """(of "holds", of "does not hold"): the smallest level at which the whole interval lies there, and at which
        no part of it does."""
        e = self.estimate
        if not e.freedom:
            return 1.0, 1.0
        inside = min(e.value - self.at_least, self.at_most - e.value)
        ts = (x / e.error if e.error else math.inf for x in (inside, -inside))
        return tuple(student_tail(t, e.freedom) if x > 0 else 1.0 for x, t in zip((inside, -inside), ts))


def judge(parts: list[Part]) -> tuple[str, float]:
    """(HOLDS or FAILS, the p value) of a claim: whichever is nearer. It holds if each part does, and does not hold if
    one does not; of several that may fail by chance, each has its share of the level."""
    holds, fails = zip(*(part.p_values() for part in parts))
    p_holds, p_fails = max(holds), min(1.0, len(parts) * min(fails))
    return (HOLDS, p_holds) if p_holds <= p_fails else (FAILS, p_fails)


def correct(p_values: list[float], n_claims: int, level: float = LEVEL) -> list[float]:
    """The level at which each of several claims is judged, so that a false verdict is among all of them with a
    probability of at most `level` (Holm 1979): the clearest one at level / n_claims, the next at level /
    (n_claims - 1), and after the first that is open no further one is easier."""
    levels = [0.0] * len(p_values)
    strictest = n_claims
    for i in sorted(range(len(p_values)), key=p_values.__getitem__):
        levels[i] = level / strictest
        if p_values[i] <= levels[i]:
            strictest -= 1
    return levels
