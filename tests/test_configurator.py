"""Flags and config files: what users type becomes the values they mean, and a mistake one line.

python -m pytest tests/test_configurator.py
"""

import ast
import dataclasses
import glob
import io
import json
import os
import re
import tokenize
import typing

import pytest
from conftest import REPO, finish, start

import configurator
from configurator import Config, configure, make_config
from plumbing.program.errors import UserError
from plumbing.program.settings import ALIASES, HINTS, MODEL, fields_of, setting, settings_of
from plumbing.program.stored_run import write_run

FIELDS = {name: field.default for name, field in fields_of(Config).items()}


def told(capsys, *argv, **options):
    """The line that a mistake ends in: exit code 2, nothing else on either stream."""
    with pytest.raises(SystemExit) as e:
        configure([str(word) for word in argv], **options)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def config_file(tmp_path, text, name="my_config.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- flags ---------------------------------------------------------------------------------------


def test_nothing_typed_gives_the_defaults():
    """Lost if it fails: a plain `python train.py` does something else than --help says."""
    assert settings_of(configure([])) == FIELDS


@pytest.mark.parametrize(
    "typed, key, value",
    [
        ("--init_from=gpt2", "init_from", "gpt2"),
        ("--init-from=gpt2", "init_from", "gpt2"),
        ("--out_dir=out-7", "out_dir", "out-7"),
        ('--out_dir="out 7"', "out_dir", "out 7"),
        ("--out_dir='out'", "out_dir", "out"),
        ("--out-dir=x", "out_dir", "x"),
        ("--rank=8", "rank", 8),
        ('--rank="8"', "rank", 8),
        ("--rank=0", "rank", 0),
        ("--lora_rank=8", "rank", 8),
        ("--lora-rank=8", "rank", 8),
        ("--alpha=128", "alpha", 128.0),
        ("--lora_alpha=12.5", "alpha", 12.5),
        ("--lora_dropout=0.05", "dropout", 0.05),
        ("--dropout=0", "dropout", 0.0),
        ("--lr=5e-4", "lr", 0.0005),
        ("--learning_rate=1e-4", "lr", 0.0001),
        ("--learning-rate=1e-4", "lr", 0.0001),
        ("--train_examples=500", "train_examples", 500),
        ("--max_iters=100", "max_iters", 100),
        ("--max_iters=1e3", "max_iters", 1000),
        ("--wandb_run_name=first", "wandb_run_name", "first"),
        ("--wandb_run_name=None", "wandb_run_name", None),
        ("--wandb_log=True", "wandb_log", True),
        ("--wandb_log=true", "wandb_log", True),
        ("--compile=False", "compile", False),
        ("--device=cuda:1", "device", "cuda:1"),
        ("--max_new_tokens=7", "max_new_tokens", 7),
        ("--max_new_tokens=None", "max_new_tokens", None),
        ("--temperature=0.8", "temperature", 0.8),
        ("--top_k=200", "top_k", 200),
        ("--label_names=bad,very good", "label_names", "bad,very good"),
        ("--template={text} => {label}", "template", "{text} => {label}"),
        ("--start=a = b", "start", "a = b"),
        ("--start=it's", "start", "it's"),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_flag_means_its_value(typed, key, value, apart):
    """Lost if it fails: a flag from a user's script sets another value, or none."""
    config = configure(typed.split("=", 1) if apart else [typed])
    found = getattr(config, key)
    assert found == value and type(found) is type(value)
    assert settings_of(config) | {key: None} == FIELDS | {key: None}


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_a_flag(key):
    """Lost if it fails: a key that stands in --help cannot be set."""
    kind = typing.get_type_hints(Config)[key]
    kinds = typing.get_args(kind) or (kind,)
    value = True if bool in kinds else 3 if int in kinds else 0.5 if float in kinds else None
    if value is None:
        value = (fields_of(Config)[key].metadata.get("one_of") or ("words",))[-1]
    assert getattr(configure([f"--{key}={value}"]), key) == value
    assert getattr(configure([f"--{key.replace('_', '-')}", str(value)]), key) == value


def test_a_switch_needs_no_value():
    """Lost if it fails: `--wandb_log` alone, as many type it, is an error or stays off."""
    config = configure(["--wandb_log", "--compile", "--rank=8", "--alpha=1"])
    assert config.wandb_log is True and config.compile is True and config.rank == 8


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--rnak=8"], ["--rnak", "--rank"]),
        (["--max_iter", "8"], ["--max_iter", "--max_iters"]),
        (["--lora-rnk=8"], ["--lora_rnk", "--lora_rank"]),
        (["--learning=8"], ["--learning"]),
        (["--ran=8"], ["--ran", "--rank"]),  # not silently taken for the longer flag
        (["--rank=x"], ["--rank=x", "integer"]),
        (["--rank=1.5"], ["--rank=1.5", "integer"]),
        (["--rank="], ["--rank=", "integer"]),
        (["--rank"], ["--rank"]),
        (["--lora_rank=x"], ["rank=x", "integer"]),
        (["--max_iters=1e400"], ["--max_iters=1e400", "integer"]),
        (["--lr=fast"], ["--lr=fast", "number"]),
        (["--lr=nan"], ["--lr=nan", "number"]),
        (["--lr=inf"], ["--lr=inf", "number"]),
        (["--compile=maybe"], ["--compile=maybe", "True or False"]),
        (["--rank=None"], ["--rank=None", "integer"]),
        (["--rank=-1"], ["rank=-1", "at least 0"]),
        (["--lr", "-1"], ["lr=-1", "at least 0"]),
        (["--dropout=1"], ["dropout=1", "at most"]),
        (["--batch_size=0"], ["batch_size=0", "at least 1"]),
        (["--max_iters=0"], ["max_iters=0", "at least 1"]),
        (["--top_k=0"], ["top_k=0", "at least 1"]),
        (["--temperature=-0.1"], ["temperature=-0.1", "at least 0"]),
        (["--split=tset"], ["split=tset", "test, validation, train"]),
        (["--loss_on=labels"], ["loss_on=labels", "label, all"]),
        (["--task=finetune"], ["task=finetune", "instruct, classify"]),
        (["--dtype=fp16"], ["dtype=fp16", "float16"]),
        (["no_such_file.py"], ["no_such_file.py", "configs/"]),
        (["configs/a.py", "configs/b.py"], ["configs/b.py", "one config file"]),
        (["rank=8"], ["--rank=8"]),  # the dashes forgotten
        (["--train_examples=-1"], ["train_examples=-1", "at least 0"]),
        (["--r=8"], ["unknown flag --r:", "--rank"]),
        (["--eval_only=True"], ["--eval_only", "generate.py"]),
        (["--resume=True"], ["--resume"]),  # no key of its own
    ],
)
def test_a_mistyped_flag_is_one_line_that_names_it(capsys, argv, words):
    """Lost if it fails: a typing mistake trains with a default, or prints a traceback."""
    line = told(capsys, *argv)
    assert [word for word in words if word not in line] == []


def test_a_real_program_ends_with_code_2_and_no_traceback(tmp_path):
    """Lost if it fails: a script around a run cannot tell a mistake from a result."""
    program = start("-c", "import sys, configurator; configurator.configure(sys.argv[1:])", "--lrr=1")
    assert finish(program, code=2) == ("", "error: unknown flag --lrr: did you mean --lr?\n")


# --- config files --------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    """Lost if it fails: a run has another rank or learning rate than was typed."""
    path = config_file(tmp_path, '"""A docstring."""\nrank = 4  # a comment\nlr = 3e-3\nalpha = 8.0\n')
    for argv in ([path, "--lr=1e-5"], ["--lr", "1e-5", path]):
        config = configure(argv)
        assert (config.rank, config.alpha, config.lr) == (4, 8.0, 1e-5)
        assert config.batch_size == FIELDS["batch_size"]


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("rank = 4 * 128", "rank", 512),
        ("max_iters = (10 + 2) * 3 - 4", "max_iters", 32),
        ("lr = 1 / 4", "lr", 0.25),
        ("seed = -3 + 5", "seed", 2),
        ("lr = 1", "lr", 1.0),
        ("max_iters = 1e3", "max_iters", 1000),
        ("max_iters = 8 / 2", "max_iters", 4),
        ("max_iters = 2_000", "max_iters", 2000),
        ("lora_rank = 8", "rank", 8),
        ("learning_rate = 1e-4", "lr", 0.0001),
        ("compile = True", "compile", True),
        ("label_names = None", "label_names", None),
        ("label_names = 'a,b'", "label_names", "a,b"),
        ('template = """Two\nlines: {text} {label}"""', "template", "Two\nlines: {text} {label}"),
        ("rank = 3\nrank = 5", "rank", 5),
    ],
)
def test_a_line_of_a_config_file_means_its_value(tmp_path, line, key, value):
    """Lost if it fails: nanoGPT's config files, with their arithmetic, are read as something else."""
    found = getattr(configure([config_file(tmp_path, line)]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "line, words",
    [
        ("rnak = 3", ["rnak", "rank"]),
        ("rank = 'x'", ["rank", "'x'", "int"]),
        ("rank = True", ["rank", "True", "int"]),
        ("max_iters = 1.5", ["max_iters", "1.5", "int"]),
        ("out_dir = 3", ["out_dir", "3", "str"]),
        ("lr = '1e-3'", ["lr", "'1e-3'", "float"]),
        ("rank = None", ["rank", "None", "int"]),
        ("rank = -2", ["rank=-2", "at least 0"]),
        ("rank = 8 / 0", ["zero"]),
        ("rank = 'a' * 3", ["'a'"]),
        ("max_iters = 1e999", ["max_iters"]),
        ("lr = 1e308 * 10", ["lr"]),
        ("split = 'tset'", ["split=tset"]),
        ("rank = alpha", ["my_config.py:1"]),
        ("rank: int = 3", ["my_config.py:1", "plain assignments"]),
        ("rank = alpha = 3", ["my_config.py:1", "plain assignments"]),
        ("rank, alpha = 3, 4", ["my_config.py:1", "plain assignments"]),
        ("\n\nrank += 3", ["my_config.py:3", "plain assignments"]),
        ("rank = (3", ["my_config.py"]),
        ("rank = 3\0", ["my_config.py"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_names_it(tmp_path, capsys, line, words):
    """Lost if it fails: a wrong line in a config file is trained with, or prints a traceback."""
    error = told(capsys, config_file(tmp_path, line))
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize(
    "text",
    [
        "open(MARK, 'w').close()",
        "rank = open(MARK, 'w').close() or 8",
        "rank = 8 if open(MARK, 'w') else 4",
        "rank = [open(MARK, 'w')][0] or 8",
        "rank = 3 * len(open(MARK, 'w').name)",
        "out_dir = f'{open(MARK, \"w\")}'",
        "rank = (made := open(MARK, 'w')) and 8",
        "rank = (lambda: open(MARK, 'w'))()",
        "import os\nos.mkdir(MARK)",
        "rank = __import__('os').mkdir(MARK)",
        "if True:\n    open(MARK, 'w')",
        "def rank(x=open(MARK, 'w')): pass",
        "class rank: made = open(MARK, 'w')",
        "exec('open(MARK, \"w\")')",
        "rank = 8\n@open(MARK, 'w')\ndef f(): pass",
    ],
)
def test_a_config_file_is_never_executed(tmp_path, capsys, text):
    """Lost if it fails: someone else's config file runs their code on the user's machine."""
    mark = tmp_path / "made"
    told(capsys, config_file(tmp_path, text.replace("MARK", repr(str(mark)))))
    assert not mark.exists()


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(REPO, "configs", "*.py"))))
def test_configs_that_ship_are_read_as_python_reads_them(path):
    """Lost if it fails: the first command of the README stops with an error, or runs with other values."""
    values = {}
    with open(path, encoding="utf-8") as f:
        exec(f.read(), {}, values)  # our own files, and what exec makes of them is the reference
    config = configure([path])
    assert values and {key: getattr(config, key) for key in values} == values


# What a run was that named nothing, before the defaults became the assignment's. The other configs still are on it.
OLD = {
    "init_from": "gpt2-mini",
    "rank": 16,
    "alpha": 64.0,
    "rslora": False,
    "dropout": 0.0,
    "lora_targets": r"attn\.c_(attn|proj)$",
    "lora_bias": "none",
    "trainable": None,
    "task": "instruct",
    "dataset": "rt_reviews",
    "text_field": "text",
    "label_field": "label",
    "label_names": None,
    "template": "Review: {text}\nSentiment: {label}",
    "loss_on": "label",
    "train_examples": 0,
    "held_out": 0.0,
    "balance_classes": False,
    "out_dir": "out",
    "auto_resume": False,
    "batch_size": 32,
    "gradient_accumulation_steps": 1,
    "max_iters": 500,
    "lr": 1e-3,
    "lora_plus": 1.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.99,
    "grad_clip": 1.0,
    "warmup_iters": 20,
    "decay_share": 0.9,
    "eval_interval": 50,
    "eval_iters": 0,
    "save_interval": 0,
    "seed": 1337,
    "compile": False,
    "deterministic": False,
    "device": "auto",
    "dtype": "auto",
    "wandb_log": False,
    "wandb_project": "nanolora",
    "wandb_run_name": None,
    "start": None,
    "predict": None,
    "split": "test",
    "max_new_tokens": None,
    "temperature": 0.0,
    "top_k": None,
}
ASSIGNMENT = {
    "init_from": "gpt2-medium",
    "rank": 128,
    "alpha": 512.0,
    "dropout": 0.05,
    "dataset": "rotten_tomatoes",
    "label_names": "negative,positive",
    "template": "Classify the sentiment of the following movie review as positive or negative.\n\nReview: {text}\n\n"
    "Sentiment: {label}",
    "lr": 5e-4,
    "max_iters": 320,
    "eval_interval": 40,
    "eval_iters": 20,
}
SHIPPED = {
    "finetune_params_config.py": ASSIGNMENT,
    "finetune_mini_config.py": {
        "out_dir": "out-mini",
        "template": "{text} This movie is {label}",
        "label_names": "terrible,great",
        "lora_targets": "c_(attn|proj|fc)$",
        "max_iters": 640,
        "eval_interval": 80,
    },
    "classify_spam_config.py": {
        "task": "classify",
        "out_dir": "out-spam",
        "dataset": "ucirvine/sms_spam",
        "text_field": "sms",
        "lora_targets": r"\.(c_attn|c_proj|c_fc)$",
        "alpha": 16.0,
        "balance_classes": True,
        "max_iters": 420,
        "eval_interval": 70,
    },
    "classify_sst2_config.py": {
        "task": "classify",
        "init_from": "gpt2",
        "out_dir": "out-sst2",
        "dataset": "sst2",
        "text_field": "sentence",
        "split": "validation",
        "held_out": 0.2,
        "lora_targets": r"h\.1[01]\.attn\.c_attn$",
        "lora_bias": "lora_only",
        "rank": 1,
        "alpha": 4.0,
        "max_iters": 4000,
        "warmup_iters": 200,
        "eval_interval": 400,
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_each_config_that_ships_sets(name):
    """Lost if it fails: a published number's command makes another run, because a default changed under it."""
    config = configure([os.path.join(REPO, "configs", name)])
    assert settings_of(config) == OLD | SHIPPED[name]
    assert SHIPPED.keys() == {os.path.basename(path) for path in glob.glob(os.path.join(REPO, "configs", "*.py"))}


def test_the_defaults_are_the_assignments_file():
    """Lost if it fails: generate.py without a config file looks for another run than train.py with it has written."""
    values = {}
    with open(os.path.join(REPO, "configs", "finetune_params_config.py"), encoding="utf-8") as f:
        exec(f.read(), {}, values)
    assert {key: FIELDS[key] for key in values} == values
    assert FIELDS == OLD | ASSIGNMENT


@pytest.mark.parametrize(
    "file, flags, names",
    [
        ("", [], "negative,positive"),
        ("", ["--dataset=rotten_tomatoes"], "negative,positive"),
        ("", ["--dataset=mine.csv"], None),  # ham, spam: as they stand there
        ("", ["--dataset=mine.csv", "--label_names=no,yes"], "no,yes"),
        ("dataset = 'mine.csv'", [], None),
        ("dataset = 'mine.csv'\nlabel_names = 'no,yes'", [], "no,yes"),
        ("dataset = 'mine.csv'\nlabel_names = 'no,yes'", ["--dataset=rotten_tomatoes"], "no,yes"),  # the file's words
        ("label_names = 'no,yes'", ["--dataset=mine.csv"], "no,yes"),
    ],
)
def test_the_default_label_names_are_the_default_data_sets(tmp_path, file, flags, names):
    """Lost if it fails: data with words of its own is refused for words that nobody typed, or typed ones are lost."""
    config = configure([config_file(tmp_path, file), *flags])
    assert config.label_names == names
    if not file:
        typed = dict(flag.removeprefix("--").split("=") for flag in flags)
        assert make_config(**typed).label_names == names


def test_the_handouts_spellings(tmp_path, monkeypatch, capsys):
    """Lost if it fails: a command that is copied out of the handout ends in an error."""
    monkeypatch.chdir(tmp_path)  # the ones that ship are found from anywhere
    for path in ("config/finetune_mini_config.py", "configs/finetune_mini_config.py"):
        assert configure([path]).out_dir == "out-mini"
    assert configure(["\u2013init-from=gpt2", "\u2013out_dir", "mine"]).init_from == "gpt2"  # its long dash
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "finetune_mini_config.py").write_text("out_dir = 'own'")
    assert configure(["config/finetune_mini_config.py"]).out_dir == "own"
    assert configure([f"{tmp_path}/config/finetune_mini_config.py"]).out_dir == "own"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "finetune_mini_config.py").write_text("out_dir = 'typed'")
    assert configure(["config/finetune_mini_config.py"]).out_dir == "typed"
    assert capsys.readouterr() == ("", "")
    assert "config/none.py" in told(capsys, "config/none.py")
    assert "elsewhere/finetune_mini_config.py" in told(capsys, "elsewhere/finetune_mini_config.py")


# The keys of nanoGPT's train.py and sample.py, and a word that the line about each holds; None: it is a key here too.
NANOGPT = {
    **dict.fromkeys(["out_dir", "eval_interval", "eval_iters", "init_from", "wandb_log", "wandb_project"]),
    **dict.fromkeys(["wandb_run_name", "dataset", "gradient_accumulation_steps", "batch_size"]),
    **dict.fromkeys(["dropout", "learning_rate", "max_iters", "weight_decay"]),
    **dict.fromkeys(["beta1", "beta2", "grad_clip", "warmup_iters", "device", "dtype", "compile"]),
    **dict.fromkeys(["start", "max_new_tokens", "temperature", "top_k", "seed"]),
    **dict.fromkeys(["block_size", "n_layer", "n_head", "n_embd"], "tools.pretrain"),
    "log_interval": "--eval_interval",
    "eval_only": "generate.py",
    "always_save_checkpoint": "--save_interval",
    "bias": "--lora_bias",
    "decay_lr": "--decay_share=0",
    "lr_decay_iters": "--decay_share",
    "min_lr": "--decay_share",
    "backend": "nccl",
    "num_samples": "--seed",
}


@pytest.mark.parametrize("key", NANOGPT)
def test_every_key_of_nanogpt_is_known_or_explained(tmp_path, capsys, key):
    """Lost if it fails: who comes from nanoGPT types its flags and learns only that they are unknown."""
    if NANOGPT[key] is None:
        ours = ALIASES.get(key, key)
        value = FIELDS[ours] if FIELDS[ours] is not None else 3
        assert getattr(configure([f"--{key}={value}"]), ours) in (value, str(value))
        assert getattr(configure([config_file(tmp_path, f"{key} = {FIELDS[ours]!r}")]), ours) == FIELDS[ours]
        return
    for line in (told(capsys, f"--{key}=1"), told(capsys, config_file(tmp_path, f"{key} = 1"))):
        assert key in line and NANOGPT[key] in line
    named = re.findall(r"--(\w+)", HINTS[key])
    assert set(named) <= FIELDS.keys()  # what a hint names is there


# --- help, notes ---------------------------------------------------------------------------------


def test_help_prints_every_key_with_default_and_comment(capsys):
    """Lost if it fails: a key can be found in the source alone."""
    with pytest.raises(SystemExit) as e:
        configure(["--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    with open(configurator.__file__, encoding="utf-8") as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.removeprefix("# ") for t in tokens if t.type == tokenize.COMMENT}
    body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    assert [node.target.id for node in fields] == [*FIELDS, "facts"]  # what the resumed run has found out: no setting
    for node in fields[:-1]:
        comment = " ".join(comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments)
        line = [line for line in lines if re.match(rf"\s*--{node.target.id}\b", line)]
        assert len(line) == 1 and comment and comment in line[0]
        default = FIELDS[node.target.id]
        assert str(default) in line[0] or repr(default) in line[0]


@dataclasses.dataclass
class Wider(Config):
    """Has one setting more."""

    warmth: float = setting(0.5, least=0, most=1, kept=MODEL)  # how warm it is


def test_a_setting_is_one_statement(tmp_path, capsys):
    """Lost if it fails: who adds a setting has to find every table that knows the others."""
    with pytest.raises(SystemExit):
        configure(["--help"], cls=Wider)
    assert re.search(r"--warmth +float +'0.5' +how warm it is", capsys.readouterr().out)
    assert "at most 1" in told(capsys, "--warmth=1.5", cls=Wider)
    write_run(configure(["--warmth=0.25", f"--out_dir={tmp_path}"], cls=Wider), {})
    resumed = ["--init_from=resume", f"--out_dir={tmp_path}"]
    assert configure(resumed, cls=Wider, trains=False).warmth == 0.25
    assert "warmth=0.25" in told(capsys, *resumed, "--warmth=0.75", cls=Wider, trains=False)


@pytest.mark.parametrize(
    "text, flag, note",
    [
        ("rank = 16\nalpha = 64.0", "--rank=4", "--alpha=16"),
        ("rank = 128\nalpha = 512.0", "--lora_rank=16", "--alpha=64"),
        ("rank = 16\nalpha = 8.0", "--rank=5", "--alpha=2.5"),
    ],
)
def test_rank_without_alpha_tells_the_alpha_that_keeps_the_scale(tmp_path, capsys, text, flag, note):
    """Lost if it fails: runs of different ranks differ in their scale too, and nobody notices."""
    path = config_file(tmp_path, text)
    config = configure([path, flag])
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and note in out
    typed = float(re.search(r"--alpha=([\d.]+)", out)[1])
    before = configure([path])
    assert typed / config.rank == before.alpha / before.rank != config.alpha / config.rank
    # The config keeps the alpha that it has: the note is a note.
    assert config.alpha == before.alpha


@pytest.mark.parametrize("argv", [[], ["--rank=4", "--alpha=8"], ["--rank=128"], ["--rank=0"], ["--lora_alpha=8"]])
def test_no_note_where_the_scale_is_meant(capsys, argv):
    """Lost if it fails: a note that comes always is read by nobody."""
    configure(argv)
    assert capsys.readouterr() == ("", "")


# --- going on with a run -------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    """A run's directory as train.py leaves it."""
    config = Config(init_from="gpt2", rank=8, alpha=4.0, dataset="mine.csv", max_iters=70, out_dir="elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_config.json").write_text(json.dumps(settings_of(config)))
    return str(tmp_path / "run")


@pytest.mark.parametrize("typed", ["--init_from=resume", "--init-from=resume", '--init_from="resume"'])
def test_resume_takes_the_config_of_the_run(run_dir, capsys, typed):
    """Lost if it fails: a resumed run goes on with other settings than it began with."""
    config = configure([typed, f"--out_dir={run_dir}"])
    assert config.facts is not None and configure([]).facts is None
    assert (config.init_from, config.rank, config.alpha, config.dataset) == ("gpt2", 8, 4.0, "mine.csv")
    assert (config.max_iters, config.out_dir) == (70, run_dir)  # also where the directory was moved
    assert configure([typed, f"--out_dir={run_dir}", "--max_iters=90", "--rank=8"]).max_iters == 90
    assert capsys.readouterr() == ("", "")


def test_resume_in_a_config_file(run_dir, tmp_path):
    """Lost if it fails: a config file that resumes starts again, over the run's files."""
    path = config_file(tmp_path, f"init_from = 'resume'\nout_dir = {run_dir!r}\nlr = 1e-5")
    config = configure([path])
    assert config.facts and config.out_dir == run_dir
    assert (config.init_from, config.rank, config.lr) == ("gpt2", 8, FIELDS["lr"])
    assert not configure([path, "--init_from=gpt2-mini"]).facts


@pytest.mark.parametrize("flag, key, value", [("--rank=16", "rank", 8), ("--lora_alpha=1", "alpha", 4.0)])
def test_resume_refuses_another_model(run_dir, capsys, flag, key, value):
    """Lost if it fails: a checkpoint is loaded into a model that it was not made for."""
    line = told(capsys, "--init_from=resume", f"--out_dir={run_dir}", flag)
    assert f"{key}={value}" in line and run_dir in line


def test_scoring_another_dataset_is_allowed_where_training_on_it_is_not(run_dir, capsys):
    """Lost if it fails: a tuned model can be scored on its own data alone, or a resumed run changes its data."""
    argv = ["--init_from=resume", f"--out_dir={run_dir}", "--dataset=other.csv"]
    assert configure(argv, trains=False).dataset == "other.csv"
    assert "dataset=mine.csv" in told(capsys, *argv)
    assert "rank=8" in told(capsys, *argv, "--rank=4", trains=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"rank": 8}', "\0"])
def test_a_damaged_run_is_one_line_that_names_the_file(run_dir, capsys, content):
    """Lost if it fails: a cut-short file ends in a traceback, or the run goes on with defaults."""
    path = os.path.join(run_dir, "train_config.json")
    with open(path, "w") as f:
        f.write(content)
    assert path in told(capsys, "--init_from=resume", f"--out_dir={run_dir}")


def test_a_missing_run_is_one_line(tmp_path, capsys):
    """Lost if it fails: a mistyped out_dir ends in a traceback."""
    line = told(capsys, "--init_from=resume", f"--out_dir={tmp_path / 'none'}")
    assert str(tmp_path / "none") in line and "--out_dir" in line


def test_a_missing_run_names_the_runs_that_are_there(run_dir, tmp_path, capsys, monkeypatch):
    """Lost if it fails: whoever forgot the folder's name has to look for it."""
    for age, name in enumerate(["out-g", "out-f", "out-e", "out-d", "out-c", "out-b"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_config.json").write_text("{}")
        os.utime(tmp_path / name / "train_config.json", (10**9 + age, 10**9 + age))
    (tmp_path / "no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    line = told(capsys, "--init_from=resume")
    assert "no run to resume in out (" in line
    assert "there are runs in: run, out-b, out-c, out-d, out-e;" in line  # the newest five
    assert f"runs in: {run_dir}, " in told(capsys, "--init_from=resume", f"--out_dir={tmp_path}/none/")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "there are" not in told(capsys, "--init_from=resume")


# --- programs ------------------------------------------------------------------------------------


def test_a_program_makes_the_config_that_flags_make(run_dir):
    """Lost if it fails: ModelSampler in a notebook scores another model than generate.py on the command line."""
    assert make_config() == configure([])
    assert make_config(init_from="gpt2", lora_rank=8, temperature=1, top_k=200) == configure(
        ["--init_from=gpt2", "--rank=8", "--temperature=1", "--top_k=200"]
    )
    argv = ["--init_from=resume", f"--out_dir={run_dir}", "--dataset=other.csv"]
    run = make_config(init_from="resume", out_dir=run_dir, dataset="other.csv")
    assert run == configure(argv, trains=False) and run.facts and run.rank == 8


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rnak": 8}, ["rnak", "rank"]),
        ({"eval_only": True}, ["eval_only", "generate.py"]),
        ({"rank": "8"}, ["rank", "'8'", "int"]),
        ({"rank": 1.5}, ["rank", "1.5", "int"]),
        ({"temperature": -1}, ["temperature=-1", "at least 0"]),
        ({"split": "tset"}, ["split=tset", "test, validation, train"]),
    ],
)
def test_a_programs_mistake_is_one_clear_line(settings, words):
    """Lost if it fails: a mistyped keyword of ModelSampler is taken as nothing, or is a TypeError from elsewhere."""
    with pytest.raises(UserError) as e:
        make_config(**settings)
    assert [word for word in words if word not in str(e.value)] == [] and "\n" not in str(e.value)
