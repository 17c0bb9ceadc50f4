"""Runs that were stopped or killed go on where they were, with what is typed, and end in an unbroken run's bits.

python -m pytest tests/running/test_resume.py
"""

import itertools
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import (
    CUES,
    Killed,
    differences,
    finish,
    flags,
    here,
    kill_at_rename,
    leaves,
    one_line_of,
    read_checkpoint,
    read_metrics,
    resume,
    start,
    stop_after,
    write_reviews,
)

import generate
import train
from configurator import configure
from plumbing.running import machine
from plumbing.running.checkpoint import hash_state


def break_and_resume(place, name, stops, **settings):
    """An unbroken run in `name` and, in `name`-broken, one that gets each signal once an evaluation at or after
    its update is on the disk, and is resumed each time. Returns the exit codes and the last output before each."""
    broken, ends = place / f"{name}-broken", []
    argv = flags(place, broken.name, **settings)
    for number, update in stops:
        process = start("train.py", *argv)
        while not (broken / "metrics.jsonl").exists() or read_metrics(broken)[-1]["iter"] < update:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
        ends.append((process.returncode, out))
        argv = resume(place, broken.name)
    here(argv)
    here(flags(place, name, **settings))
    return ends


@pytest.fixture(scope="module")
def broken_lora(place):
    settings = {"rank": 4, "alpha": 16, "dropout": 0.1, "batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"max_iters": 80, "eval_interval": 10, "save_interval": 1, "lr": 5e-3}
    stops = [(signal.SIGINT, 10), (signal.SIGTERM, 20), (signal.SIGKILL, 30)]
    return break_and_resume(place, "lora", stops, **settings)


@pytest.fixture(scope="module")
def broken_full(place):
    settings = {"rank": 0, "dropout": 0.1, "batch_size": 8, "max_iters": 48, "lr": 5e-3}
    settings |= {"eval_interval": 8, "save_interval": 4}
    return break_and_resume(place, "full", [(signal.SIGTERM, 8), (signal.SIGKILL, 16)], **settings)


def test_a_stopped_run_exits_as_the_shell_expects_and_tells_how_to_go_on(broken_lora, broken_full):
    """Otherwise job scripts take a stopped run for a finished one, or a user for a lost one."""
    assert [code for code, _ in broken_lora] == [130, 143, -signal.SIGKILL]
    assert [code for code, _ in broken_full] == [143, -signal.SIGKILL]
    for code, out in [*broken_lora, *broken_full]:
        assert code < 0 or "--init_from=resume" in out.splitlines()[-1]


def test_a_lora_run_that_was_interrupted_terminated_and_killed_equals_an_unbroken_one(place, broken_lora):
    """Otherwise a preempted machine costs its user the run, or silently another result."""
    assert differences(place / "lora", place / "lora-broken") == []
    assert len(read_metrics(place / "lora")) == 9


def test_a_full_run_that_was_terminated_and_killed_equals_an_unbroken_one(place, broken_full):
    """Otherwise the same happens to full fine-tuning, whose moments are the larger half of the checkpoint."""
    assert differences(place / "full", place / "full-broken") == []


def test_killed_again_and_again():
    """Lost if it fails: a run that a machine took down is another run than the one that was started."""
    out, _ = finish(start("tests/running/soak.py", "10"))
    assert "10 kills, every run ended in the unbroken run's bits" in out


def test_a_kill_between_any_two_files_costs_nothing(place, monkeypatch):
    """Otherwise a kill at the wrong instant leaves files of two different moments, and the run does not recover."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 2, "eval_interval": 2, "save_interval": 1, "batch_size": 16}
    here(flags(place, "instants", **settings))
    for n in itertools.count(1):  # rename 0 is train_config.json; before it there is no run
        shutil.rmtree(place / "instant", ignore_errors=True)
        with monkeypatch.context() as patch:
            kill_at_rename(patch, n)
            try:
                here(flags(place, "instant", **settings))
                break
            except Killed:
                pass
        here(resume(place, "instant"))
        assert (n, differences(place / "instants", place / "instant")) == (n, [])
    assert n > 4  # at least metrics and a checkpoint at updates 0 and 2


def test_a_new_run_does_not_resume_the_old_one_of_its_folder(place, monkeypatch):
    """Otherwise a run killed in its first evaluation comes back as the older run that the folder held."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 3, "batch_size": 16}
    here(flags(place, "fresh", **settings, lr=1e-3))
    here(flags(place, "reused", **settings, lr=1e-1))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(patch, 1)
        here(flags(place, "reused", **settings, lr=1e-3))
    assert not (place / "reused" / "adapter_model.safetensors").exists()  # the older run's, which would be scored
    here(resume(place, "reused"))
    assert differences(place / "fresh", place / "reused") == []


def test_a_flag_on_a_resumed_run_is_obeyed(place, monkeypatch):
    """Otherwise a user who resumes with a lower learning rate, as the error for a diverged run advises, gets the
    old one."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 3)
        here(flags(place, "slower", rank=2, alpha=8, max_iters=8))
    before = read_checkpoint(place / "slower")
    here(resume(place, "slower", lr=0))
    after = read_checkpoint(place / "slower")
    assert before["trained"]["transformer.h.0.attn.c_attn.lora_B"].any()
    assert leaves(before["trained"]) == leaves(after["trained"])  # four more updates, each of size 0


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_what_is_typed_on_resuming_counts_from_then_on(place, monkeypatch, seed):
    """Otherwise a run that was resumed with a flag, killed, and resumed by the line that it printed becomes another
    run, or takes itself for finished. Two runs are resumed three times with the same flags; one of them is also
    killed between two of its files each time, and resumed without flags."""
    rng = random.Random(seed)
    possible = {
        "lr": (1e-4, 3e-3, 1e-2),
        "weight_decay": (0.0, 0.1),
        "eval_interval": (2, 3, 5),
        "warmup_iters": (0, 4),
        "decay_share": (0.0, 0.9),
        "grad_clip": (0.0, 0.5),
        "beta2": (0.9, 0.99),
    }
    first = {"rank": 2, "alpha": 8, "dropout": 0.1, "max_iters": 6, "eval_interval": 2, "seed": seed}
    one = f"chain-{seed}"
    other = f"chain-{seed}-killed"
    for name in (one, other):
        here(flags(place, name, **first))
    reached = 6
    for _ in range(3):
        typed = {key: rng.choice(possible[key]) for key in rng.sample(sorted(possible), 3)}
        typed["max_iters"] = reached + rng.randint(6, 9)
        stop = reached + rng.randint(3, 5)
        kill = rng.randint(1, 4)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, stop)
            here(resume(place, one, **typed))
        with monkeypatch.context() as patch, pytest.raises((SystemExit, Killed)) as end:
            stop_after(patch, stop)
            kill_at_rename(patch, kill)
            here(resume(place, other, **typed))
        if end.type is Killed:
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                stop_after(patch, stop)
                here(resume(place, other))
        reached = stop
    for name in (one, other):
        here(resume(place, name))
    assert read_metrics(place / one)[-1]["iter"] == typed["max_iters"]
    assert differences(place / one, place / other) == []


def test_a_run_cannot_end_before_where_it_is(place, capsys):
    """Otherwise a typing mistake in max_iters ends in "best validation loss" and exit code 0, and the run's settings
    say that it was shorter than it is."""
    here(flags(place, "six", rank=2, alpha=8, max_iters=6))
    before = (place / "six" / "train_config.json").read_bytes()
    with pytest.raises(SystemExit) as end:
        here(resume(place, "six", max_iters=5))
    assert end.value.code == 2
    assert "max_iters=5: the run in" in capsys.readouterr().err
    assert (place / "six" / "train_config.json").read_bytes() == before


@pytest.mark.parametrize(
    "began, has, goes_on",
    [("bfloat16", "float16", "float16"), ("float32", "float16", "float32"), ("float16", "float32", "float32")],
    ids=["A100 to T4", "CPU to T4", "T4 to CPU"],
)
def test_a_run_goes_on_where_the_machine_has_another_dtype(place, monkeypatch, capsys, began, has, goes_on):
    """Otherwise a run that began on one of Colab's machines ends in a traceback on the next, or changes its
    arithmetic without a word. A machine is what `pick_dtype` says of it."""

    def machine_with(*dtypes):
        def pick_dtype(device, dtype, layer):
            picked = dtypes[0] if dtype == "auto" else dtype
            if picked not in dtypes:
                raise ValueError(f"no {picked}")
            return getattr(torch, picked)

        return pick_dtype

    name = f"{began}-{has}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(machine, "pick_dtype", machine_with(began))
        stop_after(patch, 2)
        here(flags(place, name, rank=2, alpha=8, max_iters=4, dtype="auto"))
    capsys.readouterr()
    monkeypatch.setattr(machine, "pick_dtype", machine_with(has, "float32"))
    here(resume(place, name))
    out = capsys.readouterr().out
    assert f"cpu {goes_on}, " in out
    assert (f"computed in {began} until now, and goes on in {goes_on}" in out) == (began != goes_on)
    assert read_metrics(place / name)[-1]["iter"] == 4
    assert bool(read_checkpoint(place / name)["scaler"]) == (goes_on == "float16")
    here(resume(place, name, max_iters=5, dtype="float32"))  # a dtype that is typed wins
    assert "cpu float32, " in capsys.readouterr().out


def change_labels(path):
    """Every label becomes the other one."""
    words = list(CUES)
    text = path.read_text().replace(words[0], "OTHER").replace(words[1], words[0]).replace("OTHER", words[1])
    path.write_text(text)


@pytest.mark.parametrize("names_test", [False, True], ids=["drawn", "a file of its own"])
def test_a_run_knows_its_data(place, capsys, names_test):
    """Otherwise a run goes on with other labels than it began with, or scores rows that it was trained on, and both
    look like results."""
    data = place / f"data-{names_test}"
    data.mkdir()
    write_reviews(data / "train.csv", 200)
    if names_test:
        write_reviews(data / "test.csv", 20)
    name = f"run-{names_test}"
    here(flags(place, name, dataset=data, rank=2, alpha=8, max_iters=2))
    here(resume(place, name, max_iters=3))
    change_labels(data / "train.csv")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        here(resume(place, name, max_iters=4))
    assert end.value.code == 2
    assert "has changed since the run in" in capsys.readouterr().err
    config = configure(resume(place, name), trains=False)
    if names_test:
        generate.main(config)
        assert "its own test split is scored as it is now" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as end:
            generate.main(config)
        assert end.value.code == 2
        assert "the seed draws its test split" in capsys.readouterr().err
    other = configure(resume(place, name, dataset=place / "reviews"), trains=False)
    generate.main(other)  # other data than the run's were never trained on
    assert "has changed" not in capsys.readouterr().out


def test_the_same_command_again_goes_on(place, monkeypatch, capfd):
    """Otherwise a run that a scheduler starts again begins from nothing, or goes on with others than its settings."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 8, "save_interval": 1, "batch_size": 16}
    here(flags(place, "unbroken", **settings))
    again = flags(place, "again", **settings, auto_resume=True)
    starts = []
    for stop in (3, 5):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, stop)
            here(again)
        starts.append(capfd.readouterr().out)
    here(again)
    starts.append(capfd.readouterr().out)
    assert ["from update 0 to 8" in starts[0], "from update 3" in starts[1], "from update 5" in starts[2]] == [
        True
    ] * 3
    assert differences(place / "unbroken", place / "again") == []
    line = one_line_of(capfd, [*again, "--lr=0.003", "--seed=2"])
    assert "lr=0.003 (0.0005 there)" in line and "seed=2 (1337 there)" in line and str(place / "again") in line
    assert differences(place / "unbroken", place / "again") == []  # nothing of it is lost


