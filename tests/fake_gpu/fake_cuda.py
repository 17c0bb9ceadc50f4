"""Lets torch's FakeTensorMode run on "cuda:0" where torch is a CPU build: shapes, dtypes and devices are real,
numbers are not. A tensor on the wrong device raises, as on a GPU.

    import fake_cuda      # before torch is imported
    with torch._subclasses.fake_tensor.FakeTensorMode(): ...

stub.cpp is compiled once, with g++, into the folder of temporary files (some seconds). Tried with torch 2.13.0+cpu.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile


def load() -> None:
    """Registers a CUDA that is there and does nothing, and imports torch. Raises FileNotFoundError where no g++ is,
    RuntimeError where torch is imported already or no CPU build."""
    if "torch" in sys.modules:
        raise RuntimeError("load the fake device before torch is imported")
    home = os.path.dirname(importlib.util.find_spec("torch").origin)
    with open(os.path.join(home, "version.py"), encoding="utf-8") as f:
        version = {}
        exec(f.read(), version)
    if version["cuda"] or version["hip"]:
        raise RuntimeError("the fake device is for CPU builds of torch")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stub.cpp")
    with open(source, "rb") as f:
        key = hashlib.sha256(f.read() + version["__version__"].encode()).hexdigest()[:12]
    library = os.path.join(tempfile.gettempdir(), f"fake-cuda-{key}.so")
    if not os.path.exists(library):
        command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", source, "-o", library]
        command += [f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(os.path.join(home, "lib", name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library).set_guard()
    import torch

    for name in ("kaiming_uniform_", "zeros_", "normal_", "uniform_", "ones_"):  # no numbers: nothing to draw
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


load()
