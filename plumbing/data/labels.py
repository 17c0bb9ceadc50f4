"""When two labels are one, what the words of a data set's labels are, and where a text names a label.

The loader and the score share these rules: no class is trained that the score cannot tell from another.
"""

import collections
import functools
import itertools
import re
import unicodedata
from typing import NamedTuple

ANSWER_CHARS = 40  # a label counts within these first characters of a text; more where the labels are longer
NO_LABEL = ("", "nan", "na", "n/a", "<na>", "null")  # how tables write that a label is missing, and Excel an error:
NO_LABEL += ("#n/a", "#null!", "#div/0!", "#value!", "#ref!", "#name?", "#num!")


def normalise_label(label: str) -> str:
    """What the spellings of one label have in common: "Positive", " positive" and "POSITIVE" are one."""
    return fold(label).strip()


def check_words(names: list[str]) -> None:
    """Raises ValueError for words that a score cannot tell apart."""
    spellings = {normalise_label(name) for name in names}
    if len(names) < 2 or len(spellings) < len(names) or "" in spellings:
        raise ValueError(
            f"label_names={','.join(names)}: at least two different words are needed, whatever their case"
        )


def check_template(template: str) -> None:
    """Raises ValueError for a template without {text} and, at its end, {label}."""
    fields = re.findall(r"\{(\w*)\}", template)
    if sorted(fields) != ["label", "text"]:
        raise ValueError(f"template={template!r}: it needs {{text}} and {{label}} once each, and no other field")
    if not template.endswith("{label}"):
        raise ValueError(f"template={template!r}: {{label}} comes last, so that it is what the model writes")


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
    """The words of `--label_names`: "bad,good", or pairs of a label in the data and its word, "0=bad,1=good"."""
    return list(dict.fromkeys(read_pairs(label_names).values())) or [name.strip() for name in label_names.split(",")]


def read_pairs(label_names):
    """{label in the data: its word} of `--label_names=0=bad,1=good`; {} for plain words."""
    pairs = [name.partition("=") for name in label_names.split(",")]
    return {plain_number(label): word.strip() for label, _, word in pairs} if all(pair[1] for pair in pairs) else {}


# --- from the labels of a data set to the classes ------------------------------------------------


class Asked(NamedTuple):
    """What is known of the words before the data is seen."""

    dataset: str
    label_names: str | None  # words that were typed or configured
    learned: list[str] | None  # the words of a run's classes, in its order
    word_of: dict[str, str] | None  # the word of each label, as that run's data writes it
    classify: bool  # numbers may be words

    @property
    def words(self):
        return split_names(self.label_names) if self.label_names else self.learned


def name_labels(tally, class_names, places, asked: Asked) -> tuple:
    """How the labels of a data set become classes.

    tally: (part, split, label or None for a row without a text, number of rows, its first row). class_names: for each
    part the words of the labels 0, 1, ..., where it brings them, or None. places[part](row): for messages.

    Returns the words of the classes; the word of each label, as the data writes it; the class of each (part, label);
    how many rows have no label or text, by reason; notes, what the user should know. Raises ValueError for labels
    that cannot be used.
    """
    if asked.learned:
        refuse_unlearned(asked.label_names, asked.learned)
    spelled = {plain_number(name) for name in [*(asked.words or []), *(asked.word_of or [])]}
    # A part without words counts as the train file does, unless the words are numbers: then a number is a word.
    shared = None if has_numbers(class_names[0] or ()) else class_names[0]
    unused, counts = collections.Counter(), collections.Counter()
    meant = {}  # (part, label) -> the label by its own part's word
    own_words = set()
    first = {}  # where each label stands, if that is asked
    for part, _, label, n, row in tally:
        names = class_names[part] or shared
        spelling = plain_number(label or "")
        if label is None:
            unused["no text"] += n
        elif names and spelling == "-1":
            unused["unlabelled (-1)"] += n
        elif spelling in NO_LABEL and spelling not in spelled:
            unused[f"no label ({label.strip()})" if spelling else "no label"] += n
        else:
            place = functools.partial(places[part], row)
            word = label
            if names and is_whole(spelling):
                if not 0 <= int(spelling) < len(names):
                    own = f"{','.join(names)}, from 0 on"
                    raise ValueError(f"{place()}: the label {spelling} has no word among the file's own ({own})")
                word = names[int(spelling)]
                own_words.add(word)
            meant[part, label] = word
            counts[word] += n
            first.setdefault(word, place)
    word_of, notes = choose_words(counts, own_words, first, class_names[0], asked)
    names = asked.learned or asked.words or class_names[0] or [*dict.fromkeys(word_of.values())]
    classes = {plain_number(name): i for i, name in enumerate(names)}
    final = {label: word_of.get(plain_number(label), label) for label in counts}
    for label, word in final.items():
        if plain_number(word) not in classes:
            refuse_unknown(label, names, first[label](), asked)
    written = [(label, final[label]) for label in sorted(own_words) if fold(label) != fold(final[label])]
    if written:
        pairs = ", ".join(f"{label} is written as {word}" for label, word in written)
        notes = [*notes, f"label_names are other words than the data's own: {pairs}"]
    class_of = {key: classes[plain_number(final[label])] for key, label in meant.items()}
    return names, word_of, class_of, unused, notes


