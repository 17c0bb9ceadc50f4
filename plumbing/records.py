"""A source's rows -> records {"text": str, "label": int}, each in its split."""

import collections
import re

import numpy as np

from plumbing.sources import SPLITS, need_column


def survey_rows(source, dataset, text_field, label_field, names, classify):
    """What all rows together tell: label_names, the labels' words; numbers, whether the data has numbers for them;
    splits, the split that each word of a `split` column means; counts, how many rows each split has.

    names: the labels' words, if they are known. Raises ValueError for rows that cannot be used.
    """
    words = collections.Counter()
    labels = {}
    for word, row in source.rows():
        need_column(row, "text_field", text_field, dataset)
        need_column(row, "label_field", label_field, dataset)
        words[word] += 1
        labels[str(row[label_field])] = None
    if not words:
        raise ValueError(f"dataset={dataset}: no row in it, it is empty")
    splits = {word: split for split in SPLITS for word in SPLITS[split] if word in words}
    splits = splits or dict.fromkeys(words, "train")
    counts = collections.Counter()
    for word, split in splits.items():
        counts[split] += words[word]
    names, numbers = name_labels(sorted(labels.keys() - {"None", "", "nan"}), dataset, names, classify)
    return {"label_names": names, "numbers": numbers, "splits": splits, "counts": counts}


def name_labels(labels, dataset, names, classify):
    """The labels' words, those given or the ones that stand in the data, and whether the data has numbers."""
    if not all(re.fullmatch(r"-?\d+(\.0)?", label) for label in labels):
        unknown = sorted(set(labels) - set(names or labels))
        if unknown:
            raise ValueError(
                f"label_names={','.join(names)}: {dataset} has the label {unknown[0]!r} too; "
                "--label_names=None takes the data's own words"
            )
        return names or labels, False
    if not names and classify and labels:
        names = [str(i) for i in range(1 + max(int(float(label)) for label in labels))]
    if not names:
        raise ValueError(
            f"{dataset} has numbers for labels ({', '.join(labels[:8])}): type their words in order, "
            "such as --label_names=negative,positive"
        )
    nameless = [label for label in labels if int(float(label)) >= len(names)]
    if nameless:
        raise ValueError(f"label_names={','.join(names)}: no word for the label {nameless[0]} of {dataset}")
    return names, True


def read_records(source, survey, text_field, label_field, seed):
    """Yields (split, record) of each labelled row. Splits that are missing take 10 % of the training rows each,
    chosen by the seed."""
    counts = survey["counts"]
    n_train = counts.get("train", 0)
    names = ["train"] + [split for split in SPLITS if split not in counts]
    split_of = np.zeros(n_train, np.int8)  # of each training row, as a place in `names`
    shuffled = np.random.default_rng(seed).permutation(n_train)
    tenth = n_train // 10
    for k in range(1, len(names)):
        split_of[shuffled[(k - 1) * tenth : k * tenth]] = k
    training_rows = iter(split_of.tolist())
    for word, row in source.rows():
        split = survey["splits"].get(word)
        if split == "train":
            split = names[next(training_rows)]
        rec = make_record(row[text_field], row[label_field], survey) if split else None
        if rec:
            yield split, rec


def make_record(text, label, survey):
    """{"text", "label"}, or None for a row without text or label (-1 is the hub's "unlabelled")."""
    if text is None or label is None or str(label) in ("", "nan"):
        return None
    label = int(float(label)) if survey["numbers"] else survey["label_names"].index(str(label))
    text = str(text).encode("utf-8", "replace").decode()  # half an emoji has no bytes
    return {"text": text, "label": label} if label >= 0 else None
