"""Scoring by the words that a model writes: what counts, how sure the score is, and the two command lines.

python -m pytest tests/test_generate.py
"""

import csv
import dataclasses
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import REPO, finish, flags, here, start, write_reviews
from transformers import GPT2Config, GPT2LMHeadModel

import generate
from configurator import Config, configure, make_config
from dataloader import CustomDataLoader, make_loader
from generate import ModelSampler, find_label
from model import GPT
from plumbing.adapters.layers import lora_layers
from plumbing.adapters.peft_format import save_adapter
from plumbing.data.labels import ANSWER_CHARS
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.scoring.accuracy import tabulate

END = 50256
TEMPLATE = "Review: {text}\nSentiment: {label}"  # the assignment's own is too long for models of 64 tokens


# --- which label a text holds --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("positive", "positive"),
        (" negative", "negative"),
        ("\npositive\n", "positive"),
        ("positive or negative?", "positive"),  # the first one counts
        ("negative, not positive", "negative"),
        ("", None),
        ("no idea", None),
        ("positively", None),  # inside a longer word is another word
        ("nonnegative", None),
        ("positive2", None),
        ("überpositive", None),
        ("positively negative", "negative"),
        ("POSITIVE!", "positive"),
        ('"Negative."', "negative"),
        ("**positive**", "positive"),
        ("pos itive", None),
        ("." * (ANSWER_CHARS - 8) + "positive", "positive"),  # ends with the last character that counts
        ("." * (ANSWER_CHARS - 7) + "positive", None),  # cut at the limit
        ("." * ANSWER_CHARS + " positive", None),
        ("." * (ANSWER_CHARS - 7) + "positive negative", None),
    ],
)
def test_the_first_label_as_a_word_of_its_own_counts(text, found):
    """Lost if it fails: the score counts answers that a reader would not, or misses some that they would."""
    names = ["negative", "positive"]
    assert find_label(text, names) == (None if found is None else names.index(found))
    assert find_label(text, names[::-1]) == (None if found is None else names[::-1].index(found))


@pytest.mark.parametrize(
    "names, text, found",
    [
        (["pos", "positive"], "positive", "positive"),
        (["pos", "positive"], "pos", "pos"),
        (["pos", "positive"], "pos, so positive", "pos"),
        (["very good", "very"], "very good", "very good"),
        (["very good", "very"], "very bad", "very"),
        (["good", "very good"], "very good", "very good"),
        (["C++", "C"], "C++ it is", "C++"),
        (["C++", "C"], "C it is", "C"),
        (["a.b", "c"], "axb", None),  # a label is no regular expression
        (["👎", "👍"], " 👍", "👍"),
        (["👎", "👍"], "👍👎", "👍"),
        (["👎", "👍"], "thumbs up", None),
        (["NEG", "Pos"], "pos", "Pos"),
        (["плохо", "хорошо"], "Хорошо!", "хорошо"),
        (["1", "10"], "10", "10"),
    ],
)
def test_labels_that_begin_alike_and_unusual_labels(names, text, found):
    """Lost if it fails: with label words like these one class is counted as another."""
    for order in (names, names[::-1]):
        assert find_label(text, order) == (None if found is None else order.index(found))


ODD = ["po\u017fitive", "pos\u0131tive", "POS\u0130TIVE", "\u212aeep", "\0", "\ufffd\ufffd"]  # long s, dotless i ...


@pytest.mark.parametrize("text", ODD)
def test_no_generated_text_stops_the_scoring(text):
    """Lost if it fails: one letter that is odd in lower case in one answer ends a long scoring with a traceback."""
    assert find_label(text, ["negative", "positive", "keep"]) in (None, 1, 2)


# --- accuracy ------------------------------------------------------------------------------------


def score_texts(generated, labels, names):
    return tabulate([find_label(text, names) for text in generated], labels, names)


def test_accuracy_counts_garbage_as_wrong():
    """Lost if it fails: a model that writes nonsense for the hard half scores 100 % on the rest."""
    names = ["negative", "positive"]
    generated = ["positive", "negative", "positive", "dunno", "", "positively", "negative"]
    labels = [1, 0, 0, 1, 0, 1, 1]
    result = score_texts(generated, labels, names)
    assert result["n"] == 7
    assert result["accuracy"] == pytest.approx(2 / 7)
    assert result["garbage"] == pytest.approx(3 / 7)
    assert result["confusion"] == [[1, 1, 1], [1, 1, 2]]  # rows: true; columns: negative, positive, garbage
    assert result["label_names"] == names


