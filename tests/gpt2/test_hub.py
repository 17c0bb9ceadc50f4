"""GPT.from_pretrained("gpt2-medium") through the real huggingface_hub client, from a small hub on 127.0.0.1.

python -m pytest tests/gpt2/test_hub.py
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REPO, start

MODEL = "openai-community/gpt2-medium"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

USER = """
import sys
import torch
from model import GPT

model = GPT.from_pretrained("gpt2-medium").eval()
torch.save(model(torch.arange(20)[None])[0], sys.argv[1])
"""


@contextlib.contextmanager
def hub(files, cut=False):
    """(its address, what it was asked for): a hub with one repository of these files, {name: bytes}.
    With `cut`, the connection breaks in the middle of the weights."""
    asked = []

    class Hub(BaseHTTPRequestHandler):  # http.server's way: a method per verb
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append((self.command, self.path))
            path = self.path.split("?")[0]
            if path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": MODEL, "modelId": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
            elif path in (f"/api/models/{MODEL}/tree/{COMMIT}", f"/api/models/{MODEL}/tree/main"):
                tree = [{"type": "file", "path": n, "oid": etag(b), "size": len(b)} for n, b in files.items()]
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/{MODEL}/resolve/") and path.rpartition("/")[2] in files:
                self.answer(files[path.rpartition("/")[2]], cut=cut and path.endswith(".safetensors"))
            else:
                self.send_error(404)

        def answer(self, body, cut=False):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{etag(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:  # closing with a reset, as a lost connection looks
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()

        def log_message(self, *args):  # the test's output stays readable
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(body):
    return hashlib.sha1(body).hexdigest()


def client_settings(address, home):
    """The variables that the hub's client reads as it is imported; a proxy would take the requests away from
    127.0.0.1."""
    env = {name: None for name in os.environ if name.upper().startswith(("HF_", "HUGGING"))}
    env |= {name: None for name in os.environ if name.upper().endswith("_PROXY")}
    return env | {"HF_ENDPOINT": address, "HF_HOME": home}


def load(address, home, out):
    """A user's process that loads gpt2-medium and saves its logits."""
    process = start("-c", USER, out, **client_settings(address, home))
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def repository(checkpoint):
    names = ("config.json", "model.safetensors")
    files = {name: (Path(checkpoint) / name).read_bytes() for name in names}
    return files | {"pytorch_model.bin": b"a pickle", "README.md": b"# gpt2-medium", "vocab.json": b"{}"}


def assert_loaded(ended, out, hf):
    code, err = ended
    assert code == 0, err
    with torch.no_grad():
        reference = hf(torch.arange(20)[None]).logits[:, -1:]
    torch.testing.assert_close(torch.load(out), reference, rtol=0, atol=1e-4)


def assert_told(ended):
    """The error's last line says what was not reached, and which command needs no hub."""
    code, err = ended
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: init_from=gpt2-medium: cannot reach the hub"), err
    assert "python train.py configs/finetune_mini_config.py" in last
    assert (REPO / "configs" / "finetune_mini_config.py").exists()


def test_download_cache_and_second_start_without_a_hub(hf, checkpoint, tmp_path):
    """Otherwise the models of the task cannot be had, are fetched anew at each start, or come as a pickle."""
    home = tmp_path / "home"
    with hub(repository(checkpoint)) as (address, asked):
        assert_loaded(load(address, home, tmp_path / "first.pt"), tmp_path / "first.pt", hf)
        fetched = {path.rpartition("/")[2] for verb, path in asked if "/resolve/" in path}
        assert fetched == {"config.json", "model.safetensors"}  # the pickle stays where it is
        # The client asks for these without a limit of time: a hub that falls silent would be waited for for ever.
        assert not [path for _, path in asked if "/revision/" in path or "/tree/" in path]
        asked.clear()
        assert_loaded(load(address, home, tmp_path / "second.pt"), tmp_path / "second.pt", hf)
        assert asked == []
    assert_loaded(load(address, home, tmp_path / "third.pt"), tmp_path / "third.pt", hf)  # the hub is gone


def test_no_hub_and_no_cache_names_what_works_offline(tmp_path):
    """Otherwise a user without network gets the client's traceback and does not know what to do."""
    with hub({}) as (address, _):
        pass  # its port, now closed
    assert_told(load(address, tmp_path / "home", tmp_path / "out.pt"))


