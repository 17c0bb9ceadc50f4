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
from tqdm import tqdm

from configurator import MODEL_KEYS, Config, configure, load_run, make_config
from dataloader import CustomDataLoader, end_of_text, gpt2_encoding, instruction_loader, prompt_loader
from model import GPT, LoRALinear
from plumbing.adapters.layers import layer_alpha
from plumbing.adapters.peft_format import load_adapter
from plumbing.data.labels import find_label, split_names
from plumbing.gpt2.batch import pad
from plumbing.gpt2.files import context_size, find_checkpoint, read_config
from plumbing.gpt2.kv_cache import KVCache
from plumbing.program.errors import one_line_errors
from plumbing.program.files import write_json
from plumbing.program.terminal import forgiving_output
from plumbing.running.checkpoint import check_same_data
from plumbing.running.machine import keep_memory, pick_device, pick_dtype
from plumbing.scoring.accuracy import SCORED, print_errors, print_improvement, print_result, tabulate, write_answers
from plumbing.scoring.answers import answer_prompts, classify_prompts, decode_answer, find_classes
from plumbing.scoring.model_card import write_card
from plumbing.scoring.new_texts import predict_file


class ModelSampler:
    r"""A model that writes: a run's, with its best weights, or a base without tuning.

        sampler = ModelSampler("out")                         # the run in the folder out
        sampler.get_accuracy()                                # 0.8027; the whole table is in sampler.result
        sampler.predict(["A joy."])                           # [{"predicted": "positive", "share": 0.98, ...}]
        sampler.generate("The film was")                      # " a masterpiece."
        ModelSampler(init_from="gpt2-medium").get_accuracy()  # without tuning

    out_dir: the run's folder. init_from: "resume" for that run, or a base. settings: other keys of Config (device,
    max_new_tokens, temperature, top_k, dataset, split ...); what is not named is as in the run. config: one that
    `configure` made, in place of all of these.

    Data and model are loaded when they are first needed. Raises ValueError (a UserError for a wrong setting) or
    OSError, naming what cannot be used.
    """

    def __init__(self, out_dir: str = "out", init_from: str = "resume", config: Config | None = None, **settings):
        self.config = config or make_config(out_dir=out_dir, init_from=init_from, **settings)
        self.device = pick_device(self.config.device)
        self.block_size = context_size(checkpoint_of(self.config))
        self.model = None
        self.loader = None  # the data set: for scoring, or to learn its labels' names
        self.prompts = None  # makes prompts of new texts
        self.n_cut = 0  # new texts that were too long and were cut
        if self.config.task == "classify":
            check_classes(self.config)

    def get_accuracy(self) -> float:  # task
        """The share of the split's prompts that the model answers with the right label: 0 to 1.

        An answer without a label is garbage and counts as wrong. After the call `result` is the whole table (n,
        accuracy, interval, garbage, recall, confusion, label_names), `generated` the texts, `found` the labels in
        them.
        """
        self.load_data()
        self.load_model()
        config = self.config
        names = self.loader.label_names  # ["negative", "positive"]
        labels = self.loader.splits[config.split].labels.tolist()  # [1, 0, ...]
        torch.manual_seed(config.seed)
        if self.loader.classify:
            self.found = find_classes(config, self.model, self.loader, config.split)
            self.generated = [names[i] for i in self.found]
        else:
            self.generated = generate_labels(config, self.model, self.loader, config.split, self.answer_tokens)
            # [" positive", " a film", ...] -> [1, None, ...]
            self.found = [find_label(text, names) for text in self.generated]
        self.result = tabulate(self.found, labels, names)  # accuracy = sum(found == label) / n, and more
        return self.result["accuracy"]

    def predict(self, texts: list[str | None]) -> list[dict]:
        """The model's answer to each text, which is put into the run's template. A dict of

        text       as given; where it is None, so is all else
        predicted  the label in what the model wrote, or None
        generated  what the model wrote
        share      P(that label and end-of-text | prompt), divided by the sum over all labels: 0 to 1

        A classifier writes the name of the likeliest class.
        """
        if isinstance(texts, str):
            raise ValueError('predict takes a list of texts: predict(["A joy."])')
        self.load_prompts()
        self.load_model()
        torch.manual_seed(self.config.seed)
        names = self.prompts.label_names
        answers = [{"text": text, "predicted": None, "generated": None, "share": None} for text in texts]
        asked = [answer for answer in answers if answer["text"] is not None]  # the same dicts: filled in below
        prompts, n_cut = self.prompts.make_prompts([answer["text"] for answer in asked])
        self.n_cut += n_cut
        if self.prompts.classify:
            shares = classify_prompts(self.config, self.model, prompts)
            generated = [names[row.index(max(row))] for row in shares]
        else:
            generated, shares = answer_prompts(self.config, self.model, prompts, self.answer_tokens, self.labels)
        for answer, text, row in zip(asked, generated, shares):
            answer["generated"] = text
            label = find_label(text, names)
            if label is not None:
                answer["predicted"] = names[label]
                answer["share"] = round(row[label], 6)
        return answers

    def generate(self, prompt: str) -> str:
        """What the model writes after the prompt: up to end-of-text, or max_new_tokens of the config (None: 200)."""
        if self.config.task == "classify":
            raise ValueError(
                "this model has a classifier in place of its words: score_classes(text) gives the shares"
            )
        self.load_model()
        tokens = gpt2_encoding().encode_ordinary(prompt) or [end_of_text()]
        idx = torch.tensor([tokens], device=self.device)  # (1, T)
        new = self.config.max_new_tokens or 200
        options = {"temperature": self.config.temperature, "top_k": self.config.top_k}
        out = self.model.generate(idx, new, stop=end_of_text(), **options)  # (1, T + n), n at most new
        return decode_answer(out[0, len(tokens) :].tolist())

    def score_classes(self, text: str) -> dict[str, float]:
        """{label: share} that a classifier gives to a text; the shares sum to 1."""
        self.load_prompts()
        self.load_model()
        prompts, _ = self.prompts.make_prompts([text])
        (shares,) = classify_prompts(self.config, self.model, prompts)  # of one text
        return dict(zip(self.prompts.label_names, shares))

    # --- what these need, loaded once

    def load_data(self) -> None:
        """Sets `loader`, with the split that is scored. Long texts are cut, so that an answer fits the context."""
        config = self.config
        if self.loader is not None:
            return
        check_labels(config)
        if config.task == "classify":
            self.loader = load_split(config, self.block_size)
            return
        # The labels' words, which say how long an answer may be, are known only when the data is loaded. Where one is
        # long, the data is loaded again, with more room for it.
        self.answer_tokens = count_answer_tokens(config, [], self.block_size)
        self.loader = load_split(config, self.block_size - self.answer_tokens)
        needed = count_answer_tokens(config, self.loader.label_names, self.block_size)
        if needed > self.answer_tokens:
            self.answer_tokens = needed
            self.loader = load_split(config, self.block_size - needed)

    def load_prompts(self) -> None:
        """Sets `prompts`, which makes prompts of new texts. No data set is read, if the labels are known."""
        config = self.config
        if self.prompts is not None:
            return
        check_labels(config)
        names = self.find_label_names()
        self.prompts = prompt_loader(config, self.block_size, names)
        if config.task != "classify":
            self.labels = self.prompts.label_tokens()  # [[" negative", end-of-text], [" positive", end-of-text]]
            self.answer_tokens = count_answer_tokens(config, names, self.block_size)
            # Again, with prompts that leave room for the longest answer.
            longest = max(self.answer_tokens, *map(len, self.labels))
            self.prompts = prompt_loader(config, self.block_size - longest, names)

    def find_label_names(self) -> list[str]:
        """Those that were typed, or those that the run has learned, or else the data's own."""
        if self.config.label_names:
            return split_names(self.config.label_names)
        if self.config.learned:
            return self.config.learned
        self.load_data()
        return self.loader.label_names

    def load_model(self) -> None:
        """Sets `model`. Call it after load_data: a mistake in the data then shows before a large model is loaded."""
        config = self.config
        if self.model is not None:
            return
        # Our layers have A and B in float32 next to a bfloat16 weight. A student's lora.py may know one dtype only.
        dtype = pick_dtype(self.device, config.dtype, mixed=getattr(LoRALinear, "mixes_dtypes", False))
        n_classes = len(self.find_label_names()) if config.task == "classify" else 0
        self.model = load_model(config, self.device, dtype, n_classes)
        torch.manual_seed(config.seed)


