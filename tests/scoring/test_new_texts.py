"""--predict: labels for new texts, in a program, from and to files of every kind, and through pipes.

python -m pytest tests/scoring/test_new_texts.py
"""

import contextlib
import csv
import functools
import gzip
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import REPO, base_folder
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import generate
from configurator import configure
from generate import ModelSampler
from model import GPT, GPTConfig
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.scoring.answers import score_tokens
from train import train

END = 50256
ENC = gpt2_encoding()
TEMPLATE = "Review: {text}\nSentiment: {label}"
NAMES = ["bad", "good", "good enough"]  # one begins as another does, and has more tokens
ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """transformers' GPT-2, tiny and random, that writes labels now and then, and its directory."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        bias = torch.randn(32) * 0.3
        model.transformer.ln_f.bias.copy_(bias)
        words = [END, *ENC.encode(" bad good enough")]
        model.transformer.wte.weight[words] += 1.3 * bias
        model.transformer.wte.weight[END] += 0.6 * bias  # so that some answers are a label and no more
    directory = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(directory)
    return model, str(directory)


def make_texts(n, seed=1):
    rng = random.Random(seed)
    words = ["film", "dull", "joy", "so", "very", "é", "😀", "plot", '"no"', "a,b", "l'été"]
    return [" ".join(rng.choice(words) for _ in range(1 + rng.randrange(9))) for _ in range(n)]


@torch.no_grad()
def plain_answer(model, template, text, names, n):
    """(what transformers' model writes greedily, each label's share): one text at a time, no cache, no padding; each
    label with the whole prompt before it, in float64."""
    model = model.double()
    prompt = ENC.encode(template.format(text=text, label="").rstrip(" "))
    new = []
    while len(new) < n and END not in new:
        new.append(model(torch.tensor([prompt + new])).logits[0, -1].argmax().item())
    scores = []
    for name in names:
        answer = [*ENC.encode(" " + name), END]
        log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores.append(sum(log_p[place, token].item() for place, token in zip(places, answer)))
    model.float()
    return ENC.decode([token for token in new if token != END]), torch.tensor(scores).softmax(0).tolist()


@pytest.mark.parametrize("template", [TEMPLATE, "{text} => {label}"])
def test_answers_and_shares_are_those_of_plain_passes(tiny, tmp_path, template):
    """Lost if it fails: a share is that of padding, of another prompt's cache, or of a label's first token alone."""
    model, directory = tiny
    settings = {"template": template, "label_names": ",".join(NAMES), "max_new_tokens": 6, "batch_size": 5}
    sampler = ModelSampler(str(tmp_path), init_from=directory, **settings, **ON_CPU)
    texts = make_texts(40)
    answers = sampler.predict(texts)
    assert [answer["text"] for answer in answers] == texts
    predicted = [answer["predicted"] for answer in answers]
    assert len(set(predicted)) >= 2 and predicted.count(None) < 32
    if template == TEMPLATE:
        assert any(answer["generated"][1:] == answer["predicted"] for answer in answers)  # a label and no more
    for text, answer in zip(texts, answers):
        written, shares = plain_answer(model, template, text, NAMES, 6)
        assert answer["generated"] == written
        if answer["predicted"] is not None:
            assert answer["share"] == pytest.approx(shares[NAMES.index(answer["predicted"])], abs=2e-5)
    assert sampler.predict(texts[7:8]) == [pytest.approx(answers[7], abs=2e-6)]  # alone, or among others
    assert sampler.predict([]) == []
    with pytest.raises(ValueError, match="list of texts"):
        sampler.predict("A joy.")


def test_a_label_that_the_answer_has_no_room_for_is_cut(tiny, tmp_path):
    """Lost if it fails: with --max_new_tokens=1 more comes back than the one token that the model may write."""
    settings = {"template": TEMPLATE, "label_names": "bad,good", "max_new_tokens": 6} | ON_CPU
    sampler = ModelSampler(str(tmp_path), init_from=tiny[1], **settings)
    texts = make_texts(60)
    answers = [ENC.encode(answer["generated"]) for answer in sampler.predict(texts)]
    one = ModelSampler(str(tmp_path), init_from=tiny[1], **settings | {"max_new_tokens": 1})
    again = [ENC.encode(answer["generated"]) for answer in one.predict(texts)]
    assert any(len(tokens) > 1 for tokens in answers)
    assert again == [tokens[:1] for tokens in answers]


def test_shares_in_bfloat16_come_from_more_than_its_eight_bits():
    """Lost if it fails: with the real GPT-2, whose logits lie near -100, bfloat16's shares are all 0.5 or 0.62."""

    class Head(GPT):  # a model's head alone
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = GPTConfig()
            self.lm_head = torch.nn.Linear(64, 1000, bias=False)

    torch.manual_seed(0)
    model = Head().requires_grad_(False)
    direction = torch.randn(64)
    model.lm_head.weight += 0.4 * direction
    model = model.bfloat16()
    x = (-4 * direction + torch.randn(20, 64)).bfloat16()
    logits = x.double() @ model.lm_head.weight.double().T
    assert -130 < logits.mean() < -70
    words = torch.tensor([[3, 500]]).expand(20, -1)
    found = score_tokens(model, x, words)
    torch.testing.assert_close(found.double(), logits.log_softmax(-1).gather(1, words), rtol=0, atol=0.15)
    difference = (found[:, 0] - found[:, 1]).double()  # what the share follows from
    torch.testing.assert_close(difference, logits[:, 3] - logits[:, 500], rtol=0, atol=1e-4)


