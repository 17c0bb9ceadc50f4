"""Where output ends, letters are missing, streams are closed, or a notebook shows it: the work goes on all the same.

python -m pytest tests/program/test_terminal.py
"""

import io
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO, finish, flags, read_metrics, resume, start

from plumbing.program.terminal import forgiving_output

RUN = {"rank": 2, "alpha": 8, "max_iters": 4, "eval_interval": 1}


def shell(command, **env):
    """(exit codes of a pipeline's parts, stdout, stderr) as bash gives them."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    script = f'{command}; echo "${{PIPESTATUS[@]}}" >&3'
    read, write = os.pipe()
    bash = ["bash", "-c", f"exec 3>&{write}; {script}"]
    done = subprocess.run(bash, cwd=REPO, env=env, capture_output=True, timeout=300, pass_fds=[write])
    os.close(write)
    with open(read) as f:
        codes = f.read().split()
    return list(map(int, codes)), done.stdout, done.stderr.decode()


def python(*argv):
    return shlex.join([sys.executable, *map(str, argv)])


def slow(*cases):
    """What walks the same lines as the case before: `make slow`."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("reader", ["head -1", *slow("grep -m1 params", "true")])
def test_training_goes_on_when_its_reader_has_gone(place, reader):
    """Lost if it fails: `train.py | head -1` ends a run at its second line. (tests/test_generate.py has generate.py's
    reader go.)"""
    name = f"reader-{reader.split()[0]}"
    codes, _, err = shell(f"{python('train.py', *flags(place, name, **RUN))} | {reader}")
    assert codes[0] in (0, 141) and err == ""  # 128 + SIGPIPE, as `yes | head -1` leaves in a shell
    assert read_metrics(place / name)[-1]["iter"] == 4
    assert (place / name / "adapter_model.safetensors").exists() and (place / name / "loss.png").exists()


