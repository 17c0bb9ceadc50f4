"""A setting is one statement in a dataclass: `rank: int = setting(128, least=0)  # its line in --help`."""

import dataclasses
import difflib
import math
import typing

from plumbing.program.errors import UserError

MODEL = "model"  # of the model: a resumed run keeps it, in training and in scoring
RUN = "run"  # of the training: a resumed run keeps it in training
CALL = "call"  # of one call alone: a resumed run does not bring it along
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
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"), "python -m tools.pretrain makes a model"),
    "num_samples": "generate.py writes one text a call; another --seed gives another",
}


def setting(default, least=None, most=None, one_of=None, kept=None):
    """A field with its default, the smallest and the largest value allowed, or all that are, and whether a resumed
    run keeps it: MODEL, RUN, CALL or, with None, until another value is typed."""
    rules = {"least": least, "most": most, "one_of": one_of, "kept": kept}
    return dataclasses.field(default=default, metadata=rules)


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    """The settings of a dataclass, by name. A field with a plain default is one without rules."""
    return {field.name: field for field in dataclasses.fields(cls) if not field.metadata.get("is_fact")}


def kept_keys(cls: type, *kinds: str) -> tuple[str, ...]:
    """The settings that a resumed run keeps in these ways."""
    return tuple(name for name, field in fields_of(cls).items() if field.metadata.get("kept") in kinds)


def settings_of(config) -> dict:
    """{key: value} of a config, without its facts."""
    return {name: getattr(config, name) for name in fields_of(type(config))}


def suggest_key(key: str, fields: dict, dashes: str = "") -> str:
    """What may be meant by an unknown key; "" if nothing is like it."""
    if key in HINTS:
        return HINTS[key]
    near = difflib.get_close_matches(key, [*fields, *ALIASES], 1)
    return f"did you mean {dashes}{near[0]}?" if near else ""


def fit_value(spelling: str, value, fields: dict, where: str = "") -> tuple:
    """(the key that is meant, the value as its type), from a file or a program; UserError for what does not fit."""
    key = ALIASES.get(spelling, spelling)
    if key not in fields:
        raise UserError(f"{where}unknown key {key}; {suggest_key(key, fields) or 'train.py --help lists the keys'}")
    kind = fields[key].type
    kinds = typing.get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{where}{key} = {value} is not finite")
    if int in kinds and type(value) is float and value == int(value):
        value = int(value)
    if type(value) not in kinds:
        raise UserError(f"{where}{key} = {value!r}, but it is {getattr(kind, '__name__', kind)}")
    return key, value


def check_values(cls: type, values: dict) -> None:
    """UserError if a value breaks one of its field's rules."""
    for key, field in fields_of(cls).items():
        value = values.get(key)
        rules = field.metadata
        if value is None:
            continue
        if rules.get("one_of") and value not in rules["one_of"]:
            raise UserError(f"{key}={value}: type one of {', '.join(rules['one_of'])}")
        if rules.get("least") is not None and value < rules["least"]:
            raise UserError(f"{key}={value}: type at least {rules['least']}")
        if rules.get("most") is not None and value > rules["most"]:
            raise UserError(f"{key}={value}: type at most {rules['most']}")
