"""Measures this repository beside transformers + peft, and beside the machine's own limit.

    python -m tools.bench                              every part
    python -m tools.bench --quick                      the main cases, within 3 minutes on 2 cores, 4 on a GPU
    python -m tools.bench --only=train,peak --steps=21

The systems of a case do the same work on the same random weights (made here, no hub) and the same lists of
examples, of like length within a batch. Each has a process of its own, so its peak of memory is its own and no
setting of one helps another; they take turns step by step (A B A B), so the machine's moods hit all alike.
"""

import ast
import contextlib
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

from plumbing.running import threads  # before torch, which reads these settings once

# isort: split
import torch
import torch.nn.functional as F

from configurator import Config, configure
from dataloader import CustomDataLoader, make_loader
from generate import ModelSampler
from lora import mark_only_lora_as_trainable
from model import GPT, GPTConfig
from plumbing.data import token_cache
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.program.errors import one_line_errors
from plumbing.program.files import ROOT, write_json
from plumbing.running.machine import pick_device, pick_dtype, read_cpu_info
from train import set_up, update

PARTS = "train,score,start,latency,peak,neighbour"
SHAPES = {"gpt2-medium": (24, 16, 1024), "gpt2-mini": (6, 4, 256)}  # n_layer, n_head, n_embd
PEER, PRODUCT = "transformers + peft", "matrix product"
NEIGHBOURS = {  # what else runs on the machine: a Python program's text
    "alone": "",
    "beside a busy thread": "while True: pass",
    "beside a second torch program": "import torch\nx = torch.randn(512, 512)\nwhile True: x = (x @ x).tanh()",
}
COUNTED = """Useful in a training step: 4 N a token (2 N forward, 2 N backward; N = the blocks' frozen matrices), 6 an
adapter parameter and token (2 forward, 4 backward), attention's own products, the head where a target is scored;
tokens as needed: the shared prefix once a batch, each row's own without padding. The plain formula counts every token
of every example, and neither attention nor head."""


@dataclass
class BenchConfig:
    """Measures this repository beside transformers + peft, and beside the machine's own limit."""

    # --- bench
    only: str = PARTS  # the parts to run, with commas; data: a first start on many rows
    rows: int = 200_000  # of the part data
    quick: bool = False  # fewer cases, within 3 minutes on 2 cores, 4 on a GPU
    steps: int = 0  # measured steps of a case; 0: 11, or 2 with --quick
    layers: int = 0  # > 0: cuts the models to this depth, for a smoke run
    dataset: str = "rt_reviews"  # as for train.py
    label_names: str | None = None  # as for train.py
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16; auto trains in bfloat16 and float16 on a GPU
    out: str = "bench.json"  # where the figures are written


# --- the systems: a function loads one from a Config and returns what does a job -------------------


def train_ours(config):
    """train.py's own update, as it stands there."""
    run = set_up(config)
    return lambda indices: update(run, indices, 0)


def clip_and_step(config, optimizer, scaler):
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def peer_model(config):
    """The base in config.dtype, adapters in float32, as peft makes them."""
    sys.modules["torchao"] = None  # peft stops at an old torchao, as Colab has one; nothing here needs it
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    options = {"torch_dtype": getattr(torch, config.dtype), "attn_implementation": "sdpa"}
    model = GPT2LMHeadModel.from_pretrained(config.init_from, **options).to(config.device)
    options = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, **options))


