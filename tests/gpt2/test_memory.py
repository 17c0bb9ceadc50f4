"""Memory: what is foreseen, and the line that says so before minutes are spent.

python -m pytest tests/gpt2/test_memory.py
"""

import pytest
import torch

from model import GPT, GPTConfig
from plumbing.gpt2 import memory
from plumbing.running.endings import explain_failure

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 301, "block_size": 64}


@pytest.mark.parametrize("rank, advice", [(0, "--rank=16"), (4, "a lower --rank")])
def test_weights_that_do_not_fit_are_told_before_they_are_moved(monkeypatch, rank, advice):
    """Otherwise gpt2-xl on a T4 ends in an error that names a smaller batch, which does not help."""
    model = GPT(GPTConfig(**SMALL, lora_rank=rank, lora_alpha=4))
    for name, param in model.named_parameters():
        param.requires_grad = "lora_" in name or not rank
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    needed = 4 * frozen + (4 + 4 + 8 + 2) * trained
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        memory.check_weights(model, "cpu")  # no limit is known there
        if fits:
            memory.check_weights(model, "cuda")
        else:
            with pytest.raises(ValueError, match=advice):
                memory.check_weights(model, "cuda")


def test_activations_are_foreseen():
    """Otherwise the table of what fits on which card is a guess. Counted: what autograd keeps to go backward."""
    torch.manual_seed(0)
    n_layer, n_embd = 4, 256
    config = GPTConfig(n_layer=n_layer, n_head=4, n_embd=n_embd, lora_rank=8, lora_alpha=8)
    for kind in ("LoRA", "full"):
        model = GPT(config)
        for name, param in model.named_parameters():
            param.requires_grad = "lora_" in name or kind == "full"
        model.set_dtype(torch.bfloat16)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor, known=known, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        idx = torch.randint(0, 50257, (8, 60))
        targets = torch.full_like(idx, -1)
        targets[:, -2:] = 5
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(idx, targets)
        logits = 4 * 50257 * 16  # of the 14 bytes a logit, those that are kept for the backward pass
        foreseen = memory.activations_bytes(n_layer, n_embd, idx.numel(), 0, kind)
        copies = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # counted with the weights
        assert 0.5 < (sum(kept.values()) - logits - copies) / foreseen < 1.2, kind


@pytest.mark.parametrize("name", memory.SHAPES)
def test_the_tables_sizes_are_the_models(name):
    """Otherwise the table foresees the memory of a model of another size."""
    n_layer, n_embd, _ = memory.SHAPES[name]
    lora = {"lora_rank": 128, "lora_alpha": 512}
    with torch.device("meta"):  # shapes alone: no 6 GB for gpt2-xl
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd, **lora))
    n_lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    n_base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    expected = {"LoRA": 2 * n_base + 18 * n_lora, "full": 18 * n_base}
    for kind, n_bytes in expected.items():
        assert memory.training_bytes(name, kind, batch_size=0) == pytest.approx(n_bytes, rel=0.01)


@pytest.mark.parametrize("words", ["CUBLAS_STATUS_ALLOC_FAILED when calling", "MPS backend out of memory (MPS"])
def test_every_devices_words_for_too_little_memory_are_known(words, capsys):
    """Otherwise a Mac's or a full GPU's user gets a traceback instead of the smaller batch to type."""
    from configurator import Config

    with pytest.raises(SystemExit) as ended, explain_failure(Config(batch_size=32)):
        raise RuntimeError(words)
    assert ended.value.code == 2 and "--batch_size=16" in capsys.readouterr().err
