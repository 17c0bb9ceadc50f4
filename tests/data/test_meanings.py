"""What a label, a split and a file's name mean: nothing is taken for something else, what is passed over is named.

The references are plain tables of (text, word), and files that pandas, pyarrow, datasets and openpyxl write.

python -m pytest tests/data/test_meanings.py
"""

import gzip
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import base_folder, finish, start
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wild_data import COMMON, load, pairs, refusal, some_rows, write_csv, write_jsonl

import generate
from configurator import configure, make_config
from dataloader import CustomDataLoader
from generate import ModelSampler
from plumbing.data import readers, token_cache
from plumbing.program.stored_run import RUN_CONFIG
from train import train

ALL = ("train", "validation", "test")


def with_names(rows, names):
    """A data set of the library with its words for the labels."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    numbered = [row | {"label": names.index(row["label"]) if row["label"] else -1} for row in rows]
    return datasets.Dataset.from_list(numbered, features=features)


def rows_of(split, words, n=40):
    return [{"text": f"{split} {i}", "label": words[i % len(words)]} for i in range(n)]


def write_files(folder, kind, parts):
    """Each file of {name: (rows, names)}: parquet or Arrow with those names, or one directory of save_to_disk."""
    folder.mkdir(exist_ok=True)
    made = {name: with_names(*part) for name, part in parts.items()}
    if kind == "parquet":
        for name, data in made.items():
            data.to_parquet(folder / f"{name}.parquet")
    elif kind == "arrow.gz":
        for name, data in made.items():
            data.save_to_disk(folder.parent / "saved" / name)
            found = next((folder.parent / "saved" / name).glob("*.arrow"))
            (folder / f"{name}.arrow.gz").write_bytes(gzip.compress(found.read_bytes()))
    else:
        for name, data in made.items():
            data.save_to_disk(folder / name)
        splits = [*made]
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def words_of(loader):
    return {ex.text: loader.label_names[ex.label] for split in loader.splits.values() for ex in split}


def plain_words(*tables):
    return {row["text"]: row["label"] for rows in tables for row in rows}


# --- each file's own words -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow.gz", "save_to_disk"])
@pytest.mark.parametrize("order", [["terrible", "great"], ["great", "terrible"]])
def test_numbers_are_those_of_their_own_file(tmp_path, kind, order):
    """Lost if it fails: a test file that numbers its labels the other way round is scored 0.00 %."""
    parts = {split: rows_of(split, ("great", "terrible")) for split in ALL}
    orders = {"train": order, "validation": order[::-1], "test": order[::-1]}
    folder = write_files(tmp_path / "data", kind, {split: (parts[split], orders[split]) for split in ALL})
    loader = load(folder)
    assert loader.label_names == order and words_of(loader) == plain_words(*parts.values())
    # Typed words rename those of the train file, in order.
    renamed = load(folder, label_names="x,y")
    new = dict(zip(order, ("x", "y")))
    assert words_of(renamed) == {text: new[word] for text, word in plain_words(*parts.values()).items()}
    assert load(folder, label_names=",".join(order[::-1])).label_names == order[::-1]  # the same words: an order
    assert words_of(load(folder, label_names=",".join(order[::-1]))) == plain_words(*parts.values())


def test_parts_of_one_split_number_their_labels_each(tmp_path):
    """Lost if it fails: the second part of the training data is trained with all labels swapped."""
    parts = {f"train-0000{i}-of-00002": rows_of(f"train{i}", ("bad", "good")) for i in (0, 1)}
    names = iter((["bad", "good"], ["good", "bad"]))
    folder = write_files(tmp_path / "data", "parquet", {name: (rows, next(names)) for name, rows in parts.items()})
    assert words_of(load(folder)) == plain_words(*parts.values())


def test_a_file_without_words_has_the_train_files_numbers(tmp_path):
    """Lost if it fails: a csv next to parquet files cannot be used, or its labels are taken for others."""
    train_rows, test_rows = rows_of("train", ("great", "terrible")), rows_of("test", ("great", "terrible"))
    folder = write_files(tmp_path / "data", "parquet", {"train": (train_rows, ["terrible", "great"])})
    write_csv(folder / "test.csv", [row | {"label": int(row["label"] == "great")} for row in test_rows])
    assert words_of(load(folder)) == plain_words(train_rows, test_rows)


def test_words_that_are_numbers_stay_words(tmp_path):
    """Lost if it fails: stars of 1 to 5 in train.parquet, whose numbers there are 0 to 4, are one off in test.csv."""
    stars = ["1", "2", "3"]
    test = rows_of("test", ("2", "1"))
    write_files(tmp_path, "parquet", {"train": (rows_of("train", stars), stars)})
    write_csv(tmp_path / "test.csv", test)
    loader = CustomDataLoader(str(tmp_path), wanted=("test",))
    assert words_of(loader) == plain_words(test)
    write_csv(tmp_path / "test.csv", rows_of("test", ("0", "1")))
    assert "the label '0'" in refusal(tmp_path)
    # So are those of pairs, never the numbers 0, 1, 2 that stand for these words.
    words = load(tmp_path / "train.parquet", label_names="1=one,2=two,3=three")
    assert words_of(words)["train 0"] == "one"
    assert "the label '3'" in refusal(tmp_path / "train.parquet", label_names="0=one,1=two,2=three")


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_a_word_that_train_does_not_have_is_an_error(tmp_path, kind):
    """Lost if it fails: a third class of the test file is scored as one of two others."""
    parts = {"train": (rows_of("train", ("bad", "good")), ["bad", "good"])}
    parts["test"] = (rows_of("test", ("good", "fair")), ["fair", "good"])
    told = refusal(write_files(tmp_path / "data", kind, parts))
    assert "'fair'" in told and "row 2" in told and "bad,good" in told and "test" in told
    assert "2 words" in refusal(tmp_path / "data", label_names="x,y,z") or "3 words" in refusal(
        tmp_path / "data", label_names="x,y,z"
    )


def test_a_word_of_the_data_is_no_other_label_of_it(tmp_path):
    """Lost if it fails: of two words that are typed, one is mistyped: all labels are swapped."""
    write_files(tmp_path, "parquet", {"train": (rows_of("train", ("bad", "good")), ["bad", "good"])})
    message = refusal(tmp_path, label_names="good,badd")
    assert "good is what" in message and "--label_names=bad=bad,good=good" in message
    assert words_of(load(tmp_path, label_names="bad=good,good=superb"))["train 0"] == "good"


def test_words_that_are_written_for_others_are_told(tmp_path, capsys):
    """Lost if it fails: a file notes 0 = positive, and the config writes it as `terrible` without a word."""
    rows = rows_of("train", ("positive", "negative"), 60)
    path = tmp_path / "rows.parquet"
    with_names(rows, ["positive", "negative"]).to_parquet(path)
    for _ in range(2):  # the second time from the cache
        load(path, label_names="terrible,great")
        out = capsys.readouterr().out
        assert "negative is written as great, positive is written as terrible" in out
    expected = {row["text"]: {"positive": "a", "negative": "b"}[row["label"]] for row in rows}
    for names in ("0=a,1=b", "negative=b,positive=a"):
        assert words_of(load(path, label_names=names)) == expected
    capsys.readouterr()
    load(path, label_names="Negative,Positive")
    load(path)
    assert "written" not in capsys.readouterr().out


# --- numbers and their words ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv.gz"])
@pytest.mark.parametrize(
    "numbers, names, expected",
    [
        ([0, 1, 2], "one,two,three", ["one", "two", "three"]),
        ([1, 2, 3], "one,two,three", ["one", "two", "three"]),
        ([2, 3], "one,two,three", ["two", "three"]),
        ([0, 2], "one,two,three", ["one", "three"]),
        ([-1, 0, 1], "bad,so so,good", ["bad", "so so", "good"]),
        ([2, 4], "bad,good", ["bad", "good"]),
        ([1, 2], "1=two,2=three,0=one", ["two", "three"]),
        ([1, 2, 4, 5], "1=bad,2=bad,4=good,5=good", ["bad", "bad", "good", "good"]),
        ([1.0, 2.0], "one,two", ["one", "two"]),
        ([1, 2], "1,2,3", ["1", "2"]),
    ],
)
def test_numbers_keep_their_words(tmp_path, kind, numbers, names, expected):
    """Lost if it fails: each star is taught the word of the next one."""
    rows = [{"text": f"film {i}", "label": numbers[i % len(numbers)]} for i in range(80)]
    path = str(tmp_path / f"rows.{kind}")
    plain = {"csv": write_csv, "jsonl": write_jsonl}[kind.removesuffix(".gz")](path.removesuffix(".gz"), rows)
    if kind.endswith(".gz"):
        (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert words_of(load(path, label_names=names)) == {
        row["text"]: expected[i % len(numbers)] for i, row in enumerate(rows)
    }


@pytest.mark.parametrize(
    "numbers, names, told",
    [
        ([1, 2], "one,two,three", ["1=two,2=three", "1=one,2=two"]),
        ([1, 2, 3, 4], "awful,weak,fair,good,superb", ["1=weak", "1=awful", "4=good", "4=superb"]),
        ([1], "bad,good", ["1=bad", "1=good"]),
        ([0, 1, 2], "one,two", ["label 2", "0, 1, 2"]),
        ([0, 3], "one,two,three", ["label 3", "0, 3"]),
        ([1, 5], "one,two,three", ["label 5", "1, 5"]),
        ([1, 2, 3], "1=one,2=two", ["'3'", "add it to label_names"]),
    ],
)
def test_numbers_whose_words_are_not_sure_are_one_line(tmp_path, numbers, names, told):
    """Lost if it fails: one of two ways of counting is taken without a word."""
    rows = [{"text": f"film {i}", "label": numbers[i % len(numbers)]} for i in range(80)]
    path = write_csv(tmp_path / "rows.csv", rows)
    message = refusal(path, label_names=names)
    assert [words for words in told if words not in message] == [], message
    for typed in re.findall(r"--label_names=(\S+=\S+)", message):  # what it says to type is read
        load(path, label_names=typed.rstrip(".,"))


def test_words_that_are_numbers_are_not_the_numbers_of_classes(tmp_path):
    """Lost if it fails: a run that learned 1 for neg and 0 for pos takes neg, the data's class 0, for its own 0."""
    rows = rows_of("train", ("neg", "pos"), 60)
    with_names(rows, ["neg", "pos"]).to_parquet(tmp_path / "a.parquet")
    told = refusal(tmp_path / "a.parquet", learned=["1", "0"])
    assert "the label 'neg'" in told and "the run has learned 1,0" in told


