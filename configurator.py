"""One checked, typed configuration from defaults, a config file and flags.

    python train.py configs/finetune_params_config.py --rank=16 --lr 1e-4

A config file holds plain assignments (`rank = 16  # comment`): literals and their arithmetic. It is read,
never executed. Flags win over the file, the file over the defaults below. `--help` prints this table.
"""

import dataclasses
import difflib
import glob
import hashlib
import json
import math
import os
import re
import typing
from dataclasses import dataclass

from plumbing.program.config_file import read_assignments
from plumbing.program.errors import UserError, one_line_errors
from plumbing.program.flags import parse_flags

TEMPLATE = """Classify the sentiment of the following movie review as positive or negative.

Review: {text}

Sentiment: {label}"""


@dataclass
class Config:
    """The defaults are the assignment's: those of configs/finetune_params_config.py."""

    # --- model
    init_from: str = "gpt2-medium"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini, scratch, resume, a directory
    rank: int = 128  # of the adapters; 0 trains without LoRA (full fine-tuning)
    alpha: float = 512.0  # the adapters' output is scaled by alpha / rank
    rslora: bool = False  # the scale is alpha / sqrt(rank) instead ("rank-stabilised", Kalajdzievski 2023)
    dropout: float = 0.05  # on the adapters' input; without LoRA on embeddings, attention and residuals
    lora_targets: str = r"attn\.c_(attn|proj)$"  # regular expression: names of the linear layers that get an adapter
    lora_bias: str = "none"  # biases trained next to LoRA: none, all, lora_only (those of the adapted layers)
    trainable: str | None = None  # regular expression: parameters trained next to LoRA or, with rank=0, alone
    n_layer: int = 6  # layers (n_layer to block_size: for init_from=scratch)
    n_head: int = 4  # attention heads
    n_embd: int = 256  # width
    block_size: int = 1024  # context in tokens
    # --- data
    task: str = "instruct"  # instruct: labels as text, by template; classify: by a new head; pretrain: plain text
    dataset: str = "rotten_tomatoes"  # rt_reviews, a file or directory (csv, jsonl, parquet, txt), or a hub name
    text_field: str = "text"  # column that holds the text
    label_field: str = "label"  # column that holds the label, as a word or a number
    # The default is for the default data set: where a flag or file names another dataset alone, label_names is None.
    label_names: str | None = "negative,positive"  # words for labels 0, 1, ..., with commas; None: the data's own
    template: str = TEMPLATE  # {text} and {label}; {label} comes last
    loss_on: str = "label"  # label: its tokens and end-of-text are scored; all: every token
    train_examples: int = 0  # training examples, chosen by the seed; 0: all
    balance_classes: bool = False  # classify: each class weighs the same in the loss, however rare
    lowercase_share: float = 0.0  # pretrain: share of the texts that is lower-cased with spaced punctuation
    train_context: int = 256  # pretrain: tokens in a training row
    # --- training
    out_dir: str = "out"  # where everything is written
    auto_resume: bool = False  # go on with out_dir's run of the same settings if there is one, else begin
    batch_size: int = 32  # examples in a forward pass, over all processes
    gradient_accumulation_steps: int = 1  # forward passes in an update
    max_iters: int = 320  # updates
    lr: float = 5e-4  # peak learning rate of AdamW
    lora_plus: float = 1.0  # learning rate of B over that of A: 16 is LoRA+ (Hayou et al. 2024)
    muon_lr: float = 0.0  # > 0: Muon with this learning rate for the blocks' matrices (rank=0)
    weight_decay: float = 0.0  # AdamW's, on matrices
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.99  # AdamW's second moment
    grad_clip: float = 1.0  # gradient norm is cut to this; 0 leaves it
    warmup_iters: int = 20  # updates over which the learning rate rises
    decay_share: float = 0.9  # last share of the run over which the learning rate falls to 0
    n_sampled: int = 0  # > 0: softmax over the batch's words and this many sampled others (pretrain)
    eval_interval: int = 40  # updates between evaluations
    eval_iters: int = 20  # batches in an evaluation; 0: the whole validation split
    save_interval: int = 0  # updates between checkpoints; 0: at each evaluation
    seed: int = 1337  # of data order, adapters and dropout
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # CUDA: the same seed gives the same bits, as it does on a CPU; slower
    # --- machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of frozen weights and of the arithmetic
    # --- logging
    wandb_log: bool = False  # log to Weights & Biases (WANDB_MODE=offline needs no account)
    wandb_project: str = "nanolora"  # project there
    wandb_run_name: str | None = None  # name there; None: out_dir's
    # --- generation (generate.py)
    start: str | None = None  # write on from this text instead of scoring
    predict: str | None = None  # label the texts of this file (csv, tsv, jsonl, parquet, txt); -: standard input
    split: str = "test"  # what is scored: test, validation or train
    max_new_tokens: int | None = None  # None: 5 in scoring (or the longest label), 200 with --start
    temperature: float = 0.0  # 0: the likeliest token; higher is more random
    top_k: int | None = None  # sample among the k likeliest tokens; None: all

    # Not keys: set for init_from=resume.
    resume = False
    trained_on = None  # the digest of the run's data
    computed_in = None  # the run's dtype
    learned = None  # the words of the run's labels


