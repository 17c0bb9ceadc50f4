"""Runs on a Ray cluster's machines: files go there, a run's folder comes back, and a run outlives its machine."""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator

import torch
from filelock import FileLock
from tqdm import tqdm

from plumbing.data.token_cache import hash_files
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import ROOT, put_in_place
from plumbing.running.checkpoint import CHECKPOINT
from tools.runs.run import start_program

SEND_SECONDS = 60  # between two checkpoints that a run sends, at least
PIECE = 2**28  # bytes of a file in one object
DEATHS = 3  # a run is given up after this many workers died without a checkpoint between
CODE = ("*.py", "plumbing/**/*.py", "tools/**/*.py", "assets/*.tiktoken")  # what each machine gets of this repository


def run_on_ray(
    runs: list, address: str | None, jobs: int, on_gpu: bool, sources: dict[str, str], environment: dict[str, str]
) -> Iterator[tuple[str, str | None, str | None]]:
    """Makes runs side by side, each a task of Ray's, and yields what `run_here` does.

    address: "auto" (the cluster of this machine, or a new one on it), HOST:PORT, or None: a new one on this machine
    alone. jobs: runs on a machine without GPUs, or on a new cluster's. sources: {what a setting names: its
    file or folder here}; they are sent along. Raises UserError where Ray or its cluster cannot be had.
    """
    ray = connect(address, jobs, on_gpu)
    streams = {}  # of the runs that are being made
    try:
        need, threads = share_machines(ray.nodes(), jobs, on_gpu)
        environment = environment | {"OMP_NUM_THREADS": str(threads)}
        copies = put_copies(ray, sources)
        task = ray.remote(execute).options(num_returns="streaming", max_retries=0, **need)
        waiting = collections.deque(runs)
        deaths = collections.Counter()
        while waiting or streams:
            while waiting and len(streams) < count_places(ray.cluster_resources(), need):
                run = waiting.popleft()
                streams[submit(ray, task, run, copies, environment)] = run
            if not streams:  # the cluster has no machine left, for now
                time.sleep(1)
                continue
            ready, _ = ray.wait(list(streams), timeout=1)
            for stream in ready:
                run = streams[stream]
                try:
                    item = ray.get(next(stream))
                    if isinstance(item, str):
                        yield run.name, item, None
                    else:
                        receive(run.folder, *item)
                        if item == (CHECKPOINT, b""):
                            deaths[run.name] = 0
                    continue
                except StopIteration:
                    reason = None
                except ray.exceptions.RayTaskError as e:
                    reason = first_line(e.cause, 1000)
                except ray.exceptions.RayError as e:  # the worker, or its machine, is gone: another one goes on
                    deaths[run.name] += 1
                    if deaths[run.name] < DEATHS:
                        tqdm.write(f"{run.name} goes on elsewhere, its worker is gone")
                        del streams[stream]
                        waiting.appendleft(run)
                        continue
                    reason = f"{DEATHS} workers died under it: {first_line(e)}"
                del streams[stream]
                yield run.name, None, reason
    finally:
        for stream in streams:
            ray.cancel(stream)
        if streams:
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=10)
        ray.shutdown()


# --- the cluster -----------------------------------------------------------------------------------


