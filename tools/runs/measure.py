"""What is measured: a call's seconds, peak memory, tokens a second; and the machine that it is measured on."""

import contextlib
import importlib.metadata
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lora import mark_only_lora_as_trainable
from model import GPT
from plumbing.running.machine import pick_device, pick_dtype, read_cpu_info


def timed(device: str, function: Callable, *arguments) -> tuple[float, object]:
    """(seconds, result) of a call, with all work on the device done."""
    synchronize(device)
    began = time.perf_counter()
    result = function(*arguments)
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device: str) -> None:
    """Waits until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's tensors or, without a GPU, of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    # Linux passes ru_maxrss on from parent to child, so it is read elsewhere there.
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "steps": len(values)}


def describe_machine(device: str) -> dict:
    """The hardware, the versions and how busy the machine is."""
    name = re.search(r"model name\s*: (.*)", read_cpu_info())
    found = {"cpu": name and name[1], "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    found["gpu"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "none"
    for package in ("torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if hasattr(os, "getloadavg"):  # Windows has none
        found["load_at_start"] = round(os.getloadavg()[0], 2)
    return found


# --- latency ---------------------------------------------------------------------------------------


def make_untrained(config, unmerged: bool = False) -> GPT:
    """As generate.py loads a tuned model: its adapters are merged, unless told otherwise."""
    model = GPT.from_pretrained(config.init_from, lora_rank=config.rank, lora_alpha=config.alpha)
    mark_only_lora_as_trainable(model)
    device = pick_device(config.device)
    return model.to(device).set_dtype(pick_dtype(device, config.dtype)).train(unmerged)


@torch.no_grad()
def time_latency(config, job: str, n_turns: int) -> dict[str, list[float]]:
    """Seconds of the base, the unmerged and the merged model for one text of 52 tokens, in `n_turns` turns after a
    warm-up. job: "forward", or "generate" for 32 new tokens."""
    device = pick_device(config.device)
    idx = torch.arange(1000, 1052, device=device)[None]  # (1, 52)
    models = {
        "base": make_untrained(replace(config, rank=0)),
        "unmerged": make_untrained(config, unmerged=True),
        "merged": make_untrained(config),
    }
    jobs = {"forward": lambda model: model(idx), "generate": lambda model: model.generate(idx, 32, temperature=0)}
    seconds = {name: [] for name in models}
    for turn in range(1 + n_turns):
        # Alternating, each one first in its turn: drift and the order affect all equally.
        names = list(models)
        for name in names[turn % 3 :] + names[: turn % 3]:
            seconds[name].append(timed(device, jobs[job], models[name])[0])
    return {name: times[1:] for name, times in seconds.items()}
