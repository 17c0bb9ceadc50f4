"""Files are whole or the old ones, on Windows too.

python -m pytest tests/program/test_files.py
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from plumbing.data.token_cache import whole_folder
from plumbing.program.errors import one_line_errors
from plumbing.program.files import write_json


@pytest.fixture
def windows(monkeypatch):
    """os.replace as Windows has it while another program has the old file open: `refusals` times, then it works."""
    state = SimpleNamespace(refusals=0, waited=[])
    plain = os.replace

    def replace(new, old):
        if state.refusals > 0:
            state.refusals -= 1
            raise PermissionError(13, "Access is denied", new, 5, old)
        plain(new, old)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", state.waited.append)
    return state


def test_a_file_that_is_open_elsewhere_for_a_moment_is_replaced_after_it(tmp_path, windows):
    """Lost if it fails: on Windows a virus scanner that looks at the last checkpoint ends the run."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    windows.refusals = 3
    write_json(path, "new")
    assert json.loads(path.read_text()) == "new"
    windows.refusals = 2
    with whole_folder(tmp_path / "folder") as new:
        (Path(new) / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"
    assert len(windows.waited) == 5


def test_a_file_that_stays_open_elsewhere_is_one_line(tmp_path, windows, capsys):
    """Lost if it fails: on Windows a metrics.jsonl that is open in an editor is a traceback, or is lost."""
    path = tmp_path / "file.json"
    write_json(path, "old")
    windows.refusals = 99
    with pytest.raises(SystemExit) as end, one_line_errors():
        write_json(path, "new")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert str(path) in error and "close the program that has it open" in error and error.count("\n") == 1
    assert json.loads(path.read_text()) == "old"
    assert os.listdir(tmp_path) == ["file.json"]
