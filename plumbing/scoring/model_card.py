"""A run's README.md, as the hub shows it: what the model is, what it has read, how good it is and how to load it."""

import contextlib
import hashlib
import json
import os
import textwrap

from plumbing.data.sources import HUB_DATASETS
from plumbing.gpt2.files import HUB_MODELS
from plumbing.program.files import whole_file
from plumbing.scoring.accuracy import describe_accuracy

CARD = "README.md"
MARK = "<!-- Written by nanoLoRA; once it is edited, this file is left as it is. SHA-256: "
SETTINGS = ("rank", "alpha", "dropout", "lora_targets", "lora_bias", "trainable", "lr", "max_iters", "batch_size")
SETTINGS += ("gradient_accumulation_steps", "weight_decay", "warmup_iters", "decay_share", "loss_on", "seed")


def write_card(config, loader, result: dict | None = None) -> None:
    """Writes README.md into the run's folder: after training, and again with the result of a scoring.

    config: the run's own. loader: of its data, or of those that were scored. A README.md that somebody else wrote, or
    edited, stays as it is, and so does one whose run was scored on other data or with another template.
    """
    if result is not None and any(result[key] != getattr(config, key) for key in ("dataset", "template")):
        return
    path = os.path.join(config.out_dir, CARD)
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            before = f.read()
        if before.rstrip() != seal(before.rpartition(MARK)[0]).rstrip():
            print(f"note: {path} was not written here, or edited since, and is left as it is")
            return
    what = "classifies texts" if config.task == "classify" else "writes a label after a text"
    how = f"LoRA of rank {config.rank}" if config.rank else "without LoRA"
    parts = [
        front_matter(config),
        f"# {os.path.basename(os.path.abspath(config.out_dir))}",
        f"A GPT-2 that {what}: trained from `{base_name(config)}`, {how}, with nanoLoRA.",
        data_section(config, loader),
        settings_section(config),
        result_section(config, result),
        loading_section(config, loader),
        "## Licence",
        "Choose one. The base model's licence and that of the data bind this model too.",
    ]
    text = "\n\n".join(parts) + "\n\n"
    with whole_file(path) as f:
        f.write(seal(text.encode("utf-8", "backslashreplace").decode()).encode())  # a folder's name may be no text


def seal(text):
    """A card with the line by which it is known as one that nobody has edited."""
    return f"{text}{MARK}{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()} -->\n"


def base_name(config):
    """The base as others know it: of a folder only its name, since the way there is the owner's own."""
    return HUB_MODELS.get(config.init_from) or os.path.basename(os.path.normpath(config.init_from))


# --- its parts -------------------------------------------------------------------------------------


def front_matter(config):
    """The YAML that the hub reads. Only names that the hub has stand in it."""
    lines = ["---", f"library_name: {'peft' if config.rank else 'transformers'}"]
    if config.init_from in HUB_MODELS:
        lines.append(f"base_model: {HUB_MODELS[config.init_from]}")
    if config.dataset in HUB_DATASETS:
        lines += ["datasets:", f"- {HUB_DATASETS[config.dataset]}"]
    lines.append(f"pipeline_tag: text-{'classification' if config.task == 'classify' else 'generation'}")
    lines += ["tags:", "- gpt2", "- nanolora", *(["- lora"] if config.rank else []), "---"]
    return "\n".join(lines)


def data_section(config, loader):
    name = config.dataset
    if os.path.exists(name):  # the way there is the owner's own
        name = os.path.basename(os.path.normpath(name))
    digest = (config.facts and config.facts.data) or loader.digest
    labels = ", ".join(f"`{label}`" for label in label_names(config, loader))
    section = f"""## Data

- data set: `{name}`, digest `{digest[:16]}`
- columns: `{config.text_field}`, `{config.label_field}`
- labels: {labels}"""
    if config.task == "classify":
        return section
    template = textwrap.indent(config.template.replace("\\n", "\n"), "    ", lambda line: True)  # a block of code
    return f"{section}\n\nThe prompt; the model writes what stands in the place of `{{label}}`:\n\n{template}"


def label_names(config, loader):
    """Those of the run; the loader may be of other data."""
    return (config.facts and config.facts.label_names) or loader.label_names


def settings_section(config):
    rows = ["## Settings", "", "| | |", "| --- | --- |"]
    for key in SETTINGS:
        value = getattr(config, key)
        if value is not None:
            text = str(value).replace("|", "\\|")  # or a table would begin another cell there
            rows.append(f"| {key} | `{text}` |")
    return "\n".join(rows)


def result_section(config, result):
    lines = ["## Result", ""]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
            best = min(json.loads(line)["val_loss"] for line in f)
        lines.append(f"- best validation loss: {best:.4f} nats a scored token")
    accuracy = "not scored yet; `python generate.py --init_from=resume --out_dir=FOLDER` does it"
    if result is not None:
        accuracy = describe_accuracy(result, f"examples of the {result['split']} split")
    return "\n".join([*lines, f"- accuracy: {accuracy}"])


def loading_section(config, loader):
    kind = "GPT2LMHeadModel"
    options = ""
    if config.task == "classify":
        kind = "GPT2ForSequenceClassification"
        options = f", num_labels={len(label_names(config, loader))}, pad_token_id=50256"
    library = "transformers"
    code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'
    if config.rank:
        library = "PEFT"
        base = "assets/gpt2-mini" if config.init_from == "gpt2-mini" else base_name(config)
        code = f"""from peft import PeftModel
from transformers import {kind}

BASE = "{base}"{"" if config.init_from in HUB_MODELS else "  # where you have this base model"}
base = {kind}.from_pretrained(BASE{options})
model = PeftModel.from_pretrained(base, "FOLDER")"""
    return f"""## How to load it

FOLDER is this folder or, outside nanoLoRA, its name on the hub; the tokenizer is GPT-2's. With {library}:

```python
{code}
```

With nanoLoRA:

```
python generate.py --init_from=resume --out_dir=FOLDER --predict=new.csv
```"""
