"""tools/export.py: the folder opens in transformers, and gives there what the run gives here.

python -m pytest tests/tools/test_export.py
"""

import hashlib
import inspect
import json
import os
import re

import pytest
import tiktoken_ext.openai_public
import torch
from conftest import flags, here
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Tokenizer, pipeline

from dataloader import CustomDataLoader
from generate import ModelSampler
from plumbing.data.tokenizer import gpt2_encoding
from tools import export

MINI = ["configs/finetune_mini_config.py", "--batch_size=8", "--eval_iters=1", "--warmup_iters=0", "--dtype=float32"]
ODD = ["", " ", "a  b \n\n c\t", "😀👩‍👩‍👧 naïve", "ภาษาไทยไม่มีช่องว่าง", "don't 'LL 12½ ²", "\u2028…\xa0"]
ODD += ["\x00\x07\x1b[0m\x7f\u200b\ufeff"]


@pytest.fixture(scope="module", autouse=True)
def merges():
    """The same merges in every export here are searched for once, in the first."""
    found = []
    search = export.find_merges
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "find_merges", lambda tokens: found or found.extend(search(tokens)) or found)
        yield


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A run of the shipped model on real reviews, and its folder for transformers. After three updates it does not
    yet write labels alone: what follows a review differs from one to the next."""
    folder = tmp_path_factory.mktemp("mini")
    here([*MINI, "--max_iters=3", "--lora_bias=all", f"--out_dir={folder / 'run'}"])
    export.main([str(folder / "run"), str(folder / "out")])
    return folder


@pytest.fixture(scope="module")
def classifier(place):
    here(flags(place, "classes", task="classify", rank=4, max_iters=20, lr=0.01, template="{text} {label}"))
    export.main([str(place / "classes"), str(place / "classes-out")])
    return place / "classes-out"


def test_a_language_model_writes_there_what_it_writes_here(mini):
    """Lost if it fails: what is served elsewhere is not the model whose accuracy was measured."""
    sampler = ModelSampler(str(mini / "run"), dtype="float32", device="cpu")
    sampler.load_data()
    texts = [ex.text for ex in sampler.loader.splits["test"]][::100]
    ours = [answer["generated"] for answer in sampler.predict(texts)]
    assert len(set(ours)) > 3
    prompts = [f"{text} This movie is" for text in texts]
    write = pipeline("text-generation", str(mini / "out"))
    assert [answer[0]["generated_text"] for answer in write(prompts, return_full_text=False)] == ours
    # The same without pipeline, in one batch: short prompts are padded.
    tokenizer = AutoTokenizer.from_pretrained(mini / "out")
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    out = write.model.generate(**batch)[:, batch["input_ids"].size(1) :]
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == ours


def test_a_classifier_gives_there_the_shares_that_it_gives_here(place, classifier):
    """Lost if it fails: a classifier's probabilities, or its classes' names, change on the way."""
    sampler = ModelSampler(str(place / "classes"), dtype="float32", device="cpu")
    texts = ["the plot was wonderful", "this film seemed dreadful and a story was dreadful", "a story"]
    found = pipeline("text-classification", str(classifier))(texts, top_k=None, truncation=True)
    for text, rows in zip(texts, found):
        ours = sampler.score_classes(text)
        assert ours.keys() == {"negative", "positive"}
        for row in rows:
            assert row["score"] == pytest.approx(ours[row["label"]], abs=1e-5)


@pytest.mark.parametrize("kind", ["mini", "classifier"])
def test_the_code_in_the_card_runs(kind, request, capsys):
    """Lost if it fails: who finds the folder on the hub copies code that does not work."""
    folder = request.getfixturevalue(kind)
    folder = folder / "out" if kind == "mini" else folder
    card = (folder / "README.md").read_text("utf-8")
    exec(re.search("```python\n(.*?)```", card, re.DOTALL).group(1).replace("FOLDER", str(folder)), {})
    assert capsys.readouterr().out.strip()
    assert "library_name: transformers" in card and "## Licence" in card
    if kind == "mini":
        assert "the base: MIT" in card and "Apache-2.0" in card and "\n    {text} This movie is {label}\n" in card


def test_weights_are_rounded_once(mini):
    """Lost if it fails: a model in bfloat16 is further from the trained one than it has to be."""
    export.main([str(mini / "run"), str(mini / "half"), "--dtype=bfloat16"])
    whole, half = (load_file(mini / name / "model.safetensors") for name in ("out", "half"))
    assert whole.keys() == half.keys()
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[name].bfloat16()), name


# --- the tokenizer ---------------------------------------------------------------------------------


def test_the_tokenizers_files_are_openais(mini):
    """Lost if it fails: another program splits words in another way. tiktoken knows the hashes of the published
    files."""
    published = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    for name in ("vocab.json", "merges.txt"):
        digest = hashlib.sha256((mini / "out" / name).read_bytes()).hexdigest()
        assert digest in published, name


@pytest.fixture(scope="module")
def theirs(mini):
    """The exported tokenizer, and the one that transformers makes of the two published files alone."""
    with open(mini / "out" / "vocab.json") as f:
        vocab = json.load(f)
    lines = (mini / "out" / "merges.txt").read_text("utf-8").splitlines()[1:]
    own = GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])
    return AutoTokenizer.from_pretrained(mini / "out"), own


def test_token_ids_are_tiktokens(theirs):
    """Lost if it fails: the model reads other tokens elsewhere than those that it was trained on."""
    texts = [ex.text for ex in CustomDataLoader("rt_reviews", wanted=("test",)).splits["test"]]
    for text in [*texts, *ODD]:
        expected = gpt2_encoding().encode_ordinary(text)
        for tokenizer in theirs:
            assert tokenizer(text)["input_ids"] == expected, text
        assert theirs[0].decode(expected) == text


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=60))
def test_token_ids_of_any_text(theirs, text):
    """As above, for any characters."""
    for tokenizer in theirs:
        assert tokenizer(text)["input_ids"] == gpt2_encoding().encode_ordinary(text)


# --- mistakes --------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(mini, tmp_path, capsys):
    """Lost if it fails: a base is given out as a tuned model, or somebody's files are overwritten."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    run = str(mini / "run")
    cases = {
        "is no run": ["assets/gpt2-mini", str(tmp_path / "new")],
        "is not empty": [run, str(tmp_path / "full")],
        "not empty": [run, str(tmp_path / "file")],
        "assets/gpt2-mini is not empty": [run, "assets/gpt2-mini"],
        "invalid choice": [run, str(tmp_path / "new"), "--dtype=int8"],
        "required": [run],
    }
    for words, argv in cases.items():
        with pytest.raises(SystemExit) as ended:
            export.main(argv)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and words in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_an_empty_folder_that_cannot_be_renamed_is_filled(mini, tmp_path, monkeypatch):
    """Lost if it fails: a container's volume, a link or the folder that one is in is refused after all the work."""
    for name in ("here", "behind"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "behind", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    for out, folder in ((".", "here"), (str(tmp_path / "link"), "behind")):
        export.export(str(mini / "run"), out)
        assert set(os.listdir(tmp_path / folder)) == set(os.listdir(mini / "out"))
    assert (tmp_path / "link").is_symlink()


def test_what_is_written_is_whole(mini, tmp_path, monkeypatch):
    """Lost if it fails: a folder without its tokenizer looks like an exported one."""
    out = tmp_path / "out"
    out.mkdir()  # an empty one is as good as none
    with monkeypatch.context() as patch:
        patch.setattr(export, "make_card", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export(str(mini / "run"), str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(out.iterdir())
    export.export(str(mini / "run"), str(out))
    assert {path.name for path in out.iterdir()} == {path.name for path in (mini / "out").iterdir()}


def test_a_template_that_ends_in_other_tokens_alone_is_named(place, capsys):
    """Lost if it fails: two line breaks before the label are two tokens in training and one in a prompt."""
    for name, end, noted in (("one", r"\n", False), ("two", r"\n\n", True)):
        here(flags(place, name, rank=2, max_iters=1, template=f"{{text}}{end}{{label}}"))
        capsys.readouterr()
        export.main([str(place / name), str(place / f"{name}-out")])
        assert ("other tokens" in capsys.readouterr().out) == noted
