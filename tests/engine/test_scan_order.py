"""What every layer walks is part of a checkpoint and of the identity of samples: a scan's code may be edited."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model_zigma import ZigMa
from scans import register_scan
from scans.registry import _ENTRIES
from tests.engine.test_trainer import make_trainer
from tests.engine.toys import TinyModel
from zigflow.engine import checkpoint
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.claims import SamplingFolderError, claim_folder
from zigflow.engine.run_state import load_weights
from zigflow.engine.scan_order import scan_facts
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.stored_config import _how_to_start

SIZES = {"in_channels": 1, "img_dim": 8, "patch_size": 2, "embed_dim": 16, "depth": 3}
FAMILIES = {
    "zigma": lambda scan: ZigMa(**SIZES, scan=scan),
    "dis": lambda scan: DiS(**SIZES, scan=scan),
    "dim": lambda scan: DiM(**{**SIZES, "depth": 4}, scan=scan),
}


@pytest.fixture
def edited():
    """Register a scan of one path, "mine", and register it anew, as a file that was edited would."""

    def register(rule):
        _ENTRIES.pop(("mine", 2), None)
        register_scan("mine")(lambda h, w: [rule(h, w)])

    yield register
    _ENTRIES.pop(("mine", 2), None)


def columns(h, w):
    return np.arange(h * w).reshape(h, w).T.ravel()


def last_two_swapped(h, w):
    return np.concatenate([columns(h, w)[:-2], columns(h, w)[:-3:-1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_orders(family, edited):
    edited(columns)
    build = FAMILIES[family]
    first = scan_facts(build("mine"))
    assert first == scan_facts(build("mine")), "weights do not matter"
    edited(last_two_swapped)
    second = scan_facts(build("mine"))
    assert second["name"] == first["name"] and "mine" in first["name"]
    assert second["sha256"] != first["sha256"], "two tokens in another order are another order"
    assert len({scan_facts(build(name))["sha256"] for name in ("sweep1", "hilbert", "spiral")}) == 3


def test_models_without_scans_have_none():
    assert scan_facts(DiT(**{**SIZES, "embed_dim": 32}, num_heads=2)) is None
    assert scan_facts(TinyModel()) is None


def test_what_differs_between_layers_counts():
    shared, shifted = (ZigMa(**{**SIZES, "depth": d}, scan="zigzag") for d in (3, 4))
    assert scan_facts(shared)["sha256"] != scan_facts(shifted)["sha256"]
    video = {"video_frames": 2, "scan_type": "zzvideo_sst"}
    folded = [ZigMa(**SIZES, **video, official_temporal_reversal=flag) for flag in (False, True)]
    assert scan_facts(folded[0])["sha256"] != scan_facts(folded[1])["sha256"]


class Walking(TinyModel):
    scan_name = "mine"

    def __init__(self, order):
        super().__init__()
        self.walked = torch.tensor(order)

    def scan_walks(self):
        return [(self.walked, None, 1)]


def test_a_checkpoint_refuses_an_edited_scan(tmp_path, caplog):
    make_trainer(tmp_path, steps=1, model=Walking([0, 1, 2])).fit()
    found = checkpoint.open_checkpoint(tmp_path)
    assert found.trainer["scan"] == scan_facts(Walking([0, 1, 2]))
    load_weights(Walking([0, 1, 2]), found)
    said = r"scan 'mine' walks \w{8} here and walked \w{8} there.*restore it"
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(Walking([0, 2, 1]), found)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=said):
        make_trainer(tmp_path, steps=2, model=Walking([0, 2, 1])).fit()
    # A checkpoint of 0.1 does not know: it loads, and says so once.
    del found.trainer["scan"]
    with caplog.at_level("INFO"):
        load_weights(Walking([0, 2, 1]), found)
    assert len([r for r in caplog.records if "is taken as it is now" in r.getMessage()]) == 1


def test_a_half_filled_folder_refuses_an_edited_scan(tmp_path, caplog):
    before, after = ({"seed": 0, "scan": scan_facts(Walking(order))} for order in ([0, 1, 2], [0, 2, 1]))
    claim_folder(tmp_path, "sampling.json", before, started=False)
    claim_folder(tmp_path, "sampling.json", before, started=True)
    with pytest.raises(SamplingFolderError, match=r"scan 'mine' walks.*edited since; restore it.*sample_dir"):
        claim_folder(tmp_path, "sampling.json", after, started=True)
    # A folder of 0.1 is compared by what it states.
    (tmp_path / "sampling.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(SamplingFolderError, match="seed: there 1, now 0"):
        claim_folder(tmp_path, "sampling.json", after, started=True)
    (tmp_path / "sampling.json").write_text(json.dumps({"seed": 0}))
    with caplog.at_level("INFO"):
        claim_folder(tmp_path, "sampling.json", after, started=True)
    assert "does not say its scan" in caplog.text
    assert json.loads((tmp_path / "sampling.json").read_text()) == after
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(SamplingFolderError, match="seed"):
        claim_folder(tmp_path, "sampling.json", after, started=True)


@pytest.mark.parametrize("scan", ["zigzag", "hilbert", "random"])
@pytest.mark.parametrize("family", [ZigMa, DiS, DiM])
def test_a_larger_model_knows_how_the_small_one_walks(family, scan):
    small, large = (family(**{**SIZES, "depth": 4, "img_dim": side}, scan=scan) for side in (8, 16))
    assert scan_facts(large, small.token_grid) == scan_facts(small) != scan_facts(large)


def test_an_edited_scan_is_refused_where_weights_start_a_model_of_another_size(edited):
    edited(columns)
    config = {side: {"model": {**SIZES, "img_dim": side}, "scan": {"name": "mine"}} for side in (8, 16)}
    facts = {"scan": scan_facts(ZigMa(**SIZES, scan="mine")), "counters": {"images_seen": 0}}
    stored = SimpleNamespace(path="old", config=config[8], trainer=facts)
    large = ZigMa(**config[16]["model"], scan="mine")
    assert _how_to_start(large, stored, config[16])["built"] == (1, 4, 4)
    edited(last_two_swapped)
    large = ZigMa(**config[16]["model"], scan="mine")
    with pytest.raises(
        CheckpointError, match="old was trained along another order: scan 'v2 with mine' walks .* restore it"
    ):
        _how_to_start(large, stored, config[16])
