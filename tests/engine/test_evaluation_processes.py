"""Two real processes judge as one does, and log the same losses when they are cut."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine.evaluation_toys import ToySource, pixel_metric, sampling_run
from tests.engine.test_two_processes import ROOT, free_port
from zigflow.engine.evaluation import Judge
from zigflow.engine.ranks import Ranks


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    common = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.evaluation_worker", str(tmp_path)], cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n---\n".join(outputs)
    metrics, protocol = json.loads((tmp_path / "judgement.json").read_text())
    alone = Judge(pixel_metric(), ToySource(), None, ranks=Ranks(), preview=6, batch_size=3)(sampling_run())
    assert metrics["frechet"] == pytest.approx(alone.metrics["frechet"], rel=1e-9)
    assert protocol == alone.protocol
