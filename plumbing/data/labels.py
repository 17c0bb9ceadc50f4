"""When two labels are one, what the words of a data set's labels are, and where a text names a label.

The loader and the score share these rules: no class is trained that the score cannot tell from another.
"""

import collections
import re
import unicodedata

ANSWER_CHARS = 40  # a label counts within these first characters of a text; more where the labels are longer
NO_LABEL = ("", "nan", "na", "n/a", "#n/a", "<na>", "null")  # how tables write that a label is missing
WHOLE_NUMBER = r"-?\d+(\.0*)?"


def normalise_label(label: str) -> str:
    """What the spellings of one label have in common: "Positive", " positive" and "POSITIVE" are one."""
    return fold(label).strip()


def fold(text):
    """Without capitals; an accent is always part of its letter."""
    return unicodedata.normalize("NFC", text).casefold()


def find_label(text: str, label_names: list[str]) -> int | None:
    """The index of the label that comes first in the text's first characters, as a word of its own, in any
    capitals; None if there is none. At least 40 characters count, and always 10 more than the longest label has."""
    spellings = [normalise_label(name) for name in label_names]
    words = sorted(spellings, key=len, reverse=True)  # "very good" before "very"
    end = max(ANSWER_CHARS, len(words[0]) + 10)
    pattern = rf"(?<!\w)(?:{'|'.join(f'({re.escape(word)})' for word in words)})(?!\w)"
    for match in re.finditer(pattern, fold(text)):
        if match.end() <= end:
            return spellings.index(words[match.lastindex - 1])
    return None


def split_names(label_names: str) -> list[str]:
    """The words of `--label_names`."""
    return [name.strip() for name in label_names.split(",")]


# --- from the labels of a data set to the classes ------------------------------------------------


def name_labels(counts, places, dataset, names, unlabelled, classify):
    """How the labels of a data set become classes.

    counts: how often each spelling of a label occurs; places: where it comes first. names: the words that the user
    typed or the data set brings, or None. unlabelled: whether -1 says in this data set that a row has no label.

    Returns label_names, the words of the classes; index, the class of each spelling; unused, how many rows have no
    label, by reason; notes, what the user should know. Raises ValueError for labels that cannot be used.
    """
    known = {plain_number(name) for name in names or []}
    unused = collections.Counter()
    labels = []
    for label, n in counts.items():
        spelling = normalise_label(label)
        if unlabelled and spelling in ("-1", "-1.0"):
            unused["unlabelled (-1)"] += n
        elif spelling in NO_LABEL and spelling not in known:
            unused[f"no label ({label.strip()})" if spelling else "no label"] += n
        else:
            labels.append(label)
    is_number = [re.fullmatch(WHOLE_NUMBER, label.strip()) is not None for label in labels]
    are_names = names is not None and all(plain_number(label) in known for label in labels)
    if labels and all(is_number) and not are_names:
        label_names, index, notes = name_numbers(labels, places, dataset, names, classify)
    else:
        label_names, index, notes = name_words(labels, counts, places, dataset, names)
    return {"label_names": label_names, "index": index, "unused": unused, "notes": notes}


def name_numbers(labels, places, dataset, names, classify):
    """(words, class of each label, notes) of labels that are whole numbers.

    The words are those of 0, 1, 2, ... in this order. Where they cannot be that, as for the labels -1 and 1 or 1 to
    5, and are as many as the numbers, they are those of the numbers from the least to the largest.
    """
    value_of = {label: int(label.strip().partition(".")[0]) for label in labels}
    values = sorted(set(value_of.values()))
    found = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    if not names and classify and values[0] >= 0:
        names = [str(i) for i in range(values[-1] + 1)] if values[0] == 0 else [str(value) for value in values]
    if not names:
        raise ValueError(
            f"{dataset} has numbers for labels ({found}): type their words in order, such as "
            "--label_names=negative,positive"
        )
    if values[0] >= 0 and values[-1] < len(names):
        return names, value_of, []
    if values[0] != 0 and len(values) == len(names):
        pairs = ", ".join(f"{value} is {name}" for value, name in zip(values, names) if str(value) != name)
        notes = [f"the labels are numbers, and label_names are their words in order: {pairs}"] if pairs else []
        return names, {label: values.index(value) for label, value in value_of.items()}, notes
    nameless = min((label for label in labels if not 0 <= value_of[label] < len(names)), key=value_of.get)
    remedy = "type one word for each of them, in order"
    if values[0] == 0:
        remedy = "the words are those of 0, 1, 2 and so on: type one for each"
    elif values[0] < 0:
        remedy += ", or take the rows with a negative number out if it means that they have no label"
    raise ValueError(
        f"label_names={','.join(names)}: no word for the label {value_of[nameless]} of {dataset}, first in "
        f"{places[nameless]}; the labels are {found}: {remedy}"
    )


def name_words(labels, counts, places, dataset, names):
    """(words, class of each label, notes) of labels that are words. Spellings that `normalise_label` makes one are
    one class; the most frequent one is its word."""
    spellings = collections.defaultdict(list)
    for label in labels:
        spellings[plain_number(label)].append(label)
    if names is None:
        refuse_mixture(labels, places, dataset)
        words = [most_frequent(group, counts) for group in spellings.values()]
        names = sorted(words)
    classes = {plain_number(name): i for i, name in enumerate(names)}
    for spelling, group in spellings.items():
        if spelling not in classes:
            raise ValueError(
                f"label_names={','.join(names)}: {dataset} has the label {group[0]!r} too, first in "
                f"{places[group[0]]}; add it to label_names, take its rows "
                "out, or type --label_names=None for the data's own words"
            )
    notes = []
    for spelling, group in spellings.items():
        if len({label.strip() for label in group}) > 1:
            found = ", ".join(f"{label!r} ({counts[label]} rows)" for label in sorted(group))
            notes.append(f"{found} are one label: {names[classes[spelling]]!r}")
    index = {label: classes[spelling] for spelling, group in spellings.items() for label in group}
    return names, index, notes


def most_frequent(group, counts):
    """The spelling of a label that most rows have, outer blanks aside; of equals the first in the alphabet."""
    totals = collections.Counter()
    for label in group:
        totals[label.strip()] += counts[label]
    return min(totals, key=lambda word: (-totals[word], word))


def refuse_mixture(labels, places, dataset):
    """Words and numbers at once are two spellings of the same classes more often than classes of their own."""
    numbers = [label for label in labels if is_decimal(label)]
    words = [label for label in labels if not is_decimal(label)]
    if numbers and words:
        raise ValueError(
            f"{dataset} has numbers and words for labels: {numbers[0]!r} first in {places[numbers[0]]}, {words[0]!r} "
            f"first in {places[words[0]]}; write one kind, or, if each is a class of its own, type "
            f"--label_names={','.join(sorted(label.strip() for label in labels)[:8])}"
        )


def is_decimal(label):
    return re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?|[-+]?\d+\.", label.strip(), re.IGNORECASE) is not None


def plain_number(label):
    """The normalised label; a whole number without its point, as jsonl's 1.0 and csv's 1 are one label."""
    spelling = normalise_label(label)
    return spelling.partition(".")[0] if re.fullmatch(WHOLE_NUMBER, spelling) else spelling
