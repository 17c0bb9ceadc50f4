"""PYTEST_DONT_REWRITE  Part 6: what was written trains gpt2-mini on real reviews, and is scored.

python -m pytest homework_tests/test_6_accuracy.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = ["configs/finetune_mini_config.py", "--max_iters=160", "--eval_interval=80", "--eval_iters=10"]
WANTED = 0.75  # answering one label always: 0.51 at most


def run(program, *flags):
    """Runs a program of the repository; fails with the end of what it wrote."""
    done = subprocess.run(
        [sys.executable, program, *flags], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, f"python {program} {' '.join(flags)}: {(done.stdout + done.stderr)[-1500:]}"


def test_training_reaches_75_percent(request, tmp_path):
    if request.session.testsfailed:
        pytest.skip("first the other parts")
    out = f"--out_dir={tmp_path}"
    run("train.py", *TRAINING, out)
    run("generate.py", "--init_from=resume", out)
    losses = [json.loads(line)["val_loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0], f"training does not lower the validation loss: {losses}"
    result = json.loads((tmp_path / "accuracy.json").read_text())
    shares = f"{100 * result['accuracy']:.1f} % right, {100 * result['garbage']:.1f} % garbage"
    assert result["accuracy"] >= WANTED, f"{shares}: {100 * WANTED:.0f} % were asked; losses {losses}"
