"""One checked, typed configuration from defaults, a config file and flags.

    python train.py configs/finetune_params_config.py --rank=16 --lr 1e-4

A config file holds plain assignments (`rank = 16  # comment`): literals and their arithmetic. It is read,
never executed. Flags win over the file, the file over the defaults below. `--help` prints this table.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import sys
import typing
from dataclasses import dataclass


@dataclass
class Config:
    # --- model
    init_from: str = "gpt2-mini"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini, scratch, resume, or a directory
    rank: int = 16  # of the adapters; 0 trains without LoRA (full fine-tuning)
    alpha: float = 64.0  # the adapters' output is scaled by alpha / rank
    dropout: float = 0.0  # on the adapters' input; without LoRA on embeddings, attention and residuals
    lora_targets: str = r"attn\.c_(attn|proj)$"  # regular expression: names of the linear layers that get an adapter
    lora_bias: str = "none"  # biases trained beside LoRA: none, all, lora_only (those of the adapted layers)
    trainable: str | None = None  # regular expression: parameters trained beside LoRA or, with rank=0, alone
    n_layer: int = 6  # layers (n_layer to block_size: for init_from=scratch)
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width
    block_size: int = 1024  # context in tokens
    # --- data
    task: str = "instruct"  # instruct: labels as text, by template; classify: by a new head; pretrain: plain text
    dataset: str = (
        "rt_reviews"  # rt_reviews, rotten_tomatoes, a file or directory (csv, jsonl, parquet, txt), a hub name
    )
    text_field: str = "text"  # column that holds the text
    label_field: str = "label"  # column that holds the label, as a word or a number
    label_names: str | None = None  # words for the labels 0, 1, ..., with commas; None: as the data names them
    template: str = "Review: {text}\nSentiment: {label}"  # {text} and {label}; {label} comes last
    loss_on: str = "label"  # label: its tokens and end-of-text are scored; all: every token
    balance_classes: bool = False  # classify: each class weighs the same in the loss, however rare
    lowercase_share: float = 0.0  # pretrain: share of the texts that is lower-cased with spaced punctuation
    train_context: int = 256  # pretrain: tokens in a training row
    # --- training
    out_dir: str = "out"  # where everything is written
    batch_size: int = 32  # examples in a forward pass, over all processes
    gradient_accumulation_steps: int = 1  # forward passes in an update
    max_iters: int = 500  # updates
    lr: float = 1e-3  # peak learning rate of AdamW
    muon_lr: float = 0.0  # > 0: Muon with this learning rate for the blocks' matrices (rank=0)
    weight_decay: float = 0.0  # AdamW's, on matrices
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.99  # AdamW's second moment
    grad_clip: float = 1.0  # gradient norm is cut to this; 0 leaves it
    warmup_iters: int = 20  # updates over which the learning rate rises
    decay_share: float = 0.9  # last share of the run over which the learning rate falls to 0
    n_sampled: int = 0  # > 0: softmax over the batch's words and this many sampled others (pretrain)
    eval_interval: int = 50  # updates between evaluations
    eval_iters: int = 0  # batches in an evaluation; 0: the whole validation split
    save_interval: int = 0  # updates between checkpoints; 0: at each evaluation
    seed: int = 1337  # of data order, adapters and dropout
    compile: bool = False  # torch.compile the model
    # --- machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of frozen weights and of the arithmetic
    # --- logging
    wandb_log: bool = False  # log to Weights & Biases (WANDB_MODE=offline needs no account)
    wandb_project: str = "nanolora"  # project there
    wandb_run_name: str | None = None  # name there; None: out_dir's
    # --- generation (generate.py)
    start: str | None = None  # write on from this text instead of scoring
    split: str = "test"  # what is scored: test, validation or train
    max_new_tokens: int | None = None  # None: 5 in scoring (or the longest label), 200 with --start
    temperature: float = 0.0  # 0: the likeliest token; higher is more random
    top_k: int | None = None  # sample among the k likeliest tokens; None: all

    resume = False  # not a key: set by `configure` for init_from=resume


ALIASES = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
AT_LEAST = {  # smallest value allowed
    **dict.fromkeys(("rank", "alpha", "dropout", "warmup_iters", "eval_iters", "save_interval"), 0),
    **dict.fromkeys(("lr", "muon_lr", "weight_decay", "grad_clip", "n_sampled", "seed", "temperature"), 0),
    **dict.fromkeys(("beta1", "beta2", "decay_share", "lowercase_share"), 0),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "train_context", "batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_iters", "eval_interval", "max_new_tokens", "top_k"), 1),
}
AT_MOST = {
    **dict.fromkeys(("dropout", "beta1", "beta2"), 0.999),
    **dict.fromkeys(("decay_share", "lowercase_share"), 1),
    "seed": 2**63 - 1,
}
ONE_OF = {
    "task": ("instruct", "classify", "pretrain"),
    "lora_bias": ("none", "all", "lora_only"),
    "loss_on": ("label", "all"),
    "split": ("test", "validation", "train"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}
RESUMED = "train_config.json"  # in out_dir: the config a run was started with
MODEL_KEYS = ("rank", "alpha", "lora_targets", "lora_bias", "trainable", "task")
MODEL_KEYS += ("n_layer", "n_head", "n_embd", "block_size")
RUN_KEYS = ("dropout", "dataset", "text_field", "label_field", "label_names", "template", "loss_on", "seed", "dtype")
RUN_KEYS += ("balance_classes", "lowercase_share", "train_context", "muon_lr", "n_sampled")
RUN_KEYS += ("batch_size", "gradient_accumulation_steps")


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and what to type instead."""


