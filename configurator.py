"""One checked, typed configuration from defaults, a config file and flags.

    python train.py configs/finetune_params_config.py --rank=16 --lr 1e-4

A config file holds plain assignments (`rank = 16  # comment`): literals and their arithmetic. It is read,
never executed. Flags win over the file, the file over the defaults below. `--help` prints this table.
"""

import dataclasses
import os
from dataclasses import dataclass

from plumbing.program.config_file import find_config_file, read_config_file
from plumbing.program.errors import one_line_errors
from plumbing.program.flags import note_scale, parse_flags
from plumbing.program.settings import CALL, MODEL, RUN, check_values, fields_of, fit_value, kept_keys, setting
from plumbing.program.stored_run import RUN_CONFIG, read_run, refuse_another_run, refuse_changes

TEMPLATE = """Classify the sentiment of the following movie review as positive or negative.

Review: {text}

Sentiment: {label}"""


@dataclass
class Facts:
    """What a run has found out. It is stored in train_config.json beside the settings."""

    base: dict[str, str] | None = None  # what tells the base's weights from others: fingerprint_base
    model: dict[str, str] | None = None  # the same of the run's own weights, once full fine-tuning has finished
    data: str | None = None  # a digest of its data set's content; None where this config names another data set
    dtype: str | None = None  # of its arithmetic
    label_names: list[str] | None = None  # the words of its labels
    word_of: dict[str, str] | None = None  # {label as its data writes it: word}, {"0": "terrible", "1": "great"}
    seed: int | None = None  # that drew its splits; a --seed typed later changes only what is sampled


@dataclass
class Config:
    """The defaults are the assignment's: those of configs/finetune_params_config.py.

    kept says what becomes of a run's value when it is resumed. MODEL: it is fixed. RUN: it is fixed in training, and
    free in scoring. CALL: it is left behind. Without kept it holds until another one is typed.
    """

    # --- model
    init_from: str = "gpt2-medium"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-mini, resume, a directory
    rank: int = setting(128, least=0, kept=MODEL)  # of the adapters; 0 trains without LoRA (full fine-tuning)
    alpha: float = setting(512.0, least=0, kept=MODEL)  # the adapters' output is scaled by alpha / rank
    rslora: bool = setting(False, kept=MODEL)  # scale by alpha / sqrt(rank) ("rank-stabilised", Kalajdzievski 2023)
    dropout: float = setting(0.05, least=0, most=0.999, kept=RUN)  # of the adapters' input; without LoRA everywhere
    lora_targets: str = setting(r"attn\.c_(attn|proj)$", kept=MODEL)  # regular expression: the layers with an adapter
    lora_bias: str = setting("none", one_of=("none", "all", "lora_only"), kept=MODEL)  # biases trained next to LoRA
    trainable: str | None = setting(None, kept=MODEL)  # regular expression: what trains next to LoRA, or without it
    # --- data
    task: str = setting("instruct", one_of=("instruct", "classify"), kept=MODEL)  # labels as text, or as classes
    dataset: str = setting("rotten_tomatoes", kept=RUN)  # rt_reviews, a file, a directory, or a hub name
    text_field: str = setting("text", kept=RUN)  # column that holds the text
    label_field: str = setting("label", kept=RUN)  # column that holds the label, as a word or a number
    # Its default is for the default data set: where a flag or file names another dataset alone, it is None.
    label_names: str | None = setting("negative,positive", kept=RUN)  # words of 0, 1, ...; None: the data's own
    template: str = setting(TEMPLATE, kept=RUN)  # {text} and {label}; {label} comes last
    loss_on: str = setting("label", one_of=("label", "all"), kept=RUN)  # all: every token is scored
    train_examples: int = setting(0, least=0, kept=RUN)  # training examples, chosen by the seed; 0: all
    held_out: float = setting(0.0, least=0, most=0.9, kept=RUN)  # share of train that stands in for validation
    balance_classes: bool = setting(False, kept=RUN)  # classify: rare classes weigh as much in the loss
    # --- training
    out_dir: str = setting("out", kept=CALL)  # where everything is written
    auto_resume: bool = False  # go on with out_dir's run of the same settings if there is one, or begin
    batch_size: int = setting(32, least=1, kept=RUN)  # examples in a forward pass, over all processes
    gradient_accumulation_steps: int = setting(1, least=1, kept=RUN)  # forward passes in an update
    max_iters: int = setting(320, least=1)  # updates
    lr: float = setting(5e-4, least=0)  # peak learning rate of AdamW
    lora_plus: float = setting(1.0, least=0.001, kept=RUN)  # B's rate over A's: 16 is LoRA+ (Hayou et al. 2024)
    weight_decay: float = setting(0.0, least=0)  # AdamW's, on matrices
    beta1: float = setting(0.9, least=0, most=0.999)  # AdamW's first moment
    beta2: float = setting(0.99, least=0, most=0.999)  # AdamW's second moment
    grad_clip: float = setting(1.0, least=0)  # gradient norm is cut to this; 0 leaves it
    warmup_iters: int = setting(20, least=0)  # updates over which the learning rate rises
    decay_share: float = setting(0.9, least=0, most=1)  # last share of the run: lr falls to 0 in it
    eval_interval: int = setting(40, least=1)  # updates between evaluations
    eval_iters: int = setting(20, least=0)  # batches in an evaluation; 0: the whole validation split
    save_interval: int = setting(0, least=0)  # updates between checkpoints; 0: only after evaluations
    seed: int = setting(1337, least=0, most=2**63 - 1, kept=RUN)  # of data order, adapters and dropout
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # CUDA: the same seed gives the same bits, as it does on a CPU; slower
    # --- machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = setting("auto", one_of=("auto", "float32", "bfloat16", "float16"))  # of weights and arithmetic
    # --- logging
    wandb_log: bool = False  # log to Weights & Biases (WANDB_MODE=offline needs no account)
    wandb_project: str = "nanolora"  # project there
    wandb_run_name: str | None = None  # name there; None: out_dir's
    # --- generation (generate.py)
    start: str | None = setting(None, kept=CALL)  # write on from this text instead of scoring
    predict: str | None = setting(None, kept=CALL)  # label the texts of this file; -: standard input
    split: str = setting("test", one_of=("test", "validation", "train"))  # what is scored
    max_new_tokens: int | None = setting(None, least=1)  # None: 5 in scoring (or the longest label), 200 with --start
    temperature: float = setting(0.0, least=0)  # 0: the likeliest token; higher is more random
    top_k: int | None = setting(None, least=1)  # sample among the k likeliest tokens; None: all

    # Facts about the run in out_dir, if init_from=resume; not a setting. Then init_from is that run's own base.
    facts: Facts | None = dataclasses.field(default=None, metadata={"is_fact": True})


