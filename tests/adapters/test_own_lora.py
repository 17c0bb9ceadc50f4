"""A lora.py of one's own: it trains as ours does, or one line says what differs before the first update.

python -m pytest tests/adapters/test_own_lora.py
"""

from pathlib import Path

import pytest
import torch
from conftest import REPO, finish, start

import model
import train
from configurator import Config

STUDENT = (Path(REPO) / "tests" / "student_lora.py").read_text()
EMPTY_A = "torch.empty((lora_rank, in_features), device=device, dtype=dtype)"
EMPTY_B = "torch.empty((out_features, lora_rank), device=device, dtype=dtype)"
DRAW_A = "            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))\n"
ZERO_B = "            nn.init.zeros_(self.lora_B)\n"
UNDRAWN = [(DRAW_A, ""), (ZERO_B, "            pass\n")]


SCALE = "            self.lora_scaling = lora_alpha / lora_rank\n"
FORWARD = "nn.Linear.forward(self, x)"
ONCE = "if self.is_lora() and mode == self.has_weights_merged"
NUMBER = ("self.lora_dropout(x)", "nn.functional.dropout(x, self.lora_dropout, self.training)")


@pytest.fixture
def build(monkeypatch, checkpoint):
    """A model of train.py's whose layers are those of a student's file, changed in places."""

    def make(*changes):
        source = STUDENT
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        names = {}
        exec(source, names)
        monkeypatch.setattr(model, "LoRALinear", names["LoRALinear"])
        monkeypatch.setattr(train, "mark_only_lora_as_trainable", names["mark_only_lora_as_trainable"])
        torch.manual_seed(0)
        return train.build_model(Config(init_from=checkpoint, rank=4, alpha=8.0), "cpu", torch.float32)

    return make


def layer_of(built):
    return built.transformer.h[1].attn.c_attn


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [(EMPTY_B, EMPTY_B.replace("empty", "zeros")), (ZERO_B, "")],
        [(EMPTY_A, EMPTY_A.replace("empty", "randn")), (DRAW_A, "")],
        [(EMPTY_B, EMPTY_B.replace("empty", "zeros")), (EMPTY_A, EMPTY_A.replace("empty", "randn")), *UNDRAWN],
        [(DRAW_A + ZERO_B, "            nn.init.zeros_(self.lora_A)\n            nn.init.normal_(self.lora_B)\n")],
        [("nn.Dropout(lora_dropout)", "lora_dropout"), NUMBER],
        [(SCALE, SCALE.replace("lora_rank", "math.sqrt(lora_rank)"))],
    ],
    ids=[
        "the handout's",
        "B in the constructor",
        "A in the constructor",
        "both there",
        "A is the zero one",
        "dropout is a number",
        "a scale of its own",
    ],
)
def test_a_right_file_starts_from_the_base(build, changes):
    """Lost if it fails: a file that the course's grader calls right trains from uninitialised memory."""
    layer = layer_of(build(*changes))
    assert layer.lora_A.isfinite().all() and layer.lora_B.isfinite().all()
    assert bool(layer.lora_A.any()) != bool(layer.lora_B.any())  # B A = 0, and one of them can learn


@pytest.mark.parametrize(
    "changes, words",
    [
        ([(ZERO_B, ZERO_B.replace("zeros_", "normal_"))], ["h.0.attn.c_attn", "B A"]),
        ([(ZERO_B, "            self.lora_B.data.fill_(math.inf)\n")], ["h.0.attn.c_attn", "not finite"]),
        (
            [(EMPTY_A, EMPTY_A.replace("(lora_rank, in_features)", "(in_features, lora_rank)"))],
            ["(64, 4)", "(4, 64)"],
        ),
        (
            [(EMPTY_B, EMPTY_B.replace("(out_features, lora_rank)", "(lora_rank, out_features)"))],
            ["(192, 4)", "lora_B"],
        ),
        ([("bias=bias, device", "bias=False, device")], ["c_attn", "bias"]),
        ([(SCALE, "")], ["lora_scaling"]),
        ([(SCALE, SCALE.replace("lora_alpha / lora_rank", "torch.tensor(2.0)"))], ["lora_scaling"]),
        ([("lora_A", "A")], ["lora_A"]),
        ([(DRAW_A, "            nn.init.zeros_(self.lora_A)\n")], ["c_attn", "zero"]),
        ([(FORWARD, "x @ self.weight.T")], ["nn.Linear"]),
        ([("if self.is_lora() and not self.has_weights_merged", "if False")], ["adds"]),
        ([("if self.is_lora() and not self.has_weights_merged", "if self.is_lora()")], ["eval()"]),
        ([("out + self.lora_scaling *", "out +")], ["adds"]),
        ([("out + self.lora_scaling *", "out +"), ("sign * self.lora_scaling *", "sign *")], ["lora_scaling"]),
        ([("sign * self.lora_scaling *", "sign *")], ["adds"]),
        ([(ONCE, "if self.is_lora() and not mode")], ["eval()", "twice"]),
        ([("            self.has_weights_merged = not mode\n", "")], ["eval()"]),
        ([("sign = -1 if mode else 1", "sign = 1")], ["after eval()"]),
        ([('param.requires_grad = "lora_" in name', "pass")], ["wte", "more", "requires_grad = False"]),
        ([('param.requires_grad = "lora_" in name', "param.requires_grad = False")], ["lora_A", "does not train"]),
        ([('"lora_" in name', '"lora_A" in name')], ["lora_B", "does not train"]),
    ],
)
def test_a_wrong_file_is_refused_before_the_first_update(build, changes, words):
    """Lost if it fails: hours of training are lost, or the run ends at "try a lower --lr"."""
    with pytest.raises(ValueError) as e:
        build(*changes)
    assert "\n" not in str(e.value)
    assert [word for word in words if word not in str(e.value)] == []


def test_a_package_that_is_not_there_is_one_line(tmp_path):
    """Lost if it fails: a student whose file imports einops meets a traceback of ours."""
    (tmp_path / "lora.py").write_text("import no_such_package\n" + STUDENT)
    for name in ("train.py", "generate.py"):
        code = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}, {str(REPO)!r}]; sys.argv = ['{name}']"
        code += f"; runpy.run_path({str(Path(REPO) / name)!r}, run_name='__main__')"
        _, err = finish(start("-c", code, cwd=tmp_path), code=2)
        assert err.count("\n") == 1 and "lora.py" in err and "pip install no_such_package" in err, err
