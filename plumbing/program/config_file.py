"""A config file: plain assignments (`rank = 4 * 8  # comment`), found, read and never executed."""

import ast
import os
import re
from operator import add, mul, neg, sub, truediv

from plumbing.program.errors import UserError
from plumbing.program.files import ROOT
from plumbing.program.settings import fit_value

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.USub: neg}


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
    """{key: value} of a config file; UserError for a line that is no assignment of a literal, or of + - * / over
    numbers, to one of the fields."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as plain assignments: {e}") from e
    values = {}
    for node in tree.body:
        where = f"{path}:{node.lineno}: "
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}only plain assignments are read here, such as rank = 16")
        try:
            value = evaluate(node.value, where)
        except RecursionError:
            raise UserError(f"{where}the value is nested too deeply; type it as one number") from None
        key, value = fit_value(node.targets[0].id, value, fields, where)
        values[key] = value
    return values


def evaluate(node, where):
    """A literal's value, or that of arithmetic."""
    if isinstance(node, ast.Constant):
        return node.value
    compute = OPERATORS.get(type(getattr(node, "op", None)))
    if compute is None:
        raise UserError(f"{where}type a number, a quoted text, True, False or None")
    operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    numbers = [evaluate(operand, where) for operand in operands]
    for number in numbers:
        if type(number) not in (int, float):
            raise UserError(f"{where}arithmetic needs numbers, not {number!r}")
    try:
        return compute(*numbers)
    except ArithmeticError as e:  # division by zero, or an integer that is too large to divide
        raise UserError(f"{where}{e}; type the value itself") from e