def test_a_word_that_is_typed_goes_before_a_number(tmp_path):
    """Lost if it fails: of a word and its number, typed with two words, the number decides for later files."""
    rows = rows_of("train", ("neg", "pos"), 60)
    with_names(rows, ["neg", "pos"]).to_parquet(tmp_path / "a.parquet")
    loader = load(tmp_path / "a.parquet", label_names="neg=bad,0=good,pos=good")
    assert loader.word_of["0"] == "bad" and words_of(loader)["train 0"] == "bad"


# --- a run's own classes -------------------------------------------------------------------------


def learned_by(loader, **changes):
    return {"learned": loader.label_names, "word_of": loader.word_of} | changes


@pytest.mark.parametrize("classify", [False, True])
def test_a_run_keeps_what_its_data_calls_the_labels(tmp_path, classify):
    """Lost if it fails: a run on stars from 1 to 5, scored on a file of 1 to 4, is wrong in every row."""
    stars = [{"text": f"film {i}", "label": 1 + i % 5} for i in range(100)]
    names = "awful,weak,fair,good,superb"
    first = load(write_csv(tmp_path / "stars.csv", stars), label_names=names, classify=classify)
    assert json.loads(json.dumps(first.word_of)) == dict(zip("12345", names.split(",")))
    for some in ([1, 2, 3, 4], [2, 3], [5], [1.0, 2.0]):
        rows = [{"text": f"film {i}", "label": some[i % len(some)]} for i in range(60)]
        for write, name in ((write_csv, "more.csv"), (write_jsonl, "more.jsonl")):
            path = write(tmp_path / name, rows)
            loader = load(path, label_names=names, classify=classify, **learned_by(first))
            assert loader.label_names == first.label_names and loader.word_of == first.word_of
            assert words_of(loader) == {row["text"]: names.split(",")[int(row["label"]) - 1] for row in rows}
    path = write_csv(tmp_path / "more.csv", [{"text": f"film {i}", "label": i % 5} for i in range(60)])
    told = refusal(path, label_names=names, classify=classify, **learned_by(first))
    assert "'0'" in told and names in told and "line 2" in told


