"""The Frechet distance between two Gaussians fitted to feature vectors.

Dowson and Landau, "The Frechet distance between multivariate normal distributions" (1982), equation 4;
as an image metric: Heusel et al., "GANs trained by a two time-scale update rule ..." (2017).

Legend: B images of a batch, C channels, H height, W width, N feature vectors, F features.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zigflow.data.npz import read_npz
from zigflow.metrics.base import StreamingMetric, check_images

__all__ = [
    "FrechetMetric",
    "FrechetStatistics",
    "frechet_distance",
    "frechet_from_features",
    "read_statistics",
]


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite (F, F) float64 matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves a null direction with |eigenvalue| ~ eps, whose root ~ 1e-8 would leak into the product.
    floor = values.abs().max() * values.numel() * torch.finfo(values.dtype).eps
    roots = torch.where(values > floor, values.clamp_min(0), 0.0).sqrt()
    return (vectors * roots) @ vectors.mT


def _check_moments(name: str, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or covariance.shape != (mean.numel(), mean.numel()):
        raise ValueError(
            f"{name}: expected a mean (F,) and a covariance (F, F), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    device = "cpu" if mean.device.type == "mps" else mean.device
    mean, covariance = mean.to(device, torch.float64), covariance.to(device, torch.float64)
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{name}: mean or covariance is not finite")
    asymmetry = float((covariance - covariance.mT).abs().max())
    if asymmetry > 1e-6 * float(covariance.abs().max()):
        raise ValueError(f"{name}: the covariance is not symmetric (largest difference {asymmetry:.3g})")
    return mean, (covariance + covariance.mT) / 2


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), computed in float64.

    The last trace is the sum of the singular values of S1^1/2 S2^1/2. Taken so, singular covariances (fewer
    samples than features) lose no digits: the eigenvalues of S1^1/2 S2 S1^1/2 would be accurate to
    eps |S1||S2| only, their roots to 1e-8.

    Args:
        mean1, mean2: (F,).
        covariance1, covariance2: (F, F), symmetric positive semi-definite.

    Returns:
        The squared distance (the number that the literature calls FID), >= 0: exactly 0 for equal Gaussians, and the
        same bits whichever of two is named first.

    Raises:
        ValueError: shapes that do not fit together, an asymmetric covariance, a value that is not finite.
    """
    mean1, covariance1 = _check_moments("first Gaussian", mean1, covariance1)
    mean2, covariance2 = _check_moments("second Gaussian", mean2, covariance2)
    if mean1.shape != mean2.shape:
        raise ValueError(f"the Gaussians have {mean1.numel()} and {mean2.numel()} dimensions")
    different = torch.cat([mean1 - mean2.to(mean1), (covariance1 - covariance2.to(mean1)).flatten()])
    first = different[different != 0][:1]
    if not len(first):
        return 0.0
    if first < 0:
        mean1, covariance1, mean2, covariance2 = mean2, covariance2, mean1, covariance1
    shift = (mean1 - mean2).square().sum()
    cross = torch.linalg.svdvals(_square_root(covariance1) @ _square_root(covariance2)).sum()
    distance = shift + covariance1.trace() + covariance2.trace() - 2.0 * cross
    # Rounding may leave minus 1e-16 of the traces where the distance is zero.
    return max(float(distance), 0.0)


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), float64, out of a published file: an npz archive of ``mu`` and ``sigma``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or its arrays are no mean and covariance; it is named.
    """
    arrays = read_npz(path, ("mu", "sigma"))
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"{path}: {name} holds {array.dtype}, floating-point numbers are needed")
    return _check_moments(str(path), torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"]))


class FrechetStatistics:
    """Count, mean and centered outer products of feature vectors, in float64.

    Products are formed about each batch's own mean and joined by the pairwise update of Chan, Golub and LeVeque (1979):
    raw sums of squares would lose the digits that the mean has in excess of the spread.

    Args:
        num_features: F.
        device: where the sums live (not Metal, which has no float64).
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self.num_features = num_features
        self.count = 0
        self.mean_F = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.centered_FF = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features_NF: Tensor) -> "FrechetStatistics":
        """Add (N, F) feature vectors of any floating dtype; returns self.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if features_NF.ndim != 2 or features_NF.shape[1] != self.num_features:
            raise ValueError(
                f"features must have shape (N, {self.num_features}), got {tuple(features_NF.shape)}"
            )
        if not features_NF.isfinite().all():
            raise ValueError("a feature is not finite; the Frechet distance would be meaningless")
        if not len(features_NF):
            return self
        # Two moves: a float64 tensor cannot exist on every device that a float32 one can come from.
        features_NF = features_NF.detach().to(self.mean_F.device).to(torch.float64)
        mean = features_NF.mean(0)
        centered = features_NF - mean
        return self._join(len(features_NF), mean, centered.mT @ centered)

    def _join(self, count: int, mean_F: Tensor, centered_FF: Tensor) -> "FrechetStatistics":
        if not count:
            return self
        whole = self.count + count
        shift = mean_F - self.mean_F
        # A first batch is taken as it is, so that equal sets have equal moments to the bit.
        if self.count:
            between = torch.outer(shift, shift) * (self.count * count / whole)
            self.centered_FF = self.centered_FF + centered_FF + between
            self.mean_F = self.mean_F + shift * (count / whole)
        else:
            self.mean_F, self.centered_FF = mean_F, centered_FF
        self.count = whole
        return self

    def merge(self, other: "FrechetStatistics") -> "FrechetStatistics":
        """Add the vectors of another instance; returns self.

        Raises:
            ValueError: another number of features.
        """
        if other.num_features != self.num_features:
            raise ValueError(f"cannot merge {other.num_features} features into {self.num_features}")
        device = self.mean_F.device
        return self._join(other.count, other.mean_F.to(device), other.centered_FF.to(device))

    def packed(self) -> Tensor:
        """(1 + F + F*F,) float64: count, mean and products, for another process to unpack and merge."""
        count = self.mean_F.new_tensor([self.count])
        return torch.cat([count, self.mean_F, self.centered_FF.reshape(-1)])

    @classmethod
    def from_packed(cls, packed: Tensor, num_features: int) -> "FrechetStatistics":
        """The inverse of ``packed``.

        Raises:
            ValueError: the length does not belong to ``num_features``.
        """
        if packed.shape != (1 + num_features + num_features**2,):
            raise ValueError(f"packed shape {tuple(packed.shape)} does not hold {num_features} features")
        new = cls(num_features, packed.device)
        new.count = round(float(packed[0]))
        new.mean_F = packed[1 : 1 + num_features].to(torch.float64).clone()
        new.centered_FF = packed[1 + num_features :].to(torch.float64).reshape(num_features, -1).clone()
        return new

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (F,) and unbiased covariance (F, F), float64.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        covariance = self.centered_FF / (self.count - 1)
        return self.mean_F, (covariance + covariance.mT) / 2

    def distance(self, other: "FrechetStatistics") -> float:
        """Squared Frechet distance between the Gaussians of two sets."""
        return frechet_distance(*self.moments(), *other.moments())


def frechet_from_features(a_NF: Tensor, b_MF: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of vectors, (N, F) and (M, F).

    Means are subtracted before products are formed, so no digit is lost however far the sets lie from zero.

    Raises:
        ValueError: other shapes, fewer than two vectors, a value that is not finite.
    """
    return frechet_distance(*_moments("first set", a_NF), *_moments("second set", b_MF))


