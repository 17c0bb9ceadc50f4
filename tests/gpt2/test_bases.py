"""A base is what it says it is: its head, its numbers, its words, and it stays the one that a run began with.

python -m pytest tests/gpt2/test_bases.py
"""

import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, flags, here, one_line_of, start, tokens
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import generate
from configurator import Facts, configure, make_config
from generate import ModelSampler
from lora import load_adapter, save_adapter
from model import GPT
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.gpt2.base import check_base_stays, check_same_weights, check_vocabulary, fingerprint_base
from tools import anatomy, pretrain


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of the small GPT-2 that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "base")


def rewrite(directory, change, name="model.safetensors"):
    """Lets `change` edit the tensors of a file, which is saved anew by the library alone."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name)


def error_line(action):
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a head of its own ---------------------------------------------------------------------------


def add_head(scale, dtype=torch.float32):
    def change(tensors):
        tensors["lm_head.weight"] = (scale * tensors["transformer.wte.weight"]).to(dtype)

    return change


@pytest.mark.parametrize("name", ["model.safetensors", "b.safetensors"])
def test_a_head_of_its_own_is_refused(base, name):
    """Lost if it fails: a model whose head is its own is read with another one, and writes other words."""
    if name != "model.safetensors":  # in a shard of its own, read before the embedding
        save_file({"lm_head.weight": torch.zeros(301, 64)}, base / "a.safetensors")
        os.rename(base / "model.safetensors", base / name)
        index = {"weight_map": {"lm_head.weight": "a.safetensors", "transformer.wte.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        rewrite(base, add_head(1.5))
    line = error_line(lambda: GPT.from_pretrained(str(base)))
    assert str(base) in line and "lm_head.weight" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_that_is_the_embedding_is_read(checkpoint, base, dtype):
    """Lost if it fails: models whose files hold the tied head a second time, rounded or not, are shut out."""
    rewrite(base, add_head(1, dtype))
    for compute in (torch.float32, torch.bfloat16):
        found, plain = (GPT.from_pretrained(str(d), dtype=compute) for d in (base, checkpoint))
        assert torch.equal(found.lm_head.weight, plain.lm_head.weight)


def test_a_classifier_needs_no_head(base):
    """Lost if it fails: a body that is sound cannot be given a classifier, for a head that is thrown away."""
    rewrite(base, add_head(1.5))
    assert GPT.from_pretrained(str(base), n_classes=2).score.weight.shape == (2, 64)


# --- files that contradict themselves -----------------------------------------------------------


WEIGHT = "transformer.h.0.mlp.c_fc.weight"
CONTRADICTIONS = {
    "no numbers": lambda tensors: {WEIGHT: tensors[WEIGHT] > 0},
    "quantised": lambda tensors: {WEIGHT: tensors[WEIGHT].to(torch.int8)},
    "twice": lambda tensors: {WEIGHT.removeprefix("transformer."): 2 * tensors[WEIGHT]},
}


@pytest.mark.parametrize("how", CONTRADICTIONS)
def test_what_is_no_weight_is_refused(base, how):
    """Lost if it fails: a base is read as something else than it is."""
    rewrite(base, lambda tensors: tensors.update(CONTRADICTIONS[how](tensors)))
    line = error_line(partial(GPT.from_pretrained, str(base)))
    assert str(base) in line and WEIGHT in line


def test_a_whole_file_counts_before_shards(hf, base, tmp_path):
    """Lost if it fails: a model that is saved where shards lay before is not the one that is read there."""
    save_sharded(hf, base, tmp_path)
    model = GPT.from_pretrained(str(base))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    model.save_pretrained(str(base))
    assert torch.equal(GPT.from_pretrained(str(base)).transformer.ln_f.weight, model.transformer.ln_f.weight)
    theirs = GPT2LMHeadModel.from_pretrained(base).transformer.ln_f.weight
    assert torch.equal(theirs, model.transformer.ln_f.weight)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_one_line(base, text):
    """Lost if it fails: a traceback."""
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(text)
    assert "index.json" in error_line(partial(GPT.from_pretrained, str(base)))


# --- numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias"]
)
def test_a_model_with_nan_is_refused(base, name, value):
    """Lost if it fails: a spoiled model is scored as a table of garbage, or its training is called diverged."""

    def spoil(tensors):
        tensors[name].view(-1)[-2] = float(value)

    rewrite(base, spoil)
    for dtype in (torch.float32, torch.bfloat16):
        line = error_line(partial(GPT.from_pretrained, str(base), dtype=dtype))
        assert str(base / "model.safetensors") in line and name in line


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "bias"])
def test_an_adapter_with_nan_is_refused(checkpoint, tmp_path, leaf, value):
    """Lost if it fails: a spoiled adapter answers garbage, and the base is blamed for it."""
    model = GPT.from_pretrained(checkpoint, lora_rank=2, lora_alpha=4)
    save_adapter(model, str(tmp_path), bias="all")
    before = model(tokens(2, 9))[0]

    def spoil(tensors):
        key = next(key for key in tensors if leaf in key)
        tensors[key].view(-1)[0] = float(value)

    rewrite(tmp_path, spoil, "adapter_model.safetensors")
    assert "adapter_model.safetensors" in error_line(lambda: load_adapter(model, str(tmp_path)))
    assert torch.equal(model(tokens(2, 9))[0], before)


def test_anatomy_names_a_base_with_nan(place, capsys):
    """Lost if it fails: the singular values of nothing end in a traceback."""
    base = shutil.copytree(place / "base", place / "base-nan")
    here(flags(place, "run-nan", init_from=base, rank=2, alpha=8, max_iters=1))
    rewrite(base, lambda tensors: tensors["transformer.h.0.attn.c_attn.weight"][5].fill_(float("nan")))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        anatomy.main([str(place / "run-nan")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(base / "model.safetensors") in err


def test_infinity_in_an_old_causal_mask_is_none(checkpoint, base):
    """Lost if it fails: an old file is refused for a mask that is not read."""
    rewrite(base, lambda tensors: tensors.update({"h.0.attn.masked_bias": torch.tensor(float("-inf"))}))
    assert torch.equal(GPT.from_pretrained(str(base)).lm_head.weight, GPT.from_pretrained(checkpoint).lm_head.weight)


# --- other words ---------------------------------------------------------------------------------


def set_vocabulary(base, n):
    """The folder's config says n tokens; its weights, which are not looked at here, stay as they are."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": n}))


