"""Measures this repository beside transformers + peft, and beside the machine's own limit.

    python -m tools.bench                              every part
    python -m tools.bench --quick                      the main cases, within 3 minutes on 2 cores, 4 on a GPU
    python -m tools.bench --only=train,peak --steps=21

The systems of a case do the same work on the same random weights (made here, no hub) and the same lists of examples,
of similar length within a batch. Each has a process of its own, so its peak of memory is its own and no setting of
one helps another. They alternate step by step (A B A B), so drift affects all equally.
"""

import contextlib
import csv
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial

from plumbing.running import threads  # before torch, which reads these settings once

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import Config, configure
from dataloader import CustomDataLoader, make_loader
from generate import ModelSampler
from model import GPT, GPTConfig
from plumbing.data import token_cache
from plumbing.data.tokenizer import end_of_text, gpt2_encoding
from plumbing.program.errors import one_line_errors
from plumbing.program.files import ROOT, write_json
from plumbing.program.settings import setting
from plumbing.program.terminal import forgiving_output
from plumbing.running.machine import pick_device, pick_dtype
from tools.report.page import make_markdown
from tools.runs.launches import CASE, EXAMPLES, launches, save_narrow, train_narrow
from tools.runs.measure import describe_machine, make_untrained, peak_memory, spread, time_latency, timed
from tools.runs.run import flags
from train import micro_batches, set_up, update

PARTS = "train,score,start,latency,peak,neighbour,launches"
SHAPES = {"gpt2-medium": (24, 16, 1024), "gpt2-mini": (6, 4, 256)}  # n_layer, n_head, n_embd
PEER = "transformers + peft"
PRODUCT = "matrix product"
NEIGHBOURS = {  # what else runs on the machine: a Python program's text
    "alone": "",
    "beside a busy thread": "while True: pass",
    "beside a second torch program": "import torch\nx = torch.randn(512, 512)\nwhile True: x = (x @ x).tanh()",
}


@dataclass
class BenchConfig:
    """Measures this repository beside transformers + peft, and beside the machine's own limit."""

    # --- bench
    only: str = PARTS  # the parts to run, with commas; data: a first start on many rows
    rows: int = setting(200_000, least=1)  # of the part data
    quick: bool = False  # fewer cases, within 3 minutes on 2 cores, 4 on a GPU
    steps: int = setting(0, least=0)  # measured steps of a case; 0: 11, or 2 with --quick
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16; auto trains in bfloat16 and float16 on a GPU
    out: str = "bench.json"  # where the figures are written


