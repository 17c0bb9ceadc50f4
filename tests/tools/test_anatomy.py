"""anatomy.py: its measures are those of full singular value decompositions; it reads any adapter in PEFT's format.

python -m pytest tests/tools/test_anatomy.py
"""

import math
import shutil

import pytest
import torch
from conftest import SIZES, close
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaForSequenceClassification

from tools import anatomy
from tools.report import directions

N_OUT, N_IN, R = 30, 40, 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(n, k, seed):
    """(n, k): a random orthonormal basis."""
    return torch.linalg.qr(draw(n, k, seed=seed))[0]


# --- the measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N_OUT, N_IN, R), (12, 5, 7)], ids=["thin", "rank above a side"])
def test_measures_are_those_of_the_full_matrices(shape):
    """Lost if it fails: every number of the table is that of another matrix than the update."""
    n_out, n_in, r = shape
    W0, A, B = draw(n_out, n_in, seed=1), draw(r, n_in, seed=2), draw(n_out, r, seed=3)
    D = 1.7 * B @ A
    U, s, Vt = torch.linalg.svd(D, full_matrices=False)
    k = min(shape)
    U, s, V = U[:, :k], s[:k], Vt[:k].t()
    layer = directions.study_layer("layer", W0, A, B, 1.7)
    close(layer.singular_values, s, atol=1e-9)
    close(layer.norm, D.norm(), atol=1e-9)
    close(layer.w0_norm, W0.norm(), atol=1e-9)
    assert layer.n_directions == next(n for n in range(1, k + 1) if s[:n].square().sum() >= 0.9 * D.square().sum())
    close(layer.stressed, (U.t() @ W0 @ V).norm(), atol=1e-9)
    U0, _, V0t = torch.linalg.svd(W0)
    close(layer.own, (U0[:, :k].t() @ W0 @ V0t[:k].t()).norm(), atol=1e-9)
    close(layer.amplification, D.norm() / (U.t() @ W0 @ V).norm(), atol=1e-9)


def test_amplification_of_planted_directions():
    """Lost if it fails: an update that repeats W0's own directions passes for a new one, or the other way."""
    U, V = basis(N_OUT, 12, 1), basis(N_IN, 12, 2)
    W0 = 5 * U[:, :4] @ V[:, :4].t() + 0.1 * U[:, 4:] @ V[:, 4:].t()
    same = directions.study_layer("same", W0, V[:, :4].t(), U[:, :4], 2.0)
    close(same.stressed, torch.tensor(10.0, dtype=torch.float64), atol=1e-9)  # four directions of 5: sqrt(4 * 25)
    close(same.own, torch.tensor(10.0, dtype=torch.float64), atol=1e-9)
    close(same.amplification, torch.tensor(0.4, dtype=torch.float64), atol=1e-9)
    new = directions.study_layer("new", W0, V[:, 4:8].t(), U[:, 4:8], 2.0)
    close(new.stressed, torch.tensor(0.2, dtype=torch.float64), atol=1e-9)
    close(new.amplification, torch.tensor(20.0, dtype=torch.float64), atol=1e-9)
    untrained = directions.study_layer("untrained", W0, V[:, :4].t(), torch.zeros(N_OUT, 4), 2.0)
    assert (untrained.norm, untrained.n_directions, untrained.amplification) == (0, 0, 0)


def test_similarity_of_planted_subspaces():
    """Lost if it fails: equal directions do not show, or unrelated ones do."""
    shared, rest = basis(N_IN, 12, 3)[:, :3], basis(N_IN, 12, 3)[:, 3:]
    turn = torch.linalg.qr(draw(3, 3, seed=4))[0]
    A = torch.cat([9 * turn @ shared.t(), rest[:, :2].t()])  # its three strongest directions span `shared`
    other = torch.cat([7 * shared.t(), rest[:, 2:].t()])
    V, O = directions.input_directions(A), directions.input_directions(other)
    phi = directions.measure_similarity(V, O)
    assert phi.shape == (5, 10)
    close(phi[2, 2], torch.tensor(1.0, dtype=torch.float64), atol=1e-9)  # the same three
    close(phi[4, 2], torch.tensor(1.0, dtype=torch.float64), atol=1e-9)  # three within five
    close(phi[4, 9], torch.tensor(0.6, dtype=torch.float64), atol=1e-9)  # three of five
    for i in range(1, 6):
        for j in range(1, 11):
            plain = torch.linalg.svdvals(V[:, :i].t() @ O[:, :j]).square().sum() / min(i, j)
            close(phi[i - 1, j - 1], plain, atol=1e-9)


