"""What a GPU would run, on one that computes nothing: shapes, dtypes and devices. Opt-in: it compiles a stub.

python -m pytest -m fake_gpu
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO

pytestmark = [
    pytest.mark.fake_gpu,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="no CPU build of torch"),
]


def walk(*args):
    command = [sys.executable, "tests/fake_gpu/walk.py", *args]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)


def test_every_tensor_is_on_the_gpu():
    """Otherwise training, scoring or writing ends in an error on the first GPU, or in a wait at each layer."""
    done = walk()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 3 * 2 * 11 + 1


def test_a_tensor_left_on_the_cpu_is_noticed():
    """Otherwise the test above is green whatever it walks through."""
    done = walk("broken")
    assert done.returncode == 1 and "FAIL" in done.stdout and "model.py" in done.stdout, done.stdout + done.stderr
