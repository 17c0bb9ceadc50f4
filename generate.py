"""Scores a model by the labels it writes, labels new texts, or writes text.

    python generate.py --init_from=gpt2-mini                      the untuned model's accuracy
    python generate.py --init_from=resume --out_dir=out           the tuned one's, with the run's own config
    python generate.py --init_from=resume --out_dir=out --predict=new.csv
    python generate.py --init_from=resume --out_dir=out --start="The film was"

Scoring writes accuracy.json and predictions.jsonl, --predict=new.csv writes new-predicted.csv: into out_dir, or into
out_dir/untuned for a model that was not tuned.
"""

import os
import sys
import time

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import torch

from configurator import Config, configure, make_config
from dataloader import CustomDataLoader, Prompt, make_loader, read_template
from plumbing.adapters.layers import lora_arguments
from plumbing.adapters.peft_format import load_adapter
from plumbing.data.labels import find_label, refuse_unlearned, split_names
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.gpt2.base import check_same_weights, check_vocabulary
from plumbing.gpt2.files import context_size, find_model, read_model_config
from plumbing.program.errors import one_line_errors
from plumbing.program.files import make_folder
from plumbing.program.terminal import forgiving_output
from plumbing.running.checkpoint import check_same_data
from plumbing.running.machine import keep_memory, pick_device, pick_dtype
from plumbing.scoring.accuracy import SCORED, print_score, tabulate, write_score
from plumbing.scoring.answers import PART, decode, in_parts, read_batches, score_labels, share_classes
from plumbing.scoring.model_card import write_card
from plumbing.scoring.new_texts import predict_file

with one_line_errors(ImportError):  # a lora.py of your own may need a package
    from model import GPT, LoRALinear


