"""Exact resume: what a run needs to end in the bits of one that was never stopped, in one file, always whole."""

import contextlib
import copy
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field

import torch
from filelock import FileLock, SoftFileLock, Timeout

from plumbing.program.errors import first_line, one_line_errors
from plumbing.program.files import add_to_check, make_folder, whole_file

CHECKPOINT = "checkpoint.pt"


@dataclass
class Progress:
    """How far a run is."""

    iter: int = 0  # updates done
    best: float = math.inf  # the lowest validation loss
    eval_iters: int | None = None  # the setting that `best` was found with: another one gives losses of other batches
    losses: list[float] = field(default_factory=list)  # of the updates since the last evaluation
    metrics: list[dict] = field(default_factory=list)  # one for each evaluation: the lines of metrics.jsonl
    skipped: int = 0  # updates that float16's scaler left out, for infinite gradients

    @property
    def evaluated_at(self) -> int | None:
        """Updates done at the last evaluation."""
        return self.metrics[-1]["iter"] if self.metrics else None


def collect_state(run, progress: Progress) -> dict:
    """What checkpoint.pt holds. The tensors are those of the run, which go on changing."""
    return {
        "progress": asdict(progress),
        "trained": {name: p.detach() for name, p in trained_parameters(run.model).items()},
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "scaler": run.scaler.state_dict(),
    }


def save_checkpoint(out_dir: str, state: dict) -> None:
    """Writes checkpoint.pt. Raises OSError, with the room that is needed, if it cannot be written."""
    path = os.path.join(out_dir, CHECKPOINT)
    try:
        with whole_file(path) as f:
            torch.save(state | {"sha256": hash_state(state)}, f)
    except (OSError, RuntimeError) as e:  # torch's writer wraps some
        room = sum(value.nbytes for _, value in leaves(state) if torch.is_tensor(value)) / 1e6
        reason = f"it takes {room:.0f} MB more than the last one, which is whole ({first_line(e, 120)})"
        raise OSError(f"{path} could not be written, {reason}") from e


def begin_or_resume(run) -> Progress:
    """A resumed run's progress, with its checkpoint loaded; or a new run's, whose folder keeps no earlier run's
    progress. A run that was stopped before its first checkpoint begins again. Raises ValueError, naming the file, if
    it is damaged or another model's, and for a run that has made more updates than it is to make."""
    config = run.config
    is_first = run.processes.is_first
    path = os.path.join(config.out_dir, CHECKPOINT)
    # The first process decides and reads for all: another machine may not see its disk.
    file = run.processes.share_file(path if config.facts else None)
    progress = load_checkpoint(run, path, file) if file else Progress()
    if is_first and config.facts is None:
        # A resume would go on with an earlier run's, and a score be that of its weights.
        best = "adapter_model.safetensors" if config.rank else "model.safetensors"
        for old in (CHECKPOINT, "metrics.jsonl", best):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(config.out_dir, old))
    if config.max_iters < progress.iter:
        raise ValueError(
            f"max_iters={config.max_iters}: the run in {config.out_dir} has made {progress.iter} updates already; "
            "type at least that many, or start another run with another --out_dir"
        )
    if progress.eval_iters not in (None, config.eval_iters):
        if is_first:
            print(f"note: eval_iters={config.eval_iters} gives losses of other batches, so the best one is reset")
        progress.best = math.inf
    progress.eval_iters = config.eval_iters
    return progress


def check_same_data(config, loader, scored: str | None = None) -> None:
    """Raises ValueError if the data of a resumed run are no longer those that it was trained on. A split that is only
    `scored` may have changed if the data set names it itself; then a line says so."""
    if config.facts is None or config.facts.data in (None, loader.digest):
        return
    changed = f"dataset={config.dataset} has changed since the run in {config.out_dir} began"
    if scored is None:
        raise ValueError(f"{changed}; put its old content back, or start another run with another --out_dir")
    if scored in loader.drawn:
        raise ValueError(
            f"{changed}, and the seed draws its {scored} split: some of its rows may have been trained on; put the "
            "old content back, or name the rows to score by a file test.csv or a column split"
        )
    print(f"note: {changed}; its own {scored} split is scored as it is now")


