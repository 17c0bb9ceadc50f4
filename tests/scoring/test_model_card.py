"""A run's README.md: a page that the hub reads, and code in it that loads the model.

python -m pytest tests/scoring/test_model_card.py
"""

import json
import os
import re

import pytest
import torch
from conftest import base_folder
from huggingface_hub import ModelCard

import generate
from configurator import Config, configure
from generate import ModelSampler
from plumbing.scoring.model_card import write_card
from train import train

KINDS = {
    "lora": {"rank": 4, "alpha": 16, "lora_targets": r"c_(attn|proj)$"},
    "all weights": {"rank": 0},
    "classifier": {"task": "classify", "rank": 4, "alpha": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, data, and a scored run of each kind."""
    folder = base_folder(tmp_path_factory, "card")
    with open(folder / "films.csv", "w") as f:
        f.write("text,label,split\n")
        for i in range(60):
            split = "train" if i < 48 else "test"
            f.write(f"a {('dull', 'fine')[i % 2]} film {i},{('bad', 'good')[i % 2]},{split}\n")
    for kind, settings in KINDS.items():
        values = {"init_from": folder / "base", "dataset": folder / "films.csv", "out_dir": folder / kind}
        values |= {
            "template": "```{text}```\n{label}",
            "max_iters": 2,
            "lr": 0.05,
            "device": "cpu",
            "dtype": "float32",
        }
        train(configure([f"--{key}={value}" for key, value in (values | settings).items()]))
    return folder


def score(folder):
    generate.main(configure(["--init_from=resume", f"--out_dir={folder}"], trains=False))
    return json.loads((folder / "accuracy.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_what_the_run_is(place, kind):
    """Lost if it fails: what is uploaded has no page, or one that the hub cannot read or that tells another run."""
    out = place / kind
    assert "not scored yet" in (out / "README.md").read_text("utf-8")
    result = score(out)
    card = ModelCard.load(out / "README.md")
    assert "license" not in card.data.to_dict()
    assert card.data.library_name == ("transformers" if kind == "all weights" else "peft")
    assert card.data.pipeline_tag == ("text-classification" if kind == "classifier" else "text-generation")
    assert card.data.base_model is None  # a folder of the user's: nothing that the hub knows
    assert card.text.strip().startswith(f"# {kind}")
    low, high = result["interval"]
    assert f"{100 * result['accuracy']:.2f} %" in card.text and f"{100 * low:.1f} to {100 * high:.1f}" in card.text
    losses = [json.loads(line)["val_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"{min(losses):.4f}" in card.text
    assert ModelSampler(str(out)).config.lora_targets.replace("|", "\\|") in card.text
    for words in ("films.csv", "`bad`, `good`", "| max_iters | `2` |", "Licence"):
        assert words in card.text
    assert str(place) not in card.text  # the way to somebody's data is nobody else's business
    if kind != "classifier":
        assert "\n    ```{text}```\n    {label}\n" in card.text  # a block of code, whatever is in the template


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_in_the_card_loads_the_model(place, kind):
    """Lost if it fails: whoever copies the lines out of the page gets an error, or the base without its adapter."""
    out = place / kind
    (code,) = re.findall(r"```python\n(.*?)\n```", (out / "README.md").read_text("utf-8"), re.DOTALL)
    names = {}
    exec(code.replace("FOLDER", str(out)).replace('"base"', repr(str(place / "base"))), names)
    idx = torch.arange(300, 330)[None]
    sampler = ModelSampler(str(out), device="cpu", dtype="float32")
    sampler.load_model()
    with torch.no_grad():
        theirs = names["model"].eval()(idx).logits
        ours, _ = sampler.model(idx)
        if kind == "lora":  # there is something in the adapter
            with names["model"].disable_adapter():
                assert (names["model"](idx).logits - theirs).abs().max() > 0.1
    theirs = theirs if kind == "classifier" else theirs[:, -1]
    torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-4)


def test_a_page_that_somebody_wrote_stays(place, capsys):
    """Lost if it fails: an hour's text about one's own model, or a project's README, is overwritten."""
    path = place / "lora" / "README.md"
    score(place / "lora")
    ours = path.read_bytes()
    capsys.readouterr()
    score(place / "lora")  # its own page is written again, without a word
    assert path.read_bytes() == ours and "README" not in capsys.readouterr().out
    for text in (ours + b"\nMy own words.\n", ours.replace(b"bad", b"poor"), b"# My project\n", b"\xff\xfe"):
        path.write_bytes(text)
        score(place / "lora")
        assert path.read_bytes() == text
        assert capsys.readouterr().out.count("left as it is") == 1
    path.unlink()
    score(place / "lora")
    assert path.read_bytes() == ours


def test_a_score_on_other_data_is_not_the_runs(place):
    """Lost if it fails: the page says how good the model is on data, or with a prompt, that it does not name."""
    path = place / "lora" / "README.md"
    score(place / "lora")
    ours = path.read_bytes()
    (place / "other.csv").write_text((place / "films.csv").read_text() + "one film more,bad,train\n")
    for flag in (f"--dataset={place / 'other.csv'}", "--template={text} =\n{label}"):
        argv = ["--init_from=resume", f"--out_dir={place / 'lora'}", flag, "--label_names=None", "--split=train"]
        generate.main(configure(argv, trains=False))
        assert path.read_bytes() == ours


def test_names_that_the_hub_knows_are_linked(tmp_path):
    """Lost if it fails: the page of an adapter of gpt2-medium is not among that model's adapters."""

    class Loader:
        digest = "0123456789abcdef"
        label_names = ("negative", "positive")

    write_card(Config(out_dir=str(tmp_path)), Loader)  # the assignment's run
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "openai-community/gpt2-medium"
    assert data.datasets == ["cornell-movie-review-data/rotten_tomatoes"]
    assert sorted(os.listdir(tmp_path)) == ["README.md"]
