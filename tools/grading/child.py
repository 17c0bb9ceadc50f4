"""The process that a student's code runs in: what it may do, and how it reports the tests.

All this is done before the student's code is imported. It holds as far as it can in one process with that code, which
may change what it finds in its own memory: docs/teaching.md.
"""

import _posixsubprocess
import contextlib
import ctypes
import hashlib
import hmac
import itertools
import json
import operator
import os
import random
import runpy
import signal
import site
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parents[2]
NOBODY = 65534
NEW_FILES, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
BIND, PRIVATE, READ_ONLY = 0x5000, 0x44000, 0x1021  # of mount(2): with all below, with all below, of a bind
KEPT = 0xC0E  # flags of a mount that an ordinary user cannot take away: nosuid, nodev, noexec, noatime, nodiratime
SEEN = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc", "/dev", "/proc")
REFUSED = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system", "os.exec")
REFUSED += ("os.posix_spawn", "os.fork", "os.forkpty", "os.kill", "os.killpg", "signal.pthread_kill")
MOVES = ("os.rename", "os.link", "os.symlink", "os.remove")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# --- shut in ---------------------------------------------------------------------------------------


def system(name, *values):
    """Calls a function of the C library. Raises OSError where it fails, AttributeError where there is none."""
    values = [ctypes.c_ulong(v) if isinstance(v, int) else v and os.fsencode(v) for v in values]
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*values):
        raise OSError(ctypes.get_errno(), name)


def bind(source, target, read_only=True):
    """`target` shows what `source` is, to this process and its children."""
    system("mount", source, target, None, BIND, None)
    if read_only:
        system("mount", None, target, None, READ_ONLY | os.statvfs(target).f_flag & KEPT, None)


def shut_in(work: Path, hidden: list[Path]) -> Path:
    """Before the fork of a student's process: it has no network, it sees no processes but its own, and no files but
    those of `work`, BASE/jobs/NAME, now BASE/here, and, to read, Python's and the system's. Returns BASE/here. Raises
    where the system refuses."""
    base, user, group = work.parents[1], os.geteuid(), os.getegid()
    root, here = base / "root", base / "here"

    def place(path):
        return root / path.relative_to("/")

    system("unshare", NEW_USER | NEW_FILES | NEW_IPC | NEW_PIDS | NEW_NETWORK)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    system("mount", "none", "/", None, PRIVATE, None)
    system("mount", "tmpfs", root, "tmpfs", 0, None)
    python = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    python += map(os.path.realpath, python[:2])  # the environment may be a link
    for path in sorted({Path(name) for name in (*SEEN, *python) if os.path.exists(name)}):
        place(path.parent).mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            place(path).symlink_to(path.readlink())
        else:
            place(path).mkdir(exist_ok=True)
            bind(path, place(path), read_only=str(path) not in ("/dev", "/proc"))
    for path in hidden:
        if place(path).exists():
            bind(base / ("empty" if path.is_dir() else "empty.txt"), place(path))
    place(here).mkdir(parents=True)
    bind(work, place(here), read_only=False)
    os.chdir(root)
    system("pivot_root", ".", ".")
    system("umount2", ".", 2)
    os.chdir("/")
    return here


def become_nobody(work: Path) -> None:
    """As root without namespaces: a user who can write work/tmp alone. Raises where Python is not for all to read."""
    for path in work.rglob("*"):
        path.chmod(path.stat().st_mode | (0o55 if path.is_dir() else 0o44))
    for folder in (work / "tmp", work / "tmp" / "cache"):
        os.chown(folder, NOBODY, NOBODY)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.chdir(work)
    for module in (os, pytest, torch):
        Path(module.__file__).read_bytes()


def way_to_shut_in(work: Path, hidden: list[Path]) -> str:
    """What this system lets us do, tried in children: "namespaces", "nobody" or "" (the hook of `refuse` alone)."""
    for way in ("namespaces", "nobody"):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError, AttributeError):
                shut_in(work, hidden) if way == "namespaces" else become_nobody(work)
                os._exit(0)
            os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            return way
    return ""


def refuse(hidden: list[Path], own: Path) -> None:
    """From here on, for good: no hidden file is opened, nothing outside `own` is written, no process is started or
    killed, nothing connects."""
    events, moves, own = frozenset(REFUSED), frozenset(MOVES), f"{own}/"
    closed = tuple(f"{path}/" for path in hidden)
    kinds, is_kind, decode, real = (str, bytes), isinstance, os.fsdecode, os.path.realpath

    def hook(event, arguments):
        if event in events:
            raise PermissionError(f"{event} is not for a submission")
        if event == "open" or event in moves:
            for path in arguments[: 1 if event == "open" else 2]:
                path = f"{real(decode(path))}/" if is_kind(path, kinds) else own
                writes = event in moves or arguments[2] & WRITES
                if not path.startswith(own) and (path.startswith(closed) or (writes and path != "/dev/null/")):
                    raise PermissionError(f"{path[:-1]} is not for a submission")

    sys.addaudithook(hook)
    _posixsubprocess.fork_exec = subprocess._fork_exec = refuse_process