def test_a_broken_download_is_told_and_the_next_start_mends_it(hf, checkpoint, tmp_path):
    """Otherwise one lost connection ends in the client's traceback, or leaves a cache that never works again."""
    home, files = tmp_path / "home", repository(checkpoint)
    with hub(files, cut=True) as (address, _):
        assert_told(load(address, home, tmp_path / "out.pt"))
    with hub(files) as (address, _):
        assert_loaded(load(address, home, tmp_path / "out.pt"), tmp_path / "out.pt", hf)


# --- a hub that does not do its part -------------------------------------------------------------


def run_python(code, home, address, **more):
    """(exit code, stdout, stderr, seconds) of a process, as a user's program ends."""
    code = f"from plumbing.program.errors import one_line_errors\nwith one_line_errors():\n    {code}"
    began = time.monotonic()
    process = start("-c", code, **client_settings(address, home) | {"HF_HUB_ETAG_TIMEOUT": "1"} | more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err, time.monotonic() - began


FIND = 'from plumbing.gpt2.files import find_model; print(find_model("gpt2-medium")[0])'
LOAD = "from plumbing.data.sources import find_source; print(find_source({!r}).digest)"
ASKS = {
    "model": (FIND, MODEL),
    "dataset": (LOAD.format("rotten_tomatoes"), "cornell-movie-review-data/rotten_tomatoes"),
}


@contextlib.contextmanager
def deaf_hub():
    """The address of a hub that takes each connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def hub_that_says(status):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("kind", ASKS)
def test_a_hub_that_never_answers_is_named_and_given_up(tmp_path, kind):
    """Lost if it fails: the program stands still for minutes, and nobody knows what it waits for."""
    code, repo = ASKS[kind]
    with deaf_hub() as address:
        exit_code, out, err, seconds = run_python(code, tmp_path, address)
    assert exit_code == 2 and seconds < 60
    assert address in out and repo in out
    assert err.startswith("error: ") and err.count("\n") == 1 and repo in err and "finetune_mini_config.py" in err


@pytest.mark.parametrize("kind", ASKS)
@pytest.mark.parametrize("token, says", [("hf_wrong", "token"), (None, "hf auth login")])
def test_a_refusal_is_not_a_hub_out_of_reach(tmp_path, kind, token, says):
    """Lost if it fails: a user whose token has run out looks for a fault in the network."""
    code, _ = ASKS[kind]
    with hub_that_says(401) as address:
        more = {"HF_TOKEN": token} if token else {}
        exit_code, _, err, _ = run_python(code, tmp_path, address, **more)
    assert exit_code == 2 and err.count("\n") == 1
    assert "401" in err and says in err and "cannot reach" not in err


@pytest.mark.parametrize("name", [MODEL, "gpt2-medium"])
def test_what_transformers_has_cached_is_found(checkpoint, tmp_path, name):
    """Lost if it fails: who has the model on the disk, under the name that transformers was given, cannot train
    offline."""
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)
    with deaf_hub() as address:
        exit_code, out, err, _ = run_python(FIND, tmp_path, address)
    assert exit_code == 0, err
    assert out.strip() == str(folder / "snapshots" / COMMIT / "config.json")


@pytest.mark.parametrize(
    "name, hub_is", [("cornell-movie-review-data/rotten_tomatoes", "gone"), ("rotten_tomatoes", "deaf")]
)
def test_a_data_set_that_is_cached_is_found(tmp_path, monkeypatch, name, hub_is):
    """Lost if it fails: who has the reviews on the disk, under either name, cannot train offline."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = "\n".join(json.dumps({"text": f"a film {i}", "label": i % 2}) for i in range(4))
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    made = f'import datasets; datasets.load_dataset("json", data_files={files})'
    with deaf_hub() as address:
        code, _, err, _ = run_python(made, tmp_path, address, HF_HUB_OFFLINE="1")
        assert code == 0, err
        (info,) = (tmp_path / "datasets").glob("json/*/*/*/dataset_info.json")
        short = name.rpartition("/")[2]
        folder = tmp_path / "datasets" / name.replace("/", "___") / "default" / "0.0.0" / "abc"
        shutil.copytree(info.parent, folder)
        for file in folder.glob("json-*.arrow"):
            file.rename(folder / file.name.replace("json-", f"{short}-"))
        text = json.loads(info.read_text()) | {"config_name": "default", "dataset_name": short}
        (folder / "dataset_info.json").write_text(json.dumps(text))
        where = address if hub_is == "deaf" else "http://127.0.0.1:9"
        code, out, err, seconds = run_python(LOAD.format("rotten_tomatoes"), tmp_path, where)
    assert code == 0, err
    assert "train " in out and seconds < 60
