"""A config file: plain assignments (`rank = 4 * 8  # comment`), found, read and never executed."""

import ast
import operator
import os
import re
from collections.abc import Iterator

from plumbing.program.errors import UserError
from plumbing.program.files import ROOT
from plumbing.program.settings import fit_value

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def find_config_file(path):
    """The file that was typed. Where there is none: for config/NAME.py, as the assignment's handout spells it, the
    configs/NAME.py next to that folder or, typed in another directory, the one that ships."""
    if os.path.isfile(path):
        return path
    if re.match(r"\w+=", path):
        raise UserError(f"{path}: settings are typed with two dashes, --{path}")
    folder, name = os.path.split(path)
    parent, last = os.path.split(folder)
    places = [parent] if parent else ["", ROOT]
    for place in places if last in ("config", "configs") else ():
        other = os.path.join(place, "configs", name)
        if os.path.isfile(other):
            return other
    raise UserError(f"{path}: no such config file; those that ship are in configs/")


def read_config_file(path: str, fields: dict) -> dict:
    """{key: value} of a config file; UserError for a line that is no assignment to one of the fields."""
    return dict(fit_value(name, value, fields, where) for where, name, value in read_assignments(path))


def read_assignments(path: str) -> Iterator[tuple[str, str, object]]:
    """Yields (where, name, value) of each line; where is "FILE:LINE: ", to begin an error's line with. UserError for
    anything else than assignments of literals and their arithmetic."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as plain assignments: {e}") from e
    for node in tree.body:
        where = f"{path}:{node.lineno}: "
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}only plain assignments are read here, such as rank = 16")
        name = node.targets[0].id
        try:
            value = evaluate(node.value, where)
        except RecursionError:
            raise UserError(f"{where}{name} is nested too deeply; type its value") from None
        yield where, name, value


def evaluate(node, where):
    """A literal's value, or that of + - * / over numbers."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate_number(node.operand, where)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        a = evaluate_number(node.left, where)
        b = evaluate_number(node.right, where)
        if isinstance(node.op, ast.Div) and b == 0:
            raise UserError(f"{where}division by zero")
        return ARITHMETIC[type(node.op)](a, b)
    raise UserError(f"{where}type a number, a quoted text, True, False or None")


def evaluate_number(node, where):
    value = evaluate(node, where)
    if type(value) not in (int, float):
        raise UserError(f"{where}arithmetic needs numbers, not {value!r}")
    return value
