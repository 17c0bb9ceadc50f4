"""Flags (`--key=value`) for the fields of a dataclass: a mistake is one line, and --help prints the class's table."""

import argparse
import inspect
import os
import re
import sys

from plumbing.program.errors import UserError
from plumbing.program.settings import ALIASES, fields_of, fit_value, suggest_key


def parse_flags(argv: list[str], cls: type, about: str) -> tuple[str | None, dict]:
    """(the config file's path or None, {key: value} of the flags for a dataclass). UserError for a mistake.

    about: what --help prints above the table.
    """
    fields = fields_of(cls)
    # In a command that is copied out of the handout's PDF the two dashes are one long one.
    argv = [re.sub(r"^[–—](?=[a-z][\w-]+(=|$))", "--", word) for word in argv]
    if not {"-h", "--help"}.isdisjoint(argv):  # the table is read from the source, which takes a while
        about = make_help(cls, about)
    usage = "%(prog)s [configs/FILE.py] [--key=value ...]"
    parser = make_parser(about, usage=usage, argument_default=argparse.SUPPRESS)
    parser.add_argument("config_file", nargs="?", default=None, help=argparse.SUPPRESS)
    for key, field in fields.items():
        names = [key, *(alias for alias, meant in ALIASES.items() if meant == key)]
        spellings = dict.fromkeys(f"--{s}" for name in names for s in (name, name.replace("_", "-")))
        options = {"nargs": "?", "const": "True"} if field.type is bool else {}
        parser.add_argument(*spellings, dest=key, help=argparse.SUPPRESS, **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]!r}: one config file at most; settings are typed as --key=value")
    if unknown:
        key = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise UserError(f"unknown flag --{key}: {suggest_key(key, fields, '--') or '--help lists the flags'}")
    texts = vars(known)
    path = texts.pop("config_file")
    return path, dict(fit_value(key, text, fields, f"--{key}={text}: ", is_text=True) for key, text in texts.items())


def make_parser(about: str, **options) -> argparse.ArgumentParser:
    """A parser whose --help begins with `about`, as it is written, and for which a mistake is one line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of a module that was started with -m
    program = f"python -m {spec.name}" if spec else f"python {os.path.basename(sys.argv[0])}"
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=program, description=about, **options)

    def refuse(message):
        raise UserError(f"{message}; {program} --help")

    parser.error = refuse
    return parser


def make_help(cls, about):
    """Every key with its type, default and the comment at its right."""
    lines = [about]
    settings = fields_of(cls)
    for line in "".join(map(inspect.getsource, reversed(cls.__mro__[:-1]))).splitlines():
        if section := re.match(r"    # --- (.*)", line):
            lines.append(f"\n{section.group(1)}:")
        key = re.match(r"    (\w+): .*?  # (.*)", line)
        if key and key[1] in settings:  # else a fact
            name, comment = key.groups()
            field = settings[name]
            kind = getattr(field.type, "__name__", str(field.type))
            choices = field.metadata.get("one_of")
            comment += f" ({', '.join(choices)})" if choices else ""
            lines.append(f"  --{name:27} {kind:12} {str(field.default)!r:24} {comment}")
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