def test_the_random_baselines_are_those_of_random_subspaces():
    """Lost if it fails: what is unrelated looks related beside a baseline that is too low."""
    n_draws = 300
    W0 = draw(N_OUT, N_IN, seed=1)
    similarity = torch.zeros(4, 9, dtype=torch.float64)
    square = 0.0
    for seed in range(n_draws):
        similarity += directions.measure_similarity(basis(N_IN, 4, seed), basis(N_IN, 9, seed + n_draws)) / n_draws
        square += (basis(N_OUT, R, seed).t() @ W0 @ basis(N_IN, R, seed + n_draws)).square().sum() / n_draws
    close(directions.random_similarity(4, 9, N_IN).double(), similarity, atol=0.03)
    layer = directions.study_layer("layer", W0, draw(R, N_IN), draw(N_OUT, R), 1.0)
    assert layer.random == pytest.approx(math.sqrt(square), rel=0.05)


# --- adapters that PEFT saved ---------------------------------------------------------------------


def save_trained(model, folder, seed, **options):
    """An adapter with random A and B on a model, as PEFT saves it. Returns PEFT's model."""
    peft = get_peft_model(model, LoraConfig(lora_alpha=5, **options))
    with torch.no_grad():
        for i, (name, param) in enumerate(peft.named_parameters()):
            if "lora_" in name:
                param.copy_(draw(*param.shape, seed=seed + i) * 0.1)
    peft.save_pretrained(folder)
    return peft


def roberta():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=60, max_position_embeddings=20, **sizes))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two adapters on a small random RoBERTa (one, two) and the base."""
    folder = tmp_path_factory.mktemp("anatomy")
    roberta().save_pretrained(folder / "base")
    options = {"target_modules": ["query", "value", "intermediate.dense"], "task_type": "SEQ_CLS"}
    for name, rank, seed in (("one", 4, 1), ("two", 9, 100)):
        model = RobertaForSequenceClassification.from_pretrained(folder / "base")
        save_trained(model, folder / name, seed, r=rank, use_rslora=True, **options)
    return folder


def test_an_adapter_of_another_architecture(place, capsys):
    """Lost if it fails: only GPT-2's adapters can be looked into."""
    anatomy.main([str(place / "one"), str(place / "two")])
    out = capsys.readouterr().out
    model = RobertaForSequenceClassification.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(model, place / "one").base_model.model
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        words = next(line for line in out.splitlines() if line.startswith(name)).split()
        assert words[1] == f"{layer.base_layer.weight.norm():.2f}"
        assert words[2] == f"{layer.get_delta_weight('default').norm():.3f}"
    assert len(layers) == 6


def test_a_conv1d_whose_base_was_saved_without_its_prefix(tmp_path):
    """Lost if it fails: GPT-2's weights, stored the other way round, are measured across, or not found."""
    torch.manual_seed(0)
    GPT2Model(GPT2Config(**SIZES)).save_pretrained(tmp_path / "base")  # h.0.attn ..., not transformer.h.0.attn ...
    peft = save_trained(GPT2Model.from_pretrained(tmp_path / "base"), tmp_path / "one", 1, target_modules=["c_proj"])
    adapter = directions.Adapter(str(tmp_path / "one"))
    layers = list(directions.study(adapter, directions.Base(str(tmp_path / "base"))))
    assert len(layers) == 6
    for x in layers:
        layer = peft.base_model.model.get_submodule(x.name)
        W0, D = layer.base_layer.weight.detach().double(), layer.get_delta_weight("default").detach().double()
        U, _, Vt = torch.linalg.svd(D, full_matrices=False)
        assert x.stressed == pytest.approx(float((U[:, :8].t() @ W0 @ Vt[:8].t()).norm()), rel=1e-4)


def test_what_cannot_be_read_is_one_line(place, tmp_path, capsys):
    """Lost if it fails: a wrong folder ends in a traceback, or in numbers of things that do not belong together."""
    shutil.copytree(place / "one", tmp_path / "moved")
    config = tmp_path / "moved" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(place / "base"), str(tmp_path / "gone")))
    GPT2Model(GPT2Config(**SIZES)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    save_trained(roberta(), tmp_path / "dora", 1, target_modules=["query"], use_dora=True)
    capsys.readouterr()
    for argv, words in (
        ([], "required: adapter"),
        ([place / "base"], "holds no adapter"),
        ([tmp_path / "moved"], "type --base=DIRECTORY"),
        ([place / "one", "--base", tmp_path / "empty"], "no safetensors file"),
        ([place / "one", "--base", tmp_path / "gpt2"], "is not the adapter's base"),
        ([tmp_path / "dora"], "more than plain LoRA"),
    ):
        with pytest.raises(SystemExit) as stop:
            anatomy.main(list(map(str, argv)))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count("\n") == 1, (argv, err)
