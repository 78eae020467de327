"""The table of numbers that sampling ends with."""

import pytest

from zigflow.metrics.digit_judge import DigitThresholds
from zigflow.metrics.report import table


@pytest.mark.parametrize("frechet, coverage", [(1.4, 0.95), (1.81, 0.95), (1.4, 0.5)])
def test_every_threshold_is_shown_with_its_verdict(frechet, coverage):
    numbers = {
        "classifier_heldout_accuracy": 0.99,
        "agreement": 0.95,
        "coverage": coverage,
        "nearest_train_distance_ratio": 0.97,
        "frechet_ratio": frechet,
    }
    limits = DigitThresholds()
    verdicts = limits.verdicts(numbers)
    metrics = {"n": 500, "frechet": 0.1, **numbers} | {f"passed_{k}": v for k, v in verdicts.items()}
    metrics["passed"] = all(verdicts.values())
    lines = table(metrics, {"thresholds": vars(limits)})
    assert len(lines) == 6
    for name, value in numbers.items():
        (line,) = [line for line in lines if line.split()[0] == name]
        assert f"{value:.4g}" in line
        assert ("at most" in line) == (name == "frechet_ratio")
        assert line.endswith("passed" if verdicts[name] else "MISSED")
    assert lines[-1].startswith("passed: yes" if metrics["passed"] else "passed: no, 1 of 5")


def test_without_thresholds_the_numbers_stand_alone():
    assert table({"fid": 3.14159, "n": 500, "passed": True, "what": "x"}, {}) == [
        "fid      3.142",
        "n          500",
    ]
    lines = table({f"number_{i:02d}": float(i) for i in range(30)}, {"thresholds": None})
    assert len(lines) == 15
    assert lines[-1] == "and 16 more"
    assert table({}, {}) == []
