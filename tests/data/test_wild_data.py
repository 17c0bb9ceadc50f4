"""Data as people have it: every row is read right, or the run stops with one line that says what to type.

The references are files that pandas, pyarrow and datasets write, and plain counting.

python -m pytest tests/data/test_wild_data.py
"""

import csv
import gzip
import io
import json
import math
import os
import random
import re
import string
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dataloader import CustomDataLoader
from plumbing.data import sources
from plumbing.data.labels import find_label, normalise_label, split_names
from plumbing.data.readers import KINDS, read_columns, read_rows
from plumbing.data.records import draw_split
from plumbing.data.token_cache import hash_files
from tools.pretrain import TextLoader

ALL = ("train", "validation", "test")
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def some_rows(n, words=("bad", "good")):
    return [{"text": f"film {i} is dull", "label": words[i % len(words)]} for i in range(n)]


def write_csv(path, rows, separator=",", encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, **options):
    return CustomDataLoader(str(path), wanted=ALL, **options)


def pairs(loader):
    """(text, label's word) of all examples, sorted."""
    return sorted((ex.text, loader.label_names[ex.label]) for split in loader.splits.values() for ex in split)


def plain_pairs(rows):
    return sorted((row["text"], row["label"]) for row in rows)


def refusal(path, **options):
    """The one line that refuses this data."""
    with pytest.raises((ValueError, OSError)) as e:
        load(path, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


# --- a run knows its data ------------------------------------------------------------------------


def test_the_digest_is_of_the_content(tmp_path):
    """Lost if it fails: a run goes on, or is scored, on data that was changed since, and nobody is warned."""
    rows = some_rows(60)
    first = load(write_csv(tmp_path / "a.csv", rows)).digest
    assert first and load(tmp_path / "a.csv", seed=7, classify=True).digest == first
    assert load(write_csv(tmp_path / "b.csv", rows)).digest == first  # the name does not count
    rows[37]["text"] += "."
    assert load(write_csv(tmp_path / "c.csv", rows)).digest != first
    packed = gzip.compress((tmp_path / "a.csv").read_bytes())
    digests = set()
    for name in ("a.csv.gz", "a.txt.gz", "a.jsonl.gz"):  # the same bytes, read in other ways
        (tmp_path / name).write_bytes(packed)
        digests.add(hash_files([str(tmp_path / name)]))
    assert len(digests) == 3
    text = "\n\n".join(f"paragraph {i} of a long book" for i in range(1000))
    digests = set()
    for name, content in (("a.txt", text), ("b.txt", text), ("c.txt", text + "!")):
        (tmp_path / name).write_text(content)
        digests.add(TextLoader(str(tmp_path / name), context=8).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "named, drawn",
    [
        (ALL, ()),
        (("train", "test"), ("train", "validation")),
        (("train", "validation"), ("train", "test")),
        (("train",), ALL),
        (("test",), ()),
    ],
)
@pytest.mark.parametrize("as_column", [False, True])
def test_whether_a_split_was_drawn(tmp_path, named, drawn, as_column):
    """Lost if it fails: a model is scored under another seed on rows that it was trained on."""
    parts = {split: [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(60)] for split in named}
    if as_column:
        write_csv(tmp_path / "rows.csv", [row | {"split": split} for split in named for row in parts[split]])
    else:
        for split in named:
            write_csv(tmp_path / f"{split}.csv", parts[split])
    loader = CustomDataLoader(str(tmp_path), wanted=named)
    assert [split for split in ALL if split in loader.drawn] == list(drawn)
    again = CustomDataLoader(str(tmp_path), wanted=named, seed=8)
    for split in named:
        same = [ex.text for ex in loader.splits[split]] == [ex.text for ex in again.splits[split]]
        assert same == (split not in drawn)


def test_rt_reviews_and_text_name_their_splits(tmp_path):
    """Lost if it fails: a score on the reviews is refused because of a seed that has no part in it."""
    loader = CustomDataLoader("rt_reviews", wanted=("test",))
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} of a long book" for i in range(1000)))
    book = TextLoader(str(tmp_path / "book.txt"), context=8)
    assert not loader.drawn and not book.drawn


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(**COMMON, max_examples=40)
@given(
    texts=st.lists(TEXT, min_size=60, max_size=120),
    added=st.lists(TEXT, max_size=60),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_added_and_moved_rows_change_no_other_rows_split(tmp_path_factory, texts, added, seed, data):
    """Lost if it fails: a file that grows by a day's rows has its test rows trained on."""
    texts = [f"{text} {i // 2}" for i, text in enumerate(texts)]  # most stand twice

    def splits_of(texts, name):
        rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
        try:
            loader = load(write_jsonl(tmp_path_factory.mktemp("data") / name, rows), seed=seed)
        except ValueError as e:
            assume("too few" not in str(e))
            raise
        found = defaultdict(set)
        for split, examples in loader.splits.items():
            for ex in examples:
                found[ex.text].add(split)
        assert sum(map(len, loader.splits.values())) == len(texts)
        return found

    before = splits_of(texts, "before.jsonl")
    assert {len(places) for places in before.values()} == {1}  # no text is in two splits
    after = splits_of(data.draw(st.permutations(texts + added)), "after.jsonl")
    assert {len(places) for places in after.values()} == {1}
    assert {text: after[text] for text in before} == before


def test_the_drawn_shares_are_those_that_are_promised():
    """Lost if it fails: a run trains on half of its rows, or two seeds draw the same or related test rows."""
    n = 20_000
    draws = {seed: [draw_split(b"film %d" % i, seed, ALL) for i in range(n)] for seed in (0, 1, 1337)}
    for splits in draws.values():
        for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
            deviation = math.sqrt(n * share * (1 - share))
            assert abs(splits.count(split) - n * share) < 4 * deviation
    in_both = sum(a == b == "test" for a, b in zip(draws[0], draws[1]))
    assert abs(in_both - n / 100) < 4 * math.sqrt(n / 100)  # two independent tenths share a hundredth


def test_twenty_rows_are_enough_for_most_seeds_and_refused_in_one_line_for_the_others(tmp_path):
    """Lost if it fails: a first try on a small file stops, or trains without a validation split."""
    path = write_csv(tmp_path / "rows.csv", some_rows(20))
    done = 0
    for seed in range(40):
        try:
            loader = CustomDataLoader(path, seed=seed)
            assert min(map(len, loader.splits.values())) > 0
            done += 1
        except ValueError as e:
            assert re.search(r"rows.csv: no labelled row in its \w+ split: its 20 rows.*--seed.*split", str(e))
            assert "\n" not in str(e)
    assert done >= 30  # 0.9 ** 20 is 12 %


# --- no row vanishes -----------------------------------------------------------------------------


def test_minus_one_is_a_class_where_no_one_says_that_it_is_not(tmp_path, capsys):
    """Lost if it fails: half of the rows are left out, and a model learns the one class that remains."""
    rows = [{"text": f"film {i}", "label": (-1, 1)[i % 2]} for i in range(60)]
    expected = plain_pairs(row | {"label": {-1: "bad", 1: "good"}[row["label"]]} for row in rows)
    for kind, write in (("csv", write_csv), ("jsonl", write_jsonl)):
        path = write(tmp_path / f"rows.{kind}", rows)
        assert pairs(load(path, label_names="bad,good")) == expected
        assert "-1 is bad, 1 is good" in capsys.readouterr().out
        for classify in (False, True):
            assert re.search(r"numbers for labels \(-1, 1\).*--label_names=", refusal(path, classify=classify))


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, -2], [1, 2, -1, 3]])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_negative_label_without_a_word_is_refused_with_its_place(tmp_path, labels, kind):
    """Lost if it fails: rows with a negative label are left out of training without a word."""
    rows = [{"text": f"film {i}", "label": labels[i % len(labels)]} for i in range(60)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        {"csv": write_csv, "jsonl": write_jsonl}[kind](path, rows)
    first = labels.index(min(labels)) + 1
    place = {"csv": f"line {first + 1}", "jsonl": f"line {first}", "parquet": f"row {first}"}[kind]
    told = refusal(path, label_names="bad,good")
    assert f"label {min(labels)}" in told and f"{path}, {place};" in told and "type one word for each" in told


@pytest.mark.parametrize("kind", ["hub", "save_to_disk", "parquet", "arrow"])
def test_minus_one_is_no_label_where_the_data_set_says_so(tmp_path, monkeypatch, capsys, kind):
    """Lost if it fails: the unlabelled rows of sst2 and the like stop the run, or become a class."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = [{"text": f"film {i}", "label": (0, 1, -1)[i % 3]} for i in range(90)]
    made = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / f"data.{kind}"
    if kind == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=made))
        path = "some/reviews"
    elif kind == "save_to_disk":
        made.save_to_disk(path)
    elif kind == "parquet":
        made.to_parquet(path)
    else:
        made.save_to_disk(tmp_path / "saved")
        os.replace(next((tmp_path / "saved").glob("*.arrow")), path)
    for _ in range(2):  # the second time from the cache
        loader = load(path)
        words = {0: "neg", 1: "pos"}
        assert pairs(loader) == sorted((r["text"], words[r["label"]]) for r in rows if r["label"] >= 0)
        assert "note: 60 of 90 rows are used (unlabelled (-1): 30)" in capsys.readouterr().out
    assert "neg,pos" not in load(path, label_names="bad,good").label_names


def csv_of_lines(n):
    rows = some_rows(n)
    return ["text,label", *(f"{row['text']},{row['label']}" for row in rows)], rows


@settings(**COMMON, max_examples=300)
@given(data=st.data(), count=st.integers(1, 3))
def test_stray_quotation_marks_are_told_or_part_of_the_text(tmp_path_factory, data, count):
    """Lost if it fails: a quotation mark swallows hundreds of rows, and training begins on those that are left."""
    lines, rows = csv_of_lines(60)
    text = "\n".join(lines) + "\n"
    ends = [match.start() for match in re.finditer("[,\n]", text)]
    # Most of all at the beginnings and ends of fields, where they mean something.
    place = st.one_of(st.sampled_from(ends), st.sampled_from([end + 1 for end in ends]), st.integers(11, len(text)))
    for at in sorted(data.draw(st.lists(place, min_size=count, max_size=count)), reverse=True):
        text = text[: max(11, at)] + '"' + text[max(11, at) :]
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    path.write_text(text)
    try:
        loader = load(path)
    except ValueError as e:
        assert f"{path}, line" in str(e) and "\n" not in str(e)
        return
    assert [len(text.splitlines()) for text, _ in pairs(loader)] == [1] * len(rows)
    assert {label.replace('"', "") for _, label in pairs(loader)} == {"bad", "good"}


def test_one_quotation_mark_in_line_12_of_400_is_told(tmp_path):
    """Lost if it fails: 12 rows of 400 are left, and training begins."""
    lines, _ = csv_of_lines(400)
    path = tmp_path / "rows.csv"
    for wrong in ('"film 10 is dull,bad', 'film 10 is dull,"bad'):
        path.write_text("\n".join([*lines[:11], wrong, *lines[12:]]))
        assert re.search(r"rows.csv, line 12: a quotation mark opens here and does not close", refusal(path))
    # Another one further on closes it: all is one text then.
    path.write_text("\n".join([*lines[:11], '"film 10 is dull,bad', *lines[12:30], 'film 29",good', *lines[31:]]))
    assert re.search(r"rows.csv, lines 12 to 31: a quoted text holds what look like rows", refusal(path))


def test_texts_of_several_lines_are_read_as_they_stand(tmp_path):
    """Lost if it fails: reviews with line breaks, commas and quotation marks in them are refused."""
    texts = ['He said "no".\n\nAnd left, alone.', "one\r\ntwo, three", "a list:\n- good, bad\n- 1, 2, 3", 'a, "b"\n']
    texts += ["text,label\nis how it begins", "so, so\nbut good", "film,dull\nfilm,long"]
    rows = [{"text": f"{i} {text}", "label": ("bad", "good")[i % 2]} for i, text in enumerate(texts * 12)]
    assert pairs(load(write_csv(tmp_path / "rows.csv", rows))) == plain_pairs(rows)
    frame = pd.DataFrame(rows)[["label", "text"]]
    frame.to_csv(tmp_path / "pandas.csv", index=True)
    assert pairs(load(tmp_path / "pandas.csv")) == plain_pairs(rows)


def test_swallowed_rows_are_told_behind_a_thousand_poems(tmp_path):
    """Lost if it fails: texts of several lines that are meant so hide the one that has swallowed rows."""
    path = tmp_path / "poems.csv"
    path.write_text(
        "text,label\nx,bad\n" + '"Roses are red,\nViolets are blue",good\n' * 1000 + '"a,good\nb,bad\nc",good\n'
    )
    assert "lines 2003 to 2005: a quoted text holds what look like rows" in refusal(path)


def test_swallowed_rows_are_told_where_columns_have_no_names(tmp_path):
    """Lost if it fails: in the SMS file as it is downloaded, of five columns without three names, rows are lost."""
    path = tmp_path / "spam.csv"
    rows = "".join(f'ham,he said "hi" {i},,,\n' for i in range(10))
    path.write_text("v1,v2,,,\nspam,win,,,\n" + rows + 'ham,"so,,,\nspam,free entry,,,\nham,fine",,,\n')
    assert "lines 13 to 15" in refusal(path, text_field="v2", label_field="v1")


@pytest.mark.parametrize("content", ["id,review\n", "   \n", "\n", ""])
def test_a_file_without_rows_is_named_and_not_read(tmp_path, content, capsys):
    """Lost if it fails: a test.csv that has a header alone stops a training that does not need it."""
    write_csv(tmp_path / "train.csv", some_rows(100))
    (tmp_path / "test.csv").write_text(content)
    load(tmp_path)
    assert "test.csv (no row in it)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("slow,long,negative", ["3 fields", "has 2 (text, label)", '"slow,long"']),
        ("slow", ["1 fields", "has 2 (text, label)"]),
        (",,,", ["4 fields"]),
        ('"slow" and,bad', ["quotation mark in a wrong place"]),
        ('"slow \\"very\\"",bad', ["quotation mark in a wrong place", '""no""']),
    ],
)
@pytest.mark.parametrize("line", [2, 30, 61])
def test_a_malformed_row_is_told_with_its_line(tmp_path, wrong, told, line):
    """Lost if it fails: a text's second half becomes a class, or the row is trained on without its label."""
    lines, _ = csv_of_lines(60)
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([*lines[: line - 1], wrong, *lines[line:]]) + "\n")
    message = refusal(path)
    assert [words for words in [f"{path}, line {line}:", *told] if words not in message] == []


