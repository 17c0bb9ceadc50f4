"""Random settings, records and templates through the configurator and the data loader: what goes in as text comes
out as text, the label is the last thing scored, nothing is lost or doubled.

python -m pytest tests/test_any_input.py
"""

import hashlib
import json
import string
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from configurator import Config, configure
from dataloader import CustomDataLoader
from plumbing.data.tokenizer import end_of_text, find_shared_head, gpt2_encoding, start_encoding
from plumbing.gpt2.batch import IGNORE
from plumbing.program.settings import fields_of

# The same examples each time, so that a red test is of the change that made it; other ones without derandomize.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)  # half an emoji has tests of its own
WORD = st.text(string.ascii_letters + "éß中 -", min_size=1, max_size=12).map(str.strip).filter(bool)
HINTS = typing.get_type_hints(Config)
FIELDS = fields_of(Config)


def values(key):
    """A strategy of the values that a key may have, as a user types them."""
    kinds = typing.get_args(HINTS[key]) or (HINTS[key],)
    rules = FIELDS[key].metadata
    low = -1e12 if rules.get("least") is None else rules["least"]
    high = 1e12 if rules.get("most") is None else rules["most"]
    if rules.get("one_of"):
        return st.sampled_from(rules["one_of"])
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        return st.integers(int(low), int(high))
    if float in kinds:
        return st.floats(low, high, allow_nan=False)
    return TEXT.filter(lambda text: text not in ("None", "none", "resume", "") and text[0] not in "\"'")


KEYS = st.sampled_from(list(FIELDS))


@settings(**COMMON, max_examples=150)
@given(st.dictionaries(KEYS, st.none()).flatmap(lambda d: st.fixed_dictionaries({k: values(k) for k in d})))
def test_any_settings_come_through_flags_and_files(tmp_path_factory, chosen):
    """Lost if it fails: a run is another than the one that was asked for."""
    typed = [f"--{key}={value}" for key, value in chosen.items()]
    path = tmp_path_factory.mktemp("config") / "any_config.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in chosen.items()), encoding="utf-8")
    for argv in (typed, [str(path)]):
        config = configure(argv)
        assert {key: getattr(config, key) for key in chosen} == chosen


@settings(**COMMON, max_examples=150)
@given(st.text(max_size=200))
def test_any_config_file_is_read_or_refused_in_one_line(tmp_path_factory, content):
    """Lost if it fails: a file with a slip in it ends in a traceback."""
    path = tmp_path_factory.mktemp("config") / "any_config.py"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    try:
        configure([str(path)])
    except SystemExit as e:
        assert e.code == 2


def write(path, records, kind):
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(records), path)


@settings(**COMMON, max_examples=120)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=40),
    words=st.lists(WORD, min_size=2, max_size=4, unique=True),
    head=TEXT,
    tail=TEXT,
    gap=st.sampled_from([" ", "\n", ": ", " ->\n\n"]),
    kind=st.sampled_from(["jsonl", "parquet"]),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    data=st.data(),
)
def test_any_records_and_template(tmp_path_factory, texts, words, head, tail, gap, kind, size, world, data):
    """Lost if it fails: a text is changed on its way, more than the label is scored, or an example is trained
    on twice or never."""
    assume("{" not in head + tail and "}" not in head + tail)
    folder = tmp_path_factory.mktemp("data")
    labels = [words[i % len(words)] for i in range(len(texts))]
    records = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.{kind}", records, kind)
    template, encoding = head + "{text}" + tail + gap + "{label}", gpt2_encoding()
    options = {"template": template, "batch_size": size, "label_names": ",".join(words)}
    try:
        loader = CustomDataLoader(str(folder), **options, block_size=512)
    except ValueError as e:
        assert "put a space or a line break before" in str(e) or "at least two different words" in str(e)
        return
    examples = loader.splits["train"]
    assert len(examples) == len(texts)
    for ex, text, label in zip(examples, texts, labels):
        filled = head + text + tail + gap + label
        assert (ex.text, loader.label_names[ex.label]) == (text, label)
        begin = [end_of_text()] * (ex.tokens[0] == end_of_text())  # where nothing stands before the label
        assert ex.tokens == [*begin, *encoding.encode_ordinary(filled), end_of_text()] and ex.n_prompt > 0
        scored = encoding.decode(ex.tokens[ex.n_prompt : -1])
        assert scored.endswith(label) and scored.removesuffix(label).strip() == ""
        assert filled.endswith(scored)
    epoch = data.draw(st.integers(0, 1000))
    order = loader.order("train", size, epoch)
    seen = Counter(int(i) for batch in order for rank in range(world) for i in batch[rank::world])
    assert seen == Counter(range(len(texts)))
    for indices in order:
        batch = loader.batch("train", indices)
        for row, target, i in zip(batch.idx, batch.targets, indices):
            n, first = len(examples[i].tokens) - 1, examples[i].n_prompt - 1
            whole = [*batch.prefix[0].tolist(), *row.tolist()][:n]
            assert whole == examples[i].tokens[:-1]
            at = (target != IGNORE).nonzero().flatten() + batch.prefix.size(1)
            assert at.tolist() == list(range(first, n))
            assert target[target != IGNORE].tolist() == examples[i].tokens[first + 1 :]
    again = CustomDataLoader(str(folder), **options, block_size=512)  # from the cache, as a resumed run
    stop = data.draw(st.integers(0, len(order)))
    resumed = [*order[:stop], *again.order("train", size, epoch)[stop:]]
    assert [b.tolist() for b in resumed] == [b.tolist() for b in order]
    assert again.splits["train"][:] == examples[:]