def choose_words(counts, own_words, places, class_names, asked):
    """(the word of each label, notes): by what the run has learned, by the pairs that were typed, by the words that
    the data brings, by counting numbers, or by the labels' own words."""
    pairs = read_pairs(asked.label_names or "")
    learned = asked.word_of or {}
    new = [label for label in counts if label not in own_words and plain_number(label) not in learned]
    are_numbers = bool(new) and all(is_whole(plain_number(label)) for label in new)
    if learned:
        if not are_numbers or not asked.label_names or pairs or has_numbers(learned):
            return learned, []
        counted, _ = name_numbers(new, places, asked)
        told = ", ".join(f"{label} is {counted[plain_number(label)]}" for label in sorted(new))
        note = f"the run's own data has words for labels, and these are numbers: by label_names {told}"
        return learned | counted, [note]
    if pairs:  # of the data's words or, where it has such, of their numbers
        for i, name in enumerate(() if has_numbers(class_names or ()) else class_names or ()):
            if word := pairs.get(plain_number(name), pairs.get(str(i))):
                pairs |= {plain_number(name): word, str(i): word}
        return pairs, []
    if class_names:
        word_of = pair_words(class_names, counts, asked)
        numbers = {str(i): word_of.get(plain_number(name), name) for i, name in enumerate(class_names)}
        return ({} if has_numbers(word_of) else numbers) | word_of, []
    words = {plain_number(name) for name in asked.words or []}
    if are_numbers and not words.issuperset(map(plain_number, new)):
        return name_numbers(new, places, asked)
    return name_words(counts, places, asked)


def pair_words(class_names, counts, asked):
    """{word of the data's own: word of a class}: the words that were typed, if the data's are among them; else in
    order; without any its own."""
    words = asked.words or class_names
    pairs = {plain_number(name): name for name in words}
    if not asked.label_names or pairs.keys() >= set(map(plain_number, counts)):
        return pairs
    if len(words) != len(class_names):
        raise ValueError(
            f"label_names={asked.label_names}: {len(words)} words, and {asked.dataset} has {len(class_names)} labels "
            f"({', '.join(class_names)}): type one for each, in order"
        )
    pairs = dict(zip(map(plain_number, class_names), words))
    if taken := [name for name in words if pairs.get(plain_number(name), name) != name]:
        typed = ",".join(f"{name}={name}" for name in class_names)
        raise ValueError(
            f"label_names={asked.label_names}: {taken[0]} is what {asked.dataset} calls another of its labels; type "
            f"the word of each, such as --label_names={typed}"
        )
    return pairs