@pytest.mark.parametrize("before, line", [("", 2), ("sep=,\n", 3)])
def test_a_quotation_mark_that_opens_and_does_not_close_is_told_with_its_line(tmp_path, before, line):
    """Lost if it fails: a user looks for a mistake of the first row in the header."""
    (tmp_path / "rows.csv").write_text(before + 'text,label\n"a joy,good\ndull,bad\n')
    assert f"line {line}: a quotation mark opens here" in refusal(tmp_path / "rows.csv")


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_a_header_between_the_rows_is_told(tmp_path, kind):
    """Lost if it fails: two files are put together, and `label` is a class of the model."""
    rows = [*some_rows(60), {"text": "text", "label": "label"}, *some_rows(60)]
    write_kind(tmp_path / f"rows.{kind}", rows)
    assert " 62: the header once more" in refusal(tmp_path / f"rows.{kind}")


def test_blank_lines_are_no_rows(tmp_path, capsys):
    """Lost if it fails: an empty line at a file's end stops the run."""
    lines, rows = csv_of_lines(60)
    (tmp_path / "rows.csv").write_text("\n".join([*lines[:20], "", "   ", *lines[20:], "", ""]))
    assert pairs(load(tmp_path / "rows.csv")) == plain_pairs(rows)
    assert "note" not in capsys.readouterr().out


