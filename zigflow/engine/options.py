"""What a training run can be told, checked before anything is built."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zigflow.data.batch import Batch
from zigflow.data.global_batch import GlobalBatch
from zigflow.keyed import KeyedDraws
from zigflow.registry import unknown_name

from .ema import EmaProfile
from .optim import Schedule

__all__ = ["TrainOptions", "TrainingData"]

_CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "resume": ("auto", "never"),
    "checkpoint_policy": ("none", "block", "selective"),
}
_AT_LEAST_ONE = ("train_steps", "log_every", "ckpt_every", "keep_last")


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        loader: ``loader(k)`` yields this process's micro-batches from global batch ``k`` on, ``batch.grad_accum`` of
            them per global batch, each of ``batch.local_size`` samples, without end.
        batch: the global batch and this process's part of it.
        epoch_size: samples in an epoch, recorded; a resume with another size is refused.
        identity: plain JSON values that tell data set and order from another (its fingerprint, the order's identity),
            recorded; a resume with other values is refused.
        draws: ``draws(seed, ids)`` makes the keyed draws of a batch.
    """

    loader: Callable[[int], Iterable[Batch]]
    batch: GlobalBatch
    epoch_size: int | None = None
    identity: Mapping[str, Any] | None = None
    draws: Callable[[int, Tensor], Any] = KeyedDraws


@dataclass(frozen=True)
class TrainOptions:
    """Settings of :class:`zigflow.engine.trainer.Trainer`.

    Args:
        train_steps: optimizer steps of the whole run, those before a resume included.
        max_grad_norm: gradients are scaled down to this norm before the step; None never clips (the norm is
            logged all the same).
        log_every, ckpt_every: in optimizer steps; the last step is always saved.
        keep_last: complete checkpoints kept, besides those on the keep list.
        seed: of every keyed draw.
        schedule: factor of the learning rate.
        mixed_precision: ``no``, ``fp16`` or ``bf16``; None takes what the launcher was told.
        ema: the averages of the weights, one :class:`~zigflow.engine.ema.EmaProfile` each: with a ``half_life`` in
            images, or with the official constant ``rate`` per step. By default one of 500,000 images.
        run_dir: directory of this run.
        resume: ``auto`` continues what the directory holds, ``never`` refuses a directory in use.
        compile: compile the blocks of the model in place.
        checkpoint_policy: activations kept for the backward pass: ``none`` (all), ``block`` (block inputs
            only) or ``selective`` (block inputs and scan states).
        shard: several processes keep a part of every parameter each instead of a copy.
        max_skips: fp16 overflows in a row that stop the run.
        progress: how far the run is, on the main process: a bar on a terminal, a line of the log now and then
            elsewhere.
        random_flip: mirror each sample's pixels left to right with probability 1/2.

    Raises:
        ValueError: a value out of range, naming the key; an unknown choice with the known ones.
        TypeError: a value of the wrong type.
    """

    train_steps: int
    run_dir: Path
    max_grad_norm: float | None = 2.0
    log_every: int = 100
    ckpt_every: int = 1000
    keep_last: int = 3
    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    mixed_precision: str | None = "no"
    ema: tuple[EmaProfile, ...] = field(default=(EmaProfile("default", half_life=500_000),))
    resume: str = "auto"
    compile: bool = False
    checkpoint_policy: str = "none"
    shard: bool = False
    max_skips: int = 50
    progress: bool | None = None
    random_flip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", Path(self.run_dir))
        object.__setattr__(self, "ema", tuple(self.ema))
        for name in (*_AT_LEAST_ONE, "max_skips", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if name != "seed" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm must be positive, or null for no clipping, got {self.max_grad_norm!r}"
            )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "mixed_precision" and value is None):
                raise unknown_name(name, value, list(allowed))
        for profile in self.ema:
            if not isinstance(profile, EmaProfile):
                raise TypeError(f"ema takes EmaProfile objects, got {profile!r}")
        names = [profile.name for profile in self.ema]
        if len(set(names)) != len(names):
            raise ValueError(f"EMA profiles need distinct names, got {names}")
