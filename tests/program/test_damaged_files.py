"""Damaged and hostile files: the right result or one clear line, never a traceback, wrong weights, or code that runs.

python -m pytest tests/program/test_damaged_files.py
"""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import flags, one_line_of, resume
from safetensors.torch import load_file

import train
from configurator import configure
from dataloader import CustomDataLoader
from model import GPT, GPTConfig
from plumbing.adapters.peft_format import load_adapter
from plumbing.adapters.trainable import lora_state_dict
from plumbing.data import token_cache
from plumbing.running.checkpoint import begin_or_resume


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small model (base), reviews (rows.jsonl), and a run on them with LoRA (run)."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=50257, block_size=64)).save_pretrained(
        str(folder / "base")
    )
    rows = [{"text": f"film {i}", "label": "yes" if i % 2 else "no"} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [f"--init_from={folder}/base", f"--dataset={folder}/rows.jsonl", "--device=cpu", "--dtype=float32"]
    train.train(
        configure([*argv, "--rank=2", "--max_iters=2", "--lr=0.1", "--batch_size=8", f"--out_dir={folder}/run"])
    )
    return folder


FINENESS = int(os.environ.get("DAMAGES", 1))  # `make slow` takes three times as many


def damages(data):
    """A file's content cut at every 3 % of its length, with one bit flipped at 66 places, and empty."""
    rng = random.Random(len(data))
    for part in range(33 * FINENESS):
        yield f"cut at {part} of {33 * FINENESS}", data[: len(data) * part // (33 * FINENESS)]
    for _ in range(67 * FINENESS):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        yield f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def right_or_one_line(damaged, read, expected, named):
    """`read()` gives what it gives for the whole file, or an error of one line that names it."""
    try:
        found = read()
    except (ValueError, OSError) as e:
        assert named in str(e) and "\n" not in str(e), f"{damaged}: {e}"
        return 1
    except SystemExit as e:
        assert e.code == 2, damaged
        return 1
    assert found.keys() == expected.keys(), damaged
    assert all(found[k].tobytes() == expected[k].tobytes() for k in found), damaged
    return 0


def numpy(state):
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapter(place, tmp_path, name):
    """Lost if it fails: a disk's error becomes a model that answers wrongly, and nobody knows."""
    shutil.copytree(place / "run", tmp_path / "run")

    def read():
        model = GPT.from_pretrained(str(place / "base"))
        load_adapter(model, str(tmp_path / "run"))
        state = numpy(lora_state_dict(model))
        return state | {"scale": np.array(model.transformer.h[0].attn.c_attn.lora_scaling)}

    expected, data = read(), (tmp_path / "run" / name).read_bytes()
    refused = 0
    for damaged, content in damages(data):
        (tmp_path / "run" / name).write_bytes(content)
        refused += right_or_one_line(damaged, read, expected, "adapter_")
    assert refused > 33 * FINENESS
    os.remove(tmp_path / "run" / name)
    (tmp_path / "run" / name).mkdir()
    assert right_or_one_line("a directory", read, expected, "adapter_") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_model(place, tmp_path, name):
    """Lost if it fails: a download that went wrong is fine-tuned as noise."""
    shutil.copytree(place / "base", tmp_path / "base")

    def read():
        model = GPT.from_pretrained(str(tmp_path / "base"))
        return numpy(dict(model.named_parameters())) | {"heads": np.array(model.config.n_head)}

    expected, data = read(), (tmp_path / "base" / name).read_bytes()
    refused = 0
    for damaged, content in damages(data):
        (tmp_path / "base" / name).write_bytes(content)
        refused += right_or_one_line(damaged, read, expected, str(tmp_path / "base"))
    assert refused > 33 * FINENESS


def test_damaged_checkpoint(place, tmp_path):
    """Lost if it fails: a resumed run goes on from other weights than it had."""
    shutil.copytree(place / "run", tmp_path / "run")
    config = configure(["--init_from=resume", f"--out_dir={tmp_path}/run", "--device=cpu"])
    path = tmp_path / "run" / "checkpoint.pt"

    def read():
        model = train.build_model(config, "cpu", torch.float32)
        run = train.make_run(config, train.Processes(config), torch.float32, None, model)
        progress = begin_or_resume(run)
        state = numpy({n: p for n, p in model.named_parameters() if p.requires_grad})
        saved = run.optimizers[0].state.values()
        moments = {f"{i} {k}": np.array(v) for i, s in enumerate(saved) for k, v in s.items()}
        return state | moments | {"iter": np.array(progress.iter)}

    expected, data = read(), path.read_bytes()
    refused = 0
    for damaged, content in damages(data):
        path.write_bytes(content)
        refused += right_or_one_line(damaged, read, expected, "checkpoint.pt")
    assert refused > 33 * FINENESS


def test_damaged_settings(place, tmp_path, capsys):
    """Lost if it fails: a resumed run trains with another learning rate than it began with."""
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "train_config.json"

    def read():
        config = configure(["--init_from=resume", f"--out_dir={tmp_path}/run"])
        return {k: np.array(str(v)) for k, v in vars(config).items()}

    expected, data = read(), path.read_bytes()
    for damaged, content in damages(data):
        path.write_bytes(content)
        right_or_one_line(damaged, read, expected, "train_config.json")
        assert capsys.readouterr().err.count("\n") <= 1, damaged


@pytest.mark.parametrize("name", ["index", "tokens", "texts", "meta.json"])
def test_damaged_cache_is_made_anew(place, tmp_path, monkeypatch, name):
    """Lost if it fails: tokens that a disk has changed are trained on, run after run."""
    monkeypatch.setattr(token_cache, "CACHE", str(tmp_path))

    def read():
        loader = CustomDataLoader(str(place / "rows.jsonl"), wanted=("train",))
        return {str(i): np.array([*ex.tokens, ex.n_prompt, ex.label]) for i, ex in enumerate(loader.splits["train"])}

    expected = read()
    (path,) = tmp_path.glob(f"examples-*/train/{name}")
    data = path.read_bytes()
    for damaged, content in list(damages(data))[::10]:
        path.write_bytes(content)
        assert right_or_one_line(damaged, read, expected, "") == 0


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_damaged_data_is_one_line_or_read(tmp_path, kind):
    """Lost if it fails: a data file that was cut short ends in a traceback."""
    rows = [{"text": f"film {i}", "label": "yes" if i % 2 else "no"} for i in range(60)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("text,label\n" + "\n".join(f"{r['text']},{r['label']}" for r in rows))
    for damaged, content in list(damages(path.read_bytes()))[::6]:
        path.write_bytes(content)
        try:
            CustomDataLoader(str(path))
        except (ValueError, OSError) as e:
            assert "\n" not in str(e), damaged


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, sign):
        self.sign = str(sign)

    def __reduce__(self):
        return os.mkdir, (self.sign,)


def test_a_pickle_bomb_does_not_go_off(place, tmp_path, capsys):
    """Lost if it fails: opening a file that somebody sent runs their program."""
    sign = tmp_path / "went-off"
    with open(tmp_path / "bomb", "wb") as f:
        pickle.dump(Bomb(sign), f)
    torch.save({"progress": Bomb(sign), "trained": {}}, tmp_path / "bomb.pt")
    places = ["checkpoint.pt", "adapter_model.safetensors", "adapter_config.json", "train_config.json"]
    for bomb in ("bomb", "bomb.pt"):
        for name in places:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(place / "run", tmp_path / "run")
            shutil.copy(tmp_path / bomb, tmp_path / "run" / name)
            with pytest.raises((SystemExit, ValueError)):
                config = configure(
                    ["--init_from=resume", f"--out_dir={tmp_path}/run", "--device=cpu", "--max_iters=4"]
                )
                load_adapter(GPT.from_pretrained(str(place / "base")), config.out_dir)
                train.train(config)
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(place / "base", tmp_path / "base")
        shutil.copy(tmp_path / bomb, tmp_path / "base" / "pytorch_model.bin")
        os.remove(tmp_path / "base" / "model.safetensors")
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            GPT.from_pretrained(str(tmp_path / "base"))
        for kind in ("csv", "jsonl", "parquet", "txt"):
            shutil.copy(tmp_path / bomb, tmp_path / f"data.{kind}")
            with pytest.raises((ValueError, OSError)):
                CustomDataLoader(str(tmp_path / f"data.{kind}"))
    with pytest.raises(SystemExit):
        (tmp_path / "config.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
        configure([str(tmp_path / "config.py")])
    with pytest.raises(ValueError):
        (tmp_path / "script.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
        CustomDataLoader(str(tmp_path / "script.py"))
    assert not sign.exists()


def test_the_base_that_an_adapter_names_is_only_a_name(place, tmp_path):
    """Lost if it fails: an adapter from elsewhere makes the program open a path or an address of its choice."""
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    for base in ("../../etc/passwd", "https://example.org/model", "/dev/zero"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        model = GPT.from_pretrained(str(place / "base"))
        assert load_adapter(model, str(tmp_path / "run"))["base_model_name_or_path"] == base
    (tmp_path / "base").mkdir()
    index = {"weight_map": {"wte.weight": "../../../etc/passwd"}}
    shutil.copy(place / "base" / "config.json", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "base" / "passwd")):
        GPT.from_pretrained(str(tmp_path / "base"))


def test_checksum_is_of_what_other_readers_see(place):
    """Lost if it fails: the checksum passes while safetensors itself reads other tensors."""
    tensors = load_file(place / "run" / "adapter_model.safetensors")
    model = GPT.from_pretrained(str(place / "base"))
    load_adapter(model, str(place / "run"))
    assert {n.removesuffix(".weight").removeprefix("base_model.model.") for n in tensors} == set(
        lora_state_dict(model)
    )


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def scribbled(path):
    path.write_bytes(b"not what it was " * 40)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_short, emptied, scribbled])
@pytest.mark.parametrize("file", ["checkpoint.pt", "train_config.json"])
def test_a_damaged_run_is_named(place, tmp_path, capfd, file, damage):
    """Otherwise a full disk's half-written file ends in a traceback, or resumes from noise."""
    shutil.copytree(place / "run", tmp_path / "run")
    damage(tmp_path / "run" / file)
    assert str(tmp_path / "run" / file) in one_line_of(capfd, resume(tmp_path, "run"))


@pytest.mark.parametrize("damage", [cut_short, emptied, scribbled, removed])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_base_model_is_named(place, tmp_path, capfd, file, damage):
    """Otherwise a download that was cut short ends in a traceback, or trains on noise."""
    shutil.copytree(place / "base", tmp_path / "base")
    damage(tmp_path / "base" / file)
    line = one_line_of(
        capfd, flags(place, "never", init_from=tmp_path / "base", dataset=place / "rows.jsonl", rank=2)
    )
    assert str(tmp_path / "base" / file) in line
