"""Files are whole or the old one, and a damaged one is found out: writing, reading, checksums."""

import contextlib
import errno
import hashlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from plumbing.program.errors import first_line

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # of the repository
ASSETS = os.path.join(ROOT, "assets")

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in a header
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
DTYPES |= {torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def find_asset(name: str) -> str:
    """The path of what ships with the repository. Raises FileNotFoundError where it was installed without."""
    path = os.path.join(ASSETS, name)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: type pip install -e . in a copy of the repository, and keep it")
    return path


def make_folder(path: str) -> None:
    """With the folders above it. Raises ValueError for a link into nowhere, OSError for what else is in the way."""
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, FileNotFoundError):
        path = Path(path).absolute()
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                raise ValueError(
                    f"{part} is a link to {os.readlink(part)}, which is not there: make it, or type another --out_dir"
                ) from None
        raise


def find_cache() -> str:
    """The folder of what is kept from run to run: NANOLORA_CACHE or, in XDG_CACHE_HOME or ~/.cache, nanolora. It
    begins with ~ where there is no home."""
    shared = os.environ.get("XDG_CACHE_HOME", "")
    shared = shared if os.path.isabs(shared) else os.path.join("~", ".cache")  # a relative one does not count there
    path = os.path.expanduser(os.environ.get("NANOLORA_CACHE") or os.path.join(shared, "nanolora"))
    return path if path.startswith("~") else os.path.abspath(path)


UNWRITABLE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def explain_unwritable(folder, variable):
    """Around what writes into a cache: a full disk or a folder that cannot be written is one line, which names the
    variable that moves the cache."""
    try:
        yield
    except OSError as e:
        place = str(e.filename or folder)
        if e.errno not in UNWRITABLE or not (place.startswith(folder) or folder.startswith(place)):
            raise  # not the cache's
        raise OSError(f"{folder} cannot be written ({e.strerror}); {variable}=DIRECTORY moves it") from e


def find_copy(name, default=None):
    """The path of what a setting names: the copy that ray_runs.py sent to this machine, else `default` or `name`."""
    return json.loads(os.environ.get("NANOLORA_COPIES", "{}")).get(name, default or name)


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to, next to `path`; at the end it is flushed to the disk and renamed. So `path` is
    always whole: the old one until then, the new one after."""
    new = f"{path}.tmp"
    try:
        with open(new, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        put_in_place(new, path)
    except BaseException as e:
        if isinstance(e, OSError) and e.strerror:
            e.filename = e.filename or path  # a write's error has none
        with contextlib.suppress(FileNotFoundError):
            os.remove(new)
        raise


def put_in_place(new, path):
    """Renames a file or folder to `path`. Windows refuses that while another program (a virus scanner, an editor, a
    process that has the file mapped) has the old one open: then it is tried for three seconds."""
    for seconds in (0.1, 0.2, 0.4, 0.8, 1.6, None):
        try:
            return os.replace(new, path)
        except OSError as e:
            if not isinstance(e, PermissionError) and getattr(e, "winerror", None) != 1224:  # mapped
                raise
            if seconds is None:
                raise OSError(
                    f"{path} is the old one, whole: close the program that has it open ({first_line(e)})"
                ) from e
            time.sleep(seconds)


def write_json(path, value):
    with whole_file(path) as f:
        f.write((json.dumps(value, indent=2) + "\n").encode())


def write_weights(directory, name, tensors, note, config_name, config):
    """A file of weights and then the config beside it."""
    os.makedirs(directory, exist_ok=True)
    write_tensors(os.path.join(directory, name), tensors, note)
    write_json(os.path.join(directory, config_name), config)


def write_tensors(path, tensors, note):
    """A safetensors file. Its metadata, which other readers pass over, holds the tensors' SHA-256 and a note: what
    the config file next to it must say. The same tensors give the same bytes. (safetensors' own writer copies all of
    them twice, and writes the header in an order that varies from run to run.)"""
    check = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        add_to_check(check, name, tensor)
    header = {"__metadata__": {"format": "pt", "sha256": check.hexdigest(), "config": note}}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so each begins at its own alignment
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(as_bytes(tensors[name]))


@contextlib.contextmanager
def open_tensors(path):
    """A safetensors file, to read from. Raises FileNotFoundError, or ValueError naming the file if it is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is damaged or cut short: {e}") from e


def read_tensors(path, note):
    """(name, tensor) pairs of a safetensors file. Raises ValueError, naming the file, if it is damaged, or if its own
    note differs. Whether its bytes are those that were written shows at the end."""
    check = hashlib.sha256()
    with open_tensors(path) as f:
        names = sorted(f.keys())
        metadata = f.metadata() or {}
    expected = metadata.get("sha256")
    if metadata.get("config", note) != note:
        raise ValueError(f"{path} was written with {metadata['config']}, the config next to it says {note}")
    for name in names:
        with open_tensors(path) as f:  # opened again: so the pages of copied tensors are freed
            tensor = f.get_tensor(name)
        if expected:
            add_to_check(check, name, tensor)
        yield name, tensor
    if expected and check.hexdigest() != expected:
        raise ValueError(f"{path} is damaged: its tensors are not those that were written (SHA-256 differs)")


def check_finite(tensor, name, path):
    """Raises ValueError for a tensor with NaN or infinity in it."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass, NaN shows in both
        raise ValueError(f"{path} is spoiled: {name} has NaN or infinity in it; take a whole copy, or train it anew")


def add_to_check(check, name, tensor):
    """Feeds a tensor's name, kind and bytes to a hash."""
    check.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    check.update(as_bytes(tensor))


def as_bytes(tensor):
    """A CPU tensor's bytes, as an array."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