def refuse_process(*_):
    """In place of what multiprocessing starts a process with: it has no event."""
    raise PermissionError("a new process is not for a submission")


# --- the student's process -------------------------------------------------------------------------


def run_student(fd, output, key: bytearray, command: list[str], way: str, work: Path, hidden: list[Path]) -> None:
    """In a fork of the teacher's process: starts the student's process and waits for it; SIGTERM ends it. fd, output:
    where reports go, and what it prints."""
    os.setsid()
    here = shut_in(work, hidden) if way == "namespaces" else work
    pid = os.fork()
    if pid:
        signal.signal(signal.SIGTERM, lambda *_: end(pid))
        os.waitpid(pid, 0)
        return
    os.setsid()
    for target in (0, 1, 2):
        os.dup2(output, target)
    os.closerange(3, fd)  # the way to the teacher's process, for one
    os.closerange(fd + 1, 65536)
    if way == "namespaces":
        system("unshare", NEW_USER | NEW_FILES)  # once more: now it cannot undo what was mounted
    elif way == "nobody":
        become_nobody(work)
    prepare(here, hidden)
    if command[0] == "train.py":
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    else:
        options = ["-p", "no:cacheprovider", "--rootdir=.", "--confcutdir=.", "-c", os.devnull]
        plugin = reporter(fd, key, Path(command[0]).read_text("utf-8"))
        pytest.main([*options, f"--basetemp={here}/tmp/pytest", *command], [plugin])


def end(pid):
    for kill in (os.kill, os.killpg):  # it leads a group, if it has not left it
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def prepare(here, hidden):
    """The student's copy is all of the repository that Python finds; the environment has no keys of the teacher's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=f"{here}/tmp", TMPDIR=f"{here}/tmp", NANOLORA_CACHE=f"{here}/tmp/cache")
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    os.chdir(here / "hw")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("plumbing", "tools")]:
        del sys.modules[name]
    sys.path[:] = [f"{here}/hw", *(path for path in sys.path if path and Path(path).resolve() != HERE)]
    refuse([*hidden, here.parent], here)


def reporter(fd: int, key: bytearray, source: str):
    """pytest's plugin that reports each test of a file once, over `fd`, signed. It adds two tests that must fail.
    Where one of them passes, or the file's functions are not those of `source` any more, the student's code has
    changed what is tested."""
    mac, dumps, write, same = hmac.new(bytes(key), digestmod=hashlib.sha256), json.dumps, os.write, operator.eq
    key[:] = bytes(len(key))
    count, failed = itertools.count(), {}
    codes = {code.co_name: code for code in compile(source, "", "exec").co_consts if isinstance(code, types.CodeType)}
    codes = {name: code for name, code in codes.items() if name[0].islower()}  # functions, no classes

    def send(name, message):
        text = dumps([next(count), name, message and message[:4000]])
        signed = mac.copy()
        signed.update(text.encode())
        write(fd, f"{signed.hexdigest()} {text}\n".encode())

    def differs():
        same = torch.allclose(torch.zeros(2), torch.ones(2)) or torch.equal(torch.zeros(2), torch.ones(2))
        assert same, "must fail"

    def gives_up():
        pytest.fail("must fail", pytrace=False)

    def look(module):
        for name, code in codes.items():
            if not same(getattr(vars(module).get(name), "__code__", None), code):
                send("trap", None)

    class Reporter:
        def pytest_collectreport(self, report):
            if report.failed:
                send("collection", "\n".join(report.longreprtext.strip().splitlines()[-3:]))

        def pytest_collection_modifyitems(self, items):
            for function in (differs, gives_up):
                name = f"test_{random.SystemRandom().randrange(10**9)}"
                item = pytest.Function.from_parent(items[0].parent, name=name, callobj=function)
                items.insert(random.SystemRandom().randrange(len(items) + 1), item)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item):
            look(item.module)
            result = yield
            look(item.module)
            return result

        def pytest_runtest_logreport(self, report):
            name = report.nodeid.rpartition("::")[2]
            if not report.passed:
                failed.setdefault(name, report.longreprtext or report.outcome)
            if report.when == "teardown":
                send(name if name in codes else "trap", failed.get(name))

    return Reporter()
