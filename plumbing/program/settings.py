"""A setting is one statement in a dataclass: `rank: int = setting(128, least=0)  # its line in --help`."""

import contextlib
import dataclasses
import difflib
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
WANTED = {  # what a setting is, by its type
    bool: "True or False",
    int: "an integer (such as 16)",
    float: "a floating-point number (such as 5e-4)",
    str: "a string",
    type(None): "None",
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


def fit_value(spelling: str, value, fields: dict, where: str = "", is_text: bool = False) -> tuple:
    """(the key that is meant, the value as its type), from a file, a program or, with is_text, a flag; UserError for
    what does not fit."""
    key = ALIASES.get(spelling, spelling)
    if key not in fields:
        raise UserError(f"{where}unknown key {key}; {suggest_key(key, fields) or 'train.py --help lists the keys'}")
    kinds = typing.get_args(fields[key].type) or (fields[key].type,)
    if is_text:
        value = read_text(value, kinds)
    if float in kinds and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if int in kinds and type(value) is float and value.is_integer():
        value = int(value)
    is_number = type(value) in (int, float)
    if type(value) not in kinds or (is_number and not abs(value) < 1e100):
        raise UserError(f"{where}{key} is {' or '.join(WANTED[kind] for kind in kinds)}, not {value!r}")
    return key, value


def read_text(text, kinds):
    """A flag's text as a value of one of these types; the text itself where it is none."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":  # quotes that a shell left in
        text = text[1:-1]
    if type(None) in kinds and text in ("None", "none"):
        return None
    if str in kinds:
        return text
    if bool in kinds:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def check_values(cls: type, values: dict) -> None:
    """UserError if a value breaks one of its field's rules."""
    for key, field in fields_of(cls).items():
        value = values.get(key)
        if value is None:
            continue
        least, most, one_of = (field.metadata.get(rule) for rule in ("least", "most", "one_of"))
        if one_of and value not in one_of:
            raise UserError(f"{key}={value}: type one of {', '.join(one_of)}")
        if least is not None and value < least:
            raise UserError(f"{key}={value}: type at least {least}")
        if most is not None and value > most:
            raise UserError(f"{key}={value}: type at most {most}")
