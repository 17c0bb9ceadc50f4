"""Starts programs as forks of a process that has imported torch and the like, which saves two seconds each. What is
imported of the repository, variables, folder, signals and exit code are those of a program of its own.

python tests/fork_server.py      a line of json on stdin for each program: see `start` in conftest.py
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import sys
import threading

# What train.py and generate.py import, but for the repository itself: not huggingface_hub, which looks at variables.
# (pyarrow imports pandas with the first Python value that it is given.)
for name in ("filelock", "matplotlib.pyplot", "numpy", "safetensors.torch", "tiktoken.load", "torch", "tqdm"):
    importlib.import_module(name)
for name in ("pandas", "pyarrow.compute", "pyarrow.csv", "pyarrow.json", "pyarrow.parquet"):
    importlib.import_module(name)

# A process killed while it prints must not keep a lock that the next one waits for: tqdm's own is shared with forks.
sys.modules["tqdm"].tqdm.set_lock(threading.RLock())


def write(path, number):
    with open(f"{path}.tmp", "w") as f:
        f.write(str(number))
    os.replace(f"{path}.tmp", path)


def serve():
    """Returns a job in the process that is to do it; ends where nobody wants another one."""
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork():
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # the watchers that are done
                    pass
            continue
        program = os.fork()
        if not program:
            return job
        write(f"{job['folder']}/pid", program)
        status = os.waitpid(program, 0)[1]
        write(f"{job['folder']}/code", os.waitstatus_to_exitcode(status))
        os._exit(0)
    os._exit(0)


def become(job):
    """The program's folder, variables, files and limits."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for fd, path in enumerate((os.devnull, job["out"], job["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, fd)
        os.close(file)
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    sys.executable = job["env"].get("FORKED_PYTHON", sys.executable)  # what it starts is a fork too
    paths = job["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:1] = [path for path in paths if path]


def run(args):
    """As `python *args`."""
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        sys.path.insert(0, "")
        exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.argv = args[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
        runpy.run_path(args[0], run_name="__main__")


def end(code):
    """As Python ends, but for taking its modules apart: in a fork that copies their memory, for a quarter of a
    second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    job = serve()
    become(job)
    try:
        run(job["args"])
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise  # Python prints it
        end(e.code or 0)
    end(0)
