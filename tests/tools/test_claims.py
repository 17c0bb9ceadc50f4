"""claims.py: verdicts are computed, and right on made-up numbers; losses of examples are those that training saw.

python -m pytest tests/tools/test_claims.py
"""

import math
import os
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, base_folder, sweep_here

import train
from configurator import configure
from dataloader import make_loader
from generate import ModelSampler
from model import GPT
from tools import sweep
from tools.report import claims
from tools.report.claims import BATCHES, FULL, LORA, PLACES, PLUS, RANKS, STABLE, TRADES, Setting
from tools.report.directions import LayerAnatomy
from tools.report.page import make_html, make_markdown
from tools.report.paint import draw
from tools.report.verdicts import (
    FAILS,
    HOLDS,
    MISSING,
    OPEN,
    Estimate,
    bootstrap,
    bootstrap_mean,
    find_best_rate,
    interval,
    judge,
    ratio,
    seed_deviation,
)
from tools.runs.run import count_parameters

N = 400  # validation examples


# --- what tells runs apart ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, verdict",
    [(0.1, 0.9, HOLDS), (-0.2, -0.1, FAILS), (1.1, 1.2, FAILS), (-0.1, 0.5, OPEN), (0.5, 1.5, OPEN), (-1, 2, OPEN)],
)
def test_three_outcomes(low, high, verdict):
    """Lost if it fails: a report says that something holds of which the data knows nothing."""
    assert judge(Estimate((low + high) / 2, low, high), at_least=0, at_most=1) == verdict
    assert judge(Estimate(math.nan, math.nan, math.nan), at_least=0, at_most=1) == OPEN


def test_interval_of_a_paired_difference_is_students():
    """Lost if it fails: intervals are too narrow, and chance passes for a result, or too wide."""
    rng = np.random.default_rng(1)
    hard = rng.exponential(1.0, N)  # what is hard for both cancels out
    losses = {"a": (hard + rng.normal(0.02, 0.1, N))[None], "b": (hard + rng.normal(0, 0.1, N))[None]}
    found = bootstrap(lambda m: m["a"] - m["b"], losses, deviation=0.0)
    difference = losses["a"][0] - losses["b"][0]
    half = 1.96 * difference.std(ddof=1) / math.sqrt(N)
    assert found.value == pytest.approx(difference.mean())
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.15 * half)
    alone = bootstrap_mean(difference)
    assert [alone.low, alone.high] == pytest.approx([found.low, found.high], abs=0.15 * half)


def test_seeds_widen_the_interval():
    """Lost if it fails: two runs that differ by their seeds alone differ significantly."""
    rng = np.random.default_rng(2)
    shifts = rng.normal(0, 0.05, (40, 2))  # the mean loss of 40 settings with two seeds each
    settings = {i: np.full((2, N), 0.0) + shift[:, None] for i, shift in enumerate(shifts)}
    deviation = seed_deviation(settings)
    assert deviation == pytest.approx(np.sqrt(shifts.var(axis=1, ddof=1).mean()))
    e = bootstrap(lambda m: m[0] - m[1], {0: settings[0][:1], 1: settings[1]}, deviation, n_draws=4000)
    half = 1.96 * deviation * math.sqrt(1 + 1 / 2)  # one seed of one, two of the other
    assert (e.high - e.low) / 2 == pytest.approx(half, rel=0.05)
    assert seed_deviation({0: settings[0][:1]}) == 0.0


def test_best_rate_is_the_parabolas():
    """Lost if it fails: the report names a learning rate that is not the curve's best."""
    rates = [1e-4 * 2**i for i in range(6)]
    for best in (2.5e-4, 4e-4, 1.1e-3):
        losses = [0.2 + 0.01 * math.log(rate / best) ** 2 for rate in rates]
        assert find_best_rate(rates, losses) == pytest.approx(best)
    assert find_best_rate(rates, [1, 2, 3, 4, 5, 6]) == 0 and math.isinf(find_best_rate(rates, [6, 5, 4, 3, 2, 1]))
    assert ratio(6e-4, 2e-4) == pytest.approx(3) and ratio(1e-3, 0) == math.inf and ratio(0, 1e-3) == 0
    assert math.isnan(ratio(math.inf, math.inf)) and math.isnan(ratio(0.0, 0.0))
    values = [1.0] * 90 + [math.nan] * 10  # in one draw of ten both best rates lie beyond
    assert interval(values) == (-math.inf, math.inf) and interval([1.0] * 99 + [math.nan]) == (1, 1)


# --- the rules, on made-up numbers ----------------------------------------------------------------