class Bench:
    """What is to be measured, with random weights and real texts; and what was found."""

    def __init__(self, config, folder):
        if unknown := set(config.only.split(",")) - MEASURES.keys():
            raise ValueError(f"only={config.only}: no part {min(unknown)!r}; type some of {','.join(MEASURES)}")
        if not os.path.isdir(os.path.dirname(os.path.abspath(config.out))):
            raise ValueError(f"out={config.out}: no such directory")
        if not all(map(importlib.util.find_spec, ("transformers", "peft"))):
            raise ValueError(f"{PEER} are not installed: pip install -r requirements-dev.txt")
        self.config = config
        self.folder = folder
        self.device = pick_device(config.device)
        self.on_gpu = self.device.startswith("cuda")
        self.dtypes = [str(pick_dtype(self.device, config.dtype)).removeprefix("torch.")]
        if config.dtype == "auto" and self.dtypes == ["bfloat16"] and self.on_gpu:
            self.dtypes.append("float16")
        self.machine = describe_machine(self.device)
        self.steps = config.steps or (2 if config.quick else 11)
        self.began = time.monotonic()
        seconds = 220 if self.on_gpu else 140  # a GPU has more cases, and often a slow CPU
        self.until = self.began + seconds if config.quick else float("inf")
        self.loader = CustomDataLoader("rt_reviews", Config.template, wanted=("train", "test"))
        for name, (n_layer, n_head, n_embd) in SHAPES.items():
            GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).save_pretrained(os.path.join(folder, name))
        self.rows = []
        self.shares = []  # of the machine's peak
        self.losses = []  # ours and the peer's, of the same step
        self.left_out = []

    def settings(self, shape, rank, batch_size, dtype):
        """The Config of a case. No dropout; the adapter's scale is 4; the labels are the texts' own."""
        model = {"init_from": os.path.join(self.folder, shape), "rank": rank, "alpha": 4.0 * rank, "dropout": 0.0}
        options = {"dataset": "rt_reviews", "label_names": None, "lr": 1e-4, "max_new_tokens": 5}
        return Config(batch_size=batch_size, dtype=dtype, device=self.device, **model, **options)

    def batches(self, split, size):
        """Batches of similar length, evenly spread over the lengths, the middle ones first."""
        whole = [b for b in self.loader.order(split, size) if len(b) == size]
        places = sorted(((k + 0.5) / self.steps for k in range(self.steps)), key=lambda place: abs(place - 0.5))
        return [whole[int(place * len(whole))] for place in places]

    def in_time(self, case):
        """Whether --quick still has time for a case."""
        print(f"{time.monotonic() - self.began:4.0f} s  {case}", file=sys.stderr)
        if time.monotonic() > self.until:
            self.left_out.append(f"{case}: no time left in --quick")
        return time.monotonic() <= self.until

    def take_turns(self, case, systems, jobs):
        """Lets the systems, {name: function of a job}, do the jobs, each in turn. Returns {name: its answers}, each
        (seconds, result, peak memory)."""
        answers = {name: [] for name in systems} if self.in_time(case) else {}
        for n, job in enumerate(jobs):
            if n > 1 and time.monotonic() > self.until:
                break
            for name in list(answers):
                try:
                    answers[name].append(systems[name](job))
                except RuntimeError as e:
                    self.left_out.append(f"{case}, {name}: {e}")
                    del answers[name]
        return answers

    def measure(self, case, systems, jobs):
        """The same with batches of examples, after a warm-up, which is the first answer; adds each system's row."""
        answers = self.take_turns(case, systems, [jobs[0], *jobs])
        measured = {name: given[1:] for name, given in answers.items() if name != PRODUCT}
        self.add_rows(case, "examples/s", measured, len(jobs[0]))
        return answers

    def add_rows(self, case, unit, answers, amount=None):
        """A row for each system: `amount` a second (None: seconds), and its time and memory over the first one's."""
        first = None
        for name, given in answers.items():
            times = [answer[0] for answer in given]
            memory = given[-1][2]
            row = {"case": case, "system": name, "unit": unit, "memory": memory}
            row |= spread([amount / s for s in times] if amount else times)
            if first:
                row["time_ratio"] = spread([s / theirs for s, theirs in zip(times, first[0])])
                row["memory_ratio"] = memory / first[1] if memory else None
            first = first or (times, memory)
            self.rows.append(row)


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        with one_line_errors():
            bench = Bench(config, folder)
        os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for the children
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        for name, measure in MEASURES.items():
            if name in config.only.split(","):
                measure(bench)
    report(bench)


def report(bench):
    """Prints the figures and writes them to config.out."""
    keys = ("machine", "rows", "shares", "losses", "left_out")
    write_json(bench.config.out, {key: getattr(bench, key) for key in keys})
    print(make_markdown([("table", make_table(bench.rows))]))
    print("A range spans batches of short and long texts; a ratio compares the same batch.")
    for share in bench.shares:
        line = f"{PRODUCT}, {share['dtype']}: {share['peak_gflops']['median']:,.0f} GFLOP/s"
        if "useful" in share:
            line += f"; {share['case']}: useful operations reach {100 * share['useful']['median']:.0f} % of it"
        print(line)
    if bench.losses:
        print("same loss: ours {:.6f}, peer {:.6f} (float32, first step)".format(*bench.losses))
    print(", ".join(f"{key} {value}" for key, value in bench.machine.items() if value is not None))
    print("\n".join(f"left out: {line}" for line in bench.left_out))
    if bench.losses and abs(bench.losses[0] - bench.losses[1]) > 1e-3:
        sys.exit("error: the losses differ, so the two did not do the same work")


