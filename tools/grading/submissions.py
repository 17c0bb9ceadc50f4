"""Submissions side by side: from each the exercises' files alone, a fresh copy for each part, points from what the
tests reported."""

import csv
import gc
import hmac
import importlib.util
import json
import multiprocessing
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch

from tools.grading.child import run_student, way_to_shut_in

HERE = Path(__file__).resolve().parents[2]
FILES = ("lora.py", "model.py", "dataloader.py", "train.py", "generate.py")
PARTS = (*FILES, "trained")  # part 6
POINTS = {"lora.py": 9, "model.py": 3, "dataloader.py": 4, "train.py": 2, "generate.py": 5, "trained": 2}
MOST = 1 << 24  # bytes of reports from one process
LARGEST = 1 << 20  # bytes of an exercise's file
TRAINING = "test_training_reaches_75_percent"
# What an exercise does not need: where a file has such a word and the handout's has not, a teacher should look at it.
UNUSUAL = {"_exit", "_getframe", "atexit", "builtins", "ctypes", "eval", "exec", "f_back", "gc", "globals"}
UNUSUAL |= {"importlib", "inspect", "kill", "modules", "monkeypatch", "pytest", "setattr", "signal", "subprocess"}
UNUSUAL |= {"threading", "unittest", "__code__", "__import__", "__torch_function__"}


# --- what is handed in -----------------------------------------------------------------------------


def read_files(submission: Path) -> dict[str, bytes]:
    """{name: content} of the exercises' files in a folder or a zip, of each the one that lies least deep. A link is
    passed over: it might lead to the solution."""
    if submission.is_dir():
        paths = [path for path in submission.rglob("*.py") if is_own_file(path, submission)]
        there = [(path.relative_to(submission), path.stat().st_size, path.read_bytes) for path in paths]
    else:
        archive = zipfile.ZipFile(submission)
        there = [
            (Path(file.filename), file.file_size, lambda file=file: archive.read(file)) for file in archive.filelist
        ]
    there = [file for file in there if file[0].name in FILES and "__MACOSX" not in file[0].parts]
    there.sort(key=lambda file: len(file[0].parts), reverse=True)
    for path, size, _ in there:
        if size > LARGEST:
            raise ValueError(f"{submission}: {path} has {size:,} bytes, and an exercise has at most {LARGEST:,}")
    try:
        return {path.name: read() for path, _, read in there}
    except (zipfile.BadZipFile, RuntimeError) as e:  # such as one with a password
        raise ValueError(f"{submission}: {e}") from e


def is_own_file(path, folder):
    """Whether a file lies in the folder itself, and no link leads there."""
    return path.is_file() and path.resolve() == folder.resolve() / path.relative_to(folder)


def unusual_words(files: dict[str, bytes], copy: Path) -> str:
    """A line that says which file has which of UNUSUAL, where the handout's own file has it not."""
    found = []
    for name, content in files.items():
        words = set(re.findall(r"\w+", content.decode("utf-8", "replace")))
        words -= set(re.findall(r"\w+", (copy / name).read_text("utf-8")))
        if words & UNUSUAL:
            found.append(f"{name}: {' '.join(sorted(words & UNUSUAL))}")
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


def grade_part(files: dict[str, bytes], copy: Path, part: int, limit: float, way, base, hidden) -> dict:
    """{test: None if it passed, else what is wrong} of one part, run in a fresh copy and a process of its own."""
    with tempfile.TemporaryDirectory(dir=base / "jobs", ignore_cleanup_errors=True) as work:
        work = Path(work)
        work.chmod(0o711)
        shutil.copytree(copy, work / "hw")
        for name, content in files.items():
            (work / "hw" / name).write_bytes(content)
        shutil.copytree(base / "cache", work / "tmp" / "cache")
        test_file = f"homework_tests/test_{part}_{PARTS[part - 1]}"
        command = ["train.py", *training_settings()[0], "--out_dir=../tmp/out"] if part == 6 else [test_file]
        with tempfile.TemporaryFile() as output:
            told, reason = run(part, command, output, limit, way, base, work, hidden)
            output.seek(0)
            end = output.read()[-500:].decode("utf-8", "replace").strip() or "nothing"
        if part == 6:
            return {TRAINING: score(work, reason or f"its output ends in {end}")}
        tests = re.findall(r"^def (test_\w+)", (copy / test_file).read_text("utf-8"), re.MULTILINE)
        return judge(tests, told, reason or f"the program ended before this test; it wrote {end}")


