"""Walks a GPU's paths on a "cuda:0" that computes nothing: shapes, dtypes and devices are those of a GPU, and a
tensor on the wrong device raises. A line for each step: "ok", or "FAIL" with the place.

    PYTHONPATH=. python tests/fake_gpu/walk.py [broken]      broken: model.py makes its positions on the CPU

Not walked: float16's scaler, which torch switches off without a CUDA of its own; what depends on numbers (each that
is read is a 1, and each row but the last goes on); the compiler and CUDA graphs; nccl.
"""

import os
import sys
import traceback

import fake_cuda  # noqa: F401  (before torch, which looks for a GPU once)

# isort: split
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import plumbing.gpt2.kv_cache as kv_cache
import train
from configurator import Config
from lora import mark_only_lora_as_trainable
from model import GPT, GPTConfig
from plumbing.gpt2.batch import Batch
from plumbing.running import machine
from plumbing.running.optimizers import build_optimizers

ROOT = os.path.dirname(os.path.abspath(train.__file__))
GPU = "cuda:0"
n_failed = 0


def step(name, function):
    global n_failed
    try:
        print("ok  ", name, function() or "", flush=True)
    except Exception as e:
        n_failed += 1
        frames = [
            f
            for f in traceback.extract_tb(e.__traceback__)
            if f.filename.startswith(ROOT) and "site-packages" not in f.filename
        ]
        place = " < ".join(f"{os.path.relpath(f.filename, ROOT)}:{f.lineno}" for f in frames[:0:-1][:4])
        print("FAIL", name, type(e).__name__, str(e)[:200].replace("\n", " "), place, flush=True)


def build(dtype, rank, n_classes=0, dropout=0.0):
    lora = {"lora_rank": rank, "lora_alpha": 4.0 * rank, "lora_dropout": 0.1} if rank else {"dropout": dropout}
    with torch.device(GPU):
        config = GPTConfig(
            n_layer=3, n_head=4, n_embd=64, vocab_size=301, block_size=128, n_classes=n_classes, **lora
        )
        model = GPT(config)
    if rank:
        mark_only_lora_as_trainable(model, also=r"^score\." if n_classes else None)
    return model.set_dtype(dtype)


def check(condition, found):
    if not condition:
        raise AssertionError(found)


def walk(dtype, rank):
    model = build(dtype, rank, dropout=0.1)
    idx = torch.randint(0, 300, (4, 10), device=GPU)
    prefix = torch.randint(0, 300, (1, 5), device=GPU)
    targets = torch.full((4, 10), -1, device=GPU)
    scored = torch.arange(8, device=GPU)
    tag = f"{str(dtype)[6:]}, rank {rank}:"

    def backward(model, targets=targets, **options):
        batch = Batch(options.get("prefix", prefix), idx, targets, options.get("class_weights"), scored)
        loss = train.compute_loss(model.train(), batch)
        loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                check(p.grad is not None and str(p.grad.device) == GPU and p.grad.dtype == torch.float32, name)
            p.grad = None
        check(str(loss.device) == GPU and loss.dtype == torch.float32, loss)

    step(f"{tag} forward and backward", lambda: backward(model))
    step(f"{tag} without a shared prefix", lambda: backward(model, prefix=prefix[:, :0]))

    classifier = build(dtype, rank, n_classes=3)
    classes = torch.zeros(4, 10, dtype=torch.long, device=GPU)
    step(f"{tag} classifier", lambda: backward(classifier, classes, class_weights=torch.ones(3, device=GPU)))

    @torch.no_grad()
    def evaluate():
        model.eval()
        loss = train.compute_loss(model, Batch(prefix, idx, targets, None, scored))
        weight = model.transformer.h[0].attn.c_attn.weight
        check(weight.dtype == (dtype if rank else torch.float32) and str(weight.device) == GPU, weight.dtype)
        cache = kv_cache.KVCache()
        model.hidden(prefix, cache)
        model.hidden(idx, cache.fork(), scored=scored)
        check(model(idx)[0].dtype == dtype and str(loss.device) == GPU, loss)
        model.train()

    step(f"{tag} evaluation, merging, a past", evaluate)

    def generate(n=4, padded=False, with_past=False, idx=idx, **options):
        model.eval()
        past = None
        if with_past or padded:
            past = kv_cache.KVCache()
            model.hidden(prefix.expand(4, 5) if padded else prefix, past)
        if padded:
            past.real = torch.ones(4, 5, dtype=torch.bool, device=GPU)
        with torch.no_grad():
            out = model.generate(idx, n, past=past, **options)
        model.train()
        check(str(out.device) == GPU and len(out) == len(idx), out)
        return tuple(out.shape)

    step(f"{tag} generate, greedy", lambda: generate(temperature=0))
    step(f"{tag} generate, sampled", lambda: generate(temperature=0.8, top_k=5))
    step(f"{tag} generate, stopping", lambda: generate(temperature=0, stop=7))
    step(f"{tag} generate after a past", lambda: generate(temperature=0, with_past=True))
    step(f"{tag} generate after padded rows", lambda: generate(temperature=0, padded=True))
    long = torch.randint(0, 300, (2, 126), device=GPU)
    step(f"{tag} generate beyond the context", lambda: generate(6, idx=long, temperature=0))

    def update():
        config = Config(device=GPU, rank=rank, batch_size=4)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizers = build_optimizers(config, model)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        processes = machine.Processes(config)
        run = train.Run(config, processes, dtype, None, model, params, optimizers, scaler)
        on_cpu = Batch(*(t.to("cpu") for t in (prefix, idx, targets)), None, scored.to("cpu"))
        for it in range(2):
            train.update(run, [(on_cpu.to(GPU), 0.5), (on_cpu.to(GPU), 0.5)], it)
        state = optimizers[0].state[params[0]]
        check(all(str(t.device) == GPU and t.dtype == torch.float32 for t in state.values()), state)

    step(f"{tag} two updates", update)


def main(broken):
    torch.cuda.default_generators = (torch.Generator(),)
    FakeTensor.tolist = lambda t: [1.0] * t.numel()
    torch.Tensor.nonzero = lambda t: torch.arange(t.numel() - 1, device=t.device)[:, None]
    if broken:
        arange = torch.arange

        def arange_on_cpu(*args, device=None, **options):
            of_model = sys._getframe(1).f_code.co_filename == os.path.join(ROOT, "model.py")
            return arange(*args, device="cpu" if of_model else device, **options)

        torch.arange = arange_on_cpu
    with FakeTensorMode(allow_non_fake_inputs=False):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for rank in (8, 0):
                walk(dtype, rank)
        step("the comparison with the CPU", lambda: len(machine.try_device(GPU)))
    print(f"{n_failed} failed")
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    main("broken" in sys.argv[1:])