@settings(**COMMON, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "parquet"]))
def test_what_is_left_out_is_counted_by_reason_at_every_start(tmp_path_factory, capsys, data, kind):
    """Lost if it fails: rows are dropped and nobody knows how many, or why."""
    text = st.sampled_from([None, "a joy", "a bore", ""])
    label = st.sampled_from([None, "", "  ", "NaN", "nan", "N/A", "null", "bad", "good"])
    rows = data.draw(st.lists(st.fixed_dictionaries({"text": text, "label": label}), min_size=1, max_size=40))
    rows += some_rows(60)
    path = tmp_path_factory.mktemp("data") / f"rows.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    expected = Counter()
    for row in rows:
        if row["text"] is None:
            expected["no text"] += 1
        elif row["label"] not in ("bad", "good"):
            spelled = (row["label"] or "").strip()
            expected[f"no label ({spelled})" if spelled else "no label"] += 1
    n_used = len(rows) - sum(expected.values())
    for _ in range(2):
        capsys.readouterr()
        loader = load(path)
        out = capsys.readouterr().out
        assert sum(map(len, loader.splits.values())) == n_used and loader.label_names == ["bad", "good"]
        if not expected:
            assert "note" not in out
            continue
        found = re.match(r"note: (\d+) of (\d+) rows are used \((.*)\)\n", out)
        assert (int(found[1]), int(found[2])) == (n_used, len(rows))
        assert dict(reason.rsplit(": ", 1) for reason in found[3].split(", ")) == {
            reason: str(n) for reason, n in expected.items()
        }


