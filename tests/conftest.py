"""What several test files share: a small GPT-2 that transformers made and small data, runs of train.py on them, and
what such runs leave.
"""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel

import train
from configurator import configure
from plumbing.adapters.layers import lora_layers
from plumbing.data import token_cache

# What the tests tokenise stays out of the user's cache; the reviews, once downloaded, are taken from there.
OWN = tempfile.TemporaryDirectory(prefix="nanolora-")
if os.path.exists(os.path.join(token_cache.CACHE, "rt_reviews")):
    shutil.copytree(os.path.join(token_cache.CACHE, "rt_reviews"), os.path.join(OWN.name, "rt_reviews"))
os.environ["NANOLORA_CACHE"] = token_cache.CACHE = OWN.name


def save_figure(figure, path, *, save=Figure.savefig, **options):
    """A run's loss.png takes an eighth of a second. The runs in this process only lay theirs out: programs that are
    started by themselves paint it."""
    if str(path).endswith("loss.png"):
        Path(path).touch()
    else:
        save(figure, path, **options)


Figure.savefig = save_figure
torch.set_num_threads(1)  # as in the processes that `start` starts: what is computed here and there has the same bits
REPO = Path(__file__).resolve().parents[1]
MEDIUM = "configs/finetune_params_config.py"
CUES = {"positive": "wonderful", "negative": "dreadful"}  # the word that gives a made-up review's label away
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 301, "n_positions": 64}


def pytest_addoption(parser):
    text = "where the tests with the marker gpu run: cuda:1, or cpu to try them without a GPU"
    parser.addoption("--gpu-device", help=text)


def tokens(*shape, seed=1):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, reference, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(ours, dtype=reference.dtype), reference, rtol=0, atol=atol)


def base_folder(tmp_path_factory, name, n_layer=1, n_positions=64):
    """A new folder with a small random GPT-2 that transformers saved in it, as `base`."""
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    # The usual range of 0.02 keeps so small a model's logits so even that frozen ones cannot be tuned to anything.
    sizes = {"n_embd": 32, "n_layer": n_layer, "n_head": 2, "n_positions": n_positions, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "base")
    return folder


def randomize(model, seed=2):
    """Adapters as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model.train(model.training)  # merged copies follow


@pytest.fixture(scope="session")
def hf():
    """transformers' GPT-2 in eval mode, in which every weight matters. Tests leave it as it is."""
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **off, bos_token_id=300, eos_token_id=300)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 2:
                param.normal_(std=0.15)  # GPT-2's own 0.02 leaves attention nearly even, and errors in it unseen
            elif name.endswith("weight"):
                param.normal_(mean=1.0, std=0.3)  # LayerNorm; fresh ones are 1 and tell nothing
            else:
                param.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def checkpoint(hf, tmp_path_factory):
    """The directory where transformers saved `hf`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    hf.save_pretrained(directory)
    return str(directory)


# --- runs of train.py on a small model and small data ----------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random GPT-2 that transformers saved (base) and separable reviews (reviews)."""
    folder = base_folder(tmp_path_factory, "place", n_layer=2, n_positions=128)
    for split, n in (("train", 48), ("validation", 12), ("test", 20)):
        write_reviews(folder / "reviews" / f"{split}.csv", n)
    return folder


def write_reviews(path, n, cues=CUES):
    """n reviews of one to three clauses, each clause with the cue of the review's label; labels by turns."""
    rng = random.Random(n)
    subjects = ["the plot", "this film", "every scene", "the acting of the whole cast", "a story"]
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["text", "label"])
        for _, (label, cue) in zip(range(n), itertools.cycle(cues.items())):
            clauses = (
                f"{rng.choice(subjects)} {rng.choice(['was', 'seemed'])} {cue}" for _ in range(rng.randint(1, 3))
            )
            rows.writerow([" and ".join(clauses), label])


def flags(place, out, **settings):
    """The command line of a run on the small model and data into `out`; settings win."""
    values = {"init_from": place / "base", "dataset": place / "reviews", "out_dir": place / out}
    values |= {"device": "cpu", "dtype": "float32", "rank": 16, "alpha": 64, "label_names": None} | settings
    return [f"--{key}={value}" for key, value in values.items()]


def resume(place, out, **settings):
    return ["--init_from=resume", f"--out_dir={place / out}", *(f"--{k}={v}" for k, v in settings.items())]


