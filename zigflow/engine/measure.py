"""What a model says about given data: their likelihood, its variational bound, and the noise that they came from.

One value per sample of a source, computed in full batches that are kept as files: a cut run continues where it
stopped, and several processes share the batches. A value follows from the sample, the seed and the size of a batch.

Legend: N samples, B batch, C channels, h w data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zigflow import files
from zigflow.data.batch import collate, condition
from zigflow.data.contents import exact_fingerprint
from zigflow.data.loader import PositionDataset
from zigflow.keyed import KeyedDraws
from zigflow.nn import as_denoiser

from .claims import MEASURED, SamplingFolderError, claim_folder
from .log import tracked
from .runtime import Runtime
from .sampling_run import Pipeline, Samples, walked, weights_hash
from .tensors import load_tensors, save_tensors

__all__ = ["QUANTITIES", "MeasuringRun"]

QUANTITIES = ("bits_per_dim", "bound", "noise")


class MeasuringRun:
    """Measures the first samples of a source into ``folder``.

    Args:
        pipeline: its sampler has ``log_likelihood(...)``, ``bound(...)`` or ``encode(...)``.
        samples: how many, in which batches; fewer samples of the source than asked for are all of them. The seed is of
            dequantization, probe and choice of captions.
        quantity: "bits_per_dim" by the ODE; "bound", the variational bound in bits per dimension of 8-bit data; or
            "noise": the x0 that the ODE maps to a sample.
        source: the data.
        level: for bits, the width of a grey level in x1's units; each value is spread evenly over its level (uniform
            dequantization, Theis et al. 2016), which makes the result an upper bound for the discrete data.
            None measures the density as it is.
        identity: plain facts that the values depend on and that this class cannot see.
        runtime: by default one process on the CPU.
        progress: as in ``TrainOptions``.

    Raises:
        ValueError: an unknown quantity, or a source without samples.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        samples: Samples,
        *,
        quantity: str,
        source: Any,
        folder: Path | str,
        level: float | None = None,
        identity: Mapping[str, Any] | None = None,
        runtime: Runtime | None = None,
        progress: bool | None = None,
    ):
        if quantity not in QUANTITIES:
            raise ValueError(f"quantity is one of {', '.join(QUANTITIES)}, got {quantity!r}")
        if not len(source):
            raise ValueError("there is nothing to measure: the source has no samples")
        runtime = runtime or Runtime()
        self.device, self.ranks = runtime.device, runtime.ranks
        self.quantity, self.level = quantity, level
        self.seed, self.batch_size = samples.seed, samples.batch_size
        self.data = PositionDataset(source, caption_seed=samples.seed)
        self.available = len(source)
        self.num_samples = min(samples.num_samples, self.available)
        self.pipeline = pipeline.on(self.device)
        self.folder = Path(folder)
        self.progress = progress
        self.identity = {
            "quantity": quantity,
            "level": level,
            "seed": samples.seed,
            "batch_size": samples.batch_size,
            "available": self.available,
            "data": exact_fingerprint(source),
            "weights_sha256": weights_hash(pipeline.model),
            **walked(pipeline.model),
            **(identity or {}),
        }

    def path(self, number: int) -> Path:
        """The file of one batch."""
        return self.folder / "batches" / f"{number:06d}.safetensors"

    def run(self) -> None:
        """Compute the batches that are missing; every process of the run calls this together.

        Raises:
            SamplingFolderError: the folder holds values of another run.
            Exception: whatever source, codec, model or sampler raise.
        """
        with self.ranks.together("opening the folder of measurements"):
            if self.ranks.is_main:
                batches = self.folder / "batches"
                for leftover in batches.glob(".*.tmp"):
                    files.unlink(leftover)
                claim_folder(self.folder, MEASURED, self.identity, any(batches.glob("*.safetensors")))
                batches.mkdir(exist_ok=True)
        own = range(self._num_batches)[self.ranks.rank :: self.ranks.size]
        with self.ranks.together("measuring"):
            for number in tracked(own, self.progress if self.ranks.is_main else False):
                if self._read(number) is None:
                    self._measure(number)

    def collect(self) -> tuple[Tensor, Tensor]:
        """Values and indices: for one process, once every process is through ``run()``.

        Returns:
            (N,) float64 bits per dimension or (N, C, h, w) noise, and (N,) int64 indices in the source.

        Raises:
            SamplingFolderError: a batch is missing or damaged.
        """
        found = []
        for number in range(self._num_batches):
            batch = self._read(number)
            if batch is None:
                raise SamplingFolderError(
                    f"{self.path(number)} is missing or damaged; call run() in every process first"
                )
            found.append(batch)
        values, ids = (torch.cat([batch[key] for batch in found]) for key in ("values", "ids"))
        return values[: self.num_samples], ids[: self.num_samples]

    @property
    def _num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def _measure(self, number: int) -> None:
        # The batch is whole whatever number was asked for, so that a longer run finds it as it would make it; the
        # last one of the source is filled up by its first samples, whose values are dropped.
        first = number * self.batch_size
        places = range(first, first + self.batch_size)
        batch = collate(self.data.__getitems__([place % self.available for place in places]))
        draws = KeyedDraws(self.seed, batch.ids).to(self.device)
        batch = batch.to(self.device)
        has_text = as_denoiser(self.pipeline.model).has_text
        with draws.active():
            x1 = self.pipeline.codec.encode(batch)
            values = self._values(x1, condition(batch, has_text, draws), draws).cpu()
        real = min(self.batch_size, self.available - first)
        path = self.path(number)
        temporary = path.with_name(f".{path.name}.tmp")
        save_tensors(temporary, {"values": values[:real], "ids": batch.ids[:real].cpu()})
        files.rename(temporary, path)

    def _values(self, x1: Tensor, y: Any, draws: KeyedDraws) -> Tensor:
        process, model, sampler = self.pipeline.process, self.pipeline.model, self.pipeline.sampler
        if self.quantity == "noise":
            return sampler.encode(process, model, x1, y)
        if self.quantity == "bound":
            return sampler.bound(process, model, x1, y, draws).total.double()
        if self.level is not None:
            x1 = x1 + self.level * (draws.uniform("likelihood.dequantize", tuple(x1.shape[1:])) - 0.5)
        width = 1.0 if self.level is None else self.level
        found = sampler.log_likelihood(process, model, x1, y, draws=draws, bin_width=width)
        return found.bits_per_dim.double()

    def _read(self, number: int) -> dict[str, Tensor] | None:
        try:
            return load_tensors(self.path(number))
        except (FileNotFoundError, ValueError):
            return None