def test_texts_that_are_missing_empty_or_too_long(tiny, tmp_path):
    """Lost if it fails: one such text among thousands ends the whole file with an error, or moves the answers."""
    sampler = ModelSampler(
        str(tmp_path), init_from=tiny[1], template="{text}\n{label}", label_names="bad,good", **ON_CPU
    )
    texts = ["", None, "film " * 500, "half \ud83d", "joy"]
    answers = sampler.predict(texts)
    assert [answer["generated"] is None for answer in answers] == [False, True, False, False, False]
    assert sampler.n_cut == 1
    assert sampler.predict(["joy"])[0] == pytest.approx(answers[4], abs=2e-6)


# --- files ---------------------------------------------------------------------------------------


def predict(directory, out_dir, path, *flags):
    names = f"--label_names={','.join(NAMES)}"
    argv = [f"--init_from={directory}", f"--out_dir={out_dir}", f"--predict={path}", names, *flags]
    generate.main(configure([f"--template={TEMPLATE}", "--device=cpu", "--dtype=float32", *argv], trains=False))


def table(n):
    """Columns of several types: what pandas writes of them must come back as it was."""
    stamps = pd.to_datetime("2024-02-28") + pd.to_timedelta(np.arange(n), "D")
    columns = {"id": np.arange(n) * 10**15, "review": make_texts(n), "stars": np.arange(n) / 7, "when": stamps}
    return pd.DataFrame(columns | {"kind": pd.Categorical(["new", "old, again"] * (n // 2))})


WRITE = {
    "csv": lambda data, path: data.to_csv(path, index=False),
    "semicolon.csv": lambda data, path: data.to_csv(path, index=False, sep=";"),
    "excel.csv": lambda data, path: data.to_csv(path, index=False, encoding="utf-8-sig"),
    "csv.gz": lambda data, path: data.to_csv(path, index=False),
    "tsv": lambda data, path: data.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda data, path: data.to_json(path, orient="records", lines=True, date_format="iso"),
    "parquet": lambda data, path: data.to_parquet(path),
}


def read(path):
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    if kind == ".jsonl":
        return pd.read_json(path, orient="records", lines=True)
    if kind == ".parquet":
        return pd.read_parquet(path)
    return pd.read_csv(path, sep=";" if "semicolon" in path else "\t" if kind == ".tsv" else ",")


@functools.cache
def predict_texts(directory, *texts):
    options = {"template": TEMPLATE, "label_names": ",".join(NAMES)}
    return ModelSampler("out", init_from=directory, **options, **ON_CPU).predict(list(texts))


@pytest.mark.parametrize("name", WRITE)
def test_a_file_comes_back_with_its_own_columns_and_the_answers(tiny, tmp_path, name):
    """Lost if it fails: the answers belong to other rows, or a column of the user's is changed or gone."""
    path = str(tmp_path / f"new.{name}")
    WRITE[name](table(110 if name in ("csv", "parquet") else 60), path)
    predict(tiny[1], tmp_path / "out", path, "--text_field=review", "--batch_size=2")  # a hundred rows at a time
    (target,) = (tmp_path / "out" / "untuned").iterdir()
    root, kind = os.path.splitext(f"new.{name}".removesuffix(".gz"))
    assert target.name == f"{root}-predicted{kind}"
    found = read(str(target))
    pd.testing.assert_frame_equal(found[list(table(2))], read(path))
    assert list(found) == [*table(2), "predicted", "generated", "share"]
    expected = pd.DataFrame(predict_texts(tiny[1], *found["review"]))
    assert (found["predicted"].fillna("-") == expected["predicted"].fillna("-")).all()
    assert found["predicted"].nunique() == 3
    np.testing.assert_allclose(found["share"], expected["share"].astype(float), atol=2e-6)
    with open(target, "rb") as f:
        assert f.read(3).startswith(b"\xef\xbb\xbf") == (name == "excel.csv")  # Excel reads UTF-8 by this mark alone


def test_lines_of_text_and_rows_without_one(tiny, tmp_path, capsys):
    """Lost if it fails: a blank line or an empty cell shifts all answers after it, or is answered itself."""
    (tmp_path / "lines.txt").write_text("a joy\n\nso dull\n", encoding="utf-16")
    (tmp_path / "cells.csv").write_text("text,n\na joy,1\n,2\nso dull,3\n")
    for name in ("lines.txt", "cells.csv"):
        predict(tiny[1], tmp_path, tmp_path / name)
    assert capsys.readouterr().out.count("no text 1") == 2
    lines = (tmp_path / "untuned" / "lines-predicted.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == ["a joy", None, "so dull"]
    assert [row["generated"] is None for row in rows] == [False, True, False]
    cells = pd.read_csv(tmp_path / "untuned" / "cells-predicted.csv")
    assert list(cells["n"]) == [1, 2, 3] and list(cells["generated"].isna()) == [False, True, False]
    assert cells["generated"][2] == rows[2]["generated"]


def test_texts_with_any_line_break_come_back(tiny, tmp_path):
    """Lost if it fails: a text with a lone carriage return is written without quotes, and the file falls apart."""
    texts = ["a\rb", "a\nb", "a\r\nb", "c", 'say "no", or', " d "]
    for end in ("\n", "\r\n"):
        path = tmp_path / "new.csv"
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, quoting=csv.QUOTE_ALL, lineterminator=end)
            writer.writerows([["text", "n"], *([text, i] for i, text in enumerate(texts))])
        predict(tiny[1], tmp_path, path)
        with open(tmp_path / "untuned" / "new-predicted.csv", newline="", encoding="utf-8") as f:
            content = f.read()
        rows = list(csv.reader(io.StringIO(content, newline="")))
        assert rows[0] == ["text", "n", "predicted", "generated", "share"] and {len(row) for row in rows} == {5}
        assert [row[:2] for row in rows[1:]] == [[text, str(i)] for i, text in enumerate(texts)]
        assert content.partition("share")[2].startswith(end)  # and its own line ends


def test_excels_first_line_comes_back(tiny, tmp_path):
    """Lost if it fails: a csv that Excel opens is refused, or comes back as one that Excel shows in one column."""
    (tmp_path / "new.csv").write_bytes(b"sep=;\r\ntext;n\r\nso, so;1\r\n")
    predict(tiny[1], tmp_path, tmp_path / "new.csv")
    lines = (tmp_path / "untuned" / "new-predicted.csv").read_bytes().split(b"\r\n")
    assert lines[:2] == [b"sep=;", b"text;n;predicted;generated;share"] and lines[2].startswith(b"so, so;1;")


def test_a_row_with_nothing_in_it_comes_back(tiny, tmp_path):
    """Lost if it fails: the answers after it stand beside other lines than those of the user's file."""
    (tmp_path / "new.jsonl").write_text('{"text": "a joy", "n": 1}\n{}\n{"text": null}\n{"text": "dull", "n": 4}\n')
    predict(tiny[1], tmp_path, tmp_path / "new.jsonl")
    lines = (tmp_path / "untuned" / "new-predicted.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row.get("n") for row in rows] == [1, None, None, 4]
    assert [row["generated"] is None for row in rows] == [False, True, True, False]
    predict(tiny[1], tmp_path, tmp_path / "new.jsonl")  # the same again


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_the_answers_to_another_file_stay(tiny, tmp_path, capsys, kind):
    """Lost if it fails: reviews.csv of a second folder overwrites what was answered to that of the first."""
    for folder, texts in (("a", make_texts(5, 1)), ("b", make_texts(5, 2))):
        (tmp_path / folder).mkdir()
        data = pd.DataFrame({"text": texts})
        path = tmp_path / folder / f"r.{kind}"
        path.write_text("\n".join(texts) + "\n") if kind == "txt" else WRITE[kind](data, path)
    predict(tiny[1], tmp_path, tmp_path / "a" / f"r.{kind}")
    (target,) = (tmp_path / "untuned").iterdir()
    before = target.read_bytes()
    with pytest.raises(SystemExit) as stop:
        capsys.readouterr()
        predict(tiny[1], tmp_path, tmp_path / "b" / f"r.{kind}")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(target) in err and "--out_dir" in err
    assert target.read_bytes() == before
    predict(tiny[1], tmp_path, tmp_path / "a" / f"r.{kind}")  # the same again
    assert target.read_bytes() == before
    # Some of the texts: the answers to the others would be lost. All of them and more: none is lost.
    for n, stays in ((3, True), (7, False)):
        texts = [*make_texts(5, 1), "more", "and more"][:n]
        path = tmp_path / "b" / f"r.{kind}"
        path.write_text("\n".join(texts) + "\n") if kind == "txt" else WRITE[kind](
            pd.DataFrame({"text": texts}), path
        )
        with pytest.raises(SystemExit) if stays else contextlib.nullcontext():
            predict(tiny[1], tmp_path, path)
        assert (target.read_bytes() == before) == stays


def run(*flags, stdin="", **options):
    command = [sys.executable, "generate.py", *flags, "--device=cpu", "--dtype=float32"]
    options = {"capture_output": True, "cwd": REPO, "timeout": 300} | options
    return subprocess.run(command, input=stdin.encode("utf-8"), **options)


def test_standard_input_to_standard_output(tiny, tmp_path):
    """Lost if it fails: between two pipes something else than the answers is printed, or another encoding."""
    flags = [f"--init_from={tiny[1]}", f"--template={TEMPLATE}", "--label_names=bad,good", f"--out_dir={tmp_path}"]
    for encoding in ("utf-8", "cp1252"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = run(*flags, "--predict=-", stdin="l'été 😀\r\nso dull", env=environment)
        assert done.returncode == 0, done.stderr.decode()
        rows = [json.loads(line) for line in done.stdout.decode(encoding).splitlines()]
        assert [row["text"] for row in rows] == ["l'été 😀", "so dull"]
        assert all(row.keys() == {"text", "predicted", "generated", "share"} for row in rows)


# --- a run needs no data set ---------------------------------------------------------------------


def write_messages(path):
    words = {"ham": "lunch", "news, local": "minister", "spam": "prize"}
    rows = []
    for i in range(60):
        label = list(words)[i % 3]
        rows.append({"text": f"call me {i} {words[label]}", "label": label, "split": "train" if i < 48 else "test"})
    pd.DataFrame(rows).to_csv(path, index=False)
    return [row["text"] for row in rows]


@pytest.mark.parametrize("task", ["instruct", "classify"])
def test_a_run_answers_new_texts_without_its_data(tmp_path_factory, task, capsys):
    """Lost if it fails: a model that is passed on, or whose data has gone, can be used by nobody."""
    folder = base_folder(tmp_path_factory, task)
    texts = write_messages(folder / "data.csv")
    out = str(folder / "out")
    settings = {"task": task, "init_from": folder / "base", "dataset": folder / "data.csv", "out_dir": out}
    settings |= {"template": TEMPLATE, "rank": 0, "lr": 0.01, "max_iters": 30, "eval_interval": 30, "batch_size": 16}
    train(configure([f"--{key}={value}" for key, value in (settings | ON_CPU).items()]))
    os.remove(folder / "data.csv")
    answers = ModelSampler(out, **ON_CPU).predict(texts)
    assert {answer["predicted"] for answer in answers} <= {"ham", "news, local", "spam", None}
    if task == "classify":
        theirs = GPT2ForSequenceClassification.from_pretrained(out, pad_token_id=END).eval()
        for text, answer in zip(texts, answers):
            with torch.no_grad():
                shares = theirs(torch.tensor([ENC.encode(text)])).logits[0].softmax(-1)
            assert answer["predicted"] == ["ham", "news, local", "spam"][shares.argmax()] == answer["generated"]
            assert answer["share"] == pytest.approx(shares.max().item(), abs=1e-5)
    (folder / "new.txt").write_text("\n".join(texts))
    generate.main(
        configure(["--init_from=resume", f"--out_dir={out}", f"--predict={folder / 'new.txt'}"], trains=False)
    )
    with open(os.path.join(out, "new-predicted.jsonl"), encoding="utf-8") as f:
        assert len(f.readlines()) == len(texts)
    # The file is not a setting of the run: the next call scores again.
    assert configure(["--init_from=resume", f"--out_dir={out}"], trains=False).predict is None


# --- mistakes ------------------------------------------------------------------------------------


def twice(column):
    columns = [pa.array(["a joy"])] * 3
    return pa.Table.from_arrays(columns, names=["text", column, "n" if column == "n" else "m"])


def save(folder, name, content):
    path = folder / name
    if isinstance(content, pa.Table):
        pa.parquet.write_table(content, path)
    elif isinstance(content, pd.DataFrame):
        content.to_parquet(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.csv", None, ["gone.csv", "no such file"]),
        ("new.pdf", b"%PDF", ["new.pdf", "csv, tsv, jsonl, parquet, txt"]),
        ("new.csv", b"review\na joy\n", ["text_field=text", "review"]),
        ("new.csv", b"text\n", ["new.csv", "empty"]),
        ("new.csv", b"text,n\na joy,1\nslow,long,2\n", ["new.csv, line 3"]),
        ("new.csv", b"text,n,n\na joy,1,1\n", ["new.csv", "n stands 2 times"]),
        ("new.csv", b"text,share\na joy,1\n", ["new.csv, line 2", "share"]),
        ("new.csv", b"text\nl'\xe9t\xe9\n", ["new.csv, line 2", "iconv"]),
        ("new.txt", b"a joy\nl'\xe9t\xe9\n", ["new.txt, line 2", "iconv"]),
        ("new.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', ["new.jsonl, line 2", "text_field"]),
        ("new.jsonl", b'{"text": "a"}\n{"text": "b", "n": 1, "n": 2}\n', ["new.jsonl, line 2", "twice"]),
        ("new.jsonl", b'{"text": "a"}\n{"review": "b"}\n', ["new.jsonl, line 2", "text_field=text"]),
        ("new.parquet", b"PAR1 and no more", ["new.parquet", "damaged"]),
        ("new.parquet", pd.DataFrame({"review": ["a"]}), ["text_field=text", "review"]),
        ("new.parquet", twice("text"), ["new.parquet", "text stands 2 times"]),
        ("new.parquet", twice("n"), ["new.parquet", "n stands 2 times"]),
        ("new.parquet", pd.DataFrame({"text": [["a"]]}), ["new.parquet", "text_field"]),
        ("new.parquet", pd.DataFrame({"text": ["a"], "predicted": ["b"]}), ["new.parquet", "predicted"]),
        ("new.txt.gz", gzip.compress(b"a joy\n" * 9, mtime=0)[:20], ["new.txt.gz", "damaged"]),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(tiny, tmp_path, capsys, monkeypatch, name, content, words):
    """Lost if it fails: a file's last row ends an hour of answers, or a mistake ends in a traceback."""
    path = tmp_path / name if content is None else save(tmp_path, name, content)
    monkeypatch.setattr(generate, "open_model", None)  # not reached
    with pytest.raises(SystemExit) as stop:
        predict(tiny[1], tmp_path / "out", path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in words if word not in err] == [], err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [(["--start=A"], ["--start"])])
def test_flags_that_do_not_go_together(tiny, tmp_path, capsys, flags, words):
    """Lost if it fails: one of two flags is passed over without a word."""
    (tmp_path / "new.txt").write_text("a joy\n")
    with pytest.raises(SystemExit) as stop:
        predict(tiny[1], tmp_path / "out", tmp_path / "new.txt", *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert [word for word in words if word not in err] == []


def test_training_predicts_nothing(capsys):
    """Lost if it fails: whoever types --predict after train.py waits for a training and then finds no answers."""
    with pytest.raises(SystemExit) as stop:
        train(configure(["--predict=new.csv"]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "generate.py" in err and err.count("\n") == 1
