"""train.py from end to end: a run and its files, what it learns, where it stops.

python -m pytest tests/test_train.py
"""

import csv
import json
import math
import os
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CUES,
    MEDIUM,
    REPO,
    differences,
    finish,
    flags,
    here,
    largest_difference,
    leaves,
    read_checkpoint,
    read_metrics,
    resume,
    start,
    stop_after,
    write_reviews,
)
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

import generate
import train
from configurator import Config, configure
from model import GPT
from plumbing.data.tokenizer import end_of_text, gpt2_encoding

SHORT = "Review: {text}\nSentiment: {label}"


@torch.no_grad()
def plain_loss(model, path, template=Config.template):
    """A Hugging Face model's mean loss over the label and end-of-text tokens of a csv's rows, one at a time."""
    total, count = 0.0, 0
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        prompt, full = (template.replace("{text}", row["text"]).replace("{label}", w) for w in ("", row["label"]))
        tokens = [*gpt2_encoding().encode_ordinary(full), end_of_text()]
        n = len(tokens) - len(gpt2_encoding().encode_ordinary(prompt.rstrip(" ")))
        logits = model.eval()(torch.tensor([tokens])).logits[0]
        total += F.cross_entropy(logits[-n - 1 : -1], torch.tensor(tokens[-n:]), reduction="sum").item()
        count += n
    return total / count


# --- one run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(place):
    """The folder of a LoRA run, started as the README starts it."""
    settings = {"max_iters": 80, "eval_interval": 20, "warmup_iters": 10, "lr": 1e-2}
    finish(start("train.py", MEDIUM, *flags(place, "tuned", **settings)))
    return place / "tuned"


def test_a_run_learns_and_leaves_its_files(tuned):
    """Otherwise a user waits for a run that teaches the model nothing, or finds no plot, log or config of it."""
    metrics = read_metrics(tuned)
    assert [m["iter"] for m in metrics] == [0, 20, 40, 60, 80]
    assert metrics[-1]["train_loss"] < 0.6 * metrics[1]["train_loss"]
    assert metrics[-1]["val_loss"] < 0.6 * metrics[0]["val_loss"]
    png = (tuned / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in png[-12:]
    assert read_checkpoint(tuned)["trained"]["transformer.h.0.attn.c_attn.lora_A"].shape == (16, 32)
    config = json.loads((tuned / "train_config.json").read_text())
    assert (config["rank"], config["alpha"], config["lr"], config["dropout"]) == (16, 64.0, 1e-2, 0.05)
    assert not list(tuned.glob("*.tmp"))


def test_peft_loads_the_adapter(place, tuned):
    """Otherwise an adapter trained here is of no use, or another model, to those who serve it with PEFT."""
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(place / "base"), tuned)
    template = json.loads((tuned / "train_config.json").read_text())["template"]
    loss = plain_loss(model, place / "reviews" / "validation.csv", template)
    assert loss == pytest.approx(min(m["val_loss"] for m in read_metrics(tuned)), abs=1e-4)


def test_generate_scores_the_tuned_model_above_the_untuned(place, tuned):
    """Otherwise the accuracy that a user reports is not that of the adapter just trained."""
    out, _ = finish(start("generate.py", "--init_from=resume", f"--out_dir={tuned}"))
    result = json.loads((tuned / "accuracy.json").read_text())
    untuned = flags(place, "tuned", label_names="negative,positive")
    generate.main(configure(untuned, trains=False))
    before = json.loads((tuned / "untuned" / "accuracy.json").read_text())
    assert result["n"] == before["n"] == 20
    assert result["accuracy"] >= 0.9 and before["accuracy"] <= 0.5
    assert f"accuracy {100 * result['accuracy']:.2f} %" in out