def padded(rows, device, left=False):
    """Token lists as (ids, attention mask), padded to the longest."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), end_of_text()), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def train_peer(config):
    """The usual loop: padding to the batch's longest, labels of -100 where nothing is scored, fused AdamW. Below
    float32 autocast too: on a CPU it makes peft a sixth faster than half-precision weights alone."""
    dtype, kind = getattr(torch, config.dtype), config.device.split(":")[0]
    model, examples = peer_model(config).train(), make_loader(config, 1024).splits["train"]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, fused=kind in ("cpu", "cuda"), **options)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def step(indices):
        rows = [examples[i] for i in indices]
        ids, mask = padded([ex.tokens for ex in rows], config.device)
        labels = ids.masked_fill(mask == 0, -100)
        for label, ex in zip(labels, rows):
            label[: ex.n_prompt] = -100
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        scaler.scale(loss).backward()
        clip_and_step(config, optimizer, scaler)
        return float(loss)

    return step


def load_ours(config, unmerged=False):
    """As generate.py loads a tuned model: with its adapters merged, unless told otherwise."""
    model = GPT.from_pretrained(config.init_from, lora_rank=config.rank, lora_alpha=config.alpha)
    mark_only_lora_as_trainable(model)
    return model.to(pick_device(config.device)).set_dtype(getattr(torch, config.dtype)).train(unmerged)


def score_ours(config):
    """generate.py's own scoring; here the shared prefix is run anew for each batch."""
    sampler = ModelSampler(config=config)
    sampler.load_data()
    sampler.model = load_ours(config)
    examples = sampler.loader.splits["test"]

    def score(indices):
        prompts = [examples[i].tokens[: examples[i].n_prompt] for i in indices]
        return sampler.answer(prompts, sampler.loader.prompt)[0]

    return score


def score_peer(config, merged):
    """Batched `generate`: padding on the left, the cache on. In bfloat16 on a CPU most of its time goes into the
    first token's logits: torch multiplies the sliced states with a copy of the head's weight for each row."""
    model, eos = peer_model(config), end_of_text()
    model = (model.merge_and_unload() if merged else model).eval()
    examples = make_loader(config, 1000, wanted=("test",)).splits["test"]
    options = {"max_new_tokens": config.max_new_tokens, "do_sample": False, "pad_token_id": eos}

    @torch.inference_mode()
    def score(indices):
        ids, mask = padded([examples[i].tokens[: examples[i].n_prompt] for i in indices], config.device, left=True)
        out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.size(1) :]
        return [gpt2_encoding().decode([t for t in row if t != eos]) for row in out.tolist()]

    return score


def latency(config, unmerged):
    """One example of 52 tokens: a forward pass, or 32 new tokens."""
    model, idx = load_ours(config, unmerged), torch.arange(1000, 1052, device=config.device)[None]

    @torch.no_grad()
    def run(job):
        model(idx) if job == "forward" else model.generate(idx, 32, temperature=0)

    return run


def products(config):
    """GFLOP/s of the best of some matrix products, each the median of 5."""
    n = 4 if config.device.startswith("cuda") else 1
    sizes = [(2048 * n, 2048 * n, 2048 * n), (4096 * n, 1024 * n, 4096 * n), (1024 * n, 4096, 1024)]
    like = {"dtype": getattr(torch, config.dtype), "device": config.device}
    pairs = [(torch.randn(m, k, **like), torch.randn(n, k, **like)) for m, k, n in sizes]

    def speed(x, w):
        seconds = statistics.median(timed(config.device, F.linear, x, w)[0] for _ in range(5))
        return 2e-9 * x.numel() * len(w) / seconds

    return lambda job: max(speed(x, w) for x, w in pairs)


# --- processes that take turns ---------------------------------------------------------------------


def timed(device, function, *arguments):
    """(seconds, result) of a call."""
    synchronize(device)
    began = time.perf_counter()
    result = function(*arguments)
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device):
    """Waits until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def peak_memory(device):
    """Bytes: of the GPU's tensors or, without a GPU, of the whole process. Linux hands ru_maxrss down from parent to
    child, so there it is asked elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(pipe, system, config, options):
    """A child's life: load a system, do job after job, answer (seconds, result, peak memory)."""
    run = system(config, **options)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send((*timed(config.device, run, pipe.recv()), peak_memory(config.device)))


@contextlib.contextmanager
def running(bench, systems):
    """{name: pipe} of {name: (function, config, options)}, each started in a process of its own."""
    context, pipes, children = multiprocessing.get_context("spawn"), {}, []
    for name, system in systems.items():
        if bench.peer or not name.startswith(PEER):
            pipes[name], theirs = context.Pipe()
            children.append(context.Process(target=serve, args=(theirs, *system), daemon=True))
            os.environ |= waiting(name)
            children[-1].start()
            theirs.close()
    yield pipes
    for child in children:
        child.terminate()
        child.join()