def test_numbers_that_are_missing_are_no_rows(tmp_path, capsys):
    """Lost if it fails: pandas' nan is a text or a class."""
    frame = pd.DataFrame({"text": ["a", None, "b", "c"] * 20, "label": [0, 1, math.nan, 1] * 20})
    frame["text"] = [None if pd.isna(text) else f"{text} {i}" for i, text in enumerate(frame["text"])]
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": r.text, "label": r.label} for r in frame.itertuples()])
    expected = sorted((r.text, ("bad", "good")[int(r.label)]) for r in frame.dropna().itertuples())
    for kind in ("parquet", "csv", "jsonl"):
        assert pairs(load(tmp_path / f"rows.{kind}", label_names="bad,good")) == expected
        assert "40 of 80 rows are used (no label: 20, no text: 20)" in capsys.readouterr().out


def test_a_file_without_any_label_is_told_so(tmp_path):
    """Lost if it fails: the user of a file without labels is sent off to change label names."""
    path = write_csv(tmp_path / "rows.csv", [{"text": f"film {i}", "label": ""} for i in range(40)])
    assert "no labelled row in it; 0 of 40 rows are used (no label: 40)" in refusal(path)


# --- one definition of a label -------------------------------------------------------------------

WORD = st.text(string.ascii_letters + "éßİıſ中+-. ", min_size=1, max_size=12).map(str.strip).filter(normalise_label)
BLANKS = st.sampled_from(["", " ", "\t", "  ", "\u00a0"])
CHANGES = st.sampled_from([str, str.upper, str.lower, str.title, str.swapcase])