def test_a_run_is_not_resumed_with_another_rank(place, capfd):
    """Otherwise a resumed run is of two shapes, or quietly ignores the flag."""
    here(flags(place, "ranked", max_iters=1))
    line = one_line_of(capfd, resume(place, "ranked", rank=8))
    assert "--rank=8" in line and "rank=16" in line


@pytest.mark.parametrize("eval_iters, best", [(20, 0.1), (1, 0.9), (0, 0.9)])
def test_the_best_of_other_batches_starts_anew(place, monkeypatch, capsys, eval_iters, best):
    """Lost if it fails: after resuming with another --eval_iters no adapter is saved any more, however good."""
    name = f"best-{eval_iters}"
    settings = {"rank": 2, "alpha": 8, "eval_interval": 2, "batch_size": 8}
    monkeypatch.setattr(train, "evaluate", lambda run: 0.1)
    here(flags(place, name, max_iters=2, eval_iters=20, **settings))
    adapter = (place / name / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(train, "evaluate", lambda run: 0.9)
    here(resume(place, name, max_iters=4, eval_iters=eval_iters))
    assert read_checkpoint(place / name)["progress"]["best"] == best
    assert ((place / name / "adapter_model.safetensors").read_bytes() == adapter) == (best == 0.1)
    assert capsys.readouterr().out.count("the best one is reset") == (best != 0.1)
    monkeypatch.setattr(train, "evaluate", lambda run: 0.95)
    here(resume(place, name, max_iters=6))  # what was typed counts from then on
    assert read_checkpoint(place / name)["progress"]["best"] == best


def test_a_checkpoint_of_before_opens(place):
    """Lost if it fails: a run that an older version began cannot be gone on with."""
    here(flags(place, "older", rank=2, alpha=8, max_iters=2, eval_interval=2))
    state = read_checkpoint(place / "older")
    del state["progress"]["eval_iters"], state["sha256"]
    torch.save(state | {"sha256": hash_state(state)}, place / "older" / "checkpoint.pt")
    assert here(resume(place, "older", max_iters=4))[-1]["iter"] == 4
