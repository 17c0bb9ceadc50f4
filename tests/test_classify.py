"""task="classify" from end to end: the loss, what trains, a run and its score, resumed, by LoRA and without.

python -m pytest tests/test_classify.py
"""

import csv
import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import base_folder
from transformers import GPT2Config, GPT2ForSequenceClassification

import generate
from configurator import Config, configure
from dataloader import make_loader
from generate import ModelSampler
from model import GPT
from plumbing.adapters.peft_format import load_adapter
from plumbing.data.tokenizer import end_of_text
from train import build_model, evaluate, micro_batches, set_up, train, update

WORDS = {"ham": "lunch", "news": "minister", "spam": "prize"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random GPT-2 that transformers saved (base) and three kinds of messages, unevenly many (messages)."""
    folder = base_folder(tmp_path_factory, "classify", n_layer=2)
    rng = random.Random(1)
    with open(folder / "messages.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["label", "text", "split"])
        for split, n in (("train", 90), ("validation", 20), ("test", 30)):
            for i in range(n):
                label = ("spam", "news", "ham", "ham", "ham")[i % 5]
                filler = " ".join(rng.choice(["so", "then", "call", "me"]) for _ in range(rng.randint(0, 6)))
                rows.writerow([label, f"{filler} {WORDS[label]}", split])
    return folder


def flags(place, out, **settings):
    values = {"task": "classify", "init_from": place / "base", "dataset": place / "messages.csv"}
    values |= {"out_dir": place / out, "device": "cpu", "dtype": "float32", "rank": 4, "alpha": 16, "lr": 0.01}
    values |= {"max_iters": 60, "batch_size": 16, "eval_interval": 20, "warmup_iters": 5}
    values |= {"dropout": 0.0, "eval_iters": 0} | settings
    return [f"--{key}={value}" for key, value in values.items()]


def hf(place, folder):
    return GPT2ForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=end_of_text()).eval()


@pytest.mark.parametrize("balance", [False, True])
def test_loss_is_transformers_weighted_cross_entropy(place, balance):
    """Lost if it fails: the classifier learns from another place than the text's last token, or another weight."""
    config = configure(flags(place, "none", rank=0, dropout=0.0, balance_classes=balance))
    loader = make_loader(config, 64)
    model = build_model(config, "cpu", torch.float32, n_classes=3).eval()
    theirs = GPT2ForSequenceClassification(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=3, pad_token_id=end_of_text())
    ).eval()
    model.save_pretrained(str(place / "saved"))
    theirs = hf(place, place / "saved")
    examples = loader.splits["train"][:7]
    batch = loader.batch("train", range(7))
    logits, loss = model(batch.idx, batch.targets, class_weights=batch.class_weights)
    labels = torch.tensor([ex.label for ex in examples])
    counts = torch.tensor([54.0, 18.0, 18.0])  # of ham, news and spam among 90
    for row, ex in zip(logits, examples):  # one text at a time: no padding at all
        torch.testing.assert_close(row, theirs(torch.tensor([ex.tokens])).logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, 30 / counts if balance else None))


def test_gradient_of_uneven_batches_is_the_whole_batchs(place):
    """Lost if it fails: with weighted classes, accumulating over small batches is another training."""
    grads = []
    for size in (5, 100):
        # grad_clip=0: what is compared is the gradient itself.
        run = set_up(configure(flags(place, "none", balance_classes=True, batch_size=size, grad_clip=0)))
        torch.manual_seed(0)
        model = build_model(run.config, "cpu", torch.float64, n_classes=3)
        params = [p for p in model.parameters() if p.requires_grad]
        run = dataclasses.replace(run, model=model, params=params, optimizers=[])
        update(run, micro_batches(run, range(13)), 0)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        loss = evaluate(run)
    loader = run.loader
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-6)
    weights, total, n = torch.tensor([90 / 54, 90 / 18, 90 / 18]) / 3, 0.0, 0.0
    for ex in loader.splits["validation"]:
        last = torch.full((1, len(ex.tokens)), -1)
        last[0, -1] = ex.label
        total += weights[ex.label] * model(torch.tensor([ex.tokens]), last)[1].item()
        n += weights[ex.label]
    assert loss == pytest.approx(float(total / n), rel=1e-5)


