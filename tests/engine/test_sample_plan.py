"""Which samples are drawn, and what each is conditioned on."""

import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zigflow.data.writer import ShardWriter
from zigflow.engine.sample_plan import SampleOptions, SourceRows, class_plan, open_captions, text_plan
from zigflow.settings import SettingsError


def options(**given):
    given = {"offline_sample_local_bs": 4, **given}
    read = SampleOptions.take_from(given)
    assert not given, "the keys are taken out"
    return read


class Source:
    """Class 0 three times as often as class 1."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"labels": int(index >= 6)}


ids = torch.arange(6)


def test_defaults_change_nothing():
    assert options() == SampleOptions(batch_size=4)
    assert options().facts() == {}
    assert class_plan(options(), 3, None, 0)(ids).tolist() == [0, 1, 2, 0, 1, 2]
    assert class_plan(options(), 0, None, 0) is None


@pytest.mark.parametrize(
    "given, want",
    [([3, 17, 40], (3, 17, 40)), ("2-5", (2, 3, 4, 5)), (7, (7,)), ("4-4", (4,)), (None, None)],
)
def test_seeds(given, want):
    assert options(seeds=given).seeds == want


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("seeds", "5-2", "sample numbers"),
        ("seeds", [1, -1], "sample numbers"),
        ("seeds", [1, 2, 1], "more than once"),
        ("seeds", [], "sample numbers"),
        ("seeds", [True], "sample numbers"),
        ("seeds", "0-99999999999", "sample numbers"),
        ("labels", "", "neither balanced, data nor"),
        ("labels", [1.5], "neither"),
        ("labels", [], "neither"),
        ("offline_sample_local_bs", 0, "at least 1"),
        ("npz", "maybe", "npz"),
    ],
)
def test_values_that_are_not_allowed(key, value, words):
    with pytest.raises(SettingsError, match=words):
        options(**{key: value})


def test_classes_in_turn():
    assert class_plan(options(labels=[3, 7]), 10, None, 0)(ids).tolist() == [3, 7, 3, 7, 3, 7]
    assert class_plan(options(labels=4), 10, None, 0)(ids).tolist() == [4] * 6
    # In turn over the chosen samples, in whatever batches they come.
    plan = class_plan(options(labels=[3, 7], seeds=[11, 5, 9]), 10, None, 0)
    assert plan(torch.tensor([11, 5, 9, 11])).tolist() == [3, 7, 3, 3]
    with pytest.raises(SettingsError, match=r"labels has 10, the model's classes are 0\.\.9"):
        class_plan(options(labels=[3, 10]), 10, None, 0)
    with pytest.raises(SettingsError, match="this one has none"):
        class_plan(options(labels=[3]), 0, None, 0)


def test_classes_as_frequent_as_in_the_data():
    plan = class_plan(options(labels="data"), 2, Source(), seed=1)
    many = plan(torch.arange(4000))
    assert abs(float(many.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(plan(torch.tensor([17, 3])), many[[17, 3]]), "a sample's class follows from its number"
    assert not torch.equal(
        class_plan(options(labels="data"), 2, Source(), seed=2)(torch.arange(99)), many[:99]
    )
    with pytest.raises(SettingsError, match="needs data with labels"):
        class_plan(options(labels="data"), 2, None, 0)
    with pytest.raises(SettingsError, match="has the class 1, the model's are 0..0"):
        class_plan(options(labels="data"), 1, Source(), 1)(torch.arange(99))


def write_captions(folder, form, array):
    if form == "npy":
        np.save(folder / "a.npy", array)
        return folder / "a.npy"
    if form == "safetensors":
        save_file({"tokens": torch.from_numpy(array), "other": torch.zeros(2)}, folder / "a.safetensors")
        return folder / "a.safetensors"
    with ShardWriter(folder / "shards", samples_per_shard=2) as writer:
        for i, row in enumerate(array):
            buffer = io.BytesIO()
            np.save(buffer, row)
            writer.add(f"{i:04d}", {"caption_feature.npy": buffer.getvalue()})
    return folder / "shards"


@pytest.mark.parametrize("form", ["npy", "safetensors", "shards"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("captions", [(), (2,)])
def test_caption_features_by_row(tmp_path, form, dtype, captions):
    array = np.random.default_rng(0).standard_normal((3, *captions, 4, 5)).astype(dtype)
    rows = open_captions(str(write_captions(tmp_path, form, array)))
    assert len(rows) == 3
    assert len(rows.fingerprint) >= 16
    got = text_plan(rows, 5, "captions")(torch.arange(8))
    assert (got.shape, got.dtype) == ((8, 4, 5), torch.float32)
    for i in range(8):
        want = array[i % 3] if not captions else array[i % 3, (i // 3) % 2]
        np.testing.assert_array_equal(got[i].numpy(), want.astype(np.float32))


def test_caption_files_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, 4, 5), np.int64))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    save_file({"a": torch.zeros(2, 3, 4), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "captions.pt").write_bytes(b"")
    for name, words in (
        ("flat.npy", r"\(N, L, D\)"), ("whole.npy", "floating-point"), ("object.npy", "Python objects"),
        ("two.safetensors", "named 'tokens'; it has a, b"), ("broken.safetensors", "broken.safetensors: "),
        ("captions.pt", "neither a .npy file"), ("missing.npy", "No such file"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=words):
            open_captions(str(tmp_path / name))


def test_captions_that_do_not_fit_the_model(tmp_path):
    array = np.zeros((3, 4, 5), np.float32)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(SettingsError, match=r"rows of shape \(4, 5\).*model.d_context is 6"):
        text_plan(open_captions(str(tmp_path / "a.npy")), 6, "captions")
    array[1, 2] = np.nan
    np.save(tmp_path / "b.npy", array)
    with pytest.raises(SettingsError, match="row 1 .* not finite"):
        text_plan(open_captions(str(tmp_path / "b.npy")), 5, "captions")(torch.arange(3))
    with pytest.raises(SettingsError, match="give captions=FILE.npy"):
        text_plan(SourceRows([{"labels": 1}]), 5, "data=x")


def test_facts_are_json():
    facts = options(labels=[3, 7], seeds=[4, 0]).facts()
    assert json.loads(json.dumps(facts)) == {"labels": [3, 7], "seeds": [4, 0]}
    assert options(seeds="0-999999").facts() == {"seeds": "0-999999"}, "short however many they are"
    assert options(seeds=[0, 1, 2]).facts() == options(seeds="0-2").facts()
