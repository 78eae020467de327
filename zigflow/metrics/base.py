"""The interface between a metric and whoever feeds it samples.

Legend: B images of a batch, C channels, H height, W width.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zigflow.registry import Registry

__all__ = [
    "METRICS",
    "LabeledImages",
    "Metric",
    "SampleIds",
    "StreamingMetric",
    "check_images",
    "check_labels",
]

LabeledImages = tuple[Tensor | np.ndarray, Tensor | np.ndarray | None]


def check_images(name: str, images: Tensor | np.ndarray) -> Tensor:
    """``images`` as a contiguous uint8 tensor (B, C, H, W) on its own device.

    Raises:
        TypeError: neither a tensor nor a numpy array.
        ValueError: another dtype than uint8, or another number of dimensions, or an empty image.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be uint8 images (0..255), got {images.dtype}; quantize them as they would be saved"
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(images.shape)}")
    return images.contiguous()


def check_labels(name: str, labels: Tensor | np.ndarray, count: int) -> Tensor:
    """``labels`` as a CPU int64 tensor of shape (count,), every label >= 0.

    Raises:
        TypeError: neither a tensor nor a numpy array.
        ValueError: not integers, another shape, or a negative label.
    """
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(np.ascontiguousarray(labels))
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one per image, got {tuple(labels.shape)}")
    labels = labels.to("cpu", torch.int64)
    if count and int(labels.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(labels.min())}")
    return labels


