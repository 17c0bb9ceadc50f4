"""A run's README.md, as the hub shows it: what the model is, what it has read, how good it is and how to load it."""

import hashlib
import json
import os
import textwrap

from plumbing.data.sources import HUB_DATASETS
from plumbing.gpt2.files import HUB_MODELS
from plumbing.program.files import whole_file

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
    if not is_ours(path):
        print(f"note: {path} was not written here, or edited since, and is left as it is")
        return
    parts = [front_matter(config), opening(config), data_section(config, loader), settings_section(config)]
    parts += [result_section(config, result), loading_section(config, loader), LICENCE]
    text = "\n\n".join(parts) + "\n\n"
    text = text.encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text
    with whole_file(path) as f:
        f.write(f"{text}{MARK}{checksum(text)} -->\n".encode())


def is_ours(path):
    """Whether the file is not there, or as it was written here."""
    try:
        with open(path, encoding="utf-8") as f:
            text, mark, end = f.read().rpartition(MARK)
        return bool(mark) and end.strip() == f"{checksum(text)} -->"
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False


def checksum(text):
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# --- its parts -------------------------------------------------------------------------------------


def front_matter(config):
    """The YAML that the hub reads. Only names that the hub has stand in it."""
    lines = [f"library_name: {'peft' if config.rank else 'transformers'}"]
    if config.init_from in HUB_MODELS:
        lines.append(f"base_model: {HUB_MODELS[config.init_from]}")
    if config.dataset in HUB_DATASETS:
        lines.append(f"datasets:\n- {HUB_DATASETS[config.dataset]}")
    lines.append(f"pipeline_tag: text-{'classification' if config.task == 'classify' else 'generation'}")
    lines.append("tags:\n- gpt2\n- nanolora" + ("\n- lora" if config.rank else ""))
    return "---\n" + "\n".join(lines) + "\n---"


def opening(config):
    what = "classifies texts" if config.task == "classify" else "writes a label after a text"
    how = f"LoRA of rank {config.rank}" if config.rank else "without LoRA"
    name = os.path.basename(os.path.abspath(config.out_dir))
    return f"# {name}\n\nA GPT-2 that {what}: trained from `{base_name(config)}`, {how}, with nanoLoRA."


def base_name(config):
    """The base as others know it: of a folder only its name, since the way there is the owner's own."""
    return HUB_MODELS.get(config.init_from) or os.path.basename(os.path.normpath(config.init_from))


def data_section(config, loader):
    digest = (config.run and config.run.data) or loader.digest
    lines = [f"- data set: `{public_name(config.dataset)}`, digest `{digest[:16]}`"]
    lines.append(f"- columns: `{config.text_field}`, `{config.label_field}`")
    lines.append("- labels: " + ", ".join(f"`{name}`" for name in label_names(config, loader)))
    section = "## Data\n\n" + "\n".join(lines)
    if config.task == "classify":
        return section
    template = config.template.replace("\\n", "\n")
    return f"{section}\n\nThe prompt; the model writes what stands in the place of `{{label}}`:\n\n{indent(template)}"


def label_names(config, loader):
    """Those of the run; the loader may be of other data."""
    return (config.run and config.run.label_names) or loader.label_names


def public_name(dataset):
    return os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else dataset


def indent(text):
    """As a block of code, whatever is in it."""
    return textwrap.indent(text, "    ", lambda line: True)


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
    best = best_loss(config.out_dir)
    if best is not None:
        lines.append(f"- best validation loss: {best:.4f} nats a scored token")
    if result is not None:
        low, high = result["interval"]
        lines.append(
            f"- accuracy: {100 * result['accuracy']:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}) of "
            f"{result['n']} examples of the {result['split']} split, garbage {100 * result['garbage']:.2f} %"
        )
    else:
        lines.append("- accuracy: not scored yet; `python generate.py --init_from=resume --out_dir=FOLDER` does it")
    return "\n".join(lines)


def best_loss(out_dir):
    try:
        with open(os.path.join(out_dir, "metrics.jsonl"), encoding="utf-8") as f:
            return min(json.loads(line)["val_loss"] for line in f)
    except (OSError, ValueError, KeyError):
        return None


def loading_section(config, loader):
    name = "GPT2ForSequenceClassification" if config.task == "classify" else "GPT2LMHeadModel"
    options = ""
    if config.task == "classify":
        options = f", num_labels={len(label_names(config, loader))}, pad_token_id=50256"
    if config.rank:
        library = "PEFT"
        code = f"""from peft import PeftModel
from transformers import {name}

BASE = "{base_path(config)}"{"" if config.init_from in HUB_MODELS else "  # where you have this base model"}
base = {name}.from_pretrained(BASE{options})
model = PeftModel.from_pretrained(base, "FOLDER")"""
    else:
        library = "transformers"
        code = f"""from transformers import {name}

model = {name}.from_pretrained("FOLDER")"""
    command = "python generate.py --init_from=resume --out_dir=FOLDER --predict=new.csv"
    return f"""## How to load it

FOLDER is this folder or, outside nanoLoRA, its name on the hub; the tokenizer is GPT-2's. With {library}:

```python
{code}
```

With nanoLoRA:

```
{command}
```"""


def base_path(config):
    return "assets/gpt2-mini" if config.init_from == "gpt2-mini" else base_name(config)


LICENCE = """## Licence

Choose one. The base model's licence and that of the data bind this model too."""
