"""Device and dtype: what is chosen, and that a device which computes wrongly is not.

python -m pytest tests/running/test_machine.py
"""

import io
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tokens
from torch.torch_version import TorchVersion

from model import GPT, KVCache, attend
from plumbing.gpt2.batch import Batch
from plumbing.running import machine
from plumbing.scoring.answers import read_prompts

LIES = {
    "the loss": lambda loss, grad, idx: [loss + 0.1, grad, idx],
    "a gradient": lambda loss, grad, idx: [loss, torch.cat([grad[1:], grad[:1]]), idx],
    "token ids": lambda loss, grad, idx: [loss, grad, idx.flip(0)],
    "not a number": lambda loss, grad, idx: [loss, grad * float("nan"), idx],
    "an error": None,
}


@pytest.fixture
def fake_mps(monkeypatch):
    """A machine that says it has mps, whose results are the CPU's as `lie` changes them."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    honest = machine.try_device

    def set_lie(lie):
        def run(device):
            results = honest("cpu")
            if device == "cpu":
                return results
            if lie is None:
                raise RuntimeError("no kernel for this operator")
            return lie(*results)

        monkeypatch.setattr(machine, "try_device", run)

    return set_lie


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_lies_is_passed_over(fake_mps, lie, capsys):
    """Otherwise a driver's bug trains garbage for hours, without an error."""
    fake_mps(LIES[lie])
    assert machine.pick_device() == "cpu"
    assert capsys.readouterr().out.startswith("note: mps computes wrong numbers here (")


def test_an_honest_device_is_taken(fake_mps, capsys):
    """Otherwise nobody with an accelerator gets it without a flag."""
    fake_mps(lambda *results: list(results))
    assert machine.pick_device() == "mps"
    assert not capsys.readouterr().out


def round_to_tf32(t):
    """As a GPU rounds what it multiplies: 10 bits after the first."""
    return ((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class LinearInTF32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return round_to_tf32(x) @ round_to_tf32(w).T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = round_to_tf32(grad)
        return grad @ round_to_tf32(w), (grad.mT @ round_to_tf32(x)).sum(0)


def test_a_device_that_rounds_products_is_taken(monkeypatch, fake_mps, capsys):
    """Lost if it fails: in NVIDIA's containers, which multiply in TF32, a healthy A100 is told to compute wrong
    numbers, and the run goes to the CPU for hours."""
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", LinearInTF32.apply)
        rounded = machine.try_device("cpu")
    fake_mps(lambda *results: rounded)
    exact = machine.try_device("cpu")
    assert not torch.allclose(rounded[1], exact[1], rtol=1e-3, atol=1e-4)  # by element they do differ
    assert machine.pick_device() == "mps" and not capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    ],
)
def test_a_device_in_use_is_one_line(monkeypatch, fake_mps, error):
    """Lost if it fails: where another program fills the GPU, the run goes to the CPU for hours."""

    def refuse(device):
        raise error

    monkeypatch.setattr(machine, "try_device", refuse)
    with pytest.raises(ValueError, match=r"mps is in use .*--device=cpu") as caught:
        machine.pick_device()
    assert "\n" not in str(caught.value)


def test_a_second_gpu_is_asked_for_its_own_dtype(monkeypatch):
    """Lost if it fails: beside an A100 a T4, as cuda:1, computes in bfloat16 by emulation, many times slower."""
    at = [0]

    def exchange(index):
        before, at[0] = at[0], index if index >= 0 else at[0]
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: at[0] == 0)
    assert [machine.pick_dtype(f"cuda:{i}") for i in (0, 1)] == [torch.bfloat16, torch.float16]
    assert at == [0]


def test_cudnns_attention_is_off_in_training_and_in_scoring():
    """Otherwise newer GPUs plan half a second for each new length of a batch, longer than they compute."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    machine.pick_device("cpu")  # what train.py and generate.py begin with
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_layers_of_one_dtype_get_float32(capsys):
    """Otherwise a lora.py of one's own ends in an error about dtypes on machines with bfloat16."""
    assert machine.pick_dtype("cpu", "auto", torch.nn.Linear) == torch.float32
    assert not capsys.readouterr().out
    assert machine.pick_dtype("cpu", "bfloat16", torch.nn.Linear) == torch.float32
    assert "float32 instead of bfloat16" in capsys.readouterr().out


TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def set_environment(monkeypatch, **values):
    """torchrun's variables are these, and no others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


class FewGPUs:
    """torch.cuda of a machine with two GPUs."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_is_one_line(monkeypatch, device):
    """Otherwise a wrong --nproc_per_node ends in as many tracebacks as there are processes."""
    monkeypatch.setattr(torch, "cuda", FewGPUs)
    set_environment(monkeypatch, RANK=2, LOCAL_RANK=2, WORLD_SIZE=3, **TORCHRUN)
    with pytest.raises(ValueError, match="--nproc_per_node=2"):
        machine.Processes(SimpleNamespace(device=device, batch_size=8))


@pytest.mark.parametrize(
    "values, note",
    [
        ({}, ""),
        ({"RANK": 16}, "RANK=16"),
        ({"RANK": 0}, "RANK=0"),
        ({"RANK": 16, **TORCHRUN}, "RANK=16"),
        ({"RANK": "many"}, "RANK=many"),
        ({"RANK": ""}, ""),
        ({"RANK": "", "WORLD_SIZE": ""}, ""),
        ({"WORLD_SIZE": 1}, ""),
        ({"WORLD_SIZE": 1, "RANK": 0}, ""),
        (TORCHRUN, ""),
    ],
)
def test_an_environment_without_torchrun(monkeypatch, capsys, values, note):
    """Lost if it fails: `export RANK` in a loop over LoRA's ranks trains to the end and writes nothing."""
    set_environment(monkeypatch, **values)
    processes = machine.Processes(SimpleNamespace(device="cpu", batch_size=8))
    assert (processes.world_rank, processes.world_size, processes.is_first) == (0, 1, True)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(note) and note in out


@pytest.mark.parametrize(
    "values",
    [
        {"WORLD_SIZE": 2},
        {"WORLD_SIZE": 2, "RANK": 0},
        {"WORLD_SIZE": 2, "RANK": "", **TORCHRUN},
        {"WORLD_SIZE": 2, "RANK": 2, **TORCHRUN},
        {"WORLD_SIZE": 2, "RANK": -1, **TORCHRUN},
        {"WORLD_SIZE": "two", "RANK": 0, **TORCHRUN},
        {"WORLD_SIZE": 0, "RANK": 0, **TORCHRUN},
    ],
)
def test_half_of_torchruns_environment_is_one_line(monkeypatch, values):
    """Lost if it fails: a WORLD_SIZE that was left over waits for a process that never comes, or is a traceback."""
    set_environment(monkeypatch, **values)
    with pytest.raises(ValueError, match=r"unset .*torchrun") as caught:
        machine.Processes(SimpleNamespace(device="cpu", batch_size=8))
    assert "\n" not in str(caught.value) and f"WORLD_SIZE={values['WORLD_SIZE']}" in str(caught.value)


def test_processes_wait_for_one_that_downloads(monkeypatch):
    """Lost if it fails: a run over many GPUs ends after ten minutes where one machine's network is slow."""
    asked = {}
    set_environment(monkeypatch, RANK=0, WORLD_SIZE=2, **TORCHRUN)
    monkeypatch.setattr(machine.dist, "init_process_group", lambda backend, **options: asked.update(options))
    machine.Processes(SimpleNamespace(device="cpu", batch_size=8))
    assert asked["timeout"].total_seconds() >= 3600


@pytest.mark.parametrize("port", ["taken", "many", 99999])
def test_a_place_where_processes_cannot_meet_is_one_line(monkeypatch, port):
    """Lost if it fails: a second run on one machine ends in a traceback of torch's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if port == "taken" else port
        set_environment(monkeypatch, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}") as caught:
            machine.Processes(SimpleNamespace(device="cpu", batch_size=8))
    assert "\n" not in str(caught.value)


def test_several_processes_do_not_share_one_accelerator(monkeypatch):
    """Otherwise torchrun on a Mac ends in a traceback from inside gloo."""
    set_environment(monkeypatch, RANK=0, WORLD_SIZE=2, **TORCHRUN)
    with pytest.raises(ValueError, match=r"device=mps: .*--device=cpu"):
        machine.Processes(SimpleNamespace(device="mps", batch_size=8))


def test_deterministic_refuses_what_is_not():
    """Otherwise --deterministic is a word, and two runs on a GPU differ all the same."""
    machine.compute_deterministically()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_float16_where_the_scaler_works(monkeypatch):
    """Otherwise float16 is refused on a Mac for a reason that is false there, or ends in torch's traceback."""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    with pytest.raises(ValueError, match=r"dtype=float16: .*--dtype=float32"):
        machine.pick_dtype("mps", "float16")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    assert machine.pick_dtype("mps", "float16") == torch.float16
    assert machine.pick_dtype("mps") == torch.float32