@pytest.mark.parametrize("classify", [False, True])
@pytest.mark.parametrize("keeps_words", [True, False])  # a run that was made before has no word_of
def test_the_learned_order_stands(tmp_path, classify, keeps_words):
    """Lost if it fails: typed words in another order turn every answer round, or a part of the classes is refused."""
    first = load(write_csv(tmp_path / "a.csv", some_rows(90, ("bad", "fine", "good"))), classify=classify)
    known = learned_by(first) if keeps_words else learned_by(first, word_of=None)
    for words in (("fine", "good"), ("Good", "bad"), ("good",)):
        rows = some_rows(60, words)
        path = write_csv(tmp_path / "b.csv", rows)
        for names in (None, "good,bad,fine"):
            loader = load(path, classify=classify, label_names=names, **known)
            assert loader.label_names == ["bad", "fine", "good"]
            assert words_of(loader) == {row["text"]: row["label"].lower() for row in rows}
    told = refusal(write_csv(tmp_path / "c.csv", some_rows(60, ("approve", "reject"))), classify=classify, **known)
    assert "'approve'" in told and "bad,fine,good" in told and "--label_names=approve=" in told
    known["word_of"] = None  # what is typed says what other data mean
    rows = some_rows(60, ("approve", "reject"))
    loader = load(tmp_path / "c.csv", classify=classify, label_names="approve=good,reject=bad", **known)
    assert words_of(loader) == {r["text"]: {"approve": "good", "reject": "bad"}[r["label"]] for r in rows}
    told = refusal(tmp_path / "c.csv", classify=classify, label_names="approve,reject", **known)
    assert "approve" in told and "bad,fine,good" in told
    # Numbers, by the words that are typed for them.
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(60)]
    loader = load(write_csv(tmp_path / "d.csv", rows), classify=classify, label_names="good,bad", **known)
    assert words_of(loader) == {row["text"]: ("good", "bad")[row["label"]] for row in rows}
    assert loader.label_names == ["bad", "fine", "good"]


