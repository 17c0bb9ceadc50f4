"""Submissions side by side: from each the exercises' files alone, a fresh copy for each part, points from what the
tests reported."""

import csv
import gc
import hmac
import json
import multiprocessing
import os
import re
import runpy
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch

from tools.grading.child import run_student, way_to_shut_in

HERE = Path(__file__).resolve().parents[2]
POINTS = {"lora.py": 9, "model.py": 3, "dataloader.py": 4, "train.py": 2, "generate.py": 5, "trained": 2}
PARTS = tuple(POINTS)
FILES = PARTS[:5]
TRAINING = "test_training_reaches_75_percent"  # all of part 6
MOST = 1 << 24  # bytes of reports from one process
LARGEST = 1 << 20  # bytes of an exercise's file
# What an exercise does not need: where a file has such a word and the handout's has not, a teacher should look at it.
UNUSUAL = {"_exit", "_getframe", "atexit", "builtins", "ctypes", "eval", "exec", "f_back", "gc", "globals"}
UNUSUAL |= {"importlib", "inspect", "kill", "modules", "monkeypatch", "multiprocessing", "pytest", "setattr"}
UNUSUAL |= {"signal", "subprocess", "threading", "unittest", "__code__", "__import__", "__torch_function__"}


# --- what is handed in -----------------------------------------------------------------------------


def read_files(submission: Path) -> dict[str, bytes]:
    """{name: content} of the exercises' files in a folder or a zip, of each the one that lies least deep. A link is
    passed over: it might lead to the solution."""
    if submission.is_dir():
        paths = [path for path in submission.rglob("*.py") if is_own_file(path, submission)]
        there = [(path.relative_to(submission), path.stat().st_size, path.read_bytes) for path in paths]
    else:
        archive = zipfile.ZipFile(submission)
        there = [(Path(file.filename), file.file_size, partial(archive.read, file)) for file in archive.filelist]
    files = {}
    for path, size, read in sorted(there, key=lambda file: len(file[0].parts), reverse=True):
        if path.name not in FILES or "__MACOSX" in path.parts:
            continue
        if size > LARGEST:
            raise ValueError(f"{submission}: {path} has {size:,} bytes, and an exercise has at most {LARGEST:,}")
        try:
            files[path.name] = read()
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:  # damaged, or with a password
            raise ValueError(f"{submission}: {e}") from e
    return files


def is_own_file(path, folder):
    """Whether a file lies in the folder itself, and no link leads there."""
    return path.is_file() and path.resolve() == folder.resolve() / path.relative_to(folder)


def unusual_words(files: dict[str, bytes], copy: Path) -> str:
    """A line that says which file has which of UNUSUAL, where the handout's own file has it not."""
    found = []
    for name, content in files.items():
        words = UNUSUAL & set(re.findall(r"\w+", content.decode("utf-8", "replace")))
        words -= set(re.findall(r"\w+", (copy / name).read_text("utf-8")))
        if words:
            found.append(f"{name}: {' '.join(sorted(words))}")
    return "; ".join(found)


def find_solutions(submissions: list[Path]) -> list[Path]:
    """What a student's code must not read: this repository, another copy of it that Python would find, and the other
    submissions."""
    prefixes = Path(sys.prefix), Path(sys.prefix).resolve()
    python = {path for prefix in prefixes for path in (prefix, *prefix.parents)}
    found = {path for path in HERE.iterdir() if path not in python} | {path.resolve() for path in submissions}
    for name in ("lora", "model", "dataloader", "train", "generate", "plumbing"):
        for entry in sys.path:
            for pattern in (name, f"{name}.py", f"__pycache__/{name}.*"):
                found.update(Path(entry).resolve().glob(pattern))
        specs = [finder.find_spec(name, None) for finder in sys.meta_path]
        found.update(Path(spec.origin) for spec in specs if spec and spec.origin and os.path.exists(spec.origin))
    return sorted(path for path in found if not found & set(path.parents))


# --- one part of one submission --------------------------------------------------------------------