def make_table(rows):
    table = [["case", "system", "median (lowest .. highest)", "peak memory", "beside the case's first line"]]
    for row in rows:
        middle, low, high = (f"{row[k]:,.{0 if row[k] >= 100 else 2}f}" for k in ("median", "low", "high"))
        memory = f"{row['memory'] / 1e9:.2f} GB" if row["memory"] else ""
        beside = ""
        if ratio := row.get("time_ratio"):
            what = "as many" if row["unit"] == "kernels" else "the time"
            beside = f"{ratio['median']:.2f} x {what} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
        if row.get("memory_ratio"):
            beside += f", {row['memory_ratio']:.2f} x the memory"
        table.append([row["case"], row["system"], f"{middle} {row['unit']} ({low} .. {high})", memory, beside])
    return table


# --- the systems: a function loads one from a Config and returns what does a job -------------------


def train_ours(config):
    """train.py's own update."""
    run = set_up(config)
    return lambda indices: update(run, micro_batches(run, indices), 0)[0]


def peer_model(config):
    """The base in config.dtype; with a rank adapters in float32, as peft makes them."""
    sys.modules["torchao"] = None  # peft stops at an old torchao, as Colab has one; nothing here needs it
    from transformers import GPT2LMHeadModel

    options = {"torch_dtype": getattr(torch, config.dtype), "attn_implementation": "sdpa"}
    model = GPT2LMHeadModel.from_pretrained(config.init_from, **options).to(config.device)
    if not config.rank:
        return model
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    options |= {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return get_peft_model(model, LoraConfig(**options))


def pad(rows, device, side="right"):
    """Token lists as (ids, attention mask), padded to the longest."""
    options = {"batch_first": True, "padding_side": side}
    ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=end_of_text(), **options)  # (B, T)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **options)  # (B, T)
    return ids.to(device), mask.to(device)


def train_peer(config, examples=None):
    """The usual loop: padding to the batch's longest, labels of -100 where nothing is scored, fused AdamW. Below
    float32 autocast too: on a CPU it makes peft a sixth faster than half-precision weights alone."""
    dtype = getattr(torch, config.dtype)
    kind = config.device.split(":")[0]
    model = peer_model(config).train()
    examples = examples or make_loader(config, 1024).splits["train"]
    options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, fused=kind in ("cpu", "cuda"), **options)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def step(indices):
        rows = [examples[i] for i in indices]
        ids, mask = pad([ex.tokens for ex in rows], config.device)
        labels = ids.masked_fill(mask == 0, -100)
        for label, ex in zip(labels, rows):
            label[: ex.n_prompt] = -100
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return float(loss)

    return step


def score_ours(config):
    """generate.py's own scoring; here the shared prefix is run anew for each batch."""
    sampler = ModelSampler(config=config)
    sampler.load_data()
    sampler.model = make_untrained(config)
    return lambda indices: sampler.answer(pick_prompts(sampler.loader, indices))[0]


def score_peer(config, merged):
    """In bfloat16 on a CPU most of its time goes into the first token's logits: torch multiplies the sliced states
    with a copy of the head's weight for each row."""
    model = peer_model(config)
    model = (model.merge_and_unload() if merged else model).eval()
    loader = make_loader(config, 1000, wanted=("test",))
    return lambda indices: write_peer(model, config, pick_prompts(loader, indices))


def pick_prompts(loader, indices):
    examples = [loader.splits["test"][i] for i in indices]
    return [ex.tokens[: ex.n_prompt] for ex in examples]


@torch.inference_mode()
def write_peer(model, config, prompts):
    """Batched `generate`: padding on the left, the cache on."""
    eos = end_of_text()
    ids, mask = pad(prompts, config.device, "left")
    options = {"max_new_tokens": config.max_new_tokens, "do_sample": False, "pad_token_id": eos}
    out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.size(1) :]
    return [gpt2_encoding().decode([t for t in row if t != eos]) for row in out.tolist()]


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


# --- processes that alternate ----------------------------------------------------------------------


def serve(pipe, system, device):
    """A child's life: load a system, do job after job, answer (seconds, result, peak memory)."""
    run = system()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send((*timed(device, run, pipe.recv()), peak_memory(device)))