RUN_CONFIG = "train_config.json"  # in out_dir: the settings of the run, those typed on resuming too
# A resumed run keeps these: the model's for scoring too, all of them for training.
MODEL_KEYS = ("rank", "alpha", "rslora", "lora_targets", "lora_bias", "trainable", "task")
MODEL_KEYS += ("n_layer", "n_head", "n_embd", "block_size")
RUN_KEYS = ("dropout", "dataset", "text_field", "label_field", "label_names", "template", "loss_on", "seed")
RUN_KEYS += ("train_examples", "balance_classes", "lowercase_share", "train_context", "lora_plus", "muon_lr")
RUN_KEYS += ("n_sampled", "batch_size", "gradient_accumulation_steps")


def configure(argv: list[str], cls: type = Config, fixed: tuple[str, ...] = MODEL_KEYS + RUN_KEYS):
    """argv (without the program's name) -> cls. Prints help or one line for a mistake, and exits.

    With init_from=resume the config is that of the run in out_dir, flags on top; those in `fixed` may not
    differ from it. Then `init_from` is the run's own base and `resume` is True.
    """
    fields = fields_of(cls)
    about = __doc__ if cls is Config else cls.__doc__
    with one_line_errors():
        path, flags = parse_flags(argv, cls, about, ALIASES, lambda key: suggest(key, fields, "--"))
        from_file = {}
        if path:
            from_file = read_config_file(find_config_file(path), fields)
        config = combine(flags, from_file, cls, fixed)
        if (from_file | flags).get("init_from") != "resume":
            note_scale(flags, from_file, fields)
    return config


def make_config(**settings) -> Config:
    """The Config of a program, without a command line: settings by keyword, checked as those of a file are. With
    init_from="resume" that of the run in out_dir, to generate with. Raises UserError or OSError."""
    fields = fields_of(Config)
    values = {}
    for spelling, value in settings.items():
        key = find_key(spelling, fields)
        values[key] = fit_type(key, value, fields[key].type)
    return combine(values, {}, Config, MODEL_KEYS)


def load_run(out_dir: str, **settings) -> Config:
    """The Config of the run in out_dir, settings on top. Raises UserError if there is no run, or a damaged one."""
    return make_config(init_from="resume", out_dir=out_dir, **settings)


def combine(typed, from_file, cls, fixed):
    """A cls of all settings: what was typed wins over a resumed run's own, this over the file, the file over the
    defaults."""
    fields = fields_of(cls)
    stored = {}
    values = from_file | typed
    out_dir = values.get("out_dir", getattr(cls, "out_dir", None))
    if values.get("init_from") == "resume":
        stored, facts = read_run(out_dir, fields)
        refuse_changes(typed, stored, fixed, out_dir)
        values = from_file | stored | typed
    elif names_another_dataset(values, fields):
        values.setdefault("label_names", None)
    for key, value in values.items():
        check_range(key, value)
    if values.get("auto_resume") and not stored and os.path.exists(os.path.join(out_dir, RUN_CONFIG)):
        stored, facts = read_run(out_dir, fields)
        refuse_another_run(dataclasses.asdict(cls(**values)), stored, out_dir)
    if stored:
        values["init_from"] = stored["init_from"]
    config = cls(**values)
    if stored:
        config.resume = True
        config.computed_in = facts.get("dtype")
        config.learned = facts.get("label_names")
        if config.dataset == stored.get("dataset"):
            config.trained_on = facts.get("data")
    return config


