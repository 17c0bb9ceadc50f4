"""Scores a model by the labels it writes, or writes text.

    python generate.py --init_from=gpt2-mini                      the untuned model's accuracy
    python generate.py --init_from=resume --out_dir=out           the tuned one's, with the run's own config
    python generate.py --init_from=resume --out_dir=out --start="Review: A joy.\\nSentiment:"

Scoring writes accuracy.json and predictions.jsonl into out_dir (for an untuned model, into out_dir/untuned).
"""

import contextlib
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from configurator import MODEL_KEYS, Config, configure, make_config
from dataloader import CustomDataLoader, end_of_text, gpt2_encoding, instruction_loader
from model import GPT, KVCache, LoRALinear
from plumbing.adapter import layer_alpha
from plumbing.batch import pad
from plumbing.checkpoint import check_same_data
from plumbing.errors import one_line_errors
from plumbing.files import whole_file, write_json
from plumbing.gpt2_files import context_size, find_checkpoint, read_config
from plumbing.labels import find_label
from plumbing.machine import keep_memory, pick_device, pick_dtype
from plumbing.peft_format import ADAPTER_WEIGHTS, load_adapter
from plumbing.scores import print_errors, print_result, tabulate


class ModelSampler:
    r"""A model that writes: a run's, with its best weights, or a base without tuning.

        sampler = ModelSampler("out")                         # the run in the folder out
        sampler.get_accuracy()                                # 0.8027; the whole table is in sampler.result
        sampler.generate("Review: A joy.\nSentiment:")         # " positive"
        ModelSampler(init_from="gpt2-medium").get_accuracy()  # without tuning

    out_dir: the run's folder. init_from: "resume" for that run, or a base. settings: other keys of Config (device,
    max_new_tokens, temperature, top_k, dataset, split ...); what is not named is as in the run. config: one that
    `configure` made, in place of all of these.

    Raises ValueError (a UserError for a wrong setting) or OSError, naming what cannot be used.
    """

    def __init__(self, out_dir: str = "out", init_from: str = "resume", config: Config | None = None, **settings):
        self.config = config or make_config(out_dir=out_dir, init_from=init_from, **settings)
        self.device = pick_device(self.config.device)
        self.block_size = context_size(checkpoint_of(self.config))
        self.loader = None  # until `load_data`: writing needs no data set
        n_classes = 0
        if self.config.task == "classify":
            check_classes(self.config)
            self.load_data()
            n_classes = len(self.loader.label_names)
        # Our layers have A and B in float32 next to a bfloat16 weight. A student's lora.py may know one dtype only.
        mixed = getattr(LoRALinear, "mixes_dtypes", False)
        dtype = pick_dtype(self.device, self.config.dtype, mixed=mixed)
        self.model = load_model(self.config, self.device, dtype, n_classes)
        torch.manual_seed(self.config.seed)

    def get_accuracy(self) -> float:  # task
        """The share of the split's prompts that the model answers with the right label: 0 to 1.

        An answer without a label is garbage and counts as wrong. `result` is then the whole table (n, accuracy,
        interval, garbage, recall, confusion, label_names), `generated` the texts, `found` the labels in them.
        """
        self.load_data()
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

    def generate(self, prompt: str) -> str:
        """What the model writes after the prompt: up to end-of-text, or max_new_tokens of the config (None: 200)."""
        if self.config.task == "classify":
            raise ValueError(
                "this model has a classifier in place of its words: score_classes(text) gives the shares"
            )
        idx = self.encode(prompt)
        new = self.config.max_new_tokens or 200
        options = {"temperature": self.config.temperature, "top_k": self.config.top_k}
        out = self.model.generate(idx, new, stop=end_of_text(), **options)  # (1, T + new)
        return decode_answer(out[0, idx.size(1) :].tolist())

    @torch.no_grad()
    def score_classes(self, text: str) -> dict[str, float]:
        """{label: share} that a classifier gives to a text; the shares sum to 1."""
        logits, _ = self.model(self.encode(text)[:, : self.block_size])  # (1, 1, n_classes)
        return dict(zip(self.loader.label_names, logits.flatten().softmax(-1).tolist()))

    def encode(self, text):  # -> (1, T)
        tokens = gpt2_encoding().encode_ordinary(text) or [end_of_text()]
        return torch.tensor([tokens], device=self.device)

    def load_data(self) -> None:
        """Sets `loader`, with the split that is scored. Long texts are cut, so that an answer fits the context."""
        config = self.config
        if self.loader is not None:
            return
        if config.task == "pretrain":
            raise ValueError("this run was pre-trained on plain text and has no labels: type --start=TEXT")
        if config.task == "classify":
            self.loader = load_split(config, self.block_size)
            return
        self.answer_tokens = config.max_new_tokens or 5
        if self.answer_tokens > self.block_size // 2:
            raise ValueError(
                f"max_new_tokens={self.answer_tokens}: type at most {self.block_size // 2}, half the context"
            )
        self.loader = load_split(config, self.block_size - self.answer_tokens)
        longest = max(len(gpt2_encoding().encode_ordinary(" " + name)) for name in self.loader.label_names)
        if config.max_new_tokens is None and longest > self.answer_tokens:
            self.answer_tokens = longest
            self.loader = load_split(config, self.block_size - longest)


