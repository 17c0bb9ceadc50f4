"""What a few runs can tell apart: intervals for what is measured, and one of three verdicts from an interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HOLDS = "holds here"
FAILS = "does not hold here"
OPEN = "not told apart by this data"
MISSING = "not measured"
NEAREST = "closest_observation"


@dataclass
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def judge(estimate: Estimate, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """The verdict on the claim that the figure lies from at_least to at_most: it holds if the whole interval does, it
    does not hold if no part of the interval does; otherwise this data cannot tell."""
    if at_least <= estimate.low and estimate.high <= at_most:
        return HOLDS
    if estimate.high < at_least or estimate.low > at_most:
        return FAILS
    return OPEN


def seed_deviation(losses: dict) -> float:
    """The standard deviation of a run's mean loss over seeds, pooled over all settings {setting: (seeds, examples)}
    that have several; 0 if none has."""
    squares = 0.0
    freedom = 0
    for runs in losses.values():
        means = runs.mean(axis=1)
        squares += ((means - means.mean()) ** 2).sum()
        freedom += len(means) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def bootstrap(statistic: Callable, losses: dict, deviation: float, n_draws: int = 1000, seed: int = 0) -> Estimate:
    """statistic({setting: mean loss}) with the interval that examples and seeds leave it.

    losses: {setting: (seeds, examples)}, the same examples in each. Each draw takes the examples anew with
    replacement, the same ones for all settings (Efron 1979), so what is hard for all cancels out; and it moves each
    setting's mean by chance as another seed would, by `deviation` / sqrt(its number of seeds).
    """
    rng = np.random.default_rng(seed)
    settings = list(losses)
    table = np.stack([losses[setting].mean(axis=0) for setting in settings])  # (settings, examples)
    spread = deviation / np.sqrt([len(losses[setting]) for setting in settings])  # (settings,)
    n = table.shape[1]
    counts = rng.multinomial(n, np.full(n, 1 / n), size=n_draws)  # (draws, examples): how often each is taken
    means = counts @ table.T / n + spread * rng.standard_normal((n_draws, len(settings)))
    values = [statistic(dict(zip(settings, row))) for row in means]
    value = statistic(dict(zip(settings, table.mean(axis=1))))
    return Estimate(value, *interval(values))


def bootstrap_mean(values, n_draws: int = 1000, seed: int = 0) -> Estimate:
    """The mean of some measurements, such as one of each layer, with its bootstrap interval."""
    values = np.asarray(values, dtype=float)
    places = np.random.default_rng(seed).integers(len(values), size=(n_draws, len(values)))
    return Estimate(float(values.mean()), *interval(values[places].mean(axis=1)))


def interval(values) -> tuple[float, float]:
    """From the 2.5 % to the 97.5 % quantile. Some values may be infinite: nothing is interpolated. A nan tells
    nothing, so it widens the interval at both ends."""
    values = np.asarray(values, dtype=float)
    low = np.quantile(np.nan_to_num(values, nan=-math.inf, posinf=math.inf, neginf=-math.inf), 0.025, method=NEAREST)
    high = np.quantile(np.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf), 0.975, method=NEAREST)
    return float(low), float(high)


def find_best_rate(rates: list[float], losses: list[float]) -> float:
    """The learning rate of the lowest loss: the vertex of the parabola, over the logarithm of the rate, through the
    lowest point and its neighbours. 0 or infinity if the lowest point is the first or the last: the best rate lies
    there or beyond."""
    i = int(np.argmin(losses))
    if i == 0:
        return 0.0
    if i == len(rates) - 1:
        return math.inf
    x = np.log(rates[i - 1 : i + 2])
    curvature, slope, _ = np.polyfit(x - x[1], losses[i - 1 : i + 2], 2)
    return float(np.exp(x[1] - slope / (2 * curvature))) if curvature > 0 else rates[i]


def ratio(a: float, b: float) -> float:
    """a / b for rates that may be 0 or infinite; nan where both lie beyond on the same side."""
    if a == b and (a == 0 or math.isinf(a)):
        return math.nan
    return math.inf if b == 0 else a / b