@settings(**COMMON, max_examples=70)
@given(words=st.lists(WORD, min_size=2, max_size=4), data=st.data())
def test_the_loader_and_the_score_mean_the_same_by_a_label(tmp_path_factory, capsys, words, data):
    """Lost if it fails: two classes are trained that the score counts as one, so one of them has recall 0."""
    rows = []
    for i in range(60):
        change = data.draw(CHANGES)
        word = data.draw(BLANKS) + change(data.draw(st.sampled_from(words))) + data.draw(BLANKS)
        rows.append({"text": f"film {i}", "label": word})
    try:
        loader = load(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows), template="{text}: {label}")
    except ValueError as e:
        assert "\n" not in str(e) and re.search(
            "two different words|numbers and words|too few|before {label}", str(e)
        )
        return
    names = loader.label_names
    assert {normalise_label(name) for name in names} == {normalise_label(row["label"]) for row in rows}
    for text, word in pairs(loader):
        label = next(row["label"] for row in rows if row["text"] == text)
        # What the model is taught to write, and what stands in the data, are both found as the class of the row.
        assert names[find_label(f" {word}", names)] == names[find_label(label, names)] == word


def test_the_most_frequent_spelling_is_the_word(tmp_path, capsys):
    """Lost if it fails: `Positive` and `positive` are two classes, or the user is not told that they are one."""
    labels = ["positive", "Positive", " positive", "NEGATIVE", "negative ", "NEGATIVE"]
    rows = [{"text": f"film {i}", "label": labels[i % 6]} for i in range(60)]
    path = write_csv(tmp_path / "rows.csv", rows)
    for _ in range(2):
        assert load(path).label_names == ["NEGATIVE", "positive"]
        out = capsys.readouterr().out
        assert "note: 'NEGATIVE' (20 rows), 'negative ' (10 rows) are one label: 'NEGATIVE'\n" in out
        assert "'Positive' (10 rows)" in out and "are one label: 'positive'\n" in out
    named = load(path, label_names="Positive,Negative")
    assert named.label_names == ["Positive", "Negative"]
    assert Counter(word for _, word in pairs(named)) == {"Positive": 30, "Negative": 30}
    assert "at least two different words" in refusal(path, label_names="Positive,positive,negative")


@pytest.mark.parametrize("length", [1, 30, 39, 40, 41, 60, 200])
def test_a_long_label_is_found(length):
    """Lost if it fails: a class whose word is long is never found in what the model writes."""
    word = ("very " * 50)[: length - 1] + "x"
    assert find_label(f" {word}", ["bad", word]) == 1
    assert find_label(f' "{word}".', [word, "bad"]) == 0


@pytest.mark.parametrize(
    "text, names, found",
    [
        (" STRASSE", ["straße", "weg"], 0),
        (" Café!", ["cafe\u0301", "bar"], 0),  # the accent as a letter of its own
        ("." * 31 + " positive", ["negative", "positive"], 1),  # ends with the 40th character
        ("." * 32 + " positive", ["negative", "positive"], None),
        (" not so Very Good", ["very", " very good"], 1),
        (" positively", ["positive", "negative"], None),
        ("C++ it is", ["c", "C++"], 1),
    ],
)
def test_where_a_text_names_a_label(text, names, found):
    """Lost if it fails: an answer that a reader accepts is counted as wrong, or the other way round."""
    assert find_label(text, names) == found


