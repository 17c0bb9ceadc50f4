"""Flags (`--key=value`) for the fields of a dataclass: a mistake is one line, and --help prints the class's table."""

import argparse
import inspect
import math
import os
import re
import sys
import typing

from plumbing.program.errors import UserError
from plumbing.program.settings import ALIASES, fields_of, suggest_key


def parse_flags(argv: list[str], cls: type, about: str) -> tuple[str | None, dict]:
    """(the config file's path or None, {key: value} of the flags for a dataclass). UserError for a mistake.

    about: what --help prints above the table.
    """
    fields = fields_of(cls)
    kinds = typing.get_type_hints(cls)
    options = {"usage": "%(prog)s [configs/FILE.py] [--key=value ...]", "argument_default": argparse.SUPPRESS}
    # In a command that is copied out of the handout's PDF the two dashes are one long one.
    argv = [re.sub(r"^[–—](?=[a-z][\w-]+(=|$))", "--", word) for word in argv]
    wants_help = not {"-h", "--help"}.isdisjoint(argv)  # the table is read from the source, which takes a while
    parser = make_parser(make_help(cls, about) if wants_help else about, **options)
    parser.error = lambda message: refuse(message, fields)
    parser.add_argument("config_file", nargs="?", default=None, help=argparse.SUPPRESS)
    for key in fields:
        names = [key, *(alias for alias, meant in ALIASES.items() if meant == key)]
        spellings = dict.fromkeys(f"--{s}" for name in names for s in (name, name.replace("_", "-")))
        options = {"nargs": "?", "const": "True"} if kinds[key] is bool else {}
        parser.add_argument(*spellings, dest=key, help=argparse.SUPPRESS, **options)
    texts = vars(parser.parse_args(argv))
    path = texts.pop("config_file")
    return path, {key: convert(key, text, kinds[key], f"--{key}={text}") for key, text in texts.items()}


def make_parser(about: str, **options) -> argparse.ArgumentParser:
    """A parser whose --help begins with `about`, as it is written, and for which a mistake is one line."""
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=program_name(), description=about, **options)

    def refuse(message):
        raise UserError(f"{message}; {parser.prog} --help")

    parser.error = refuse
    return parser


def program_name():
    """As it was typed: python train.py, or python -m tools.NAME."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module that was started with -m
    return f"python -m {spec.name}" if spec else f"python {os.path.basename(sys.argv[0])}"


def refuse(message, fields):
    """argparse's message as a line that says what to type."""
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if not unknown:
        raise UserError(message)
    word = unknown.group(1)
    if not word.startswith("-"):
        raise UserError(f"{word}: one config file at most; settings are typed as --key=value")
    key = word.lstrip("-").split("=")[0].replace("-", "_")
    raise UserError(f"unknown flag --{key}: {suggest_key(key, fields, '--') or '--help lists the flags'}")


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
        wanted = "an integer, such as 16" if int in kinds else "a number, such as 5e-4"
        raise UserError(f"{where}: {key} is {wanted}") from None


def make_help(cls, about):
    """Every key with its type, default and the comment at its right."""
    lines = [about]
    kinds = typing.get_type_hints(cls)
    settings = fields_of(cls)
    for owner in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(owner).splitlines():
            if section := re.match(r"    # --- (.*)", line):
                lines.append(f"\n{section.group(1)}:")
            elif key := re.match(r"    (\w+): .*?  # (.*)", line):
                name, comment = key.groups()
                if name not in settings:
                    continue  # a fact
                kind = getattr(kinds[name], "__name__", str(kinds[name]))
                default = repr(str(settings[name].default))
                choices = settings[name].metadata.get("one_of")
                comment += f" ({', '.join(choices)})" if choices else ""
                lines.append(f"  --{name:27} {kind:12} {default:24} {comment}")
    return "\n".join(lines).replace("%", "%%")


def note_scale(config, rank_before):
    """A line for a rank that is typed without alpha: the adapter's scale changes too, and few mean that."""
    # With rslora alpha is meant to stay.
    if config.rslora or 0 in (config.rank, rank_before) or config.rank == rank_before:
        return
    kept = config.alpha / rank_before
    print(
        f"note: rank={config.rank} with alpha={config.alpha:g} scales the adapter by {config.alpha / config.rank:g}; "
        f"--alpha={kept * config.rank:g} keeps the config's {kept:g}"
    )
