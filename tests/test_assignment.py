"""The assignment to the letter: what its grader checks, what its handout types, and a lora.py of one's own.

python -m pytest tests/test_assignment.py
"""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, close, finish, start
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2LMHeadModel

from lora import LoRALinear, mark_only_lora_as_trainable

LAYERS = [(10, 5, 2, 2), (100, 10, 5, 2), (10, 5, 4, 3), (100, 10, 5, 2)]  # in, out, rank, alpha


def adapted(n_in, n_out, rank, alpha, merged=False):
    """A layer whose A and B are replaced by random parameters, and whose flag is set by hand."""
    torch.manual_seed(0)
    layer = LoRALinear(n_in, n_out, lora_rank=rank, lora_alpha=alpha, lora_dropout=0.0)
    layer.lora_A = nn.Parameter(torch.randn(rank, n_in))
    layer.lora_B = nn.Parameter(torch.randn(n_out, rank))
    layer.has_weights_merged = merged
    return layer


def delta(layer, rank, alpha):
    return alpha / rank * layer.lora_B @ layer.lora_A


# --- the grader's seven checks ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora.py", "model.py", "dataloader.py", "train.py", "generate.py"])
def test_1_the_files_exist(name):
    """Otherwise a submission is not even looked at."""
    assert (REPO / name).is_file()


def test_2_construction_draws_what_the_handout_draws():
    """Otherwise a seeded run starts from other matrices than everyone else's."""
    torch.manual_seed(2024)
    ours = []
    for n_in, n_out, rank, alpha in LAYERS:
        layer = LoRALinear(n_in, n_out, lora_rank=rank, lora_alpha=alpha, lora_dropout=0.1)
        layer.reset_parameters()
        ours.append(layer)
    torch.manual_seed(2024)
    for layer, (n_in, n_out, rank, _) in zip(ours, LAYERS):
        plain = nn.Linear(n_in, n_out)
        A = torch.empty(rank, n_in)
        for _ in range(2):  # at the constructor's end, and by hand
            plain.reset_parameters()
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)
        assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, torch.zeros(n_out, rank))


@pytest.mark.parametrize("n_in, n_out, rank, alpha", LAYERS)
def test_3_shapes_and_attributes(n_in, n_out, rank, alpha):
    """Otherwise the course's checks do not find what they look at."""
    layer = LoRALinear(n_in, n_out, lora_rank=rank, lora_alpha=alpha, lora_dropout=0.1)
    assert layer.lora_A.shape == (rank, n_in) and layer.lora_B.shape == (n_out, rank)
    assert getattr(layer.lora_dropout, "p", layer.lora_dropout) == 0.1
    assert layer.lora_scaling == alpha / rank
    assert not layer.lora_A.requires_grad and not layer.lora_B.requires_grad
    assert layer.has_weights_merged is False and layer.is_lora()
    plain = LoRALinear(n_in, n_out)
    assert not hasattr(plain, "lora_A") and not plain.is_lora() and plain.has_weights_merged is False


def test_4_only_A_and_B_train():
    """Otherwise the frozen model is trained, or nothing is."""
    model = nn.Sequential(LoRALinear(10, 5, lora_rank=2, lora_alpha=2), nn.Linear(5, 5), LoRALinear(5, 5))
    assert mark_only_lora_as_trainable(model) is model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}


@pytest.mark.parametrize("n_in, n_out, rank, alpha", LAYERS)
def test_5_forward_follows_the_flag(n_in, n_out, rank, alpha):
    """Otherwise the adapter is counted twice once it is merged, or not at all before."""
    x = torch.randn(3, n_in)
    layer = adapted(n_in, n_out, rank, alpha, merged=True)
    close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
    layer.has_weights_merged = False
    close(layer(x), F.linear(x, layer.weight + delta(layer, rank, alpha), layer.bias), atol=1e-5)
    plain = LoRALinear(n_in, n_out)
    for flag in (True, False):
        plain.has_weights_merged = flag
        assert torch.equal(plain(x), F.linear(x, plain.weight, plain.bias))


@pytest.mark.parametrize("n_in, n_out, rank, alpha", LAYERS)
def test_6_train_takes_the_adapter_out(n_in, n_out, rank, alpha):
    """Otherwise training goes on from W0 plus what was merged."""
    layer = adapted(n_in, n_out, rank, alpha)
    before = layer.weight.detach().clone()
    layer.train()
    assert torch.equal(layer.weight, before) and layer.has_weights_merged is False
    layer.has_weights_merged = True
    layer.train()
    close(layer.weight, before - delta(layer, rank, alpha), atol=1e-5)
    assert layer.has_weights_merged is False and layer.training
    plain = LoRALinear(n_in, n_out)
    before = plain.weight.detach().clone()
    for flag in (True, False):
        plain.has_weights_merged = flag
        plain.train()
        assert torch.equal(plain.weight, before) and plain.has_weights_merged is flag


