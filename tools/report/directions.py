"""The directions of an adapter's update beside those of the weight W0 that it was trained on, layer by layer.

The measures are those of Hu et al. 2021 (https://arxiv.org/abs/2106.09685), sections 7.2 and 7.3.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from plumbing.adapters.peft_format import ADAPTER_CONFIG, find_adapter, rank_and_alpha, read_adapter
from plumbing.gpt2.base import check_same_weights
from plumbing.gpt2.files import HUB_MODELS, find_model
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import check_finite, open_tensors
from plumbing.program.hub import fetch_model
from plumbing.program.stored_run import RUN_CONFIG, read_run

SHARE = 0.9  # of the update's square norm, held by its first directions


@dataclass
class LayerAnatomy:
    """One layer's update D = (alpha / r) B A and its weight W0, both (out, in). Norms are Frobenius norms."""

    name: str
    n_in: int
    w0_norm: float
    norm: float  # of D
    singular_values: list[float]  # of D, the largest first
    n_directions: int  # how many of them hold SHARE of D's square norm
    stressed: float  # |U^T W0 V|, U and V the directions of D: how much W0 has of what D adds
    own: float  # the same for as many first directions of W0 itself: the most that there can be
    random: float  # the same for random directions
    similarity_A: torch.Tensor | None = None  # (r, r of the other): of A's input directions, equation 4
    similarity: torch.Tensor | None = None  # (r, r of the other): of D's

    @property
    def amplification(self) -> float:
        """How many times D is what W0 has in D's directions; 0 for an update of zero."""
        return self.norm / self.stressed if self.norm else 0.0


# --- the measures ----------------------------------------------------------------------------------


def decompose(A, B, scale):  # (r, in), (out, r) -> U (out, r), s (r,), V (in, r): scale B A = U diag(s) V^T
    """The singular values and directions of an update that is never made: with B = Q_B R_B and A^T = Q_A R_A they are
    those of the r x r matrix R_B R_A^T, turned by Q_B and Q_A."""
    Q_B, R_B = torch.linalg.qr(scale * B.double())
    Q_A, R_A = torch.linalg.qr(A.double().t())
    U, s, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    return Q_B @ U, s, Q_A @ Vt.t()


def count_directions(s):
    """How many of the singular values, the largest first, hold SHARE of the sum of their squares."""
    held = (s * s).cumsum(0)
    return int((held < SHARE * held[-1] * (1 - 1e-12)).sum()) + 1 if held[-1] else 0


def measure_similarity(V, other):  # (n, I), (n, J), orthonormal columns -> (I, J)
    """phi(i, j) = |V_i^T O_j|^2 / min(i, j) for the first i and j columns (Hu, equation 4): 1 where one subspace lies
    within the other, 0 where they are at right angles."""
    shared = ((V.t() @ other) ** 2).cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1) for n in shared.shape)
    return shared / torch.minimum(i[:, None], j)


def random_similarity(rows, columns, n):
    """(rows, columns): what phi(i, j) is for random subspaces of n dimensions, in the mean: max(i, j) / n."""
    i, j = (torch.arange(1, n + 1) for n in (rows, columns))
    return torch.maximum(i[:, None], j) / n


def input_directions(A):  # (r, in) -> (in, r): A's right singular vectors, the strongest first
    return torch.linalg.svd(A.double(), full_matrices=False)[2].t()


def strongest(W, k):
    """|U^T W V| for the k first singular directions of W: the root of the k largest squared singular values' sum."""
    gram = W @ W.t() if W.size(0) <= W.size(1) else W.t() @ W
    return float(torch.linalg.eigvalsh(gram)[-k:].clamp(min=0).sum().sqrt())


def study_layer(name, W0, A, B, scale, other=None) -> LayerAnatomy:
    """W0 (out, in), A (r, in), B (out, r). other: (A, B, scale) of another adapter on the same layer."""
    W0 = W0.double()
    w0_norm = float(W0.norm())
    U, s, V = decompose(A, B, scale)
    k = len(s)
    layer = LayerAnatomy(
        name=name,
        n_in=W0.size(1),
        w0_norm=w0_norm,
        norm=float(s.norm()),
        singular_values=s.tolist(),
        n_directions=count_directions(s),
        stressed=float((U.t() @ W0 @ V).norm()),
        own=strongest(W0, k),
        random=k * w0_norm / W0.numel() ** 0.5,  # the root of the mean square over all directions
    )
    if other:
        layer.similarity_A = measure_similarity(input_directions(A), input_directions(other[0]))
        layer.similarity = measure_similarity(V, decompose(*other)[2])
    return layer