def name_numbers(labels, places, asked):
    """The words of labels that are whole numbers, and notes.

    0 among them is the first word. Where the largest is the number of words, 1 is the first. Where neither way of
    counting can be meant, as for -1 and 1, and there are as many words, they are those from the least number on.
    """
    values = sorted({int(plain_number(label)) for label in labels})
    found = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    words = asked.words
    if not words and asked.classify and values[0] >= 0:
        return {str(value): str(value) for value in (values if values[0] else range(values[-1] + 1))}, []
    if not words:
        raise ValueError(
            f"{asked.dataset} has numbers for labels ({found}): type their words in order, such as "
            "--label_names=negative,positive"
        )
    ways = [{str(i): word for i, word in enumerate(words, start)} for start in (0, 1)]
    ways = [way for way in ways if way.keys() >= set(map(str, values))]
    if not ways and values[0] != 0 and len(values) == len(words):
        ways = [dict(zip(map(str, values), words))]
    if len(ways) == 1:
        pairs = ", ".join(f"{i} is {ways[0][str(i)]}" for i in values if str(i) != ways[0][str(i)])
        note = f"the labels are numbers, and label_names are their words in order: {pairs}"
        return ways[0], [note] if pairs and "0" not in ways[0] else []
    if ways:
        typed = [",".join(map("=".join, way.items())) for way in ways]
        raise ValueError(
            f"label_names={','.join(words)}: {asked.dataset} has the labels {found}, so the first word may be "
            f"that of 0 or of 1: type --label_names={typed[0]} or --label_names={typed[1]}"
        )
    nameless = min(value for value in values if not 0 <= value < len(words))
    remedy = "type one word for each of them, in order"
    remedy += ", or take the rows with a negative number out if they have no label" if values[0] < 0 else ""
    where = next(places[label]() for label in labels if plain_number(label) == str(nameless))
    raise ValueError(
        f"label_names={','.join(words)}: no word for the label {nameless} of {asked.dataset}, first in {where}; the "
        f"labels are {found}: {remedy}"
    )


def name_words(counts, places, asked):
    """The words of labels that are words, and notes. Spellings that `normalise_label` makes one are one class; the
    most frequent one is its word."""
    names = asked.words
    if names is None:
        refuse_mixture(counts, places, asked.dataset)
        n_rows = collections.Counter()
        for label, n in counts.items():
            n_rows[label.strip()] += n
        ranked = sorted(n_rows, key=lambda word: (-n_rows[word], word))  # the most frequent, of equals the first
        names = sorted({plain_number(word): word for word in ranked[::-1]}.values())
    word_of = {plain_number(name): name for name in names}
    spellings = collections.defaultdict(list)
    for label in counts:
        spellings[plain_number(label)].append(label)
    notes = []
    for spelling, group in spellings.items():
        if len({label.strip() for label in group}) > 1:
            found = ", ".join(f"{label!r} ({counts[label]} rows)" for label in sorted(group))
            notes.append(f"{found} are one label: {word_of.get(spelling)!r}")
    return word_of, notes


def refuse_unlearned(label_names, learned):
    """ValueError for words that were typed and that a run has not learned."""
    known = {"", *map(plain_number, learned)}
    for word in split_names(label_names or ""):
        if plain_number(word) not in known:
            raise ValueError(
                f"label_names={label_names}: the run has learned {','.join(learned)}, and not {word}; to say which "
                f"label of the data is which of these, type --label_names=LABEL={learned[0]},LABEL={learned[-1]}"
            )


def refuse_unknown(label, names, where, asked):
    words = ",".join(names)
    remedy = f"and the train file has {words}: change one of the two"
    if asked.learned:
        remedy = f"and the run has learned {words}: say which is which by --label_names={label.strip()}=WORD,..."
    elif asked.label_names:
        remedy = f"and label_names={words}: add it to label_names, take its rows out, or type "
        remedy += "--label_names=None for the data's own words"
    raise ValueError(f"{asked.dataset} has the label {label!r} too, first in {where}; {remedy}")


def refuse_mixture(labels, places, dataset):
    """Words and numbers at once are two spellings of the same classes more often than classes of their own."""
    decimal = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", re.IGNORECASE)
    number = next(filter(decimal.fullmatch, labels), None)
    word = next(itertools.filterfalse(decimal.fullmatch, labels), None)
    if number is not None and word is not None:
        raise ValueError(
            f"{dataset} has numbers and words for labels: {number!r} first in {places[number]()}, {word!r} first in "
            f"{places[word]()}; write one kind, or, if each is a class of its own, type "
            f"--label_names={','.join(sorted(label.strip() for label in labels)[:8])}"
        )


def has_numbers(labels):
    return any(is_whole(plain_number(label)) for label in labels)


def is_whole(spelling):
    return re.fullmatch(r"-?\d+", spelling) is not None


def plain_number(label):
    """The normalised label; a whole number without its point, as jsonl's 1.0 and csv's 1 are one label."""
    spelling = normalise_label(label)
    return str(int(spelling.partition(".")[0])) if re.fullmatch(r"-?\d+(\.0*)?", spelling) else spelling