@pytest.mark.parametrize("n_in, n_out, rank, alpha", LAYERS)
def test_7_eval_puts_the_adapter_in(n_in, n_out, rank, alpha):
    """Otherwise inference pays for the adapter's products, or leaves them out."""
    layer = adapted(n_in, n_out, rank, alpha)
    before = layer.weight.detach().clone()
    layer.eval()
    close(layer.weight, before + delta(layer, rank, alpha), atol=1e-5)
    assert layer.has_weights_merged is True and not layer.training
    layer = adapted(n_in, n_out, rank, alpha, merged=True)
    before = layer.weight.detach().clone()
    layer.eval()
    assert torch.equal(layer.weight, before) and layer.has_weights_merged is True
    plain = LoRALinear(n_in, n_out)
    before = plain.weight.detach().clone()
    for flag in (True, False):
        plain.has_weights_merged = flag
        plain.eval()
        assert torch.equal(plain.weight, before) and plain.has_weights_merged is flag


# --- what the handout types ------------------------------------------------------------------------


def run(folder, *command):
    """(stdout, stderr) of a program of the repository, run in `folder`."""
    return finish(start(*command, cwd=folder, TQDM_DISABLE="1"))


def reviews(path, n=160):
    """Reviews with a word that tells, enough to learn something from in a few updates."""
    with open(path, "w") as f:
        f.write("text,label,split\n")
        for i in range(n):
            word, label = (("dreadful", 0), ("delightful", 1))[i % 2]
            split = ("train", "train", "train", "validation", "test")[i // 2 % 5]
            f.write(f"a {word} film number {i},{label},{split}\n")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The repository as a student has it, with data: a copy, so that its lora.py can be replaced."""
    folder = tmp_path_factory.mktemp("course") / "hw"
    ignore = shutil.ignore_patterns(".*", "out*", "__pycache__", "tests", "notebooks")
    shutil.copytree(REPO, folder, ignore=ignore)
    reviews(folder / "reviews.csv")
    return folder


SHORT = ["--init_from=gpt2-mini", "--dataset=reviews.csv", "--label_names=negative,positive", "--batch_size=16"]
SHORT += ["--max_iters=4", "--eval_interval=2", "--dtype=float32", "--dropout=0"]
TRAIN = ["train.py", "config/finetune_params_config.py", "--rank=16", *SHORT]


@pytest.fixture(scope="module")
def scored(course):
    """What scoring shows after the handout's two commands."""
    run(course, *TRAIN)
    return run(course, "generate.py", "--init_from=resume")[0]


def test_the_handouts_commands_follow_one_another(course, scored):
    """Otherwise generate.py looks for the run in another folder than the one that train.py wrote."""
    assert re.search(r"accuracy \d+\.\d\d %.* of 32 examples", scored)
    assert json.loads((course / "out" / "accuracy.json").read_text())["n"] == 32


def test_model_sampler_as_the_handout_has_it(course, scored):
    """Otherwise a notebook that was written for the handout's generate.py does not run."""
    program = """
from generate import ModelSampler
sampler = ModelSampler("out", init_from="resume", device="cpu", max_new_tokens=5, temperature=1.0, top_k=200)
accuracy = sampler.get_accuracy()
assert 0 <= accuracy <= 1 and accuracy == sampler.result["accuracy"] and sampler.result["n"] == 32
text = sampler.generate("a delightful film")
assert isinstance(text, str)
print("fine")
"""
    out, _ = run(course, "-c", program)
    assert out.strip().endswith("fine")


# --- a lora.py of one's own ------------------------------------------------------------------------


def test_a_students_lora_runs_in_place_of_ours(course, scored):
    """Otherwise whoever writes the exercise cannot train with what was written."""
    ours = course / "lora.py"
    kept = ours.read_bytes()
    try:
        shutil.copy(REPO / "tests" / "student_lora.py", ours)
        run(course, *TRAIN, "--out_dir=out-student")
        run(course, "generate.py", "--init_from=resume", "--out_dir=out-student")
    finally:
        ours.write_bytes(kept)
    metrics = {}
    for name, out in (("ours", "out"), ("student", "out-student")):
        lines = (course / out / "metrics.jsonl").read_text().splitlines()
        metrics[name] = [json.loads(line)["val_loss"] for line in lines]
    assert len(metrics["ours"]) == 3 and metrics["ours"][-1] < metrics["ours"][0]
    assert metrics["student"] == pytest.approx(metrics["ours"], rel=1e-4)
    one = load_file(course / "out" / "adapter_model.safetensors")
    other = load_file(course / "out-student" / "adapter_model.safetensors")
    assert one.keys() == other.keys()
    base = GPT2LMHeadModel.from_pretrained(course / "assets" / "gpt2-mini").eval()
    theirs = PeftModel.from_pretrained(base, course / "out-student").eval()
    loaded = dict(theirs.named_parameters())
    for name, tensor in other.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")].detach(), tensor)
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=1e-4)
