"""FID through torchmetrics, with a toy network in Inception's place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zigflow.metrics.fid import Fid, check_weights
from zigflow.metrics.frechet import frechet_from_features, read_statistics

FIXTURE = Path(__file__).parents[1] / "parity/fixtures/dit_uvit/data_formats/fid_stats_example.npz"


class ToyFeatures(nn.Module):
    num_features = 6

    def forward(self, images):
        x = images.double()
        rows, columns = x.mean((1, 3)), x.mean((1, 2))
        return torch.cat([rows[:, :3], columns[:, :3].square() / 100], dim=1)


def images(count, seed, shift=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count, 3, 4, 4), generator=generator).add(shift).to(torch.uint8)


def test_the_number_is_ours_and_does_not_depend_on_the_split():
    real, fake, ids = images(50, 0), images(41, 1, 40), torch.arange(41)
    toy = ToyFeatures()
    whole = Fid(features=toy)
    with pytest.raises(RuntimeError, match="set_reference"):
        whole.update(fake, None, ids)
    whole.set_reference((real, None))
    whole.update(fake, None, ids)
    number = whole.compute()["fid"]
    assert number == pytest.approx(frechet_from_features(toy(fake), toy(real)), rel=1e-12)
    parts = [Fid(features=toy, batch_size=7) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.add_reference(real[rank::3])
    states = [part.reference_state() for part in parts]
    for rank, part in enumerate(parts):
        part.forget_reference()
        for state in states:
            part.absorb_reference(state)
        part.update(fake[rank::3], None, ids[rank::3])
    for part in parts[1:]:
        parts[0].absorb_state(part.state())
    assert parts[0].compute()["fid"] == pytest.approx(number, rel=1e-9)
    assert parts[0].protocol() == {
        "metric": "fid", "n": 41, "ids_sha256": whole.protocol()["ids_sha256"], "features": "ToyFeatures",
        "inception_weights_sha256": None, "reference_split": "train", "reference_n": 50, "reference_stats_sha256": None,
        "torchmetrics": None,
    }  # fmt: skip
    whole.reset()
    whole.update(real, None, torch.arange(50))
    assert whole.compute()["fid"] < 1e-9, "the reference stays when the samples are forgotten"


class Projected(nn.Module):
    """Many features, far from zero for their spread."""

    def __init__(self, features, far):
        super().__init__()
        self.weight = torch.randn(48, features, generator=torch.Generator().manual_seed(0))
        self.far = far

    def forward(self, images):
        return images.flatten(1).float() @ self.weight / 1000 + self.far


@pytest.mark.parametrize(("features", "count"), [(64, 40), (192, 100), (16, 500)])
@pytest.mark.parametrize("far", [0.0, 1e3])
def test_a_set_is_at_no_distance_from_itself(features, count, far):
    pictures, network = images(count, 3), Projected(features, far)
    variance = float(network(pictures).double().var(0).sum())
    for way in ("in one batch", "in others", "in another order", "from processes"):
        metric = Fid(features=network)
        metric.set_reference((pictures, None))
        ids = torch.arange(count)
        if way == "in another order":
            ids = ids.flip(0)
        if way == "from processes":
            other = Fid(features=network)
            other.set_reference((pictures, None))
            other.update(pictures[::2], None, ids[::2])
            metric.update(pictures[1::2], None, ids[1::2])
            metric.merge(other)
        else:
            for part in ids.split(count if way == "in one batch" else 7):
                metric.update(pictures[part], None, part)
        assert 0 <= metric.compute()["fid"] <= 1e-9 * variance, way
        if way == "in one batch":
            assert metric.compute()["fid"] == 0


def test_a_published_reference_takes_the_place_of_the_images(tmp_path):
    real, fake, ids, toy = images(50, 0), images(41, 1, 40), torch.arange(41), ToyFeatures()
    features = toy(real).numpy()
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    metric = Fid(features=toy, reference_stats=tmp_path / "stats.npz")
    metric.set_reference((real[:2], None))
    metric.update(fake[:20], None, ids[:20])
    other = Fid(features=toy, reference_stats=tmp_path / "stats.npz")
    other.update(fake[20:], None, ids[20:])
    metric.absorb_state(other.state())
    assert metric.compute()["fid"] == pytest.approx(frechet_from_features(toy(fake), toy(real)), rel=1e-9)
    protocol = metric.protocol()
    assert (protocol["reference_split"], protocol["reference_n"]) == (None, None)
    assert len(protocol["reference_stats_sha256"]) == 64
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(
        ValueError, match=r"reference_stats=.*wide\.npz is over 7 features, the network has 6"
    ):
        Fid(features=toy, reference_stats=tmp_path / "wide.npz")


def test_published_statistics_are_read_and_checked(tmp_path):
    mean, covariance = read_statistics(FIXTURE)
    stored = np.load(FIXTURE)
    assert mean.dtype == covariance.dtype == torch.float64
    assert np.array_equal(mean, stored["mu"])
    np.testing.assert_allclose(covariance, stored["sigma"], rtol=1e-12)
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    path = tmp_path / "s.npz"
    for change, match in (
        ({"sigma": None}, "has no sigma; it holds"),
        ({"sigma": np.eye(4)}, "covariance"),
        ({"mu": np.zeros((3, 1))}, "covariance"),
        ({"mu": np.full(3, np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(3, np.int64)}, "floating-point"),
        ({"mu": np.array([print, 1, 2], dtype=object)}, "type object"),
    ):
        arrays = {k: v for k, v in {**good, **change}.items() if v is not None}
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=match) as error:
            read_statistics(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_statistics(tmp_path / "none.npz")


def test_missing_or_foreign_weights(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.inception_weights=PATH"):
        check_weights(None)
    with pytest.raises(FileNotFoundError, match="is no file"):
        check_weights(tmp_path / "none.pth")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    file = tmp_path / "evil.pth"
    torch.save({"w": Evil()}, file)
    with pytest.raises(ValueError, match="is no file of weights"):
        check_weights(file)
    assert not (tmp_path / "touched").exists()
    torch.save([1], file)
    with pytest.raises(ValueError, match="something else than tensors"):
        check_weights(file)
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match="is no file of weights"):
        check_weights(file)
    torch.save({"w": torch.ones(2)}, file)
    assert len(check_weights(file)) == 64
