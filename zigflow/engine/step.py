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

from zigflow.errors import OtherRankError, ZigflowError

from .batches import condition, flipped
from .ema import EmaProfiles
from .optim import Schedule
from .options import TrainOptions
from .precision import LossScaler, autocast, clip_gradients, gradient_norm
from .ranks import Ranks
from .run_state import Counters

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
    """

    step: int
    images_seen: int
    loss: float
    grad_norm: float
    lr: float
    ids: Tensor
    times: Tensor
    losses: Tensor


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
        model: the model itself, its parameters final.
        wrapped: the same, as it is called: what DDP or FSDP made of it.
        no_sync: ``no_sync(wrapped)`` is the context in which gradients stay local.
        draws: ``draws(seed, ids)`` makes the keyed draws of a batch.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        wrapped: Callable[..., Any],
        no_sync: Callable[[Any], Any],
        process: Any,
        codec: Any,
        optimizer: Optimizer,
        schedule: Schedule,
        ema: EmaProfiles,
        scaler: LossScaler,
        counters: Counters,
        options: TrainOptions,
        mixed_precision: str,
        ranks: Ranks,
        device: torch.device,
        draws: Callable[[int, Tensor], Any],
    ):
        self.model, self.wrapped, self.no_sync = model, wrapped, no_sync
        self.process, self.codec = process, codec
        self.optimizer, self.schedule, self.ema, self.scaler = optimizer, schedule, ema, scaler
        self.counters, self.options, self.ranks = counters, options, ranks
        self.mixed_precision, self.device, self._draws = mixed_precision, device, draws
        self.global_batch = options.batch_size * options.grad_accum * ranks.size
        self._forward = _Forward(model, wrapped)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._trained = [p for p in model.parameters() if p.requires_grad]

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
        factor = self.schedule.factor(counters.step, counters.images_seen, self.global_batch)
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * factor
        self.optimizer.step()
        self.ema.update(counters.ema_images + counters.images_seen, self.global_batch)
        counters.step += 1
        counters.images_seen += self.global_batch
        loss = float(losses.double().mean())
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepRecord(counters.step, counters.images_seen, loss, grad_norm, lr, ids, times, losses)

    def _accumulate(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the mean loss over the micro-batches; ids, times and losses of their samples."""
        options = self.options
        weight = self.scaler.scale / (options.batch_size * options.grad_accum)
        ids, times, losses = [], [], []
        for index in range(options.grad_accum):
            batch = next(batches)
            ids.append(batch.ids.cpu())
            draws = self._draws(options.seed, batch.ids.cpu()).to(self.device)
            batch = batch.to(self.device)
            last = index == options.grad_accum - 1
            with nullcontext() if last else self.no_sync(self.wrapped), draws.active():
                loss_B, t_B = self._loss(batch, draws)
                (loss_B.float().sum() * weight).backward()
            times.append(t_B.detach())
            losses.append(loss_B.detach().float())
        return torch.cat(ids), torch.cat(times), torch.cat(losses)

    def _loss(self, batch: Any, draws: Any) -> tuple[Tensor, Tensor]:
        x1 = self.codec.encode(flipped(batch, draws) if self.options.random_flip else batch)
        t_B = self.process.sample_time(draws.uniform("train.time"))
        x0 = draws.normal("train.noise", tuple(x1.shape[1:])).to(x1)
        y = condition(batch, self.model, draws)
        # The codec stays outside: autoencoders overflow in float16.
        with autocast(self.mixed_precision, self.device):
            return self.process.loss(self._forward, x1, x0, t_B, y), t_B

    def _check_finite(self, ids: Tensor, losses: Tensor, grad_norm: float) -> None:
        bad = ids[~torch.isfinite(losses)].tolist()
        # A gradient overflow is fp16's ordinary business, which the scaler answers.
        bad_norm = not self.scaler.enabled and not math.isfinite(grad_norm)
        bad_losses, bad_norms = self.ranks.sum([float(len(bad)), float(bad_norm)])
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
        slots = [0.0] * (_SHOWN * self.ranks.size)
        for place, i in enumerate(ids[:_SHOWN]):
            # 0 is an empty slot.
            slots[_SHOWN * self.ranks.rank + place] = float(i + 1)
        return sorted(int(slot) - 1 for slot in self.ranks.sum(slots) if slot)