def test_the_learning_rate_rises_and_falls_on_straight_lines(tuned):
    """Otherwise a run starts with steps that are too large, or ends with weights that still jump about."""
    config = Config(max_iters=20, warmup_iters=4, decay_share=0.5)
    shares = [train.schedule(config, it) for it in range(21)]
    plateau = [1.0] * 7
    assert shares == pytest.approx([0.25, 0.5, 0.75, *plateau, *(n / 10 for n in range(10, -1, -1))])
    assert train.schedule(Config(max_iters=5, warmup_iters=0, decay_share=0.0), 4) == 1.0  # no division by zero
    last = read_checkpoint(tuned)["optimizers"][0]["param_groups"][0]["lr"]  # update 79 of 80, falling since 8
    assert last == pytest.approx(1e-2 * 1 / 72)


def test_the_best_adapter_is_kept(place):
    """Otherwise a run that goes on too long hands its user the overfitted weights, not the best ones."""
    shutil.copytree(place / "reviews", place / "turned")
    flipped = dict(zip(CUES, reversed(CUES.values())))  # what training teaches is wrong here, so the loss turns up
    write_reviews(place / "turned" / "validation.csv", 12, flipped)
    settings = {"dataset": place / "turned", "rank": 8, "alpha": 32, "max_iters": 40, "eval_interval": 4, "lr": 2e-2}
    settings |= {"template": SHORT, "dropout": 0}
    metrics = here(flags(place, "best", **settings))
    losses = [m["val_loss"] for m in metrics]
    assert min(losses) < losses[0] - 1 and min(losses) < losses[-1] - 1, losses  # it fell, and rose again
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(place / "base"), place / "best")
    assert plain_loss(model, place / "turned" / "validation.csv", SHORT) == pytest.approx(min(losses), abs=1e-4)


def test_accumulated_gradients_equal_one_large_batch(place):
    """Otherwise a user who splits a batch to fit the memory trains something else; label lengths differ here."""
    write_reviews(place / "uneven.csv", 57, {"bad": "dreadful", "truly magnificent work of art": "wonderful"})
    settings = {"dataset": place / "uneven.csv", "rank": 4, "alpha": 16, "max_iters": 8, "eval_interval": 4}
    settings |= {"dropout": 0, "lr": 1e-3}
    settings |= {"grad_clip": 4.5}  # bites in some updates and not in others: else Adam hides a gradient's size
    small = here(flags(place, "small", **settings, batch_size=2, gradient_accumulation_steps=4))
    large = here(flags(place, "large", **settings, batch_size=8))
    assert largest_difference(place / "small", place / "large") < 1e-6
    for key in ("val_loss", "train_loss"):
        assert small[-1][key] == pytest.approx(large[-1][key], abs=1e-5)


def test_update_is_the_loops_own(place):
    """Otherwise the benchmark and the sweep's estimate of its hours measure something else than a training."""
    settings = {"rank": 4, "alpha": 16, "dropout": 0.1, "batch_size": 8, "gradient_accumulation_steps": 2}
    argv = flags(place, "loop", **settings, max_iters=7, lr=5e-3)
    here(argv)
    run = train.set_up(configure(list(map(str, argv))))
    losses = []
    for it in range(7):
        epoch, place_in_epoch = divmod(it, 3)  # 48 reviews are three batches of 16
        indices = run.loader.order("train", 16, epoch)[place_in_epoch]
        losses.append(train.update(run, train.micro_batches(run, indices), it)[0])
    trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    assert leaves(trained) == leaves(read_checkpoint(place / "loop")["trained"])
    assert read_metrics(place / "loop")[-1]["train_loss"] == sum(losses) / 7


