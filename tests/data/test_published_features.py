"""Feature files of U-ViT and DiM as they are: the stored examples, damage, hostile contents, and shards of them."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from zigflow.codec import IdentityCodec
from zigflow.data.decode import DecodeError
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import evaluation_loader, training_loader
from zigflow.data.order import DataOrder
from zigflow.data.source import check_source
from zigflow.datasets.coco_features import CocoFeaturesSource
from zigflow.datasets.latent_features import LatentFeaturesSource
from zigflow.datasets.shards import ShardSource
from zigflow.engine.sample_plan import open_captions
from zigflow.keyed import KeyedDraws
from zigflow.metrics.stored_images import StoredImages
from zigflow.tools import __main__ as tools
from zigflow.typed import SettingsError

STORED = Path(__file__).parents[1] / "parity" / "fixtures" / "dit_uvit" / "data_formats"
MOMENTS = np.arange(8 * 2 * 2, dtype=np.float32).reshape(8, 2, 2) / 32


def run(*args):
    return tools.main([str(arg) for arg in args])


def pair(first, second):
    out = np.empty(2, dtype=object)
    out[:] = [first, second]
    return out


class Evil:
    def __reduce__(self):
        return (os.system, ("touch PWNED",))


@pytest.fixture
def imagenet(tmp_path):
    return Path(shutil.copytree(STORED / "imagenet_features", tmp_path / "imagenet"))


@pytest.fixture
def coco(tmp_path):
    return Path(shutil.copytree(STORED / "coco_features", tmp_path / "coco"))


def test_the_stored_imagenet_features():
    source = LatentFeaturesSource(STORED / "imagenet_features", 1000)
    check_source(source, samples=2)
    assert (len(source), source.image_shape, source.num_classes) == (2, (4, 4, 4), 1000)
    for index in range(2):
        moments, label = np.load(STORED / f"imagenet_features/{index}.npy", allow_pickle=True)
        assert np.array_equal(source[index]["moments"], moments)
        assert source[index]["labels"] == label == 5 + index
    unlabeled = LatentFeaturesSource(STORED / "imagenet_features")
    assert set(unlabeled[0]) == {"key", "moments"}
    assert unlabeled.fingerprint != source.fingerprint


def test_all_kinds_of_latent_files_hold_the_same(tmp_path):
    for name in ("uvit", "dim", "plain"):
        (tmp_path / name).mkdir()
    for index in range(3):
        np.save(tmp_path / f"uvit/{index}.npy", pair(MOMENTS + index, np.int64(index)), allow_pickle=True)
        np.savez(tmp_path / f"dim/{index}.npy", z=MOMENTS + index, label=index)
        np.save(tmp_path / f"plain/{index}.npy", MOMENTS + index)
    uvit, dim = (LatentFeaturesSource(tmp_path / name, 3) for name in ("uvit", "dim"))
    plain = LatentFeaturesSource(tmp_path / "plain")
    for index in range(3):
        assert torch.equal(uvit[index]["moments"], torch.from_numpy(MOMENTS + index))
        assert torch.equal(dim[index]["moments"], uvit[index]["moments"])
        assert torch.equal(plain[index]["moments"], uvit[index]["moments"])
        assert uvit[index]["labels"] == dim[index]["labels"] == index
    with pytest.raises(DecodeError, match=r"0\.npy: there is no label: give num_classes=0"):
        LatentFeaturesSource(tmp_path / "plain", 3)
    np.savez(tmp_path / "plain/0.npy", z=MOMENTS)
    with pytest.raises(ValueError, match=r"0\.npy as well as 0\.npy\.npz"):
        LatentFeaturesSource(tmp_path / "plain")


BAD_FEATURES = {
    "os.system as moments": (pair(Evil(), np.int64(1)), r"1\.npy: it holds (posix|nt)\.system"),
    "os.system as label": (pair(MOMENTS, Evil()), r"1\.npy: it holds (posix|nt)\.system"),
    "another shape": (
        pair(MOMENTS[:, :1], np.int64(1)),
        r"moments of shape \(8, 1, 2\), .* have \(8, 2, 2\)",
    ),
    "odd channels": (pair(MOMENTS[:7], np.int64(1)), r"\(2 C, h, w\)"),
    "integers": (pair(MOMENTS.astype(int), np.int64(1)), "floating-point"),
    "not finite": (pair(MOMENTS * np.nan, np.int64(1)), "not finite"),
    "swapped": (pair(np.int64(1), MOMENTS), "floating-point"),
    "three objects": (np.array([1, 2, None], dtype=object), "nonetype inside"),
    "three numbers": (np.array([1, 2, 3], dtype=object), "there are 3 objects"),
    "a class too far": (pair(MOMENTS, np.int64(3)), r"label 3 is outside 0\.\.2"),
    "a negative class": (pair(MOMENTS, np.int64(-1)), r"label -1 is outside"),
    "half a class": (pair(MOMENTS, np.float32(0.5)), "one integer"),
    "classes": (pair(MOMENTS, np.array([1, 2])), "one integer"),
    "a text": (pair(MOMENTS, "cat"), "pair of moments and label"),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_a_bad_latent_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, match = BAD_FEATURES[name]
    Path("f").mkdir()
    np.save("f/0.npy", pair(MOMENTS, np.int64(0)), allow_pickle=True)
    np.save("f/1.npy", content, allow_pickle=True)
    source = LatentFeaturesSource("f", 3)
    source[0]
    with pytest.raises(DecodeError, match=match) as error:
        source[1]
    assert str(error.value).count("1.npy") == 1
    assert not Path("PWNED").exists()


def test_damage_and_gaps_among_latent_files(imagenet, tmp_path):
    whole = (imagenet / "1.npy").read_bytes()
    source = LatentFeaturesSource(imagenet, 1000)
    for end in (0, 5, 100, 128, 500, len(whole) - 1):
        (imagenet / "1.npy").write_bytes(whole[:end])
        with pytest.raises(DecodeError, match=r"1\.npy: "):
            source[1]
    (imagenet / "1.npy").write_bytes(whole)
    shutil.copy(imagenet / "1.npy", imagenet / "3.npy")
    with pytest.raises(ValueError, match=r"has no 2\.npy, but 1 files of higher numbers"):
        LatentFeaturesSource(imagenet)
    (imagenet / "0.npy").unlink()
    with pytest.raises(ValueError, match=r"holds neither 0\.npy nor 0\.npy\.npz"):
        LatentFeaturesSource(imagenet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds neither 0\.npy"):
        LatentFeaturesSource(tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match="nowhere"):
        LatentFeaturesSource(tmp_path / "nowhere")


def test_unreadable_features_are_skipped_within_a_budget(imagenet):
    source = LatentFeaturesSource(imagenet, 1000)
    (imagenet / "1.npy").write_bytes(b"junk")
    order = DataOrder(source.shard_sizes, 0)
    loader = training_loader(source, order, GlobalBatch(2), max_skipped=1, stop_step=1)
    (batch,) = loader
    assert batch.labels.tolist() == [5, 5] and len(batch.skipped) == 1


def test_the_stored_coco_features():
    source = CocoFeaturesSource(STORED / "coco_features")
    check_source(source, samples=2)
    assert (len(source), source.image_shape, source.num_classes) == (2, (4, 4, 4), 0)
    assert np.array_equal(source.empty_context, np.load(STORED / "coco_features/empty_context.npy"))
    for index in range(2):
        sample = source[index]
        assert np.array_equal(sample["moments"], np.load(STORED / f"coco_features/train/{index}.npy"))
        wanted = [np.load(STORED / f"coco_features/train/{index}_{k}.npy") for k in range(2)]
        assert np.array_equal(sample["tokens"], np.stack(wanted))
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again[1]["tokens"], source[1]["tokens"])


def test_the_stored_prompts_are_captions():
    rows = open_captions(str(STORED / "coco_features" / "run_vis"))
    _, features = np.load(STORED / "coco_features/run_vis/0.npy", allow_pickle=True)
    assert len(rows) == 1 and np.array_equal(rows.row(0), features)


def test_the_stored_samples_of_adm_can_be_judged():
    images, ids, labels = StoredImages(STORED / "adm_samples_example.npz").round(0)
    assert np.array_equal(images.permute(0, 2, 3, 1), np.load(STORED / "adm_samples_example.npz")["arr_0"])
    assert ids.tolist() == [0, 1, 2] and labels is None


def test_hostile_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, match in (
        (pair("a cat", Evil()), "system"),
        (pair(MOMENTS[0], MOMENTS[0]), "text and features"),
    ):
        np.save("0.npy", content, allow_pickle=True)
        with pytest.raises(DecodeError, match=match) as error:
            open_captions(str(tmp_path)).row(0)
        assert "0.npy" in str(error.value)
    assert not Path("PWNED").exists()
    np.save("2.npy", MOMENTS)
    with pytest.raises(SettingsError, match=r"has no 1\.npy"):
        open_captions(str(tmp_path))


def test_images_may_have_different_numbers_of_captions(coco):
    shutil.copy(coco / "train/0_0.npy", coco / "train/1_2.npy")
    source = CocoFeaturesSource(coco)
    assert [len(source[index]["tokens"]) for index in range(2)] == [2, 3]
    order = DataOrder(source.shard_sizes, 0)
    batch = next(iter(training_loader(source, order, GlobalBatch(2), caption_seed=0)))
    assert batch.tokens.shape == (2, 7, 6)
    assert next(iter(evaluation_loader(source, 2, caption_seed=0))).tokens.shape == (2, 7, 6)


def test_what_is_missing_or_wrong_among_coco_files_is_named(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = coco / "train"
    with pytest.raises(ValueError, match="Did you mean"):
        CocoFeaturesSource(coco, "vall")
    with pytest.raises(NotADirectoryError, match="val"):
        CocoFeaturesSource(coco, "val")

    def refused(change, match, kind=(ValueError, FileNotFoundError)):
        copy = tmp_path / "copy"
        shutil.copytree(coco, copy)
        change(copy)
        with pytest.raises(kind, match=match):
            source = CocoFeaturesSource(copy)
            source[1]
        shutil.rmtree(copy)

    def save(name, content):
        return lambda copy: np.save(copy / name, content, allow_pickle=True)

    def drop(*names):
        return lambda copy: [(copy / name).unlink() for name in names]

    refused(
        drop("empty_context.npy"), r"empty_context\.npy is missing.*empty_context=false", FileNotFoundError
    )
    assert CocoFeaturesSource(coco, empty_context=False).empty_context is None
    refused(drop("train/1_0.npy", "train/1_1.npy"), r"no captions of 1\.npy")
    refused(drop("train/1_0.npy"), r"has no 1_0\.npy")
    refused(drop("train/0.npy"), r"has no 0\.npy")
    refused(drop("train/1.npy"), r"the caption 1_0\.npy, but no 1\.npy")
    tokens = np.zeros((7, 6), np.float32)
    refused(save("train/1_1.npy", tokens[:6]), r"1_1\.npy: text features of shape \(6, 6\)")
    refused(save("train/1_1.npy", tokens.astype(int)), r"1_1\.npy: text features are floating-point")
    refused(save("empty_context.npy", tokens[:5]), r"0_0\.npy: text features of shape \(7, 6\)")
    refused(
        save("empty_context.npy", pair("a", Evil())), r"empty_context\.npy: an npy array of numbers is needed"
    )
    refused(save("train/1.npy", pair(MOMENTS, Evil())), r"1\.npy: an npy array of numbers is needed")
    refused(save("train/1.npy", np.zeros((8, 4, 2), np.float32)), r"1\.npy: moments of shape")
    refused(lambda copy: (copy / "train/1.npy").write_bytes(b"\x93NUMPY"), r"1\.npy: not a readable")
    assert not Path("PWNED").exists()
    assert len(list(train.iterdir())) == 6


def latents_of(source, seed=0):
    order = DataOrder(source.shard_sizes, seed)
    batch = next(iter(training_loader(source, order, GlobalBatch(2), caption_seed=seed)))
    with KeyedDraws(seed, batch.ids).active():
        return IdentityCodec().encode(batch), batch


def test_shards_of_imagenet_features_are_the_features(imagenet, tmp_path, capsys):
    out = tmp_path / "shards"
    given = ("--order", "given")
    assert run("make-shards", "latent-features", "--input", imagenet, "--output", out, *given) == 0
    assert run("verify-shards", out) == 0
    source, files = ShardSource(out), LatentFeaturesSource(imagenet, 1000)
    check_source(source, samples=2)
    assert (source.num_classes, source.image_shape) == (1000, files.image_shape)
    for index in range(2):
        assert torch.equal(source[index]["moments"], files[index]["moments"])
        assert source[index]["labels"] == files[index]["labels"]
    (ours, batch), (theirs, _) = latents_of(source), latents_of(files)
    assert torch.equal(ours, theirs), "the draw follows from the position, not from where the moments lie"
    mean, log_variance = batch.moments.chunk(2, dim=1)
    assert not torch.equal(ours, mean)
    deviations = ((ours - mean) / (log_variance / 2).exp()).flatten()
    assert deviations.abs().max() < 6 and 0.7 < deviations.std() < 1.3
    assert not torch.equal(latents_of(source, 1)[0], ours)
    part = ["make-shards", "latent-features", "--input", imagenet, "--num-classes", 0]
    assert run(*part, "--output", tmp_path / "part", "--split-fraction", 0.5) == 0
    assert set(ShardSource(tmp_path / "part/train")[0]) == {"key", "moments"}
    assert (
        run(
            "make-shards",
            "latent-features",
            "--input",
            imagenet,
            "--num-classes",
            5,
            "--output",
            tmp_path / "x",
        )
        == 1
    )
    assert "label 5 is outside 0..4" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_shards_of_coco_features_are_the_features(coco, tmp_path, capsys):
    shutil.copytree(coco / "train", coco / "val")
    shutil.copy(coco / "val/0_0.npy", coco / "val/1_2.npy")
    out = tmp_path / "shards"
    assert run("make-shards", "coco-features", "--input", coco, "--output", out, "--order", "given") == 0
    assert run("verify-shards", out) == 0
    for name, split in (("train", "train"), ("heldout", "val")):
        source, files = ShardSource(out / name), CocoFeaturesSource(coco, split)
        for index in range(2):
            assert torch.equal(source[index]["moments"], files[index]["moments"])
            assert torch.equal(source[index]["tokens"], files[index]["tokens"])
    assert (out / "empty_context.npy").read_bytes() == (coco / "empty_context.npy").read_bytes()
    assert (
        run(
            "make-shards",
            "coco-features",
            "--input",
            coco,
            "--output",
            tmp_path / "x",
            "--split-fraction",
            0.5,
        )
        == 1
    )
    assert run("make-shards", "coco-features", "--input", tmp_path, "--output", tmp_path / "x") == 1
    assert "neither train nor val" in capsys.readouterr().err


def test_moments_with_an_odd_channel_are_refused_in_shards(tmp_path):
    from zigflow.data.tar import ShardError
    from zigflow.data.writer import ShardWriter, encode_npy

    with ShardWriter(tmp_path) as writer:
        writer.add("a", {"moments.npy": encode_npy(MOMENTS[:3])})
    with pytest.raises(ShardError, match="even number of channels"):
        ShardSource(tmp_path)


def test_real_images_drawn_from_moments_are_the_same_at_every_reading(tmp_path):
    from tests.engine.evaluation_toys import pixel_metric
    from zigflow.engine.evaluation import Judge
    from zigflow.engine.ranks import Ranks

    for index in range(5):
        np.save(tmp_path / f"{index}.npy", np.full((6, 4, 4), -1, np.float32))
    references = []
    for batch_size in (2, 5):
        metric = pixel_metric()
        Judge(metric, LatentFeaturesSource(tmp_path), None, ranks=Ranks(), batch_size=batch_size).check(
            4, None
        )
        references.append(metric.reference_state()["packed"])
    torch.testing.assert_close(*references, rtol=1e-12, atol=0)
    assert references[0][0] == 5