# --- Apple's mps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device, waits", [("mps", True), ("cpu", True), ("cuda:1", False)])
def test_a_copy_is_waited_for_but_on_cuda(monkeypatch, device, waits):
    """Otherwise a Mac trains on garbage token ids, read from memory that was freed."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *args, **options: asked.append((args, options)) or t)
    Batch(torch.ones(1, 2), torch.ones(3, 4), torch.ones(3, 4)).to(device)
    assert asked == [((device,), {"non_blocking": not waits})] * 4


class OnMps(torch.Tensor):
    """A tensor that says it is on mps; it computes on the CPU."""

    device = property(lambda self: torch.device("mps"))


def bias(visible):
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


CASES = {  # the mask of 3 rows of 2 heads, 5 tokens and 7 before them; None: no token before them
    "the causal mask": None,
    "a mask for all rows": bias(torch.ones(5, 12, dtype=torch.bool).tril(7)),
    "a mask for each row": bias(torch.arange(12) > torch.tensor([0, 3, 5])[:, None, None, None]),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_on_mps_is_written_out(monkeypatch, case):
    """Otherwise a Mac's user gets what torch's own attention gives there, which has been wrong without an error."""
    mask = CASES[case]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 12, 2, 16).transpose(2, 3).double()  # each (3, 2, 12, 16), permuted
    if mask is not None:
        q = q[:, :, -5:]
    wide = None if mask is None else mask.double()
    expected = F.scaled_dot_product_attention(q, k, v, wide, is_causal=mask is None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    monkeypatch.setattr("model.causal_mask", lambda T, K, like: bias(torch.ones(T, K, dtype=torch.bool).tril(K - T)))
    y = attend(*(t.float().as_subclass(OnMps) for t in (q, k, v)), mask)
    torch.testing.assert_close(y.as_subclass(torch.Tensor).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_model_does_without_torchs_attention(monkeypatch, checkpoint):
    """Otherwise training, scoring or writing on a Mac still goes through it somewhere."""
    model = GPT.from_pretrained(checkpoint).train()
    idx = tokens(2, 9)

    def results():
        _, loss = model(idx, idx, prefix=tokens(1, 4))
        past = KVCache()
        model.hidden(tokens(1, 4), past)
        last, cache = read_prompts(model, [idx[0].tolist(), idx[1, :5].tolist()], past)
        written = model.generate(last, 6, temperature=0, past=cache)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters())), written]

    with monkeypatch.context() as patch:
        patch.setattr("model.LONG", 0)
        expected = results()
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "features, vendor, expected",
    [
        (("amx_tile", "avx512_bf16"), "GenuineIntel", torch.bfloat16),
        (("avx512_bf16",), "AuthenticAMD", torch.bfloat16),
        (("avx512_bf16",), "GenuineIntel", torch.float32),
        ((), "AuthenticAMD", torch.float32),
    ],
)
def test_a_cpu_computes_in_what_it_is_fast_at(monkeypatch, features, vendor, expected):
    """Lost if it fails: training takes 1.5 times as long as it needs to, or twice."""
    for feature in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda feature=feature: feature in features)
    monkeypatch.setattr(machine, "open", lambda *args, **options: io.StringIO(f"vendor_id : {vendor}"), raising=False)
    assert machine.pick_dtype("cpu") == expected


def test_the_vendor_where_there_is_no_proc(monkeypatch):
    """Lost if it fails: on Windows an Intel CPU computes in its slow bfloat16."""

    def refuse(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(machine, "open", refuse, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for processor, expected in (("Intel64 Family 6 Model 207, GenuineIntel", False), ("AMD64 Family 25", True)):
        monkeypatch.setattr(machine.platform, "processor", lambda processor=processor: processor)
        assert machine.is_cpu_fast_at_bfloat16() == expected


def test_a_seed_gives_the_numbers_of_torchs_own_call():
    """Otherwise a run with dropout ends in other bits than it did before."""
    torch.manual_seed(7)
    reference = torch.rand(5)
    machine.seed_generator("cpu", 7)
    assert torch.equal(torch.rand(5), reference)