def test_transformers_and_generate_open_a_full_run(place):
    """Otherwise a model fine-tuned without LoRA cannot leave this repository, nor be scored in it."""
    here(flags(place, "full", rank=0, dropout=0.1, batch_size=8, max_iters=160, lr=5e-3, eval_interval=8))
    model = GPT2LMHeadModel.from_pretrained(place / "full")
    best = min(m["val_loss"] for m in read_metrics(place / "full"))
    assert plain_loss(model, place / "reviews" / "validation.csv") == pytest.approx(best, abs=1e-4)
    generate.main(configure(resume(place, "full"), trains=False))
    result = json.loads((place / "full" / "accuracy.json").read_text())
    least = 0.9 if torch.__version__ >= (2, 7) else 0.8  # torch 2.6 rounds in another way: 17 of 20
    assert result["n"] == 20 and result["accuracy"] >= least


@pytest.mark.parametrize("n_wanted", [1, 9, 20, 33])
def test_an_evaluation_of_some_batches_sees_short_and_long_texts(monkeypatch, n_wanted):
    """Otherwise the validation loss with --eval_iters is that of the shortest reviews, and so is what is best."""
    seen = []
    loader = SimpleNamespace(
        batch_size=2,
        order=lambda split, size: [[length] for length in range(34)],  # from short to long, as the loader's
        n_scored=lambda split, indices: 1,
        batch=lambda split, indices: SimpleNamespace(to=lambda device: seen.append(indices[0])),
    )
    processes = SimpleNamespace(world_rank=0, world_size=1, device="cpu", totals=list)
    model = torch.nn.Linear(1, 1)
    run = train.Run(Config(eval_iters=n_wanted), processes, torch.float32, loader, model, [], [], None)
    monkeypatch.setattr(train, "compute_loss", lambda model, batch: torch.tensor(1.0))
    assert train.evaluate(run) == 1
    assert len(set(seen)) == n_wanted
    assert abs(sum(seen) / n_wanted - 16.5) <= 1  # the mean over all


# --- a run that diverges --------------------------------------------------------------------------


@pytest.mark.parametrize("intervals", [{"eval_interval": 9}, {"eval_interval": 1}, {"save_interval": 1}], ids=str)
def test_a_diverged_run_names_the_step_and_leaves_a_good_checkpoint(place, capfd, intervals):
    """Otherwise hours are burnt on NaN, or the last checkpoint holds the weights that exploded."""
    name = "diverged-" + "-".join(intervals) + str(sum(intervals.values()))
    settings = {"rank": 2, "alpha": 8, "max_iters": 6, "lr": 1e30, "grad_clip": 0, "warmup_iters": 0} | intervals
    with pytest.raises(SystemExit) as ended:
        here(flags(place, name, **settings))
    assert ended.value.code == 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "update 1" in line and str(place / name) in line
    trained = read_checkpoint(place / name)["trained"]
    assert max(tensor.abs().max().item() for tensor in trained.values()) < 10


def test_a_rank_stabilised_run_crosses_to_peft_and_resumes(place, monkeypatch):
    """Otherwise --rslora trains at one scale and is scored, resumed or opened in PEFT at another."""
    settings = {"rank": 5, "alpha": 3, "dropout": 0.0, "rslora": True, "lora_plus": 4, "max_iters": 8, "lr": 1e-2}
    here(flags(place, "stable", **settings))
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(place / "base"), place / "stable").eval()
    layer = theirs.base_model.model.transformer.h[0].attn.c_attn
    assert layer.use_rslora["default"] and layer.scaling["default"] == pytest.approx(3 / math.sqrt(5))
    assert json.loads((place / "stable" / "adapter_config.json").read_text())["lora_alpha"] == 3
    ours = generate.open_model(configure(resume(place, "stable"), trains=False), "cpu", torch.float32)
    idx = torch.arange(600, 640)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0][:, -1], theirs(idx).logits[:, -1], rtol=0, atol=1e-4)
        assert not torch.allclose(ours(idx)[0], GPT.from_pretrained(place / "base").eval()(idx)[0], atol=0.01)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 3)
        here(flags(place, "stable-broken", **settings))
    here(resume(place, "stable-broken"))
    assert differences(place / "stable", place / "stable-broken") == []
    for typed in ({"rslora": False}, {"lora_plus": 1}):
        with pytest.raises(SystemExit):
            configure(resume(place, "stable", **typed))