def run(part, command, output, limit, way, base, work, hidden):
    """([(name, message)] as reported, why the process was ended early or None). It writes into the file `output`."""
    key = bytearray(secrets.token_bytes(32))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_student(writing, output.fileno(), key, part, command, way, base, work, hidden)
        finally:
            os._exit(0)
    os.close(writing)
    received, reason, deadline = b"", None, time.monotonic() + limit
    try:
        while True:
            if select.select([reading], [], [], 0.2)[0]:
                data = os.read(reading, 1 << 16)
                received += data
                if not data:
                    break
            elif os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # it has ended, and something that it started has the pipe
            if time.monotonic() > deadline or len(received) > MOST:
                reason = f"not done after {limit:g} seconds" if len(received) <= MOST else "it reports without end"
                break
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.close(reading)
    return check_signatures(received, key), reason


def check_signatures(received: bytes, key: bytearray) -> list[tuple[str, str | None]]:
    """The reports up to the first line that is not the reporter's own."""
    told = []
    for line in received.decode("utf-8", "replace").splitlines():
        signature, _, text = line.partition(" ")
        if not hmac.compare_digest(signature.encode(), hmac.digest(key, text.encode(), "sha256").hex().encode()):
            break
        number, name, message = json.loads(text)
        if number != len(told):
            break
        told.append((name, message))
    return told


def judge(tests: list[str], told: list[tuple[str, str | None]], reason: str) -> dict[str, str | None]:
    """{test: None or a message}. A test counts as passed if it was reported, once, as passed."""
    if any(name == "trap" and message is None for name, message in told):
        return dict.fromkeys(tests, "a test that must fail was reported as passed: this part does not count")
    reports = dict(told)
    for name, _ in told:
        if name in tests and [other for other, _ in told].count(name) > 1:
            reports[name] = "reported more than once"
    return {test: reports.get(test, reports.get("collection", reason)) for test in tests}


