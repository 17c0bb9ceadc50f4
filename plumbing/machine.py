"""What a run computes on: device, dtype, memory, and the processes that torchrun started."""

import contextlib
import ctypes
import os

import torch
import torch.distributed as dist

from plumbing.errors import first_line


def keep_memory():
    """Freed tensors stay with the process: glibc would give large ones back and fault them in again at each
    step, a third of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not shrunk


def pick_device(device="auto"):
    """ "auto": cuda, else mps, else cpu. ValueError if the device cannot be had."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device={device}: not on this machine ({first_line(e)}); type --device=cpu") from e
    return device


def pick_dtype(device, dtype="auto", mixed=True):
    """ "auto": bfloat16 where the hardware multiplies in it, float16 on older GPUs, else float32. mixed=False:
    float32 in any case, for layers that cannot have a weight in one dtype and an adapter in another."""
    if not mixed:
        if dtype not in ("auto", "float32"):
            print(f"note: the layers of this lora.py know one dtype: float32 instead of {dtype}")
        return torch.float32
    on_cuda = device.startswith("cuda")
    bf16_cuda = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        if on_cuda:
            dtype = "bfloat16" if bf16_cuda else "float16"
        else:
            cpu_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            dtype = "bfloat16" if device == "cpu" and cpu_bf16() else "float32"
    elif dtype == "bfloat16" and on_cuda and not bf16_cuda:
        raise ValueError(f"dtype=bfloat16: {torch.cuda.get_device_name()} has none; type --dtype=float16")
    elif dtype == "float16" and not on_cuda:
        raise ValueError(f"dtype=float16 is orders of magnitude too slow on {device}; type --dtype=auto")
    return getattr(torch, dtype)


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, config):
        self.world_rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = config.device
        if self.world_size > 1:
            if config.batch_size < self.world_size:
                raise ValueError(
                    f"batch_size={config.batch_size}: type at least one example for each of "
                    f"{self.world_size} processes"
                )
            on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
            if on_cuda:
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if on_cuda else "gloo")
        self.device = pick_device(self.device)
        self.is_first = self.world_rank == 0

    def sum(self, values):
        """Sum over the processes of a list of floats."""
        if self.world_size == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    def sum_gradients(self, params):
        """One reduction for all of them: the gradient of the global batch, on every process."""
        if self.world_size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(params, flat.split([p.numel() for p in params])):
            p.grad = part.view_as(p)
