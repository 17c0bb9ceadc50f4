"""A page to try a fine-tuned model on, before and after its tuning.

    pip install -r requirements-app.txt
    python examples/app.py out-mini

It runs here, on Colab and on a Space of the hub (docs/after.md). Nothing that is typed is kept: no analytics, no
history, and a file is deleted as soon as it is read.
"""

import contextlib
import html
import json
import math
import os
import re
import signal
import sys
import tempfile
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from generate import ModelSampler
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.program.errors import one_line_errors
from plumbing.scoring.model_card import base_name
from plumbing.scoring.new_texts import predict_file

FILES = tempfile.TemporaryDirectory(prefix="nanolora-app-")  # removed at the end, with all that is in it
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_TEMP_DIR": FILES.name}
with one_line_errors(ImportError):
    import gradio as gr

TOKENS = 8_192  # in a batch


def load(folder):
    """{title: ModelSampler}: a run's base and its tuned model. Without a classifier's base, which has no classes."""
    tuned = ModelSampler(folder)
    tuned.load_prompt()
    models = {"after tuning": tuned}
    if not tuned.prompt.classify:
        models = {"before tuning": ModelSampler(config=replace(tuned.config, facts=None))} | models
    for sampler in models.values():
        sampler.prompt = tuned.prompt
        sampler.load_model()
    return models


def score(sampler, texts):
    """What the model writes after each text, and each label's share."""
    prompts = sampler.make_prompts(texts)
    sampler.config.batch_size = max(1, TOKENS // max(map(len, prompts)))
    return sampler.answer(prompts, wants_shares=True)


def cut(text, n):
    """At most n pieces that make up the text: words; of a long text sentences, or several words in one."""
    pieces = re.split(r"(?<=\S)(?=\s)", text)
    if len(pieces) > n and len(sentences := re.split(r"(?<=[.!?…])(?=\s)", text)) > 3:
        pieces = sentences
    size = math.ceil(len(pieces) / n)
    return ["".join(pieces[i : i + size]) for i in range(0, len(pieces), size)]


def paint(pieces, gains):
    """The text in colours, each piece with its points: blue for a gain, orange for a loss."""
    scale = max(10, *map(abs, gains))
    spans = []
    for piece, gain in zip(pieces, gains):
        style = f"background: rgba({'40, 120, 255' if gain > 0 else '255, 130, 0'}, {0.6 * abs(gain) / scale:.2f})"
        number = f"<sup>{gain:+.0f}</sup>" if abs(gain) >= 0.5 else ""
        spans.append(f'<span style="{style}; border-radius: 3px">{html.escape(piece)}{number}</span>')
    return f'<p style="line-height: 2; overflow-wrap: anywhere">{"".join(spans)}</p>'


def build(folder):
    models = load(folder)
    tuned = models["after tuning"]
    config, prompt, names = tuned.config, tuned.prompt, tuned.prompt.label_names

    def show(text):
        """Yields each model's shares and what it wrote, and then what moved the tuned one."""
        text = text.strip().encode("utf-8", "replace").decode()  # half an emoji becomes "?"
        if not text:
            yield *[None] * len(models), "Type a text first."
            return
        ex, was_cut = prompt.make_example(text, 0)
        text = gpt2_encoding().decode(ex.tokens, errors="ignore") if prompt.classify else ex.text  # may be cut
        notes = [f"Only the first {len(text):,} characters were read: the model takes no more."] if was_cut else []
        found = [score(sampler, [text]) for sampler in models.values()]
        if not prompt.classify:
            wrote = [f"“{html.escape(words.strip())}” {title}" for title, ((words,), _) in zip(models, found)]
            notes.append(f"It wrote {' and '.join(wrote)}.")
        shares = [dict(zip(names, row)) for _, (row,) in found]
        yield *shares, "<br>".join(notes)
        best = max(names, key=shares[-1].get)
        pieces = cut(text, min(64, max(8, 2 * TOKENS // len(ex.tokens))))  # of a long text fewer, so that it ends
        _, without = score(tuned, ["".join(pieces[:i] + pieces[i + 1 :]).strip() for i in range(len(pieces))])
        gains = [100 * (shares[-1][best] - row[names.index(best)]) for row in without]
        notes.append(f"How many points of 100 <b>{html.escape(best)}</b> loses where a piece is left out:")
        yield *[gr.skip()] * len(models), "<br>".join(notes) + paint(pieces, gains)

    def answer_file(path, column, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        """Yields what takes the file's place, the file with its answers, and what is wrong with it if anything is."""
        sampler = ModelSampler(config=replace(config, predict=path, text_field=column, batch_size=32))
        sampler.prompt, sampler.model = prompt, tuned.model
        with tempfile.TemporaryDirectory() as out:
            try:
                predict_file(sampler.config, out, lambda: sampler)
                yield None, os.path.join(out, *os.listdir(out)), ""
            except (ValueError, OSError) as e:
                yield None, None, html.escape(str(e).replace(path, os.path.basename(path)).removeprefix("predict="))
            finally:
                os.remove(path)

    with gr.Blocks(title="nanoLoRA", delete_cache=(60, 600)) as page:
        gr.Markdown(f"# {' or '.join(names)}?\nAsk {base_name(config)}, before and after its tuning.")
        text = gr.Textbox(label="A text", lines=3, max_lines=12)
        button = gr.Button("Ask the model", variant="primary")
        with gr.Row():
            outputs = [gr.Label(label=title) for title in models]
        outputs.append(gr.HTML())
        gr.on([button.click, text.submit], show, text, outputs, show_progress="minimal")
        answers = []  # those that generate.py has scored
        with contextlib.suppress(OSError), open(os.path.join(folder, "predictions.jsonl"), encoding="utf-8") as f:
            answers = [json.loads(line) for line in f]
        for title, is_right in (("Right answers", True), ("Wrong answers (the right one stands in front)", False)):
            if rows := [row for row in answers if (row["predicted"] == row["label"]) == is_right][:4]:
                labels = [f"{row['label']}: {row['text']}" for row in rows]
                options = {"label": title, "example_labels": labels, "run_on_click": True, "cache_examples": False}
                gr.Examples([[row["text"]] for row in rows], text, outputs, show, **options)
        with gr.Accordion("A file of texts", open=False):
            gr.Markdown("csv, tsv, jsonl, parquet or txt. It comes back with the label, the words and the share.")
            column = gr.Textbox(config.text_field, label="The column of the texts")
            file = gr.File(label="Your file", height=120)
            answered = gr.File(label="With the answers", interactive=False, height=120)
            file.upload(answer_file, [file, column], [file, answered, gr.HTML()])
    return page


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then too the temporary files are removed
    with one_line_errors():
        page = build(sys.argv[1] if len(sys.argv) > 1 else "out-mini")
    # Its own fonts would come from another server.
    page.launch(theme=gr.themes.Default(font=["system-ui"], font_mono=["monospace"]), footer_links=["gradio"])
