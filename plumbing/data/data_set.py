"""A labelled data set: its source, its labels' words, its splits, and its examples as files of the cache."""

import collections
import contextlib
import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from plumbing.data.labels import Asked, name_labels
from plumbing.data.records import read_records, survey_rows
from plumbing.data.sources import SPLITS, find_source
from plumbing.data.token_cache import Examples, ExampleWriter, cache_folder, read_meta, whole_folder, write_meta
from plumbing.data.tokenizer import count_last, start_encoding
from plumbing.program.errors import UserError

CACHE_VERSION = 8  # increase it when a change of code gives other tokens for the same data and settings


class DataSet:
    """A data set whose labels have their words.

    asked: what is known of the words. fields: the columns of text and label. After that `label_names` are the words
    of the classes, `word_of` tells the word of each label as the data writes it, `drawn` the splits that the seed
    draws, since the data does not name them, `digest` the content. Prints what a user should know of the data.
    Raises ValueError or OSError for data that cannot be used.
    """

    def __init__(self, asked: Asked, fields: tuple[str, str]):
        self.fields = fields
        self.dataset = asked.dataset
        self.source = find_source(asked.dataset, fields)
        self.digest = hashlib.sha256(self.source.digest.encode()).hexdigest()[:16]
        folder = cache_folder("survey", json.dumps([CACHE_VERSION, self.source.digest, fields]))
        survey = read_meta(folder)
        if survey is None:
            survey = survey_rows(self.source, fields)
            with whole_folder(folder) as new:
                write_meta(new, **survey)
        self.survey = survey
        self.tally = survey["tally"]
        if not self.tally:
            raise UserError(f"dataset={self.dataset}: no row in it, it is empty")
        places = [part.place for part in self.source.parts]
        found = name_labels(self.tally, survey["class_names"], places, asked)
        self.label_names, self.word_of, self.class_of, unused, notes = found
        named = {split for _, split, *_ in self.tally}
        missing = [split for split in SPLITS if split not in named]
        self.drawn = ["train", *missing] if "train" in named and missing else []
        self._print_notes(unused, notes, is_learned=bool(asked.learned))

    def _print_notes(self, unused, label_notes, is_learned):
        """What a user should know of rows and labels, at every start."""
        used = collections.defaultdict(collections.Counter)  # {split, as the data names it: {class: rows}}
        n_rows = sum(n for *_, n, _ in self.tally)
        for part, split, label, n, _ in self.tally:
            if (part, label) in self.class_of:
                used[split][self.class_of[part, label]] += n
        self.n_used = n_rows - unused.total()
        notes = []
        if unused:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(unused.items()))
            notes.append(f"{self.n_used:,} of {n_rows:,} rows are used ({reasons})")
        if not self.n_used:
            raise UserError(f"dataset={self.dataset}: no labelled row in it; {notes[0]}")
        for split, n in self.survey["repeated"].items():
            if n:
                notes.append(f"the texts of {n:,} of {sum(used[split].values()):,} {split} rows also appear in train")
        for split in used if "train" in used else ():
            if alone := [i for i in sorted(used[split]) if i not in used["train"]]:
                found = ", ".join(f"{self.label_names[i]} ({used[split][i]:,} rows)" for i in alone)
                notes.append(f"{split} has labels that no row of train has: {found}")
        if len(used["train"]) == 1 and not is_learned:
            notes.append(f"all rows of train have one label: {self.label_names[min(used['train'])]}")
        for note in notes + label_notes:
            print(f"note: {note}")

    def load_examples(self, wanted, seed, prompt, key, shares_prefix):
        """({split: its Examples}, {split: what its meta.json says}), from the cache if the same was asked for before.

        prompt: a `Prompt`. key: all that decides what the tokens are, beside data and seed. shares_prefix: whether
        the tokens that all prompts begin with may be run once.
        """
        classes = sorted(self.class_of.items())
        key = [CACHE_VERSION, self.source.digest, self.fields, classes, seed, *key]
        folder = cache_folder("examples", json.dumps(key))
        metas = {split: read_meta(os.path.join(folder, split)) for split in wanted}
        missing = [split for split in wanted if metas[split] is None]
        if missing:
            metas |= self._tokenise(folder, missing, seed, prompt, shares_prefix)
        splits = {split: Examples(os.path.join(folder, split)) for split in wanted}
        print(f"data: {self._describe_splits(next(iter(metas.values()))['rows'])}")
        return splits, metas

    def _describe_splits(self, rows):
        """Which files and how many rows make each split, and what is not read."""
        found = []
        for split, n in rows.items():
            named = "train" if split in self.drawn else split
            numbers = sorted({part for part, its, *_ in self.tally if its == named})
            files = [self.source.parts[part].name for part in numbers]
            files = " and ".join(files) if len(files) < 4 else f"{files[0]} to {files[-1]} ({len(files)} files)"
            found.append(f"{split} {n:,} rows {'drawn from' if split in self.drawn else 'of'} {files}")
        passed_over = self.source.passed_over + [f"the column split of {name}" for name in self.survey["unread"]]
        filled = {part for part, *_ in self.tally}
        passed_over += [f"{part.name} (no row in it)" for i, part in enumerate(self.source.parts) if i not in filled]
        return ", ".join(found) + (f"; not read: {', '.join(passed_over)}" if passed_over else "")

    def _tokenise(self, folder, wanted, seed, prompt, shares_prefix):
        """Writes the wanted splits as files for `Examples`. Returns what each one's meta.json says."""
        counts = collections.Counter()
        with contextlib.ExitStack() as stack:  # closes the pool and all writers at the end, after an error too
            pool = stack.enter_context(ThreadPoolExecutor())
            writers = {split: ExampleWriter(stack, os.path.join(folder, split)) for split in wanted}

            def begin():
                for records in read_records(self.source, self.class_of, self.drawn, seed):
                    parts = []
                    for split, part in records.items():
                        counts[split] += len(part)
                        if split in wanted:
                            filled = [prompt.fill(rec["text"], rec["label"]) for rec in part]
                            parts.append((split, part, start_encoding(filled, pool)))
                    yield parts

            # pairwise asks for the next parts, which starts their threads, before it hands out these. So the threads
            # tokenise the next ones while these are written. None follows the last.
            for parts, _ in itertools.pairwise(itertools.chain(begin(), [None])):
                for split, part, futures in parts:
                    ids, lengths = map(np.concatenate, zip(*(future.result() for future in futures)))
                    write_part(writers[split], part, ids, lengths, prompt)
            for split, writer in writers.items():
                if writer.n == 0:
                    remedy = ""
                    if split in self.drawn:
                        remedy = f": its {self.n_used} rows (equal texts count once) are too few to draw it from; "
                        remedy += "type another --seed, or name the splits by files (train.csv, validation.csv, "
                        remedy += "test.csv) or by a column named split"
                    raise UserError(f"dataset={self.dataset}: no labelled row in its {split} split{remedy}")
            rows = {split: counts[split] for split in SPLITS if split in counts}
            return {split: writer.finish(shares_prefix, rows=rows) for split, writer in writers.items()}