# --- numbers, lists, mixtures --------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, options, words",
    [
        ([1, 2, 3, 4, 5], {"label_names": "awful,bad,fair,good,great"}, ["awful", "bad", "fair", "good", "great"]),
        ([1, 2, 3, 4, 5], {"label_names": "1,2,3,4,5"}, ["1", "2", "3", "4", "5"]),
        ([3, 1, 2], {"label_names": "3,1,2"}, ["3", "1", "2"]),
        ([1, 2], {"label_names": "1,2,3"}, ["1", "2"]),
        ([1, 2], {"label_names": "1=bad,2=good"}, ["bad", "good"]),
        ([0, 2], {"label_names": "none,bad,good"}, ["none", "good"]),  # the words of 0, 1 and 2
        ([1, 3], {"label_names": "bad,fair,good"}, ["bad", "good"]),  # of 1, 2 and 3
        ([1, 2, 3, 4, 5], {"classify": True}, ["1", "2", "3", "4", "5"]),
        ([0.5, 1.0], {}, ["0.5", "1.0"]),
        ([True, False], {}, ["True", "False"]),
        (["none", "some"], {}, ["none", "some"]),
        (["N/A", "yes"], {"label_names": "yes,N/A"}, ["N/A", "yes"]),
        (["1", "2", "many"], {"label_names": "1,2,many"}, ["1", "2", "many"]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_that_are_read_right(tmp_path, labels, options, words, kind):
    """Lost if it fails: stars of 1 to 5 cannot be trained on, or one star is taught another's word."""
    rows = [{"text": f"film {i}", "label": labels[i % len(labels)]} for i in range(100)]
    loader = load({"csv": write_csv, "jsonl": write_jsonl}[kind](tmp_path / f"rows.{kind}", rows), **options)
    assert pairs(loader) == sorted((f"film {i}", words[i % len(labels)]) for i in range(100))
    if "label_names" in options:
        assert loader.label_names == split_names(options["label_names"])
    else:
        assert loader.label_names == sorted(words)


@pytest.mark.parametrize(
    "rows, options, told",
    [
        ([{"text": "a", "label": ["good"]}], {}, ["line 61", "column label", "['good']", "--label_field="]),
        ([{"text": "a", "label": {"x": 1}}], {}, ["line 61", "column label", "--label_field="]),
        ([{"text": ["a", "b"], "label": "good"}], {}, ["line 61", "column text", "--text_field="]),
        (
            [{"text": "a", "label": 1}],
            {},
            ["numbers and words", "'1'", "line 61", "'bad'", "line 1", "--label_names="],
        ),
        ([{"text": "a", "label": "fair"}], {"label_names": "bad,good"}, ["'fair'", "line 61", "add it"]),
        ([{"text": "a", "label": "b", "split": "holdout"}], {}, ["line 61", "'holdout'", "training", "rename"]),
        ([{"text": "a", "label": "b", "split": None}], {}, ["line 61", "''", "column split"]),
        ([{"text": "a"}], {}, ["line 61", "label_field=label", "text"]),
    ],
)
def test_a_row_that_cannot_be_meant_so_is_told_with_its_line(tmp_path, rows, options, told):
    """Lost if it fails: ['good'] is a class, or rows become training rows by a word that is not known."""
    path = write_jsonl(tmp_path / "rows.jsonl", [*some_rows(60), *rows])
    message = refusal(path, **options)
    assert [words for words in [str(path), *told] if words not in message] == []


def test_words_in_train_and_numbers_in_test_are_told(tmp_path):
    """Lost if it fails: bad, good, 0 and 1 are four classes, and every test row counts as wrong."""
    write_csv(tmp_path / "train.csv", some_rows(60))
    write_csv(tmp_path / "test.csv", some_rows(60, (0, 1)))
    message = refusal(tmp_path)
    assert f"{tmp_path}/train.csv, line 2" in message and f"{tmp_path}/test.csv, line 2" in message


@pytest.mark.parametrize("words", [("training", "Validation", "Testing"), (" TR ", "evaluation", "test")])
def test_a_split_column_says_it_in_other_words(tmp_path, words):
    """Lost if it fails: a file that marks its test rows as `Testing` has them trained on."""
    rows = [row | {"split": words[i % 3]} for i, row in enumerate(some_rows(60))]
    loader = load(write_csv(tmp_path / "rows.csv", rows))
    for i, split in enumerate(ALL):
        assert [ex.text for ex in loader.splits[split]] == [row["text"] for row in rows[i::3]]


# --- kinds of files ------------------------------------------------------------------------------


def write_kind(path, rows):
    """The rows as the file that the path's name asks for, by pandas and pyarrow."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    frame = pd.DataFrame(rows)
    table = pa.Table.from_pylist(rows)
    if kind in ("csv", "tsv"):
        data = frame.to_csv(index=False, sep="," if kind == "csv" else "\t").encode()
    elif kind == "jsonl":
        data = frame.to_json(orient="records", lines=True).encode()
    elif kind == "json":
        data = frame.to_json(orient="records").encode()
    else:
        buffer = io.BytesIO()
        if kind == "parquet":
            frame.to_parquet(buffer)
        elif kind == "feather":
            pa.feather.write_feather(table, buffer)
        elif kind == "arrow":
            with pa.ipc.new_stream(buffer, table.schema) as writer:
                writer.write_table(table)
        else:
            pytest.importorskip("openpyxl", reason="pip install openpyxl")
            frame.to_excel(buffer, index=False)
        data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


ODD_ROWS = [
    {"text": f'{i} it\'s "naïve", so;\tsaid a 👍 | man\nand left', "label": ("bad", "good")[i % 2], "stars": i % 5}
    for i in range(80)
]


TABLES = tuple(kind for kind in KINDS if kind != "txt")


@pytest.mark.parametrize("kind", [kind + packed for kind in TABLES for packed in ("", ".gz")])
def test_a_kind_of_file_is_read_as_its_library_writes_it(tmp_path, kind):
    """Lost if it fails: a user must convert a file that says all there is to know, or a text is changed."""
    path = write_kind(tmp_path / f"rows.{kind}", ODD_ROWS)
    assert pairs(load(path)) == plain_pairs(ODD_ROWS)
    columns = [column.to_pylist() for part in read_columns(path, ("stars", "text")) for column in part[:2]]
    assert columns == [[str(row["stars"]) for row in ODD_ROWS], [row["text"] for row in ODD_ROWS]]
    stars = load(path, label_field="stars", label_names="a,b,c,d,e")
    assert pairs(stars) == sorted((row["text"], "abcde"[row["stars"]]) for row in ODD_ROWS)
    (tmp_path / "parts").mkdir()
    for split in ALL:
        write_kind(tmp_path / "parts" / f"{split}.{kind}", [row | {"text": split + row["text"]} for row in ODD_ROWS])
    named = load(tmp_path / "parts")
    for split in ALL:
        assert [ex.text for ex in named.splits[split]] == [split + row["text"] for row in ODD_ROWS]
    # A damaged one is one line.
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 3])
    assert path in refusal(path)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_separators_are_told_by_the_header(tmp_path, separator, kind):
    """Lost if it fails: a csv from a European Excel has one column, and its user is sent off to look for it."""
    path = write_csv(tmp_path / f"rows.{kind}", ODD_ROWS, separator)
    assert pairs(load(path)) == plain_pairs(ODD_ROWS)
    # Columns that do not stand in it: the message shows those that do, one by one.
    assert "it has text, label, stars" in refusal(path, text_field="review")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "tsv"])
def test_text_with_a_byte_order_mark_is_read(tmp_path, encoding, kind):
    """Lost if it fails: "Unicode text" of Excel is damaged to the reader, or its first column is not found."""
    path = Path(write_kind(tmp_path / f"rows.{kind}", ODD_ROWS))
    content = path.read_bytes().decode()
    path.write_bytes(content.encode(encoding))
    assert pairs(load(path)) == plain_pairs(ODD_ROWS)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16le", "utf-16be"])
def test_other_encodings_are_told_with_the_command_that_changes_them(tmp_path, kind, encoding):
    """Lost if it fails: "'utf-8' codec can't decode byte 0xe9", and no word of what to do."""
    lines = ["text,label", *(f"film {i},good" for i in range(40)), "naïve café,bad"]
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in [*some_rows(41), {"text": "naïve", "label": "bad"}]]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(ValueError) as e:
        TextLoader(str(path)) if kind == "txt" else load(path)
    message = str(e.value)
    line = 42 if encoding == "cp1252" else 1
    assert f"{path}, line {line}: no UTF-8, but probably {encoding}" in message
    command = re.search(r"iconv (\S+ \S+ \S+ \S+) (\S+) > (\S+)", message)
    # What the command makes is read: python's own codec stands in for iconv.
    assert command[1] == f"-f {encoding} -t utf-8" and command[2] == path.name
    made = tmp_path / command[3]
    made.write_bytes(path.read_bytes().decode(encoding).encode())
    assert [row["text"] for _, row in read_rows(str(made))][-1].startswith("naïve" if kind != "txt" else "text")


def test_what_datasets_saved_is_read(tmp_path):
    """Lost if it fails: a data set that was prepared with the usual library must be written again as csv."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    parts = {
        split: datasets.Dataset.from_list(
            [{"text": f"{split} {i}", "label": i % 2} for i in range(40)], features=features
        )
        for split in ("train", "validation", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    loader = load(tmp_path / "all")
    assert loader.label_names == ["neg", "pos"] and not loader.drawn
    for split in ALL:
        expected = [(row["text"], row["label"]) for row in parts[split]]
        assert [(ex.text, ex.label) for ex in loader.splits[split]] == expected
    parts["train"].save_to_disk(tmp_path / "one")
    one = load(tmp_path / "one")
    assert pairs(one) == sorted((f"train {i}", ("neg", "pos")[i % 2]) for i in range(40))
    assert set(one.drawn) == set(ALL) and one.digest != loader.digest
    parts["train"].save_to_disk(tmp_path / "copy")
    assert load(tmp_path / "copy").digest == one.digest
    datasets.DatasetDict(unsupervised=parts["train"]).save_to_disk(tmp_path / "other")
    assert "no train, validation or test split; it has unsupervised" in refusal(tmp_path / "other")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "save_to_disk" in refusal(tmp_path / "one")


def test_excel_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    """Lost if it fails: a user of an Excel file gets a traceback about a module."""
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "pip install openpyxl" in refusal(tmp_path / "rows.xlsx")


def test_excel_with_two_sheets_is_refused(tmp_path, capsys):
    """Lost if it fails: the rows of all sheets but one vanish."""
    openpyxl = pytest.importorskip("openpyxl", reason="pip install openpyxl")
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet("more")):
        sheet.append(["text", "label"])
        for row in some_rows(60):
            sheet.append(list(row.values()))
    book.create_sheet("empty")
    book.save(tmp_path / "two.xlsx")
    assert "the sheets Sheet, more" in refusal(tmp_path / "two.xlsx")
    del book["more"]
    # A table that does not begin in the first cell; a label that Excel cannot compute.
    book.active.insert_rows(1, 2)
    book.active.insert_cols(1)
    book.active.append([None, "a film", "#REF!"])
    book.save(tmp_path / "one.xlsx")
    assert pairs(load(tmp_path / "one.xlsx")) == plain_pairs(some_rows(60))
    assert "no label (#REF!): 1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "parquet", "xlsx"])
def test_a_column_that_stands_twice_is_told(tmp_path, kind):
    """Lost if it fails: the second of two columns `label` is taken, whichever was meant."""
    values = [[f"film {i}", "ab"[i % 2], "cd"[i % 2]] for i in range(60)]
    path = tmp_path / f"rows.{kind}"
    for names in (["text", "label", "label"], ["text", "other", "other"]):
        if kind == "csv":
            pd.DataFrame(values, columns=names).to_csv(path, index=False)
        elif kind == "parquet":
            columns = [pa.array(column) for column in zip(*values)]
            pa.parquet.write_table(pa.Table.from_arrays(columns, names=names), path)
        else:
            pytest.importorskip("openpyxl", reason="pip install openpyxl")
            pd.DataFrame(values, columns=names).to_excel(path, index=False)
        if "label" in names:
            assert f"{path}: the column label stands 2 times" in refusal(path)
    # One that nobody asks for does no harm.
    assert "label_field=label" in refusal(path)


@pytest.mark.parametrize("first, second", [("train.csv", "train.jsonl"), ("test.csv", "test.csv.gz")])
def test_two_kinds_of_files_for_one_split_are_told(tmp_path, first, second):
    """Lost if it fails: a file and what was made from it are both read, and each row counts twice."""
    write_kind(tmp_path / "train.csv", some_rows(60))
    write_kind(tmp_path / first, some_rows(60))
    write_kind(tmp_path / second, some_rows(60))
    message = refusal(tmp_path)
    assert str(tmp_path / first) in message and str(tmp_path / second) in message and "move" in message


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"text": {"0": "a"}, "label": {"0": "b"}}', ["row 1", "column text"]),  # pandas' to_json without orient
        ('[{"text": "a", "label": "b"}, 3]', ["row 2", "an object"]),
        ('[{"text": "a", "label": "b"}', ["damaged or no json"]),
        ('{\n  "data": []\n}', ["damaged, or no json"]),
        ("[" * 100_000, ["damaged or no json"]),
        ('{"text": "a", "label": "b"}\n{"text": "a", "text": "b"}', ["line 2", "twice", "text"]),
        ("", ["empty"]),
    ],
)
def test_json_of_another_shape_is_told(tmp_path, content, told):
    """Lost if it fails: a traceback, or a class named {'0': 'b'}."""
    (tmp_path / "rows.json").write_text(content)
    message = refusal(tmp_path / "rows.json")
    assert [words for words in ["rows.json", *told] if words not in message] == []


