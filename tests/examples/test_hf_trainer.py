"""examples/hf_trainer.py, run as a user runs it, on a small RoBERTa with random weights.

python -m pytest tests/examples/test_hf_trainer.py
"""

import csv

import torch
from conftest import start
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from lora import attach_lora, load_adapter
from plumbing.adapters.layers import lora_layers

WORDS = ["<pad>", "<unk>", "film", "a", "joy", "bore", "is", *map(str, range(60))]


def save_model(folder):
    """A RoBERTa and its tokenizer, as on the hub."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = RobertaConfig(**sizes, intermediate_size=64, max_position_embeddings=40, pad_token_id=0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_model_of_others_is_trained_scored_and_opens_in_peft(tmp_path):
    """Lost if it fails: the command of the course's fourth part stops, or its adapter opens nowhere."""
    base = save_model(tmp_path / "roberta")
    for split in ("train", "validation"):  # a test split without labels, as sst2's, is not needed
        with open(tmp_path / f"{split}.csv", "w", newline="") as f:
            rows = csv.writer(f)
            rows.writerow(["text", "label"])
            rows.writerows([f"film {i} is a {('bore', 'joy')[i % 2]}", i % 2] for i in range(60))
    flags = [f"--model={base}", f"--dataset={tmp_path}", "--words=bad,good", f"--output_dir={tmp_path / 'out'}"]
    flags += [
        "--num_train_epochs=10",
        "--per_device_train_batch_size=10",
        "--learning_rate=0.02",
        "--use_cpu=True",
        "--also_full=True",
    ]
    process = start("examples/hf_trainer.py", *flags, fresh=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    # Two layers' query, output of attention, output of the MLP, r = 4; and the head: a dense layer and a projection.
    adapters = 2 * 4 * ((32 + 32) + (32 + 32) + (64 + 32))
    head = 32 * 32 + 32 + 2 * 32 + 2
    assert f"| LoRA, r = 4 | {adapters + head:,} | " in out and "| every weight | " in out
    plain = RobertaForSequenceClassification.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    ours = RobertaForSequenceClassification.from_pretrained(base)
    attach_lora(ours, "query|output", 4, 16)
    load_adapter(ours, str(tmp_path / "out"))
    assert len(lora_layers(ours)) == 6
    ids = torch.tensor([[2, 10, 6, 3, 4], [2, 11, 6, 3, 5]])
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(ours.eval()(ids).logits, logits, atol=1e-5, rtol=1e-4)
    assert logits.argmax(-1).tolist() == [1, 0]