class ModelSampler:
    r"""A model that writes: a run's, with its best weights, or a base without tuning.

        sampler = ModelSampler("out")                         # the run in the folder out
        sampler.get_accuracy()                                # 0.8027; the whole table is in sampler.result
        sampler.predict(["A joy."])                           # [{"predicted": "positive", "share": 0.98, ...}]
        sampler.generate("The film was")                      # " a masterpiece."
        ModelSampler(init_from="gpt2-medium").get_accuracy()  # without tuning

    out_dir: the run's folder. init_from: "resume" for that run, or a base. device to top_k, and settings: other keys
    of Config (dataset, split ...); anything not given, or None, is taken from the run. config: one that `configure`
    made, in place of all of these.

    Data and model are loaded when they are first needed. Raises ValueError (a UserError for a wrong setting) or
    OSError, naming what cannot be used.
    """

    def __init__(
        self,
        out_dir: str = "out",
        init_from: str = "resume",
        device: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        *,
        config: Config | None = None,
        **settings,
    ):
        named = {"device": device, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        settings |= {key: value for key, value in named.items() if value is not None}
        self.config = config or make_config(out_dir=out_dir, init_from=init_from, **settings)
        self.device = pick_device(self.config.device)
        self.block_size = context_size(model_of(self.config))
        if not self.config.facts:
            check_vocabulary(self.config.init_from)
        self.loader: CustomDataLoader | None = None  # the split that is scored
        self.prompt: Prompt | None = None  # its prompts, or those of new texts
        self.model: GPT | None = None
        self.n_cut = 0  # new texts that were too long and were cut

    # task
    def get_accuracy(self) -> float:
        """The share of the split's prompts that the model answers with the right label: 0 to 1.

        An answer without a label is garbage and counts as wrong. After the call `result` is the whole table (n,
        accuracy, interval, garbage, recall, confusion, label_names), `generated` the texts, `found` the labels in
        them.
        """
        self.load_data()
        self.load_model()
        labels = self.loader.splits[self.config.split].labels.tolist()  # [1, 0, ...]
        names = self.loader.label_names  # ["negative", "positive"]
        self.generated = self.answer_split()  # [" positive", " a film", ...]
        # The label that comes first, as a whole word, in upper or lower case, within about 40 characters; or None.
        self.found = [find_label(text, names) for text in self.generated]  # [1, None, ...]
        self.result = tabulate(self.found, labels, names)  # accuracy = sum(found == label) / n, and more
        return self.result["accuracy"]

    def predict(self, texts: list[str | None]) -> list[dict]:
        """The model's answer to each text, which is put into the run's template. A dict of

        text       as given; where it is None, so is all that follows
        predicted  the label in what the model wrote, or None
        generated  what the model wrote
        share      P(that label and end-of-text | prompt), divided by the sum over all labels: 0 to 1

        A classifier writes the name of the likeliest class.
        """
        if isinstance(texts, str):
            raise ValueError('predict takes a list of texts: predict(["A joy."])')
        self.load_prompt()
        self.load_model()
        torch.manual_seed(self.config.seed)
        names = self.prompt.label_names
        answers = [{"text": text, "predicted": None, "generated": None, "share": None} for text in texts]
        asked = [answer for answer in answers if answer["text"] is not None]  # the same dicts: filled in below
        prompts = self.make_prompts([answer["text"] for answer in asked])
        all_written, all_shares = self.answer(prompts, wants_shares=True)
        for answer, written, shares in zip(asked, all_written, all_shares):
            answer["generated"] = written
            label = find_label(written, names)
            if label is not None:
                answer["predicted"] = names[label]
                answer["share"] = round(shares[label], 6)
        return answers

    def generate(self, prompt: str) -> str:
        """What the model writes after the prompt: up to end-of-text, or max_new_tokens of the config (None: 200)."""
        if self.config.task == "classify":
            raise ValueError("this model has classes in place of words: score_classes(text) gives their shares")
        self.load_model()
        tokens = gpt2_encoding().encode_ordinary(prompt) or [end_of_text()]
        idx = torch.tensor([tokens], device=self.device)  # (1, T)
        out = self.model.generate(idx, self.config.max_new_tokens or 200, **self.sampling())  # (1, T + n)
        return decode(out[0, len(tokens) :].tolist())

    def score_classes(self, text: str) -> dict[str, float]:
        """{label: share} that a classifier gives to a text; the shares sum to 1."""
        if self.config.task != "classify":
            raise ValueError("this model writes its labels: predict([text]) gives the share of the one it writes")
        self.load_prompt()
        self.load_model()
        _, all_shares = self.answer(self.make_prompts([text]))
        return dict(zip(self.prompt.label_names, all_shares[0]))

    # --- prompts -> answers

    def answer_split(self) -> list[str]:
        """What the model writes after each prompt of the split that is scored, in the split's order."""
        torch.manual_seed(self.config.seed)
        examples = self.loader.splits[self.config.split]
        answers = []
        for part in in_parts(examples, PART * self.config.batch_size):
            answers += self.answer([ex.tokens[: ex.n_prompt] for ex in part])[0]
        return answers

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], wants_shares: bool = False) -> tuple[list[str], list[list[float]]]:
        """What the model writes after each of the prompts (token ids), and each label's share; a classifier writes
        the likeliest class. Without wants_shares only a classifier gives the shares."""
        if self.prompt.classify:
            shares = share_classes(self.model, prompts, self.config.batch_size)
            return [self.prompt.label_names[row.index(max(row))] for row in shares], shares
        texts = [None] * len(prompts)
        shares = [None] * len(prompts)
        # Prompts of like length together. All tokens but the last of each are in past, a KVCache. The last (B, 1) are
        # what score_labels and generate read first; both leave past as it is.
        for indices, last, past in read_batches(self.model, prompts, self.config.batch_size):
            if wants_shares:
                for i, row in zip(indices, score_labels(self.model, last, past, self.prompt.answers()).tolist()):
                    shares[i] = row
            out = self.model.generate(last, self.prompt.answer_tokens, past=past, **self.sampling())  # (B, 1 + n)
            for i, tokens in zip(indices, out[:, 1:].tolist()):
                texts[i] = decode(tokens)
        return texts, shares

    def make_prompts(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text's prompt (a classifier's: of the text), cut to fit as the data set's are."""
        prompts = []
        for text in texts:
            text = text.encode("utf-8", "replace").decode()  # a lone surrogate, half of an emoji, becomes "?"
            ex, was_cut = self.prompt.make_example(text, 0)  # with any label: the prompt is the same
            self.n_cut += was_cut
            prompts.append(ex.tokens[: ex.n_prompt])
        return prompts

    def sampling(self) -> dict:
        """How tokens are picked: arguments of GPT.generate."""
        return {"temperature": self.config.temperature, "top_k": self.config.top_k, "stop": end_of_text()}

    # --- what these need, loaded once

    def load_data(self) -> None:
        """Sets `loader`, with the split that is scored, and `prompt`. Long texts are cut, so that an answer fits the
        context."""
        if self.loader is None:
            config = self.config
            options = {"is_answered": True, "max_new_tokens": config.max_new_tokens}
            loader = make_loader(config, self.block_size, wanted=(config.split,), **options)
            check_same_data(config, loader, scored=config.split)
            self.loader = loader
            self.prompt = loader.prompt

    def load_prompt(self) -> None:
        """Sets `prompt`, for new texts. No data set is read, if the labels are known. Raises ValueError for an
        untrained classification head, which may only be scored, as a baseline."""
        config = self.config
        classify = config.task == "classify"
        if classify and not config.facts and not read_model_config(find_model(config.init_from)[0]).get("n_classes"):
            raise ValueError(f"init_from={config.init_from}: a language model has no classes; train.py adds them")
        if self.prompt is None:
            options = {"is_answered": True, "max_new_tokens": config.max_new_tokens}
            names = self.find_label_names()
            self.prompt = Prompt(read_template(config), names, self.block_size, classify, **options)

    def find_label_names(self) -> list[str]:
        """Those that the run has learned, in its order, those that were typed, or the data's own."""
        config = self.config
        if config.facts and config.facts.label_names:
            refuse_unlearned(config.label_names, config.facts.label_names)
            return config.facts.label_names
        if config.label_names:
            return split_names(config.label_names)
        self.load_data()
        return self.loader.label_names

    def load_model(self) -> None:
        """Sets `model`. Call it after load_data: a mistake in the data then shows before a large model is loaded."""
        if self.model is None:
            config = self.config
            dtype = pick_dtype(self.device, config.dtype, LoRALinear)
            n_classes = len(self.find_label_names()) if config.task == "classify" else 0
            torch.manual_seed(config.seed)  # an untuned classifier's head is drawn as train.py draws it
            self.model = open_model(config, self.device, dtype, n_classes)
            torch.manual_seed(config.seed)