def names_another_dataset(values, fields):
    return "dataset" in values and values["dataset"] != fields["dataset"].default


def note_scale(flags, from_file, fields):
    """A line for a rank that is typed without alpha: the adapter's scale changes too, and few mean that."""
    if "alpha" in flags or not flags.get("rank"):
        return
    if (from_file | flags).get("rslora"):  # its alpha is meant to stay
        return
    rank = flags["rank"]
    rank_before = from_file.get("rank", fields["rank"].default)
    alpha = from_file.get("alpha", fields["alpha"].default)
    if rank_before in (0, rank):
        return
    kept = alpha / rank_before
    print(
        f"note: rank={rank} with alpha={alpha:g} scales the adapter by {alpha / rank:g}; "
        f"--alpha={kept * rank:g} keeps the config's {kept:g}"
    )


def fields_of(cls):
    return {field.name: field for field in dataclasses.fields(cls)}


# --- keys and their values -------------------------------------------------------------------------

ALIASES = {  # other spellings, in flags, files and programs
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "learning_rate": "lr",
}
HINTS = {  # nanoGPT's other keys and the handout's other names: what does their work here
    "r": "--rank is the adapters' rank",
    "instruction_template": "--template holds {text} and {label}",
    "decay_lr": "--decay_share=0 keeps the learning rate constant after the warm-up",
    "lr_decay_iters": "--decay_share is the last share of the run over which the learning rate falls to 0",
    "min_lr": "the learning rate falls to 0, over the last --decay_share of the run",
    "eval_only": "generate.py --init_from=resume scores a run and trains nothing",
    "log_interval": "the bar shows each update's loss; --eval_interval sets how often a line is printed",
    "always_save_checkpoint": "each evaluation saves a checkpoint; --save_interval saves between them",
    "bias": "GPT-2's layers have biases; --lora_bias trains them next to LoRA",
    "backend": "processes that torchrun starts choose nccl or gloo by themselves",
    "num_samples": "generate.py writes one text a call; another --seed gives another",
}
AT_LEAST = {  # smallest value allowed
    **dict.fromkeys(("rank", "alpha", "dropout", "warmup_iters", "eval_iters", "save_interval"), 0),
    **dict.fromkeys(("lr", "muon_lr", "weight_decay", "grad_clip", "n_sampled", "seed", "temperature"), 0),
    **dict.fromkeys(("beta1", "beta2", "decay_share", "lowercase_share", "train_examples"), 0),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "train_context", "batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "max_iters", "eval_interval", "max_new_tokens", "top_k"), 1),
    "lora_plus": 0.001,  # with 0 B stays zero
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


def find_key(spelling, fields, where=""):
    """The key that is meant; UserError, with what may be meant, if there is none."""
    key = ALIASES.get(spelling, spelling)
    if key not in fields:
        hint = suggest(key, fields) or "train.py --help lists the keys"
        raise UserError(f"{where}unknown key {key}; {hint}")
    return key


def suggest(key, fields, dashes=""):
    """What may be meant by an unknown key; "" if nothing is like it."""
    if key in HINTS:
        return HINTS[key]
    near = difflib.get_close_matches(key, [*fields, *ALIASES], 1)
    return f"did you mean {dashes}{near[0]}?" if near else ""


def fit_type(key, value, kind, where=""):
    """A value that is no text to convert, from a file or a program, as the key's type; UserError if it is another."""
    kinds = typing.get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}{key} = {value} is no finite number")
    if int in kinds and type(value) is float and value == int(value):
        value = int(value)
    if type(value) not in kinds:
        raise UserError(f"{where}{key} = {value!r}, but it is {getattr(kind, '__name__', kind)}")
    return value