class Forked:
    """A program that tests/fork_server.py started; like subprocess.Popen's."""

    server = None

    @classmethod
    def start_server(cls):
        if cls.server is None:
            command = [sys.executable, REPO / "tests" / "fork_server.py"]
            # One thread, for machines that do more than these tests.
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            cls.server = subprocess.Popen(command, stdin=subprocess.PIPE, env=one_thread, text=True)

    def __init__(self, args, cwd, env, limit, log=None, out=None):
        Forked.start_server()
        self.folder, self.returncode = Path(tempfile.mkdtemp(dir=OWN.name)), None
        job = {"args": args, "cwd": str(cwd), "env": env, "limit": limit, "folder": str(self.folder)}
        self.out, self.err = Path(out or log or self.folder / "out"), Path(log or self.folder / "err")
        job |= {"out": str(self.out), "err": str(self.err)}
        print(json.dumps(job), file=Forked.server.stdin, flush=True)
        self.pid = int(self._wait_for("pid", 60))

    def _wait_for(self, name, seconds):
        until = time.monotonic() + seconds
        while not (self.folder / name).exists():
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", seconds)
            time.sleep(0.005)
        return (self.folder / name).read_text()

    def poll(self):
        if (self.folder / "code").exists():
            self.returncode = int((self.folder / "code").read_text())
        return self.returncode

    def wait(self, timeout=300):
        self._wait_for("code", timeout)
        return self.poll()

    def communicate(self, timeout=300):
        self.wait(timeout)
        return self.out.read_text() if self.out.is_file() else "", self.err.read_text()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(*args, cwd=REPO, limit=None, fresh=False, out=None, **env):
    """A process of its own, as a user starts one: `python *args`. No file may grow beyond `limit` bytes. `fresh`:
    nothing is imported in it yet, not even torch. `out`: where its standard output goes. `env`: variables that are
    set, or, with None, not."""
    args, env = [str(arg) for arg in args], os.environ | {"OMP_NUM_THREADS": "1"} | env
    env = {name: str(value) for name, value in env.items() if value is not None}
    if not fresh:
        return Forked(args, cwd, env, limit, out=out)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *args], cwd=cwd, env=env, text=True, **pipes)


FORK = """#!/bin/sh
exec '{python}' -S -c '
import json, os, sys, tempfile, time
folder = tempfile.mkdtemp(dir="{own}")
job = {{"args": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "limit": None, "folder": folder}}
job |= {{"out": f"{{folder}}/out", "err": f"{{folder}}/out"}}
with open("{server}", "w") as f:
    print(json.dumps(job), file=f)
while not os.path.exists(f"{{folder}}/code"):
    time.sleep(0.01)
print(open(f"{{folder}}/out").read(), end="")
sys.exit(int(open(f"{{folder}}/code").read()))
' "$@"
"""


def write_python(path):
    """A program that is used as `python` is, and starts forks: it writes to the server as this process does, and
    prints at the end what they wrote."""
    Forked.start_server()
    server = f"/proc/{os.getpid()}/fd/{Forked.server.stdin.fileno()}"
    path.write_text(FORK.format(python=sys.executable, own=OWN.name, server=server))
    path.chmod(0o755)


def here(argv):
    """A run in this process, which spares the imports. Returns the metrics."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train.train(configure(list(map(str, argv))))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finish(process, code=0):
    """What a process wrote: (stdout, stderr)."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def sweep_here(argv):
    """A sweep in this process, whose trainings and scorings are forks: to start them would take longer."""

    from tools import sweep
    from tools.runs import run as programs

    def fork(command, env, stdin, stdout, stderr):
        (begin,) = (
            i for i, word in enumerate(command) if word.endswith(("train.py", "generate.py", "measured_run.py"))
        )
        return Forked(command[begin:], REPO, env, None, log=stdout.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "subprocess", SimpleNamespace(Popen=fork, DEVNULL=None, STDOUT=None))
        sweep.main(configure(argv, cls=sweep.SweepConfig, trains=False))


# --- what a run left -------------------------------------------------------------------------------


def read_metrics(folder):
    with open(folder / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def leaves(value, path=""):
    """{path: leaf} of nested dicts and lists; a tensor's leaf is its bytes, so that equal means every bit."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.shape, value.contiguous().numpy().tobytes())}
    if not isinstance(value, dict | list | tuple):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}


def differences(one, other):
    """Everything in which two finished runs differ, the clock aside."""
    found = [f for f in ("adapter_model.safetensors", "model.safetensors") if (one / f).exists()]
    assert found
    different = [f for f in found if (one / f).read_bytes() != (other / f).read_bytes()]
    a, b = (
        leaves({k: read_checkpoint(folder)[k] for k in ("trained", "optimizers")} | {"metrics": read_metrics(folder)})
        for folder in (one, other)
    )
    return different + [k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and "examples_per_s" not in k]


def largest_difference(one, other):
    a, b = read_checkpoint(one)["trained"], read_checkpoint(other)["trained"]
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- runs that end early ---------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_at_rename(monkeypatch, n):
    """The n-th file that is put in its place never gets there, and nothing after it happens."""
    put, calls = os.replace, itertools.count()

    def replace(*args):
        if next(calls) == n:
            raise Killed
        put(*args)

    monkeypatch.setattr(os, "replace", replace)


def stop_after(monkeypatch, update):
    """SIGTERM comes while this update is computed."""
    plain = train.update

    def stopped_update(run, batch, it, *others):
        if it == update:
            signal.raise_signal(signal.SIGTERM)
        return plain(run, batch, it, *others)

    monkeypatch.setattr(train, "update", stopped_update)


def one_line_of(capfd, argv):
    """The line on stderr in which a wrong command line ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        here(argv)
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error:"), lines
    return lines[0]