def configure(argv: list[str], cls: type = Config, trains: bool = True):
    """argv (without the program's name) -> cls. Prints help or one line for a mistake, and exits.

    With init_from=resume the config is that of the run in out_dir, flags on top; what such a run keeps may not
    differ from it. trains: whether it will be trained, or scored.
    """
    with one_line_errors():
        path, typed = parse_flags(argv, cls, about=__doc__ if cls is Config else cls.__doc__)
        from_file = read_config_file(find_config_file(path), fields_of(cls)) if path else {}
        config = combine(typed, from_file, cls, trains)
    if "rank" in typed and "alpha" not in typed and config.facts is None:
        note_scale(config, rank_before=from_file.get("rank", cls.rank))
    return config


def make_config(**settings) -> Config:
    """The Config of a program, without a command line: settings by keyword, checked as those of a file are. With
    init_from="resume" that of the run in out_dir, to generate with. Raises UserError (no run, a damaged one) or
    OSError."""
    values = dict(fit_value(key, value, fields_of(Config)) for key, value in settings.items())
    return combine(values, {}, Config, trains=False)


def combine(typed, from_file, cls, trains):
    """A cls of all settings: what was typed wins over a resumed run's settings, those win over the config file, and
    the file wins over the defaults. With auto_resume they must equal the settings of the run in out_dir."""
    values = from_file | typed
    out_dir = values.get("out_dir", getattr(cls, "out_dir", None))
    resumes = values.get("init_from") == "resume"
    finds_run = values.get("auto_resume") and os.path.exists(os.path.join(out_dir, RUN_CONFIG))
    stored, facts = read_run(out_dir) if resumes or finds_run else (None, None)
    if resumes:
        refuse_changes(typed, stored, kept_keys(cls, MODEL, RUN) if trains else kept_keys(cls, MODEL), out_dir)
        ours = fields_of(cls).keys() - kept_keys(cls, CALL)
        values = from_file | {key: value for key, value in stored.items() if key in ours} | typed
    elif "dataset" in values and values["dataset"] != cls.dataset:
        values.setdefault("label_names", None)
    check_values(cls, values)
    if stored is None:
        return cls(**values)
    if not resumes:
        refuse_another_run(cls(**values), stored, out_dir)
    config = cls(**values | {"init_from": stored["init_from"]})
    facts = facts | {"seed": stored.get("seed")}
    config.facts = Facts(**{field.name: facts.get(field.name) for field in dataclasses.fields(Facts)})
    if config.dataset != stored.get("dataset"):
        config.facts.data = None
    if config.label_names != stored.get("label_names"):  # typed now: they say what the labels of other data mean
        config.facts.word_of = None
    return config
