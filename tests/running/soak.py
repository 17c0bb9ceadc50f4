"""Kills training again and again, at random instants and at each step of a save, resumes it, and compares the end
with that of an unbroken run, bit for bit.

    python tests/running/soak.py 300        kills; half of them with LoRA, half training all weights
"""

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads cannot be forked
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import torch
from tqdm import tqdm

import train
from configurator import configure
from model import GPT, GPTConfig

# A process killed while it prints must not keep a lock that the next one waits for: tqdm's own is shared with forks.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread
LIMIT = 100  # seconds of one attempt; most take one


def prepare(folder):
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)).save_pretrained(str(folder / "base"))
    rows = [
        {"text": f"film {i} was {'good' if i % 2 else 'bad'}", "label": "yes" if i % 2 else "no"} for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def attempt(argv, seconds=None, step=None):
    """A training in a process of its own, killed after some seconds or before the step-th fsync, rename or removal.
    Returns whether it ended by itself."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        if status and not os.WIFSIGNALED(status):
            sys.exit(f"the training ended with exit code {os.waitstatus_to_exitcode(status)}: {argv}")
        return status == 0
    code = 1
    try:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        left = [step]

        def counted(real):
            def call(*args):
                if left[0] is not None:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            return call

        for name in ("fsync", "replace", "remove"):
            setattr(os, name, counted(getattr(os, name)))
        if seconds is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at any instant, as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, seconds)
        train.plot_losses = lambda metrics, path: None  # matplotlib takes most of so short a run's time
        train.train(configure(argv))
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def leaves(value, path=""):
    if isinstance(value, torch.Tensor):
        return {path: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}


def result(folder):
    """All that a run leaves, the clock aside."""
    state = leaves(torch.load(folder / "checkpoint.pt", weights_only=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state |= leaves(lines, "metrics")
    for name in ("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json"):
        if (folder / name).exists():
            state[name] = (folder / name).read_bytes()
    return {k: v for k, v in state.items() if "examples_per_s" not in k and k != "/sha256"}


def main(n_kills):
    rng, kills, left_over = random.Random(n_kills), 0, []
    with tempfile.TemporaryDirectory() as name, tqdm(total=n_kills, disable=None, unit="kill") as bar:
        folder = Path(name)
        prepare(folder)
        common = [f"--init_from={folder}/base", f"--dataset={folder}/rows.jsonl", "--device=cpu", "--dtype=float32"]
        common += ["--label_names=None", "--alpha=64", "--dropout=0"]
        common += ["--max_iters=12", "--eval_interval=3", "--save_interval=1", "--batch_size=8", "--lr=0.01"]
        for kind, flags in (("lora", ["--rank=2"]), ("full", ["--rank=0"])):
            began = time.time()
            whole = folder / f"{kind}-whole"
            assert attempt([*common, *flags, f"--out_dir={whole}"])
            seconds, expected = time.time() - began, result(whole)
            steps = 2 * 3 * 17 + 10
            target = kills + n_kills // 2
            while kills < target:
                out = folder / f"{kind}-{kills}"
                ended = False
                while not ended:
                    argv = [*common, *flags, f"--out_dir={out}"]
                    if (out / "train_config.json").exists():
                        argv = ["--init_from=resume", f"--out_dir={out}"]
                    how = (
                        {"seconds": rng.random() * seconds} if rng.random() < 0.5 else {"step": rng.randrange(steps)}
                    )
                    ended = attempt(argv, **how if kills < target else {})
                    kills += not ended
                    bar.update(not ended)
                if different := [k for k, v in result(out).items() if expected.get(k) != v]:
                    sys.exit(f"after {kills} kills the end differs: {different[:5]}")
                left_over += [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
    print(f"{kills} kills, every run ended in the unbroken run's bits; {len(left_over)} half-written files were left")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
