"""Sampling in fixed batches, into a folder of numbered PNG files or straight to whoever judges the images.

Sample i starts from noise keyed by (seed, i) and is computed in batch ``i // batch_size``, whose size is
always full, so its image does not depend on how many samples are asked for, on how many processes share the
work, or on how often the run was cut. A folder is continued only by a run of the same identity. Chosen
samples (``ids``) keep their numbers; their batches are cut from the list of them.

Legend: N samples, B batch, C channels, H x W pixels.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zigflow import files
from zigflow.codec import to_uint8
from zigflow.data.limits import DecodeError
from zigflow.data.picture import read_image
from zigflow.keyed import KeyedDraws

from .claims import IDENTITY, SamplingFolderError, claim_folder
from .log import tracked
from .precision import autocast
from .run_state import model_state
from .runtime import Runtime
from .scan_order import scan_facts

__all__ = ["Pipeline", "Samples", "SamplingFolderError", "SamplingResult", "SamplingRun", "weights_hash"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingResult:
    """What this process knows after the run; with one process, everything.

    Attributes:
        images: (N, C, H, W) uint8; a video's frames stand side by side. Of the first samples only, or none, when
            the caller asked for no more.
        ids: (N,) int64 sample numbers.
        labels: (N,) int64, or None for a model without class labels.
        identity: what the samples follow from.
        function_evaluations: of the last batch that was computed, None when all were there.
    """

    images: np.ndarray
    ids: np.ndarray
    labels: np.ndarray | None
    identity: dict[str, Any]
    function_evaluations: int | None


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the model's state dict: names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model_state(model).items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def walked(model: nn.Module) -> dict[str, Any]:
    """The fact about the order that the model's layers walk, if they walk one."""
    scan = scan_facts(model)
    return {} if scan is None else {"scan": scan}


@dataclass(frozen=True)
class Pipeline:
    """What turns noise into images, or images into numbers.

    Attributes:
        model: holds the weights; ``model(x, t, y)``.
        process: has ``prior_scale`` when its starting noise is not of unit variance.
        sampler: ``sample(process, model, x0, y, draws=...) -> x1``.
        codec: ``decode(x1)`` to pixels in [-1, 1]; ``encode(batch) -> x1`` where data are measured.
        guide: makes the guided model from the plain one, for instance ``lambda m: Guided(m, scale)``.
    """

    model: nn.Module
    process: Any
    sampler: Any
    codec: Any
    guide: Callable[[Any], Any] | None = None

    def on(self, device: torch.device) -> "Pipeline":
        """The same with the model on ``device`` and ready to be called."""
        return replace(self, model=self.model.to(device).eval())


