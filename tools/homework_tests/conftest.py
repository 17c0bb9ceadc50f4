"""PYTEST_DONT_REWRITE  What every part of the grader shares: a failure is one message, not a page of traceback."""

import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumbing.data import token_cache  # noqa: E402

# What was tokenised by an earlier try is not used again; the reviews, once downloaded, are.
OWN = tempfile.TemporaryDirectory(prefix="nanolora-")
if os.path.exists(os.path.join(token_cache.CACHE, "rt_reviews")):
    shutil.copytree(os.path.join(token_cache.CACHE, "rt_reviews"), os.path.join(OWN.name, "rt_reviews"))
os.environ["NANOLORA_CACHE"] = token_cache.CACHE = OWN.name


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except Exception as e:
        message = describe(e)
        if not message:
            raise
    pytest.fail(message, pytrace=False)


def describe(error):
    """What a test says, or which exercise is still empty, or the line of the chapters where an error was raised."""
    text = str(error).strip()
    if isinstance(error, AssertionError):
        return text
    if text.startswith("exercise "):
        return f"still empty: {text.removeprefix('exercise ')}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if Path(frame.filename).parent == ROOT]
    if not places:
        return None
    last = places[-1]
    where = f"{Path(last.filename).name}, line {last.lineno}, in {last.name}: {last.line}"
    return f"{where}\n{type(error).__name__}: {text}"