@contextlib.contextmanager
def one_line_errors(kinds=(ValueError, OSError)):
    """Ends the program with one line and exit code 2 where the user's input or machine is at fault."""
    try:
        yield
    except kinds as e:
        text = str(e) if isinstance(e, ValueError) or not e.filename else f"{e.filename}: {e.strerror}"
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


def configure(argv, cls=Config, fixed=MODEL_KEYS + RUN_KEYS):
    """argv (without the program's name) -> cls. Prints help or one line for a mistake, and exits.

    With init_from=resume the config is that of the run in out_dir, flags on top; those in `fixed` may not
    differ from it. Then `init_from` is the run's own base and `resume` is True.
    """
    with one_line_errors():
        return _configure(argv, cls, fixed)


def _configure(argv, cls, fixed):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    flags = _parse_flags(argv, cls, fields)
    path = flags.pop("config_file")
    from_file = read_config_file(path, fields) if path else {}
    stored = {}
    if (flags.get("init_from") or from_file.get("init_from")) == "resume":
        out_dir = flags.get("out_dir", from_file.get("out_dir", fields["out_dir"].default))
        stored = _stored(out_dir, fields)
        for key in fixed:
            if key in flags and flags[key] != stored.get(key, flags[key]):
                raise UserError(
                    f"--{key}={flags[key]}: the run in {out_dir} has {key}={stored[key]}; drop the flag, or start "
                    "another run with another --out_dir"
                )
    values = from_file | stored | flags
    for key, value in values.items():
        check(key, value)
    before = {name: f.default for name, f in fields.items()} | from_file
    if (
        flags.get("rank")
        and "alpha" not in flags
        and before["rank"]
        and flags["rank"] != before["rank"]
        and not stored
    ):
        kept, scale = before["alpha"] / before["rank"], before["alpha"] / flags["rank"]
        print(
            f"note: rank={flags['rank']} with alpha={before['alpha']:g} scales the adapter by {scale:g}; "
            f"--alpha={kept * flags['rank']:g} keeps the config's {kept:g}"
        )
    if stored:
        values["init_from"] = stored["init_from"]
    config = cls(**values)
    config.resume = bool(stored)
    return config


