"""Judging generated images, the same way after a run, during it and for a folder of files.

Samples come in rounds: in each, every process has one batch or none. Every process counts its own; what they
counted is added up in float64, or put in the order of the samples' ids, so the result does not depend on how many
processes there are. The main process computes the numbers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from zigflow.codec import IdentityCodec, to_uint8
from zigflow.data.loader import evaluation_loader
from zigflow.keyed import KeyedDraws
from zigflow.metrics.base import Metric, SampleIds, StreamingMetric

from .ema import EmaProfiles
from .ranks import Ranks
from .run_state import random_state, set_random_state
from .tensors import named_floating

__all__ = ["Judge", "Judgement", "Rounds", "averaged_weights", "sample_size"]

log = logging.getLogger(__name__)


class Rounds(Protocol):
    """Where samples come from; :class:`zigflow.engine.sampling_run.SamplingRun` is one."""

    @property
    def num_rounds(self) -> int: ...

    def round(self, number: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Images uint8 (B, C, H, W), ids (B,), labels (B,) or None; None when this process has no part."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What came out, complete on the main process; others hold no numbers.

    Attributes:
        metrics: numbers by name.
        protocol: how they came about; with ``n`` and ``ids_sha256``.
        images, labels: uint8 (P, C, H, W) and (P,) of the samples with the smallest ids, to look at.
    """

    metrics: dict[str, Any]
    protocol: dict[str, Any]
    images: Tensor | None
    labels: Tensor | None


