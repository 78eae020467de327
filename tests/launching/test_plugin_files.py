"""A file of one's own in every process that a command starts: ranks, data workers, jobs of a parallel sweep."""

import json

import pytest

from tests.helpers.own_files import SCAN
from tests.launching.commands import free_port, run

pytestmark = pytest.mark.slow
SOURCE = """
from zigflow.datasets.synthetic import ShapesSource


class Shapes(ShapesSource):
    pass
"""
TINY = (
    "data=synthetic data.image_size=4 data.batch_size=2 data.train_steps=2 model.embed_dim=8 model.depth=2 \
model.patch_size=1 loop.progress=false"
)


def kept(run_dir):
    return json.loads((run_dir / "checkpoints" / "step-0000002" / "trainer.json").read_text())


def test_ranks_and_data_workers_have_it(tmp_path):
    (tmp_path / "mine.py").write_text(SCAN)
    (tmp_path / "my_data.py").write_text(SOURCE)
    options = f"--config_file config/accelerate/cpu2.yaml --main_process_port {free_port()}"
    own = "scan=mine.py:checker data.source._target_=my_data.Shapes data.num_workers=1 run_dir=run"
    run(f"accelerate launch {options} train_acc.py {TINY} {own}", tmp_path, ZIGFLOW_PLUGINS="my_data.py")
    trainer = kept(tmp_path / "run")
    assert trainer["world_size"] == 2
    assert [file["given"] for file in trainer["plugin_files"]] == ["mine.py", "my_data.py"]
    # The same command without the files: the checkpoint says them.
    run("python sample_acc.py ckpt=run num_fid_samples=1 ode.num_steps=2 metrics=none", tmp_path)


def test_jobs_in_parallel_have_it(tmp_path):
    (tmp_path / "mine.py").write_text(SCAN)
    parallel = "hydra/launcher=joblib hydra.launcher.n_jobs=2"
    run(f"python train_acc.py -m {TINY} scan=mine.py:checker,hilbert {parallel}", tmp_path, RUN_ID="sweep")
    runs = sorted((tmp_path / "outputs" / "train" / "sweep").glob("[0-9]*"))
    assert [kept(folder)["scan"]["name"].rpartition(" ")[2] for folder in runs] == ["checker", "hilbert"]
    assert all(kept(folder)["plugin_files"][0]["given"] == "mine.py" for folder in runs)
