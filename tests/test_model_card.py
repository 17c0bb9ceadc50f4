"""README.md in a run's folder: what the hub reads, what it says of the run, and that nobody's own page is lost.

python -m pytest tests/test_model_card.py
"""

import json
import re

import pytest
import torch
from conftest import base_folder
from huggingface_hub import ModelCard
from plumbing.model_card import OURS, make_card

import generate
from configurator import MODEL_KEYS, Config, configure
from dataloader import CustomDataLoader
from model import GPT
from plumbing.peft_format import load_adapter
from train import train

RUNS = {
    "lora": {"rank": 2, "alpha": 8},
    "full": {"rank": 0},
    "classifier": {"rank": 2, "alpha": 8, "task": "classify"},
    "text": {"rank": 0, "task": "pretrain", "train_context": 16},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = base_folder(tmp_path_factory, "card")
    splits = ("train",) * 8 + ("validation", "test")
    rows = [{"text": f"film {i}", "label": ("bad", "good")[i % 2], "split": splits[i % 10]} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.txt").write_text("".join(f"This is paragraph {i} of a long text.\n\n" for i in range(3000)))
    return folder


def run(place, name, *more):
    data = place / ("rows.txt" if name == "text" else "rows.jsonl")
    values = {"init_from": place / "base", "dataset": data, "out_dir": place / name, "device": "cpu"}
    values |= {"dtype": "float32", "max_iters": 2, "batch_size": 8, "template": "{text} It is {label}"} | RUNS[name]
    train(configure([*(f"--{key}={value}" for key, value in values.items()), *more]))


def score(place, name):
    generate.main(configure(["--init_from=resume", f"--out_dir={place / name}", "--device=cpu"], fixed=MODEL_KEYS))


@pytest.mark.parametrize("name", RUNS)
def test_the_card_of_a_run(place, name, monkeypatch):
    """Lost if it fails: a shared run's page is refused by the hub, or its commands load another model than the run's."""
    run(place, name)
    path = place / name / "README.md"
    text = path.read_text("utf-8")
    data = ModelCard.load(path).data.to_dict()  # as the hub reads it
    assert data["library_name"] == ("peft" if RUNS[name]["rank"] else "transformers")
    assert "base_model" not in data and "datasets" not in data  # folders of this machine's are no names there
    assert data["pipeline_tag"] == ("text-classification" if name == "classifier" else "text-generation")
    assert str(place) not in text  # nor is where they lie anyone's business
    if name != "text":
        digest = CustomDataLoader(str(place / "rows.jsonl"), wanted=("test",)).digest
        assert "`rows.jsonl`" in text and digest in text and "`bad`, `good`" in text
    if name in ("lora", "full"):
        assert "\n    {text} It is {label}\n" in text
    best = min(json.loads(line)["val_loss"] for line in (place / name / "metrics.jsonl").read_text().splitlines())
    assert f"{best:.4f}" in text

    names = {}
    monkeypatch.chdir(place)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), names)
    theirs = names["model"].eval()
    idx = torch.arange(40, 50)[None]
    if name in ("lora", "classifier"):
        ours = GPT.from_pretrained(str(place / "base"), n_classes=2 if name == "classifier" else 0)
        load_adapter(ours, str(place / name))
    else:
        ours = GPT.from_pretrained(str(place / name))
    logits = theirs(idx).logits
    logits = logits if name == "classifier" else logits[:, -1]
    torch.testing.assert_close(ours.eval()(idx)[0][:, 0], logits, rtol=0, atol=1e-3)


def test_names_that_the_hub_knows():
    """Lost if it fails: the hub does not show a run under the base model and data that it was made from."""
    config = Config(rank=4, alpha=16.0, out_dir="some/out")
    loader = CustomDataLoader(wanted=(), label_names=["it's: bad", "good"])
    loader.digest = "abc"
    card = ModelCard(make_card(config, loader, 0.5))
    data = card.data.to_dict()
    assert data["base_model"] == "openai-community/gpt2-medium"
    assert data["datasets"] == ["cornell-movie-review-data/rotten_tomatoes"]
    assert "lora" in data["tags"] and "# out\n" in card.text and "`it's: bad`" in card.text
    assert "from_pretrained('openai-community/gpt2-medium')" in card.text


def test_scoring_completes_the_card_and_keeps_the_rest(place):
    """Lost if it fails: a shared run does not say how good it is, says it of older weights, or loses its licence."""
    run(place, "lora")
    path = place / "lora" / "README.md"
    path.write_text(path.read_text("utf-8") + "\nLicence: MIT, says the user. ✓\n", "utf-8")
    assert "Not known yet" in path.read_text("utf-8")
    for _ in range(2):  # a second score takes the first one's place
        score(place, "lora")
    text = path.read_text("utf-8")
    result = json.loads((place / "lora" / "accuracy.json").read_text())
    assert text.count(f"{100 * result['accuracy']:.2f} % of 6 examples") == 1 and "Not known yet" not in text
    assert f"{100 * result['interval'][0]:.1f} to {100 * result['interval'][1]:.1f}" in text
    assert text.endswith("says the user. ✓\n") and ModelCard(text).data.library_name == "peft"
    run(place, "lora")  # other weights
    assert "Not known yet" in path.read_text("utf-8")


def test_a_page_of_the_users_own_stays(place, capsys):
    """Lost if it fails: training in a folder with a README.md replaces what someone wrote."""
    run(place, "full")
    path = place / "full" / "README.md"
    for text in (b"# My project\n", path.read_bytes().replace(OURS.encode(), b""), b"\xff\xfeno UTF-8"):
        path.write_bytes(text)
        run(place, "full")
        score(place, "full")
        assert path.read_bytes() == text
        assert "stays as it is" in capsys.readouterr().out
