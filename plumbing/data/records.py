"""A source's rows: what all of them together tell, and records {"text": str, "label": int}, each in its split."""

import array
import collections
import hashlib

import numpy as np

from plumbing.data.sources import SPLIT_OF_WORD, SPLITS, split_of_share
from plumbing.program.errors import UserError


def survey_rows(source, fields: tuple[str, str]) -> dict:
    """What all rows together tell, once for all settings of labels.

    tally       [part, split, label, how many rows, the first of them] for each label of each split of each part; rows
                without a text have None for a label
    repeated    how many rows of a named split have a text that also appears in train, {split: rows}
    unread      parts whose split their name tells, so that their column named split does not count
    class_names for each part the words of the labels 0, 1, ..., where it brings them

    Raises ValueError for rows that cannot be used.
    """
    import pyarrow
    from pyarrow import compute

    tally = {}
    hashes = collections.defaultdict(lambda: array.array("q"))
    unread = set()
    for p, part in enumerate(source.parts):
        n = 0
        for texts, labels, words in part.read():
            splits = name_splits(part, words, n, len(texts))
            labels = labels.fill_null("")
            # Files that were put together, each with its header.
            is_header = compute.and_(compute.equal(texts, fields[0]), compute.equal(labels, fields[1]))
            if (row := compute.index(is_header, True).as_py()) >= 0:
                raise UserError(f"{part.place(n + row)}: the header once more; take this row out")
            labels = compute.if_else(texts.is_valid(), labels, pyarrow.scalar(None, pyarrow.string()))
            columns = {"split": splits, "label": labels, "row": np.arange(n, n + len(texts))}
            groups = pyarrow.table(columns).group_by(["split", "label"]).aggregate([("row", "count"), ("row", "min")])
            for group in groups.to_pylist():
                entry = tally.setdefault((p, group["split"], group["label"]), [0, group["row_min"]])
                entry[0] += group["row_count"]
            for split in splits.unique().to_pylist() if len(source.parts) > 1 or words is not None else ():
                own = texts.filter(compute.equal(splits, split)).drop_null()
                hashes[split].extend(map(hash, own.to_pylist()))
            n += len(texts)
            unread |= {part.name} if part.split and words is not None else set()
    entries = sorted(([*key, *entry] for key, entry in tally.items()), key=lambda entry: (entry[0], entry[4]))
    train = hashes.pop("train", [])
    repeated = {split: int(np.isin(hashes[split], train).sum()) for split in SPLITS if split in hashes}
    class_names = [part.class_names().get(fields[1]) for part in source.parts]
    return {"tally": entries, "repeated": repeated, "unread": sorted(unread), "class_names": class_names}


def name_splits(part, words, n, length):
    """Each row's split, as a pyarrow array: by the part's name, or else by its column named split."""
    import pyarrow
    from pyarrow import compute

    if part.split or words is None:
        return pyarrow.repeat(part.split or "train", length)
    coded = words.fill_null("").dictionary_encode()
    found = [word.strip().lower() for word in coded.dictionary.to_pylist()]
    for i, word in enumerate(found):
        if word not in SPLIT_OF_WORD:
            row = compute.index(coded.indices, i).as_py()
            raise UserError(
                f"{part.place(n + row)}: the column split says {word!r}; type one of {', '.join(SPLIT_OF_WORD)}, or "
                "rename the column if it means something else"
            )
    return pyarrow.array([SPLIT_OF_WORD[word] for word in found], pyarrow.string()).take(coded.indices)


def read_records(source, class_of, drawn, seed):
    """Yields {split: its records}, some thousands at once: of each row that has a text and a label. class_of: the
    class of each (part, label). drawn: the splits that the seed draws from the training rows."""
    for p, part in enumerate(source.parts):
        own = {label: its_class for (number, label), its_class in class_of.items() if number == p}
        n = 0
        for texts, labels, words in part.read():
            splits = name_splits(part, words, n, len(texts))
            n += len(texts)
            records = collections.defaultdict(list)
            for split, text, label in zip(splits.to_pylist(), texts.to_pylist(), labels.fill_null("").to_pylist()):
                if text is None or label not in own:
                    continue
                if drawn and split == "train":
                    split = draw_split(text.encode(), seed, drawn)
                records[split].append({"text": text, "label": own[label]})
            yield records


def draw_split(text, seed, drawn):
    """The split of a text (bytes), or train in place of what is not drawn.

    It follows from seed and text alone. So rows that are added or moved change no other row's split, and the same
    text is never in two splits.
    """
    digest = hashlib.sha256(b"%d %b" % (seed, text)).digest()
    split = split_of_share(int.from_bytes(digest[:8], "big") / 2**64)
    return split if split in drawn else "train"