def check_range(key, value):
    """UserError if the value is out of the key's range."""
    if value is None:
        return
    if key in ONE_OF and value not in ONE_OF[key]:
        raise UserError(f"{key}={value}: type one of {', '.join(ONE_OF[key])}")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise UserError(f"{key}={value}: type at least {AT_LEAST[key]}")
    if key in AT_MOST and value > AT_MOST[key]:
        raise UserError(f"{key}={value}: type at most {AT_MOST[key]}")


# --- a run that is there ---------------------------------------------------------------------------


def read_run(out_dir, fields):
    """(settings, facts) of the run in out_dir; without its folder's name, since it may have been moved."""
    path = os.path.join(out_dir, RUN_CONFIG)
    try:
        with open(path, encoding="utf-8") as f:
            stored = json.load(f)
        if stored.pop("sha256", None) not in (None, fingerprint(stored)):
            raise UserError(f"{path} was changed or damaged; to change a setting, type it as a flag")
        if "init_from" not in stored:
            raise UserError(f"{path} is damaged: no init_from in it")
        settings = {
            key: value
            for key, value in stored.items()
            if key in fields and key not in ("out_dir", "start", "predict")
        }
        return settings, stored.get("facts", {})
    except FileNotFoundError:
        runs = find_runs(os.path.dirname(os.path.normpath(out_dir)))
        others = f"; there are runs in: {', '.join(runs)}" if runs else ""
        raise UserError(
            f"init_from=resume: no run to resume in {out_dir} ({RUN_CONFIG} is missing){others}; type its --out_dir"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is damaged: {e}") from e


def find_runs(folder):
    """At most five folders of runs in this one, the newest first."""
    configs = glob.glob(os.path.join(glob.escape(folder), "*", RUN_CONFIG))
    newest = sorted(configs, key=os.path.getmtime, reverse=True)[:5]
    return [os.path.dirname(path) for path in newest]


def refuse_changes(typed, stored, fixed, out_dir):
    """UserError for a typed setting that would make another run of the stored one."""
    for key in fixed:
        if key in typed and typed[key] != stored.get(key, typed[key]):
            raise UserError(
                f"--{key}={typed[key]}: the run in {out_dir} has {key}={stored[key]}; drop the flag, or start "
                "another run with another --out_dir"
            )


def find_changes(settings: dict, stored: dict) -> list[str]:
    """The keys in which a run's settings differ from stored ones. Its folder may have been moved."""
    keys = [key for key in settings if key in stored and key not in ("out_dir", "auto_resume")]
    return [key for key in keys if settings[key] != stored[key]]


def refuse_another_run(settings, stored, out_dir):
    """UserError where auto_resume would go on with a run of other settings."""
    changes = [f"{key}={settings[key]} ({stored[key]} there)" for key in find_changes(settings, stored)]
    if changes:
        raise UserError(
            f"auto_resume: the run in {out_dir} has other settings: {', '.join(changes)}; type those, or another "
            "--out_dir for another run"
        )


def fingerprint(values: dict) -> str:
    """SHA-256 of all that train_config.json holds, kept in it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# --- config files ----------------------------------------------------------------------------------


def find_config_file(path):
    """The file that was typed. Where there is none: for config/NAME.py, as the assignment's handout spells it, the
    configs/NAME.py next to that folder or, typed in another directory, the one that ships."""
    if os.path.isfile(path):
        return path
    if re.match(r"\w+=", path):
        raise UserError(f"{path}: settings are typed with two dashes, --{path}")
    folder, name = os.path.split(path)
    parent, last = os.path.split(folder)
    places = [parent] if parent else ["", os.path.dirname(os.path.abspath(__file__))]
    for place in places if last in ("config", "configs") else ():
        other = os.path.join(place, "configs", name)
        if os.path.isfile(other):
            return other
    raise UserError(f"{path}: no such config file; those that ship are in configs/")


def read_config_file(path: str, fields: dict) -> dict:
    """{key: value} of a config file; UserError for a line that is no assignment to one of the fields."""
    values = {}
    for where, name, value in read_assignments(path):
        key = find_key(name, fields, where)
        values[key] = fit_type(key, value, fields[key].type, where)
    return values
