"""--compile=True: on CUDA all kernels of a forward or backward pass are launched at once, recorded for each shape."""

import contextlib

import torch

STEP = 16  # tokens, to a multiple of which rows are padded: an epoch of rt_reviews has six shapes, not 50


def are_used(config, device: str) -> bool:
    """A second piece's gradient would be written over the first one's, so an update must be one piece (pytorch issue
    169545)."""
    return config.compile and device.startswith("cuda") and config.gradient_accumulation_steps == 1


def compile_model(model, config, device: str) -> None:
    model.adapted = []  # the compiler casts A and B inside its kernels
    model.compile(dynamic=True, mode="reduce-overhead" if are_used(config, device) else None)


def left_out(config, device: str):
    """Within it nothing is recorded: the graphs know the addresses of weights, and merged ones are new each time."""
    return torch.compiler.set_stance("force_eager") if are_used(config, device) else contextlib.nullcontext()
