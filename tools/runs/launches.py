"""CPU time and kernels of an update of a narrow model, of which nothing counts but Python and launches. A GPU that is
faster than they waits for them."""

import os
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
from plumbing.gpt2.batch import Batch
from plumbing.running.machine import start_machine
from train import build_model, make_run, update

CASE = "an update, 24 layers of width 32, 2 texts, r = 4, dropout 0.05"
EXAMPLES = [SimpleNamespace(tokens=list(range(24)), n_prompt=22)] * 2  # of which the first 8 tokens are shared

# What torch's dispatcher calls without launching a kernel: views and new memory. bernoulli_ and div_ are parts of a
# dropout on a CPU, which is one kernel on a GPU.
NO_KERNEL = (
    "alias as_strided bernoulli_ detach div_ empty empty_like empty_strided expand lift_fresh permute select slice "
    "split split_with_sizes squeeze t transpose unbind unsqueeze view _unsafe_view "
    "profiler::_record_function_enter_new profiler::_record_function_exit"
)


class CountKernels(TorchDispatchMode):
    """Counts, in a `with` block, what a GPU launches: a kernel for each operation. Some are more than one, such as
    the backward pass of attention and those on lists of many tensors."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function._schema.name.removeprefix("aten::") not in NO_KERNEL.split()
        return function(*args, **(kwargs or {}))


def save_narrow(folder: str) -> str:
    """A model with gpt2-medium's depth, in a new folder there."""
    path = os.path.join(folder, "narrow")
    config = model.GPTConfig(n_layer=24, n_head=2, n_embd=32, vocab_size=300, block_size=64)
    model.GPT(config).save_pretrained(path)
    return path


def train_narrow(config):
    """train.py's own update, on EXAMPLES."""
    processes, dtype = start_machine(config, model.LoRALinear)
    run = make_run(config, processes, dtype, None, build_model(config, processes.device, dtype))
    tokens = torch.tensor([example.tokens for example in EXAMPLES])  # (2, 24)
    targets = torch.full((2, 15), -1)
    targets[:, -2:] = tokens[:, -2:]
    batch = Batch(tokens[:1, :8], tokens[:, 8:-1], targets).to(processes.device)
    return lambda job: update(run, [(batch, 1.0)], 0)


def launches(system, config):
    """Loads a system; it answers (ms of CPU time, kernels) of an update in the way that GPUs take."""
    torch.set_num_threads(1)
    model.LONG = 0  # torch's fused attention
    step = system(config)

    def count(indices):
        began = time.process_time()
        step(indices)
        ms = 1e3 * (time.process_time() - began)
        with CountKernels() as counted:
            step(indices)
        return ms, counted.n

    return count