def waiting(system):
    """How OpenMP's threads wait, in each system as its user gets it: the environment of its process."""
    if not threads.IS_OURS:
        return {}
    return {"GOMP_SPINCOUNT": threads.DEFAULT_SPINS if system.startswith(PEER) else threads.SPINS}


def alternate(bench, case, pipes, jobs, warm_up=None):
    """{name: [(seconds, result, peak memory)]}, the first of each a warm-up: all do one job, then all the next."""
    answers = {name: [] for name in pipes} if in_time(bench, case) else {}
    for n, job in enumerate([jobs[0] if warm_up is None else warm_up, *jobs]):
        if n > 1 and time.monotonic() > bench.until:
            break
        for name in list(answers):
            try:
                pipes[name].send(job)
                answers[name].append(pipes[name].recv())
            except (EOFError, OSError):  # the child has printed why, unless it was killed
                bench.left_out.append(f"{case}, {name}: its process ended (for lack of memory?)")
                del answers[name]
    return answers


def in_time(bench, case):
    """Whether --quick still has time for a case."""
    print(f"{time.monotonic() - bench.began:4.0f} s  {case}", file=sys.stderr)
    if time.monotonic() > bench.until:
        bench.left_out.append(f"{case}: no time left in --quick")
    return time.monotonic() <= bench.until


# --- figures ---------------------------------------------------------------------------------------


def spread(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "steps": len(values)}


def add_rows(bench, case, unit, answers, amount=None):
    """A row for each system: `amount` a second (None: seconds), and its time and memory over the first system's."""
    first = next(iter(answers), None)
    for name, given in answers.items():
        times, memory = [a[0] for a in given[1:]], given[-1][2]
        row = {"case": case, "system": name, "unit": unit, "memory": memory}
        row |= spread([amount / s for s in times] if amount else times)
        if name != first:
            row["time_ratio"] = spread([s / a[0] for s, a in zip(times, answers[first][1:])])
            row["memory_ratio"] = memory / answers[first][-1][2] if memory else None
        bench.rows.append(row)


def table(rows):
    lines = ["| case | system | median (lowest .. highest) | peak memory | beside the case's first line |"]
    lines.append("|---|---|---|---|---|")
    for last, row in zip([{}, *rows], rows):
        case = "" if last.get("case") == row["case"] else row["case"]
        middle, low, high = (f"{row[k]:,.{0 if row[k] >= 100 else 2}f}" for k in ("median", "low", "high"))
        memory = f"{row['memory'] / 1e9:.2f} GB" if row["memory"] else ""
        beside = ""
        if ratio := row.get("time_ratio"):
            beside = f"{ratio['median']:.2f} x the time ({ratio['low']:.2f} .. {ratio['high']:.2f})"
        if row.get("memory_ratio"):
            beside += f", {row['memory_ratio']:.2f} x the memory"
        lines.append(f"| {case} | {row['system']} | {middle} {row['unit']} ({low} .. {high}) | {memory} | {beside} |")
    return "\n".join(lines)


def operations(bench, shape, rank, indices):
    """(useful, plain) operations of a LoRA training step on these examples; see COUNTED."""
    (L, _, C), P = bench.shapes[shape], len(bench.loader.prefixes["train"])
    examples = [bench.loader.splits["train"][i] for i in indices]
    a_token = 4 * 12 * L * C * C + 6 * 6 * rank * C * L  # A and B of QKV and projection: r (C + 3 C) + r (C + C)
    own = [len(ex.tokens) - 1 - P for ex in examples]  # the last token is a target only
    pairs = P * (P + 1) / 2 + sum(P * n + n * (n + 1) / 2 for n in own)  # of a query and a key that it sees
    scored = sum(len(ex.tokens) - ex.n_prompt for ex in examples)
    useful = a_token * (P + sum(own)) + 12 * L * C * pairs + 4 * 50257 * C * scored
    return useful, a_token * sum(len(ex.tokens) for ex in examples)


