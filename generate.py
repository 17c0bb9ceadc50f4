"""Scores a model by the labels it writes, or writes text.

    python generate.py --init_from=gpt2-mini                      the untuned model's accuracy
    python generate.py --init_from=resume --out_dir=out           the tuned one's, with the run's own config
    python generate.py --init_from=resume --out_dir=out --start="Review: A joy.\\nSentiment:"

Scoring writes accuracy.json and predictions.jsonl into out_dir (for an untuned model, into out_dir/untuned).
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from configurator import MODEL_KEYS, configure, one_line_errors
from dataloader import end_of_text, gpt2_encoding, instruction_loader
from lora import ADAPTER_WEIGHTS, load_adapter, whole_file, write_json
from model import GPT, KVCache, context_size, find_checkpoint, keep_memory, pick_device, pick_dtype, read_config

ANSWER_CHARS = 40  # a label counts within these first characters of the generated text
SCORED = ("init_from", "dataset", "split", "template")  # of the config: what makes two scores comparable


def find_label(text, label_names):
    """The index of the label that comes first in the text's first characters, as a word of its own in upper or
    lower case; None if there is none."""
    words = sorted(label_names, key=len, reverse=True)  # "very good" before "very"
    pattern = rf"(?<!\w)(?:{'|'.join(f'({re.escape(word)})' for word in words)})(?!\w)"
    for match in re.finditer(pattern, text, re.IGNORECASE):
        if match.end() <= ANSWER_CHARS:
            return label_names.index(words[match.lastindex - 1])
    return None


def wilson(p, n):
    """The 95 % interval [low, high] of a share p seen in n examples (Wilson 1927)."""
    z = 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def get_accuracy(generated, labels, label_names):
    """Accuracy of generated texts (list of str) against labels (list of int); see `tabulate`."""
    return tabulate([find_label(text, label_names) for text in generated], labels, label_names)


def tabulate(found, labels, label_names):
    """Accuracy of the labels found (list of int, or None for a text without any) against the true ones.

    None is wrong and counted as garbage. Returns n, accuracy and garbage as shares, the accuracy's 95 % interval,
    each label's recall (None if it does not occur) and the confusion table: rows the true labels,
    columns those found and then garbage.
    """
    if len(found) != len(labels) or not labels:
        raise ValueError(f"{len(found)} texts for {len(labels)} labels")
    table = [[0] * (len(label_names) + 1) for _ in label_names]
    for i, label in zip(found, labels):
        table[label][len(label_names) if i is None else i] += 1
    n = len(labels)
    p = sum(table[i][i] for i in range(len(label_names))) / n
    return {
        "n": n,
        "accuracy": p,
        "interval": wilson(p, n),
        "garbage": sum(row[-1] for row in table) / n,
        "recall": [row[i] / sum(row) if sum(row) else None for i, row in enumerate(table)],
        "confusion": table,
        "label_names": list(label_names),
    }


def checkpoint_of(config):
    """Where a config's whole weights lie: the base's, or those of a run that trained them all."""
    return config.out_dir if config.resume and config.rank == 0 else config.init_from


def load_model(config, device, dtype, n_classes=0):
    """The model of a config, ready to generate: a base, or the best weights of the run in out_dir."""
    model = GPT.from_pretrained(checkpoint_of(config), dtype=dtype, n_classes=n_classes)
    if config.resume and config.rank:
        load_adapter(model, config.out_dir)
    model.requires_grad_(False)
    return model.to(device).set_dtype(dtype).eval()


def generate_labels(config, model, loader, split, max_new_tokens):
    """What the model writes after each prompt of a split, in the split's order: list of str."""
    device, encoding = next(model.parameters()).device, gpt2_encoding()
    examples, prefix = loader.splits[split], loader.prefixes[split]
    past = None
    if prefix:  # the same for every prompt: once is enough
        past = KVCache()
        with torch.no_grad():
            model.hidden(torch.tensor([prefix], device=device), past)
    texts = [None] * len(examples)
    with tqdm(total=len(examples), disable=None, unit="example") as bar:
        for indices in loader.order(split, config.batch_size):
            prompts = [examples[i].tokens[len(prefix) : examples[i].n_prompt] for i in indices]
            lengths = torch.tensor([len(p) for p in prompts])
            idx = torch.full((len(prompts), int(lengths.max())), end_of_text())
            for row, prompt in zip(idx, prompts):
                row[: len(prompt)] = torch.tensor(prompt)
            out = model.generate(
                idx.to(device),
                max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                stop=end_of_text(),
                past=past,
                lengths=lengths.to(device),
            )
            for i, row in zip(indices, out[:, idx.size(1) :].tolist()):
                written = row[: row.index(end_of_text())] if end_of_text() in row else row
                texts[i] = encoding.decode(written)
            bar.update(len(indices))
    return texts


@torch.no_grad()
def classify(config, model, loader, split):
    """The class that a classifier finds likeliest for each text of a split, in the split's order: list of int."""
    device, found = next(model.parameters()).device, [None] * len(loader.splits[split])
    for indices in tqdm(loader.order(split, config.batch_size), disable=None, unit="batch"):
        batch = loader.batch(split, indices).to(device)
        logits, _ = model(batch.idx, batch.targets)  # (B, n_classes)
        for i, label in zip(indices, logits.argmax(-1).tolist()):
            found[i] = label
    return found


