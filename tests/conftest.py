"""What several test files share: a small GPT-2 that transformers made, the directory it was saved in, tokens for it,
and adapters that say something."""

import os
import shutil
import tempfile

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from plumbing.adapters.layers import lora_layers
from plumbing.data import token_cache

# What the tests tokenise stays out of the user's cache; the reviews, once downloaded, are taken from there.
OWN = tempfile.TemporaryDirectory(prefix="nanolora-")
if os.path.exists(os.path.join(token_cache.CACHE, "rt_reviews")):
    shutil.copytree(os.path.join(token_cache.CACHE, "rt_reviews"), os.path.join(OWN.name, "rt_reviews"))
os.environ["NANOLORA_CACHE"] = token_cache.CACHE = OWN.name

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 301, "n_positions": 64}


def pytest_addoption(parser):
    text = "where the tests with the marker gpu run: cuda:1, or cpu to try them without a GPU"
    parser.addoption("--gpu-device", help=text)


def tokens(*shape, seed=1):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def base_folder(tmp_path_factory, name, n_layer=1, n_positions=64):
    """A new folder with a small random GPT-2 that transformers saved in it, as `base`."""
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    # The usual range of 0.02 keeps so small a model's logits so even that frozen ones cannot be tuned to anything.
    sizes = {"n_embd": 32, "n_layer": n_layer, "n_head": 2, "n_positions": n_positions, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "base")
    return folder


def finish(process, code=0):
    """What a process wrote: (stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def randomize(model, seed=2):
    """Adapters as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model.train(model.training)  # merged copies follow


@pytest.fixture(scope="session")
def hf():
    """transformers' GPT-2 in eval mode, in which every weight matters. Tests leave it as it is."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **off, bos_token_id=300, eos_token_id=300)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 2:
                param.normal_(std=0.15)  # GPT-2's own 0.02 leaves attention nearly even, and errors in it unseen
            elif name.endswith("weight"):
                param.normal_(mean=1.0, std=0.3)  # LayerNorm; fresh ones are 1 and tell nothing
            else:
                param.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def checkpoint(hf, tmp_path_factory):
    """The directory where transformers saved `hf`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    hf.save_pretrained(directory)
    return str(directory)