def add_share(bench, case, dtype, answers, counts):
    """The machine's peak and, of each step, the share that ours reaches of the peak measured in the same round."""
    peaks, ours = ([a[i] for a in answers.get(n, [])[1:]] for n, i in ((PRODUCT, 1), (f"ours, {dtype}", 0)))
    answers.pop(PRODUCT, None)
    if peaks:
        bench.shares.append({"case": case, "dtype": dtype, "peak_gflops": spread(peaks)})
        for i, kind in enumerate(("useful", "plain") if ours else ()):
            bench.shares[-1][kind] = spread([1e-9 * c[i] / s / p for c, s, p in zip(counts, ours, peaks)])


# --- the parts -------------------------------------------------------------------------------------


def settings(bench, shape, rank, batch_size, dtype):
    """The Config of a case. No dropout; the adapter's scale is 4; the labels are the texts' own."""
    config = Config(init_from=os.path.join(bench.folder, shape), rank=rank, alpha=4.0 * rank, **bench.data)
    config = replace(config, dropout=0.0, label_names=None, lr=1e-4, max_new_tokens=5)
    return replace(config, batch_size=batch_size, dtype=dtype, device=bench.device)


def batches(bench, split, size):
    """Batches of like length, evenly spread over the lengths, the middle ones first."""
    whole = [b for b in bench.loader.order(split, size) if len(b) == size]
    places = sorted(((k + 0.5) / bench.steps for k in range(bench.steps)), key=lambda place: abs(place - 0.5))
    return [whole[int(place * len(whole))] for place in places]


def train_part(bench):
    quick, sizes = bench.config.quick, (8, 32, 64) if bench.device.startswith("cuda") else (8, 32)
    groups = [(shape, rank, sizes) for shape in SHAPES for rank in (128, 16)]
    if quick:
        groups = [("gpt2-medium", 128, sizes), ("gpt2-mini", 16, sizes[1:])]
    for dtype, (shape, rank, sizes) in itertools.product(bench.dtypes, groups):
        config = settings(bench, shape, rank, sizes[-1], dtype)
        float32, every = replace(config, dtype="float32"), replace(config, rank=0)
        systems = {f"ours, {dtype}": (train_ours, config, {}), f"{PEER}, {dtype}": (train_peer, config, {})}
        extra = {}  # only with the smallest batch
        if shape == "gpt2-mini":
            systems["ours, float32"] = (train_ours, float32, {})
        if shape == "gpt2-mini" or not quick:
            extra[f"{PEER}, float32"] = (train_peer, float32, {})
        if (shape, rank) == ("gpt2-medium", 16):
            extra[f"ours, {dtype}, every weight trained (rank = 0)"] = (train_ours, every, {})
        if "peak" in bench.parts and shape == "gpt2-medium":
            systems[PRODUCT] = (products, config, {})
        with running(bench, systems | extra) as pipes:
            for size in sizes:  # ascending, so that each has its own peak of memory
                case, jobs = f"training, {shape}, batch {size}, r = {rank}", batches(bench, "train", size)
                answers = alternate(bench, case, pipes, jobs)
                add_share(bench, case, dtype, answers, [operations(bench, shape, rank, job) for job in jobs])
                add_rows(bench, case, "examples/s", answers, size)
                # In the first step the weights are equal; then those of A, drawn by each for itself, lead them apart.
                if size == sizes[0] and {"ours, float32", f"{PEER}, float32"} <= answers.keys():
                    bench.losses = [answers[name][0][1] for name in ("ours, float32", f"{PEER}, float32")]
                only_once = (extra.keys() - systems.keys()) & pipes.keys()  # in float32 the peer is in both
                for name in only_once if size == sizes[0] else ():
                    pipes.pop(name).close()


