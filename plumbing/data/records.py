"""A source's rows -> records {"text": str, "label": int}, each in its split."""

import collections
import hashlib

from plumbing.data.labels import name_labels
from plumbing.data.sources import SPLITS, need_column
from plumbing.program.errors import UserError

SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}


def survey_rows(source, dataset, text_field, label_field, names, classify):
    """What all rows together tell:

    label_names   the words of the classes
    index         the class of each label as it stands in the data
    drawn         the splits that the seed draws from the training rows, since the data names no such split
    rows, used    how many rows there are, and how many have a text and a label
    unused        how many have not, by reason
    notes         what the user should know of the labels

    names: the labels' words, if they are known. Raises ValueError for rows that cannot be used.
    """
    words = collections.Counter()
    labels = collections.Counter()
    places = {}  # where a label comes first
    n_rows = 0
    no_text = 0
    for word, row in source.rows():
        n_rows += 1
        if text_field not in row or label_field not in row:
            need_column(row, "text_field", text_field, source.where())
            need_column(row, "label_field", label_field, source.where())
        if word not in words:
            check_split(word, source.where())
        words[word] += 1
        text = row[text_field]
        label = row[label_field]
        if type(text) is not str:
            if is_missing(text):
                no_text += 1
                continue
            check_value(text, "text_field", text_field, source.where())
        if type(label) is not str:
            if is_missing(label):
                label = ""
            check_value(label, "label_field", label_field, source.where())
            label = str(label)
        if label not in places:
            places[label] = source.where()
        labels[label] += 1
    if not n_rows:
        raise UserError(f"dataset={dataset}: no row in it, it is empty")
    is_class_label = label_field in source.names
    table = name_labels(labels, places, dataset, names, unlabelled=is_class_label, classify=classify)
    unused = dict(table["unused"])
    if no_text:
        unused["no text"] = no_text
    survey = {"label_names": table["label_names"], "index": table["index"], "notes": table["notes"]}
    survey |= {"rows": n_rows, "used": n_rows - sum(unused.values()), "unused": unused}
    survey["drawn"] = splits_to_draw({SPLIT_OF_WORD[word] for word in words})
    if not survey["used"]:
        raise UserError(f"dataset={dataset}: no labelled row in it; {describe_unused(survey)}")
    return survey


def is_missing(value):
    """None, or the number that pandas and JSON write for it: nan, which alone differs from itself."""
    return value is None or value != value


def check_value(value, key, column, where):
    """Raises ValueError for lists and the like: what of them is meant?"""
    if isinstance(value, (list, tuple, dict, bytes)):
        raise UserError(
            f"{where}: the column {column} holds {str(value)[:40]}, neither a word nor a number; write one into each "
            f"row, or type --{key}=COLUMN for another column"
        )


def check_split(word, where):
    if word not in SPLIT_OF_WORD:
        known = ", ".join(SPLIT_OF_WORD)
        raise UserError(
            f"{where}: the column split says {word!r}; type one of {known}, or rename the column if it means "
            "something else"
        )


def describe_unused(survey):
    """One line: how many rows are used, and why the others are not."""
    reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(survey["unused"].items()))
    return f"{survey['used']:,} of {survey['rows']:,} rows are used ({reasons})"


# --- which row is in which split -----------------------------------------------------------------


def splits_to_draw(named):
    """The splits that the training rows are shared between by the seed: none if the data names them all."""
    missing = [split for split in SPLITS if split not in named]
    return ["train", *missing] if "train" in named and missing else []


def draw_split(text, seed, drawn):
    """The split of a text (bytes): 80 % train, 10 % validation, 10 % test, or train in place of what is not drawn.

    It follows from seed and text alone. So rows that are added or moved change no other row's split, and the same
    text is never in two splits.
    """
    digest = hashlib.sha256(b"%d %b" % (seed, text)).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64  # even over [0, 1)
    if share < 0.8:
        return "train"
    split = "validation" if share < 0.9 else "test"
    return split if split in drawn else "train"


def read_records(source, survey, text_field, label_field, seed):
    """Yields (split, record) of each row that has a text and a label."""
    drawn = survey["drawn"]
    index = survey["index"]
    for word, row in source.rows():
        text = row[text_field]
        label = row[label_field]
        label = None if is_missing(label) else index.get(str(label))
        if label is None or is_missing(text):
            continue
        data = str(text).encode("utf-8", "replace")  # a lone surrogate, half of an emoji, becomes "?"
        split = SPLIT_OF_WORD[word]
        if drawn and split == "train":
            split = draw_split(data, seed, drawn)
        yield split, {"text": data.decode(), "label": label}