class Judge:
    """A metric, its real images, and all processes of a run.

    Args:
        metric: None counts the samples only.
        train, heldout: real data sources; read at the first use, each sample by one process where the metric
            can share them (:class:`~zigflow.metrics.base.StreamingMetric`).
        ranks: every process calls every method together.
        codec: makes pixels of a source of latents.
        preview: samples 0..preview-1 are kept to be looked at.
        batch_size: real images that are read at a time.
        reduced: judge the means over blocks of so many pixels a side, for images larger than the real ones.

    Raises:
        ValueError: (when used) the metric cannot judge these samples against these real images.
    """

    def __init__(
        self,
        metric: Metric | None,
        train: Any,
        heldout: Any,
        *,
        ranks: Ranks,
        codec: Any = None,
        device: torch.device | str = "cpu",
        preview: int = 0,
        batch_size: int = 256,
        reduced: int = 1,
    ):
        self.metric, self.ranks, self.preview = metric, ranks, preview
        self._sources = {"train": train, "heldout": heldout}
        self._codec, self._device = codec or IdentityCodec(), torch.device(device)
        self._batch_size = batch_size
        self._reduced = reduced
        self._ready = metric is None
        self._sizes: dict[str, tuple[int, int]] = {}
        self._channels: dict[str, int] = {}

    def check(self, count: int, labels: Tensor | None, size: tuple[int, int] | None = None) -> None:
        """Refuse, before any is made, samples that cannot be judged; reads the real images.

        Args:
            count: how many samples there will be.
            labels: int64 (count,), their classes, or None.
            size: (height, width) of the samples, where it is known.

        Raises:
            ValueError: the metric cannot judge so many samples, such classes, or images of another size than the real
                ones.
        """
        self._prepare()
        if self.metric is not None:
            if size is not None:
                self._check_size((size[0] // self._reduced, size[1] // self._reduced))
            self.metric.check_request(count, labels)

    def __call__(self, samples: Rounds, should_stop: Callable[[], bool] = lambda: False) -> Judgement | None:
        """Count and judge; None when ``should_stop()``, which all processes ask before every round, said so."""
        self._prepare()
        metric, counted = self.metric, SampleIds()
        if metric is not None:
            metric.reset()
        shown: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for number in range(samples.num_rounds):
            if should_stop():
                return None
            with self.ranks.together("sampling and judging"):
                batch = samples.round(number)
                if batch is not None:
                    images, ids, labels = batch
                    counted.add(ids)
                    if metric is not None:
                        judged = _reduce(images, self._reduced)
                        self._check_size((judged.shape[-2], judged.shape[-1]))
                        self._check_channels(judged.shape[1])
                        metric.update(judged, labels, ids)
                    first = ids < self.preview
                    if first.any():
                        shown.append((images[first], ids[first], None if labels is None else labels[first]))
        return self._conclude(counted, shown)

    def _check_size(self, size: tuple[int, int]) -> None:
        """Refuse samples of another size than the real images: a network that resizes would measure the resizing."""
        for name, real in self._sizes.items():
            if real != size:
                side = size[0] if size[0] == size[1] else f"[{size[0]},{size[1]}]"
                raise ValueError(
                    f"the samples have {size[0]} x {size[1]} pixels, the {name} images {real[0]} x {real[1]}: read the "
                    f"real ones smaller with data.image_size={side}, or resize the samples"
                )

    def _check_channels(self, channels: int) -> None:
        """Refuse grey samples against real images in color, and the reverse: the color would be measured."""
        words = {1: "grey", 3: "in color"}
        for name, real in self._channels.items():
            if real != channels:
                raise ValueError(
                    f"the samples are {words.get(channels, channels)}, the {name} images "
                    f"{words.get(real, real)}: read the real ones with data.channels={channels}, or convert the samples"
                )

    def _conclude(self, counted: SampleIds, shown: list[tuple[Tensor, Tensor, Tensor | None]]) -> Judgement:
        metric, own = self.metric, {"ids": torch.from_numpy(counted.sorted())}
        if metric is not None:
            own |= {f"metric.{key}": value for key, value in metric.state().items()}
        if shown:
            own["shown.images"] = torch.cat([images for images, _, _ in shown])
            own["shown.ids"] = torch.cat([ids for _, ids, _ in shown])
            if shown[0][2] is not None:
                own["shown.labels"] = torch.cat([labels for _, _, labels in shown if labels is not None])
        states = _gather(self.ranks, own)
        judgement = Judgement({}, {}, None, None)
        with self.ranks.together("judging"):
            if self.ranks.is_main:
                for rank, state in enumerate(states):
                    if rank != self.ranks.rank:
                        counted.add(state["ids"])
                        if metric is not None:
                            metric.absorb_state(_under(state, "metric."))
                judgement = self._judgement(counted, [_under(state, "shown.") for state in states])
        return judgement

    def _judgement(self, counted: SampleIds, shown: list[dict[str, Tensor]]) -> Judgement:
        protocol = {"metric": None, "n": len(counted), "ids_sha256": counted.sha256()}
        metrics: dict[str, Any] = {"n": len(counted)}
        if self.metric is not None:
            metrics, protocol = self.metric.compute(), protocol | self.metric.protocol()
            protocol["best_by"] = None if self.metric.best_by is None else list(self.metric.best_by)
            if self._reduced > 1:
                protocol["judged"] = f"means of {self._reduced} x {self._reduced} pixels"
        parts = [part for part in shown if part]
        if not parts:
            return Judgement(metrics, protocol, None, None)
        order = torch.cat([part["ids"] for part in parts]).argsort()
        images = torch.cat([part["images"] for part in parts])[order]
        has_labels = "labels" in parts[0]
        labels = torch.cat([part["labels"] for part in parts])[order] if has_labels else None
        return Judgement(metrics, protocol, images, labels)

    def _prepare(self) -> None:
        if not self._ready:
            self._read_reference()
            self._ready = True

    def _read_reference(self) -> None:
        metric = self.metric
        if not isinstance(metric, StreamingMetric):
            with self.ranks.together("reading the real images"):
                train, heldout = (self._whole(name) for name in ("train", "heldout"))
                # A metric may judge samples by themselves.
                by_itself = (
                    train is None and heldout is None and metric is not None and not metric.needs_reference
                )
                if metric is not None and not by_itself:
                    if train is None:
                        raise ValueError(f"{metric.name} needs real images, and the data has no source")
                    metric.set_reference(train, heldout)
            return
        if metric.reference is None:
            return
        metric.forget_reference()
        with self.ranks.together("reading the real images"):
            source = self._sources[metric.reference]
            if source is None:
                raise ValueError(
                    f"{metric.name} compares with the {metric.reference} data, which there is none of"
                )
            for images, _ in self._pixels(source, self.ranks.rank, self.ranks.size):
                self._sizes[metric.reference] = (images.shape[-2], images.shape[-1])
                self._channels[metric.reference] = images.shape[1]
                metric.add_reference(images)
        states = _gather(self.ranks, metric.reference_state())
        # From nothing and in the order of the ranks, so that all processes hold the same sums.
        metric.forget_reference()
        for state in states:
            metric.absorb_reference(state)

    def _pixels(self, source: Any, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor | None]]:
        loader = evaluation_loader(source, self._batch_size, rank=rank, world_size=size, caption_seed=0)
        for batch in loader:
            pixels = batch.pixels
            if pixels is None:
                # Stored moments are drawn from by the sample's number: the reference is the same at every reading.
                with KeyedDraws(0, batch.ids).to(self._device).active():
                    pixels = self._codec.decode(self._codec.encode(batch.to(self._device))).cpu()
            images = to_uint8(pixels)
            yield beside(images), batch.labels

    def _whole(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """All images of a real set, uint8 (N, C, H, W), and their labels."""
        source = self._sources[name]
        if source is None:
            return None
        images, labels = zip(*self._pixels(source), strict=True)
        self._sizes[name] = (images[0].shape[-2], images[0].shape[-1])
        self._channels[name] = images[0].shape[1]
        return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def sample_size(run: Any) -> tuple[int, int] | None:
    """(height, width) of a sampling run's images, frames of a video side by side; None where a codec decides it."""
    if not getattr(run.pipeline.codec, "is_identity", False):
        return None
    frames = run.shape[0] if len(run.shape) == 4 else 1
    return run.shape[-2], frames * run.shape[-1]


def beside(images: Tensor) -> Tensor:
    """Frames of a video (B,T,C,H,W) side by side, (B,C,H,T W); images stay as they are."""
    return images if images.ndim == 4 else images.permute(0, 2, 3, 1, 4).flatten(3)


@contextmanager
def averaged_weights(model: nn.Module, ema: EmaProfiles, device: torch.device) -> Iterator[str]:
    """The model in eval mode with the weights of its first EMA profile; afterwards everything is as it was, to the bit.

    Yields:
        What the weights are: ``"ema_<profile>"``, or ``"model"`` for a run without an average.
    """
    names = ema.names()
    kept = {name: weight.detach().clone() for name, weight in named_floating(model).items()} if names else {}
    modes = {module: module.training for module in model.modules()}
    generators = random_state(device)
    try:
        if names:
            ema.copy_to(model, names[0])
        model.eval()
        yield f"ema_{names[0]}" if names else "model"
    finally:
        for module in model.modules():
            # After a call without a backward pass a sharded module may still hold its gathered weights.
            if isinstance(module, FSDPModule):
                module.reshard()
        with torch.no_grad():
            for name, weight in named_floating(model).items() if names else ():
                weight.copy_(kept[name])
        for module, training in modes.items():
            module.training = training
        set_random_state(generators, device)


def _reduce(images: Tensor, factor: int) -> Tensor:
    """Means over blocks of (B, C, H, W) uint8, rounded to uint8."""
    if factor == 1:
        return images
    blocks = images.double().unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
    return blocks.mean((-3, -1)).round().to(torch.uint8)


def _gather(ranks: Ranks, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of every process, by rank."""
    if ranks.size == 1:
        return [dict(tensors)]
    own = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    return [safetensors.torch.load(part) for part in ranks.gather(own)]


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