def training_settings():
    """(train.py's arguments, the accuracy wanted) of part 6, as its test has them."""
    spec = importlib.util.spec_from_file_location("part_6", HERE / "tools/homework_tests/test_6_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRAINING, module.WANTED


def score(work: Path, ended: str) -> str | None:
    """What is wrong with the adapter that a student's code trained, or None: the repository's own generate.py scores
    it. It takes files that hold numbers and settings, nothing else."""
    folder = work / "score"
    folder.mkdir()
    out = work / "tmp" / "out"
    for path in out.iterdir() if out.is_dir() else ():
        if path.suffix in (".json", ".safetensors") and is_own_file(path, work):
            shutil.copy(path, folder)
    if not (folder / "adapter_model.safetensors").exists():
        return f"train.py wrote no adapter: {ended}"
    command = [sys.executable, "generate.py", "--init_from=resume", f"--out_dir={folder}", "--dataset=rt_reviews"]
    done = subprocess.run([*command, "--split=test"], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        return f"what train.py wrote cannot be scored: {(done.stdout + done.stderr)[-500:].strip()}"
    accuracy, wanted = json.loads((folder / "accuracy.json").read_text())["accuracy"], training_settings()[1]
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
    cache = Path(os.environ.get("NANOLORA_CACHE", Path.home() / ".cache" / "nanolora"))
    if (cache / "rt_reviews").exists():
        shutil.copytree(cache / "rt_reviews", base / "cache" / "rt_reviews")
    way = way_to_shut_in(base, base / "jobs" / "trial", hidden)
    if way != "namespaces":
        user = "the user nobody" if way else "you"
        print(
            f"note: this system gives a submission no network and files of its own: it runs as {user}, and is only "
            "asked not to read, connect or start what it should not",
            file=sys.stderr,
        )
    return way


def work_on(connection, *arguments):
    began = time.monotonic()
    result = grade_part(*arguments)
    connection.send_bytes(json.dumps([time.monotonic() - began, result]).encode())


def grade_all(submissions: dict[str, Path], copy: Path, parts, jobs: int, limit: float) -> Iterator[tuple]:
    """(name, {part: {test: None or a message}}, seconds of each part) of each submission, as they are done; `jobs`
    processes at a time. Part 6 is run where all others are right. copy: a fresh handout. limit: seconds a part."""
    torch.set_num_threads(1)
    gc.freeze()  # a student's process, a fork of this one, does not walk through what is imported here
    files = {name: read_files(path) for name, path in submissions.items()}
    hidden = find_solutions(list(submissions.values()))
    waiting = [(name, part) for name in submissions for part in parts if part < 6 or len(parts) == 1]
    results, times, running = {name: {} for name in submissions}, {name: {} for name in submissions}, {}
    with tempfile.TemporaryDirectory(prefix="nanolora-", ignore_cleanup_errors=True) as base:
        base = Path(base).resolve()
        way = prepare_base(base, hidden)
        while waiting or running:
            while waiting and len(running) < jobs:
                name, part = waiting.pop(0)
                receiving, sending = multiprocessing.Pipe(duplex=False)
                seconds = limit if part < 6 else 30 * limit
                arguments = (sending, files[name], copy, part, seconds, way, base, hidden)
                process = multiprocessing.get_context("fork").Process(target=work_on, args=arguments)
                process.start()
                sending.close()
                running[receiving] = (process, name, part)
            for receiving in wait(list(running)):
                process, name, part = running.pop(receiving)
                times[name][part], results[name][part] = json.loads(receiving.recv_bytes())
                process.join()
                missing = [part for part in parts if part not in results[name]]
                if missing == [6]:
                    wrong = [test for tests in results[name].values() for test, message in tests.items() if message]
                    if wrong:
                        results[name][6], missing = {TRAINING: "first the other parts"}, []
                    else:
                        waiting.insert(0, (name, 6))
                if not missing:
                    yield name, results[name], times[name]


def points_of(results: dict) -> dict[str, float]:
    """{part's name: points}: the share of its tests that passed, times what it is worth."""
    shares = {
        part: sum(message is None for message in tests.values()) / len(tests) for part, tests in results.items()
    }
    return {PARTS[part - 1]: round(share * POINTS[PARTS[part - 1]], 2) for part, share in shares.items()}


def write_grades(out: str, submissions: dict[str, Path], copy: Path, parts, jobs: int, limit: float) -> None:
    """A line of the csv `out` for each submission when it is done, and its tests with their messages as a line of
    JSON in the file next to it."""
    names = [PARTS[part - 1] for part in parts]
    look = {name: unusual_words(read_files(path), copy) for name, path in submissions.items()}
    with open(out, "x", newline="") as table, open(Path(out).with_suffix(".jsonl"), "x") as details:
        rows = csv.writer(table)
        rows.writerow(["submission", *names, "total", "of", "look at"])
        for name, results, seconds in grade_all(submissions, copy, parts, jobs, limit):
            points = points_of(results)
            total = [round(sum(points.values()), 2), sum(POINTS[name] for name in names)]
            rows.writerow([name, *(points[name] for name in names), *total, look[name]])
            tests = {PARTS[part - 1]: tests for part, tests in sorted(results.items())}
            details.write(json.dumps({"submission": name, "tests": tests, "seconds": seconds}) + "\n")
            table.flush(), details.flush()
            print(f"{name}: {total[0]:g} of {total[1]}")
