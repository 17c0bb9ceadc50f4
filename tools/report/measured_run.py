"""A training, and after it what the claims compare: measures.npz in its folder. The flags are train.py's.

Weights that are larger than an adapter, and the checkpoint, are removed: a sweep makes hundreds of such runs.
"""

import contextlib
import os
import re
import sys
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

import train
from configurator import configure
from dataloader import make_loader
from generate import ModelSampler
from model import GPT
from plumbing.program.files import whole_file
from plumbing.running.checkpoint import CHECKPOINT
from tools.report.directions import count_directions
from tools.runs.run import MEASURES

EVERY = 3  # of the validation texts one in so many is read whole: reading 50,257 logits a word takes time
N_FIRST = 10  # singular vectors of a tuned weight that may be intruders (Shuttleworth et al. 2024, section 3)
NEAR = 0.6  # the cosine with one of W0's, below which they are


def main(argv: list[str]) -> None:
    train.main(argv)
    folder = configure(argv).out_dir
    found = measure(ModelSampler(folder))
    with whole_file(os.path.join(folder, MEASURES)) as f:
        np.savez(f, **found)
    for name in (CHECKPOINT, "model.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def measure(sampler: ModelSampler) -> dict[str, np.ndarray]:
    """ "text", each text's loss in nats a token. Of a run that was scored by its labels also "label", their losses in
    the validation and the test split, by which no run chose anything; of another one what `study_updates` finds."""
    sampler.load_model()
    config = sampler.config
    found = {"text": measure_text(sampler)}
    if config.loss_on == "all":
        return found | study_updates(sampler)
    loader = make_loader(config, sampler.block_size, wanted=("validation", "test"))
    return found | {"label": np.concatenate([losses_of(sampler, loader, s) for s in ("validation", "test")])}


def measure_text(sampler: ModelSampler) -> np.ndarray:
    """The loss of each text's own words, (n,)."""
    loader = make_loader(replace(sampler.config, loss_on="all"), sampler.block_size, wanted=("validation",))
    return losses_of(sampler, loader, "validation", EVERY)


@torch.no_grad()
def losses_of(sampler, loader, split, every=1) -> np.ndarray:
    """(n,): the mean loss of one example in `every`, over its scored tokens or, where all are scored, its text's."""
    indices = np.arange(0, len(loader.splits[split]), every)
    by_length = np.argsort(loader.splits[split].lengths[indices], kind="stable")
    losses = np.empty(len(indices))
    for places in np.array_split(by_length, -(-len(indices) // loader.batch_size)):
        batch = loader.batch(split, indices[places])
        if loader.loss_on == "all":
            for row, n_prompt in zip(batch.targets, loader.splits[split].n_prompt[indices[places]]):
                row[n_prompt - 1 :] = -1  # the label
        batch = batch.to(sampler.device)
        logits, _ = sampler.model(batch.idx, batch.targets, prefix=batch.prefix)  # (N, V) of the scored places
        scored = batch.targets >= 0  # (B, T), N of them True
        each = F.cross_entropy(logits.float(), batch.targets[scored], reduction="none")  # (N,)
        rows = scored.nonzero()[:, 0]  # (N,): whose token it is
        sums = each.new_zeros(len(places)).index_add(0, rows, each)
        losses[places] = (sums / scored.sum(1)).cpu().numpy()
    return losses


@torch.no_grad()
def study_updates(sampler: ModelSampler) -> dict[str, np.ndarray]:
    """Of each layer's update W - W0: "directions", how many hold 90 % of its square norm; and "intruders", how many
    of the first singular vectors of W are near to none of W0's. W holds the merged update."""
    base = GPT.from_pretrained(sampler.config.init_from)
    found = {"directions": [], "intruders": []}
    for name, layer in sampler.model.named_modules():
        if not re.search(sampler.config.lora_targets, name):
            continue
        W0 = base.get_submodule(name).weight.to(layer.weight).float()  # (out, in), rounded as W is
        W = layer.weight.float()
        found["directions"].append(count_directions(torch.linalg.svdvals((W - W0).double())))
        U, U0 = (torch.linalg.svd(M, full_matrices=False)[0] for M in (W, W0))
        nearest = (U[:, :N_FIRST].t() @ U0).abs().amax(1)  # (N_FIRST,)
        found["intruders"].append(int((nearest < NEAR).sum()))
    return {name: np.array(values) for name, values in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
