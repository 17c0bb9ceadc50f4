"""How OpenMP's threads wait: set before torch reads it, and never over what the user has set.

python -m pytest tests/running/test_threads.py
"""

import os
import subprocess
import sys

import pytest
from conftest import REPO

PROGRAM = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)  # torch itself would take two seconds
sys.meta_path.insert(0, Watch())
import {chapter}
"""


@pytest.mark.parametrize("chapter", ["train", "generate", "tools.sweep", "tools.anatomy", "tools.bench"])
@pytest.mark.parametrize("typed", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_soon_sleep_unless_the_user_says_otherwise(chapter, typed):
    """Otherwise a training next to a browser is several times slower, or a user's own setting is overwritten."""
    own = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in own} | typed
    command = [sys.executable, "-c", PROGRAM.format(chapter=chapter)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=100)
    expected = typed.get("GOMP_SPINCOUNT", "None") if typed else "3000"
    assert done.stdout.split() == [expected], done.stderr
