"""PYTEST_DONT_REWRITE  Part 3, dataloader.py: a record becomes a prompt with its answer.

python -m pytest homework_tests/test_3_dataloader.py
"""

from dataloader import CustomDataLoader

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
    assert "instr_tuned_text" in result, f"no key instr_tuned_text in the record: it has {', '.join(result)}"
    assert (result["text"], result["label"]) == (text, label), "the record's own text or label was changed"
    return result["instr_tuned_text"]


def test_prompt_holds_text_and_label_in_their_places():
    for label, word in enumerate(NAMES):
        found = fill("A joy.", label)
        assert "A joy." in found, f"the review is not in {found!r}"
        assert not found.endswith(str(label)), f"{found!r} ends with the label's number: its word is asked for"
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
        wanted = f"Review: {text}\nSentiment: negative"
        assert found == wanted, f"a text may hold blanks and braces itself: {found!r} was made, not {wanted!r}"


def test_prompt_is_what_the_loader_tokenises(tmp_path):
    rows = [f'"a dreadful film, number {i}",0\n"a delightful film, number {i}",1\n' for i in range(40)]
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(rows))
    loader = CustomDataLoader(str(path), template=TEMPLATE, label_names="negative,positive")
    for example in loader.splits["train"]:
        answer = loader.encoding.decode(example.tokens[example.n_prompt : -1])
        wanted = " positive" if "delightful" in example.text else " negative"
        assert answer == wanted, f"of {example.text!r} the loader has {answer!r} scored, not {wanted!r}"