def test_a_run_on_words_of_the_data_reads_files_that_number_them(tmp_path, capsys):
    """Lost if it fails: a run on the hub's neg and pos cannot be scored on a file of 0 and 1, or of pos and neg."""
    rows = rows_of("train", ("neg", "pos"), 60)
    with_names(rows, ["neg", "pos"]).to_parquet(tmp_path / "a.parquet")
    first = load(tmp_path / "a.parquet", label_names="negative,positive")
    expected = {row["text"]: {"neg": "negative", "pos": "positive"}[row["label"]] for row in rows}
    assert words_of(first) == expected
    with_names(rows, ["pos", "neg"]).to_parquet(tmp_path / "b.parquet")
    write_csv(tmp_path / "c.csv", rows)
    write_csv(tmp_path / "d.csv", [row | {"label": int(row["label"] == "pos")} for row in rows])
    for name in ("b.parquet", "c.csv", "d.csv"):
        loader = load(tmp_path / name, label_names="negative,positive", **learned_by(first))
        assert words_of(loader) == expected and loader.label_names == ["negative", "positive"]
    # By pairs, in another order than that of the numbers.
    typed = {"label_names": "pos=positive,neg=negative"}
    paired = load(tmp_path / "a.parquet", **typed)
    for name in ("b.parquet", "c.csv", "d.csv"):
        assert words_of(load(tmp_path / name, **typed, **learned_by(paired))) == expected
    # Where nothing but the order of label_names tells what the numbers are, a note says what is made of them.
    capsys.readouterr()
    counted = load(tmp_path / "c.csv", label_names="pos,neg")
    loader = load(tmp_path / "d.csv", label_names="pos,neg", **learned_by(counted))
    assert words_of(loader) == {row["text"]: "neg" if row["label"] == "pos" else "pos" for row in rows}
    assert "these are numbers: by label_names 0 is pos, 1 is neg\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the label '(0|1)'"):
        load(tmp_path / "d.csv", **typed, **learned_by(load(tmp_path / "c.csv", **typed)))


def run_on(folder, out, task, data, *flags):
    settings = {"init_from": folder / "base", "out_dir": folder / out, "dataset": data, "task": task, "rank": 0}
    settings |= {"template": "{text} {label}", "lr": 0.01, "max_iters": 40, "eval_interval": 40}
    settings |= {"batch_size": 16, "device": "cpu", "dtype": "float32"}
    train(configure([f"--{key}={value}" for key, value in settings.items()] + list(flags)))
    return str(folder / out)