def load_split(config, block_size) -> CustomDataLoader:
    loader = instruction_loader(config, block_size, wanted=(config.split,))
    check_same_data(config, loader, scored=config.split)
    return loader


# --- answers to a whole split ----------------------------------------------------------------------


@torch.no_grad()
def generate_labels(
    config: Config, model: GPT, loader: CustomDataLoader, split: str, max_new_tokens: int
) -> list[str]:
    """What the model writes after each prompt of a split, in the split's order."""
    device = next(model.parameters()).device
    examples = loader.splits[split]
    prefix = loader.prefixes[split]
    past = None
    if prefix:  # the tokens that every prompt begins with go through the model once
        past = KVCache()
        model.hidden(torch.tensor([prefix], device=device), past)
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
            )  # (B, T + new)
            for i, tokens in zip(indices, out[:, idx.size(1) :].tolist()):
                texts[i] = decode_answer(tokens)
            bar.update(len(indices))
    return texts


def decode_answer(tokens):
    """The text before end-of-text."""
    if end_of_text() in tokens:
        tokens = tokens[: tokens.index(end_of_text())]
    return gpt2_encoding().decode(tokens)


@torch.no_grad()
def find_classes(config: Config, model: GPT, loader: CustomDataLoader, split: str) -> list[int]:
    """The class that a classifier finds likeliest for each text of a split, in the split's order."""
    device = next(model.parameters()).device
    found = [None] * len(loader.splits[split])
    for indices in tqdm(loader.order(split, config.batch_size), disable=None, unit="batch"):
        batch = loader.batch(split, indices).to(device)
        # The targets only say where each text ends: the logits do not depend on their values.
        logits, _ = model(batch.idx, batch.targets)  # (B, n_classes)
        for i, label in zip(indices, logits.argmax(-1).tolist()):
            found[i] = label
    return found


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

SCORED = ("init_from", "dataset", "split", "template")  # of the config: what makes two scores comparable


def main(config: Config) -> None:
    keep_memory()
    with one_line_errors():
        sampler = ModelSampler(config=config)
        if config.start is None:
            sampler.load_data()
            os.makedirs(score_folder(config), exist_ok=True)
    if config.start is None:
        print_score(sampler)
        return
    start = config.start.replace("\\n", "\n")  # a shell has no easy way to type a line break
    if config.task == "classify":
        shares = sampler.score_classes(start)
        for name in sorted(shares, key=shares.get, reverse=True):
            print(f"{name}: {100 * shares[name]:.1f} %")
    else:
        print(start + sampler.generate(start))


def print_score(sampler: ModelSampler) -> None:
    """Scores, prints the result and writes accuracy.json and predictions.jsonl."""
    config = sampler.config
    began = time.time()
    sampler.get_accuracy()
    seconds = time.time() - began
    examples = sampler.loader.splits[config.split]
    names = sampler.loader.label_names
    print_result(sampler.result)
    print_errors(examples, sampler.generated, sampler.found, names)
    folder = score_folder(config)
    with whole_file(os.path.join(folder, "predictions.jsonl")) as f:
        for example, text, i in zip(examples, sampler.generated, sampler.found):
            row = {"text": example.text, "label": names[example.label], "generated": text}
            row["predicted"] = None if i is None else names[i]
            f.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    result = sampler.result | {key: getattr(config, key) for key in SCORED}
    result |= {"tuned": config.resume, "seconds": round(seconds, 2)}
    write_json(os.path.join(folder, "accuracy.json"), result)
    print(f"\n{len(examples) / seconds:.1f} examples/s; written: {folder}/accuracy.json, {folder}/predictions.jsonl")
    if config.resume:
        compare(config, result)


def score_folder(config):
    return config.out_dir if config.resume else os.path.join(config.out_dir, "untuned")


def compare(config, result):
    """Prints the accuracy next to the untuned model's, if that was scored here, and where the weights lie."""
    path = os.path.join(config.out_dir, "untuned", "accuracy.json")
    with contextlib.suppress(OSError, ValueError), open(path) as f:
        before = json.load(f)
        if all(before.get(key) == result[key] for key in SCORED):
            print(f"untuned {100 * before['accuracy']:.2f} %, tuned {100 * result['accuracy']:.2f} %")
    for name in (ADAPTER_WEIGHTS, "model.safetensors", "loss.png"):
        path = os.path.join(config.out_dir, name)
        if os.path.exists(path):
            print(f"{path} ({os.path.getsize(path) / 1e6:.2f} MB)")


if __name__ == "__main__":
    with one_line_errors(OSError):  # such as a full disk
        main(configure(sys.argv[1:], fixed=MODEL_KEYS))