def _parse_flags(argv, cls, fields):
    parser = argparse.ArgumentParser(
        prog=f"python {os.path.basename(sys.argv[0])}",
        usage="%(prog)s [configs/FILE.py] [--key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_help_table(cls),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = _flag_error(fields)
    parser.add_argument("config_file", nargs="?", default=None, help=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    for name in fields:
        names = [name, *(a for a, target in ALIASES.items() if target == name)]
        spellings = dict.fromkeys(f"--{s}" for n in names for s in (n, n.replace("_", "-")))
        options = {"nargs": "?", "const": "True"} if hints[name] is bool else {}
        parser.add_argument(*spellings, dest=name, help=argparse.SUPPRESS, **options)
    texts = vars(parser.parse_args(argv))
    path = texts.pop("config_file")
    return {"config_file": path} | {k: convert(k, v, hints[k], f"--{k}={v}") for k, v in texts.items()}


def _flag_error(fields):
    def error(message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            word = unknown.group(1)
            if not word.startswith("-"):
                raise UserError(f"{word}: one config file at most; settings are typed as --key=value")
            key = word.lstrip("-").split("=")[0].replace("-", "_")
            near = difflib.get_close_matches(key, [*fields, *ALIASES], 1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UserError(f"unknown flag --{key}: {hint}")
        raise UserError(message)

    return error


def _help_table(cls):
    """Every key with its type, default and the comment at its right."""
    lines, hints = [cls.__doc__ if cls is not Config else __doc__], typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for owner in reversed(cls.__mro__[:-1]):
        for line in re.sub(r"\(\n\s+(.*)\n\s+\)", r"\1", inspect.getsource(owner)).splitlines():
            if section := re.match(r"    # --- (.*)", line):
                lines.append(f"\n{section.group(1)}:")
            elif key := re.match(r"    (\w+): .*?  # (.*)", line):
                name, comment = key.groups()
                kind = getattr(hints[name], "__name__", str(hints[name]))
                lines.append(f"  --{name:27} {kind:12} {str(defaults[name])!r:24} {comment}")
    return "\n".join(lines).replace("%", "%%")


def convert(key, text, kind, where):
    """A flag's text as the key's type; UserError if it is none."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # quotes that a shell left in
        text = text[1:-1]
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and text in ("None", "none"):
        return None
    if str in kinds:
        return text
    if bool in kinds:
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise UserError(f"{where}: {key} is True or False")
    if int in kinds and re.fullmatch(r"\s*[+-]?\d{1,99}\s*", text):
        return int(text)  # not by way of a float, which has 53 bits
    try:
        number = float(text)
        if not math.isfinite(number) or (int in kinds and number != int(number)):
            raise ValueError
        return int(number) if int in kinds else number
    except (ValueError, OverflowError):
        example = "16" if int in kinds else "5e-4"
        raise UserError(
            f"{where}: {key} is a{'n integer' if int in kinds else ' number'}, such as {example}"
        ) from None


def read_config_file(path, fields):
    """{key: value} of a file of plain assignments; UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such config file; those that ship are in configs/")
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as plain assignments: {e}") from e
    values = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: only plain assignments are read here, such as rank = 16")
        key = ALIASES.get(node.targets[0].id, node.targets[0].id)
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise UserError(f"{where}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = _literal(node.value, where)
        except RecursionError:
            raise UserError(f"{where}: {key} is nested too deeply; type its value") from None
        kind = fields[key].type
        kinds = typing.get_args(kind) or (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) is float and not math.isfinite(value):
            raise UserError(f"{where}: {key} = {value} is no finite number")
        if int in kinds and type(value) is float and value == int(value):
            value = int(value)
        if type(value) not in kinds:
            raise UserError(f"{where}: {key} = {value!r}, but it is {getattr(kind, '__name__', kind)}")
        values[key] = value
    return values


ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _literal(node, where):
    """A literal's value, or that of + - * / over numbers. Nothing is executed."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, where)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        a, b = _number(node.left, where), _number(node.right, where)
        if isinstance(node.op, ast.Div) and b == 0:
            raise UserError(f"{where}: division by zero")
        if isinstance(node.op, ast.Div):
            return a / b
        return a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else a * b
    raise UserError(f"{where}: type a number, a quoted text, True, False or None")


def _number(node, where):
    value = _literal(node, where)
    if type(value) not in (int, float):
        raise UserError(f"{where}: arithmetic needs numbers, not {value!r}")
    return value


def check(key, value):
    """UserError if the value is out of the key's range."""
    if value is None:
        return
    if key in ONE_OF and value not in ONE_OF[key]:
        raise UserError(f"{key}={value}: type one of {', '.join(ONE_OF[key])}")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise UserError(f"{key}={value}: type at least {AT_LEAST[key]}")
    if key in AT_MOST and value > AT_MOST[key]:
        raise UserError(f"{key}={value}: type at most {AT_MOST[key]}")


def fingerprint(values):
    """SHA-256 of a run's settings, kept among them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _stored(out_dir, fields):
    """The config that the run in out_dir was started with."""
    path = os.path.join(out_dir, RESUMED)
    try:
        with open(path, encoding="utf-8") as f:
            stored = json.load(f)
        if stored.pop("sha256", None) not in (None, fingerprint(stored)):
            raise UserError(f"{path} was changed or damaged; to change a setting, type it as a flag")
        if "init_from" not in stored:
            raise UserError(f"{path} is damaged: no init_from in it")
        return {key: value for key, value in stored.items() if key in fields and key != "out_dir"}
    except FileNotFoundError:
        raise UserError(
            f"init_from=resume: no run to resume in {out_dir} ({RESUMED} is missing); type its --out_dir"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from e