# --- the model -------------------------------------------------------------------------------------


def open_model(config: Config, device: str, dtype: torch.dtype, n_classes: int = 0) -> GPT:
    """The model of a config, ready to generate: a base, or the best weights of the run in out_dir."""
    has_adapter = config.facts is not None and config.rank > 0
    if config.facts:
        fingerprint = config.facts.base if has_adapter else config.facts.model
        check_same_weights(model_of(config), fingerprint, config.out_dir)
    lora = lora_arguments(config) if has_adapter else {}
    model = GPT.from_pretrained(model_of(config), dtype=dtype, n_classes=n_classes, **lora)
    if has_adapter:
        load_adapter(model, config.out_dir)
    model.requires_grad_(False)
    return model.to(device).set_dtype(dtype).eval()  # eval merges W0 + (alpha / r) B A: it costs what the base costs


def model_of(config):
    """Where a config's full weights are stored: the base's, or those of a run that trained them all."""
    return config.out_dir if config.facts and config.rank == 0 else config.init_from


# --- the command line ------------------------------------------------------------------------------


def main(config: Config) -> None:
    keep_memory()
    if config.predict is not None:  # the texts of a file, or of standard input
        with one_line_errors():
            if config.start is not None:
                raise ValueError("--predict and --start cannot be combined: type one of them")
            predict_file(config, score_folder(config), lambda: ModelSampler(config=config))
    elif config.start is not None:
        write_on(config)
    else:
        score_split(config)


def score_split(config: Config) -> None:
    """Scores; writes accuracy.json, predictions.jsonl and the run's README.md; then prints."""
    folder = score_folder(config)
    with one_line_errors():
        sampler = ModelSampler(config=config)
        sampler.load_data()
        sampler.load_model()
        make_folder(folder)
    began = time.perf_counter()
    sampler.get_accuracy()
    seconds = time.perf_counter() - began
    result = sampler.result | {key: getattr(config, key) for key in SCORED}
    result |= {"tuned": config.facts is not None, "seconds": round(seconds, 2)}
    answers = (sampler.loader.splits[config.split], sampler.generated, sampler.found, sampler.loader.label_names)
    write_score(folder, result, *answers)
    if config.facts:
        write_card(make_config(init_from="resume", out_dir=config.out_dir), sampler.loader, result)  # as trained
    print_score(folder, result, *answers)


def write_on(config: Config) -> None:
    """Prints what the model writes after --start or, for a classifier, the classes' shares."""
    start = config.start.replace("\\n", "\n")  # a shell has no easy way to type a line break
    with one_line_errors():
        sampler = ModelSampler(config=config)
        if config.task != "classify":
            print(start + sampler.generate(start))
            return
        shares = sampler.score_classes(start)
    for name in sorted(shares, key=shares.get, reverse=True):
        print(f"{name}: {100 * shares[name]:.1f} %")


def score_folder(config):
    return config.out_dir if config.facts else os.path.join(config.out_dir, "untuned")


if __name__ == "__main__":
    with forgiving_output(), one_line_errors(OSError):  # such as a full disk
        main(configure(sys.argv[1:], trains=False))
