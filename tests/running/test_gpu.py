"""What differs on a GPU: half precision through whole runs, gradients, memory, resuming, the compiler, the speed.

make gpu                                                        on a machine with a GPU; writes gpu.json
python -m pytest -m gpu --gpu-device=cpu tests/running/test_gpu.py     the same lines on a CPU, in 10 minutes
"""

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, base_folder

import generate
import train
from configurator import Config, configure
from generate import ModelSampler
from lora import mark_only_lora_as_trainable
from model import GPT, GPTConfig
from plumbing.data.tokenizer import gpt2_encoding
from plumbing.gpt2 import memory
from plumbing.gpt2.batch import Batch
from plumbing.program.files import write_json
from plumbing.running import machine
from plumbing.running.machine import Processes, pick_dtype
from plumbing.running.optimizers import build_optimizers
from tools.runs.measure import peak_memory

MINI = os.path.join(REPO, "configs", "finetune_mini_config.py")
REPORT = "gpu.json"


# --- the GPU, and what is noted about it ----------------------------------------------------------


@pytest.fixture(scope="session")
def gpu(pytestconfig):
    """The GPU's name in torch, or the device that was typed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic needs it before any product
    typed = pytestconfig.getoption("--gpu-device")
    if typed:
        return typed
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    pytest.skip("no GPU here; `make gpu` runs this test where there is one")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The CPU in every run of the tests, and the GPU too where there is one."""
    return "cpu" if request.param == "cpu" else request.getfixturevalue("gpu")


@pytest.fixture(scope="session")
def report(gpu):
    name = torch.cuda.get_device_name(gpu) if gpu.startswith("cuda") else gpu
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    return {"device": name, "auto": dtype_name(gpu)} | versions | {"tests": {}, "bench": None}


@pytest.fixture
def note(request):
    """note(what, **figures): into gpu.json, at once. Nothing where a test runs on the CPU by the way."""
    if not request.node.get_closest_marker("gpu"):
        return lambda what, **figures: None
    report = request.getfixturevalue("report")

    def add(what, **figures):
        report["tests"][what] = figures
        write_json(REPORT, report)

    return add


def dtype_name(device, dtype="auto"):
    return str(pick_dtype(device, dtype)).removeprefix("torch.")


def skip_without(device, dtype):
    """Not every GPU multiplies in bfloat16, and not every torch scales gradients on mps."""
    try:
        if device != "cpu":
            pick_dtype(device, dtype)
    except ValueError as e:
        pytest.skip(str(e))


@pytest.fixture
def any_dtype(monkeypatch):
    """The dtype that is asked for, float16 on a CPU too, where a user's is refused for its speed."""
    for module in (machine, generate):
        monkeypatch.setattr(module, "pick_dtype", lambda device, dtype, mixed: getattr(torch, dtype))


# --- loss and gradients ---------------------------------------------------------------------------

# Relative errors; a CPU's rounding gives 1e-5, 0.008 and 0.08 here, attention to later tokens 0.12.
LIMITS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.12}


def differentiate(device, dtype, rank):
    """gpt2-mini's loss on 8 rows after a shared prefix, and its gradients by what trains, as float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    options = {"lora_rank": rank, "lora_alpha": 4 * rank, "lora_targets": "c_(attn|proj|fc)$"}
    torch.manual_seed(0)
    model = GPT.from_pretrained("gpt2-mini", **options)
    if rank:
        mark_only_lora_as_trainable(model)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.01, generator=generator)
    with open(os.path.join(REPO, "README.md"), encoding="utf-8") as f:
        text = torch.tensor(gpt2_encoding().encode_ordinary(f.read()))
    prefix = text[None, :12]
    rows = text[12 : 12 + 8 * 41].view(8, 41)
    idx = rows[:, :-1]
    targets = torch.full_like(idx, -1)
    targets[:, -2:] = rows[:, -2:]
    model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32).set_dtype(dtype).train()
    loss = train.compute_loss(model, Batch(prefix, idx, targets).to(device))
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(scale * loss, params)
    flat = torch.cat([g.flatten().cpu().double() for g in gradients]) / scale
    return loss.detach().cpu().double(), flat


@functools.cache
def differentiate_exactly(rank):
    return differentiate("cpu", torch.float64, rank)


ON_GPU = [pytest.param("gpu", dtype, marks=pytest.mark.gpu) for dtype in LIMITS]
# A CPU takes seconds for float16, in which nobody trains on one.
ON_CPU = [("cpu", "float32"), ("cpu", "bfloat16"), pytest.param("cpu", "float16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("device, dtype", [*ON_CPU, *ON_GPU], indirect=["device"])
def test_losses_and_gradients_are_those_of_float64(device, dtype, rank, note, monkeypatch):
    """Otherwise a GPU's own kernels lead a training astray, and nothing says so."""
    skip_without(device, dtype)
    exact_loss, exact = differentiate_exactly(rank)
    monkeypatch.setattr("model.LONG", 0)  # on a CPU too attention by torch's fused kernel, as on a GPU
    loss, gradient = differentiate(device, getattr(torch, dtype), rank)
    loss_error = abs((loss - exact_loss) / exact_loss).item()
    gradient_error = ((gradient - exact).norm() / exact.norm()).item()
    note(f"gradients, {dtype}, rank={rank}", loss_error=loss_error, gradient_error=gradient_error)
    assert loss_error < LIMITS[dtype] / 10 and gradient_error < LIMITS[dtype]


