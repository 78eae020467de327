"""The Frechet inception distance through torchmetrics, with weights from a local file.

Heusel et al. (2017). Nothing is downloaded: the file is the one that torch-fidelity publishes
(``weights-inception-2015-12-05-6726825d.pth``). torch-fidelity would unpickle it freely, so it is first read here as
plain tensors only.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zigflow.metrics.base import StreamingMetric, check_images
from zigflow.metrics.frechet import FrechetStatistics, frechet_distance, read_statistics

__all__ = ["Fid"]

_SUMS = ("features_sum", "features_cov_sum", "features_num_samples")


class Fid(StreamingMetric):
    """FID of samples to a real set.

    Sums over features are torchmetrics' own, in float64; sums of several processes are added, so the number does not
    depend on how many there are. Gray images are shown to the Inception network as RGB.

    Args:
        inception_weights: path of the weights.
        features: another network in the Inception network's place: an ``nn.Module`` with ``num_features`` that maps
            uint8 (B, C, H, W) to (B, F).
        reference: "train" or "heldout".
        batch_size: images per call of the network.
        reference_stats: path of a published npz file of the real set's ``mu`` (F,) and ``sigma`` (F, F), in place of
            the real images; ``reference`` then does not count.

    Raises:
        ImportError: torchmetrics or torch-fidelity are missing; the extra to install is named.
        FileNotFoundError: there is no such file.
        ValueError: no file was named, it holds other things than tensors (than mean and covariance of as many
            features), or ``reference`` is unknown.
    """

    name = "fid"
    best_by = ("fid", "min")

    def __init__(
        self,
        inception_weights: str | Path | None = None,
        features: nn.Module | None = None,
        reference: str = "train",
        batch_size: int = 64,
        reference_stats: str | Path | None = None,
    ):
        super().__init__()
        if reference not in ("train", "heldout"):
            raise ValueError(f"reference must be 'train' or 'heldout', got {reference!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if features is None:
            self._weights_sha256 = check_weights(inception_weights)
        else:
            self._weights_sha256 = None
        self.reference, self.batch_size = None if reference_stats else reference, batch_size
        self._stats = read_statistics(reference_stats) if reference_stats else None
        self._stats_sha256 = file_sha256(Path(reference_stats)) if reference_stats else None
        width = 2048 if features is None else getattr(features, "num_features", None)
        if self._stats is not None and width is not None and len(self._stats[0]) != width:
            raise ValueError(
                f"metrics.reference_stats={reference_stats} is over {len(self._stats[0])} features, the network has "
                f"{width}"
            )
        self._rgb = features is None
        self._network = (
            "inception-v3-compat, 2048 features" if features is None else type(features).__qualname__
        )
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ImportError("metrics=fid needs torchmetrics: pip install 'zigflow[fid]'") from error
        options: dict[str, Any] = {"feature": features}
        if features is None:
            options = {"feature": 2048, "feature_extractor_weights_path": str(inception_weights)}
        try:
            # Processes are joined by us, over states that say which samples they count.
            self._fid = FrechetInceptionDistance(**options, normalize=False, sync_on_compute=False)
        except ModuleNotFoundError as error:
            raise ImportError("metrics=fid needs torch-fidelity: pip install 'zigflow[fid]'") from error
        self._fid.eval()

    def add_reference(self, images: Tensor) -> None:
        self._add(check_images(f"{self.reference} images", images), real=True)

    def reference_state(self) -> dict[str, Tensor]:
        return self._sums("real")

    def absorb_reference(self, state: Mapping[str, Tensor]) -> None:
        self._add_sums("real", state)

    def forget_reference(self) -> None:
        self._clear("real")

    def _has_reference(self) -> bool:
        return self._stats is not None or int(self._fid.real_features_num_samples) > 1

    @torch.no_grad()
    def _add(self, images: Tensor, real: bool) -> None:
        for batch in images.split(self.batch_size):
            if self._rgb and batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
            self._fid.update(batch.to(self._fid.device), real=real)

    def _take(self, images: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        self._add(images, real=False)

    def _forget(self) -> None:
        self._clear("fake")

    def _state(self) -> dict[str, Tensor]:
        return self._sums("fake")

    def _absorb(self, state: dict[str, Tensor]) -> None:
        self._add_sums("fake", state)

    def _sums(self, kind: str) -> dict[str, Tensor]:
        return {name: getattr(self._fid, f"{kind}_{name}").detach().cpu().clone() for name in _SUMS}

    def _add_sums(self, kind: str, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            own = getattr(self._fid, f"{kind}_{name}")
            setattr(self._fid, f"{kind}_{name}", own + value.to(own))

    def _clear(self, kind: str) -> None:
        for name in _SUMS:
            setattr(self._fid, f"{kind}_{name}", torch.zeros_like(getattr(self._fid, f"{kind}_{name}")))

    def compute(self) -> dict[str, float]:
        """``{"fid": number}``.

        Raises:
            RuntimeError: no reference or no samples.
            ValueError: fewer than two samples.
        """
        self._require_samples()
        if self.count < 2:
            raise ValueError(f"fid: {self.count} sample is too few for a covariance")
        return {"fid": self._distance()}

    def _distance(self) -> float:
        if self._stats is not None:
            count, total, outer = (self._sums("fake")[name] for name in (_SUMS[2], _SUMS[0], _SUMS[1]))
            packed = torch.cat([part.double().reshape(-1) for part in (count, total, outer)])
            return frechet_distance(
                *FrechetStatistics.from_packed(packed, len(total)).moments(), *self._stats
            )
        # torchmetrics warns when compute() comes before its own update(), which absorbed sums have not called.
        self._fid._update_count = max(self._fid._update_count, 1)
        self._fid._computed = None
        return float(self._fid.compute())

    def protocol(self) -> dict[str, Any]:
        """Network, weights, sizes, versions."""
        import torchmetrics

        return super().protocol() | {
            "features": self._network,
            "inception_weights_sha256": self._weights_sha256,
            "reference_split": self.reference,
            "reference_n": None if self._stats is not None else int(self._fid.real_features_num_samples),
            "reference_stats_sha256": self._stats_sha256,
            "torchmetrics": torchmetrics.__version__,
        }


def check_weights(path: str | Path | None) -> str:
    """The SHA-256 of a weights file that holds a dict of tensors and nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none was named, or it holds something else.
    """
    if path is None:
        raise ValueError(
            "FID needs the weights of its Inception network, and none are named: give metrics.inception_weights=PATH "
            "of weights-inception-2015-12-05-6726825d.pth, which torch-fidelity publishes, or metrics=none"
        )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"metrics.inception_weights={path} is no file: give the path of "
            "weights-inception-2015-12-05-6726825d.pth, which torch-fidelity publishes, or metrics=none"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # Torch's own words advise to unpickle the file without restraint.
        raise ValueError(f"{path} is no file of weights, or holds more than tensors by name") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no file of weights: it holds something else than tensors by name")
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
