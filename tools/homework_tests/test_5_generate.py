"""PYTEST_DONT_REWRITE  Part 5, generate.py: the accuracy, from what the model writes.

python -m pytest homework_tests/test_5_generate.py

No model writes here: `answer_split` is replaced by one that returns the answers of each test.
"""

from types import SimpleNamespace

import numpy as np

import generate
from configurator import make_config

NAMES = ["negative", "positive"]


class Split(list):
    @property
    def labels(self):
        return np.array([example.label for example in self])


def score(*pairs, names=NAMES):
    """(accuracy, sampler) for pairs of the model's answer and the true label's word."""
    sampler = object.__new__(generate.ModelSampler)
    sampler.config = make_config(init_from="gpt2-mini")
    split = Split(SimpleNamespace(text="a film", label=names.index(true)) for _, true in pairs)
    data = SimpleNamespace(label_names=names, splits={"test": split}, classify=False)
    sampler.load_data = lambda: vars(sampler).update(loader=data)
    sampler.load_model = lambda: vars(sampler).update(model=object())
    sampler.answer_split = lambda: [answer for answer, _ in pairs]
    sampler.loader = sampler.model = None
    try:
        accuracy = sampler.get_accuracy()
    except AttributeError:
        assert sampler.loader, "get_accuracy asks for the data before load_data() was called"
        raise
    assert sampler.model, "get_accuracy does not call load_model(): a new ModelSampler has no model yet"
    assert isinstance(accuracy, (int, float)), f"get_accuracy returns {accuracy!r}, not a number of Python's"
    return accuracy, sampler


LEFT_OUT = "garbage is left out of the count: an answer that names no label is wrong, and is one of n"


def check(found, wanted, mistakes):
    for accuracy, mistake in mistakes.items():
        assert abs(found - accuracy) > 1e-9, mistake
    assert abs(found - wanted) < 1e-9, f"the accuracy is {found:.4g}, not {wanted:.4g}"


def check_garbage(answer, mistake):
    """The answer is garbage: of three, one is right. Fails with the mistake if it was taken for a label."""
    found, _ = score((answer, "positive"), (" positive", "positive"), (" negative", "positive"))
    check(found, 1 / 3, {2 / 3: mistake, 1 / 2: LEFT_OUT})


def check_found(answer, mistake, true="positive", other="negative", names=NAMES):
    """The answer names the true label: of two, it alone is right. Fails with the mistake if it was not found."""
    found, _ = score((answer, true), (f" {other}", true), names=names)
    check(found, 1 / 2, {0.0: mistake})


def test_accuracy_is_the_share_of_right_answers():
    pairs = [(" positive", "positive")] * 3 + [(" negative", "negative"), (" positive", "negative")]
    found, _ = score(*pairs)
    mistakes = {
        80.0: "the accuracy is in percent: a share from 0 to 1 is asked for",
        4.0: "the right answers are counted, but not divided by n",
        0.2: "the share of the wrong answers is returned, or the labels are swapped",
        0.75: "the mean over the labels is returned: the share of all answers that are right is asked for",
    }
    check(found, 0.8, mistakes)
    found, _ = score((" ham", "ham"), (" spam", "ham"), (" eggs", "eggs"), names=["ham", "spam", "eggs"])
    check(found, 2 / 3, {0.0: "the labels of another data set (ham, spam, eggs) are not found: label_names has them"})


def test_accuracy_counts_garbage_as_wrong():
    garbage = [(" a film about", "positive"), (" a film about", "positive"), ("", "negative")]
    found, _ = score((" positive", "positive"), (" negative", "negative"), *garbage)
    as_label = "an answer that names no label counts as {}: it is wrong, whatever the true label is"
    check(found, 2 / 5, {1.0: LEFT_OUT, 3 / 5: as_label.format("negative"), 4 / 5: as_label.format("positive")})


def test_accuracy_reads_the_first_characters_only():
    late = " a film that goes on and on, for three hours, and is positive"
    check_garbage(late, f"a label was found anywhere in the answer, in {late!r}: only its beginning counts")
    check_found(" " * 32 + "positive", "a label that ends with character 40 was not found: it counts")
    check_garbage(" " * 33 + "positive", "a label that ends with character 41 counts: it ends too late")
    cut = " acting, the music and all that positively bad"
    check_garbage(cut, f"{cut!r}, cut after 40 characters, ends in a label that is part of a longer word")
    second = " well, it is quite positive"
    check_found(second, f"the label in {second!r} was not found: it is within the first 40 characters")


def test_accuracy_wants_whole_words():
    for word in (" positively awful", " nonpositive", " positive2"):
        check_garbage(word, f"the label positive was found inside another word: {word!r} is garbage")
    for word in (" positive.", ' "positive"', "positive\n", " (positive)"):
        check_found(word, f"the label in {word!r} was not found: a mark next to it does not matter")


def test_accuracy_ignores_capitals():
    for word in (" Positive", " POSITIVE"):
        check_found(word, f"the label in {word!r} was not found: capitals do not matter")
    check_found(
        " ham",
        "the answer ' ham' was not found where the label's word is 'Ham'",
        "Ham",
        "Spam",
        ["Ham", "Spam"],
    )


def test_accuracy_takes_the_label_that_comes_first():
    found, _ = score((" negative, not positive", "negative"), (" positive, not negative", "positive"))
    check(found, 1.0, {0.5: "of two labels in an answer, the first one written counts, not the first of label_names"})
    found, _ = score((" negative, not positive", "positive"), (" positive, not negative", "negative"))
    check(
        found, 0.0, {1.0: "an answer counts as right where the true label is in it anywhere: another one came first"}
    )
    for names in (["very", "very good"], ["very good", "very"]):
        found, _ = score((" very good", "very good"), (" very", "very"), names=names)
        check(found, 1.0, {0.5: "of the labels very and very good in 'very good', the longer one counts"})


def test_accuracy_keeps_what_generate_py_prints():
    _, sampler = score((" positive", "positive"), (" a film", "negative"))
    for name in ("generated", "found", "result"):
        assert hasattr(sampler, name), f"get_accuracy does not set self.{name}, which its docstring names"
    assert list(sampler.generated) == [" positive", " a film"], (
        f"self.generated is {sampler.generated!r}, not the answers"
    )
    assert list(sampler.found) == [1, None], (
        f"self.found is {sampler.found!r}; of a right answer and garbage: [1, None]"
    )
    missing = {"n", "accuracy", "garbage", "confusion"} - set(sampler.result)
    assert not missing, f"self.result has no {', '.join(sorted(missing))}: tabulate makes the whole table"
    assert sampler.result["n"] == 2 and sampler.result["garbage"] == 0.5, "self.result leaves the garbage out"