@settings(**COMMON, max_examples=60)
@given(texts=st.lists(TEXT, min_size=30, max_size=60), ratio=st.integers(2, 5), seed=st.integers(0, 2**32))
def test_one_file_is_split_with_nothing_lost(tmp_path_factory, texts, ratio, seed):
    """Lost if it fails: rows vanish between the splits, or stand in two, and the score is of texts trained on; or a
    small file ends in a traceback."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"{i} {text}", "label": "yes" if i % ratio else "no"} for i, text in enumerate(texts)]
    write(path, rows, "jsonl")
    # Each text is thrown by itself: the plain reference for its split.
    expected = {"train": [], "validation": [], "test": []}
    for row in rows:
        share = int(hashlib.sha256(f"{seed} {row['text']}".encode()).hexdigest()[:16], 16) / 16**16
        expected["train" if share < 0.8 else "validation" if share < 0.9 else "test"].append(row["text"])
    try:
        loader = CustomDataLoader(str(path), seed=seed, wanted=("train", "validation", "test"))
    except ValueError as e:
        assert [] in expected.values() and "too few" in str(e) and "\n" not in str(e)
        return
    assert {split: [ex.text for ex in examples] for split, examples in loader.splits.items()} == expected


@pytest.mark.parametrize("depth", [50, 600, 5000])
def test_a_deeply_nested_config_is_no_traceback(tmp_path, capsys, depth):
    """Lost if it fails: a file made to break the reader does."""
    path = tmp_path / "nested_config.py"
    path.write_text("rank = " + "-" * depth + "8")
    try:
        assert configure([str(path)]).rank == 8
    except SystemExit as e:
        assert e.code == 2 and capsys.readouterr().err.count("\n") == 1


HEAD = st.text(st.sampled_from("ab 's\n.:é1"), max_size=20)


@settings(**COMMON, max_examples=500)
@given(HEAD, st.lists(HEAD | TEXT | st.just("a<|endoftext|>b"), min_size=1, max_size=5))
def test_a_head_that_texts_share_changes_no_token(head, rests):
    """Lost if it fails: a template's first words, tokenised once for all rows, make other tokens than in each row."""
    texts = [head + rest for rest in rests]
    with ThreadPoolExecutor(2) as pool:
        ids, lengths = map(np.concatenate, zip(*(future.result() for future in start_encoding(texts, pool))))
    ends = np.cumsum(lengths + 1)
    assert (ids[ends - 1] == gpt2_encoding().eot_token).all() and len(ids) == ends[-1]
    tokens = [ids[end - 1 - n : end - 1].tolist() for end, n in zip(ends, lengths)]
    assert tokens == [gpt2_encoding().encode_ordinary(text) for text in texts]


def test_a_template_has_a_shared_head():
    """Lost if it fails: large data takes a third longer to tokenise."""
    texts = [f"Is this review good or bad?\n\nReview: {text}" for text in ("A joy.", "Dull.", "")]
    assert texts[0][: find_shared_head(texts)] == "Is this review good or"