@dataclass(frozen=True)
class Samples:
    """Which samples are drawn, and what each is conditioned on.

    Attributes:
        batch_size: the fixed batch, larger than the number of samples or not; the last one is filled up with samples
            that are thrown away.
        seed: of the noise.
        num_samples: sample numbers 0..num_samples-1. Not used with ``ids``.
        ids: the numbers of the samples, each once; None for the first ``num_samples``.
        num_classes: sample i has the label ``i % num_classes``; 0 for an unconditional model.
        label_of: another plan, (B,) sample numbers -> (B,) labels (or any condition of the model, which the result
            does not repeat).

    Raises:
        ValueError: a count below 1, or a number that is negative or given twice.
    """

    batch_size: int
    seed: int
    num_samples: int = 0
    ids: Sequence[int] | None = None
    num_classes: int = 0
    label_of: Callable[[Tensor], Any] | None = None

    def __post_init__(self) -> None:
        ids = self.ids
        for name, value in (("num_samples", len(self.numbers)), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if ids is not None and (len(set(ids)) < len(ids) or min(ids) < 0):
            raise ValueError(f"ids must be different numbers from 0 on, got {list(ids)[:20]}")

    @property
    def numbers(self) -> Sequence[int]:
        return range(self.num_samples) if self.ids is None else tuple(self.ids)

    def labels(self, ids: Tensor) -> Any:
        """Conditions of the samples ``ids`` (B,), None for an unconditional model."""
        if self.label_of is not None:
            return self.label_of(ids)
        return ids % self.num_classes if self.num_classes > 0 else None


class SamplingRun:
    """Samples images into ``folder``.

    Args:
        pipeline: makes them.
        samples: which ones.
        shape: of one x0, (C,h,w) or (T,C,h,w).
        folder: made when missing; None writes nothing, and ``round()`` is the way to the images.
        identity: plain facts that the images depend on and that this class cannot see: sampler and its
            settings, guidance, process, codec, checkpoint.
        runtime: by default one process on the CPU.
        mixed_precision: ``no``, ``fp16`` or ``bf16`` for the network.
        progress: as in ``TrainOptions``.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        samples: Samples,
        shape: tuple[int, ...],
        *,
        folder: Path | str | None,
        identity: Mapping[str, Any] | None = None,
        runtime: Runtime | None = None,
        mixed_precision: str = "no",
        progress: bool | None = None,
    ):
        runtime = runtime or Runtime()
        self.device, self.ranks = runtime.device, runtime.ranks
        self.pipeline, self.samples, self.shape = pipeline.on(self.device), samples, tuple(shape)
        self.ids, self.num_samples, self.batch_size = (
            samples.numbers,
            len(samples.numbers),
            samples.batch_size,
        )
        self.folder = None if folder is None else Path(folder)
        self.mixed_precision = mixed_precision
        self.progress = progress
        model = self.pipeline.model
        self.identity = {
            "seed": samples.seed,
            "batch_size": samples.batch_size,
            "shape": list(self.shape),
            "num_classes": samples.num_classes,
            "mixed_precision": mixed_precision,
            "weights_sha256": weights_hash(model),
            **walked(model),
            **(identity or {}),
        }
        self._evaluations: int | None = None
        # A sharded model gathers its weights over the processes at every call, and solvers that control their step
        # make as many calls as a batch needs: so the processes compute the same batch, and one of them counts it.
        self._alike = self.ranks.size > 1 and any(hasattr(p, "full_tensor") for p in model.parameters())

    def path(self, index: int) -> Path:
        """The file of one sample."""
        if self.folder is None:
            raise SamplingFolderError("this sampling run keeps no files; give it a folder")
        return self.folder / f"{index:06d}.png"

    def run(self, keep: bool = True) -> SamplingResult:
        """Compute what is missing; every process of the run calls this together.

        Args:
            keep: hold this process's images in memory and return them.

        Returns:
            The samples of this process; all processes are done by then, so that one of them may ``collect()``.

        Raises:
            SamplingFolderError: the folder holds samples of another run.
            Exception: whatever the model, the sampler or the codec raises; nothing is replaced or skipped.
        """
        images: dict[int, np.ndarray] = {}
        ids: list[int] = []
        for part in self._rounds():
            ids += part
            images |= part if keep else {}
        return self._result(ids, images)

    def _rounds(self) -> Iterator[dict[int, np.ndarray]]:
        self.open()
        with self.ranks.together("sampling"):
            for number in tracked(range(self.num_rounds), self.progress if self.ranks.is_main else False):
                yield self._round(number)

    @property
    def num_rounds(self) -> int:
        """Rounds in which every process has one batch or none."""
        batches = -(-self.num_samples // self.batch_size)
        return batches if self._alike else -(-batches // self.ranks.size)

    @property
    def function_evaluations(self) -> int | None:
        """Of the last batch that was computed here, None when all were there."""
        return self._evaluations

    def open(self) -> None:
        """Before the first round: make the folder, or check that it is this run's; all processes together.

        Raises:
            SamplingFolderError: the folder holds samples of another run.
        """
        with self.ranks.together("opening the folder of samples"):
            if self.ranks.is_main and self.folder is not None:
                self._open(self.folder)

    def round(self, number: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """This process's batch of a round: images uint8 (B, C, H, W), ids (B,), labels (B,); None without a batch.

        Samples that only fill the last batch up are not among them.
        """
        images = self._round(number)
        if not images:
            return None
        ids = torch.tensor(sorted(images))
        labels = self._class_labels(ids.numpy())
        stacked = torch.from_numpy(np.stack([images[i] for i in ids.tolist()]))
        return stacked, ids, None if labels is None else torch.from_numpy(labels)

    def _round(self, number: int) -> dict[int, np.ndarray]:
        size, rank = self.ranks.size, self.ranks.rank
        if self._alike:
            images = self._batch(number)
            return images if number % size == rank else {}
        batch = number * size + rank
        return self._batch(batch) if batch * self.batch_size < self.num_samples else {}

    def collect(self, keep: int | None = None) -> SamplingResult:
        """All samples, read back from the folder: for the main process, once every process is through ``run()``.

        Args:
            keep: how many of the first images to hold in memory; None for all.

        Returns:
            Every sample of the run, whoever computed it.

        Raises:
            SamplingFolderError: a file is missing or damaged; the first one is named.
        """
        images: dict[int, np.ndarray] = {}
        missing = []
        for place, index in enumerate(sorted(self.ids)):
            image = self._read(index)
            if image is None:
                missing.append(index)
            elif keep is None or place < keep:
                images[index] = image
        if missing:
            raise SamplingFolderError(
                f"{len(missing)} of {self.num_samples} samples are missing or damaged, the first is "
                f"{self.path(missing[0])}; call run() in every process first, it computes them"
            )
        return self._result(list(self.ids), images)

    def images(self) -> Iterator[np.ndarray]:
        """The samples in the order of their numbers, (C, H, W) uint8, one in memory at a time.

        Raises:
            SamplingFolderError: a file is missing or damaged.
        """
        for index in sorted(self.ids):
            image = self._read(index)
            if image is None:
                raise SamplingFolderError(f"{self.path(index)} is missing or damaged; call run() first")
            yield image

    def class_labels(self) -> np.ndarray | None:
        """(N,) int64 classes of all samples in the order of their numbers, None for a model without classes."""
        return self._class_labels(np.array(sorted(self.ids), dtype=np.int64))

    def _result(self, numbers: list[int], images: dict[int, np.ndarray]) -> SamplingResult:
        ids = np.array(sorted(numbers), dtype=np.int64)
        stored = [images[i] for i in sorted(images)]
        return SamplingResult(
            images=np.stack(stored) if stored else np.zeros((0, 0, 0, 0), np.uint8),
            ids=ids,
            labels=self._class_labels(ids),
            identity=self.identity,
            function_evaluations=self._evaluations,
        )

    def _class_labels(self, ids: np.ndarray) -> np.ndarray | None:
        # One sample first: the texts of all samples at once would be far larger than their images.
        first = self.samples.labels(torch.from_numpy(ids[:1])) if len(ids) else None
        if not isinstance(first, Tensor) or first.ndim != 1 or first.is_floating_point():
            return None
        return self.samples.labels(torch.from_numpy(ids)).cpu().numpy()

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.png.tmp"):
            files.unlink(leftover)
        claim_folder(folder, IDENTITY, self.identity, any(folder.glob("[0-9]*.png")))

    def _batch(self, number: int) -> dict[int, np.ndarray]:
        first = number * self.batch_size
        wanted = self.ids[first : first + self.batch_size]
        # Computing alike, no process may find what another has just written and stay behind.
        known = () if self._alike else wanted
        there = {index: image for index in known if (image := self._read(index)) is not None}
        if len(there) == len(wanted):
            return there
        # Filled up by the numbers that a longer run has there, or by the chosen ones from the first on.
        places = range(first, first + self.batch_size)
        chosen = self.samples.ids is not None
        filled = [self.ids[place % self.num_samples] for place in places] if chosen else list(places)
        pixels = self._sample(torch.tensor(filled))
        for place, index in enumerate(wanted):
            if index in there:
                continue
            there[index] = pixels[place]
            if self.folder is not None:
                files.replace_bytes(self.path(index), [_png(there[index])], durable=False)
        return there

    # Not inference mode: what a model caches in it could never be trained with, and this runs between steps too.
    @torch.no_grad()
    def _sample(self, ids: Tensor) -> np.ndarray:
        """(B, C, H, W) uint8 of the samples ``ids`` (B,)."""
        made = self.pipeline
        draws = KeyedDraws(self.samples.seed, ids).to(self.device)
        x0 = draws.normal("sample.noise", self.shape) * getattr(made.process, "prior_scale", 1.0)
        y = self.samples.labels(ids)
        y = y.to(self.device) if hasattr(y, "to") else y
        model = made.model if made.guide is None else made.guide(made.model)
        with draws.active():
            with autocast(self.mixed_precision, self.device):
                x1 = made.sampler.sample(made.process, model, x0, y, draws=draws)
            pixels = to_uint8(made.codec.decode(x1))
        self._evaluations = getattr(made.sampler, "num_function_evaluations", None)
        if pixels.ndim == 5:
            # (B,T,C,H,W): frames side by side.
            pixels = pixels.permute(0, 2, 3, 1, 4).flatten(3)
        return pixels.cpu().numpy()

    def _read(self, index: int) -> np.ndarray | None:
        if self.folder is None:
            return None
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            array = read_image(path)[1]
        except (OSError, DecodeError) as error:
            log.warning("%s cannot be read (%s) and is computed again", path, error)
            return None
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _png(image_CHW: np.ndarray) -> bytes:
    """One or three channels as the bytes of a PNG file."""
    channels = image_CHW.shape[0]
    if channels not in (1, 3):
        raise SamplingFolderError(
            f"an image of {channels} channels cannot be a PNG (1 or 3); is a codec missing that decodes latents?"
        )
    array = image_CHW[0] if channels == 1 else image_CHW.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()