def test_a_run_does_without_the_compiler(place):
    """Otherwise each start of train.py waits a second more for an import that nothing needs."""
    code = "import sys, train; from configurator import configure; train.train(configure(sys.argv[1:]))"
    code += "; assert 'torch._dynamo' not in sys.modules"
    finish(start("-c", code, *flags(place, "lean", rank=2, alpha=8, max_iters=2)))


class Float64s(TorchDispatchMode):
    """Notes each operation of torch's that takes or gives float64."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # torch.tensor(a NumPy array, dtype=float32) first looks at it as it is, and then converts it, on the CPU.
        looked_at = {"lift_fresh": (), "_to_copy": (out,)}.get(name, (args, out))
        if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(looked_at)):
            self.found.add(name)
        return out


@pytest.mark.parametrize("task", ["instruct", "classify"])
def test_no_number_of_a_run_is_float64(place, task):
    """Otherwise a training on a Mac ends in a TypeError: mps has no float64."""
    settings = {"task": task, "rank": 2, "alpha": 8, "max_iters": 3, "eval_interval": 2, "dropout": 0.1}
    if task == "classify":
        settings |= {"balance_classes": True}
    with Float64s() as seen:
        here(flags(place, f"no-float64-{task}", **settings))
        sampler = generate.ModelSampler(str(place / f"no-float64-{task}"), device="cpu")
        sampler.get_accuracy()
        if task == "instruct":
            sampler.config.temperature = 1.0
            sampler.generate("The plot")
    assert not seen.found


# --- mistakes -------------------------------------------------------------------------------------


def test_without_the_hub_the_offline_command_is_named(tmp_path):
    """Otherwise a user behind a firewall meets a traceback of a download library as the first thing of all."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    _, err = finish(start("train.py", MEDIUM, f"--out_dir={tmp_path / 'out'}", **env), code=2)
    (line,) = err.splitlines()
    assert line.startswith("error:") and "gpt2-medium" in line
    assert "python train.py configs/finetune_mini_config.py" in line
    assert os.path.isfile(os.path.join(REPO, "configs", "finetune_mini_config.py"))


@pytest.mark.parametrize("batch_size", [8, 9])
def test_out_of_memory_names_smaller_pieces_of_the_same_training(place, monkeypatch, capfd, batch_size):
    """Otherwise a user guesses at sizes, or follows advice that changes the global batch."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "from_pretrained", full)
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": 2}
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(place, f"oom{batch_size}", **sizes)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.path.join(REPO, "train.py"), run_name="__main__")
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error:")
    advice = dict(word.removeprefix("--").split("=") for word in line.split() if word.startswith("--"))
    assert int(advice["batch_size"]) < batch_size
    assert int(advice["batch_size"]) * int(advice["gradient_accumulation_steps"]) == batch_size * 2


def test_any_seed_that_is_accepted_trains(place):
    """Otherwise a seed drawn from the clock in nanoseconds passes the check and then ends in an overflow."""
    metrics = here(flags(place, "seed", rank=2, alpha=8, max_iters=1, seed=10**18))
    assert math.isfinite(metrics[-1]["val_loss"])


def test_rows_widened_for_cuda_graphs_give_the_same_training(place, monkeypatch):
    """Lost if it fails: --compile=True on a GPU ends at its first batch, or trains on other losses than without. Here
    the rows are widened as there, and nothing is compiled."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 4, "eval_interval": 2, "dropout": 0, "batch_size": 8}
    plain = here(flags(place, "narrow", **settings))
    with monkeypatch.context() as patch:
        patch.setattr(train.cuda_graphs, "are_used", lambda config, device: True)
        wide = here(flags(place, "widened", **settings))
    for a, b in zip(plain, wide, strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-5)
