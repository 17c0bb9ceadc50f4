r"""Records -> prompts -> batches of token ids. Knows text and tokens, no model.

One review's path through this file, with the template "Review: {text}\nSentiment: {label}":

    record     {"text": "A joy.", "label": 1}
    filled     "Review: A joy.\nSentiment: positive"        (the prompt is everything before " positive")
    tokens     Review   :   A    joy   .   \n   Sent   iment   :     positive   <|endoftext|>
               14832    25  317  8716  13  198  31837  3681    25    3967       50256
    input      14832    25  317  8716  13  198  31837  3681    25    3967
    target     -        -   -    -     -   -    -      -       3967  50256    (the next token, where it is scored)

Such templates come from Wei et al. 2022, Finetuned Language Models Are Zero-Shot Learners, section 2.1.
"""

import math
from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import torch

from plumbing.data.data_set import DataSet
from plumbing.data.labels import Asked, check_template, check_words
from plumbing.data.token_cache import Example, take_turns
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.batch import IGNORE, Batch, pad

ANSWER_TOKENS = 5  # at most this many tokens are written after a prompt, more if a label is longer


# --- one record -> tokens --------------------------------------------------------------------------


class Prompt:
    """A template and the labels' words: what the model reads for a text, and what it should write.

    block_size: the context in tokens. classify: the text is read alone, without a template. is_answered: the model
    writes after the prompt, up to max_new_tokens (None: enough for every label), and room is left in the context.
    add_instruction: the loader's own _add_instruction_finetuning, if there is a loader.
    Raises ValueError for a template or words that cannot be used.
    """

    def __init__(
        self,
        template: str,
        label_names: list[str],
        block_size: int,
        classify: bool = False,
        is_answered: bool = False,
        max_new_tokens: int | None = None,
        add_instruction: Callable[[dict], dict] | None = None,
    ):
        self.template = template
        self.label_names = label_names
        self.classify = classify
        # The assignment's method, below, fills every prompt. For new texts there is no loader: the Prompt stands in,
        # since it has the template and the words, which is all that the method reads.
        self.add_instruction = add_instruction or partial(CustomDataLoader._add_instruction_finetuning, self)
        self.encoding = gpt2_encoding()
        check_template(template)
        self.block_size = block_size
        # The most tokens that a filled template may have: of 1,024 in training 1,023, since make_example may put
        # end-of-text before it; with an answer of 5 tokens to come 1,018.
        self.room = block_size if classify else block_size - 1
        self.spare = [0] * len(label_names)
        self._check_words()
        if classify:
            return
        # A text is cut as if the longest label followed: the cut must not depend on the answer.
        lengths = list(map(len, self.answers()))
        longest = max(lengths)
        self.spare = [longest - n for n in lengths]
        if is_answered:
            self.answer_tokens = max_new_tokens or max(ANSWER_TOKENS, longest - 1)  # end-of-text need not be written
            if self.answer_tokens < longest - 1:
                print(f"note: max_new_tokens={max_new_tokens} cuts answers: a label has {longest - 1} tokens")
            n_kept = max(self.answer_tokens, longest)
            if n_kept > block_size // 2:
                what = f"max_new_tokens={n_kept}" if max_new_tokens else f"a label of {longest} tokens"
                raise ValueError(f"{what}: at most {block_size // 2} have room, half the context")
            self.room -= n_kept  # the label's own tokens count twice now: a few too careful

    def fill(self, text: str, label: int) -> str:
        """The text that is tokenised: the filled template or, for a classifier, the text itself."""
        if self.classify:
            return text
        return self.add_instruction({"text": text, "label": label})["instr_tuned_text"]

    def make_example(self, text: str, label: int, tokens: list[int] | None = None) -> tuple[Example, bool]:
        """(the Example of a record, whether its text was cut to fit). tokens: those of `fill`, if they are there.
        `write_part` of plumbing/data/data_set.py does the same for thousands of records at once; a test compares."""
        if tokens is None:
            tokens = self.encoding.encode_ordinary(self.fill(text, label))
        is_too_long = len(tokens) > self.room - self.spare[label]
        if is_too_long:
            text, tokens = self._cut_text(text, label, tokens)
        if self.classify:
            tokens = tokens or [end_of_text()]  # an empty text
            return Example(tokens, len(tokens), label, text), is_too_long
        n_prompt = self._find_label(tokens, label)
        # Template "{text} {label}" and an empty text: the label is all there is. The prompt is then end-of-text,
        # after which GPT-2's texts begin.
        if n_prompt == 0:
            tokens = [end_of_text(), *tokens]
            n_prompt = 1
        return Example([*tokens, end_of_text()], n_prompt, label, text), is_too_long

    def answers(self) -> list[list[int]]:
        """What the model should write for each label: its tokens and end-of-text."""
        examples = [self.make_example("a text", label)[0] for label in range(len(self.label_names))]
        return [ex.tokens[ex.n_prompt :] for ex in examples]

    def _find_label(self, tokens, label):
        """How many tokens come before the label. Prompt and label are tokenised as one text, as GPT-2 read them in
        its training: the space before a label is part of its token, " positive". So we go back from the end until the
        tokens hold all bytes of the label: here one token, whose 9 bytes hold the 8 of "positive"."""
        n_prompt = len(tokens)
        label_bytes = len(self.label_names[label].encode())
        while label_bytes > 0:
            n_prompt -= 1
            label_bytes -= len(self.encoding.decode_single_token_bytes(tokens[n_prompt]))
        return n_prompt

    def _cut_text(self, text, label, tokens):
        """The text and its tokens, shorter, so that they fit. Template and label stay whole."""
        if self.classify:
            return text, tokens[: self.room]
        text_tokens = self.encoding.encode_ordinary(text)
        # A loop, because a text that is cut, decoded and encoded again may have more tokens than it was cut to.
        room = self.room - self.spare[label]
        while len(tokens) > room:
            if not text_tokens:
                raise ValueError(f"template={self.template!r} alone is longer than the context of {self.block_size}")
            n_kept = max(0, len(text_tokens) - (len(tokens) - room))
            text_tokens = text_tokens[:n_kept]
            text = self.encoding.decode(text_tokens, errors="ignore")
            tokens = self.encoding.encode_ordinary(self.fill(text, label))
        return text, tokens

    def _check_words(self):
        """The words must differ, and the prompt's tokens must not depend on which of them follows. (After a template
        that ends in "it was un", the label "true" makes the one token "untrue", neither prompt nor label.)"""
        check_words(self.label_names)
        if self.classify:
            return
        before_label = self.template.removesuffix("{label}")
        examples = [self.make_example("a text", label)[0] for label in range(len(self.label_names))]
        prompts = {tuple(ex.tokens[: ex.n_prompt]) for ex in examples}
        if len(prompts) > 1 or before_label[-1].isalnum() or before_label.endswith("{text}"):
            raise ValueError(f"template={self.template!r}: put a space or a line break before {{label}}")