def test_letters_that_the_terminal_lacks_stop_nothing(place):
    """Lost if it fails: on an old Windows console a folder's name ends the run in a traceback."""
    argv = flags(place, "Ausgänge-结果", **RUN)
    codes, out, err = shell(python("train.py", *argv), PYTHONUTF8="0", PYTHONIOENCODING="cp1252")
    assert codes == [0] and err == "", err
    assert r"\u7ed3\u679c" in out.decode("cp1252")
    assert read_metrics(place / "Ausgänge-结果")[-1]["iter"] == 4


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", *slow("2>&-", ">&-")])
def test_closed_streams_stop_nothing(place, closed):
    """Lost if it fails: a run that was started by a service without streams ends at its first line."""
    name = f"closed-{len(closed)}{closed[0]}"
    codes, _, err = shell(f"{python('train.py', *flags(place, name, **RUN))} {closed}")
    assert codes == [0] and "Traceback" not in err
    assert read_metrics(place / name)[-1]["iter"] == 4
    codes, _, err = shell(f"{python('generate.py', *resume(place, name))} {closed}")
    assert codes == [0] and "Traceback" not in err and (place / name / "accuracy.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_log_on_a_full_disk_stops_nothing(place):
    """Lost if it fails: a run ends with the disk of its log; or what is missing in the log is told to nobody."""
    _, err = finish(start("train.py", *flags(place, "full", **RUN), out="/dev/full"), code=2)
    assert err.count("\n") == 1 and "No space" in err
    assert read_metrics(place / "full")[-1]["iter"] == 4 and (place / "full" / "README.md").exists()


def test_a_folder_whose_name_is_no_text(place):
    """Lost if it fails: in a folder with an old file system's name a run ends in a traceback."""
    folder = os.fsdecode(os.fsencode(place / "old-") + b"\xe4")
    _, err = finish(start("train.py", *flags(place, "x", **RUN), f"--out_dir={folder}"))
    assert err == "", err
    with open(os.path.join(folder, "README.md"), encoding="utf-8") as f:
        assert r"\udce4" in f.read()


def test_a_sweeps_plan_may_be_cut_off(place):
    """Lost if it fails: `sweep --dry_run | head` ends in a traceback below the lines that were wanted."""
    argv = flags(place, "sweep", ranks="1,2,3,4,5,6,7,8", seeds="1,2,3,4,5,6,7,8,9")
    codes, out, err = shell(f"{python('-m', 'tools.sweep', *argv, '--dry_run')} | head -2")
    assert codes[1] == 0 and out.count(b"\n") == 2 and "Traceback" not in err and "BrokenPipe" not in err


UNBUFFERED = """
import sys
from plumbing.program.terminal import forgiving_output, reader_has_gone
with forgiving_output():
    print("first")
    sys.stdin.readline()
    print("second")
    print(reader_has_gone(), file=sys.stderr)
"""


@pytest.mark.parametrize("reads", [True, False])
def test_unbuffered_output_comes_at_once(reads):
    """Lost if it fails: in a container with PYTHONUNBUFFERED=1 a run's lines come when it is over."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-u", "-c", UNBUFFERED], cwd=REPO, text=True, **pipes)
    assert process.stdout.readline() == "first\n"  # while the program waits for its standard input
    if not reads:
        process.stdout.close()
        process.stdout = None
    _, err = process.communicate("go on\n", timeout=100)
    assert err == f"{not reads}\n" and process.returncode == (0 if reads else 141)


# --- notebooks -----------------------------------------------------------------------------------


class NotebookStream(io.StringIO):
    """ipykernel's stream: it has no `reconfigure`, and `fileno` is not to be had."""

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


def test_a_notebooks_output_is_left_as_it_is(monkeypatch):
    """Lost if it fails: `%run generate.py` in Jupyter or Colab ends in an AttributeError."""
    stream = NotebookStream()
    monkeypatch.setattr(sys, "stdout", stream)
    with forgiving_output():
        print("shown")
    assert sys.stdout is stream and stream.getvalue() == "shown\n"


def test_output_is_as_before_after_a_program(capfd):
    """Lost if it fails: after `%run` what a session prints goes through a pipe that nobody flushes."""
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as stop, forgiving_output():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and (sys.stdout, sys.stderr) == before
    assert capfd.readouterr().err == "stopped\n"


NOTEBOOK = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for argv in sys.argv[1:]:
    shell.run_line_magic("run", argv)
    print("--ended--")
"""


def test_a_session_runs_the_programs_again_and_again(place):
    """Lost if it fails: in a notebook a run that failed once keeps its folder locked until the kernel is started
    anew."""
    failing = flags(place, "session", **RUN | {"rank": 999})
    runs = ["train.py", *failing], ["train.py", *flags(place, "session", **RUN)]
    runs = [
        *runs,
        ["generate.py", *resume(place, "session")],
        ["generate.py", *resume(place, "session"), "--start=A"],
    ]
    out, err = finish(start("-c", NOTEBOOK, *map(shlex.join, ([str(w) for w in run] for run in runs))))
    assert out.count("--ended--") == 4, err
    assert "another run is writing" not in out + err
    assert (place / "session" / "accuracy.json").exists()


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [["train.py"], pytest.param(["-m", "tools.sweep"], marks=pytest.mark.slow)])
def test_ctrl_c_while_a_program_starts_is_one_line(place, program):
    """Lost if it fails: who has typed a command wrongly and stops it gets forty lines about imports."""
    command = [sys.executable, *program, "--help"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command, cwd=REPO, env=env, capture_output=True)
    seconds = time.monotonic() - began
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for share in (0.25, 0.8):
        process = subprocess.Popen(command, cwd=REPO, env=env, **pipes)
        time.sleep(max(0.3, share * seconds))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
        assert err in ("", "stopped\n") and "Traceback" not in out  # "": it was done already, and is shutting down
        assert process.returncode in ((130,) if err else (0, -signal.SIGINT))
