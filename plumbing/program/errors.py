"""A mistake is one line that says what to type instead; these few functions make that line."""

import contextlib
import os
import re
import sys
import traceback


class UserError(ValueError):
    """A mistake of the user's: one line that says what, where and what to type instead."""


@contextlib.contextmanager
def one_line_errors(kinds=(ValueError, OSError)):
    """Ends the program with one line and exit code 2 where the user's input or machine is at fault."""
    try:
        yield
    except kinds as e:
        text = str(e)
        if isinstance(e, OSError) and e.filename:
            text = f"{e.filename}: {e.strerror}"
        elif isinstance(e, ModuleNotFoundError):
            file = traceback.extract_tb(e.__traceback__)[-1].filename
            text = f"{os.path.basename(file)} imports {e.name}, which is not installed: pip install {e.name}"
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of what an exception says; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def compile_pattern(key: str, text: str) -> re.Pattern:
    """A regular expression that the user typed for `key`. Raises ValueError if it is none."""
    try:
        return re.compile(text)
    except re.error as e:
        raise ValueError(f"{key}={text}: no regular expression ({e})") from e
