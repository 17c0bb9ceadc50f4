"""sweep.py: its report says what the runs' own files say, done runs are kept, a failing one is told.

python -m pytest tests/tools/test_sweep.py
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest
from conftest import base_folder, finish, start, sweep_here
from safetensors.torch import load_file

from configurator import Config, configure
from tools import sweep
from tools.report import questions
from tools.runs.ray_runs import count_places, share_machines
from tools.runs.run import AGAINST, PlannedRun


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random GPT-2 (base) and separable reviews (reviews.csv)."""
    folder = base_folder(tmp_path_factory, "sweep")
    rng = random.Random(1)
    with open(folder / "reviews.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label", "split"])
        for i in range(90):
            cue = ("dreadful", "wonderful")[i % 2]
            split = ("train", "validation", "test")[max(0, i - 60) // 15 + (i >= 60)]
            rows.writerow(
                [" ".join([cue, *rng.choices(["a", "film", "plot"], k=i % 5)]), ("bad", "good")[i % 2], split]
            )
    return folder


def flags(place, out, **settings):
    values = {"init_from": place / "base", "dataset": place / "reviews.csv", "out_dir": place / out, "device": "cpu"}
    values |= {"dtype": "float32", "ranks": "1,2", "rank": 2, "alpha": 8, "seeds": "1,2", "max_iters": 6, "lr": 0.01}
    values |= {"batch_size": 8, "eval_interval": 2, "warmup_iters": 0, "label_names": None, "dropout": 0.0} | settings
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a sweep that ran to its end."""
    sweep_here(flags(place, "whole"))
    return place / "whole-sweep"


def table(folder, title):
    """The rows of the table under a heading of report.md, as dicts."""
    part = (folder / "report.md").read_text().split(f"\n## {title}")[1].split("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def read(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_reports_numbers_are_the_runs_own(whole):
    """Lost if it fails: a student hands in numbers that no run gave."""
    rows = {(row["method"], row["r"]): row for row in table(whole, "2.6")}
    assert list(rows) == [("no tuning", ""), ("LoRA", "1"), ("LoRA", "2"), ("full fine-tuning", "")]
    for (method, r), row in rows.items():
        names = ["untuned"] if method == "no tuning" else [f"{f'lora-r{r}' if r else 'full'}-seed{s}" for s in (1, 2)]
        scores = [read(whole / name / "accuracy.json") for name in names]
        p = sum(s["accuracy"] for s in scores) / len(scores)
        assert row["test accuracy"] == f"{100 * p:.1f} %"
        assert row["each seed"] == ", ".join(f"{100 * s['accuracy']:.1f}" for s in scores)
        if r:
            tensors = load_file(whole / names[0] / "adapter_model.safetensors")
            assert row["trained"] == f"{sum(t.numel() for t in tensors.values()):,}"
            assert row["alpha"] == str(4 * int(r))
            size = os.path.getsize(whole / names[0] / "adapter_model.safetensors")
            assert row["MB"] == f"{size / 1e6:.2f}"
    for row in table(whole, "2.9"):
        lr, alpha = re.match(r"lr (\S+), alpha (\S+)", row["run"]).groups()
        assert float(lr) * float(alpha) == pytest.approx(0.08)
        losses = []
        for name in ("lora-r2-seed1", "lora-r2-double-lr-half-alpha-seed1", "lora-r2-half-lr-double-alpha-seed1"):
            settings = read(whole / name / "train_config.json")
            if settings["lr"] == float(lr):
                losses.append(min(m["val_loss"] for m in read_lines(whole / name / "metrics.jsonl")))
        assert [row["best validation loss"]] == [f"{loss:.4f}" for loss in losses]
    speeds = read(whole / "latency.json")
    assert [row["tokens/s (median)"] for row in table(whole, "2.1")] == [
        f"{speeds[name]['median']:.1f}" for name in ("base", "unmerged", "merged")
    ]


def test_the_report_opens_with_what_it_found(whole):
    """Lost if it fails: the first lines of a report say something else than its table, or call a tie a victory."""
    rows = [row for row in table(whole, "2.6") if row["method"] != "no tuning"]
    top = max(rows, key=lambda row: float(row["test accuracy"].split()[0]))
    summary = (whole / "report.md").read_text().split("\n\n")[1]
    tied = [row for row in rows if row["test accuracy"] == top["test accuracy"]]
    names = " and ".join(f"LoRA with r = {row['r']}" if row["r"] else row["method"] for row in tied)
    assert summary.startswith(f"Best is {names}: {top['test accuracy']} of 15 test examples (95 % interval ")
    assert f" trains {top['trained']} of " in summary and " full fine-tuning (" in summary
    assert questions.compare_points(0.79964, 0.79956) == "the same as"  # both are shown as 80.0 %
    assert questions.compare_points(0.7904, 0.7812) == "0.9 points above"
    assert questions.compare_points(0.7812, 0.7904) == "0.9 points below"


def test_lora_and_full_are_compared_over_the_same_examples(whole):
    """Lost if it fails: the report's sentence on LoRA beside full fine-tuning is not what the models' losses say."""
    sentence = re.search(r"LoRA's validation loss minus .*", (whole / "report.md").read_text())[0]
    full = np.stack([np.load(whole / f"full-seed{s}" / "val_losses.npy") for s in (1, 2)])
    for r in (1, 2):
        lora = np.stack([np.load(whole / f"lora-r{r}-seed{s}" / "val_losses.npy") for s in (1, 2)])
        assert lora.shape == full.shape == (2, 15)
        gap, low, high = map(float, re.search(rf"r = {r} (\S+) \((\S+) to (\S+)\)", sentence).groups())
        assert gap == pytest.approx((lora - full).mean(), abs=6e-5)
        # At least as wide as the same examples' differences alone make it, by the usual formula.
        paired = (lora - full).mean(axis=0)
        assert high - low > 0.9 * 2 * 1.96 * paired.std() / 15**0.5 and low < gap < high
    assert "seed by seed and example by example" in sentence
    row = table(whole, "2.6")[1]
    losses = [[m["val_loss"] for m in read_lines(whole / f"lora-r1-seed{s}" / "metrics.jsonl")] for s in (1, 2)]
    assert row["validation loss"] == f"{sum(map(min, losses)) / 2:.4f}"


def test_a_report_needs_no_data(place, whole):
    """Lost if it fails: where the data is gone, or is on the machines that trained alone, there is no report."""
    reports = {path: path.read_bytes() for path in whole.glob("report.*")}
    (place / "reviews.csv").rename(place / "elsewhere.csv")
    try:
        finish(start("-m", "tools.sweep", *flags(place, "whole")))
        text = (whole / "report.md").read_text()
    finally:
        (place / "elsewhere.csv").rename(place / "reviews.csv")
        for path, content in reports.items():
            path.write_bytes(content)
    assert "could not be compared example by example here: dataset=" in text and "2.9 Learning rate" in text


def test_every_question_is_answered_and_nothing_is_fetched(whole):
    """Lost if it fails: the report lacks an answer, or its pictures are gone when it is mailed."""
    page = (whole / "report.html").read_text()
    for number in range(1, 10):
        assert re.search(rf"<h2>2\.{number} ", page)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 8 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)


def test_done_runs_are_kept(place, whole):
    """Lost if it fails: starting the sweep again costs all its hours again, or gives another report."""
    before = {p: p.stat().st_mtime_ns for p in whole.glob("*/accuracy.json")}
    report = (whole / "report.html").read_bytes()
    finish(start("-m", "tools.sweep", *flags(place, "whole")))
    assert {p: p.stat().st_mtime_ns for p in whole.glob("*/accuracy.json")} == before and len(before) == 9
    assert (whole / "report.html").read_bytes() == report
    out, _ = finish(start("-m", "tools.sweep", *flags(place, "whole"), "--dry_run"))
    assert out.count(" done\n") == 9
    out, _ = finish(start("-m", "tools.sweep", *flags(place, "whole", lr=0.02), "--dry_run", "--only=untuned,lora"))
    assert out.count(" done\n") == 1  # another learning rate is another training


def test_killed_and_started_again(place, whole):
    """Lost if it fails: a sweep that was stopped gives another report than one that was not."""
    argv = flags(place, "killed", ranks="2", only="lora")
    folder = place / "killed-sweep"

    def stop():
        while not (folder / "lora-r2-seed2" / "checkpoint.pt").exists():
            time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as stopped:
            sweep_here(argv)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 143
    assert not (folder / "report.html").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/accuracy.json")}
    sweep_here(argv)
    assert before.keys() and all(p.stat().st_mtime_ns == t for p, t in before.items())
    (row,) = table(folder, "2.6")
    (other,) = (row for row in table(whole, "2.6") if row["r"] == "2")
    assert row | {"minutes": ""} == other | {"minutes": ""}


def test_a_failing_run_is_told_and_the_others_go_on(place, capsys):
    """Lost if it fails: one run's failure costs the others, or passes for a result."""
    with pytest.raises(SystemExit) as stop:
        sweep_here(flags(place, "failing", ranks="1,40", seeds="1", only="lora"))
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert re.search(r"^error: lora-r40-seed1: train.py ended with exit code 2: error: rank=40", err, re.M)
    good, bad = table(place / "failing-sweep", "2.6")
    assert good["test accuracy"].endswith("%") and "rank=40 does not fit" in bad["test accuracy"]
    assert "rank=40 does not fit" in table(place / "failing-sweep", "Runs that failed")[0]["reason"]


def test_runs_side_by_side_need_ray(place, capsys, monkeypatch):
    """Lost if it fails: without Ray --jobs=2 ends in a traceback that names no package to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        sweep.main(configure([*flags(place, "none"), "--jobs=2"], cls=sweep.SweepConfig, trains=False))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and 'pip install "ray>=2.60"' in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "gpus, cpus, jobs, share, threads, places",
    [
        (2, 16, 1, 1, 8, 2),
        (2, 16, 2, 1, 8, 2),
        (2, 16, 3, 1 / 2, 4, 4),
        (2, 16, 5, 1 / 3, 2, 6),
        (8, 96, 3, 1, 12, 8),
    ],
)
def test_gpus_are_shared_by_whole_runs(gpus, cpus, jobs, share, threads, places):
    """Lost if it fails: on two GPUs --jobs=3 makes two runs at a time: a third of one and a third of the other GPU
    are no place for a run."""
    need, n_threads = share_machines([{"Alive": True, "Resources": {"GPU": gpus, "CPU": cpus}}], jobs, on_gpu=True)
    assert need == {"num_gpus": share, "num_cpus": 0} and n_threads == threads
    assert gpus * int(1 / need["num_gpus"] + 1e-9) == count_places({"GPU": gpus}, need) == places >= jobs


CLUSTER = """
from ray.cluster_utils import Cluster
options = {"object_store_memory": 10**8, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=options | {"num_cpus": 0, "node_ip_address": "127.0.0.2"})
for i in (3, 4):
    cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{i}", **options)
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""
DRIVER = """
import sys
from tools import sweep
from tools.runs import ray_runs
ray_runs.SEND_SECONDS = 0  # a minute is longer than this test
sweep.main(sweep.configure(sys.argv[1:], cls=sweep.SweepConfig, trains=False))
"""


def test_a_run_outlives_its_machine(place, monkeypatch):
    """Lost if it fails: a sweep over machines loses a run with its machine, gives other weights than on one machine,
    or leaves processes behind. A cluster of a head and two machines, of which one is killed."""
    pytest.importorskip("ray")
    settings = {"ranks": "2", "seeds": "1", "only": "lora", "max_iters": 240}
    settings |= {"eval_interval": 20, "eval_iters": 2}
    shared_memory = list_shared_memory()
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: sockets lie in it
    monkeypatch.setenv("RAY_TMPDIR", temp)
    # How soon Ray takes a machine for dead: after 2 questions without an answer, one each half second.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, **pipes)
    try:
        sweep_here(flags(place, "alone", **settings))
        address = cluster.stdout.readline().strip()
        driver = start("-c", DRIVER, *flags(place, "cluster", **settings), f"--ray={address}")
        run = place / "cluster-sweep" / "lora-r2-seed1"
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 4:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        (training,) = (
            p for p in ours(temp) if {"train.py", run.name} <= set(re.split("[ /]", " ".join(p.cmdline())))
        )
        raylet = next(p for p in training.parents() if p.name() == "raylet")
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        finish(driver)
    finally:
        cluster.communicate("\n")
        shutil.rmtree(temp)
    assert re.search(r"from update [1-9]\d* to 240", (run / "log.txt").read_text())
    for name in ("adapter_model.safetensors", "adapter_config.json", "predictions.jsonl"):
        assert (place / "alone-sweep" / run.name / name).read_bytes() == (run / name).read_bytes(), name
    assert (place / "cluster-sweep" / "report.html").exists()
    assert not [p.cmdline() for p in ours(temp)] and list_shared_memory() <= shared_memory


def list_shared_memory():
    """What lies in shared memory, but for what a test beside this one may put there."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "psm_", "torch_"))}


def ours(temp):
    """The processes that have to do with a cluster, which keeps its files in `temp`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if temp in " ".join(process.cmdline()) or process.cwd().startswith(temp):
                found.append(process)
    return found


@pytest.mark.parametrize(
    "losses, says",
    [
        ([8, 4, 2, 1.5, 1.2], "still falls at the end: by 0.3000 since update 30"),
        ([8, 1, 0.5, 0.6, 0.7], "has risen by 0.2000 since"),
        ([8, 1, 0.5, 0.5, 0.5], "flat at the end: since update 30 it has changed by 0.0000"),
        (
            [8, 0.3, 0.263, 0.201],
            "still falls at the end: by 0.0620 since update 20",
        ),  # one evaluation in the last quarter
        ([8, 0.3, 0.2500, 0.2524], "flat at the end"),  # its last evaluation is above the one before
        ([8, 1], "at update 10 of 10. It lies"),  # and not a word on its end
        ([1, 2, 3], "Training has not lowered it"),
        ([1, 1, 1], "Training has not lowered it"),
    ],
)
def test_what_a_curve_shows_is_computed(tmp_path, losses, says):
    """Lost if it fails: the report sees in a curve what is not there."""
    for name, add in (("one", 0), ("other", 0.1)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"iter": 10 * i, "val_loss": loss + add}) for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    run, other = (
        PlannedRun(n, "LoRA", Config(rank=r, out_dir=str(tmp_path / n))) for n, r in (("one", 1), ("other", 8))
    )
    n = len(losses) - 1
    text = questions.describe_curve(run, other)
    assert (
        says in text and f"lowest, {min(losses):.4f}, at update {10 * losses.index(min(losses))} of {10 * n}" in text
    )
    assert f"lies above r = 8's at 0 of {n} evaluations. Its best loss is 0.1000 below that of r = 8." in text
    assert "lies above" not in questions.describe_curve(run, run)
    assert questions.compare(0.20004, 0.20001) == "the same as"


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--ranks=16,x", "ranks=16,x"),
        ("--ranks=0", "ranks=0"),
        ("--seeds=1,1", "seeds=1,1"),
        ("--only=lora,ful", "'ful'"),
        ("--jobs=0", "jobs=0"),
        ("--task=pretrain", "task=pretrain"),
        ("--task=classify", "another --init_from or --task"),
        ("--rankss=1", "did you mean --ranks?"),
        ("--label_names=no,yes", "the label 'bad' too"),
    ],
)
def test_bad_input_is_one_line(place, capsys, flag, words):
    """Lost if it fails: a typing error costs a night of runs."""
    with pytest.raises(SystemExit) as stop:
        sweep.main(configure([*flags(place, "none"), flag], cls=sweep.SweepConfig, trains=False))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_a_high_rank_trains_at_a_lower_rate(place):
    """Lost if it fails: r = 196 at the rate that suits r = 16 diverges, and the report says that rank hurts."""
    argv = [*flags(place, "rates", lr=2e-3, rank=16, ranks="1,16,64"), "--sweep_dir=rates"]
    runs = sweep.plan(configure(argv, cls=sweep.SweepConfig, trains=False))
    rates = {(run.method, run.config.rank): run.config.lr for run in runs if run.method != AGAINST}
    assert rates["LoRA", 1] == rates["LoRA", 16] == 2e-3 and rates["LoRA", 64] == 1e-3
    tuned = [run.config for run in runs if run.config.rank == 16 and run.method != "no tuning"]
    assert [c.lr * c.alpha for c in tuned] == pytest.approx([2e-3 * 64] * 4)  # two seeds, two against each other