# --- runs -----------------------------------------------------------------------------------------


def mini_flags(folder, device, dtype):
    """160 updates of the demo's training."""
    flags = {"out_dir": folder, "device": device, "dtype": dtype, "max_iters": 160, "eval_interval": 80}
    flags |= {"eval_iters": 8}
    return [MINI, *(f"--{key}={value}" for key, value in flags.items())]


TRAIN_AND_SCORE = """
import sys
from configurator import configure
from generate import ModelSampler
from train import train
config = configure(sys.argv[1:])
train(config)
print(ModelSampler(config.out_dir, device="cpu").get_accuracy())
"""


@pytest.fixture(scope="session")
def cpu_run(gpu, tmp_path_factory):
    """The same training on the CPU, in float32: on one core, while the tests in between use the GPU."""
    flags = mini_flags(tmp_path_factory.mktemp("cpu"), "cpu", "float32")
    command = [sys.executable, "-c", TRAIN_AND_SCORE, *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() - 1))}
    with subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def cpu_accuracy(cpu_run):
    out, _ = cpu_run.communicate()
    assert cpu_run.returncode == 0, out
    return float(out.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run on a random model of two layers."""
    folder = base_folder(tmp_path_factory, "gpu", n_layer=2, n_positions=128)

    def flags(**settings):
        values = {"init_from": folder / "base", "dataset": "rt_reviews", "train_examples": 300, "label_names": None}
        values |= {"rank": 4, "alpha": 16, "max_iters": 12, "eval_interval": 4, "eval_iters": 2, "lr": 1e-3}
        return [f"--{key}={value}" for key, value in (values | settings).items()]

    return flags


@pytest.mark.parametrize("device, dtype", [("cpu", "float16"), *ON_GPU], indirect=["device"])
def test_a_resumed_run_ends_in_the_same_bits(device, dtype, small, any_dtype, tmp_path, monkeypatch, note):
    """Otherwise --deterministic=True is a word, and a run that Colab cut off ends elsewhere than it would have."""
    skip_without(device, dtype)
    settings = {"device": device, "dtype": dtype, "deterministic": True, "dropout": 0.1, "batch_size": 8}
    honest = train.evaluate
    try:
        whole = train.train(configure(small(out_dir=tmp_path / "whole", **settings)))

        def evaluate_and_stop(run):
            if os.path.exists(tmp_path / "broken" / "checkpoint.pt"):  # at the second evaluation
                signal.raise_signal(signal.SIGTERM)
            return honest(run)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(train, "evaluate", evaluate_and_stop)
            train.train(configure(small(out_dir=tmp_path / "broken", **settings)))
        assert ended.value.code == 128 + signal.SIGTERM
        flags = {"init_from": "resume", "out_dir": tmp_path / "broken", "device": device, "deterministic": True}
        flags["dtype"] = dtype
        resumed = train.train(configure([f"--{key}={value}" for key, value in flags.items()]))
    finally:
        torch.use_deterministic_algorithms(False)
    name = "adapter_model.safetensors"
    same = (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    note(f"resume, {dtype}", same_bits=same)
    assert same
    assert [m["val_loss"] for m in whole] == [m["val_loss"] for m in resumed]


@pytest.mark.gpu
@pytest.mark.usefixtures("cpu_run")
def test_a_compiled_run_computes_the_same(gpu, small, tmp_path, note):
    """Otherwise --compile=True ends in an error of the compiler's, or trains something else."""
    losses = {}
    seconds = {}
    for compiled in (False, True):
        settings = {"out_dir": tmp_path / str(compiled), "device": gpu, "dropout": 0, "compile": compiled}
        began = time.perf_counter()
        metrics = train.train(configure(small(**settings)))
        seconds[compiled] = time.perf_counter() - began
        losses[compiled] = [m["val_loss"] for m in metrics] + [m["train_loss"] for m in metrics[1:]]
    note(f"--compile=True, {dtype_name(gpu)}", seconds=seconds[True], seconds_without=seconds[False])
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


# --- memory ---------------------------------------------------------------------------------------


def free_bytes(device):
    gc.collect()
    torch.cuda.empty_cache()  # what this process keeps for later; nothing happens without CUDA
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device.startswith("mps"):
        return torch.mps.recommended_max_memory()
    return 1.2e9  # so that a check of these lines on a CPU is no work of hours


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["LoRA", "full"])
@pytest.mark.parametrize("name", memory.SHAPES)
def test_memory_is_what_the_table_says(gpu, name, kind, note):
    """Otherwise the table of what fits on which card sends a user into an error, minutes after the start."""
    foreseen = memory.training_bytes(name, kind)
    if foreseen > 0.9 * free_bytes(gpu):
        pytest.skip(f"{name}, {kind}: {foreseen / 1e9:.0f} GB are more than this device has free")
    n_layer, n_embd, _ = memory.SHAPES[name]
    lora = {"lora_rank": 128, "lora_alpha": 512} if kind == "LoRA" else {}
    config = Config(device=gpu, rank=lora.get("lora_rank", 0), batch_size=32)
    dtype = pick_dtype(gpu, config.dtype)
    with torch.device(gpu):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd, **lora))
    if lora:
        mark_only_lora_as_trainable(model)
    model.set_dtype(dtype)
    idx = torch.randint(0, 50257, (32, 60))
    targets = torch.full_like(idx, -1)
    targets[:, -2:] = 5
    batch = Batch(torch.zeros(1, 0, dtype=torch.long), idx, targets)
    loader = SimpleNamespace(n_scored=lambda split, indices: 64, batch=lambda split, indices: batch)
    scaler = torch.amp.GradScaler(gpu.split(":")[0], enabled=dtype == torch.float16, init_scale=1.0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(config, model)
    run = train.Run(config, Processes(config), dtype, loader, model, params, optimizers, scaler)
    if gpu.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(gpu)
    for it in range(2):  # AdamW's moments are there from the first on
        train.update(run, train.micro_batches(run, range(32)), it)
    measured = peak_memory(gpu)
    note(f"memory, {name}, {kind}", gb=measured / 1e9, foreseen_gb=foreseen / 1e9)
    if gpu.startswith("cuda"):  # elsewhere the peak is that of the whole process
        assert 0.5 * foreseen < measured < foreseen / 0.9  # the table leaves a tenth of each card free


# --- a whole run ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_is_as_good_as_the_cpus(gpu, dtype, cpu_accuracy, any_dtype, tmp_path, note):
    """Otherwise most users, who have a GPU, get worse models than this repository's figures promise; or their labels
    depend on the machine that scores."""
    skip_without(gpu, dtype)
    metrics = train.train(configure(mini_flags(tmp_path, gpu, dtype)))
    sampler = ModelSampler(str(tmp_path), device=gpu, dtype=dtype)
    accuracy = sampler.get_accuracy()
    precise = ModelSampler(str(tmp_path), device="cpu", dtype="float32")
    precise.get_accuracy()
    changed = sum(a != b for a, b in zip(sampler.found, precise.found))
    skipped = metrics[-1].get("skipped", 0)
    figures = {"accuracy": accuracy, "cpu_accuracy": cpu_accuracy, "labels_changed": changed, "skipped": skipped}
    note(f"run, {dtype}", **figures, examples_per_s=metrics[-1]["examples_per_s"])
    assert abs(accuracy - cpu_accuracy) <= 0.02
    assert changed <= 0.01 * len(precise.found)
    assert skipped <= 16  # the first scale is too large for some models, and halves


# --- speed ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_benchmark_runs(gpu, report, tmp_path, capfd):
    """Otherwise nobody knows how fast a training is on this GPU, and beside peft."""
    path = tmp_path / "bench.json"
    assert free_bytes(gpu) > 1e9
    with capfd.disabled():
        print()
        command = [sys.executable, "-m", "tools.bench", "--quick", f"--device={gpu}", f"--out={path}"]
        code = subprocess.run(command, cwd=REPO).returncode
    assert code == 0
    report["bench"] = json.loads(path.read_text())
    write_json(REPORT, report)
    # What --quick has no time for is no failure; a process that ended is one.
    assert not [line for line in report["bench"]["left_out"] if "ended" in line]
