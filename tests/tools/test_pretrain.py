"""tools/pretrain.py: text is packed with nothing lost, a model is made of it, and a stopped run goes on.

python -m pytest tests/tools/test_pretrain.py
"""

import itertools
import json
import math
import random
import signal
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from conftest import close, differences, finish, flags, here, read_metrics, resume, start, stop_after, tokens
from transformers import GPT2LMHeadModel

from configurator import configure
from model import GPT, GPTConfig
from plumbing.data import token_cache
from plumbing.data.tokenizer import gpt2_encoding
from tools import pretrain
from tools.pretrain import PretrainConfig, SampledGPT, TextLoader, lowercase_spaced, sample_softmax

# --- pre-training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(place):
    """The folder of a run from scratch with Muon and the sampled softmax, and its settings."""
    rng = random.Random(1)  # 7 of its paragraphs fall to the validation split
    words = ["the", "film", "was", "seen", "by", "people", "who", "liked", "its", "quiet", "ending", "more", "than"]
    paragraphs = [" ".join(rng.choices(words, k=40)) + "." for _ in range(600)]
    (place / "text.txt").write_text("\n\n".join(paragraphs))
    settings = {"init_from": "scratch", "dataset": place / "text.txt", "rank": 0, "alpha": 0}
    settings |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "train_context": 32, "batch_size": 8}
    settings |= {"max_iters": 4, "eval_interval": 3, "warmup_iters": 0, "n_sampled": 50, "lr": 1e-2}
    settings["muon_lr"] = 0.02 if hasattr(torch.optim, "Muon") else 0.0  # torch 2.9 has it
    settings |= {"dropout": 0, "eval_iters": 0}
    finish(start("-m", "tools.pretrain", *flags(place, "scratch", **settings), NANOLORA_CACHE=str(place / "cache")))
    assert list((place / "cache").iterdir())
    return place / "scratch", settings


def pretrain_here(argv):
    """The tool in this process, which spares the imports."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        pretrain.main(configure(list(map(str, argv)), cls=PretrainConfig))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_pretraining_from_scratch_learns(place, pretrained):
    """Otherwise the shipped base model cannot be made again, nor another one from a user's own text."""
    metrics = read_metrics(pretrained[0])
    assert [m["iter"] for m in metrics] == [0, 3, 4]
    assert metrics[0]["val_loss"] == pytest.approx(math.log(50257), abs=0.1)  # a fresh model knows nothing
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] - 0.5


def test_a_pretrained_model_is_a_base_to_fine_tune(place, pretrained):
    """Otherwise pre-training ends in files that no later step reads."""
    metrics = here(flags(place, "on-scratch", init_from=pretrained[0], rank=2, alpha=8, max_iters=2))
    assert math.isfinite(metrics[-1]["val_loss"])
    assert GPT2LMHeadModel.from_pretrained(pretrained[0]).config.n_positions == 64


def test_a_stopped_pretraining_run_equals_an_unbroken_one(place, pretrained, monkeypatch):
    """Otherwise a night of pre-training is lost with the session: Muon's moments and the sampled words count too."""
    monkeypatch.setattr(token_cache, "CACHE", str(place / "cache"))
    pretrain_here(flags(place, "text", **pretrained[1]))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_after(patch, 1)
        pretrain_here(flags(place, "text-broken", **pretrained[1]))
    assert stopped.value.code == 143
    pretrain_here(resume(place, "text-broken"))
    assert differences(place / "text", place / "text-broken") == []


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dataset": "small.txt"}, ["dataset=small.txt"]),
        ({"dataset": "no_such.txt"}, ["dataset=no_such.txt"]),
        ({"n_head": 3, "n_embd": 16}, ["n_embd=16", "n_head=3"]),
        ({"rank": 4}, ["rank=4", "at most 0"]),
    ],
)
def test_a_mistake_is_one_line(place, pretrained, monkeypatch, capfd, settings, words):
    """Otherwise the first text that a user tries ends in an error of a library, about a file that is not theirs."""
    monkeypatch.setattr(token_cache, "CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    (place / "small.txt").write_text("A film. " * 50)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        pretrain_here(flags(place, "never", **pretrained[1] | settings))
    error = capfd.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert [word for word in words if word not in error] == []


def test_text_cache_is_made_anew(tmp_path, monkeypatch):
    """Lost if it fails: a damaged token file is pre-trained on."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i} of a book" for i in range(2000)))
    first = np.array(TextLoader(str(tmp_path / "book.txt"), context=16).tokens["train"])
    (path,) = (tmp_path / "cache").glob("text-*/train.bin")
    path.write_bytes(path.read_bytes()[:-4] + b"\1\1\1\1")
    assert np.array_equal(TextLoader(str(tmp_path / "book.txt"), context=16).tokens["train"], first)


# --- plain text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It's a charming, often affecting journey.", "it's a charming , often affecting journey ."),
        ('"Bad" (and LONG): why?', '" bad " ( and long ) : why ?'),
        ("Wait... what", "wait . . . what"),
    ],
)
def test_lowercase_spaced_writes_as_the_old_reviews_do(text, expected):
    """Lost if it fails: the base model is pre-trained on a spelling that no data set has."""
    assert lowercase_spaced(text) == expected


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """1,500 documents of 5 to 40 words, so that some fall into the 1 % that is held out."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    rng = random.Random(5)
    words = ["A", "dull", "film", "wasn't", "naïve", "👍", "1,000", "Über", "line\nbreak", "end."]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(5, 40))) for i in range(1500)]


