"""The accuracy's interval, at its ends.

python -m pytest tests/scoring/test_accuracy.py
"""

import pytest

from plumbing.scoring.accuracy import print_result, tabulate


@pytest.mark.parametrize("right", [True, False])
def test_an_interval_stays_between_0_and_100(capsys, right):
    """Lost if it fails: an accuracy of none has an interval from -0.0 on."""
    for n in range(1, 400):
        labels = [0, 1] * n
        print_result(tabulate(labels if right else [1 - label for label in labels], labels, ["bad", "good"]))
        out = capsys.readouterr().out
        assert "-0.0" not in out and ("to 100.0)" if right else "interval 0.0 to") in out
