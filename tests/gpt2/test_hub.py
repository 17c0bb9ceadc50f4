"""GPT.from_pretrained("gpt2-medium") through the real huggingface_hub client, from a small hub on 127.0.0.1.

python -m pytest tests/gpt2/test_hub.py
"""

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


def load(address, home, out):
    """A user's process that loads gpt2-medium and saves its logits. The hub's client reads its settings from the
    environment as it is imported; a proxy would take the requests away from 127.0.0.1."""
    env = {name: None for name in os.environ if name.upper().startswith(("HF_", "HUGGING"))}
    env |= {name: None for name in os.environ if name.upper().endswith("_PROXY")}
    process = start("-c", USER, out, **env | {"HF_ENDPOINT": address, "HF_HOME": home})
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
