"""One optimizer step: accumulate micro-batches, unscale, clip, step, average the weights, count."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zigflow.data.batch import condition, flipped
from zigflow.errors import OtherRankError, ZigflowError
from zigflow.nn import as_denoiser

from .ema import EmaProfiles
from .options import TrainingData, TrainOptions
from .precision import LossScaler, autocast, clip_gradients, gradient_norm
from .run_state import Counters
from .runtime import Runtime
from .sharding import Placed

__all__ = ["NonFiniteError", "OptimizerStep", "StepRecord"]

log = logging.getLogger(__name__)

_SHOWN = 16  # sample ids that a message names, per process


class NonFiniteError(ZigflowError, RuntimeError):
    """A loss or gradient is NaN or infinite. The weights of that step were not taken."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step was on this process.

    Attributes:
        step: its number, from 1.
        images_seen: by the whole run, this step included.
        loss: mean over the samples of this process.
        grad_norm: of the unscaled gradient before clipping.
        lr: of the first parameter group.
        ids, times, losses: (B,) on the CPU, of this process's samples: position in the data, time, loss.
        skipped: what was wrong with the unreadable samples that others replaced in this process's batches.
    """

    step: int
    images_seen: int
    loss: float
    grad_norm: float
    lr: float
    ids: Tensor
    times: Tensor
    losses: Tensor
    skipped: tuple[str, ...] = ()


class _Forward:
    """Calls go through the wrapper that synchronizes gradients, attributes come from the model itself."""

    def __init__(self, model: nn.Module, wrapped: Callable[..., Any]):
        self._model = model
        self._wrapped = wrapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class OptimizerStep:
    """Takes optimizer steps; called with this process's micro-batches of one global batch.

    Args:
        placed: the model; its parameters are final.
        process: ``sample_time(u_B)`` and ``loss(model, x1, x0, t, y) -> (B,)``.
        codec: ``encode(batch) -> x1``, on the run's device.
        data: says how large batches are, and makes their draws.
        optimizer: over the trainable parameters of the model, at the base learning rates.
        ema: averaged after each step.
        scaler: of fp16 losses.
        counters: how far the run is; advanced here.
        options: with the precision that the network runs in.
    """

    def __init__(
        self,
        *,
        placed: Placed,
        process: Any,
        codec: Any,
        data: TrainingData,
        optimizer: Optimizer,
        ema: EmaProfiles,
        scaler: LossScaler,
        counters: Counters,
        options: TrainOptions,
        runtime: Runtime,
    ):
        self.placed, self.process, self.codec, self.data = placed, process, codec, data
        self.optimizer, self.ema, self.scaler = optimizer, ema, scaler
        self.counters, self.options, self.runtime = counters, options, runtime
        self._has_text = as_denoiser(placed.model).has_text
        self._forward = _Forward(placed.model, placed.wrapped)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._skipped: tuple[str, ...] = ()
        self._trained = [p for p in placed.model.parameters() if p.requires_grad]

    def __call__(self, batches: Iterator[Any]) -> StepRecord | None:
        """One step; None when fp16 overflowed and it was skipped.

        Args:
            batches: yields the ``grad_accum`` micro-batches, at least.

        Raises:
            NonFiniteError: the loss or the gradient is not finite here.
            OtherRankError: the loss is not finite on another process; its samples are named too.
            TooManyOverflowsError: fp16 cannot go on.
        """
        counters = self.counters
        self.optimizer.zero_grad(set_to_none=True)
        ids, times, losses = self._accumulate(batches)
        self.scaler.unscale(self._trained)
        norm = gradient_norm(self._trained)
        # One transfer for all that the host decides on.
        host = torch.cat([losses, times.to(losses), norm.reshape(1).to(losses)]).cpu()
        losses, times, grad_norm = host[: len(ids)], host[len(ids) : -1], float(host[-1])
        self._check_finite(ids, losses, grad_norm)
        if not self.scaler.accepts(grad_norm):
            counters.skipped += 1
            log.info(
                "gradient overflow after step %d: skipped, loss scale %g", counters.step, self.scaler.scale
            )
            return None
        if self.options.max_grad_norm is not None:
            clip_gradients(self._trained, self.options.max_grad_norm, norm)
        images = self.data.batch.size
        factor = self.options.schedule.factor(counters.step, counters.images_seen, images)
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * factor
        self.optimizer.step()
        self.ema.update(counters.ema_images + counters.images_seen, images)
        counters.step += 1
        counters.images_seen += images
        loss = float(losses.double().mean())
        lr = float(self.optimizer.param_groups[0]["lr"])
        # Those of steps that fp16 overflow skipped are among them.
        skipped, self._skipped = self._skipped, ()
        return StepRecord(
            counters.step, counters.images_seen, loss, grad_norm, lr, ids, times, losses, skipped
        )

    def _accumulate(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the mean loss over the micro-batches; ids, times and losses of their samples."""
        shape, device, placed = self.data.batch, self.runtime.device, self.placed
        weight = self.scaler.scale / (shape.local_size * shape.grad_accum)
        ids, times, losses = [], [], []
        for index in range(shape.grad_accum):
            batch = next(batches)
            ids.append(batch.ids.cpu())
            self._skipped += batch.skipped
            draws = self.data.draws(self.options.seed, batch.ids.cpu()).to(device)
            batch = batch.to(device)
            last = index == shape.grad_accum - 1
            with nullcontext() if last else placed.no_sync(placed.wrapped), draws.active():
                loss_B, t_B = self._loss(batch, draws)
                (loss_B.float().sum() * weight).backward()
            times.append(t_B.detach())
            losses.append(loss_B.detach().float())
        return torch.cat(ids), torch.cat(times), torch.cat(losses)

    def _loss(self, batch: Any, draws: Any) -> tuple[Tensor, Tensor]:
        x1 = self.codec.encode(flipped(batch, draws) if self.options.random_flip else batch)
        t_B = self.process.sample_time(draws.uniform("train.time"))
        x0 = draws.normal("train.noise", tuple(x1.shape[1:])).to(x1)
        y = condition(batch, self._has_text, draws)
        # The codec stays outside: autoencoders overflow in float16.
        with autocast(self.options.mixed_precision, self.runtime.device):
            return self.process.loss(self._forward, x1, x0, t_B, y), t_B

    def _check_finite(self, ids: Tensor, losses: Tensor, grad_norm: float) -> None:
        bad = ids[~torch.isfinite(losses)].tolist()
        # A gradient overflow is fp16's ordinary business, which the scaler answers.
        bad_norm = not self.scaler.enabled and not math.isfinite(grad_norm)
        bad_losses, bad_norms = self.runtime.ranks.sum([float(len(bad)), float(bad_norm)])
        step = self.counters.step + 1
        if bad_losses:
            shown = ", ".join(map(str, self._of_all_ranks(bad)))
            more = " ..." if bad_losses > shown.count(",") + 1 else ""
            message = f"step {step}: the loss is not finite for samples {shown}{more}; no step was taken"
            if bad:
                raise NonFiniteError(message)
            raise OtherRankError(f"{message}. They belong to another process")
        if bad_norms:
            raise NonFiniteError(
                f"step {step}: the gradient norm is {grad_norm} with finite losses, this process's samples "
                f"{int(ids[0])} to {int(ids[-1])}; no step was taken"
            )

    def _of_all_ranks(self, ids: list[int]) -> list[int]:
        """The first sample ids of every rank, ascending; every rank calls this."""
        slots = [0.0] * (_SHOWN * self.runtime.ranks.size)
        for place, i in enumerate(ids[:_SHOWN]):
            # 0 is an empty slot.
            slots[_SHOWN * self.runtime.ranks.rank + place] = float(i + 1)
        return sorted(int(slot) - 1 for slot in self.runtime.ranks.sum(slots) if slot)