def write_part(writer, records, ids, lengths, prompt):
    """Adds records to a writer: what prompt.make_example does for each of them, for all at once. ids: the tokens of
    their texts, with end-of-text after each; lengths: how many each text has."""
    labels = np.array([rec["label"] for rec in records])
    texts = [rec["text"] for rec in records]
    if prompt.classify:
        ids = np.delete(ids, np.cumsum(lengths + 1) - 1)
        sizes = n_prompt = lengths
    else:
        sizes = lengths + 1
        n_bytes = np.array([len(name.encode()) for name in prompt.label_names])
        n_prompt = lengths - count_last(ids, np.cumsum(sizes) - 1, n_bytes[labels])
    ends = np.cumsum(sizes)
    rest = 0
    pieces = []
    n_prompt, sizes = n_prompt.copy(), sizes.copy()
    is_too_long = lengths > prompt.room - np.array(prompt.spare)[labels]
    for i in np.flatnonzero(is_too_long | (n_prompt == 0)).tolist():  # too long, or nothing: one by one
        start = ends[i] - sizes[i]
        ex, was_cut = prompt.make_example(texts[i], int(labels[i]), ids[start : start + lengths[i]].tolist())
        pieces += [ids[rest:start], np.array(ex.tokens)]
        rest = ends[i]
        texts[i], sizes[i], n_prompt[i] = ex.text, len(ex.tokens), ex.n_prompt
        writer.n_cut += was_cut
    writer.add(np.concatenate([*pieces, ids[rest:]]), sizes, n_prompt, labels, texts)
