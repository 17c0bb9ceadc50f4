"""Wrong answers, each right but for one mistake: the grader's tests find it, and whatever they say of it is true.

python -m pytest tests/tools/test_wrong_answers.py             # a handful
python -m pytest tests/tools/test_wrong_answers.py -m slow     # the others
"""

import pytest
from answers import exercises, grade, with_answer

from tools.grading.submissions import FILES

INIT, RESET, FORWARD = "LoRALinear.__init__", "LoRALinear.reset_parameters", "LoRALinear.forward"
TRAIN, MARK, BUILD = "LoRALinear.train", "mark_only_lora_as_trainable", "build_model"
ATTENTION, MLP = "Attention.__init__", "MLP.__init__"
PROMPT = "CustomDataLoader._add_instruction_finetuning"
TARGETS = "CustomDataLoader._inputs_and_targets"
SCORE = "ModelSampler.get_accuracy"
MERGE = "self.weight.data += sign * self.lora_scaling * (self.lora_B @ self.lora_A).detach()"
A_DRAWN = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"
FILLED = """    def _add_instruction_finetuning(self, rec):
        word = self.label_names[rec["label"]]
        rec["instr_tuned_text"] = {value}
        return {result}"""
CUT = """    def _inputs_and_targets(self, ex):
        n = ex.n_prompt if self.loss_on == "label" else 1
        return {inputs}, {targets}"""
MEAN = """recalls = [recall for recall in self.result["recall"] if recall is not None]
        return sum(recalls) / len(recalls)"""
RIGHT_TARGETS = "[IGNORE] * (n - 1) + ex.tokens[n:]"


def drops(product):
    return {"self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T": product}


def filled(value, result="rec"):
    return FILLED.format(value=value, result=result)


def cut(targets, inputs="ex.tokens[:-1]"):
    return CUT.format(inputs=inputs, targets=targets)


HANDFUL = [  # what is wrong; the exercise; its source or what is exchanged in it; of each failure's message, a part
    (
        "dropout on A",
        FORWARD,
        drops("x @ self.lora_dropout(self.lora_A).T @ self.lora_B.T"),
        ["all rows have one mask"],
    ),
    (
        "dropout on B A",
        FORWARD,
        drops("x @ self.lora_dropout(self.lora_B @ self.lora_A).T"),
        ["all rows have one mask"],
    ),
    (
        "A zero, B random",
        RESET,
        {A_DRAWN: "nn.init.zeros_(self.lora_A)", "nn.init.zeros_(self.lora_B)": "nn.init.normal_(self.lora_B)"},
        ["A is zero and B is not in a new layer: asked for is", "standard deviation of 0; of"],
    ),
    ("A's default kaiming", RESET, {", a=math.sqrt(5)": ""}, ["(is a = sqrt(5) missing?)"]),
    (
        "alpha times r",
        INIT,
        {"lora_alpha / lora_rank": "lora_alpha * lora_rank"},
        ["lora_scaling is 40, which is alpha * r: alpha / r = 2.5 was expected"],
    ),
    (
        "labels swapped",
        PROMPT,
        filled('self.template.format(text=rec["text"], label=self.label_names[1 - rec["label"]])'),
        [
            "the words are swapped",
            "great were filled as 'A joy. This movie is terrible'",
            "first make the tests above",
        ],
    ),
    ("a string returned", PROMPT, filled("''", 'self.template.format(text=rec["text"], label=word)'), ["returns '"]),
    (
        "garbage left out",
        SCORE,
        {"list(zip(self.found, labels))": "[(i, label) for i, label in zip(self.found, labels) if i is not None]"},
        ["garbage is left out of the count"],
    ),
    ("not shifted", TARGETS, cut("[IGNORE] * n + ex.tokens[n:-1]"), ["they are not shifted"]),
]

