"""PYTEST_DONT_REWRITE  Part 4, train.py: what of the model trains.

python -m pytest homework_tests/test_4_train.py
"""

import torch

from configurator import make_config
from train import build_model


def trainable(**settings):
    """Names of the parameters that train and of those that do not."""
    try:
        model = build_model(make_config(init_from="gpt2-mini", **settings), "cpu", torch.float32)
    except ValueError as e:  # build_model looks itself at what trains
        raise AssertionError(f"with rank={settings['rank']}: {str(e).rpartition('as_trainable ')[2]}") from e
    trains = {name for name, param in model.named_parameters() if param.requires_grad}
    return trains, {name for name, _ in model.named_parameters()} - trains


def test_build_model_trains_the_adapters_alone():
    trains, frozen = trainable(rank=4, alpha=8.0)
    adapters = {name for name in trains | frozen if "lora_" in name}
    assert adapters, "with rank=4 the model has no adapter: see model.py"
    assert trains, "with rank=4 no parameter trains"
    wrong = sorted(trains - adapters)
    assert not wrong, f"with rank=4 {len(wrong)} parameters train that are no adapter's, such as {wrong[0]}"
    missing = sorted(adapters - trains)
    assert not missing, f"with rank=4 {len(missing)} parameters of adapters do not train, such as {missing[0]}"


def test_build_model_trains_all_of_it_without_lora():
    _, frozen = trainable(rank=0)
    assert not frozen, f"rank=0 is full fine-tuning, and {len(frozen)} parameters do not train, such as {min(frozen)}"