def test_a_hub_name_may_be_a_kinds_name(monkeypatch):
    """Lost if it fails: a data set of the hub that is called csv or arrow cannot be had."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or {})
    for name in ("json", "someone/csv"):
        with pytest.raises(ValueError, match="no train, validation or test split"):
            sources.find_source(name)
    assert asked == ["json", "someone/csv"]


def test_a_large_csv_is_streamed(tmp_path):
    """Lost if it fails: five million rows need more memory than the machine has."""
    import tracemalloc

    path = tmp_path / "rows.csv"
    rng = random.Random(1)
    with open(path, "w") as f:
        f.write("text,label\n")
        for i in range(60_000):
            f.write(f"film {i} {'so very dull ' * rng.randrange(8)},{'bad' if i % 2 else 'good'}\n")
    assert path.stat().st_size > 3e6
    tracemalloc.start()
    n = sum(1 for _ in read_rows(str(path), ("text", "label")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 60_000 and peak < 1e6


def test_the_page_names_every_kind_that_is_read():
    """Lost if it fails: the page says less or more than what is read, so nobody can trust it."""
    page = (Path(__file__).parents[2] / "docs" / "data_kinds.md").read_text(encoding="utf-8")
    table = page.partition("## Kinds")[2].partition("##")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert set(re.findall(r"`\.(\w+)`", " ".join(cells))) == {*KINDS, "gz"}