def _moments(name: str, x_NF: Tensor) -> tuple[Tensor, Tensor]:
    if x_NF.ndim != 2 or len(x_NF) < 2:
        raise ValueError(f"{name}: expected at least two feature vectors (N, F), got {tuple(x_NF.shape)}")
    device = "cpu" if x_NF.device.type == "mps" else x_NF.device
    try:
        return FrechetStatistics(x_NF.shape[1], device).update(x_NF).moments()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class FrechetMetric(StreamingMetric):
    """Frechet distance of samples to a real set, in the features of a given network.

    Args:
        features: maps uint8 images (B, C, H, W) to features (B, F); a module in eval mode or a function.
        reference: "train" or "heldout".
        batch_size: images per call of the network.
        name: the result's key.

    Raises:
        ValueError: an unknown ``reference``.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        reference: str = "train",
        batch_size: int = 256,
        name: str = "frechet",
    ):
        super().__init__()
        if reference not in ("train", "heldout"):
            raise ValueError(f"reference must be 'train' or 'heldout', got {reference!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.features = features
        self.reference = reference
        self.batch_size = batch_size
        self.name = name
        self.best_by = (name, "min")
        self._real: FrechetStatistics | None = None
        self._fake: FrechetStatistics | None = None

    def add_reference(self, images: Tensor) -> None:
        self._real = self._add(self._real, check_images(f"{self.reference} images", images))

    def reference_state(self) -> dict[str, Tensor]:
        return {} if self._real is None else {"packed": self._real.packed().cpu()}

    def absorb_reference(self, state: Mapping[str, Tensor]) -> None:
        self._real = self._merged(self._real, state)

    def forget_reference(self) -> None:
        self._real = None

    @staticmethod
    def _merged(own: FrechetStatistics | None, state: Mapping[str, Tensor]) -> FrechetStatistics | None:
        if not state:
            return own
        packed = state["packed"]
        # 1 + F + F^2 numbers.
        other = FrechetStatistics.from_packed(packed, (math.isqrt(4 * len(packed) - 3) - 1) // 2)
        return other if own is None else own.merge(other)

    @torch.no_grad()
    def _add(self, statistics: FrechetStatistics | None, images: Tensor) -> FrechetStatistics | None:
        for batch in images.split(self.batch_size):
            features = self.features(batch)
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(batch):
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"{self.name}: features must come as ({len(batch)}, F), got {shape}")
            statistics = (statistics or FrechetStatistics(features.shape[1])).update(features)
        return statistics

    def _has_reference(self) -> bool:
        return self._real is not None and self._real.count > 1

    def _take(self, images: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        self._fake = self._add(self._fake, images)

    def _forget(self) -> None:
        self._fake = None

    def _state(self) -> dict[str, Tensor]:
        return {} if self._fake is None else {"packed": self._fake.packed().cpu()}

    def _absorb(self, state: dict[str, Tensor]) -> None:
        self._fake = self._merged(self._fake, state)

    def check_request(self, count: int, labels: Tensor | None) -> None:
        """As ``Metric.check_request``: a covariance needs two samples."""
        super().check_request(count, labels)
        if count < 2:
            raise ValueError(f"{self.name}: a covariance needs at least 2 samples, got {count}")

    def compute(self) -> dict[str, float]:
        """``{name: squared distance}``."""
        samples, real = self._samples(), self._real
        if real is None:
            raise RuntimeError(f"{self.name}: no real image has been given; call set_reference first")
        return {self.name: samples.distance(real)}

    def _samples(self) -> FrechetStatistics:
        """Of the images counted; a RuntimeError without any."""
        self._require_samples()
        if self._fake is None:
            raise RuntimeError(
                f"{self.name}: no sample has been given; call update(images, labels, ids) first"
            )
        return self._fake

    def protocol(self) -> dict[str, Any]:
        """Sizes of both sets, the feature network, the dimension."""
        kind = self.features if hasattr(self.features, "__qualname__") else type(self.features)
        return super().protocol() | {
            "features": f"{kind.__module__}.{kind.__qualname__}",
            "num_features": self._real.num_features if self._real else None,
            "reference": self.reference,
            "reference_n": self._real.count if self._real else 0,
        }
