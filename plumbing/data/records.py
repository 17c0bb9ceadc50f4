"""A source's rows: what all of them together tell, and records {"text": str, "label": int}, each in its split."""

import collections
import hashlib

import numpy as np

from plumbing.data.sources import SPLIT_OF_WORD, SPLITS
from plumbing.program.errors import UserError


def survey_rows(source, fields: tuple[str, str]) -> dict:
    """What all rows together tell, once for all settings of labels.

    tally    [part, split, label, how many rows, the first of them] for each label of each split of each part; rows
             without a text have None for a label
    repeated how many rows of a named split have a text that also appears in train, {split: rows}
    unread   parts whose split their name tells, so that their column named split does not count

    Raises ValueError for rows that cannot be used.
    """
    from pyarrow import compute

    tally = {}
    hashes = collections.defaultdict(list)
    unread = set()
    for p, part in enumerate(source.parts):
        n = 0
        for texts, labels, words in part.read():
            splits = name_splits(part, words, n, len(texts))
            has_text = texts.is_valid().to_numpy(zero_copy_only=False)
            coded = labels.fill_null("").dictionary_encode()
            names = [None, *coded.dictionary.to_pylist()]
            if fields[1] in names:  # files that were put together, each with its header
                is_header = compute.and_(compute.equal(texts, fields[0]), compute.equal(labels, fields[1]))
                if (row := compute.index(is_header, True).as_py()) >= 0:
                    raise UserError(f"{part.place(n + row)}: the header once more; take this row out")
            keys = splits * len(names) + np.where(has_text, coded.indices.to_numpy() + 1, 0)
            for key, row, count in zip(*np.unique(keys, return_index=True, return_counts=True)):
                split, label = divmod(int(key), len(names))
                entry = tally.setdefault((p, [*SPLITS][split], names[label]), [0, n + int(row)])
                entry[0] += int(count)
            if len(source.parts) > 1 or words is not None:
                found = np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))
                for split in np.unique(splits):
                    hashes[[*SPLITS][split]].append(found[has_text & (splits == split)])
            n += len(texts)
            unread |= {part.name} if part.split and words is not None else set()
    entries = sorted(([*key, *entry] for key, entry in tally.items()), key=lambda entry: (entry[0], entry[4]))
    train = np.concatenate(hashes.pop("train", [[]]))
    repeated = {split: int(np.isin(np.concatenate(parts), train).sum()) for split, parts in hashes.items()}
    return {"tally": entries, "repeated": repeated, "unread": sorted(unread)}


def name_splits(part, words, n, length):
    """The number of each row's split in SPLITS: by the part's name, or else by its column named split."""
    if part.split or words is None:
        return np.full(length, [*SPLITS].index(part.split or "train"))
    coded = words.fill_null("").dictionary_encode()
    splits = []
    for i, word in enumerate(coded.dictionary.to_pylist()):
        split = SPLIT_OF_WORD.get(word.strip().lower())
        if split is None:
            row = int(np.argmax(coded.indices.to_numpy() == i))
            raise UserError(
                f"{part.place(n + row)}: the column split says {word.strip().lower()!r}; type one of "
                f"{', '.join(SPLIT_OF_WORD)}, or rename the column if it means something else"
            )
        splits.append([*SPLITS].index(split))
    return np.array(splits, np.int64)[coded.indices.to_numpy()]


def read_records(source, class_of, drawn, seed):
    """Yields (split, record) of each row that has a text and a label. class_of: the class of each (part, label).
    drawn: the splits that the seed draws from the training rows."""
    names = [*SPLITS]
    for p, part in enumerate(source.parts):
        n = 0
        for texts, labels, words in part.read():
            splits = name_splits(part, words, n, len(texts)).tolist()
            n += len(texts)
            coded = labels.fill_null("").dictionary_encode()
            classes = [class_of.get((p, label)) for label in coded.dictionary.to_pylist()]
            for split, text, i in zip(splits, texts.to_pylist(), coded.indices.to_pylist()):
                if text is None or classes[i] is None:
                    continue
                name = names[split]
                if drawn and name == "train":
                    name = draw_split(text.encode(), seed, drawn)
                yield name, {"text": text, "label": classes[i]}


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