@contextlib.contextmanager
def running(systems, device):
    """{name: function that lets it do a job} of the systems {name: function that loads it}, each in a process."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    children = []
    for name, system in systems.items():
        ours, theirs = context.Pipe()
        workers[name] = partial(ask, ours)
        children.append(context.Process(target=serve, args=(theirs, system, device), daemon=True))
        os.environ |= waiting(name)
        children[-1].start()
        theirs.close()
    yield workers
    for child in children:
        child.terminate()
        child.join()


def ask(pipe, job):
    try:
        pipe.send(job)
        return pipe.recv()
    except (EOFError, OSError):  # the child has printed why, unless it was killed
        raise RuntimeError("its process ended (out of memory?)") from None


def waiting(system):
    """How OpenMP's threads wait, in each system as its user gets it: the environment of its process."""
    if not threads.IS_OURS:
        return {}
    return {"GOMP_SPINCOUNT": threads.DEFAULT_SPINS if system.startswith(PEER) else threads.SPINS}


# --- the parts -------------------------------------------------------------------------------------


def measure_training(bench):
    quick = bench.config.quick
    sizes = (8, 32, 64) if bench.on_gpu else (8, 32)
    groups = [(shape, rank, sizes) for shape in SHAPES for rank in (128, 16)]
    if quick:
        groups = [("gpt2-medium", 128, sizes), ("gpt2-mini", 16, sizes[1:])]
    for dtype, (shape, rank, sizes) in itertools.product(bench.dtypes, groups):
        config = bench.settings(shape, rank, sizes[-1], dtype)
        systems = both(config)
        if shape == "gpt2-mini" or not quick:
            systems |= both(replace(config, dtype="float32"))
        if (shape, rank) == ("gpt2-medium", 16):
            systems[f"ours, {dtype}, every weight trained (rank = 0)"] = partial(train_ours, replace(config, rank=0))
        if "peak" in bench.config.only.split(",") and shape == "gpt2-medium":
            systems[PRODUCT] = partial(products, config)
        with running(systems, bench.device) as workers:
            for size in sizes:  # ascending, so that each has its own peak of memory
                case = f"training, {shape}, batch {size}, r = {rank}"
                jobs = bench.batches("train", size)
                answers = bench.measure(case, workers, jobs)
                add_share(bench, case, dtype, answers, [count_operations(bench.loader, shape, rank, b) for b in jobs])
                # In the first step the weights are equal. Later each has drawn an A of its own, and they differ.
                pair = ("ours, float32", f"{PEER}, float32")
                if size == sizes[0] and set(pair) <= answers.keys():
                    bench.losses = [answers[name][0][1] for name in pair]


def both(config):
    """The two systems that train."""
    dtype = config.dtype
    return {f"ours, {dtype}": partial(train_ours, config), f"{PEER}, {dtype}": partial(train_peer, config)}


def measure_peak(bench):
    """Where no training was measured beside it."""
    for dtype in () if bench.shares else bench.dtypes:
        systems = {PRODUCT: partial(products, bench.settings("gpt2-medium", 0, 1, dtype))}
        with running(systems, bench.device) as workers:
            answers = bench.take_turns(PRODUCT, workers, [PRODUCT] * (1 + bench.steps))
            add_share(bench, "alone", dtype, answers, [])


def add_share(bench, case, dtype, answers, counts):
    """The machine's peak and, of each step, the share that ours reaches of the peak measured in the same round."""
    peaks = [result for _, result, _ in answers.get(PRODUCT, [])[1:]]
    times = [seconds for seconds, _, _ in answers.get(f"ours, {dtype}", [])[1:]]
    if peaks:
        share = {"case": case, "dtype": dtype, "peak_gflops": spread(peaks)}
        if times:
            share["useful"] = spread([1e-9 * n / s / peak for n, s, peak in zip(counts, times, peaks)])
        bench.shares.append(share)