def show(result, examples, generated, found):
    """Prints accuracy, the confusion table and a few examples of each kind of error."""
    names, (low, high) = result["label_names"], result["interval"]
    print(
        f"accuracy {100 * result['accuracy']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}) of "
        f"{result['n']} examples, garbage {100 * result['garbage']:.2f} %"
    )
    width = max(len(name) for name in [*names, "garbage"]) + 2
    columns = [*names, "garbage", "recall"]
    print("\n" + "true \\ written".ljust(width + 6) + "".join(name.rjust(width) for name in columns))
    for name, row, recall in zip(names, result["confusion"], result["recall"]):
        cells = [*map(str, row), "" if recall is None else f"{100 * recall:.1f} %"]
        print(name.ljust(width + 6) + "".join(cell.rjust(width) for cell in cells))
    shown = Counter()
    for ex, text, i in zip(examples, generated, found):
        kind = (names[ex.label], "garbage" if i is None else names[i])
        if i != ex.label and shown[kind] < 2:
            if not shown:
                print("\nsome errors:")
            shown[kind] += 1
            print(f"  {kind[0]} taken for {kind[1]}: wrote {text[:30]!r} after {' '.join(ex.text.split())[:90]!r}")


def score_folder(config):
    return config.out_dir if config.resume else os.path.join(config.out_dir, "untuned")


def score(config, model, loader, max_new_tokens):
    """Scores config.split, prints the result and writes accuracy.json and predictions.jsonl. Returns the result."""
    began, examples = time.time(), loader.splits[config.split]
    names, labels = loader.label_names, examples.labels.tolist()
    if loader.classify:
        found = classify(config, model, loader, config.split)
        generated = [names[i] for i in found]
    else:
        generated = generate_labels(config, model, loader, config.split, max_new_tokens)
        found = [find_label(text, names) for text in generated]
    seconds, result = time.time() - began, tabulate(found, labels, names)
    show(result, examples, generated, found)
    result |= {key: getattr(config, key) for key in SCORED} | {"tuned": config.resume, "seconds": round(seconds, 2)}
    folder = score_folder(config)
    with whole_file(os.path.join(folder, "predictions.jsonl")) as f:
        for ex, text, i in zip(examples, generated, found):
            row = {"text": ex.text, "label": names[ex.label], "generated": text}
            row["predicted"] = None if i is None else names[i]
            f.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    write_json(os.path.join(folder, "accuracy.json"), result)
    print(f"\n{len(examples) / seconds:.1f} examples/s; written: {folder}/accuracy.json, {folder}/predictions.jsonl")
    if config.resume:
        compare(config, result)
    return result


def compare(config, result):
    """Prints the accuracy beside the untuned model's, if that was scored here, and where the weights lie."""
    with (
        contextlib.suppress(OSError, ValueError),
        open(os.path.join(config.out_dir, "untuned", "accuracy.json")) as f,
    ):
        before = json.load(f)
        if all(before.get(key) == result[key] for key in SCORED):
            print(f"untuned {100 * before['accuracy']:.2f} %, tuned {100 * result['accuracy']:.2f} %")
    for name in (ADAPTER_WEIGHTS, "model.safetensors", "loss.png"):
        path = os.path.join(config.out_dir, name)
        if os.path.exists(path):
            print(f"{path} ({os.path.getsize(path) / 1e6:.2f} MB)")


def main(config):
    keep_memory()
    with one_line_errors():
        device = pick_device(config.device)
        size, loader, n_classes = context_size(checkpoint_of(config)), None, 0
        if config.task == "classify":
            if not config.resume and not read_config(find_checkpoint(config.init_from)[0]).get("n_classes"):
                raise ValueError(f"init_from={config.init_from}: a language model has no classes; train.py adds them")
            loader, new = instruction_loader(config, size, wanted=(config.split,)), 0
            n_classes = len(loader.label_names)
        elif config.start is None:
            if config.task == "pretrain":
                raise ValueError("this run was pre-trained on plain text and has no labels: type --start=TEXT")
            new = config.max_new_tokens or 5
            if new > size // 2:
                raise ValueError(f"max_new_tokens={new}: type at most {size // 2}, half the context")
            loader = instruction_loader(config, size - new, wanted=(config.split,))
            if config.max_new_tokens is None:
                longest = max(len(gpt2_encoding().encode_ordinary(" " + name)) for name in loader.label_names)
                if longest > new:  # the cut must leave room for the longest label
                    new = longest
                    loader = instruction_loader(config, size - new, wanted=(config.split,))
        if config.start is None:
            os.makedirs(score_folder(config), exist_ok=True)
        model = load_model(config, device, pick_dtype(device, config.dtype), n_classes)
    torch.manual_seed(config.seed)
    if config.start is None:
        score(config, model, loader, new)
        return
    start = config.start.replace("\\n", "\n")
    idx = torch.tensor([gpt2_encoding().encode_ordinary(start) or [end_of_text()]], device=device)
    if n_classes:
        with torch.no_grad():
            shares = model(idx[:, :size])[0].flatten().softmax(-1).tolist()
        for share, name in sorted(zip(shares, loader.label_names), reverse=True):
            print(f"{name}: {100 * share:.1f} %")
        return
    new = config.max_new_tokens or 200
    out = model.generate(idx, new, temperature=config.temperature, top_k=config.top_k, stop=end_of_text())
    print(start + gpt2_encoding().decode([t for t in out[0, idx.size(1) :].tolist() if t != end_of_text()]))


if __name__ == "__main__":
    with one_line_errors(OSError):  # such as a full disk
        main(configure(sys.argv[1:], fixed=MODEL_KEYS))