def gpt2_words():
    """{word: id} as GPT-2's vocab.json spells them: bytes that do not print are letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in plain)}
    encoding = gpt2_encoding()
    words = ["".join(letters[byte] for byte in encoding.decode_single_token_bytes(i)) for i in range(50256)]
    return {word: i for i, word in enumerate(words)} | {"<|endoftext|>": 50256}


def other_words():
    """As many words, of a tokenizer that was trained on other texts."""
    words = list(gpt2_words())
    return {word: i for i, word in enumerate([*words[:256], *reversed(words[256:])])}


def fast(vocabulary, kind="BPE"):
    return json.dumps({"version": "1.0", "model": {"type": kind, "vocab": vocabulary, "merges": []}})


FOREIGN = {  # a tokenizer's file: its content
    "tokenizer.json": {"other words": lambda: fast(other_words()), "few": lambda: fast({"a": 0}, "WordPiece")},
    "vocab.json": {"other words": lambda: json.dumps(other_words()), "damaged": lambda: '{"a": 0,'},
    "vocab.txt": {"BERT's": lambda: "[PAD]\n[UNK]\nthe\n"},
    "tokenizer.model": {"sentencepiece's": lambda: "\x0a\x0e"},
}


@pytest.mark.parametrize("name, kind", [(name, kind) for name, kinds in FOREIGN.items() for kind in kinds])
@pytest.mark.parametrize("n", [50257, 52000])
def test_a_foreign_tokenizer_is_refused(base, name, kind, n):
    """Lost if it fails: a model of other words is trained on GPT-2's token ids, which mean nothing to it."""
    set_vocabulary(base, n)
    (base / name).write_text(FOREIGN[name][kind](), encoding="utf-8")
    line = error_line(lambda: check_vocabulary(str(base)))
    assert str(base / name) in line


def test_a_unigram_tokenizer_is_refused(base):
    """Lost if it fails: a list of words in place of a table is a traceback."""
    set_vocabulary(base, 50257)
    (base / "tokenizer.json").write_text(fast([["<unk>", 0.0], ["a", -1.5]], "Unigram"))
    assert "tokenizer.json" in error_line(lambda: check_vocabulary(str(base)))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("n", [50257, 50258, 50304])
def test_gpt2s_own_tokenizer_goes_on(base, capsys, name, n):
    """Lost if it fails: a folder that transformers saved with its tokenizer, or with a token added, is shut out."""
    set_vocabulary(base, n)
    words = gpt2_words() | ({"[PAD]": 50257} if n > 50257 else {})
    (base / name).write_text(fast(words) if name == "tokenizer.json" else json.dumps(words), encoding="utf-8")
    check_vocabulary(str(base))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("n", [301, 21128, 50256])
def test_a_small_vocabulary_is_refused(base, n):
    """Lost if it fails: the first batch ends in an IndexError."""
    set_vocabulary(base, n)
    assert f"vocab_size={n}" in error_line(lambda: check_vocabulary(str(base)))