# --- adapters and their bases ----------------------------------------------------------------------


class Adapter:
    """An adapter in PEFT's format: `modules`, the names of its layers, and their matrices. Raises UserError, or the
    reader's ValueError, for what is none."""

    def __init__(self, directory):
        self.directory = find_adapter(directory)
        if not os.path.exists(os.path.join(self.directory, ADAPTER_CONFIG)):
            raise UserError(f"{directory} holds no adapter ({ADAPTER_CONFIG} is missing): type the folder of one")
        self.config, self.tensors = read_adapter(self.directory)
        self.modules = [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]
        # layers in their order: h.2 before h.10
        self.modules.sort(key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
        if not self.modules:
            raise UserError(f"{directory}: no linear layer has an adapter there")

    def matrices(self, module):
        """(A, B, alpha / r) of a layer."""
        A = self.tensors[f"{module}.lora_A"]
        B = self.tensors.get(f"{module}.lora_B")
        rank, alpha = rank_and_alpha(self.config, module)
        if B is None or A.ndim != 2 or B.shape[1:] != A.shape[:1]:
            raise UserError(f"{self.directory}: {module} is not an adapter of a linear layer")
        return A, B, alpha / rank


class Base:
    """A base model's weights, read one at a time: from a directory of safetensors files, one of our names, or the
    hub."""

    def __init__(self, name):
        self.name = name
        if not name:
            raise UserError("the adapter does not name its base: type --base=DIRECTORY")
        self.files = {}  # {tensor's name: its file}
        for path in sorted(glob.glob(os.path.join(glob.escape(find_base(name)), "*.safetensors"))):
            with open_tensors(path) as f:
                self.files |= dict.fromkeys(f.keys(), path)
        if not self.files:
            raise UserError(f"{name}: no safetensors file in it; type --base=DIRECTORY for another one")

    def weight(self, module, n_out, n_in, is_transposed):
        """W0 (out, in) of a layer."""
        key = self._find(f"{module}.weight")
        with open_tensors(self.files[key]) as f:
            W0 = f.get_tensor(key)
        check_finite(W0, key, self.files[key])
        W0 = W0.t() if is_transposed else W0
        if W0.shape != (n_out, n_in):
            sizes = f"{tuple(W0.shape)}, the adapter {(n_out, n_in)}"
            raise UserError(f"{self.name} is not the adapter's base: {key} is {sizes}")
        return W0

    def _find(self, name):
        # A model of transformers may be saved with its inner model's prefix (transformer., roberta.) or without.
        for wanted in (name, name.partition(".")[2]):
            found = [key for key in self.files if key == wanted or key.endswith(f".{wanted}")]
            if len(found) == 1:
                return found[0]
        raise UserError(f"{self.name} is not the adapter's base: it has no {name}; type --base=DIRECTORY")


def find_base(name):
    """The directory of a base's files."""
    if os.path.isdir(name):
        return name
    if name in HUB_MODELS or name == "gpt2-mini":
        return os.path.dirname(find_model(name)[0])
    try:
        return fetch_model(f"base={name} is not a directory here", (name,), ["*.safetensors"])
    except (ValueError, OSError) as e:
        raise UserError(f"{first_line(e, 300)}; type --base=DIRECTORY") from e


def check_run(directory, base):
    """Raises ValueError if the adapter is that of a run, and the base no longer the one that it began with."""
    if os.path.exists(os.path.join(directory, RUN_CONFIG)):
        _, facts = read_run(directory)
        check_same_weights(base, facts.get("base"), directory)


def study(adapter: Adapter, base: Base, other: Adapter | None = None) -> Iterator[LayerAnatomy]:
    """The anatomy of each layer, one after the other: no two weights are in memory at once."""
    for module in adapter.modules:
        A, B, scale = adapter.matrices(module)
        theirs = other.matrices(module) if other and module in other.modules else None
        if theirs and (theirs[0].size(1), theirs[1].size(0)) != (A.size(1), B.size(0)):
            raise UserError(f"{other.directory}: {module} has another size than in {adapter.directory}")
        W0 = base.weight(module, B.size(0), A.size(1), bool(adapter.config.get("fan_in_fan_out")))
        yield study_layer(module, W0, A, B, scale, theirs)


def mean_similarity(layers):
    """[(title, (r, r of the other))]: phi of A, of D and of random directions, the mean over the layers."""
    phis = {"A": [x.similarity_A for x in layers], "update": [x.similarity for x in layers]}
    phis["random"] = [random_similarity(*x.similarity.shape, x.n_in) for x in layers]
    return [(title, torch.stack(phi).mean(0).numpy()) for title, phi in phis.items()]