def test_confusion_table_sums_to_n():
    """Lost if it fails: examples are left out of the table or stand in it twice."""
    rng, names = random.Random(3), ["sport", "world news", "world"]
    labels = [rng.randrange(3) for _ in range(400)]
    generated = [rng.choice([*names, "what?", "World of sport"]) for _ in labels]
    result = score_texts(generated, labels, names)
    assert sum(map(sum, result["confusion"])) == result["n"] == 400
    assert [sum(row) for row in result["confusion"]] == [labels.count(i) for i in range(3)]
    first = [2 if text == "World of sport" else names.index(text) if text in names else None for text in generated]
    assert result["accuracy"] == sum(a == b for a, b in zip(first, labels)) / 400
    assert result["garbage"] == first.count(None) / 400


@pytest.mark.parametrize(
    "right, n, low, high",
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_interval_is_wilsons(right, n, low, high):
    """Lost if it fails: a difference within chance is reported as real, or a real one as chance."""
    result = score_texts(["a"] * right + ["b"] * (n - right), [0] * n, ["a", "b"])
    assert result["interval"] == pytest.approx([low, high], abs=5e-5)  # published values (Newcombe 1998 and others)
    for bound in result["interval"]:
        # The definition: the true shares from which the measured one is 1.96 standard errors away.
        error = math.sqrt(max(0, bound * (1 - bound)) / n)
        assert abs(right / n - bound) == pytest.approx(1.959964 * error, abs=1e-6)


@pytest.mark.parametrize("generated, labels", [([], []), (["a"], [0, 1]), (["a", "b"], [0])])
def test_accuracy_of_nothing_or_of_unequal_lists_is_refused(generated, labels):
    """Lost if it fails: texts are compared with the labels of other examples."""
    with pytest.raises(ValueError):
        score_texts(generated, labels, ["a", "b"])


# --- a model that writes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """transformers' GPT-2, tiny and random, and the directory that it is stored in. It ends some texts early."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        bias = torch.randn(32) * 0.3
        model.transformer.ln_f.bias.copy_(bias)
        model.transformer.wte.weight[END] = 1.2 * bias  # end-of-text is likely, so that it is met
    directory = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(directory)
    return model, str(directory)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """60 rows as a csv file: 48 for training, 6 for validation, 6 for testing."""
    rng, path = random.Random(2), tmp_path_factory.mktemp("films") / "films.csv"
    firsts = ["Film", "This film", "A film called"]  # nothing that all prompts share without a template's head
    texts = [f"{firsts[i % 3]} {i} was {'so very ' * rng.randrange(9)}dull" for i in range(60)]
    rows = [(text, ("bad", "good")[i % 2]) for i, text in enumerate(texts)]
    return write_csv(path, rows), dict(rows)


def name_splits(n):
    """Of 20 rows 16 for training, 2 for validation, 2 for testing."""
    return [{8: "validation", 9: "test"}.get(i // 2 % 10, "train") for i in range(n)]


ON_CPU = {"device": "cpu", "dtype": "float32"}


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as f:
        splits = name_splits(len(rows))
        csv.writer(f).writerows([("text", "label", "split"), *((*row, s) for row, s in zip(rows, splits))])
    return str(path)


@torch.no_grad()
def plain_greedy(model, prompt, n):
    """transformers' model, one prompt at a time, each token from the whole text: no cache, no padding."""
    ids, new = gpt2_encoding().encode(prompt), []
    while len(new) < n and END not in new:
        states = model.transformer(torch.tensor([ids + new])).last_hidden_state
        new.append(model.lm_head(states[0, -1]).argmax().item())
    return new


@pytest.mark.parametrize("template", [TEMPLATE, "{text} =>\n{label}"])
def test_generated_labels_equal_plain_generation(tiny, films, template):
    """Lost if it fails: the score is that of padding or of another prompt's cache, not of the model."""
    reference, directory = tiny
    settings = {"dataset": films[0], "template": template, "split": "train", "batch_size": 7, "max_new_tokens": 8}
    sampler = ModelSampler(init_from=directory, **ON_CPU, **settings)
    sampler.load_data()
    sampler.load_model()
    loader = sampler.loader
    assert bool(loader.prefixes["train"]) == (not template.startswith("{text}"))
    texts = sampler.answer_split()
    prompts = [template.format(text=ex.text, label="").rstrip(" ") for ex in loader.splits["train"]]
    expected = [plain_greedy(reference, prompt, 8) for prompt in prompts]
    # What makes the comparison worth something: rows that end early and rows that go on, and many texts.
    lengths = [len(new) for new in expected]
    assert lengths.count(8) > 5 and len(set(lengths)) > 4 and len(set(map(tuple, expected))) > 20
    assert texts == [gpt2_encoding().decode([t for t in new if t != END]) for new in expected]


# --- the command lines ---------------------------------------------------------------------------


def check_files(folder, rows_of_file, n):
    """accuracy.json and predictions.jsonl agree with each other and with the data; returns the first."""
    with open(os.path.join(folder, "accuracy.json"), encoding="utf-8") as f:
        result = json.load(f)
    with open(os.path.join(folder, "predictions.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == n == result["n"] == sum(map(sum, result["confusion"]))
    assert len({row["text"] for row in rows}) == n
    assert all(rows_of_file[row["text"]] == row["label"] for row in rows)
    assert result["accuracy"] == sum(row["predicted"] == row["label"] for row in rows) / n
    assert result["garbage"] == sum(row["predicted"] is None for row in rows) / n
    return result


def test_scoring_from_the_command_line(tiny, films, tmp_path):
    """Lost if it fails: `python generate.py` does not score the whole test split, or does not keep the answers."""
    flags = [f"--init_from={tiny[1]}", f"--dataset={films[0]}", f"--out_dir={tmp_path}"]
    out, _ = finish(start("generate.py", *flags, f"--template={TEMPLATE}", "--device=cpu", "--dtype=float32"))
    result = check_files(tmp_path / "untuned", films[1], 6)
    low, high = result["interval"]
    assert f"accuracy {100 * result['accuracy']:.2f} %" in out and f"{100 * low:.1f} to {100 * high:.1f}" in out
    assert "garbage" in out and "bad" in out and "good" in out


def test_free_text_from_the_command_line(tiny):
    """Lost if it fails: --start prints other text than the model's, or swallows the user's line break."""
    flags = [f"--init_from={tiny[1]}", "--start=Review: film 3\\nSentiment:", "--max_new_tokens=9"]
    out, _ = finish(start("generate.py", *flags, "--device=cpu", "--dtype=float32"))
    given = "Review: film 3\nSentiment:"
    new = [t for t in plain_greedy(tiny[0], given, 9) if t != END]
    assert out == given + gpt2_encoding().decode(new) + "\n"


def test_a_terminal_without_some_letters_shows_what_it_can(tiny, tmp_path):
    """Lost if it fails: on Windows one emoji in a review ends the scoring, and its files are lost."""
    rows = [(f"film {i} \U0001f600 ж", ("gut", "übel")[i % 2]) for i in range(40)]
    path = write_csv(tmp_path / "rows.csv", rows)
    flags = [f"--init_from={tiny[1]}", f"--dataset={path}", f"--out_dir={tmp_path}", f"--template={TEMPLATE}"]
    command = [sys.executable, "generate.py", *flags, "--device=cpu", "--dtype=float32"]
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, cwd=REPO, env=env, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode("cp1252")
    assert "übel" in out and "\\U0001f600 \\u0436" in out
    check_files(tmp_path / "untuned", dict(rows), 4)


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_takes_no_file_along(tiny, films, tmp_path, unbuffered):
    """Lost if it fails: `python generate.py ... | head -1` scores for an hour and leaves nothing behind."""
    path = write_csv(tmp_path / "rows.csv", [*films[1].items(), ("", "good")])  # a note comes before the score
    flags = [f"--init_from={tiny[1]}", f"--dataset={path}", f"--out_dir={tmp_path}", f"--template={TEMPLATE}"]
    command = [sys.executable, "generate.py", *flags, "--device=cpu", "--dtype=float32"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": REPO, "env": environment}
    with subprocess.Popen(command, **options) as process:
        process.stdout.close()  # before anything is written
        err = process.stderr.read().decode()
        assert process.wait(300) == 141, err  # 128 + SIGPIPE, as `yes | head -1` leaves in a shell
    assert "Traceback" not in err and "error" not in err
    check_files(tmp_path / "untuned", films[1], 6)


def test_a_wrong_data_set_shows_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    """Lost if it fails: a mistyped --dataset is told after a large model was read."""
    monkeypatch.setattr(generate, "open_model", None)  # not reached
    with pytest.raises(SystemExit) as stop:
        score(f"--init_from={tiny[1]}", "--dataset=gone.csv", f"--out_dir={tmp_path}")
    assert stop.value.code == 2 and "gone.csv" in capsys.readouterr().err


def score(*flags):
    argv = [f"--template={TEMPLATE}", *flags, "--device=cpu", "--dtype=float32"]
    generate.main(configure(argv, trains=False))


def test_a_tuned_run_is_scored_with_its_own_config(tiny, films, tmp_path):
    """Lost if it fails: after training, the scored model, data or template are not the run's."""
    data = {"dataset": films[0], "label_names": None, "template": "{text} Good or bad? {label}"}
    config = Config(init_from="gone", rank=0, max_iters=1, **data)
    tiny[0].save_pretrained(tmp_path)  # what train.py writes with rank=0
    (tmp_path / "train_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    argv = ["--init_from=resume", f"--out_dir={tmp_path}", "--split=train", "--device=cpu", "--dtype=float32"]
    generate.main(configure(argv, trains=False))
    result = check_files(tmp_path, films[1], 48)
    assert (result["tuned"], result["split"], result["dataset"]) == (True, "train", films[0])
    with open(tmp_path / "predictions.jsonl", encoding="utf-8") as f:
        row = json.loads(f.readline())
    new = plain_greedy(tiny[0], row["text"] + " Good or bad?", 5)
    assert row["generated"] == gpt2_encoding().decode([t for t in new if t != END])


def test_long_labels_fit_beside_texts_that_fill_the_context(tiny, tmp_path):
    """Lost if it fails: with label words of many tokens, one long review ends the scoring with a traceback."""
    names = ("fine", "a rather longer answer of many more words than five tokens hold")
    rows = [(f"film {i} " + "so very " * (i % 3 * 40), names[i % 2]) for i in range(40)]
    path = write_csv(tmp_path / "rows.csv", rows)
    score(f"--init_from={tiny[1]}", f"--dataset={path}", f"--out_dir={tmp_path}", "--split=train")
    with open(tmp_path / "untuned" / "predictions.jsonl", encoding="utf-8") as f:
        assert len(f.readlines()) == 32


def test_half_an_emoji_in_a_review_is_scored_like_any_text(tiny, tmp_path):
    """Lost if it fails: one text that some tool cut inside an emoji ends the scoring before anything is written."""
    rows = [{"text": f"film {i} \ud83d", "label": ("bad", "good")[i % 2]} for i in range(20)]
    rows = [row | {"split": split} for row, split in zip(rows, name_splits(20))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(f"--init_from={tiny[1]}", f"--dataset={path}", f"--out_dir={tmp_path}", "--split=train")
    with open(tmp_path / "untuned" / "predictions.jsonl", encoding="utf-8") as f:
        assert [json.loads(line)["label"] in ("bad", "good") for line in f] == [True] * 16


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init_from=no-such-model"], ["init_from=no-such-model", "gpt2-mini"]),
        (["--max_new_tokens=33"], ["max_new_tokens=33", "32"]),
        (["--dataset=no-such.csv"], ["no-such.csv"]),
        (["--text_field=review"], ["text_field=review", "text, label"]),
    ],
)
def test_a_mistake_is_one_line(tiny, films, tmp_path, capsys, flags, words):
    """Lost if it fails: a mistake in scoring prints a traceback instead of what to type."""
    with pytest.raises(SystemExit) as e:
        score(f"--init_from={tiny[1]}", f"--dataset={films[0]}", f"--out_dir={tmp_path}", *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert os.listdir(tmp_path) == []


# --- in a program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tiny, films, tmp_path_factory):
    """A run's folder with a tiny adapter that says something, as train.py leaves it, and the adapter's model."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(3)
    model = GPT.from_pretrained(tiny[1], lora_rank=4, lora_alpha=8.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, str(folder), tiny[1])
    config = Config(init_from=tiny[1], rank=4, alpha=8.0, dataset=films[0], label_names=None, template=TEMPLATE)
    (folder / "train_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return str(folder), model.eval()


def test_model_sampler_scores_as_the_command_line_does(tuned, films):
    """Lost if it fails: the accuracy in a notebook is not the one that generate.py prints for the same run."""
    folder, _ = tuned
    sampler = ModelSampler(folder, split="train", **ON_CPU)
    accuracy = sampler.get_accuracy()
    assert not os.path.exists(os.path.join(folder, "accuracy.json"))  # a program's call writes nothing
    argv = ["--init_from=resume", f"--out_dir={folder}", "--split=train", "--device=cpu", "--dtype=float32"]
    generate.main(configure(argv, trains=False))
    result = check_files(folder, films[1], 48)
    assert result.items() >= sampler.result.items() and accuracy == result["accuracy"]
    with open(os.path.join(folder, "predictions.jsonl"), encoding="utf-8") as f:
        assert [json.loads(line)["generated"] for line in f] == sampler.generated


def test_get_accuracy_is_the_share_that_was_right(tuned, films, monkeypatch):
    """Lost if it fails: garbage is left out of the accuracy, or a label is compared with another example's."""
    sampler = ModelSampler(tuned[0], split="train", **ON_CPU)
    # A run has room for labels: what stands here is what a model might write after each text in turn.
    words = [" good", " bad", " good, not bad", " goods", "", " BAD!", "." * ANSWER_CHARS + " good"]
    answers = [words[i % 7] for i in range(48)]
    monkeypatch.setattr(sampler, "answer_split", lambda: answers)
    accuracy = sampler.get_accuracy()
    seen = ["good", "bad", "good", None, None, "bad", None]
    true = [films[1][ex.text] for ex in sampler.loader.splits["train"]]
    assert accuracy == sum(seen[i % 7] == label for i, label in enumerate(true)) / 48
    assert sampler.result["garbage"] == sum(seen[i % 7] is None for i in range(48)) / 48


def test_model_sampler_writes_what_the_tuned_model_writes(tuned, tmp_path):
    """Lost if it fails: a notebook's sampler answers with the base model, or needs the data set only to write."""
    folder, model = tuned
    prompt = "Review: film 3\nSentiment:"
    ids = gpt2_encoding().encode(prompt)
    new = []
    for _ in range(9):  # each token from the whole text, by the model that was saved
        new.append(model(torch.tensor([ids + new]))[0].argmax().item())
    expected = gpt2_encoding().decode(new[: new.index(END)] if END in new else new)
    sampler = ModelSampler(folder, dataset="gone.csv", max_new_tokens=9, temperature=0, **ON_CPU)
    assert sampler.generate(prompt) == expected
    base = ModelSampler(str(tmp_path), init_from=sampler.config.init_from, max_new_tokens=9, **ON_CPU)
    assert base.generate(prompt) != expected and os.listdir(tmp_path) == []
    drawn = [ModelSampler(folder, temperature=1.0, top_k=200, **ON_CPU).generate(prompt) for _ in range(2)]
    assert drawn[0] == drawn[1]  # the same seed


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_tokens": 5}, ["max_tokens", "max_new_tokens"]),
        ({"rank": 8}, ["rank=8", "rank=4"]),
        ({"init_from": "no-such-model"}, ["no-such-model", "gpt2-mini"]),
        ({"out_dir": "no-such-run"}, ["no-such-run"]),
    ],
)
def test_a_mistake_in_a_program_is_an_error_of_one_line(tuned, settings, words):
    """Lost if it fails: a mistyped keyword is passed over, or the error comes from deep within."""
    with pytest.raises((ValueError, OSError)) as e:
        ModelSampler(**{"out_dir": tuned[0]} | settings | ON_CPU)
    assert [word for word in words if word not in str(e.value)] == [] and "\n" not in str(e.value)


def test_another_seed_scores_the_runs_own_test_split(place):
    """Lost if it fails: a run on a file without splits, scored with another --seed, is praised for rows that it was
    trained on."""
    write_reviews(place / "one" / "rows.csv", 80)
    here(flags(place, "drawn", dataset=place / "one" / "rows.csv", max_iters=1, eval_interval=1, seed=5))
    run = str(place / "drawn")
    trained = make_loader(make_config(init_from="resume", out_dir=run), 128, wanted=("train",))
    scored = ModelSampler(run, seed=7)
    scored.load_data()
    found = {"train": trained.splits["train"], "test": scored.loader.splits["test"]}
    rows = CustomDataLoader(str(place / "one" / "rows.csv"), wanted=("train", "test"), seed=5)
    for split, examples in found.items():
        assert [ex.text for ex in examples] == [ex.text for ex in rows.splits[split]]
    assert scored.config.seed == 7  # of what is written