@pytest.mark.parametrize(
    "settings, trained",
    [
        ({"rank": 1, "lora_targets": r"h\.1\.attn\.c_attn", "lora_bias": "lora_only"}, 32 + 96 + 96 + 3 * 32),
        ({"rank": 0, "trainable": r"h\.1\.attn\.c_attn"}, 32 * 96 + 96 + 3 * 32),
        ({"rank": 1, "lora_targets": "c_fc", "trainable": "ln_f"}, 2 * (32 + 128) + 64 + 3 * 32),
        ({"rank": 0}, 50257 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64 + 3 * 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains(place, settings, trained, dtype):
    """Lost if it fails: a run trains other parameters than its flags say, or some of them in bfloat16."""
    model = build_model(configure(flags(place, "none", **settings)), "cpu", dtype, n_classes=3)
    params = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in params) == trained
    assert {p.dtype for p in params} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {dtype}


RUNS = {
    "lora": {"lora_targets": r"c_(attn|proj|fc)$", "lora_bias": "lora_only", "balance_classes": True},
    "all weights": {"rank": 0, "lr": 0.003},
    "some weights": {"rank": 0, "trainable": r"\.h\.", "lr": 0.003},
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_learns_is_resumed_and_scored(place, kind, capsys):
    """Lost if it fails: the classifier does not learn, or what is scored is not what was trained."""
    train(configure(flags(place, kind, **RUNS[kind])))
    train(configure(flags(place, f"{kind} again", **RUNS[kind] | {"max_iters": 20})))
    resumed = [
        "--init_from=resume",
        f"--out_dir={place / kind} again",
        "--max_iters=60",
    ]
    losses = [m["val_loss"] for m in train(configure(resumed))]
    assert losses[-1] < 0.3 * losses[0]
    generate.main(configure(["--init_from=resume", f"--out_dir={place / kind}"], trains=False))
    result = json.loads((place / kind / "accuracy.json").read_text())
    assert result["accuracy"] > 0.9 and result["n"] == 30 and result["garbage"] == 0
    table = result["confusion"]
    assert [sum(row) for row in table] == [18, 6, 6] and result["label_names"] == ["ham", "news", "spam"]
    assert result["recall"] == [row[i] / sum(row) for i, row in enumerate(table)]
    rows = [json.loads(line) for line in (place / kind / "predictions.jsonl").read_text().splitlines()]
    assert sum(r["label"] == r["predicted"] for r in rows) == sum(table[i][i] for i in range(3))
    capsys.readouterr()
    argv = ["--init_from=resume", f"--out_dir={place / kind}", "--start=then call me so prize"]
    generate.main(configure(argv, trains=False))
    assert capsys.readouterr().out.startswith("spam: ")
    sampler = ModelSampler(str(place / kind))  # the same in a program
    assert sampler.get_accuracy() == result["accuracy"]
    shares = sampler.score_classes("then call me so prize")
    assert max(shares, key=shares.get) == "spam" and sum(shares.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="score_classes"):
        sampler.generate("then call me so prize")


def test_transformers_reads_the_run(place):
    """Lost if it fails: a classifier trained here serves only here."""
    train(configure(flags(place, "whole", rank=0, max_iters=2)))
    ours, idx = GPT.from_pretrained(str(place / "whole")).eval(), torch.arange(40, 50)[None]
    assert ours.config.n_classes == 3  # as its config.json says
    theirs = GPT2ForSequenceClassification.from_pretrained(place / "whole").eval()
    torch.testing.assert_close(ours(idx)[0][:, 0], theirs(idx).logits, rtol=0, atol=1e-4)
    train(configure(flags(place, "adapter", max_iters=2)))
    model = GPT.from_pretrained(str(place / "base"), n_classes=3)
    load_adapter(model, str(place / "adapter"))
    from peft import PeftModel

    peft = PeftModel.from_pretrained(hf(place, place / "base"), place / "adapter").eval()
    torch.testing.assert_close(model.eval()(idx)[0][:, 0], peft(idx).logits, rtol=0, atol=1e-4)


def test_numbers_for_classes_and_texts_without_a_token(tmp_path):
    """Lost if it fails: data whose classes are numbers is refused, or an empty text has no last token."""
    (tmp_path / "data.csv").write_text(
        "text,label\n" + "".join(f'"{"ab"[i % 2] * (i % 3)}",{i % 4}\n' for i in range(40))
    )
    loader = make_loader(Config(task="classify", dataset=str(tmp_path / "data.csv"), label_names=None), 64)
    assert loader.label_names == ["0", "1", "2", "3"]
    batch = loader.batch("train", range(len(loader.splits["train"])))
    assert ((batch.targets >= 0).sum(1) == 1).all()  # one place a text, the empty ones too


def test_a_language_model_has_no_classes_for_new_texts(place, capsys):
    """Lost if it fails: a random head labels a user's texts as if it were a model."""
    with pytest.raises(SystemExit) as stop:
        generate.main(configure([*flags(place, "none"), "--start=a call"], trains=False))
    assert stop.value.code == 2 and "has no classes" in capsys.readouterr().err


def test_the_untuned_classifier_has_an_accuracy(place):
    """Lost if it fails: nobody can say what tuning a classifier has changed."""
    config = configure(flags(place, "untrained", split="validation"), trains=False)
    sampler = ModelSampler(config=config)
    sampler.get_accuracy()
    run = set_up(configure(flags(place, "untrained")))  # with the head that training begins with
    batch = run.loader.batch("validation", range(len(run.loader.splits["validation"])))
    logits, _ = run.model.eval()(batch.idx, batch.targets)
    assert logits.argmax(-1).tolist() == sampler.found


def test_weights_are_chosen_on_a_part_of_train_and_scored_on_validation(place):
    """Lost if it fails: the best of many evaluations is scored on the examples that it was the best of."""
    settings = {"held_out": 0.2, "split": "validation"}
    loader = set_up(configure(flags(place, "held-out", **settings))).loader
    every = make_loader(configure(flags(place, "none")), 64)
    train_texts = [ex.text for ex in loader.splits["train"]]
    held_texts = [ex.text for ex in loader.splits["validation"]]
    assert len(held_texts) == round(0.2 * len(every.splits["train"]))
    assert sorted(train_texts + held_texts) == sorted(ex.text for ex in every.splits["train"])
    sampler = ModelSampler(config=configure(flags(place, "held-out", **settings), trains=False))
    sampler.load_data()
    scored = [ex.text for ex in sampler.loader.splits["validation"]]
    assert scored == [ex.text for ex in every.splits["validation"]]
    few = make_loader(configure(flags(place, "none", train_examples=10, **settings)), 64)
    assert {ex.text for ex in few.splits["train"]} <= set(train_texts)
