"""docs/extending.md: its model trains and samples as it stands, its names exist."""

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf, open_dict

from zigflow import plugins
from zigflow.nn import Denoiser
from zigflow.nn.denoiser import MEMBERS
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


def test_the_table_is_the_protocol():
    table = PAGE.partition("## The contract")[2].partition("## DiS")[0]
    rows = [row.split("|")[1:5] for row in re.findall(r"^\| `.*", table, flags=re.M)]
    named = {}
    for members, _, default, _ in rows:
        for member, given in re.findall(r"`(\w+)(?:\(([^`]*)\))?`", members):
            assert member not in named, f"{member} has two rows"
            named[member] = (given, default.strip())
    assert set(named) == MEMBERS
    assert {member for member, (_, default) in named.items() if default == "required"} == {
        "forward",
        "sample_shape",
    }
    for member, (given, _) in named.items():
        own = getattr(Denoiser, member)
        if inspect.isfunction(own):
            stated = [part.strip().partition("=")[0].lstrip("*") for part in re.split(r",(?![^(]*\))", given)]
            assert [p for p in stated if p] == list(inspect.signature(own).parameters)[1:], member


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", PAGE))
def test_links_exist(target):
    assert (ROOT / "docs" / target).resolve().is_file()
