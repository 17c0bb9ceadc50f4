"""What Windows does not have is needed by no program.

python -m pytest tests/program/test_windows.py
"""

import pytest
from conftest import finish, flags, resume, start

# Windows has no such modules, signals and functions. Python finds None in sys.modules to be a module that is missing.
WINDOWS = """
import os, runpy, signal, sys
import multiprocessing  # itself asks for os.fork before it is taken away
for name in ("resource", "fcntl", "termios", "pwd", "grp", "pty", "tty"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGPIPE", "SIGALRM"):
    delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "getpgid", "killpg", "setsid", "mkfifo", "EX_OK"):
    delattr(os, name)
program, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program
sys.path.insert(0, os.getcwd())
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "program",
    ["train.py", "generate.py", "tools.sweep", "tools.bench", "tools.anatomy", "tools.export", "tools.pretrain"],
)
def test_every_program_starts_without_what_windows_lacks(program):
    """Lost if it fails: on Windows a program ends in an ImportError before it has read its flags."""
    out, _ = finish(start("-c", WINDOWS, program, "--help"))
    assert "usage" in out


def test_a_run_from_training_to_score(place):
    """Lost if it fails: on Windows a run starts and ends in its middle."""
    settings = {"rank": 2, "alpha": 8, "max_iters": 2, "eval_interval": 1}
    finish(start("-c", WINDOWS, "train.py", *flags(place, "windows", **settings)))
    finish(start("-c", WINDOWS, "train.py", *resume(place, "windows", max_iters=3)))
    finish(start("-c", WINDOWS, "generate.py", *resume(place, "windows")))
    finish(start("-c", WINDOWS, "tools.anatomy", place / "windows"))