def write_text(path, documents):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


def documents_of(tokens):
    """A token file's documents: each ends in end-of-text."""
    ends = np.flatnonzero(np.asarray(tokens) == 50256)
    assert ends[-1] == len(tokens) - 1
    return [gpt2_encoding().decode(part[:-1].tolist()) for part in np.split(np.asarray(tokens), ends + 1)[:-1]]


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_text_is_packed_with_nothing_lost(corpus, tmp_path, kind):
    """Lost if it fails: pre-training reads other text than the user's, or is scored on what it was trained on."""
    loader = TextLoader(write_text(tmp_path / f"books.{kind}", corpus), context=32)
    held_out, train = (documents_of(loader.tokens[s]) for s in ("validation", "train"))
    assert Counter(held_out + train) == Counter(corpus)
    assert 2 <= len(held_out) <= 40  # 1 % of 1,500, chosen by content
    for split, documents in (("validation", held_out), ("train", train)):
        plain = [t for text in documents for t in [*gpt2_encoding().encode(text), 50256]]
        assert np.array_equal(loader.tokens[split], plain)
        # Nats of the whole split, in bits, over the bytes of its documents.
        bits = 3.21 * len(plain) / math.log(2)
        n_bytes = sum(len(text.encode()) for text in documents)
        assert loader.bits_per_byte(split, 3.21) == pytest.approx(bits / n_bytes)


def test_text_rows_and_epochs(corpus, tmp_path):
    """Lost if it fails: targets are not the next tokens, or a resumed run counts its epochs otherwise."""
    loader = TextLoader(write_text(tmp_path / "books.txt", corpus), context=32)
    flat = np.asarray(loader.tokens["train"]).tolist()
    epochs = [loader.order("train", 8, epoch) for epoch in range(4)]
    for batches in epochs:
        assert len(batches) == loader.n_batches("train", 8) > 10
        starts = sorted(s for batch in batches for s in batch)
        assert all(len(batch) == 8 for batch in batches)
        assert min(np.diff(starts)) >= 32  # no token is trained on twice in an epoch
        assert len(starts) * 32 > len(flat) - 12 * 32  # and nearly all are
    batch = loader.batch("train", epochs[0][3])
    assert batch.prefix.shape == (1, 0) and batch.idx.shape == batch.targets.shape == (8, 32)
    for s, row, target in zip(epochs[0][3], batch.idx.tolist(), batch.targets.tolist()):
        assert row == flat[s : s + 32] and target == flat[s + 1 : s + 33]
    assert loader.n_scored("train", epochs[0][3]) == (batch.targets >= 0).sum()
    again = TextLoader(str(tmp_path / "books.txt"), context=32)
    assert np.array_equal(again.order("train", 8, 1), epochs[1])
    assert not np.array_equal(epochs[0], epochs[1])
    other = TextLoader(str(tmp_path / "books.txt"), context=32, seed=7)
    assert not np.array_equal(other.order("train", 8, 1), epochs[1])


def test_text_is_tokenised_once(corpus, tmp_path, monkeypatch):
    """Lost if it fails: each run on a large corpus begins with minutes of tokenising."""
    path = write_text(tmp_path / "books.txt", corpus)
    first = TextLoader(path, context=32)
    monkeypatch.setattr(pretrain, "gpt2_encoding", lambda: pytest.fail("tokenised a second time"))
    second = TextLoader(path, context=16)
    assert np.array_equal(first.tokens["train"], second.tokens["train"]) and first.meta == second.meta