# --- a data set -> batches -------------------------------------------------------------------------


class CustomDataLoader:
    """A labelled data set as batches of token ids: for instruction fine-tuning or (classify) for a classifier, whose
    input is the text alone and whose target is the label's number.

    block_size: the model's context in tokens. wanted: the splits to load. is_answered and max_new_tokens: as for
    Prompt. learned and word_of: of a run, its classes in their order and the word for each label that its data holds,
    such as ["terrible", "great"] and {"0": "terrible", "1": "great"}. The other arguments are settings, which
    configurator.py explains.

    After that `splits[name]` is a sequence of Example (tokens, n_prompt, label, text), `prefixes[name]` what all
    prompts of the split begin with (less than one prompt), `label_names` and `word_of` as above, `prompt` the Prompt,
    `digest` a hash of the data set's content, `drawn` the splits whose examples the seed chooses, since the data set
    does not name them. The same arguments and content give the same batches in the same order.

    Raises ValueError or OSError, naming the value, for data or a template that cannot be used.
    """

    def __init__(
        self,
        dataset: str = "rt_reviews",
        template: str = "Review: {text}\nSentiment: {label}",
        batch_size: int = 32,
        block_size: int = 1024,
        text_field: str = "text",
        label_field: str = "label",
        label_names: str | None = None,
        loss_on: str = "label",
        seed: int = 1337,
        wanted: Collection[str] = ("train", "validation"),
        classify: bool = False,
        balance_classes: bool = False,
        train_examples: int = 0,
        held_out: float = 0.0,
        is_answered: bool = False,
        max_new_tokens: int | None = None,
        learned: list[str] | None = None,
        word_of: dict[str, str] | None = None,
    ):
        self.template = template
        self.batch_size = batch_size
        self.loss_on = loss_on
        self.seed = seed
        self.classify = classify
        check_template(template)  # before the data is read
        # If several processes start at once, one of them tokenises.
        with take_turns(dataset):
            asked = Asked(dataset, label_names, learned=learned, word_of=word_of, classify=classify)
            data = DataSet(asked, fields=(text_field, label_field))
            self.label_names = data.label_names
            self.word_of = data.word_of
            self.digest = data.digest
            self.drawn = data.drawn
            fill = self._add_instruction_finetuning
            self.prompt = Prompt(template, data.label_names, block_size, classify, is_answered, max_new_tokens, fill)
            self._load(data, wanted)
        if held_out and "train" in wanted:  # not in generate.py --split=validation, which scores the data's own
            n = max(1, round(held_out * len(self.splits["train"])))
            if n == len(self.splits["train"]):
                raise ValueError(f"held_out={held_out}: of {n} training examples none is left; type a smaller share")
            held, self.splits["train"] = self.splits["train"].divide(n, seed)
            if "validation" in wanted:
                self.splits["validation"] = held
                self.prefixes["validation"] = self.prefixes["train"]
        if "train" in wanted and 0 < train_examples < len(self.splits["train"]):
            self.splits["train"], _ = self.splits["train"].divide(train_examples, seed)
        self.class_weights = None
        if classify and balance_classes and "train" in wanted:
            # A class with half as many examples weighs twice as much; the mean over examples is 1.
            counts = np.bincount(self.splits["train"].labels, minlength=len(self.label_names))
            weights = counts.sum() / (len(counts) * np.maximum(1, counts))
            self.class_weights = torch.tensor(weights, dtype=torch.float32)  # (n_classes,)

    # task
    def _add_instruction_finetuning(self, rec: dict) -> dict:
        """Adds rec["instr_tuned_text"]: the template, filled with the record's text and its label's word."""
        before, after = self.template.removesuffix("{label}").split("{text}")
        word = self.label_names[rec["label"]]
        rec["instr_tuned_text"] = before + rec["text"] + after + word
        return rec

    # --- tokens -> batch

    # task
    def _inputs_and_targets(self, ex: Example) -> tuple[list[int], list[int]]:
        """What the model reads of an example, and what it should find at each place: two lists of one length."""
        if self.classify:  # the last token alone has seen the whole text
            return ex.tokens, [IGNORE] * (len(ex.tokens) - 1) + [ex.label]
        # Each place predicts the next token. The prompt's tokens are given, not answered: only the label and
        # end-of-text are targets, at 2 places of 10 in the review above. The first of these places reads the prompt's
        # last token.
        n_given = 1 if self.loss_on == "all" else ex.n_prompt  # the first n_given tokens are not targets
        return ex.tokens[:-1], [IGNORE] * (n_given - 1) + ex.tokens[n_given:]

    def batch(self, split: str, indices) -> Batch:
        """The examples with these indices as one Batch. Short rows are filled up with end-of-text on the right, where
        it needs no mask: no token looks to its right, and it is not scored."""
        examples = [self.splits[split][i] for i in indices]
        # All prompts begin alike, the one above with "Review:". What they share goes through the model once a batch,
        # as `prefix`, and the rows hold the rest. configurator.py's default template begins with "Classify the
        # sentiment of the following movie review as positive or negative.\n\nReview:". Those 18 tokens are a third of
        # each row.
        prefix = self.prefixes[split] if len(examples) > 1 else []  # with one row there is nothing to save
        P = len(prefix)
        inputs, targets = [], []
        for ex in examples:
            row, target = self._inputs_and_targets(ex)
            inputs.append(row[P:])
            targets.append(target[P:])
        return Batch(
            prefix=torch.tensor([prefix], dtype=torch.long),  # (1, P)
            idx=pad(inputs, end_of_text()),  # (B, T)
            targets=pad(targets, IGNORE),  # (B, T)
            class_weights=self.class_weights,
        )  # Batch finds the places of the scored targets by itself

    # --- batches -> an epoch

    def order(self, split: str, size: int, epoch: int | None = None) -> list[np.ndarray]:
        """The indices of each batch, `size` examples of like length (one batch, with the rest, may be smaller).
        With an epoch they are shuffled by seed and epoch alone, whatever the number of processes; without, they run
        from short to long."""
        lengths = self.splits[split].lengths
        if epoch is None:
            return cut(np.argsort(lengths, kind="stable"), size)
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        # Sorting all examples would put the same ones together in every epoch. So shuffled pools of 50 batches are
        # sorted, each by itself, and then the batches are shuffled. Padding in rt_reviews' batches of 32: 2 % of the
        # places this way, 43 % in batches drawn at random.
        for pool in cut(rng.permutation(len(lengths)), 50 * size):
            by_length = pool[np.argsort(lengths[pool], kind="stable")]
            batches += cut(by_length, size)
        return [batches[i] for i in rng.permutation(len(batches))]

    def n_batches(self, split: str, size: int) -> int:
        return math.ceil(len(self.splits[split]) / size)

    def n_scored(self, split: str, indices) -> float:
        """How many targets these examples have; with class weights, the sum of the targets' weights. For an exact
        mean over several batches, weigh each batch's mean by this number."""
        examples = self.splits[split]
        indices = np.asarray(indices)
        if self.class_weights is not None:
            return self.class_weights[torch.from_numpy(examples.labels[indices])].sum().item()
        if self.classify:
            return len(indices)
        n_given = 1 if self.loss_on == "all" else examples.n_prompt[indices]
        return int((examples.lengths[indices] - n_given).sum())

    # --- records -> examples, once, into files

    def _load(self, data: DataSet, wanted: Collection[str]):
        """Sets splits and prefixes. The examples come from the cache if it has them."""
        prompt = self.prompt
        # Everything that determines the tokens. Samples show an edited template or method, which may cut texts too.
        every_kind = ' \n<br /> "Who\u2019s", 2,000 U.S. FILMS...;\thttp://a.b/c  (caf\u00e9) \U0001f600!? '
        texts = ("A joy.", "", 400 * every_kind)
        sample = [prompt.fill(text, label) for text in texts for label in range(len(self.label_names))]
        key = [self.template, self.label_names, self.loss_on, prompt.room, self.classify, sample]
        # Where every token is scored, the prefix is scored in each row, so it stays there. A classifier's input has
        # no template, so no prefix.
        shares_prefix = self.loss_on == "label" and not self.classify
        self.splits, metas = data.load_examples(wanted, self.seed, prompt, key, shares_prefix)
        self.prefixes = {split: meta["prefix"] for split, meta in metas.items()}
        n_cut = sum(meta["n_cut"] for meta in metas.values())
        if n_cut:
            print(f"note: {n_cut} texts were cut to fit the context of {prompt.block_size} tokens")


def cut(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]


# --- from a config ---------------------------------------------------------------------------------


def make_loader(config, block_size: int, wanted: Collection[str] = ("train", "validation"), **options):
    """The CustomDataLoader of a config, for labels as text or as classes, with the wanted splits. options: others of
    its arguments. Raises ValueError or OSError for data that cannot be used."""
    settings = {key: getattr(config, key) for key in READ_FROM_CONFIG}
    if config.facts:  # what the run in out_dir has found out
        settings |= {"learned": config.facts.label_names, "word_of": config.facts.word_of}
    if config.facts and config.facts.data:  # the run's own data: the seed with which it drew their splits
        settings["seed"] = config.facts.seed
    return CustomDataLoader(
        template=read_template(config),
        block_size=block_size,
        wanted=wanted,
        classify=config.task == "classify",
        **settings,
        **options,
    )


READ_FROM_CONFIG = ("dataset", "batch_size", "text_field", "label_field", "label_names", "loss_on", "seed")
READ_FROM_CONFIG += ("balance_classes", "train_examples", "held_out")


def read_template(config):
    return config.template.replace("\\n", "\n")  # a shell has no easy way to type a line break
