"""Two processes over gloo: one run, one checkpoint, one decision to stop."""

import pytest

from tests.assertions import assert_close
from tests.engine.toys import TinyModel, make_trainer
from tests.workers import run_two
from zigflow.engine import checkpoint


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_two("tests.engine.worker", tmp_path, cpu=True)
    assert len(list(tmp_path.glob("done_*.json"))) == 2

    # The same global batches on one process: the same run within rounding.
    single = make_trainer(tmp_path / "single", steps=6, batch_size=8, model=TinyModel(dropout=0.0))
    single.fit()
    found = checkpoint.open_checkpoint(tmp_path / "straight")
    for name, value in found.tensors("model").items():
        if name != "calls":
            assert_close(name, value, single.model.state_dict()[name])