def test_the_cache_tells_apart_what_is_read_in_another_way(corpus, tmp_path):
    """Lost if it fails: after a change of spelling, column or kind of file the old tokens are trained on."""
    path = write_text(tmp_path / "books.jsonl", corpus)
    as_rows = documents_of(TextLoader(path, context=32).tokens["train"])
    lowered = documents_of(TextLoader(path, context=32, lowercase_share=1.0).tokens["train"])
    assert lowered == [text.lower() for text in lowered] and lowered != as_rows
    # The same bytes as plain text: its braces and field names are part of it.
    lines = [json.dumps({"text": text}) for text in corpus]
    (tmp_path / "other.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    as_text = documents_of(TextLoader(str(tmp_path / "other.txt"), context=32).tokens["train"])
    as_rows = documents_of(TextLoader(str(tmp_path / "other.jsonl"), context=32).tokens["train"])
    assert set(as_text) <= set(lines) and set(as_rows) <= set(corpus)


def test_a_short_text_is_refused_or_has_a_row_in_every_epoch(corpus, tmp_path):
    """Lost if it fails: pre-training on a small file dies with a traceback in the middle of some epoch."""
    big = TextLoader(write_text(tmp_path / "books.txt", corpus), context=32)
    held_out, train = (documents_of(big.tokens[s]) for s in ("validation", "train"))
    # All that is held out and very little to train on: from little more than one row's tokens to two rows'.
    for n in range(34, 80, 5):
        ends = itertools.accumulate(len(gpt2_encoding().encode(text)) + 1 for text in train)
        documents = train[: 1 + next(i for i, end in enumerate(ends) if end >= n)]
        folder = tmp_path / str(n)
        folder.mkdir()
        path = write_text(folder / "short.txt", held_out + documents)
        try:
            loader = TextLoader(path, context=32)
        except ValueError as e:
            assert "too few" in str(e) and "\n" not in str(e)
            continue
        for epoch in range(20):
            batches = loader.order("train", 8, epoch)
            assert len(batches) == loader.n_batches("train", 8)
            assert all(len(batch) > 0 for batch in batches)


def test_mistakes_with_plain_text_are_one_line(corpus, tmp_path):
    """Lost if it fails: a wrong path, column or far too short a text ends in a traceback."""
    rows = write_text(tmp_path / "books.parquet", corpus)
    few = write_text(tmp_path / "few.txt", ["one paragraph"])
    for options, told in [
        ({"dataset": str(tmp_path / "none.txt")}, "none.txt"),
        ({"dataset": rows, "text_field": "body"}, "text_field=body"),
        ({"dataset": few}, "few.txt"),
    ]:
        with pytest.raises(ValueError) as e:
            TextLoader(**options)
        assert told in str(e.value) and "\n" not in str(e.value)


# --- the sampled softmax -------------------------------------------------------------------------


def make_sampled(n_sampled, **sizes):
    torch.manual_seed(0)
    model = SampledGPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=301, block_size=64, **sizes)).double()
    model.n_sampled = n_sampled
    return model.train()


@pytest.mark.parametrize("n_sampled", [301, 400])
def test_sampling_all_words_is_the_full_loss(n_sampled):
    """Otherwise --n_sampled trains towards another goal, however many words are drawn."""
    model = make_sampled(n_sampled)
    idx = tokens(2, 20)
    targets = tokens(2, 20, seed=2)
    with torch.no_grad():
        full = F.cross_entropy(model.head(model.hidden(idx)).flatten(0, 1), targets.flatten())
    close(model(idx, targets)[1].double(), full, atol=1e-6)
    close(model.eval()(idx, targets)[1], full)  # an evaluation takes every word


def test_sampled_denominator_is_unbiased(hf, checkpoint):
    """Otherwise training with fewer words is pulled away from what all words would teach."""
    torch.manual_seed(0)
    model = GPT.from_pretrained(checkpoint)
    x = torch.randn(6, 64)
    targets = tokens(6)
    with torch.no_grad():
        full = x @ hf.transformer.wte.weight.T
        draws = []
        for _ in range(400):
            logits, places = sample_softmax(model.lm_head.weight, x, targets, 20)
            close(logits[torch.arange(6), places], full[torch.arange(6), targets], atol=1e-4)
            draws.append(logits.logsumexp(1).exp())
    n = logits.size(1) - len(targets.unique())
    assert len(logits) == 6 and 20 <= n < 20 + 6 and logits.size(1) % 6 == 0  # rounded up to a third of 20
    draws = torch.stack(draws)
    assert (draws.std(0) > 0).all()
    torch.testing.assert_close(draws.mean(0), full.logsumexp(1).exp(), rtol=0.15, atol=0)  # about five sigma


def test_a_batch_that_holds_every_word_can_be_sampled():
    """Otherwise --n_sampled ends in a math error as soon as a batch scores the whole vocabulary."""
    torch.manual_seed(0)
    weight = torch.randn(20, 16, dtype=torch.float64)
    x = torch.randn(20, 16, dtype=torch.float64)
    logits, places = sample_softmax(weight, x, torch.arange(20), 5)
    close(logits, x @ weight.T)
    assert torch.equal(places, torch.arange(20))
