"""docs/extending.md: its model trains and samples as it stands, its names exist."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict

from zigflow import plugins
from zigflow.models.dis import DiS
from zigflow.sample_job import sample_from_config
from zigflow.train_job import train_from_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.M | re.S))


@pytest.mark.parametrize("process", ["flow", "gaussian"])
def test_the_smallest_model_trains_and_samples(process, tmp_path, monkeypatch):
    (tmp_path / "tokens.py").write_text(BLOCKS["python"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tokens", raising=False)
    small = [
        "data=synthetic",
        "data.image_size=4",
        "data.channels=1",
        "data.batch_size=4",
        f"process={process}",
    ]
    cfg = plugins.compose_config(
        [*small, "data.train_steps=2", "log_every=1", "loop.progress=false", f"run_dir={tmp_path / 'run'}"]
    )
    with open_dict(cfg):
        cfg.model = OmegaConf.create(BLOCKS["yaml"])
    train_from_config(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    folder = sample_from_config(
        plugins.compose_config(
            [f"ckpt={tmp_path / 'run'}", "ode.sampling_method=euler", "ode.num_steps=3", "num_fid_samples=2",
             "loop.progress=false", "run_dir=unused"], "sample",
        )
    )  # fmt: skip
    assert len(list(folder.glob("[0-9]*.png"))) == 2


def test_named_files_and_methods_exist():
    codes = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))
    files = [
        code for code in codes if re.match(r"(zigflow|tests|config|docs)/", code) and "tokens" not in code
    ]
    assert len(files) > 10
    for name in files:
        assert (ROOT / name).exists(), name
    table = PAGE.partition("## The contract")[2].partition("## DiS")[0]
    named = re.findall(r"^\| `(\w+)", table, flags=re.M) + ["img_dim", "video_frames", "has_text"]
    model = DiS(in_channels=1, img_dim=4, patch_size=2, embed_dim=8, depth=2)
    assert len(named) > 10
    for name in named:
        assert hasattr(model, name), name


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", PAGE))
def test_links_exist(target):
    assert (ROOT / "docs" / target).resolve().is_file()
