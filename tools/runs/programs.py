"""The programs of this repository as processes of their own: output in a log, last words in an error, no orphans."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from plumbing.program.files import ROOT

# Linux can end a child whose parent was killed: 1 is PR_SET_PDEATHSIG, 9 SIGKILL. It outlives execv.
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); e = sys.executable; os.execv(e, [e, *sys.argv[1:]])"


@contextlib.contextmanager
def start_program(program: str, flags: list[str], log: str, environment: dict) -> Iterator[subprocess.Popen]:
    """train.py or generate.py, its output added to the file `log`. At the block's end it has ended: by itself, or by
    SIGTERM, on which a training saves. Raises RuntimeError, with its last words, where it failed by itself."""
    tie = ["-c", TIED] if sys.platform == "linux" else []
    command = [sys.executable, *tie, os.path.join(ROOT, program), *flags]
    with open(log, "a+", encoding="utf-8", errors="replace") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=os.environ | environment, **streams)
        try:
            yield child
            child.wait()
        finally:
            child.terminate()
            child.wait()
        if child.returncode:
            output.seek(0)
            lines = re.findall(r"[^\r\n]+", output.read())
            errors = [line for line in lines if line.startswith("error:")] or lines or ["no message"]
            raise RuntimeError(f"{program} ended with exit code {child.returncode}: {errors[-1].strip()}")


def run_here(runs: list, environment: dict) -> Iterator[tuple[str, str | None, str | None]]:
    """Makes runs one after another: each has a name, a folder and, for that folder, commands. Yields
    (name, place, None) where one begins and (name, None, reason) where it ends; the reason is None if all is well."""
    for run in runs:
        yield run.name, "this machine", None
        reason = None
        try:
            os.makedirs(run.folder, exist_ok=True)
            for program, *flags in run.commands(run.folder):
                with start_program(program, flags, os.path.join(run.folder, "log.txt"), environment):
                    pass
        except (RuntimeError, OSError) as e:
            reason = str(e)
        yield run.name, None, reason