def connect(address, jobs, on_gpu):
    """The module ray, connected, with the code sent to its machines. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError('runs side by side are made by Ray, which is missing: pip install "ray>=2.60"') from None
    new = {"num_cpus": jobs * max(1, os.cpu_count() // jobs), "include_dashboard": False}
    if on_gpu and torch.cuda.is_available():
        new["num_gpus"] = min(jobs, torch.cuda.device_count())
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    with tempfile.TemporaryDirectory() as code:
        for name in itertools.chain(*(glob.glob(pattern, root_dir=ROOT, recursive=True) for pattern in CODE)):
            os.makedirs(os.path.join(code, os.path.dirname(name)), exist_ok=True)
            shutil.copyfile(os.path.join(ROOT, name), os.path.join(code, name))
        options = {"runtime_env": {"working_dir": code}, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address:
                if address != "auto":  # where nothing listens Ray would try for minutes
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=address, **options)
        except Exception as e:  # of many kinds: not there, another version, this machine has not joined
            if address != "auto" or not isinstance(e, ConnectionError):
                raise UserError(f"ray={address}: {first_line(e, 400)}; type HOST:PORT of a cluster, or auto") from e
        if not ray.is_initialized():
            ray.init(address="local", **options, **new)
    signal.signal(signal.SIGTERM, handler)
    return ray


def share_machines(nodes, jobs, on_gpu):
    """What a run takes of a machine, as Ray's options, and its threads: the same on every machine of the cluster,
    since a run's bits depend on the number of threads."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if with_gpu := [machine for machine in machines if on_gpu and machine.get("GPU")]:
        n_gpus = min(machine["GPU"] for machine in with_gpu)
        share = 1 / math.ceil(jobs / n_gpus)  # of one GPU: a run does not reach over two
        n_cpus = min(machine.get("CPU", 1) for machine in with_gpu)
        return {"num_gpus": share, "num_cpus": 0}, max(1, int(n_cpus * share / n_gpus))
    n_cpus = [machine["CPU"] for machine in machines if machine.get("CPU")]
    if not n_cpus:
        raise UserError("Ray's cluster has neither a CPU nor a GPU to run on")
    share = max(1, int(min(n_cpus)) // jobs)
    return {"num_cpus": share}, share


def count_places(resources, need):
    """How many runs fit on the cluster as it is now."""
    kind = "GPU" if "num_gpus" in need else "CPU"
    return int(resources.get(kind, 0) / need[f"num_{kind.lower()}s"])


# --- files on their way: (name, piece) pairs, from here to there and back -----------------------------


def put_copies(ray, sources):
    """Puts files into Ray's object store, from which each machine takes them once. Returns {name: (folder on a
    machine, the file in it or "" for the whole, its files)}; the folder is named after its content."""
    copies = {}
    for name, path in sources.items():
        root, file = (path, "") if os.path.isdir(path) else os.path.split(path)
        names = [file] if file else sorted(glob.glob("**", root_dir=root, recursive=True))
        # A run's folder may be a base: its checkpoint, three times the model, is of no use to others.
        names = [n for n in names if os.path.isfile(os.path.join(root, n)) and os.path.basename(n) != CHECKPOINT]
        key = json.dumps([names, hash_files(os.path.join(root, n) for n in names)])
        folder = f"copy-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        copies[name] = (folder, file, put_files(ray, root, names))
    return copies


def submit(ray, task, run, copies, environment):
    """A run as a Ray task, with what its folder has so far. Returns its stream."""
    os.makedirs(run.folder, exist_ok=True)
    for half in glob.glob(os.path.join(glob.escape(run.folder), "*.tmp")):
        os.remove(half)
    folder = os.path.join(f"run-{uuid.uuid4().hex[:8]}", run.name)
    commands = run.commands(folder)
    files = put_files(ray, run.folder, list_files(run.folder))
    return task.remote(folder, commands, files, copies, environment, SEND_SECONDS)


def put_files(ray, folder, names):
    """The files as pieces, each an object of Ray's."""
    return [(name, ray.put(piece)) for name, piece in read_pieces(folder, names)]


def list_files(folder):
    """{name: when it was last written} of a run's files, the checkpoint first."""
    times = {}
    for name in sorted(os.listdir(folder), key=lambda name: name != CHECKPOINT):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not name.endswith((".tmp", ".lock")):
            with contextlib.suppress(FileNotFoundError):  # a training has just removed it
                times[name] = os.stat(path).st_mtime_ns
    return times


def read_pieces(folder, names):
    """(name, bytes) of files; b"" ends each. All are opened at the start, and the first is read last. So a
    checkpoint, named first, is never newer than the best weights that come with it, at either end."""
    with contextlib.ExitStack() as stack:
        opened = [(name, stack.enter_context(open(os.path.join(folder, name), "rb"))) for name in names]
        for name, file in reversed(opened):
            while piece := file.read(PIECE):
                yield name, piece
            yield name, b""


def receive(folder, name, piece):
    """Adds a piece to a file on its way. The empty piece says that it is whole, and it replaces the old one."""
    path = os.path.join(folder, name)
    with open(f"{path}.tmp", "ab") as f:
        f.write(piece)
        if not piece:
            f.flush()
            os.fsync(f.fileno())
    if not piece:
        put_in_place(f"{path}.tmp", path)


# --- on a worker machine ---------------------------------------------------------------------------


def execute(folder, commands, files, copies, environment, seconds):
    """A run, on a worker. Yields the machine's name and then the run's files, as pieces, whenever a checkpoint was
    saved and `seconds` have passed since the last time, and at the end. The working directory is the code, which Ray
    has brought."""
    yield socket.gethostname()
    here = {}
    with FileLock("copies.lock"):
        for name, (place, file, content) in copies.items():
            here[name] = os.path.abspath(os.path.join(place, file))
            if not os.path.isdir(place):
                new = f"{place}-{uuid.uuid4().hex[:8]}"
                fetch(content, new)
                os.rename(new, place)
    environment = environment | {"NANOLORA_COPIES": json.dumps(here), "NANOLORA_CACHE": os.path.abspath("cache")}
    sent_at = time.monotonic()  # a run that is soon done sends its end alone
    try:
        fetch(files, folder)
        sent = list_files(folder)
        for program, *flags in commands:
            with start_program(program, flags, os.path.join(folder, "log.txt"), environment) as child:
                while child.poll() is None:
                    time.sleep(0.1)
                    is_new = list_files(folder).get(CHECKPOINT) != sent.get(CHECKPOINT)
                    if is_new and time.monotonic() - sent_at > seconds:
                        yield from send_changed(folder, sent)
                        sent_at = time.monotonic()
        yield from send_changed(folder, sent)
    except RuntimeError:
        yield from send_changed(folder, sent)  # its log
        raise
    finally:
        shutil.rmtree(os.path.dirname(folder), ignore_errors=True)


def fetch(files, folder):
    """Writes what `put_files` has put into Ray's object store into a new folder."""
    import ray

    os.makedirs(folder)
    for name, piece in files:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab") as f:
            f.write(ray.get(piece))


def send_changed(folder, sent):
    """Yields the pieces of the files that changed since the times `sent`, which become those of now."""
    times = list_files(folder)
    changed = [name for name, written in times.items() if written != sent.get(name)]
    sent.update(times)
    yield from read_pieces(folder, changed)