def count_operations(loader, shape, rank, indices):
    """The useful operations of a LoRA training step on these examples: 4 N a token (2 N forward, 2 N backward; N =
    the blocks' frozen matrices), 6 for each parameter of an adapter and token (2 forward, 4 backward), attention's
    own products, and the head where a target is scored. The shared prefix counts once a batch, padding never."""
    n_layer, _, C = SHAPES[shape]
    P = len(loader.prefixes["train"])
    examples = [loader.splits["train"][i] for i in indices]
    a_token = 4 * 12 * n_layer * C * C
    a_token += 6 * 6 * rank * C * n_layer  # A and B of QKV and projection: r (C + 3 C) + r (C + C)
    own = [len(ex.tokens) - 1 - P for ex in examples]  # the last token is a target only
    pairs = P * (P + 1) / 2 + sum(P * n + n * (n + 1) / 2 for n in own)  # of a query and a key that it sees
    scored = sum(len(ex.tokens) - ex.n_prompt for ex in examples)
    return a_token * (P + sum(own)) + 12 * n_layer * C * pairs + 4 * 50257 * C * scored


def measure_scoring(bench):
    for shape in ["gpt2-medium"] if bench.config.quick else SHAPES:
        config = bench.settings(shape, 128, 32, bench.dtypes[0])
        systems = {f"ours, {config.dtype}": partial(score_ours, config)}
        variants = [(config.dtype, "merged"), ("float32", "merged"), (config.dtype, "unmerged")]
        for dtype, how in variants[:2] if bench.config.quick else variants:
            systems[f"{PEER}, {dtype}, {how}"] = partial(score_peer, replace(config, dtype=dtype), how == "merged")
        case = f"scoring, {shape}, batch 32, 5 new tokens"
        with running(systems, bench.device) as workers:
            bench.measure(case, workers, bench.batches("test", 32))


def measure_start(bench):
    """Ours is read off the programs' own output: training's line comes after evaluation, checkpoint and update. The
    peer's programs are what its user runs in their place."""
    config = replace(bench.settings("gpt2-mini", 16, 32, bench.dtypes[0]), start="A film", max_new_tokens=1)
    ours = flags(replace(config, out_dir=os.path.join(bench.folder, "out"), max_iters=1, eval_iters=1))
    for program, first, sign in (("train.py", "update", "update 1:"), ("generate.py", "token", config.start)):
        case = f"{program}, from its start to the first {first}, gpt2-mini"
        call = f"bench.start_peer({program!r}, configurator.{config!r})"
        peer = ["-c", f"import configurator; from tools import bench; {call}"]
        systems = {
            "ours": partial(time_start, "ours", sign, [program, *ours]),
            PEER: partial(time_start, PEER, "done", peer),
        }
        answers = bench.take_turns(case, systems, range(1 if bench.config.quick else 3))
        if answers.keys() == systems.keys():
            bench.add_rows(case, "s", answers)


def start_peer(program, config):
    """What a peer's user runs in place of ours."""
    if program == "train.py":
        train_peer(config)(range(config.batch_size))
    else:
        prompts = [gpt2_encoding().encode_ordinary(config.start)]
        write_peer(peer_model(replace(config, rank=0)), config, prompts)
    print("done")


def time_start(system, sign, command, job):
    """Wall time from a program's start to its first line that begins with `sign`. job: the number of the turn."""
    began = time.perf_counter()
    lines = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    options["env"] = os.environ | waiting(system)
    with subprocess.Popen([sys.executable, "-u", *command], **options) as process:
        for line in process.stdout:
            if line.startswith(sign):
                process.kill()
                return time.perf_counter() - began, None, None
            lines.append(line.strip())
    raise RuntimeError(f"{command[0]} ended before it printed {sign!r}: {' / '.join(lines[-3:])}")


def measure_latency(bench):
    config = bench.settings("gpt2-medium", 128, 1, bench.dtypes[0])
    generation = "generation, gpt2-medium, 32 tokens after 52, r = 128"
    forward = "forward pass, gpt2-medium, 1 example of 52 tokens, r = 128"
    for job, case, unit, amount in (("forward", forward, "s", None), ("generate", generation, "tokens/s", 32)):
        if bench.in_time(case):
            answers = {}
            for name, seconds in time_latency(config, job, bench.steps).items():
                answers[f"{name}, {config.dtype}"] = [(s, None, None) for s in seconds]
            bench.add_rows(case, unit, answers, amount)


