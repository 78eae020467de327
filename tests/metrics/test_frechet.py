"""The Frechet distance against closed forms, stored official values, and itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zigflow.metrics.frechet import (
    FrechetMetric,
    FrechetStatistics,
    frechet_distance,
    frechet_from_features,
)

GOLDEN = Path(__file__).parent / "golden" / "fid_frechet"


def spd(size, rank, seed):
    factor = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.mT / rank


def test_golden_values_of_the_official_implementation():
    stored = load_file(GOLDEN.with_suffix(".safetensors"))
    assert json.loads(GOLDEN.with_suffix(".json").read_text())["fixture_kind"] == "metrics.frechet"
    got = frechet_distance(stored["mu1"], stored["sigma1"], stored["mu2"], stored["sigma2"])
    assert got == pytest.approx(stored["fid"].item(), rel=1e-9)
    # Five and six vectors of eight features: the product of the covariances is singular, and the stored value
    # went through a Schur square root of it, good to half the digits. The exact value: norms of the factors.
    a, b = stored["a"], stored["b"]
    factor_a, factor_b = (a - a.mean(0)) / 2, (b - b.mean(0)) / math.sqrt(5)
    squares = (a.mean(0) - b.mean(0)).square().sum() + factor_a.square().sum() + factor_b.square().sum()
    exact = float(squares - 2 * torch.linalg.svdvals(factor_a @ factor_b.mT).sum())
    assert exact == pytest.approx(stored["fid_ab"].item(), rel=1e-7)
    assert frechet_from_features(a, b) == pytest.approx(exact, rel=1e-12)
    sums = [FrechetStatistics(8).update(x) for x in (a, b)]
    assert sums[0].distance(sums[1]) == pytest.approx(exact, rel=1e-9)


def test_commuting_covariances_have_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    a, b = torch.rand(2, 12, dtype=torch.float64, generator=generator) * 5
    a[:3] = 0
    mean1, mean2 = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    want = float((mean1 - mean2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    got = frechet_distance(mean1, (basis * a) @ basis.mT, mean2, (basis * b) @ basis.mT)
    assert got == pytest.approx(want, rel=1e-10)


def test_nearly_singular_covariances():
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator)).Q
    a = 10.0 ** -torch.arange(32, dtype=torch.float64)
    zero, one, two = torch.zeros(32), (basis * a) @ basis.mT, (basis * a.flip(0)) @ basis.mT
    want = float((a.sqrt() - a.flip(0).sqrt()).square().sum())
    assert frechet_distance(zero, one, zero, two) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(zero, one, zero, two) == frechet_distance(zero, two, zero, one)
    noise = torch.randn(32, 32, dtype=torch.float64, generator=generator) * 1e-16
    assert 0 <= frechet_distance(zero, one, zero, one + noise + noise.mT) <= 1e-9 * float(one.trace())


def test_two_by_two_closed_form():
    # tr (S1 S2)^1/2 = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2)) for 2 x 2 matrices.
    a, b = spd(2, 3, 1), spd(2, 3, 2)
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a) * torch.det(b))))
    zero = torch.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(
        float(a.trace() + b.trace()) - 2 * root, rel=1e-10
    )


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("rank", [1, 5, 16, 64])
def test_agrees_with_the_matrix_square_root_of_scipy(rank):
    from scipy.linalg import sqrtm

    a, b = spd(16, rank, 3), spd(16, 40, 4)
    want = float((a + b).trace()) - 2 * float(np.real(sqrtm((a @ b).numpy())).trace())
    zero = torch.zeros(16)
    # The peer loses half its digits on singular products.
    assert frechet_distance(zero, a, zero, b) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_self_distance_is_zero_and_the_distance_symmetric(rank, scale):
    mean, a, b = torch.randn(20, dtype=torch.float64), spd(20, rank, 5) * scale, spd(20, 7, 6) * scale
    assert frechet_distance(mean, a, mean, a.clone()) == 0
    # As good as equal: 40 factors that were added in another order.
    rounded = a * (1 + 4 * torch.finfo(torch.float64).eps)
    assert 0 <= frechet_distance(mean, a, mean, rounded) <= 1e-12 * float(a.trace())
    one, two = frechet_distance(mean, a, -mean, b), frechet_distance(-mean, b, mean, a)
    assert one == two
    # Q S Q^T for both changes nothing.
    q = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    assert frechet_distance(q @ mean, q @ a @ q.mT, -q @ mean, q @ b @ q.mT) == pytest.approx(one, rel=1e-9)


def test_disjoint_null_spaces_and_point_masses():
    zero = torch.zeros(4)
    a, b = torch.diag(torch.tensor([4.0, 1, 0, 0])), torch.diag(torch.tensor([0.0, 0, 9, 0]))
    assert frechet_distance(zero, a, zero, b) == pytest.approx(14.0, rel=1e-12)
    nothing = torch.zeros(4, 4)
    assert frechet_distance(zero, nothing, zero + 2, nothing) == 16.0
    assert frechet_distance(zero, nothing, zero, a) == pytest.approx(5.0, rel=1e-12)


def test_samples_approach_the_distance_of_their_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 3, dtype=torch.float64, generator=generator)
    b = torch.randn(40_000, 3, dtype=torch.float64, generator=generator) * 2 + 1
    assert frechet_from_features(a, b) == pytest.approx(3 + 3, rel=0.02)


def test_no_digit_is_lost_far_from_zero():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 90, 5, dtype=torch.float64, generator=generator)
    want = frechet_from_features(a, b)
    far = [FrechetStatistics(5), FrechetStatistics(5)]
    for statistics, x in zip(far, (a, b), strict=True):
        for part in x.split(16):
            statistics.update(part + 1e6)
    assert far[0].distance(far[1]) == pytest.approx(want, rel=1e-7)
    assert frechet_from_features(a + 1e6, b + 1e6) == pytest.approx(want, rel=1e-7)


def test_sums_in_pieces_equal_the_whole_wherever_the_mean_lies():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(301, 6, generator=generator) + 50
    b = torch.randn(120, 6, generator=generator) * 2 + 50
    want = frechet_from_features(a, b)
    pieces = [FrechetStatistics(6).update(part) for part in a.split(64)]
    packed = pieces[0].packed()
    reduced = FrechetStatistics(6)
    merged = FrechetStatistics(6)
    for piece in pieces:
        reduced.merge(FrechetStatistics.from_packed(piece.packed(), 6))
        merged.merge(piece)
    other = FrechetStatistics(6).update(b)
    assert reduced.count == merged.count == 301
    assert reduced.distance(other) == pytest.approx(want, rel=1e-9)
    assert merged.distance(other) == pytest.approx(want, rel=1e-9)
    with pytest.raises(ValueError, match="does not hold 5"):
        FrechetStatistics.from_packed(packed, 5)


def test_bad_input_is_refused():
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        frechet_distance(zero, eye, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(zero, eye, zero, eye + torch.tensor([[0, 1.0, 0]] + [[0.0] * 3] * 2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(zero, eye * torch.nan, zero, eye)
    with pytest.raises(ValueError, match=r"\(F, F\)"):
        frechet_distance(zero, torch.eye(2), zero, eye)
    with pytest.raises(ValueError, match="at least two"):
        frechet_from_features(torch.zeros(1, 3), torch.zeros(4, 3))
    statistics = FrechetStatistics(3)
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((2, 3), torch.inf))
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        statistics.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 2"):
        statistics.update(torch.zeros(1, 3)).moments()
    with pytest.raises(ValueError, match="cannot merge"):
        statistics.merge(FrechetStatistics(4))


def channel_means(images):
    return images.float().mean((2, 3)) / 255


def test_as_a_metric():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (50, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fake = torch.randint(0, 200, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)
    want = frechet_from_features(channel_means(fake), channel_means(real))
    metric, other = (FrechetMetric(channel_means, name="toy_frechet", batch_size=16) for _ in range(2))
    ids = torch.arange(40)
    with pytest.raises(RuntimeError, match="set_reference"):
        metric.update(fake, None, ids)
    for each in (metric, other):
        each.set_reference(train=(real, None))
    with pytest.raises(RuntimeError, match="no sample"):
        metric.compute()
    metric.update(fake[:11], None, ids[:11])
    other.update(fake[11:], None, ids[11:])
    metric.merge(other)
    assert metric.compute() == {"toy_frechet": pytest.approx(want, rel=1e-9)}
    assert other.count == 29
    protocol = metric.protocol()
    assert protocol["n"] == 40
    assert protocol["reference_n"] == 50
    assert protocol["num_features"] == 3
    assert protocol["features"].endswith("channel_means")
    with pytest.raises(ValueError, match="given twice"):
        metric.update(fake[:1], None, ids[:1])
    metric.reset()
    metric.update(real, None, torch.arange(50))
    assert metric.compute()["toy_frechet"] < 1e-12
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        FrechetMetric(channel_means, reference="test")
    with pytest.raises(ValueError, match="not given"):
        FrechetMetric(channel_means, reference="heldout").set_reference(train=(real, None))
    with pytest.raises(ValueError, match="features must come as"):
        FrechetMetric(lambda x: x.float()).set_reference(train=(real, None))
