"""What a run computes on: device, dtype, memory, and the processes that torchrun started."""

import contextlib
import ctypes
import io
import os
import platform
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._utils import _take_tensors

from plumbing.program.errors import first_line
from plumbing.running.endings import is_out_of_memory


def keep_memory():
    """Freed tensors stay with the process: glibc would give large ones back and fault them in again at each
    step, a third of a CPU step's time."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not shrunk


def compute_deterministically():
    """The same seed gives the same bits on CUDA too, where the backward pass of attention and of embeddings adds in
    an order that changes. Raises RuntimeError later, from an operation that has no such way."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def pick_device(device: str = "auto") -> str:
    """ "auto": cuda, else mps, else cpu; a device that computes something else than the CPU is passed over with a
    note. ValueError if the device cannot be had, or is full or busy: hours on the CPU are not what was asked for."""
    # cuDNN's attention comes first on newer GPUs and plans again for each new shape, half a second each.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"device={device}: not on this machine ({first_line(e)}); type --device=cpu") from e
        return device
    for name, backend in {"cuda": torch.cuda, "mps": torch.backends.mps}.items():
        if not backend.is_available():
            continue
        wrong = compare_with_cpu(name)
        if not wrong:
            return name
        print(f"note: {name} computes wrong numbers here ({wrong}), so the CPU is used; --device={name} insists")
    return "cpu"


def compare_with_cpu(device: str) -> str:
    """What a small forward and backward pass gives else on the device than on the CPU; "" where they agree. Drivers
    and new kernels have been wrong without an error, on Apple's mps more than once. Raises ValueError where the
    device is full or busy."""
    # As shares of the norm. In TF32, which some machines compute products in, they are 0.0001 and 0.0015.
    limits = {"loss": 1e-3, "gradients": 1e-2, "token ids": 0}
    try:
        results = zip(limits.items(), try_device(device), try_device("cpu"))
        return ", ".join(name for (name, limit), a, b in results if not (a - b).norm() <= limit * b.norm())
    except RuntimeError as e:
        if is_out_of_memory(e) or "busy" in str(e):
            raise ValueError(f"{device} is in use ({first_line(e)}); free it, or type --device=cpu") from e
        return first_line(e)


def try_device(device: str) -> list[torch.Tensor]:
    """Loss, gradients and copied token ids of one attention layer with a mask, in float32, as CPU tensors."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(0, 50, (3, 9), generator=generator).to(device)
    embedding = torch.randn(50, 32, generator=generator).to(device).requires_grad_()
    weight = (0.3 * torch.randn(96, 32, generator=generator)).to(device).requires_grad_()
    x = F.embedding(idx, embedding)  # (3, 9, 32)
    q, k, v = F.linear(x, weight).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)  # each (3, 2, 9, 16)
    mask = torch.ones(9, 9, dtype=torch.bool, device=device).tril()
    # What model.py computes there: torch's fused kernel on CUDA, else its formula.
    if q.is_cuda:
        y = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        y = (q @ k.mT / 4).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2)
    logits = F.linear(F.gelu(y, approximate="tanh"), embedding)
    loss = F.cross_entropy(logits.flatten(0, 1), idx.flatten())
    loss.backward()
    gradients = torch.cat([embedding.grad.flatten(), weight.grad.flatten()])
    return [loss.detach().cpu(), gradients.cpu(), idx.cpu().float()]


def seed_generator(device: str, seed: int) -> None:
    """The device's random numbers, as torch.manual_seed leaves them. That visits every backend, in 0.12 ms."""
    kind = torch.device(device)
    if kind.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif kind.type == "cuda":
        index = torch.cuda.current_device() if kind.index is None else kind.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def pick_dtype(device: str, dtype: str = "auto", layer=None) -> torch.dtype:
    """The dtype to compute in. "auto": bfloat16 where the hardware is fast at it, float16 on older GPUs, else
    float32. Raises ValueError for a dtype that the device does not have.

    layer: LoRALinear. Ours has A and B in float32 next to a bfloat16 weight, and says so by mixes_dtypes. One of your
    own that does not is computed in float32.
    """
    if layer is not None and not getattr(layer, "mixes_dtypes", False):
        if dtype not in ("auto", "float32"):
            print(f"note: the layers of this lora.py know one dtype: float32 instead of {dtype}")
        return torch.float32
    on_cuda = device.startswith("cuda")
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():  # torch asks the current one
        has_bfloat16 = not on_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto" and on_cuda:
        dtype = "bfloat16" if has_bfloat16 else "float16"
    elif dtype == "auto":
        dtype = "bfloat16" if device == "cpu" and is_cpu_fast_at_bfloat16() else "float32"
    elif dtype == "bfloat16" and on_cuda and not has_bfloat16:
        raise ValueError(f"dtype=bfloat16: {torch.cuda.get_device_name(device)} has none; type --dtype=float16")
    elif dtype == "float16" and device == "cpu":
        raise ValueError("dtype=float16 is orders of magnitude too slow on cpu; type --dtype=auto")
    elif dtype == "float16" and device.startswith("mps") and torch.__version__ < (2, 8):
        # Until then the gradient scaler needs float64, which mps lacks.
        raise ValueError(f"dtype=float16: mps needs torch 2.8 for it, not {torch.__version__}; type --dtype=float32")
    return getattr(torch, dtype)


def is_cpu_fast_at_bfloat16() -> bool:
    """Whether products in bfloat16 take less time than in float32: with AMX they do, and with AVX512-BF16 on AMD's
    CPUs. With that alone on an Intel Xeon (model 207, 2 cores) they took 1.6 to 2 times as long."""
    features = ("amx_tile", "avx512_bf16")
    has_amx, has_avx512 = (getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)() for feature in features)
    return has_amx or (has_avx512 and "GenuineIntel" not in read_cpu_info())