def measure_launches(bench):
    """Half precision, as on a GPU."""
    dtype = bench.dtypes[0] if bench.on_gpu else "bfloat16"
    config = replace(bench.settings(save_narrow(bench.folder), 4, 2, dtype), dropout=0.05)
    systems = {f"ours, {dtype}": train_narrow, f"{PEER}, {dtype}": partial(train_peer, examples=EXAMPLES)}
    systems = {name: partial(launches, load, config) for name, load in systems.items()}
    with running(systems, bench.device) as workers:
        answers = bench.take_turns(CASE, workers, [(0, 1)] * (2 + bench.steps))  # two warm up
    for n, unit in enumerate(("ms of CPU time", "kernels")):
        counts = {name: [(result[n], None, None) for _, result, _ in given[2:]] for name, given in answers.items()}
        counts = {name: given for name, given in counts.items() if given}  # --quick may end after the warm-up
        bench.add_rows(CASE, unit, counts)


def measure_neighbours(bench):
    """Training while something else runs on the same cores: a notebook, a browser, another training."""
    for shape, rank, size in [("gpt2-mini", 16, 32), ("gpt2-medium", 128, 8)][: 1 if bench.config.quick else 2]:
        config = bench.settings(shape, rank, size, bench.dtypes[0])
        jobs = bench.batches("train", size)
        with running(both(config), bench.device) as workers:
            for neighbour, text in NEIGHBOURS.items():
                case = f"training, {shape}, batch {size}, r = {rank}, {neighbour}"
                other = subprocess.Popen([sys.executable, "-c", text], env=os.environ | waiting(PEER))
                time.sleep(3 if text else 0)
                try:
                    bench.measure(case, workers, jobs)
                finally:
                    other.kill()
                    other.wait()


def measure_data(bench):
    """A first start on many rows beside tiktoken's own call for the same filled prompts: the cost of files, labels,
    splits and the cache. Each has a process of its own, and they alternate."""
    path = os.path.join(bench.folder, "many.csv")
    texts = [(ex.text, bench.loader.label_names[ex.label]) for ex in bench.loader.splits["train"]]
    with open(path, "w", encoding="utf-8", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        for i, (text, label) in zip(range(bench.config.rows), itertools.cycle(texts)):
            rows.writerow([f"{i} {text}", label])
    answers = {"tiktoken, encode_ordinary_batch": [], "CustomDataLoader, the first time": []}
    for _ in range(bench.config.steps or 3):
        for name, function in zip(answers, ("tokenise_alone", "load_first")):
            command = [sys.executable, "-c", f"from tools import bench; print(*bench.{function}({path!r}))"]
            out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
            seconds, memory = map(float, out.splitlines()[-1].split())
            answers[name].append((seconds, None, memory))
    bench.add_rows(f"{bench.config.rows:,} rows of csv to tokens", "s", answers)


def load_first(path):
    with tempfile.TemporaryDirectory() as token_cache.CACHE:
        seconds, _ = timed("cpu", CustomDataLoader, path, Config.template)
        return seconds, peak_memory("cpu")


def tokenise_alone(path):
    before, after = Config.template.removesuffix("{label}").split("{text}")
    seconds = 0.0
    with open(path, encoding="utf-8", newline="") as f:
        rows = itertools.islice(csv.reader(f), 1, None)
        while prompts := [before + text + after + label for text, label in itertools.islice(rows, 50_000)]:
            began = time.perf_counter()
            gpt2_encoding().encode_ordinary_batch(prompts, num_threads=os.cpu_count())
            seconds += time.perf_counter() - began
    return seconds, peak_memory("cpu")


MEASURES = {
    "train": measure_training,
    "start": measure_start,
    "score": measure_scoring,
    "latency": measure_latency,
    "neighbour": measure_neighbours,
    "peak": measure_peak,
    "launches": measure_launches,
    "data": measure_data,
}

if __name__ == "__main__":
    with forgiving_output():
        main(configure(sys.argv[1:], cls=BenchConfig, trains=False))