def peak_part(bench):
    """Where no training was measured beside it."""
    for dtype in () if bench.shares else bench.dtypes:
        with running(bench, {PRODUCT: (products, settings(bench, "gpt2-medium", 0, 1, dtype), {})}) as pipes:
            add_share(bench, "alone", dtype, alternate(bench, PRODUCT, pipes, [PRODUCT] * bench.steps), [])


def score_part(bench):
    for shape in ["gpt2-medium"] if bench.config.quick else SHAPES:
        config, case = settings(bench, shape, 128, 32, bench.dtypes[0]), f"scoring, {shape}, batch 32, 5 new tokens"
        systems = {f"ours, {config.dtype}": (score_ours, config, {})}
        variants = [(config.dtype, True), ("float32", True), (config.dtype, False)]
        for dtype, merged in variants[:2] if bench.config.quick else variants:
            name = f"{PEER}, {dtype}, {'merged' if merged else 'unmerged'}"
            systems[name] = (score_peer, replace(config, dtype=dtype), {"merged": merged})
        jobs = batches(bench, "test", 32)
        with running(bench, systems) as pipes:
            add_rows(bench, case, "examples/s", alternate(bench, case, pipes, jobs, jobs[0][:2]), 32)


def peer_from_start(what, config):
    """What a peer's user runs in place of train.py or generate.py."""
    if what == "train":
        train_peer(config)(range(config.batch_size))
    else:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(config.init_from, torch_dtype=getattr(torch, config.dtype))
        idx, mask = padded([gpt2_encoding().encode_ordinary("A film")], config.device)
        model.to(config.device).generate(idx, attention_mask=mask, max_new_tokens=1, pad_token_id=end_of_text())
    print("done")


def seconds_until(system, sign, command):
    """Wall time from a program's start to its first line that begins with `sign`."""
    began, lines = time.perf_counter(), []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    options["env"] = os.environ | waiting(system)
    with subprocess.Popen([sys.executable, "-u", *command], **options) as process:
        for line in process.stdout:
            if line.startswith(sign):
                process.kill()
                return time.perf_counter() - began
            lines.append(line.strip())
    raise RuntimeError(f"{command[0]} ended before it printed {sign!r}: {' / '.join(lines[-3:])}")


def start_part(bench):
    """Ours is read off the programs' own output: training's line comes after evaluation, checkpoint and update."""
    config = settings(bench, "gpt2-mini", 16, 32, bench.dtypes[0])
    shared = ("init_from", "dtype", "device", "dataset", "template", "label_names")
    flags = [f"--{key}={getattr(config, key)}" for key in shared]
    flags += [f"--out_dir={bench.folder}/out"]
    lora = [f"--{key}={getattr(config, key)}" for key in ("rank", "alpha", "dropout")]
    train = ("update 1:", ["train.py", *flags, *lora, "--max_iters=1"])
    generate = ("A film", ["generate.py", *flags, "--start=A film", "--max_new_tokens=1"])
    for what, first, ours in (("train", "update", train), ("generate", "token", generate)):
        case = f"{what}.py, from its start to the first {first}, gpt2-mini"
        peer = [
            "-c",
            f"import configurator; from tools import bench; bench.peer_from_start({what!r}, configurator.{config!r})",
        ]
        programs = {"ours": ours} | ({PEER: ("done", peer)} if bench.peer else {})
        try:
            if in_time(bench, case):
                rounds = range(1 if bench.config.quick else 3)
                seconds = [[seconds_until(name, *program) for name, program in programs.items()] for _ in rounds]
                answers = {n: [(s, None, None) for s in (0, *times)] for n, times in zip(programs, zip(*seconds))}
                add_rows(bench, case, "s", answers)
        except RuntimeError as e:
            bench.left_out.append(f"{case}: {e}")


def latency_part(bench):
    systems = {}
    for name, rank, unmerged in (("base model", 0, False), ("merged", 128, False), ("unmerged", 128, True)):
        config = settings(bench, "gpt2-medium", rank, 1, bench.dtypes[0])
        systems[f"{name}, {config.dtype}"] = (latency, config, {"unmerged": unmerged})
    with running(bench, systems) as pipes:
        case = "forward pass, gpt2-medium, 1 example of 52 tokens, r = 128"
        add_rows(bench, case, "s", alternate(bench, case, pipes, ["forward"] * 3 * bench.steps))
        case = "generation, gpt2-medium, 32 tokens after 52, r = 128"
        add_rows(bench, case, "tokens/s", alternate(bench, case, pipes, ["generate"] * bench.steps), 32)