def make_results(folders=None, **changes):
    """Results in which each setting's loss is 0.2, the learning rate's parabola aside, plus what `changes` says: a
    function of the setting. Examples and seeds scatter it a little."""
    rng = np.random.default_rng(3)
    hard = rng.exponential(0.2, N)
    hard += 0.2 - hard.mean()
    change = changes.get("loss", lambda setting: 0.0)
    best = changes.get("best", lambda setting: 1.0)
    losses, accuracies = {}, {}
    for setting, _ in claims.plan():
        mean = 0.01 * math.log2(setting.lr / best(setting)) ** 2 + change(setting)
        run = hard + mean + rng.normal(0, changes.get("scatter", 0.01), N)
        losses.setdefault(setting, []).append(run - run.mean() + 0.2 + mean + rng.normal(0, 1e-4))
        accuracies.setdefault(setting, []).append(0.79)
    losses = {setting: np.stack(rows) for setting, rows in losses.items()}
    turns = {"base": [100 + i % 3 for i in range(11)]}
    turns |= {name: [speed * b for b in turns["base"]] for name, speed in changes.get("speeds", {}).items()}
    return claims.Results(losses, accuracies, 1100, 1e-3, 2e-4, 32, 5120, folders or {}, turns)


def verdict(rule, **changes):
    return rule(make_results(**changes)).verdict


def of(*settings):
    """loss: 0.1 more for these settings."""
    return lambda setting: 0.1 * (setting in settings)


def better(*settings):
    return lambda setting: -0.1 * (setting in settings)


NOISY = {"scatter": 3.0}
CASES = [  # rule, what makes it hold, what makes it fail, what leaves it open
    (claims.reaches_full, {}, {"loss": of(*LORA)}, NOISY),
    (claims.small_rank_is_enough, {}, {"loss": of(RANKS[1])}, NOISY),
    (claims.several_beat_one, {"loss": of(PLACES["output"])}, {"loss": of(PLACES["attention"])}, NOISY),
    (claims.mlp_beats_attention, {"loss": of(PLACES["attention"])}, {"loss": of(PLACES["MLP"])}, NOISY),
    # The configuration's learning rates are 5 apart.
    (
        claims.ten_times_the_rate,
        {"best": lambda s: 1.4 if s.rank else 0.7},
        {"best": lambda s: 1 if s.rank else 2},
        NOISY,
    ),
    (claims.rate_stays, {}, {"best": lambda s: {4: 3.0, 64: 0.8}.get(s.rank, 1)}, NOISY),
    (
        claims.rate_falls,
        {"best": lambda s: {4: 2, 64: 0.6}.get(s.rank, 1)},
        {"best": lambda s: {4: 0.8, 64: 1.5}.get(s.rank, 1)},
        NOISY,
    ),
    (claims.rate_is_alpha, {"best": lambda s: s.lr if s in TRADES else 1}, {"loss": of(TRADES[1])}, NOISY),
    (claims.large_batches, {"loss": of(*BATCHES[4][0])}, {"loss": of(*BATCHES[4][1])}, NOISY),
    (claims.stable_ranks, {"loss": of(STABLE[4])}, {"loss": of(STABLE[128])}, NOISY),
    (claims.plus_is_faster, {"loss": better(*PLUS)}, {"loss": of(*PLUS)}, NOISY),
]