OTHERS = [
    # lora.py
    ("alpha not divided", INIT, {"lora_alpha / lora_rank": "lora_alpha"}, ["is 10; alpha is not divided by r"]),
    ("r over alpha", INIT, {"lora_alpha / lora_rank": "lora_rank / lora_alpha"}, ["is 0.4, which is r / alpha"]),
    (
        "A and B swapped",
        INIT,
        {"lora_A": "lora_B", "lora_B": "lora_A"},
        [
            "A and B are swapped: A comes first",
            "lora_A has the shape (7, 4)",
            "first make them right",
            "cannot be multiplied",
        ],
    ),
    (
        "A on the CPU",
        INIT,
        {"torch.empty((lora_rank, in_features), device=device": "torch.empty((lora_rank, in_features)"},
        ["is on another device than weight"],
    ),
    (
        "A without the dtype",
        INIT,
        {"(lora_rank, in_features), device=device, dtype=dtype": "(lora_rank, in_features)"},
        ["a layer in float64 has lora_A in another dtype"],
    ),
    (
        "dropout is a number",
        INIT,
        {"nn.Dropout(lora_dropout)": "lora_dropout"},
        ["lora_dropout is 0.25, not an nn.Dropout", "'float' object is not callable"],
    ),
    (
        "no flag",
        INIT,
        {"self.has_weights_merged = False": "pass"},
        ["has_weights_merged of a new layer is None", "no attribute 'has_weights_merged'"],
    ),
    (
        "B random",
        RESET,
        {"nn.init.zeros_(self.lora_B)": "nn.init.kaiming_uniform_(self.lora_B)"},
        ["B is not zero in a new layer", "a new layer's output is not the base's"],
    ),
    (
        "A and B zero",
        RESET,
        {A_DRAWN: "nn.init.zeros_(self.lora_A)"},
        ["A and B are both zero in a new layer", "standard deviation of 0; of"],
    ),
    ("A normal", RESET, {A_DRAWN: "nn.init.normal_(self.lora_A)"}, ["(normal_ or randn?)"]),
    ("A between 0 and 1", RESET, {A_DRAWN: "nn.init.uniform_(self.lora_A)"}, ["(rand?)"]),
    (
        "A all ones",
        RESET,
        {A_DRAWN: "nn.init.ones_(self.lora_A)"},
        ["all numbers of A are the same in a new layer", "standard deviation of 0; of"],
    ),
    (
        "W0 is not drawn",
        RESET,
        {"nn.Linear.reset_parameters(self)": "pass"},
        ["reset_parameters leaves weight as it was"],
    ),
    (
        "no scale",
        FORWARD,
        {"self.lora_scaling * ": ""},
        ["B A x is not multiplied by lora_scaling", "the merged layer gives another output"],
    ),
    (
        "scaled twice",
        FORWARD,
        {"self.lora_scaling * ": "self.lora_scaling**2 * "},
        ["B A x is multiplied by lora_scaling twice", "the merged layer gives another output"],
    ),
    (
        "all is scaled",
        FORWARD,
        {"out = out + self.lora_scaling * (": "out = self.lora_scaling * (out + "},
        [
            "W0 x + b is scaled as well",
            "a new layer's output is not the base's",
            "the merged layer gives another output",
        ],
    ),
    (
        "counted while merged",
        FORWARD,
        {" and not self.has_weights_merged": ""},
        ["forward adds B A x although it is merged", "the merged layer gives another output"],
    ),
    (
        "detached",
        FORWARD,
        {"self.lora_A.T": "self.lora_A.data.T"},
        ["lora_A gets no gradient: is something detached"],
    ),
    (
        "dropout on the output",
        FORWARD,
        {"self.lora_dropout(x)": "x", "return out": "return self.lora_dropout(out) if self.is_lora() else out"},
        ["lora_dropout is on the output"],
    ),
    (
        "dropout on A x",
        FORWARD,
        drops("self.lora_dropout(x @ self.lora_A.T) @ self.lora_B.T"),
        ["lora_dropout is behind A or B"],
    ),
    (
        "dropout behind B",
        FORWARD,
        drops("self.lora_dropout(x @ self.lora_A.T @ self.lora_B.T)"),
        ["lora_dropout is behind A or B"],
    ),
    (
        "dropout on B",
        FORWARD,
        drops("x @ self.lora_A.T @ self.lora_dropout(self.lora_B).T"),
        ["all rows have one mask"],
    ),
    (
        "dropout on all of x",
        FORWARD,
        {
            "out = nn": "x = self.lora_dropout(x) if self.is_lora() else x\n        out = nn",
            "self.lora_dropout(x)": "x",
        },
        ["lora_dropout reaches W0 x, too"],
    ),
    ("no dropout", FORWARD, {"self.lora_dropout(x)": "x"}, ["lora_dropout=0.5 drops nothing in training"]),
    (
        "another share",
        FORWARD,
        {"self.lora_dropout(x)": "nn.functional.dropout(x, 0.25)"},
        [
            "drops another share",
            "it is off by up to",
            "although lora_dropout is 0",
            "the merged layer gives another output",
        ],
    ),
    (
        "not scaled up",
        FORWARD,
        {"self.lora_dropout(x)": "(self.lora_dropout(x) * 0.5)"},
        ["changes the mean of B A x from 64 to 31", "it is off by up to", "the merged layer gives another output"],
    ),
    (
        "merged twice",
        TRAIN,
        {"mode == self.has_weights_merged": "(self.has_weights_merged or not mode)"},
        ["the adapter is merged twice"],
    ),
    (
        "never un-merged",
        TRAIN,
        {"mode == self.has_weights_merged": "not mode and not self.has_weights_merged"},
        ["it was not un-merged"],
    ),
    (
        "merged without scale",
        TRAIN,
        {"self.lora_scaling * ": ""},
        ["the adapter is merged without its scale", "the merged layer gives another output"],
    ),
    (
        "subtracted",
        TRAIN,
        {"-1 if mode else 1": "1 if mode else -1"},
        ["the adapter is subtracted", "the merged layer gives another output"],
    ),
    (
        "another parameter",
        TRAIN,
        {MERGE: f"self.weight = nn.Parameter(self.weight + {MERGE[20:]})"},
        ["weight.requires_grad is True: W0 would train"],
    ),
    (
        "train returns nothing",
        TRAIN,
        {"return self": "return None"},
        ["train returns something else than self", "eval returns something else"],
    ),
    (
        "no inherited train",
        TRAIN,
        {"nn.Linear.train(self, mode)": "pass"},
        ["the layer is still in training mode", "a layer without adapter has training = True"],
    ),
    (
        "W0 trains",
        MARK,
        {'"lora_" in name': '"lora_" in name or name == "1.weight"'},
        ["W0 trains: the weight next to A and B"],
    ),
    ("a bias trains", MARK, {'"lora_" in name': '"weight" not in name'}, ["a bias trains (1.bias, "]),
    ("only A trains", MARK, {'"lora_" in name': '"lora_A" in name'}, ["1.lora_B must train and does not"]),
    (
        "nothing is frozen",
        MARK,
        {'"lora_" in name': '"lora_" in name or param.requires_grad'},
        ["W0 trains: the weight next to A and B"],
    ),
    ("the model is not returned", MARK, {"return model": "return None"}, ["the model is not returned"]),
    # model.py
    (
        "a short name",
        ATTENTION,
        {'f"transformer.h.{layer}.attn"': '"attn"'},
        ["no layer has an adapter: LoRALinear wants what"],
    ),
    (
        "another layer's name",
        ATTENTION,
        {"{name}.c_proj": "{name}.c_attn"},
        ["for transformer.h.1.attn.c_attn alone, adapters are on transformer.h.1.attn.c_attn, transformer."],
    ),
    (
        "a plain layer",
        ATTENTION,
        {'LoRALinear(C, C, **config.lora(f"{name}.c_proj"))': "nn.Linear(C, C)"},
        ["attn.c_proj has no adapter", "attn.c_proj is a Linear", "no layer has an adapter"],
    ),
    (
        "no third of QKV",
        ATTENTION,
        {"LoRALinear(C, 3 * C,": "LoRALinear(C, 2 * C,"},
        ["the weight of attn.c_attn is (32, 16), not (out, in) = (48, 16)"],
    ),
    (
        "always adapted",
        MLP,
        {'**config.lora(f"{name}.c_fc")': "lora_rank=2, lora_alpha=6.0, lora_dropout=0.25"},
        ["mlp.c_fc have an adapter: by default attention", "transformer.h.0.mlp.c_fc"],
    ),
    # dataloader.py
    (
        "label first",
        PROMPT,
        filled("word + self.template.format(text=rec['text'], label='')"),
        ["the label comes before the text", "filled as 'greatA joy", "first make the tests above"],
    ),
    (
        "a number for a word",
        PROMPT,
        filled("self.template.format(text=rec['text'], label=rec['label'])"),
        ["ends with the label's number", "This movie is 1'", "first make the tests above"],
    ),
    (
        "one template",
        PROMPT,
        filled("'Review: ' + rec['text'] + '\\nSentiment: ' + word"),
        ["filled as 'Review: A joy."],
    ),
    (
        "stripped",
        PROMPT,
        filled("self.template.format(text=rec['text'].strip(), label=word)"),
        ["'  two blanks' is not in"],
    ),
    (
        "filled twice",
        PROMPT,
        filled("self.template.replace('{text}', rec['text']).replace('{label}', word)"),
        ["'a {brace} and {label} and {text}' is not in"],
    ),
    (
        "nothing returned",
        PROMPT,
        filled("self.template.format(text=rec['text'], label=word)", "None"),
        ["the method returns nothing"],
    ),
    ("all is scored", TARGETS, cut("ex.tokens[1:]"), [": the prompt is scored"]),
    (
        "the prompt's end is scored",
        TARGETS,
        cut("[IGNORE] * (n - 2) + ex.tokens[max(1, n - 1):]"),
        ["the prompt's last token is scored"],
    ),
    (
        "the label's first is not",
        TARGETS,
        cut("[IGNORE] * n + ex.tokens[n + 1:]"),
        ["the label's first token is not scored", "are [-1, 12, 13, 20, 21, 50256], not"],
    ),
    (
        "no end of text",
        TARGETS,
        cut("[IGNORE] * (n - 1) + ex.tokens[n:-1] + [IGNORE]"),
        ["end-of-text is not scored", "are [11, 12, 13, 20, 21, -1], not"],
    ),
    ("-100", TARGETS, cut("[-100] * (n - 1) + ex.tokens[n:]"), ["a place that is not scored holds IGNORE"]),
    ("label alone", TARGETS, {'if self.loss_on == "all"': "if False"}, ['loss_on="all" is not looked at']),
    ("all inputs", TARGETS, cut(RIGHT_TARGETS, "ex.tokens"), ["there are 7 inputs and 6 targets"]),
    # train.py
    (
        "all is trained",
        BUILD,
        {"mark_only_lora_as_trainable(model)": "pass"},
        ["with rank=4: transformer.wte.weight and 75 more would train too"],
    ),
    (
        "nothing is trained",
        BUILD,
        {"mark_only_lora_as_trainable(model)": "model.requires_grad_(False)"},
        ["with rank=4: transformer.h.0.attn.c_attn.lora_A does not train"],
    ),
    # generate.py
    ("no data loaded", SCORE, {"self.load_data()": "pass"}, ["asks for the data before load_data() was called"]),
    ("no model loaded", SCORE, {"self.load_model()": "pass"}, ["does not call load_model()"]),
    (
        "in percent",
        SCORE,
        {"return sum": "return 100 * sum"},
        ["the accuracy is in percent", "40, not 0.4", "33.33, not", "50, not 0.5", "100, not 1"],
    ),
    (
        "counted",
        SCORE,
        {" / len(pairs)": ""},
        ["not divided by n", "the accuracy is 2, not 0.4", "1, not 0.3333", "1, not 0.5", "2, not 1"],
    ),
    (
        "a mean of recalls",
        SCORE,
        {"return sum(i == label for i, label in pairs) / len(pairs)": MEAN},
        ["the mean over the labels is returned", "0.4167, not 0.4"],
    ),
    (
        "garbage is negative",
        SCORE,
        {"enumerate(names) if name.casefold() == word), None)": "enumerate(names) if name.casefold() == word), 0)"},
        ["an answer that names no label counts as negative", "self.found is [1, 0]"],
    ),
    ("found anywhere", SCORE, {" and match.end() <= 40": ""}, ["a label was found anywhere in the answer"]),
    (
        "cut at 40",
        SCORE,
        {"pattern.search(text)": "pattern.search(text[:40])"},
        ["cut after 40 characters, ends in a label"],
    ),
    ("cut at 41", SCORE, {"<= 40": "<= 41"}, ["a label that ends with character 41 counts: it ends too late"]),
    (
        "first word only",
        SCORE,
        {"pattern.search(text)": "pattern.match(text.strip())"},
        ["character 41 counts", "in ' \"positive\"' was not found"],
    ),
    (
        "inside a word",
        SCORE,
        {"\\b({words})\\b": "({words})"},
        ["found inside another word", "cut after 40 characters, ends in a label"],
    ),
    (
        "its beginning only",
        SCORE,
        {"\\b({words})\\b": "\\b({words})"},
        ["found inside another word", "cut after 40 characters, ends in a label"],
    ),
    ("capitals matter", SCORE, {", re.IGNORECASE": ""}, ["in ' Positive' was not found: capitals"]),
    ("the shorter label", SCORE, {"key=len, reverse=True": "key=len"}, ["in 'very good', the longer one counts"]),
    (
        "the true one anywhere",
        SCORE,
        {
            "self.found.append(": "self.found.append(label if names[label] in text else ",
            "for text in self.generated": "for text, label in zip(self.generated, labels)",
        },
        ["found anywhere in the answer", "found inside another word", "another one came first"],
    ),
    (
        "fixed words",
        SCORE,
        {"names = self.loader.label_names": "names = ['negative', 'positive']"},
        ["IndexError: list index out of range", "where the label's word is 'Ham'", "the accuracy is 0, not 1"],
    ),
    ("nothing kept", SCORE, {"self.found": "found"}, ["does not set self.found"]),
]


@pytest.mark.parametrize(
    "mistakes", [HANDFUL, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["handful", "others"]
)
def test_a_mistake_is_named(mistakes, tmp_path):
    """Lost if it fails: a student with this mistake is called right, or is sent after a mistake that is not there."""
    cases = {}
    for what, name, change, _ in mistakes:
        cases[what] = (with_answer(name, change), FILES.index(exercises()[name]) + 1)
    graded = grade(tmp_path / "submissions", cases)
    untrue, missing = [], []
    for what, _, _, phrases in mistakes:
        messages = [message for message in graded[what].values() if message]
        missing += [(what, phrase) for phrase in phrases if not any(phrase in message for message in messages)]
        untrue += [(what, message) for message in messages if not any(phrase in message for phrase in phrases)]
        assert messages, f"{what}: nothing is wrong with it"
    assert not missing
    assert not untrue
