"""PYTEST_DONT_REWRITE  Part 5, generate.py: the accuracy, from what the model writes.

python -m pytest homework_tests/test_5_generate.py

No model writes here: `generate_labels` is replaced by one that returns the answers of each test.
"""

from types import SimpleNamespace

import numpy as np
import pytest

import generate
from configurator import make_config

NAMES = ["negative", "positive"]


class Split(list):
    @property
    def labels(self):
        return np.array([example.label for example in self])


@pytest.fixture
def score(monkeypatch):
    """A function: (accuracy, sampler) for pairs of the model's answer and the true label's word."""

    def run(*pairs, names=NAMES):
        examples = [
            SimpleNamespace(text="a film", label=names.index(true), tokens=[64], n_prompt=1) for _, true in pairs
        ]
        sampler = object.__new__(generate.ModelSampler)
        sampler.config = make_config(init_from="gpt2-mini")
        data = SimpleNamespace(
            label_names=names, splits={"test": Split(examples)}, prefixes={"test": []}, classify=False
        )
        sampler.load_data = lambda: vars(sampler).update(loader=data, answer_tokens=5)
        sampler.load_model = lambda: vars(sampler).update(model=object())
        sampler.loader = sampler.model = None
        sampler.device = "cpu"
        monkeypatch.setattr(generate, "generate_labels", lambda *args, **kwargs: [answer for answer, _ in pairs])
        try:
            accuracy = sampler.get_accuracy()
        except AttributeError:
            assert sampler.loader, "get_accuracy asks for the data before load_data() was called"
            raise
        assert sampler.model, "get_accuracy does not call load_model(): a new ModelSampler has no model yet"
        assert isinstance(accuracy, float), f"get_accuracy returns {accuracy!r}, not a number"
        return accuracy, sampler

    return run


def check(found, wanted, mistakes):
    for accuracy, mistake in mistakes.items():
        assert abs(found - accuracy) > 1e-9, mistake
    assert abs(found - wanted) < 1e-9, f"the accuracy is {found:.4g}, not {wanted:.4g}"


def test_accuracy_is_the_share_of_right_answers(score):
    pairs = [
        (" positive", "positive"),
        (" negative", "negative"),
        (" positive", "positive"),
        (" positive", "negative"),
    ]
    found, _ = score(*pairs)
    check(found, 0.75, {75.0: "the accuracy is in percent: a share from 0 to 1 is asked for", 3: "not divided by n"})
    found, _ = score((" ham", "ham"), (" spam", "ham"), (" eggs", "eggs"), names=["ham", "spam", "eggs"])
    check(found, 2 / 3, {0.0: "the labels of another data set (ham, spam, eggs) are not found: label_names has them"})


def test_accuracy_counts_garbage_as_wrong(score):
    pairs = [(" positive", "positive"), (" negative", "negative"), (" a film about", "positive"), ("", "negative")]
    found, _ = score(*pairs)
    left_out = "garbage is left out of the count: an answer that names no label is wrong, and is one of n"
    as_negative = "an answer that names no label counts as negative: it is wrong, whatever the true label is"
    check(found, 0.5, {1.0: left_out, 0.75: as_negative})


def test_accuracy_reads_the_first_characters_only(score):
    late = " a film that goes on and on, for three hours, and is positive"
    found, _ = score((late, "positive"), (" positive", "positive"))
    check(found, 0.5, {1.0: f"a label was found anywhere in the answer, in {late!r}: only its beginning counts"})
    for blanks, wanted in ((32, 1.0), (33, 0.5)):  # positive ends with character 40, and with 41
        found, _ = score((" " * blanks + "positive", "positive"), (" positive", "positive"))
        check(
            found,
            wanted,
            {1.5 - wanted: f"a label that ends with character {blanks + 8} counts, or does not: see 40"},
        )
    cut = " acting, the music and all that positively awful"
    found, _ = score((cut, "positive"), (" positive", "positive"))
    check(found, 0.5, {1.0: f"{cut!r}, cut after 40 characters, ends in a label that is part of a longer word"})
    found, _ = score((" well, it is quite positive", "positive"), (" positive", "positive"))
    check(
        found, 1.0, {0.5: "a label that is not the very first word, but within the first 40 characters, counts, too"}
    )


def test_accuracy_wants_whole_words(score):
    for word in (" positively awful", " nonpositive", " positive2"):
        found, _ = score((word, "positive"), (" positive", "positive"))
        check(found, 0.5, {1.0: f"the label positive was found inside another word: {word!r} is garbage"})
    for word in (" positive.", ' "positive"', "positive\n", " (positive)"):
        found, _ = score((word, "positive"))
        check(found, 1.0, {0.0: f"the label in {word!r} was not found: a mark next to it does not matter"})


def test_accuracy_ignores_capitals(score):
    for word in (" Positive", " POSITIVE"):
        found, _ = score((word, "positive"))
        check(found, 1.0, {0.0: f"the label in {word!r} was not found: capitals do not matter"})
    found, _ = score((" ham", "Ham"), (" spam", "Spam"), names=["Ham", "Spam"])
    check(found, 1.0, {0.0: "the answer ' ham' was not found where the label's own word is 'Ham'"})


def test_accuracy_takes_the_label_that_comes_first(score):
    found, _ = score((" negative, not positive", "negative"), (" positive, not negative", "positive"))
    check(found, 1.0, {0.5: "of two labels in an answer, the first one written counts, not the first of label_names"})
    found, _ = score((" negative, not positive", "positive"), (" positive, not negative", "negative"))
    check(
        found, 0.0, {1.0: "an answer counts as right where the true label is in it anywhere: another one came first"}
    )


def test_accuracy_keeps_what_generate_py_prints(score):
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
