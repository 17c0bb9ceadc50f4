"""Wrong calls of train.py, generate.py and sweep.py: each ends with exit code 2 and one line that names the value and
what to type instead, or works.

python -m pytest tests/program/test_mistakes.py
"""

import json
import os

import pytest
import torch

import generate
import train
from configurator import configure
from model import GPT, GPTConfig
from plumbing.data.records import draw_split
from tools import sweep

TEXTS = [f"film {i} was {'grand' if i % 2 else 'grim'}" for i in range(40)]
LABELS = ["good" if i % 2 else "bad" for i in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small model (base), reviews (rows.jsonl) and a run on them (run)."""
    folder = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)).save_pretrained(str(folder / "base"))
    write(folder / "rows.jsonl", TEXTS, LABELS)
    train.train(configure(flags(folder, "train", "--max_iters=1", f"--out_dir={folder}/run")))
    return folder


def write(path, texts, labels):
    path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in zip(texts, labels)))
    return path


def flags(place, program, *more):
    values = [
        f"--init_from={place}/base",
        f"--dataset={place}/rows.jsonl",
        "--device=cpu",
        "--dtype=float32",
        "--rank=2",
    ]
    values += [
        "--alpha=8",
        "--max_iters=2",
        "--eval_interval=2",
        "--batch_size=8",
        "--template=Review: {text}\\nSentiment: {label}",
        f"--out_dir={place}/out-{program}",
    ]
    if any(flag.startswith("--init_from=resume") for flag in more):
        values = []
    return [*values, *more]


def call(program, argv):
    if program == "train":
        train.train(configure(argv))
    elif program == "generate":
        generate.main(configure(argv, trains=False))
    else:
        sweep.main(configure(argv, cls=sweep.SweepConfig, trains=False))


def refused(capsys, program, argv, words):
    with pytest.raises(SystemExit) as stop:
        call(program, argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert [word for word in words if word not in lines[0]] == [], lines[0]


# Flags that are wrong for every program: the flag, what the line names.
EVERYWHERE = [
    (["--rnak=16"], ["--rnak", "--rank"]),
    (["--frobnicate=1"], ["--frobnicate"]),
    (["--learning-rate-peak"], ["flag"]),
    (["--learningrate=1"], ["--learningrate", "--learning_rate"]),
    (["--eval_only=True"], ["--eval_only", "generate.py"]),
    (["--max-iter=5"], ["max_iter", "--max_iters"]),
    (["--lr=fast"], ["--lr=fast", "number"]),
    (["--lr=-1"], ["lr=-1", "at least 0"]),
    (["--lr=nan"], ["--lr=nan"]),
    (["--lr=inf"], ["--lr=inf"]),
    (["--rank"], ["rank"]),
    (["--rank=many"], ["--rank=many", "integer"]),
    (["--rank=1.5"], ["--rank=1.5", "integer"]),
    (["--rank=-4"], ["rank=-4", "at least 0"]),
    (["--rank=1e400"], ["--rank=1e400"]),
    (["--rank="], ["--rank="]),
    (["--batch_size=0"], ["batch_size=0", "at least 1"]),
    (["--batch_size=-8"], ["batch_size=-8"]),
    (["--max_iters=0"], ["max_iters=0"]),
    (["--dropout=1.5"], ["dropout=1.5", "at most"]),
    (["--dropout=-0.1"], ["dropout=-0.1"]),
    (["--beta2=1"], ["beta2=1"]),
    (["--seed=-1"], ["seed=-1"]),
    (["--seed=1e30"], ["seed=1", "at most"]),
    (["--compile=maybe"], ["--compile=maybe", "True or False"]),
    (["--task=translate"], ["task=translate", "instruct, classify"]),
    (["--loss_on=review"], ["loss_on=review", "label, all"]),
    (["--dtype=float8"], ["dtype=float8", "bfloat16"]),
    (["--dtype=float16"], ["dtype=float16", "--dtype=auto"]),
    (["--split=dev"], ["split=dev", "test, validation, train"]),
    (["--lora_bias=some"], ["lora_bias=some", "lora_only"]),
    (["--temperature=-1"], ["temperature=-1"]),
    (["--top_k=0"], ["top_k=0"]),
    (["--max_new_tokens=0"], ["max_new_tokens=0"]),
    (["rank=16"], ["--rank=16"]),
    (["--train_examples=-1"], ["train_examples=-1", "at least 0"]),
    (["no_such_config.py"], ["no_such_config.py", "configs/"]),
    (["configs/finetune_mini_config.py", "configs/finetune_params_config.py"], ["one config file"]),
    (["configs"], ["configs"]),
]


@pytest.mark.parametrize("program", ["train", "generate", "sweep"])
@pytest.mark.parametrize("argv, words", EVERYWHERE, ids=lambda v: str(v[0]))
def test_a_wrong_flag(place, capsys, program, argv, words):
    """Lost if it fails: a typing error is a traceback, or a run on something else."""
    refused(capsys, program, flags(place, program, *argv), words)
    assert not (place / f"out-{program}").exists()  # nothing was begun


# What is wrong with a run as a whole.
RUNS = [
    ("train", ["--rank=17"], ["rank=17", "from 1 to 16"]),
    ("train", ["--lora_targets=q_proj"], ["q_proj", "c_attn"]),
    ("train", ["--lora_targets=("], ["lora_targets=("]),
    ("train", ["--trainable=no_such"], ["trainable=no_such"]),
    ("train", ["--trainable=["], ["trainable=["]),
    ("train", ["--n_layer=3"], ["n_layer", "tools.pretrain"]),
    ("train", ["--init_from=gpt3"], ["init_from=gpt3", "gpt2-medium"]),
    ("train", ["--init_from=/no/such/model"], ["/no/such/model"]),
    ("train", ["--init_from=resume", "--out_dir=/no/such/run"], ["/no/such/run"]),
    ("train", ["--init_from=resume", "--out_dir={place}/out"], ["no run to resume in", "there are runs in: ", "run"]),
    ("train", ["--device=cuda:99"], ["device=cuda:99", "--device=cpu"]),
    ("train", ["--device=toaster"], ["device=toaster", "--device=cpu"]),
    ("train", ["--dataset=no_such.csv"], ["no_such.csv"]),
    ("train", ["--dataset=./nowhere"], ["./nowhere"]),
    ("train", ["--dataset=configs"], ["dataset=configs", "train"]),
    ("train", ["--text_field=review"], ["text_field=review", "text, label"]),
    ("train", ["--label_field=stars"], ["label_field=stars", "text, label"]),
    ("train", ["--label_names=good,awful"], ["'bad'", "good,awful"]),
    ("train", ["--label_names=good"], ["good"]),
    ("train", ["--label_names=good,good,bad"], ["good,good,bad"]),
    ("train", ["--template={text}"], ["{label}"]),
    ("train", ["--template={label} {text}"], ["last"]),
    ("train", ["--template={text}{label}"], ["space or a line break"]),
    ("train", ["--template={text} {mood} {label}"], ["{mood}"]),
    ("train", ["--template="], ["template="]),
    ("train", ["--template=" + "very " * 80 + "{text} {label}"], ["context of 64"]),
    ("generate", ["--init_from=resume", "--out_dir=/no/such/run"], ["/no/such/run"]),
    ("generate", ["--init_from=gpt3"], ["gpt3"]),
    ("generate", ["--dataset=no_such.csv"], ["no_such.csv"]),
    ("generate", ["--max_new_tokens=40"], ["max_new_tokens=40", "32"]),
    ("generate", ["--task=classify", "--start=A film"], ["no classes"]),
    ("generate", ["--device=cuda:99"], ["device=cuda:99"]),
    ("sweep", ["--ranks=a"], ["ranks=a"]),
    ("sweep", ["--ranks="], ["ranks="]),
    ("sweep", ["--ranks=4,-1"], ["ranks=4,-1"]),
    ("sweep", ["--seeds=1,1"], ["seeds=1,1"]),
    ("sweep", ["--only=everything"], ["everything"]),
    ("sweep", ["--jobs=0"], ["jobs=0"]),
]


@pytest.mark.parametrize("program, argv, words", RUNS, ids=lambda v: v if isinstance(v, str) else str(v[0])[:40])
def test_a_run_that_cannot_be(place, capsys, program, argv, words):
    """Lost if it fails: a run fails late, with a traceback, or not at all."""
    argv = [flag.replace("{place}", str(place)) for flag in argv]
    refused(capsys, program, flags(place, program, *argv), words)
    assert not (place / f"out-{program}").exists()


def test_another_runs_settings_on_resuming(place, capsys):
    """Lost if it fails: a resumed run silently trains, or scores, something else than before."""
    out = f"--out_dir={place}/run"
    for flag in ("--rank=4", "--alpha=9", "--lora_targets=c_fc", "--template={text} {label}", "--task=classify"):
        refused(capsys, "train", ["--init_from=resume", out, flag], [flag.split("=")[0].strip("-"), "another run"])


# Four texts that the seed draws into the training split.
ALL_TRAIN = [t for t in TEXTS if draw_split(t.encode(), 1337, {"validation", "test"}) == "train"][:4]
DATA = {  # texts, labels, and what the line names; None: it works
    "one class": (TEXTS, ["good"] * 40, ["good", "two"]),
    "no rows": ([], [], ["empty"]),
    "no label at all": (TEXTS, [None] * 40, ["label"]),
    "labels as numbers without words": (TEXTS, [i % 2 for i in range(40)], ["--label_names="]),
    "a list as label": (TEXTS, [["good"]] * 40, ["good"]),
    "too few rows for a validation split": (ALL_TRAIN, LABELS[:4], ["validation"]),
    "some labels not a number": (TEXTS, [*LABELS[:38], float("nan"), None], None),
    "empty texts": ([""] * 10 + TEXTS[10:], LABELS, None),
    "very long texts": (["long " * 5000, *TEXTS[1:]], LABELS, None),
    "emoji": (["👍🏽👨‍👩‍👧 " + t for t in TEXTS], LABELS, None),
    "half an emoji": ([t + " \ud83d" for t in TEXTS], LABELS, None),
    "null bytes": (["\0" + t for t in TEXTS], LABELS, None),
    "right to left": (["مرحبا \u200f שלום " + t for t in TEXTS], LABELS, None),
    "CRLF": (["one\r\ntwo\r\n\r\n" + t for t in TEXTS], LABELS, None),
    "braces": (["{text} {label} {} {{0}} %s" + t for t in TEXTS], LABELS, None),
    "labels of which one begins like another": (
        TEXTS,
        ["very good" if v == "good" else "very" for v in LABELS],
        None,
    ),
    "labels with a null byte": (TEXTS, ["a\0b" if v == "good" else "c" for v in LABELS], None),
    "emoji as labels": (TEXTS, ["👍" if v == "good" else "👎" for v in LABELS], None),
    "numbers as texts": ([i + 0.5 for i in range(40)], LABELS, None),
}


@pytest.mark.parametrize("kind", DATA)
def test_odd_data(place, tmp_path, capsys, kind):
    """Lost if it fails: a user's data is garbled, or stops the run without a word of why."""
    texts, labels, words = DATA[kind]
    path = write(tmp_path / "data.jsonl", texts, labels)
    argv = flags(place, "train", f"--dataset={path}", f"--out_dir={tmp_path}/out")
    if words is not None:
        refused(capsys, "train", argv, words)
        return
    call("train", argv)
    call("generate", ["--init_from=resume", f"--out_dir={tmp_path}/out"])
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labelled = [text for text, label in zip(texts, labels) if isinstance(label, str)]
    as_bytes = [str(text).encode("utf-8", "replace") for text in labelled]
    n = sum(draw_split(text, 1337, {"validation", "test"}) == "test" for text in as_bytes)
    assert {row["label"] for row in rows} <= set(map(str, labels)) and len(rows) == n > 0


def test_no_permission_to_write(place, tmp_path, capsys):
    """Lost if it fails: a folder that cannot be written ends in a traceback."""
    tmp_path.chmod(0o500)
    folder = "/sys/kernel" if os.geteuid() == 0 else tmp_path  # where root may not either
    refused(capsys, "train", flags(place, "train", f"--out_dir={folder}/out"), [str(folder)])


def test_a_file_where_the_folder_should_be(place, tmp_path, capsys):
    """Lost if it fails: --out_dir that names a file ends in a traceback."""
    (tmp_path / "out").write_text("a file")
    for program in ("train", "generate"):
        for out in (f"{tmp_path}/out", f"{tmp_path}/out/run"):
            refused(capsys, program, flags(place, program, f"--out_dir={out}"), [str(tmp_path)])