class SampleIds:
    """The numbers of the samples seen so far, each of which counts once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def check(self, ids: Tensor | np.ndarray) -> list[int]:
        """The batch of ids (B,) as a list, if every one is new.

        Raises:
            ValueError: no int64 (B,) array, or an id that was given before.
        """
        array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if array.dtype != np.int64 or array.ndim != 1:
            raise ValueError(f"ids must be int64 of shape (B,), got {array.dtype} {array.shape}")
        values, counts = np.unique(array, return_counts=True)
        again = sorted(set(values[counts > 1].tolist()) | self._seen.intersection(values.tolist()))
        if again:
            more = f" (and {len(again) - 1} more)" if len(again) > 1 else ""
            raise ValueError(f"sample id {again[0]}{more} was given twice; every sample counts exactly once")
        return array.tolist()

    def add(self, ids: Tensor | np.ndarray) -> None:
        """Record a batch of ids (B,), all or, when one is refused, none.

        Raises:
            ValueError: as :meth:`check`.
        """
        self._seen.update(self.check(ids))

    def sorted(self) -> np.ndarray:
        """All ids, ascending, int64."""
        return np.array(sorted(self._seen), dtype=np.int64)

    def sha256(self) -> str:
        """Hex digest of the sorted ids as little-endian int64."""
        return hashlib.sha256(self.sorted().astype("<i8").tobytes()).hexdigest()


class Metric(ABC):
    """A number, or several, about a set of generated images.

    Built from YAML by ``_target_``, hence constructors take plain keyword arguments. The order of use:
    ``set_reference`` once, ``update`` per batch, ``compute``, ``protocol``; ``reset`` starts another set
    against the same reference. Results do not depend on how samples are cut into batches, but for the
    rounding of float64 sums.
    """

    name = "metric"
    # The number that tells a better set from a worse one, and whether less of it is better ("min") or more ("max").
    best_by: tuple[str, str] | None = None
    # Whether it knows videos, which come as their frames side by side.
    reads_videos = False

    def __init__(self) -> None:
        self._ids = SampleIds()

    @classmethod
    def real_sets(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Which real images a metric built with ``options`` reads, of "train" and "heldout"; the others stay unread."""
        return ("train", "heldout")

    @property
    def needs_reference(self) -> bool:
        """Whether real images are still to be given by ``set_reference``."""
        return not self._has_reference()

    @property
    def count(self) -> int:
        """Samples seen."""
        return len(self._ids)

    @abstractmethod
    def set_reference(self, train: LabeledImages, heldout: LabeledImages | None = None) -> None:
        """Take the real images: pairs of uint8 (N, C, H, W) and labels (N,) or None."""

    @abstractmethod
    def _take(self, images: Tensor, labels: Tensor | None, ids: Tensor) -> None:
        """Absorb a checked batch; raise before anything is kept if it does not suit."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop the samples taken."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """The samples taken, or sums over them, as CPU tensors; empty when there is none."""

    @abstractmethod
    def _absorb(self, state: dict[str, Tensor]) -> None:
        """Add the ``_state()`` of another instance."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Finite numbers (booleans among them) by name.

        Raises:
            RuntimeError: the reference is missing or no sample has been given.
        """

    def check_request(self, count: int, labels: Tensor | None) -> None:
        """Refuse, before any is made, samples that ``compute`` would refuse for their number or classes.

        Args:
            count: how many samples there will be.
            labels: int64 (count,), the classes that will be asked for, or None.

        Raises:
            RuntimeError: the reference is missing.
            ValueError: too few or too many samples, or classes that do not suit; one line.
        """
        self._require_reference()

    def update(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None, ids: Tensor | np.ndarray
    ) -> None:
        """Count a batch, of tensors or numpy arrays.

        Args:
            images: uint8 (B, C, H, W), 0..255.
            labels: int64 (B,), the classes asked for, or None.
            ids: int64 (B,), the samples' numbers.

        Raises:
            ValueError: a shape or dtype is wrong, or an id was counted before.
        """
        images = check_images("images", images)
        if labels is not None:
            labels = check_labels("labels", labels, len(images))
        ids = torch.as_tensor(ids)
        if ids.shape != (len(images),):
            raise ValueError(f"ids must have shape ({len(images)},), one per image, got {tuple(ids.shape)}")
        self._require_reference()
        self._ids.check(ids)
        self._take(images, labels, ids.cpu())
        self._ids.add(ids)

    def merge(self, other: "Metric") -> None:
        """Add what another process counted against the same reference.

        Raises:
            TypeError: another class of metric.
            ValueError: a sample was counted by both.
        """
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(other).__name__} into {type(self).__name__}")
        self.absorb_state(other.state())

    def state(self) -> dict[str, Tensor]:
        """What was counted, as tensors that can be sent to another process: its ``absorb_state`` adds them."""
        return {"ids": torch.from_numpy(self._ids.sorted()), **self._state()}

    def absorb_state(self, state: Mapping[str, Tensor]) -> None:
        """Add what another process counted against the same reference, from its ``state()``.

        Raises:
            ValueError: a sample was counted by both.
        """
        rest = dict(state)
        ids = rest.pop("ids")
        self._ids.check(ids)
        if len(ids):
            self._absorb(rest)
        self._ids.add(ids)

    def reset(self) -> None:
        """Forget the samples, keep the reference."""
        self._ids = SampleIds()
        self._forget()

    def protocol(self) -> dict[str, Any]:
        """How the numbers came about, as JSON-able values; subclasses add their own."""
        return {"metric": self.name, "n": self.count, "ids_sha256": self._ids.sha256()}

    def _has_reference(self) -> bool:
        return True

    def _require_reference(self) -> None:
        if not self._has_reference():
            raise RuntimeError(
                f"{self.name}: call set_reference(train=..., heldout=...) before samples arrive"
            )

    def _require_samples(self) -> None:
        self._require_reference()
        if not self.count:
            raise RuntimeError(
                f"{self.name}: no sample has been given; call update(images, labels, ids) first"
            )


METRICS: Registry[Callable[..., Metric]] = Registry("metric")
"""What ``metrics=NAME`` names beside the files of ``config/metrics``: classes built with the keywords of the node."""


class StreamingMetric(Metric):
    """A metric that needs the real images once, batch by batch, so that processes can share them and forget them.

    Attributes:
        reference: "train" or "heldout", the real set that is read; None where the metric brings its reference along.
    """

    reference: str | None

    @classmethod
    def real_sets(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The set that the keyword ``reference`` names."""
        default = inspect.signature(cls).parameters.get("reference")
        chosen = options.get("reference", None if default is None else default.default)
        return (chosen,) if chosen in ("train", "heldout") else super().real_sets(options)

    @abstractmethod
    def add_reference(self, images: Tensor) -> None:
        """Count a batch of real images, uint8 (B, C, H, W)."""

    @abstractmethod
    def reference_state(self) -> dict[str, Tensor]:
        """Sums over the real images, as CPU tensors; empty when there was none."""

    @abstractmethod
    def absorb_reference(self, state: Mapping[str, Tensor]) -> None:
        """Add the ``reference_state()`` of another process."""

    def set_reference(self, train: LabeledImages, heldout: LabeledImages | None = None) -> None:
        """Count all real images of the chosen set, in place of those counted before; none without such a set.

        Raises:
            ValueError: the chosen set is missing or has fewer than 2 images.
        """
        if self.reference is None:
            return
        chosen = train if self.reference == "train" else heldout
        if chosen is None:
            raise ValueError(f"{self.name}: reference={self.reference!r}, but that set was not given")
        images = check_images(f"{self.reference} images", chosen[0])
        if len(images) < 2:
            raise ValueError(
                f"{self.name}: the {self.reference} set needs at least 2 images, got {len(images)}"
            )
        self.forget_reference()
        for batch in images.split(256):
            self.add_reference(batch)

    @abstractmethod
    def forget_reference(self) -> None:
        """Drop the real images."""