def score(out, *flags):
    argv = ["--init_from=resume", f"--out_dir={out}", "--device=cpu", "--dtype=float32", *map(str, flags)]
    generate.main(configure(argv, trains=False))
    with open(os.path.join(out, "accuracy.json")) as f:
        return json.load(f)


@pytest.mark.parametrize("task", ["instruct", "classify"])
def test_a_run_is_scored_on_other_files_by_its_own_words(tmp_path_factory, task, capsys):
    """Lost if it fails: a clean table of 0.00 %, an IndexError, or answers turned round, for a run that is right."""
    folder = base_folder(tmp_path_factory, task)
    words = {1: "prize", 2: "minister", 3: "lunch"}
    rows = [{"text": f"{i} about {words[1 + i % 3]}", "label": 1 + i % 3} for i in range(60)]
    write_csv(folder / "stars.csv", [row | {"split": "train" if i < 45 else "val"} for i, row in enumerate(rows)])
    names = "--label_names=bad,fine,good"
    out = run_on(folder, "out", task, folder / "stars.csv", names)
    stored = json.loads((folder / "out" / RUN_CONFIG).read_text())["facts"]
    assert stored["word_of"] == {"1": "bad", "2": "fine", "3": "good"}
    assert stored["label_names"] == ["bad", "fine", "good"]
    right = [{"text": row["text"], "label": {1: "bad", 2: "fine", 3: "good"}[row["label"]]} for row in rows]
    write_csv(folder / "two.csv", [r | {"split": "test"} for r in rows if r["label"] != 3])
    write_csv(folder / "one.csv", [r | {"split": "test"} for r in right if r["label"] == "good"])
    other = [r | {"split": "test", "label": {"bad": "no", "fine": "so", "good": "yes"}[r["label"]]} for r in right]
    write_csv(folder / "other.csv", other)
    accuracies = []
    for name, flags in (
        ("two.csv", []),
        ("one.csv", []),
        ("one.csv", ["--label_names=good,bad,fine"]),
        ("other.csv", ["--label_names=yes=good,no=bad,so=fine"]),
    ):
        result = score(out, f"--dataset={folder / name}", *flags)
        assert result["label_names"] == ["bad", "fine", "good"]
        accuracies.append(result["accuracy"])
    assert min(accuracies) > 0.6, accuracies
    for flags in ([f"--dataset={folder / 'other.csv'}"], ["--label_names=no,yes", f"--dataset={folder / 'two.csv'}"]):
        with pytest.raises(SystemExit) as stop:
            capsys.readouterr()
            score(out, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "no" in err and "bad,fine,good" in err
    # New texts: the learned order stands there too.
    texts = [row["text"] for row in right]
    answers = ModelSampler(out, device="cpu", dtype="float32").predict(texts)
    typed = ModelSampler(out, device="cpu", dtype="float32", label_names="good,fine,bad").predict(texts)
    assert [a["predicted"] for a in typed] == [a["predicted"] for a in answers]
    assert np.mean([a["predicted"] == row["label"] for a, row in zip(answers, right)]) > 0.6
    with pytest.raises(ValueError, match="approve"):
        ModelSampler(out, device="cpu", label_names="approve,reject").predict(texts)
    # It goes on with the same classes, and a run that was made before, without these facts, is read as it was.
    train(configure(["--init_from=resume", f"--out_dir={out}", "--max_iters=41"]))
    assert make_config(init_from="resume", out_dir=out).facts.word_of == stored["word_of"]
    stored = json.loads((folder / "out" / RUN_CONFIG).read_text())
    del stored["facts"]["word_of"], stored["sha256"]
    (folder / "out" / RUN_CONFIG).write_text(json.dumps(stored))
    assert make_config(init_from="resume", out_dir=out).facts.word_of is None
    assert score(out, "--split=validation")["accuracy"] > 0.6


# --- which files, which rows ---------------------------------------------------------------------


def test_one_line_says_which_files_make_each_split(tmp_path, capsys):
    """Lost if it fails: eval.csv or holdout.csv lies in the folder, and nobody knows that it is not read."""
    for name, n in (("train", 40), ("eval", 12), ("holdout", 9)):
        write_csv(tmp_path / f"{name}.csv", [row | {"text": f"{name} {row['text']}"} for row in some_rows(n)])
    (tmp_path / "README.md").write_text("no data")
    for _ in range(2):  # the second time from the cache
        loader = CustomDataLoader(str(tmp_path))
        assert len(loader.splits["validation"]) == 12 and "validation" not in loader.drawn
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data: ")]
        counted = re.findall(r"(\w+) (\d+) rows (of|drawn from) train.csv", line)
        assert [name for name, _, how in counted if how == "drawn from"] == ["train", "test"]
        assert sum(int(n) for _, n, _ in counted) == 40 and "validation 12 rows of eval.csv" in line
        assert line.endswith("; not read: holdout.csv")
    # What lies there in a way that is not read, or has no row.
    (tmp_path / "test.csv").write_text("text,label\n")
    (tmp_path / "test.csv.zip").write_bytes(b"PK")
    (tmp_path / "train").mkdir()
    CustomDataLoader(str(tmp_path))
    assert "not read: holdout.csv, test.csv.zip, train, test.csv (no row in it)\n" in capsys.readouterr().out
    path = write_csv(tmp_path / "other.csv", some_rows(1200))
    loader = load(path)
    line = capsys.readouterr().out
    for split, examples in loader.splits.items():
        assert f"{split} {len(examples):,} rows drawn from other.csv" in line


def test_splits_of_a_saved_data_set_that_are_not_read_are_named(tmp_path, capsys):
    """Lost if it fails: half of a data set lies in a split that nobody reads or names."""
    made = {
        split: with_names(rows_of(split, ("bad", "good")), ["bad", "good"]) for split in ("train", "unsupervised")
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "data")
    load(tmp_path / "data")
    assert "not read: the split unsupervised" in capsys.readouterr().out
    datasets.DatasetDict(Train=made["train"], TEST=made["unsupervised"]).save_to_disk(tmp_path / "capitals")
    assert len(CustomDataLoader(str(tmp_path / "capitals"), wanted=("test",)).splits["test"]) == 40
    datasets.DatasetDict(train=made["train"], dev=made["train"], val=made["train"]).save_to_disk(tmp_path / "twice")
    assert "val and dev are two names for one split" in refusal(tmp_path / "twice")


@pytest.mark.parametrize(
    "first, second",
    [
        ("train.csv", "train_small.csv"),
        ("val.csv", "eval.csv"),
        ("test.csv", "test-1.csv"),
        ("train-v1.csv", "train-v2.csv"),
        ("test-00000-of-00001.csv", "test-00000-of-00002.csv"),
        ("test-1.csv", "test_1.csv"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_two_files_of_one_split_are_numbered_parts_or_told(tmp_path, first, second, packed):
    """Lost if it fails: train_small.csv, cut from train.csv, is read too, and its rows count twice."""
    for name in ("train.csv", first, second):
        path = tmp_path / name
        write_csv(path, some_rows(60))
        if packed:
            (tmp_path / (name + packed)).write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    message = refusal(tmp_path)
    assert str(tmp_path / first) + packed in message and str(tmp_path / second) + packed in message


@pytest.mark.parametrize("names", [("train-00000-of-00002", "train-00001-of-00002"), ("train_1", "train_2")])
@pytest.mark.parametrize("last", ["", "-0123456789abcdef"])
def test_numbered_parts_are_one_split(tmp_path, names, last):
    """Lost if it fails: a data set in parts, as the hub keeps it, cannot be read."""
    tables = [[row | {"text": name + row["text"]} for row in some_rows(30)] for name in names]
    for name, rows in zip(names, tables):
        write_jsonl(tmp_path / f"{name}{last}.jsonl", rows)
    assert pairs(load(tmp_path)) == sorted((row["text"], row["label"]) for rows in tables for row in rows)


@pytest.mark.parametrize("column", ["Split", "SPLIT", " split "])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "xlsx"])
def test_the_column_split_in_any_capitals(tmp_path, column, kind):
    """Lost if it fails: a file that marks its test rows in a column `Split` has them trained on."""
    rows = [row | {column: ("Train", "dev", "eval", "Test")[i % 4]} for i, row in enumerate(some_rows(60))]
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "jsonl"):
        {"csv": write_csv, "jsonl": write_jsonl}[kind](path, rows)
    else:
        frame = pd.DataFrame(rows)
        frame.to_parquet(path) if kind == "parquet" else frame.to_excel(path, index=False)
    loader = load(path)
    assert not loader.drawn
    assert [ex.text for ex in loader.splits["train"]] == [row["text"] for row in rows[::4]]
    assert len(loader.splits["validation"]) == 30 and len(loader.splits["test"]) == 15
    twice = [row | {"split": "train", "Split": "test"} for row in some_rows(60)]
    assert "split stands 2 times" in refusal(write_csv(tmp_path / "twice.csv", twice))
    assert "line 1: the column split stands 2 times" in refusal(write_jsonl(tmp_path / "twice.jsonl", twice))


def test_a_column_split_in_a_file_that_is_named_after_its_split_is_named(tmp_path, capsys):
    """Lost if it fails: train.csv has rows that say `test`, and they are trained on without a word."""
    write_csv(tmp_path / "train.csv", [row | {"split": "test"} for row in some_rows(60)])
    load(tmp_path)
    assert "not read: the column split of train.csv" in capsys.readouterr().out


@pytest.mark.parametrize("as_column", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_texts_of_test_that_stand_in_train_are_counted(tmp_path, capsys, as_column, kind):
    """Lost if it fails: a score is earned by rows that were trained on, and nobody is told."""
    parts = {split: rows_of(split, ("bad", "good")) for split in ALL}
    parts["test"][3]["text"] = parts["test"][7]["text"] = parts["train"][5]["text"]
    parts["validation"][2]["text"] = parts["train"][9]["text"]

    def write(path, rows):
        if kind == "parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), f"{path}.parquet")
        else:
            {"csv": write_csv, "jsonl": write_jsonl}[kind](f"{path}.{kind}", rows)

    if as_column:
        write(tmp_path / "rows", [row | {"split": split} for split in ALL for row in parts[split]])
    else:
        for split in ALL:
            write(tmp_path / split, parts[split])
    for _ in range(2):
        load(tmp_path)
        out = capsys.readouterr().out
        assert "note: the texts of 2 of 40 test rows also appear in train\n" in out
        assert "note: the texts of 1 of 40 validation rows also appear in train\n" in out


def test_labels_that_train_does_not_have_are_told(tmp_path, capsys):
    """Lost if it fails: a model learns one class, and half of the test rows cannot be right."""
    write_csv(tmp_path / "train.csv", some_rows(60, ("good",)))
    write_csv(tmp_path / "test.csv", some_rows(60, ("good", "bad")))
    load(tmp_path)
    assert "note: test has labels that no row of train has: bad (30 rows)\n" in capsys.readouterr().out
    load(tmp_path / "train.csv", label_names="bad,good")
    assert "note: all rows of train have one label: good\n" in capsys.readouterr().out
    load(tmp_path / "train.csv", learned=["bad", "good"])  # to be scored
    assert "note" not in capsys.readouterr().out


# --- files that say something wrong of themselves ------------------------------------------------


def test_an_excel_file_that_is_wrong_about_its_size(tmp_path):
    """Lost if it fails: 100 rows of 300 are read, without a word."""
    pytest.importorskip("openpyxl", reason="pip install openpyxl")
    rows = some_rows(300)
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_excel(buffer, index=False)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "rows.xlsx", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("sheet1.xml"):
                data, n = re.subn(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:B101"', data)
                assert n == 1
            new.writestr(name, data)
    assert pairs(load(tmp_path / "rows.xlsx")) == sorted((row["text"], row["label"]) for row in rows)


def test_excels_first_line_names_the_separator(tmp_path):
    """Lost if it fails: a csv that Excel reads is refused, since it has the column "sep="."""
    rows = [{"text": f"film {i}; dull, long", "label": ("bad", "good")[i % 2]} for i in range(60)]
    text = Path(write_csv(tmp_path / "plain.csv", rows, ";")).read_bytes()
    for end in (b"\n", b"\r\n"):
        (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfsep=;" + end + text)
        assert pairs(load(tmp_path / "rows.csv")) == sorted((row["text"], row["label"]) for row in rows)
    (tmp_path / "rows.csv").write_bytes(b"sep=;\r\n" + text + b"one field\r\n")
    assert "rows.csv, line 63: 1 fields" in refusal(tmp_path / "rows.csv")


# --- by Arrow, and by the strict reader ----------------------------------------------------------

RAW_LINES = (
    "a,b\n",
    '"a"b,c\n',
    '"a","b"\r\n',
    'a"b,"c"\n',
    '"a""b",c\r',
    '"a\n,b",c\n',
    "  \n",
    "\n",
    '"a,b\n',
    'a,b"\n',
)
CELL = st.text(st.sampled_from('ab,;"\n\r é'), max_size=6)


@settings(**COMMON, max_examples=300)
@given(
    lines=st.lists(st.lists(CELL, min_size=2, max_size=2), max_size=12),
    raw=st.lists(st.sampled_from(RAW_LINES) | st.text(st.sampled_from('ab,"\n\r '), max_size=9)).map("".join),
    is_raw=st.booleans(),
)
def test_arrow_reads_what_the_strict_reader_reads(tmp_path_factory, lines, raw, is_raw):
    """Lost if it fails: a file is read by Arrow that the strict reader reads otherwise, or refuses."""
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    body = (
        raw if is_raw else "".join(",".join(f'"{c.replace(chr(34), chr(34) * 2)}"' for c in r) + "\n" for r in lines)
    )
    path.write_bytes(("text,label\n" + body).encode())
    needed = ("text", "label")
    try:
        expected = [(row["text"], row["label"]) for _, row in readers.read_rows(str(path), needed)]
    except ValueError as e:
        with pytest.raises(ValueError) as ours:
            list(readers.read_columns(str(path), needed))
        assert str(ours.value) == str(e)
        return
    try:
        parts = [columns[:2] for columns in readers.read_columns(str(path), needed)]
    except ValueError as e:
        assert "a quoted text holds what look like rows" in str(e)
        return
    assert [pair for part in parts for pair in zip(*(column.to_pylist() for column in part))] == expected


def test_most_files_are_read_by_arrow(tmp_path, monkeypatch):
    """Lost if it fails: five million rows are read by the slow reader."""
    monkeypatch.setattr(readers, "read_csv", lambda *a: pytest.fail("read slowly"))
    texts = ["plain", 'with "marks", and\nlines', "007", "NA", "  "]
    rows = [{"text": f"{i} {texts[i % 5]}", "label": ("007", "1e3")[i % 2]} for i in range(100)]
    path = write_csv(tmp_path / "rows.csv", rows)
    columns = [column.to_pylist() for part in readers.read_columns(path, ("text", "label")) for column in part[:2]]
    assert columns == [[row["text"] for row in rows], [row["label"] for row in rows]]


RT_TOKENS = {  # of the tokens, texts and places that version 0.2 wrote for all three splits
    "Review: {text}\nSentiment: {label}": "f8819e338f43c05a38b2ed47f280ba69",
    "{text} {label}": "afd5983cc0906edb87f196db66dffafe",
    "Review: {text}\nSentiment:\n{label}": "e66671bec0efaeba9eca69998dd9edbb",
}


@pytest.mark.parametrize("template", RT_TOKENS)
def test_the_tokens_are_those_of_before(template):
    """Lost if it fails: runs that are compared with older ones were trained on other tokens, splits or labels."""
    assert digest_of(load("rt_reviews", template=template)) == RT_TOKENS[template]


def test_the_tokens_of_before_where_texts_are_cut_or_classified():
    """Lost if it fails: the same for texts that are too long, and for a classifier."""
    template = "Review: {text}\nSentiment: {label}"
    cut = load("rt_reviews", template=template, block_size=40)
    assert cut.digest == "997815d05752d2bd" and digest_of(cut) == "31a6bf601e4978386e43606db5b2ad11"
    classifier = load("rt_reviews", template=template, classify=True)
    assert digest_of(classifier) == "1fab1b352db3e13c3f292d7a79eeb190"


def digest_of(loader):
    digest = hashlib.sha256()
    for split in ALL:
        examples = loader.splits[split]
        for array in (examples.tokens, examples.texts, examples.index):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("kind", [pytest.param("csv", marks=pytest.mark.slow), "parquet"])
def test_a_start_from_the_cache_imports_no_arrow(tmp_path, kind):
    """Lost if it fails: each start of a run waits for a library that it does not use."""
    path = write_csv(tmp_path / "rows.csv", some_rows(60))
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        with_names(some_rows(60), ["bad", "good"]).to_parquet(path)
    code = "import sys; sys.modules['pyarrow'] = None; from dataloader import CustomDataLoader; "
    code += f"CustomDataLoader({path!r})"
    _, err = finish(start("-c", code, NANOLORA_CACHE=token_cache.CACHE), code=1)
    assert "import of pyarrow halted" in err
    load(path)
    finish(start("-c", code, NANOLORA_CACHE=token_cache.CACHE))