@pytest.mark.parametrize("n, notes", [(50257, 0), (50260, 0), (50304, 0), (52000, 1)])
def test_a_larger_vocabulary_goes_on(base, capsys, n, notes):
    """Lost if it fails: nanoGPT's padded checkpoints are refused, or a vocabulary of who knows what passes unseen."""
    set_vocabulary(base, n)
    check_vocabulary(str(base))
    out = capsys.readouterr().out
    assert out.count("\n") == notes and (not notes or (str(base) in out and out.startswith("note: ")))


# --- the base of a run ---------------------------------------------------------------------------


def check(base, then):
    check_same_weights(str(base), then, "out")


def save_sharded(hf, base, tmp_path):
    hf.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    (base / "model.safetensors").unlink()
    for file in (tmp_path / "shards").iterdir():
        shutil.copy(file, base)


def without_prefix(hf, base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in reversed(tensors.items())}
    tensors |= {"lm_head.weight": tensors["wte.weight"].clone(), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(tensors, base / "model.safetensors")


def save_as(*dtypes):
    def save(hf, base, tmp_path):
        for dtype in dtypes:
            rewrite(base, lambda tensors, dtype=dtype: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))

    return save


SAVED_ANEW = {  # the same weights
    "by transformers": lambda hf, base, tmp_path: hf.save_pretrained(base),
    "by us": lambda hf, base, tmp_path: GPT.from_pretrained(str(base)).save_pretrained(str(base)),
    "in shards": save_sharded,
    "in the hub's old layout": without_prefix,
    "in bfloat16": save_as(torch.bfloat16),
    "in float16": save_as(torch.float16),
    "in float64": save_as(torch.float64),
    "in bfloat16 and back": save_as(torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("how", SAVED_ANEW)
def test_weights_that_were_saved_anew_are_the_same_base(hf, base, tmp_path, how):
    """Lost if it fails: who tidies up or halves a base's files cannot go on with any run on it."""
    then = json.loads(json.dumps(fingerprint_base(str(base))))  # as a run's settings keep it
    SAVED_ANEW[how](hf, base, tmp_path)
    check(base, then)
    saved_anew = fingerprint_base(str(base))
    check(base, saved_anew)
    hf.save_pretrained(base)
    check(base, saved_anew)


def scale_all(factor):
    return lambda tensors: [tensor.mul_(factor) for tensor in tensors.values()]


OTHERS = {  # what has happened to the weights
    "all new": lambda tensors: [tensor.normal_() for tensor in tensors.values()],
    "one matrix": lambda tensors: tensors["transformer.h.2.mlp.c_fc.weight"].normal_(),
    "one bias": lambda tensors: tensors["transformer.h.0.ln_1.bias"].add_(0.01),
    "trained on a little": scale_all(1.001),
    "trained on a little, in bfloat16": scale_all(1.01),
    "a number in a vector's place": lambda tensors: tensors.update({"transformer.ln_f.bias": torch.tensor(0.5)}),
    "two layers in each other's place": lambda tensors: tensors.update(
        {
            "transformer.h.0.attn.c_proj.weight": tensors["transformer.h.1.attn.c_proj.weight"].clone(),
            "transformer.h.1.attn.c_proj.weight": tensors["transformer.h.0.attn.c_proj.weight"].clone(),
        }
    ),
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_weights_are_another_base(base, how):
    """Lost if it fails: an adapter is put on weights that it was not trained on, and answers garbage."""
    if "bfloat16" in how:
        save_as(torch.bfloat16)(None, base, None)
    then = fingerprint_base(str(base))
    rewrite(base, OTHERS[how])
    line = error_line(lambda: check(base, then))
    assert str(base) in line and "--out_dir" in line


def test_a_run_that_does_not_know_its_base_opens(base):
    """Lost if it fails: runs from before cannot be scored any more."""
    check(base, None)
    check("scratch", fingerprint_base("scratch"))


def test_a_base_is_not_written_over(base, tmp_path, monkeypatch):
    """Lost if it fails: full fine-tuning into the base's own folder costs the base."""
    os.symlink(base, tmp_path / "link")
    (tmp_path / "sub").mkdir()
    os.makedirs(tmp_path / "linked" / "files")
    os.rename(base / "model.safetensors", tmp_path / "linked" / "files" / "model.safetensors")
    os.symlink(tmp_path / "linked" / "files" / "model.safetensors", base / "model.safetensors")
    monkeypatch.chdir(tmp_path / "sub")
    names = [str(base), f"{base}/", "../base", "../link", str(tmp_path / "link"), f"{base}/../sub/../base"]
    before = sorted(os.walk(tmp_path))
    for init_from in names:
        for out_dir in (*names, str(tmp_path / "linked" / "files")):
            config = SimpleNamespace(init_from=init_from, out_dir=out_dir, rank=0, facts=None)
            assert out_dir in error_line(partial(check_base_stays, config))
    assert sorted(os.walk(tmp_path)) == before
    goes_on = [{"out_dir": f"{base}/out"}, {"out_dir": str(tmp_path / "linked")}, {"out_dir": str(tmp_path)}]
    goes_on += [{"rank": 4, "out_dir": str(base)}, {"facts": Facts(), "out_dir": str(base)}]
    goes_on += [{"init_from": "scratch", "out_dir": str(base)}]
    for values in goes_on:
        check_base_stays(SimpleNamespace(**{"rank": 0, "facts": None, "init_from": str(base)} | values))


# --- in the programs -----------------------------------------------------------------------------


def replace_base(place, name, factor=1.5):
    """The weights in a folder are now others of the same sizes."""
    path = place / name / "model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor * factor for key, tensor in tensors.items()}, path)


def programs(folder):
    """What reads a run's base: {name: what it does}; each ends in an error where the base is another."""
    (folder / "new.csv").write_text("text\nthe plot was awful\n")
    argv = ["--init_from=resume", f"--out_dir={folder}", "--device=cpu", "--dtype=float32"]
    return {
        "train": lambda: here([*argv, "--max_iters=6"]),
        "score": lambda: generate.main(configure(argv, trains=False)),
        "predict": lambda: generate.main(configure([*argv, f"--predict={folder}/new.csv"], trains=False)),
        "start": lambda: generate.main(configure([*argv, "--start=The film"], trains=False)),
        "anatomy": lambda: anatomy.main([str(folder)]),
    }


@pytest.mark.parametrize("program", ["train", "score", "predict", "start", "anatomy"])
def test_a_run_on_another_base_is_refused_by_every_program(place, capsys, program):
    """Lost if it fails: a run's accuracy falls to nothing without a word, or its training goes on from elsewhere."""
    base = shutil.copytree(place / "base", place / f"base-{program}")
    folder = place / f"run-{program}"
    here(flags(place, folder.name, init_from=base, rank=2, alpha=8, max_iters=2, eval_interval=2))
    capsys.readouterr()
    run = programs(folder)[program]
    replace_base(place, base.name)
    with pytest.raises(SystemExit) as stop:
        run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(base) in err
    GPT.from_pretrained(str(place / "base")).save_pretrained(str(base))  # the old ones again, saved anew
    run()
    replace_base(place, base.name)
    path = folder / "train_config.json"  # as a run of before: it does not know its base
    stored = json.loads(path.read_text())
    del stored["facts"]["base"], stored["sha256"]
    path.write_text(json.dumps(stored))
    run()


def test_a_run_that_trained_all_weights_knows_its_own(place, capsys):
    """Lost if it fails: another model that lies in the run's folder is scored as the run's."""
    folder = place / "run-full"
    base = shutil.copytree(place / "base", place / "base-full")
    here(flags(place, folder.name, init_from=base, rank=0, max_iters=2, eval_interval=2))
    shutil.rmtree(base)  # it is no longer needed
    accuracy = ModelSampler(str(folder), device="cpu").get_accuracy()
    GPT.from_pretrained(str(folder)).save_pretrained(str(folder), dtype=torch.bfloat16)  # halved on purpose
    assert ModelSampler(str(folder), device="cpu").get_accuracy() == pytest.approx(accuracy, abs=0.1)
    replace_base(place, folder.name)
    sampler = ModelSampler(str(folder), device="cpu")
    with pytest.raises(ValueError, match=str(folder)):
        sampler.get_accuracy()
    assert make_config(init_from="resume", out_dir=str(folder)).facts.base


def test_full_fine_tuning_into_the_bases_folder_is_refused(place, capfd):
    """Lost if it fails: the base is gone, and with it every adapter that was trained on it."""
    base = shutil.copytree(place / "base", place / "base-itself")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    os.symlink(base, place / "another-name")
    for out_dir in ("base-itself", "another-name", "base/../base-itself"):
        done = start("train.py", *flags(place, out_dir, init_from=base, rank=0, max_iters=2))
        _, err = finish(done, code=2)
        assert err.count("\n") == 1 and str(place / out_dir) in err
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_base_of_other_words_is_refused_before_training(place, capfd):
    """Lost if it fails: training begins on token ids that mean something else, or ends in an IndexError."""
    base = shutil.copytree(place / "base", place / "base-words")
    (base / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    assert "vocab.txt" in one_line_of(capfd, flags(place, "words", init_from=base, rank=2, alpha=8))
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        ModelSampler(init_from=str(base), device="cpu")
    assert not (place / "words").exists()
    (base / "vocab.txt").unlink()
    set_vocabulary(base, 21128)
    config = configure([f"--init_from={base}", f"--out_dir={place}/text"], cls=pretrain.PretrainConfig)
    with pytest.raises(ValueError, match="21128"):
        pretrain.set_up(config)
