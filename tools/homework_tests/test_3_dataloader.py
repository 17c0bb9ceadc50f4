"""PYTEST_DONT_REWRITE  Part 3, dataloader.py: a record becomes a prompt with its answer, and what of it is scored.

python -m pytest homework_tests/test_3_dataloader.py
"""

from types import SimpleNamespace

from dataloader import IGNORE, CustomDataLoader
from plumbing.data.tokenizer import gpt2_encoding

TEMPLATE = "Review: {text}\nSentiment: {label}"
NAMES = ["negative", "positive"]


def fill(text, label, template=TEMPLATE, names=NAMES):
    """What the method makes of a record, with a loader that holds no data."""
    loader = object.__new__(CustomDataLoader)
    loader.template = template
    loader.label_names = names
    rec = {"text": text, "label": label}
    result = loader._add_instruction_finetuning(rec)
    assert result is not None, "the method returns nothing: the record, with its new key, is asked for"
    assert isinstance(result, dict), f"the method returns {result!r}: the record, with its new key, is asked for"
    assert "instr_tuned_text" in result, f"no key instr_tuned_text in the record: it has {', '.join(result)}"
    assert isinstance(result["instr_tuned_text"], str), f"instr_tuned_text is {result['instr_tuned_text']!r}, no text"
    assert (result["text"], result["label"]) == (text, label), "the record's own text or label was changed"
    return result["instr_tuned_text"]


def test_prompt_holds_text_and_label_in_their_places():
    for label, word in enumerate(NAMES):
        found = fill("A joy.", label)
        assert "A joy." in found, f"the review is not in {found!r}"
        assert not found.endswith(str(label)), f"{found!r} ends with the label's number: its word is asked for"
        swapped = NAMES[1 - label] in found and word not in found
        assert not swapped, f"the words are swapped in {found!r}: label {label} is {word}, label_names[{label}]"
        assert word in found, f"the word of label {label}, {word}, is not in {found!r}"
        assert found.index("A joy.") < found.index(word), (
            f"the label comes before the text in {found!r}: the model would see the answer first, and copy it"
        )
        wanted = f"Review: A joy.\nSentiment: {word}"
        assert found == wanted, f"the template {TEMPLATE!r} was filled as {found!r}, not {wanted!r}"


def test_prompt_follows_the_template():
    found = fill("A joy.", 1, template="{text} This movie is {label}", names=["terrible", "great"])
    assert found == "A joy. This movie is great", (
        f"self.template '{{text}} This movie is {{label}}' and the words terrible and great were filled as {found!r}"
    )


def test_prompt_keeps_the_text_as_it_is():
    for text in ("  two blanks", "a {brace} and {label} and {text}", "100 % \\n", "", "été \N{PILE OF POO}"):
        found = fill(text, 0)
        assert text in found, f"the text {text!r} is not in {found!r} as it was: its blanks and braces are its own"


def test_prompt_is_what_the_loader_tokenises(tmp_path):
    assert fill("A joy.", 1) == "Review: A joy.\nSentiment: positive", "first make the tests above green"
    rows = [f'"a dreadful film, number {i}",0\n"a delightful film, number {i}",1\n' for i in range(40)]
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(rows))
    loader = CustomDataLoader(str(path), template=TEMPLATE, label_names="negative,positive")
    for example in loader.splits["train"]:
        answer = gpt2_encoding().decode(example.tokens[example.n_prompt : -1])
        wanted = " positive" if "delightful" in example.text else " negative"
        assert answer == wanted, f"of {example.text!r} the loader has {answer!r} scored, not {wanted!r}"


# --- what is scored --------------------------------------------------------------------------------

TOKENS = [10, 11, 12, 13, 20, 21, 50256]  # a prompt of four tokens, a label of two, end-of-text
_ = IGNORE


def cut(loss_on="label", tokens=TOKENS, n_prompt=4):
    """What the method makes of an example, with a loader that holds no data."""
    loader = object.__new__(CustomDataLoader)
    loader.loss_on = loss_on
    loader.classify = False
    result = loader._inputs_and_targets(SimpleNamespace(tokens=list(tokens), n_prompt=n_prompt, label=1, text="text"))
    assert isinstance(result, (tuple, list)) and len(result) == 2, f"the method returns {result!r}, not two lists"
    inputs, targets = (list(values) for values in result)
    assert len(inputs) == len(targets), f"there are {len(inputs)} inputs and {len(targets)} targets: {result!r}"
    return inputs, targets


def check(found, wanted, mistakes):
    hint = next((mistake for mistake, result in mistakes.items() if found == result), "")
    assert found == wanted, (
        f"of the tokens {TOKENS}, 4 of them the prompt, the targets are {found}, not {wanted}{hint}"
    )


def test_targets_inputs_are_all_tokens_but_the_last():
    for loss_on in ("label", "all"):
        inputs, _ = cut(loss_on)
        assert inputs == TOKENS[:-1], (
            f"of the tokens {TOKENS} the inputs are {inputs}: asked for are all but the last, which has no next token"
        )


def test_targets_are_the_label_and_end_of_text():
    mistakes = {
        ": they are not shifted; a place predicts the next token": [_, _, _, _, 20, 21],
        ": the prompt is scored": TOKENS[1:],
        ": the prompt's last token is scored": [_, _, 13, 20, 21, 50256],
        ": the label's first token is not scored": [_, _, _, _, 21, 50256],
        ": end-of-text is not scored": [_, _, _, 20, 21, _],
        ": the prompt is scored, the label is not": [11, 12, 13, _, _, _],
        f": a place that is not scored holds IGNORE, {IGNORE}": [-100, -100, -100, 20, 21, 50256],
    }
    check(cut()[1], [_, _, _, 20, 21, 50256], mistakes)
    found = cut(tokens=[50256, 20, 50256], n_prompt=1)[1]
    assert found == [20, 50256], (
        f"of a prompt of one token and a label of one the targets are {found}, not [20, 50256]"
    )


def test_targets_are_all_next_tokens_where_all_is_scored():
    mistakes = {
        ': loss_on="all" is not looked at': [_, _, _, 20, 21, 50256],
        ": they are not shifted; a place predicts the next token": [_, *TOKENS[1:-1]],
    }
    check(cut("all")[1], TOKENS[1:], mistakes)