def load_checkpoint(run, path, file) -> Progress:
    """The progress of the checkpoint `path`; its weights, moments and scale go into the run. file: the path, or its
    bytes to read from."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        # torch.load does not notice a changed bit.
        if state.pop("sha256") != hash_state(state):
            raise ValueError("its content is not what was written, SHA-256 differs")
    except Exception as e:  # zip, pickle and torch each raise their own
        raise ValueError(f"{path} is damaged ({first_line(e, 120)}); start again with another --out_dir") from e
    known = collect_state(run, Progress())
    # An older run has no eval_iters.
    if state.keys() != known.keys() or state["progress"].keys() | {"eval_iters"} != known["progress"].keys():
        raise ValueError(f"{path} was written by another version; start again with another --out_dir")
    ours = trained_parameters(run.model)
    theirs = state["trained"]
    different = ours.keys() ^ theirs.keys() or {n for n in ours if ours[n].shape != theirs[n].shape}
    if different:
        raise ValueError(f"{path} was made for another model: {min(different)} differs")
    with torch.no_grad():
        for name, param in ours.items():
            param.copy_(theirs[name])
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        before = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, values in zip(optimizer.param_groups, before):
            # An --lr, --weight_decay or --beta2 that was typed on resuming wins over the checkpoint's.
            group.update({key: values[key] for key in ("peak_lr", "weight_decay", "betas") if key in values})
    if state["scaler"]:  # empty: no float16 until now, so there is no scale to take over
        run.scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def hash_state(state) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    check = hashlib.sha256()
    for path, value in leaves(state):
        if torch.is_tensor(value):
            add_to_check(check, path, value.cpu())
        else:
            check.update(f"{path} {value!r}".encode())
    return check.hexdigest()


def leaves(state, path=""):
    """(path, value) of all that nested dicts and lists hold."""
    if not isinstance(state, dict | list | tuple):
        yield path, state
        return
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        yield from leaves(value, f"{path}/{key}")


def copy_state(state, copies: dict):
    """Nested dicts and lists as they are now: each tensor's copy, in the CPU's memory, is put into `copies` and used
    again by the next call."""
    tensors = {path: value for path, value in leaves(state) if torch.is_tensor(value)}
    for path in tensors.keys() - copies.keys():
        copies[path] = torch.empty_like(tensors[path], device="cpu")
    if tensors:  # in one call: each would wait for a thread that is in Python
        torch._foreach_copy_([copies[path] for path in tensors], list(tensors.values()))
    # deepcopy's memo, {id: copy}, has all tensors already. So it copies only dicts and lists.
    return copy.deepcopy(state, {id(tensor): copies[path] for path, tensor in tensors.items()})


def write_metrics(out_dir: str, metrics: list[dict]) -> None:
    """metrics.jsonl, from the start: after a kill it may be ahead of the checkpoint, and then it is written again."""
    with whole_file(os.path.join(out_dir, "metrics.jsonl")) as f:
        f.writelines((json.dumps(line) + "\n").encode() for line in metrics)


@contextlib.contextmanager
def locked_folder(out_dir: str):
    """Keeps a second run out of out_dir within the block, or until this process ends, however it ends. Where another
    run is in it, or it is no folder, the program ends with one line."""
    with one_line_errors():
        make_folder(out_dir)
        lock = FileLock(os.path.join(out_dir, ".lock"))
        reason = None
        try:
            lock.acquire(blocking=False)
        except (OSError, NotImplementedError) as e:  # filelock's, where the file system or the system has no locks
            reason = first_line(e)
            if isinstance(e, Timeout) and not isinstance(lock, SoftFileLock):
                raise ValueError(f"out_dir={out_dir}: another run is writing there; type another --out_dir") from e
    if isinstance(lock, SoftFileLock):  # filelock's way out: a file that merely exists, and that a kill leaves there
        reason = "its file system has no locks"
    if reason:
        print(f"note: {out_dir} cannot be locked ({reason}): nothing keeps a second run out of it")
    try:
        yield
    finally:
        lock.release()
