"""A run on a stream is judged by what has numbered samples; what has none is refused before a device is touched."""

import json

import pytest
from omegaconf import OmegaConf

from tests.data.hostile import END, png, sample
from zigflow.metrics.frechet import FrechetMetric
from zigflow.plugins import compose_config
from zigflow.sample_job import sample_from_config
from zigflow.settings import Settings, SettingsError
from zigflow.tools.evaluate import evaluate
from zigflow.train_job import train_from_config

pytest.importorskip("webdataset")
SHARDS = "zigflow.datasets.shards.ShardSource"
QUICK = ["ode.sampling_method=euler", "ode.num_steps=3", "loop.progress=false", "loop.device=cpu"]


class Color(FrechetMetric):
    """Compares mean gray values: what is judged matters here, not how well."""

    def __init__(self, reference="train", reference_stats=None):
        super().__init__(lambda x: x.double().mean((-1, -2)).repeat(1, 2), reference, name="color")


COLOR = f"metrics._target_={__name__}.Color"
DIGITS = "metrics._target_=zigflow.metrics.digit_judge.DigitJudge"
HELDOUT = "+metrics.reference=heldout"
NO_HELDOUT = "data.heldout=null"


@pytest.fixture
def folder(tmp_path):
    for name in ("set", "heldout"):
        (tmp_path / name).mkdir()
        for number in range(2):
            gray = bytes([0, *range(8)]) * 8
            digits = ({"image.png": png(8, 8, rows=gray), "cls": b"%d" % (i % 2)} for i in range(10))
            rows = (sample(f"{number}-{i}", digit) for i, digit in enumerate(digits))
            (tmp_path / name / f"{number}.tar").write_bytes(b"".join(rows) + END)
    return tmp_path


def on_stream(folder, *more):
    heldout = [] if NO_HELDOUT in more else [f"data.heldout.root={folder / 'heldout'}"]
    return compose_config(
        [
            "data=shards", "+debug=cpu_tiny", "data.order=streaming", f"data.source.root={folder / 'set'}", *heldout,
            "data.image_size=8", "data.channels=1", "data.num_classes=2", "data.num_workers=0", "data.batch_size=8",
            "data.sample_fid_every=8", "data.sample_fid_n=4", "data.sample_fid_bs=4", *QUICK,
            f"run_dir={folder / 'run'}", *more,
        ]
    )  # fmt: skip


def test_a_stream_is_evaluated_against_held_out_data(folder):
    train_from_config(on_stream(folder, COLOR, HELDOUT))
    during = json.loads((folder / "run" / "eval" / "step-0000008.json").read_text())
    assert during["protocol"]["reference_n"] == 20
    given = [
        f"ckpt={folder / 'run'}",
        "num_fid_samples=4",
        f"sample_dir={folder / 'samples'}",
        "run_dir=unused",
    ]
    samples = sample_from_config(
        compose_config([*given, "offline_sample_local_bs=4", "data.order=streaming", *QUICK], "sample")
    )
    sample_from_config(
        compose_config(
            [*given[:2], f"sample_dir={folder / 'as_there'}", "labels=data", *QUICK, given[3]], "sample"
        )
    )
    after = json.loads((samples / "results.json").read_text())
    assert after["metrics"] == during["metrics"]
    assert after["protocol"]["ids_sha256"] == during["protocol"]["ids_sha256"]
    assert evaluate(_settings(on_stream(folder, COLOR, HELDOUT)), samples)[1] == during["metrics"]
    with pytest.raises(
        SettingsError, match="compares with the training set, whose samples data.order=streaming"
    ):
        evaluate(_settings(on_stream(folder, COLOR)), samples)


def _settings(cfg):
    return Settings.from_mapping(OmegaConf.to_container(cfg, resolve=True))


@pytest.mark.parametrize(
    "more, match",
    [
        ([COLOR], "set metrics.reference=heldout, metrics.reference_stats=FILE.npz, metrics=none, or download"),
        ([DIGITS], "whose samples data.order=streaming does not number: set metrics=none, or download the shards"),
        ([COLOR, HELDOUT, NO_HELDOUT], "compares with held-out data, which data=shards has none of: give"),
        (
            ["metrics=none", NO_HELDOUT, "+model.has_text=true", "+model.d_context=5"],
            "evaluation samples from the texts of held-out data, which data=shards has none of",
        ),
        (["metrics._target_=zigflow.metrics.Nothing"], r"metrics\._target_=.*Nothing cannot be imported"),
    ],
    ids=["train", "judge", "no heldout", "no texts", "no class"],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_before_a_device_is_touched(folder, monkeypatch, more, match):
    monkeypatch.setattr("zigflow.build.make_accelerator", lambda **_: pytest.fail("the device was touched"))
    with pytest.raises(SettingsError, match=match) as refused:
        train_from_config(on_stream(folder, *more))
    assert "\n" not in str(refused.value)
    assert not (folder / "run").exists()


def test_only_the_real_images_that_a_metric_reads_are_opened(folder):
    """The training set of an indexed run may lie elsewhere when held-out data are all that is asked for."""
    config = on_stream(folder, COLOR, HELDOUT, "data.train_steps=8", "data.order=indexed")
    train_from_config(config)
    for tar in (folder / "set").iterdir():
        tar.unlink()
    given = [
        f"ckpt={folder / 'run'}",
        "num_fid_samples=4",
        f"sample_dir={folder / 'samples'}",
        "run_dir=unused",
    ]
    samples = sample_from_config(compose_config([*given, *QUICK], "sample"))
    assert json.loads((samples / "results.json").read_text())["metrics"]["color"] >= 0


def test_a_number_of_samples_that_cannot_be_judged_is_one_line(folder):
    few = on_stream(folder, DIGITS, "data.order=indexed", "data.sample_fid_n=3")
    with pytest.raises(
        SettingsError, match=r"data.sample_fid_every=8\): digit judge: .* or give metrics=none"
    ):
        train_from_config(few)