def grade_part(sending, files: dict[str, bytes], copy: Path, part: int, limit: float, way, base, hidden) -> None:
    """Sends {test: None if it passed, else what is wrong} of one part, run in a fresh copy and its own process."""
    with tempfile.TemporaryDirectory(dir=base / "jobs", ignore_cleanup_errors=True) as work:
        work = Path(work)
        work.chmod(0o711)
        shutil.copytree(copy, work / "hw")
        for name, content in files.items():
            (work / "hw" / name).write_bytes(content)
        shutil.copytree(base / "cache", work / "tmp" / "cache")
        (test_file,) = copy.glob(f"homework_tests/test_{part}_*.py")
        if part == 6:
            settings = runpy.run_path(str(test_file))
            command = ["train.py", *settings["TRAINING"], "--out_dir=../tmp/out"]
            *_, ended = run(command, 30 * limit, way, work, hidden)
            graded = {TRAINING: score(work, settings["WANTED"], ended)}
        else:
            tests = re.findall(r"^def (test_\w+)", test_file.read_text("utf-8"), re.MULTILINE)
            graded = judge(tests, *run([f"homework_tests/{test_file.name}"], limit, way, work, hidden))
    sending.send_bytes(json.dumps(graded).encode())


def run(command: list[str], limit: float, way: str, work: Path, hidden: list[Path]) -> tuple[bytes, bytearray, str]:
    """(what a student's process reported, the key of its signatures, why it ended)."""
    key = bytearray(secrets.token_bytes(32))
    reading, writing = os.pipe()
    received, ended, deadline = b"", f"not done after {limit:g} seconds", time.monotonic() + limit
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            try:
                run_student(writing, output.fileno(), key, command, way, work, hidden)
            finally:
                os._exit(0)
        os.close(writing)
        try:
            while (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
                data = os.read(reading, 1 << 16)
                received += data
                if not data or len(received) > MOST:
                    output.seek(max(0, output.seek(0, os.SEEK_END) - 500))
                    wrote = output.read().decode("utf-8", "replace").strip() or "nothing"
                    ended = "it reports without end" if data else f"the program ended before that; it wrote {wrote}"
                    break
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            os.close(reading)
    return received, key, ended


def judge(tests: list[str], received: bytes, key: bytearray, ended: str) -> dict[str, str | None]:
    """{test: None or a message}. A test counts as passed if it was reported, once, as passed. The reports count up to
    the first line that is not the reporter's own."""
    told = []
    for line in received.splitlines():
        signature, _, text = line.partition(b" ")
        if not hmac.compare_digest(signature, hmac.digest(key, text, "sha256").hex().encode()):
            break
        number, name, message = json.loads(text)
        if number != len(told):
            break
        told.append((name, message))
    if ("trap", None) in told:
        return dict.fromkeys(tests, "a test that must fail was reported as passed: this part does not count")
    names = [name for name, _ in told]
    reports = {"collection": ended} | dict(told)
    reports |= {test: "reported more than once" for test in tests if names.count(test) > 1}
    return {test: reports.get(test, reports["collection"]) for test in tests}


def score(work: Path, wanted: float, ended: str) -> str | None:
    """What is wrong with the adapter that a student's code trained, or None: the repository's own generate.py scores
    it. It takes files that hold numbers and settings, nothing else."""
    folder = work / "score"
    folder.mkdir()
    for path in (work / "tmp" / "out").glob("*"):
        if path.suffix in (".json", ".safetensors") and is_own_file(path, work):
            shutil.copy(path, folder)
    if not (folder / "adapter_model.safetensors").exists():
        return f"train.py wrote no adapter: {ended}"
    flags = ["--init_from=resume", f"--out_dir={folder}", "--dataset=rt_reviews", "--split=test"]
    done = subprocess.run([sys.executable, "generate.py", *flags], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        return f"what train.py wrote cannot be scored: {(done.stdout + done.stderr)[-500:].strip()}"
    accuracy = json.loads((folder / "accuracy.json").read_text())["accuracy"]
    return None if accuracy >= wanted else f"{accuracy:.1%} of the test split right: {wanted:.0%} were asked"


# --- all of them -----------------------------------------------------------------------------------


def prepare_base(base: Path, hidden: list[Path]) -> str:
    """Makes what all jobs need in the folder `base`: the teacher's downloaded reviews, and what stands in place of
    what is hidden. Returns the way in which this system shuts a process in, and prints what it cannot do."""
    base.chmod(0o711)
    for name in ("empty", "root", "cache", "jobs/trial/tmp/cache"):
        (base / name).mkdir(parents=True)
    (base / "jobs").chmod(0o711)  # nobody finds another job's folder in it
    (base / "empty.txt").touch()
    reviews = Path(os.environ.get("NANOLORA_CACHE") or Path.home() / ".cache" / "nanolora", "rt_reviews")
    if reviews.exists():
        shutil.copytree(reviews, base / "cache" / "rt_reviews")
    way = way_to_shut_in(base / "jobs" / "trial", hidden)
    if way != "namespaces":
        text = f"note: this system cannot shut a submission in: it runs as {way or 'you'}, and is asked to behave"
        print(text, file=sys.stderr)
    return way


def grade_all(submissions: dict[str, Path], copy: Path, parts, jobs: int, limit: float) -> Iterator[tuple]:
    """(name, {part: {test: None or a message}}, seconds of each part) of each submission, as they are done; `jobs`
    processes at a time. Part 6 is run where all others are right. copy: a fresh handout. limit: seconds a part."""
    torch.set_num_threads(1)
    gc.freeze()  # a student's process, a fork of this one, does not walk through what is imported here
    files = {name: read_files(path) for name, path in submissions.items()}
    hidden = find_solutions(list(submissions.values()))
    fork = multiprocessing.get_context("fork")
    waiting = [(name, part) for name in submissions for part in parts if part < 6 or len(parts) == 1]
    results, times, running = {name: {} for name in submissions}, {name: {} for name in submissions}, {}
    with tempfile.TemporaryDirectory(prefix="nanolora-", ignore_cleanup_errors=True) as base:
        base = Path(base).resolve()
        way = prepare_base(base, hidden)
        while waiting or running:
            while waiting and len(running) < jobs:
                name, part = waiting.pop(0)
                receiving, sending = fork.Pipe(duplex=False)
                arguments = sending, files[name], copy, part, limit, way, base, hidden
                fork.Process(target=grade_part, args=arguments).start()
                sending.close()
                running[receiving] = name, part, time.monotonic()
            for receiving in wait(list(running)):
                name, part, began = running.pop(receiving)
                results[name][part] = json.loads(receiving.recv_bytes())
                times[name][part] = time.monotonic() - began
                if set(parts) - results[name].keys() == {6}:
                    if any(any(tests.values()) for tests in results[name].values()):
                        results[name][6] = {TRAINING: "first the other parts"}
                    else:
                        waiting.insert(0, (name, 6))
                if len(results[name]) == len(parts):
                    yield name, results[name], times[name]


def write_grades(out: str, submissions: dict[str, Path], copy: Path, parts, jobs: int, limit: float) -> None:
    """A line of the csv `out` for each submission when it is done, and its tests with their messages as a line of
    JSON in the file next to it."""
    look = {name: unusual_words(read_files(path), copy) for name, path in submissions.items()}
    names = [PARTS[part - 1] for part in parts]
    most = sum(POINTS[name] for name in names)
    lines = {"mode": "x", "buffering": 1}  # each line is in the file as soon as it is written
    with open(out, newline="", **lines) as table, open(Path(out).with_suffix(".jsonl"), **lines) as details:
        rows = csv.writer(table)
        rows.writerow(["submission", *names, "total", "of", "look at"])
        for submission, results, seconds in grade_all(submissions, copy, parts, jobs, limit):
            tests = {PARTS[part - 1]: results[part] for part in parts}
            shares = {name: list(messages.values()).count(None) / len(messages) for name, messages in tests.items()}
            points = [round(share * POINTS[name], 2) for name, share in shares.items()]
            total = round(sum(points), 2)
            rows.writerow([submission, *points, total, most, look[submission]])
            details.write(json.dumps({"submission": submission, "tests": tests, "seconds": seconds}) + "\n")
            print(f"{submission}: {total:g} of {most}")
