"""The Frechet inception distance: torchmetrics' Inception network, with weights from a local file, and our distance.

Heusel et al. (2017). Nothing is downloaded: the file is the one that torch-fidelity publishes
(``weights-inception-2015-12-05-6726825d.pth``). torch-fidelity would unpickle it freely, so it is first read here as
plain tensors only.
"""

import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zigflow.errors import needs
from zigflow.files import file_digest
from zigflow.metrics.base import METRICS, StreamingMetric
from zigflow.metrics.frechet import FrechetMetric, frechet_distance, read_statistics

__all__ = ["Fid"]


@METRICS.register("fid")
class Fid(FrechetMetric):
    """FID of samples to a real set.

    The features are torchmetrics', the statistics and the distance those of ``zigflow.metrics.frechet``: there is one
    Frechet distance. Gray images are shown to the Inception network as RGB.

    Args:
        inception_weights: path of the weights.
        features: another network in the Inception network's place: an ``nn.Module`` that maps uint8 (B, C, H, W) to
            (B, F); torchmetrics is then not needed.
        reference: "train" or "heldout".
        batch_size: images per call of the network.
        reference_stats: path of a published npz file of the real set's ``mu`` (F,) and ``sigma`` (F, F), in place of
            the real images; ``reference`` then does not count.

    Raises:
        MissingPackageError: torchmetrics or torch-fidelity are missing; the extra to install is named.
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
        super().__init__(self._shown, reference, batch_size, name="fid")
        self._weights_sha256 = check_weights(inception_weights) if features is None else None
        if reference_stats:
            self.reference = None
        self._stats = read_statistics(reference_stats) if reference_stats else None
        self._stats_sha256 = file_digest(Path(reference_stats)) if reference_stats else None
        width = 2048 if features is None else getattr(features, "num_features", None)
        if self._stats is not None and width is not None and len(self._stats[0]) != width:
            raise ValueError(
                f"metrics.reference_stats={reference_stats} is over {len(self._stats[0])} features, the network has "
                f"{width}"
            )
        self._is_inception = features is None
        self._network = (_inception(str(inception_weights)) if features is None else features).eval()

    def _has_reference(self) -> bool:
        return self._stats is not None or super()._has_reference()

    def _shown(self, images: Tensor) -> Tensor:
        if self._is_inception and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self._network(images)

    def compute(self) -> dict[str, float]:
        """``{"fid": number}``.

        Raises:
            RuntimeError: no reference or no samples.
            ValueError: fewer than two samples.
        """
        if self._stats is None:
            return super().compute()
        return {self.name: frechet_distance(*self._samples().moments(), *self._stats)}

    def protocol(self) -> dict[str, Any]:
        """Network, weights, sizes, versions."""
        network = "inception-v3-compat, 2048 features"
        return StreamingMetric.protocol(self) | {
            "features": network if self._is_inception else type(self._network).__qualname__,
            "inception_weights_sha256": self._weights_sha256,
            "reference_split": self.reference,
            "reference_n": self._real.count if self._real else None,
            "reference_stats_sha256": self._stats_sha256,
            "torchmetrics": importlib.metadata.version("torchmetrics") if self._is_inception else None,
        }


def _inception(weights: str) -> nn.Module:
    with needs("torchmetrics", "metrics=fid", extra="fid"):
        from torchmetrics.image.fid import FrechetInceptionDistance
    with needs("torch-fidelity", "metrics=fid", extra="fid"):
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights).inception


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
    return file_digest(path)