@pytest.mark.parametrize("rule, holds, fails, leaves_open", CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_each_rule_gives_all_three_outcomes(rule, holds, fails, leaves_open):
    """Lost if it fails: the report's verdict is another than its numbers say."""
    assert verdict(rule, **holds) == HOLDS
    assert verdict(rule, **fails) == FAILS
    assert verdict(rule, **leaves_open) == OPEN


def test_latency_gives_all_three_outcomes():
    """Lost if it fails: a merged model that is slow passes for free, or the other way."""
    for merged, expected in ((1.0, HOLDS), (0.8, FAILS)):
        assert verdict(claims.merged_is_free, speeds={"merged": merged, "unmerged": 0.7}) == expected
    results = make_results(speeds={"merged": 1.0, "unmerged": 0.7})
    results.turns["merged"] = [s * (0.8 if i % 2 else 1.1) for i, s in enumerate(results.turns["merged"])]
    assert claims.merged_is_free(results).verdict == OPEN


@pytest.mark.parametrize("first, expected", [(0.8, HOLDS), (0.2, FAILS), (None, OPEN)])
def test_shared_directions_give_all_three_outcomes(monkeypatch, first, expected):
    """Lost if it fails: directions that are not shared pass for shared ones."""
    values = [0.1, 0.9] * 6 if first is None else [first - 0.05, first + 0.05] * 6
    layers = [
        LayerAnatomy("layer", 256, 1, 1, [1], 1, 1, 1, 1, torch.full((8, 64), v), torch.ones(8, 64)) for v in values
    ]
    twins = [LayerAnatomy("layer", 256, 1, 1, [1], 1, 1, 1, 1, torch.ones(64, 64), torch.ones(64, 64))]
    monkeypatch.setattr(claims, "study", lambda folder, other: layers if folder == "small" else twins)
    folders = {(claims.SMALL, 0): "small", (claims.LARGE, 0): "large", (claims.LARGE, 1): "twin"}
    assert claims.shared_directions(make_results(folders)).verdict == expected


@pytest.mark.parametrize("stressed, expected", [((0.4, 0.5), HOLDS), ((4, 5), FAILS), ((0.3, 6), OPEN)])
def test_stress_gives_all_three_outcomes(monkeypatch, stressed, expected):
    """Lost if it fails: an update that repeats W0 passes for a new one."""
    layers = [LayerAnatomy("layer", 256, 30, 2, [2], 1, s, own=10.0, random=0.2) for s in stressed * 6]
    monkeypatch.setattr(claims, "study", lambda folder: layers)
    assert claims.not_stressed(make_results({(Setting(), 0): "folder"})).verdict == expected


def test_a_base_that_is_gone_costs_its_claims_alone(tmp_path):
    """Lost if it fails: an hour of trainings ends in one line and no report."""
    results = make_results({(Setting(), 0): str(tmp_path / "gone")}, speeds={"merged": 1.0, "unmerged": 0.7})
    verdicts = {number: v for number, _, _, v in claims.judge_all(results)}
    assert [number for number, v in verdicts.items() if v.verdict == MISSING] == ["10", "11"]
    assert "r8 is not there" in verdicts["10"].here and "holds no adapter" in verdicts["11"].here


# --- the trainings and what they leave ------------------------------------------------------------


def all_configs():
    """{setting: Config} of all trainings, at the shipped configuration."""
    path = os.path.join(REPO, "configs", "finetune_mini_config.py")
    config = configure([path, "--only=claims", "--seeds=5"], cls=sweep.SweepConfig, trains=False)
    config.sweep_dir = "claims"
    runs = sweep.plan(config)
    assert {run.config.seed for run in runs} == {5, 6} and len({run.config.out_dir for run in runs}) == len(runs)
    return dict(zip((setting for setting, _ in claims.plan()), (run.config for run in runs)))


def test_trainings_are_what_the_claims_speak_of():
    """Lost if it fails: what is compared differs in more than the claim says."""
    made = all_configs()
    examples = {c.max_iters * c.batch_size * c.gradient_accumulation_steps for c in made.values()}
    assert examples == {5120}
    own = made[Setting()]
    assert (own.rank, own.alpha, own.lr, own.rslora, own.lora_plus) == (16, 64, 1e-3, False, 1)
    assert [made[s].lr for s in FULL] == pytest.approx([5e-5, 1e-4, 2e-4, 4e-4, 8e-4])
    assert {made[s].alpha for s in RANKS.values()} == {64}
    for curves, same in ((claims.SAME_ALPHA, lambda c: c.alpha), (claims.SAME_SCALE, lambda c: c.alpha / c.rank)):
        assert len({same(made[s]) for settings in curves.values() for s in settings}) == 1
    assert {made[s].lr * made[s].alpha for s in TRADES} == {own.lr * own.alpha}
    # At r = 16 both scales are the same, so the configuration's own run stands for it.
    assert {made[s].alpha for r, s in STABLE.items() if r != 16} == {own.alpha / math.sqrt(16)}
    assert {made[s].lora_plus for s in PLUS} == {16}
    counts = {place: count_parameters(made[s])[0] for place, s in PLACES.items()}
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts
    assert counts["all"] == 6 * 96 * 256
    assert {made[s].batch_size * made[s].gradient_accumulation_steps for s in BATCHES[4][0]} == {128}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random GPT-2 (base) and reviews with all splits named (reviews) or only one file (one.csv)."""
    folder = base_folder(tmp_path_factory, "claims")
    (folder / "reviews").mkdir()
    for split, n in (("train", 32), ("validation", 21), ("test", 9)):
        write_reviews(folder / "reviews" / f"{split}.csv", n)
    write_reviews(folder / "one.csv", 60)
    return folder


def write_reviews(path, n):
    rows = [
        f"{'so ' * (i % 5)}{'good' if i % 2 else 'bad'} number {i},{'positive' if i % 2 else 'negative'}"
        for i in range(n)
    ]
    path.write_text("\n".join(["text,label", *rows, ""]))


def flags(place, out, **settings):
    values = {"init_from": place / "base", "dataset": place / "reviews", "out_dir": place / out, "device": "cpu"}
    values |= {"dtype": "float32", "rank": 2, "alpha": 8, "max_iters": 4, "lr": 0.01, "label_names": None}
    values |= {"batch_size": 8, "eval_interval": 4, "eval_iters": 0, "dropout": 0.0, "warmup_iters": 0} | settings
    return [f"--{key}={value}" for key, value in values.items()]


def test_losses_of_examples_are_those_of_the_training(place):
    """Lost if it fails: what the claims compare is not the validation loss, or not of the same examples."""
    metrics = train.train(configure(flags(place, "run", rank=0)))
    sampler = ModelSampler(str(place / "run"))
    losses = claims.losses_of_run(str(place / "run"), "cpu")
    loader = make_loader(sampler.config, sampler.block_size, wanted=("validation",))
    n_scored = np.array([loader.n_scored("validation", [i]) for i in range(21)])
    assert (losses * n_scored).sum() / n_scored.sum() == pytest.approx(min(m["val_loss"] for m in metrics), abs=1e-5)
    with torch.no_grad():
        for i, ex in enumerate(loader.splits["validation"]):  # one at a time, by the plain model
            logits = GPT.from_pretrained(str(place / "run")).eval()(*inputs_and_targets(ex))[0]
            targets = torch.tensor(ex.tokens[ex.n_prompt :])
            assert losses[i] == pytest.approx(float(F.cross_entropy(logits, targets)), abs=1e-4)
    train.train(configure(flags(place, "run", rank=0, lr=0.02)))  # another run in the same folder
    assert not np.allclose(losses, claims.losses_of_run(str(place / "run"), "cpu"), atol=1e-4)


def inputs_and_targets(ex):
    targets = [-1] * (ex.n_prompt - 1) + list(ex.tokens[ex.n_prompt :])
    return torch.tensor([ex.tokens[:-1]]), torch.tensor([targets])


def test_claims_by_one_command(place, monkeypatch, capsys):
    """Lost if it fails: the hour of trainings ends without its chapter, or one that failed spoils the others."""
    monkeypatch.setattr(claims, "plan", lambda: [(Setting(), 0), (Setting(128), 0)])
    argv = [*flags(place, "some", max_iters=16, rank=16, ranks="2", only="claims"), f"--sweep_dir={place / 'sweep'}"]
    for _ in range(2):  # the second time all is done but what fails
        with pytest.raises(SystemExit) as stop:
            sweep_here(argv)
        assert stop.value.code == 1 and "rank=128 does not fit" in capsys.readouterr().err
    page = (place / "sweep" / "report.html").read_text()
    rows = re.findall(r'<td data-head="claim">(\w+)\. .*?<td data-head="verdict">([^<]*)</td>', page)
    assert [number for number, _ in rows] == [number for number, *_ in claims.CLAIMS] and len(rows) == 14
    measured = {number for number, verdict in rows if verdict != MISSING}
    assert measured == {"9", "11"} and all(verdict in (HOLDS, FAILS, OPEN, MISSING) for _, verdict in rows)
    assert "Of 14 claims" in page and "12 were not measured" in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert (place / "sweep" / "claims-r16" / "val_losses.npy").exists()
    assert "12 were not measured" in (place / "sweep" / "report.md").read_text()


def test_a_split_that_the_seed_draws_is_refused(place, capsys):
    """Lost if it fails: two seeds' losses are compared example by example, and the examples differ."""
    argv = [*flags(place, "drawn", dataset=place / "one.csv", only="claims"), f"--sweep_dir={place / 'none'}"]
    with pytest.raises(SystemExit) as stop:
        sweep.main(configure(argv, cls=sweep.SweepConfig, trains=False))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "the seed draws the validation split" in err and err.count("\n") == 1


def test_every_claim_has_its_picture(tmp_path, monkeypatch):
    """Lost if it fails: a claim's picture cannot be drawn, and the report is lost with it."""
    layers = [LayerAnatomy("layer", 256, 30, 2, [2], 1, 0.5, 10.0, 0.2, torch.rand(8, 64), torch.rand(8, 64))] * 3
    twins = [LayerAnatomy("layer", 256, 30, 2, [2], 1, 0.5, 10.0, 0.2, torch.rand(64, 64), torch.rand(64, 64))] * 3
    monkeypatch.setattr(claims, "study", lambda folder, other=None: twins if folder == "twin" else layers)
    folders = {
        (claims.SMALL, 0): "small",
        (claims.LARGE, 0): "twin",
        (claims.LARGE, 1): "large",
        (Setting(), 0): "own",
    }
    results = make_results(folders, speeds={"merged": 1.0, "unmerged": 0.7})

    judged = claims.judge_all(results)
    parts = [("h1", "Claims"), *claims.write_chapter(judged, results, partial(draw, str(tmp_path)))]
    page = make_html(parts, str(tmp_path))
    assert page.count("<picture>") == 13 and len(claims.CLAIMS) == 14 and MISSING not in page  # 3a and 3b share one
    text = make_markdown(parts)
    counted = claims.count_verdicts(judged)
    for word, count in ((HOLDS, "hold here"), (OPEN, "are not told apart")):
        n = sum(v.verdict == word for *_, v in judged)
        assert f"{n} {count}" in counted and text.count(f"| {word} |") == n