def check_labels(config):
    if config.task == "pretrain":
        raise ValueError("this run was pre-trained on plain text and has no labels: type --start=TEXT")


def load_split(config, block_size) -> CustomDataLoader:
    loader = instruction_loader(config, block_size, wanted=(config.split,))
    check_same_data(config, loader, scored=config.split)
    return loader


def count_answer_tokens(config, label_names, block_size) -> int:
    """How many tokens the model may write: enough for the longest label, if the config does not say."""
    longest = max((len(gpt2_encoding().encode_ordinary(" " + name)) for name in label_names), default=0)
    n = config.max_new_tokens or max(5, longest)
    if n > block_size // 2:
        raise ValueError(f"max_new_tokens={n}: type at most {block_size // 2}, half the context")
    return n


# --- answers to a whole split ----------------------------------------------------------------------


@torch.no_grad()
def generate_labels(
    config: Config, model: GPT, loader: CustomDataLoader, split: str, max_new_tokens: int
) -> list[str]:
    """What the model writes after each prompt of a split, in the split's order."""
    device = next(model.parameters()).device
    examples = loader.splits[split]
    prefix = loader.prefixes[split]
    past = KVCache()
    if prefix:  # the tokens that every prompt begins with go through the model once
        model.hidden(torch.tensor([prefix], device=device), past)  # writes their keys and values into past
    texts = [None] * len(examples)
    with tqdm(total=len(examples), disable=None, unit="example") as bar:
        for indices in loader.order(split, config.batch_size):  # prompts of like length together
            prompts = [examples[i].tokens[len(prefix) : examples[i].n_prompt] for i in indices]
            idx = pad(prompts, end_of_text())  # (B, T)
            out = model.generate(
                idx.to(device),
                max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                stop=end_of_text(),
                past=past,
                lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
            )  # (B, T + n)
            for i, tokens in zip(indices, out[:, idx.size(1) :].tolist()):
                texts[i] = decode_answer(tokens)
            bar.update(len(indices))
    return texts