def read_cpu_info() -> str:
    """What the system says of its CPU: Linux's /proc/cpuinfo, one line elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        return f.read()
    return platform.processor()


TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets next to WORLD_SIZE, and more


def read_torchrun() -> tuple[int, int]:
    """(the number of this process, how many there are); (0, 1) without torchrun. Its variables count together: RANK
    may well be somebody's own, LoRA's rank in a loop of a shell. Raises ValueError for a WORLD_SIZE that the others
    are missing for."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1":
        return 0, 1
    rank, *place = (os.environ.get(name, "") for name in TORCHRUN)
    if not (all(place) and rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(
            f"WORLD_SIZE={size} is in the environment, but torchrun's {', '.join(TORCHRUN)} do not go with it: type "
            "unset WORLD_SIZE, or torchrun --standalone --nproc_per_node=2 train.py ..."
        )
    return int(rank), int(size)


SUM_BYTES = 2**26  # of gradients that are summed over the processes at a time


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, config):
        self.world_rank, self.world_size = read_torchrun()
        self.is_first = self.world_rank == 0
        if os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
            print(f"note: RANK={os.environ['RANK']} in the environment is ignored, torchrun has not set it")
        self.device = pick_device(config.device if self.world_size == 1 else self._join(config))

    def _join(self, config):
        """Meets the other processes. Returns this one's own device."""
        if config.batch_size < self.world_size:
            raise ValueError(f"batch_size={config.batch_size}: type at least {self.world_size}, one for each process")
        on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
        device = "cpu"
        if on_cuda:
            local_rank = int(os.environ.get("LOCAL_RANK") or self.world_rank)
            n_gpus = torch.cuda.device_count()
            if local_rank >= n_gpus:
                raise ValueError(f"more processes than GPUs on this machine: type --nproc_per_node={n_gpus}")
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        elif config.device not in ("auto", "cpu"):
            raise ValueError(f"device={config.device}: several processes need GPUs of their own, or --device=cpu")
        try:
            # The others wait while the first on a machine downloads: longer than NCCL's 10 minutes.
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=1))
        except (ValueError, RuntimeError) as e:
            place = ":".join(os.environ[name] for name in TORCHRUN[1:])
            raise ValueError(
                f"{place}, of MASTER_ADDR and MASTER_PORT: the processes cannot meet there ({first_line(e)}); type "
                "another --master_port, or torchrun --standalone"
            ) from e
        return device

    def leave(self):
        if self.world_size > 1:
            dist.destroy_process_group()

    def totals(self, values: list[float | torch.Tensor]) -> list[float]:
        """The sum of each process's first value, second value ... They are numbers, or scalars on the device, for
        which Python waits once."""
        if self.world_size == 1:
            tensors = [v for v in values if torch.is_tensor(v)]
            read = iter(torch.stack(tensors).tolist() if tensors else [])
            return [next(read) if torch.is_tensor(v) else float(v) for v in values]
        like = {"dtype": torch.float64, "device": self.device}
        t = torch.stack([v.to(**like) if torch.is_tensor(v) else torch.full((), v, **like) for v in values])
        dist.all_reduce(t)
        return t.tolist()

    def share_file(self, path: str | None) -> str | io.BytesIO | None:
        """The first process's file, to be read on every process, of which some may be on machines without it: the
        path of one process alone, else the file's bytes. None if the first process has no path, or no file there."""
        exists = path is not None and os.path.exists(path)
        if self.world_size == 1:
            return path if exists else None
        size = 0  # that of the others, to be added
        if self.is_first:
            size = os.path.getsize(path) if exists else -1
        size = int(self.totals([size])[0])
        if size < 0:
            return None
        content = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.is_first and size:
            content.copy_(torch.from_file(path, size=size, dtype=torch.uint8))
        dist.broadcast(content, 0)
        return io.BytesIO(content.cpu().numpy())

    def sum_gradients(self, params):
        """The gradient of the global batch, on every process. Small ones are reduced together, up to SUM_BYTES: a
        copy of all would be another model's memory."""
        if self.world_size == 1:
            return
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for grads in _take_tensors([p.grad for p in params], SUM_BYTES):
            if len(grads) == 1:
                dist.all_reduce(grads[0])
                continue
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])


def start_machine(config, layer) -> tuple[Processes, torch.dtype]:
    """The processes of a training with their devices, and the dtype to compute in. layer: LoRALinear."""
    keep_memory()
    if config.deterministic:
        compute_deterministically()
    processes = Processes(config)
    before = config.facts.dtype if config.facts else None
    # What a resumed run computed in stays, unless another is typed or this machine does not have it.
    stays = before is not None and config.dtype in ("auto", before)
    try:
        dtype = pick_dtype(processes.device, before if stays else config.dtype, layer)
    except ValueError:
        if not stays:
            raise
        dtype = pick_dtype(processes.device, "auto", layer)
    name = str(dtype).removeprefix("torch.")
    if before not in (None, name):
        print(f"note: the run computed in {before} until now, and goes on in {name}")
    if processes.world_size > 1:
        names = [None] * processes.world_size
        dist.all_gather_object(names, name)
        names = sorted(set(names))
        if len(names) > 1:  # gradients of several could not be summed: float16's are scaled
            raise ValueError(f"the processes would compute in {' and '.join(names)}; type --dtype=float32")
    return processes, dtype