def neighbour_part(bench):
    """Training while something else runs on the same cores: a notebook, a browser, another training."""
    for shape, rank, size in [("gpt2-mini", 16, 32), ("gpt2-medium", 128, 8)][: 1 if bench.config.quick else 2]:
        config = settings(bench, shape, rank, size, bench.dtypes[0])
        systems = {
            f"ours, {config.dtype}": (train_ours, config, {}),
            f"{PEER}, {config.dtype}": (train_peer, config, {}),
        }
        jobs = batches(bench, "train", size)
        with running(bench, systems) as pipes:
            for neighbour, text in NEIGHBOURS.items():
                case = f"training, {shape}, batch {size}, r = {rank}, {neighbour}"
                other = subprocess.Popen([sys.executable, "-c", text], env=os.environ | waiting(PEER))
                time.sleep(3 if text else 0)
                try:
                    add_rows(bench, case, "examples/s", alternate(bench, case, pipes, jobs), size)
                finally:
                    other.kill()
                    other.wait()


def data_part(bench):
    """A first start on many rows, from the file to batches, beside tiktoken's own call for the same filled prompts.
    Each takes a process of its own, by turns."""
    path = os.path.join(bench.folder, "many.csv")
    texts = [(ex.text, bench.loader.label_names[ex.label]) for ex in bench.loader.splits["train"]]
    with open(path, "w", encoding="utf-8", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        rows.writerows(
            (f"{i} {text}", label) for i, (text, label) in zip(range(bench.config.rows), itertools.cycle(texts))
        )
    answers = {"tiktoken's encode_ordinary_batch": [None], "CustomDataLoader, the first time": [None]}
    for _ in range(bench.steps if bench.config.steps else 3):
        for name, function in zip(answers, ("tokenise_alone", "load_first")):
            command = [sys.executable, "-c", f"from tools import bench; print(bench.{function}({path!r}))"]
            out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
            answers[name].append(ast.literal_eval(out.splitlines()[-1]))
    add_rows(bench, f"{bench.config.rows:,} rows of csv to tokens", "s", answers)


def load_first(path):
    with tempfile.TemporaryDirectory() as token_cache.CACHE:
        began = time.perf_counter()
        CustomDataLoader(path, Config.template)
        return time.perf_counter() - began, None, peak_memory("cpu")


def tokenise_alone(path):
    before, after = Config.template.removesuffix("{label}").split("{text}")
    seconds = 0.0
    with open(path, encoding="utf-8", newline="") as f:
        rows = csv.reader(f)
        next(rows)
        while prompts := [before + text + after + label for text, label in itertools.islice(rows, 50_000)]:
            began = time.perf_counter()
            gpt2_encoding().encode_ordinary_batch(prompts, num_threads=os.cpu_count())
            seconds += time.perf_counter() - began
    return seconds, None, peak_memory("cpu")


# --- preparation and report ------------------------------------------------------------------------


def prepare(config, folder):
    """All that the parts share: what is to be measured, random weights, real texts as a file for every system."""
    bench = SimpleNamespace(config=config, folder=folder, began=time.monotonic(), parts=config.only.split(","))
    bench.rows, bench.shares, bench.losses, bench.left_out = [], [], [], []
    if unknown := set(bench.parts) - {*PARTS.split(","), "data"}:
        raise ValueError(f"only={config.only}: no part {min(unknown)!r}; type some of {PARTS},data")
    if min(config.steps, config.layers) < 0:
        raise ValueError(f"steps={config.steps}, layers={config.layers}: type at least 0")
    if not os.path.isdir(os.path.dirname(os.path.abspath(config.out))):
        raise ValueError(f"out={config.out}: no such directory")
    bench.steps = config.steps or (2 if config.quick else 11)
    bench.device = pick_device(config.device)
    seconds = 220 if bench.device.startswith("cuda") else 140  # a GPU has more cases, and often a slow CPU
    bench.until = bench.began + seconds if config.quick else float("inf")
    bench.dtypes = [str(pick_dtype(bench.device, config.dtype)).removeprefix("torch.")]
    if config.dtype == "auto" and bench.dtypes == ["bfloat16"] and bench.device.startswith("cuda"):
        bench.dtypes.append("float16")
    bench.machine = machine(bench.device)
    bench.peer = installed("transformers") and installed("peft")
    if not bench.peer:
        bench.left_out.append(f"{PEER}: not installed (pip install -r requirements-dev.txt)")
    if not bench.device.startswith("cuda"):
        bench.left_out.append("figures on a GPU: none is used here")

    template = Config.template
    sizes = {"train": 2000, "validation": 8, "test": 1000}
    full = CustomDataLoader(config.dataset, template, label_names=config.label_names, wanted=sizes)
    bench.data = {"dataset": os.path.join(folder, "texts.jsonl"), "template": template}
    with open(bench.data["dataset"], "w", encoding="utf-8") as f:
        for split, examples in full.splits.items():
            for ex in examples[:: max(1, len(examples) // sizes[split])][: sizes[split]]:
                f.write(json.dumps({"text": ex.text, "label": full.label_names[ex.label], "split": split}) + "\n")
    bench.loader = CustomDataLoader(**bench.data, wanted=("train", "test"))
    for split, examples in bench.loader.splits.items():
        if len(examples) < 64:
            raise ValueError(f"dataset={config.dataset}: {len(examples)} {split} examples, at least 64 are needed")

    bench.shapes = {name: (config.layers or L, *rest) for name, (L, *rest) in SHAPES.items()}
    for shape, (n_layer, n_head, n_embd) in bench.shapes.items():
        GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).save_pretrained(os.path.join(folder, shape))
    return bench


def machine(device):
    """What the figures were measured on."""
    name = re.search(r"model name\s*: (.*)", read_cpu_info())
    found = {"cpu": name and name[1], "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    found |= {"gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else "none"}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft") if installed(name)}
    return found | {"load_at_start": round(os.getloadavg()[0], 2)}


def installed(name):
    return importlib.util.find_spec(name) is not None


def report(bench):
    """Prints the figures and writes them to config.out."""
    write_json(bench.config.out, {k: getattr(bench, k) for k in ("machine", "rows", "shares", "losses", "left_out")})
    print(table(bench.rows) + "\n\nA range spans batches of short and long texts; a ratio compares the same batch.")
    for share in bench.shares:
        line = f"{PRODUCT}, {share['dtype']}: {share['peak_gflops']['median']:,.0f} GFLOP/s"
        if "useful" in share:
            useful, plain = (100 * share[kind]["median"] for kind in ("useful", "plain"))
            line += f"; {share['case']}: useful operations reach {useful:.0f} % of it (plain formula: {plain:.0f} %)"
        print(line)
    if bench.shares:
        print(COUNTED)
    if bench.losses:
        print("same loss: ours {:.6f}, peer {:.6f} (float32, first step)".format(*bench.losses))
    print(", ".join(f"{k} {v}" for k, v in bench.machine.items() if v is not None))
    print("\n".join(f"left out: {line}" for line in bench.left_out))
    if bench.losses and abs(bench.losses[0] - bench.losses[1]) > 1e-3:
        sys.exit("error: the losses differ, so the two did not do the same work")


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        with one_line_errors():
            bench = prepare(config, folder)
        os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for the children
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        parts = {"train": train_part, "start": start_part, "score": score_part, "latency": latency_part}
        parts |= {"neighbour": neighbour_part, "data": data_part}
        for name, part in (parts | {"peak": peak_part}).items():
            if name in bench.parts:
                part(bench)
    report(bench)


if __name__ == "__main__":
    main(configure(sys.argv[1:], cls=BenchConfig, trains=False))
