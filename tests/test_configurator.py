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
import subprocess
import sys
import tokenize
import typing

import pytest

import configurator
from configurator import MODEL_KEYS, Config, configure

ROOT = os.path.dirname(os.path.abspath(configurator.__file__))
FIELDS = {f.name: f.default for f in dataclasses.fields(Config)}


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
    assert dataclasses.asdict(configure([])) == FIELDS


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
    assert dataclasses.asdict(config) | {key: None} == FIELDS | {key: None}


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_a_flag(key):
    """Lost if it fails: a key that stands in --help cannot be set."""
    kind = typing.get_type_hints(Config)[key]
    kinds = typing.get_args(kind) or (kind,)
    value = True if bool in kinds else 3 if int in kinds else 0.5 if float in kinds else None
    if value is None:
        value = configurator.ONE_OF.get(key, ("words",))[-1]
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
        (["--task=finetune"], ["task=finetune", "instruct, classify, pretrain"]),
        (["--dtype=fp16"], ["dtype=fp16", "float16"]),
        (["no_such_file.py"], ["no_such_file.py", "configs/"]),
        (["configs/a.py", "configs/b.py"], ["configs/b.py", "one config file"]),
        (["rank=8"], ["rank=8"]),  # the dashes forgotten
        (["--resume=True"], ["--resume"]),  # no key of its own
    ],
)
def test_a_mistyped_flag_is_one_line_that_names_it(capsys, argv, words):
    """Lost if it fails: a typing mistake trains with a default, or prints a traceback."""
    line = told(capsys, *argv)
    assert [word for word in words if word not in line] == []


def test_a_real_program_ends_with_code_2_and_no_traceback(tmp_path):
    """Lost if it fails: a script around a run cannot tell a mistake from a result."""
    command = [sys.executable, "-c", "import sys, configurator; configurator.configure(sys.argv[1:])"]
    done = subprocess.run([*command, "--lrr=1"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --lrr: did you mean --lr?\n"


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


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(ROOT, "configs", "[fp]*.py"))))  # finetune, pretrain
def test_configs_that_ship_are_read_as_python_reads_them(path):
    """Lost if it fails: the first command of the README stops with an error, or runs with other values."""
    values = {}
    with open(path, encoding="utf-8") as f:
        exec(f.read(), {}, values)  # our own files, and what exec makes of them is the reference
    config = configure([path])
    assert values and {key: getattr(config, key) for key in values} == values


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
    assert [node.target.id for node in fields] == list(FIELDS)
    for node in fields:
        comment = " ".join(comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments)
        line = [line for line in lines if re.match(rf"\s*--{node.target.id}\b", line)]
        assert len(line) == 1 and comment and comment in line[0]
        default = FIELDS[node.target.id]
        assert str(default) in line[0] or repr(default) in line[0]


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


@pytest.mark.parametrize("argv", [[], ["--rank=4", "--alpha=8"], ["--rank=16"], ["--rank=0"], ["--lora_alpha=8"]])
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
    (tmp_path / "run" / "train_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return str(tmp_path / "run")


@pytest.mark.parametrize("typed", ["--init_from=resume", "--init-from=resume", '--init_from="resume"'])
def test_resume_takes_the_config_of_the_run(run_dir, capsys, typed):
    """Lost if it fails: a resumed run goes on with other settings than it began with."""
    config = configure([typed, f"--out_dir={run_dir}"])
    assert config.resume is True and configure([]).resume is False
    assert (config.init_from, config.rank, config.alpha, config.dataset) == ("gpt2", 8, 4.0, "mine.csv")
    assert (config.max_iters, config.out_dir) == (70, run_dir)  # also where the directory was moved
    assert configure([typed, f"--out_dir={run_dir}", "--max_iters=90", "--rank=8"]).max_iters == 90
    assert capsys.readouterr() == ("", "")


def test_resume_in_a_config_file(run_dir, tmp_path):
    """Lost if it fails: a config file that resumes starts anew over the run's files."""
    path = config_file(tmp_path, f"init_from = 'resume'\nout_dir = {run_dir!r}\nlr = 1e-5")
    config = configure([path])
    assert config.resume and config.out_dir == run_dir
    assert (config.init_from, config.rank, config.lr) == ("gpt2", 8, FIELDS["lr"])
    assert not configure([path, "--init_from=gpt2-mini"]).resume


@pytest.mark.parametrize("flag, key, value", [("--rank=16", "rank", 8), ("--lora_alpha=1", "alpha", 4.0)])
def test_resume_refuses_another_model(run_dir, capsys, flag, key, value):
    """Lost if it fails: a checkpoint is loaded into a model that it was not made for."""
    line = told(capsys, "--init_from=resume", f"--out_dir={run_dir}", flag)
    assert f"{key}={value}" in line and run_dir in line


def test_scoring_another_dataset_is_allowed_where_training_on_it_is_not(run_dir, capsys):
    """Lost if it fails: a tuned model can be scored on its own data alone, or a resumed run changes its data."""
    argv = ["--init_from=resume", f"--out_dir={run_dir}", "--dataset=other.csv"]
    assert configure(argv, fixed=MODEL_KEYS).dataset == "other.csv"
    assert "dataset=mine.csv" in told(capsys, *argv)
    assert "rank=8" in told(capsys, *argv, "--rank=4", fixed=MODEL_KEYS)


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