# --- the model -------------------------------------------------------------------------------------


def load_model(config: Config, device: str, dtype: torch.dtype, n_classes: int = 0) -> GPT:
    """The model of a config, ready to generate: a base, or the best weights of the run in out_dir."""
    has_adapter = config.resume and config.rank > 0
    lora = {}
    if has_adapter:
        alpha = layer_alpha(config.alpha, config.rank, config.rslora)
        lora = {"lora_rank": config.rank, "lora_alpha": alpha, "lora_targets": config.lora_targets}
    model = GPT.from_pretrained(checkpoint_of(config), dtype=dtype, n_classes=n_classes, **lora)
    if has_adapter:
        load_adapter(model, config.out_dir)
    model.requires_grad_(False)
    return model.to(device).set_dtype(dtype).eval()  # eval merges W0 + (alpha / r) B A: it costs what the base costs


def checkpoint_of(config):
    """Where a config's whole weights lie: the base's, or those of a run that trained them all."""
    return config.out_dir if config.resume and config.rank == 0 else config.init_from


def check_classes(config):
    if not config.resume and not read_config(find_checkpoint(config.init_from)[0]).get("n_classes"):
        raise ValueError(f"init_from={config.init_from}: a language model has no classes; train.py adds them")


# --- the command line ------------------------------------------------------------------------------


def main(config: Config) -> None:
    keep_memory()
    if config.predict is not None:
        predict_texts(config)
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
        os.makedirs(folder, exist_ok=True)
    began = time.time()
    sampler.get_accuracy()
    seconds = time.time() - began
    examples = sampler.loader.splits[config.split]
    result = sampler.result | {key: getattr(config, key) for key in SCORED}
    result |= {"tuned": config.resume, "seconds": round(seconds, 2)}
    answers = (examples, sampler.generated, sampler.found, sampler.loader.label_names)
    write_answers(os.path.join(folder, "predictions.jsonl"), *answers)
    write_json(os.path.join(folder, "accuracy.json"), result)
    if config.resume:
        write_card(load_run(config.out_dir), sampler.loader, result)
    print_result(result)
    print_errors(*answers)
    print(f"\n{len(examples) / seconds:.1f} examples/s; written: {folder}/accuracy.json, {folder}/predictions.jsonl")
    if config.resume:
        print_improvement(folder, result)


def predict_texts(config: Config) -> None:
    """Answers the texts of a file, into a file of the same kind; or those of standard input, as lines of JSON."""
    with one_line_errors():
        if config.start is not None:
            raise ValueError("--predict and --start are two things to do: type one of them")
        predict_file(config, score_folder(config), lambda: ModelSampler(config=config))


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
    return config.out_dir if config.resume else os.path.join(config.out_dir, "untuned")


if __name__ == "__main__":
    with forgiving_output(), one_line_errors(OSError):  # such as a full disk
        main(configure(sys.argv[1:], fixed=MODEL_KEYS))
