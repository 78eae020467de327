"""Two real processes judge as one does, and log the same losses when they are cut."""

import json

import pytest

from tests.engine.evaluation_toys import ToySource, pixel_metric, sampling_run
from tests.workers import run_two
from zigflow.engine.evaluation import Judge
from zigflow.engine.ranks import Ranks


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    run_two("tests.engine.evaluation_worker", tmp_path, cpu=True)
    metrics, protocol = json.loads((tmp_path / "judgement.json").read_text())
    alone = Judge(pixel_metric(), ToySource(), None, ranks=Ranks(), preview=6, batch_size=3)(sampling_run())
    assert metrics["frechet"] == pytest.approx(alone.metrics["frechet"], rel=1e-9)
    assert protocol == alone.protocol
