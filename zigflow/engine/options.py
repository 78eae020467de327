"""What a training run can be told, checked before anything is built."""

from dataclasses import dataclass, field
from pathlib import Path

from zigflow.registry import unknown_name

from .ema import EmaProfile

__all__ = ["TrainOptions"]

_CHOICES = {
    "mixed_precision": ("no", "fp16", "bf16"),
    "resume": ("auto", "never"),
    "checkpoint_policy": ("none", "block", "selective"),
}
_AT_LEAST_ONE = ("train_steps", "batch_size", "grad_accum", "log_every", "ckpt_every", "keep_last")


@dataclass(frozen=True)
class TrainOptions:
    """Settings of :class:`zigflow.engine.trainer.Trainer`.

    Args:
        train_steps: optimizer steps of the whole run, those before a resume included.
        batch_size: samples of a micro-batch on one process.
        grad_accum: micro-batches of an optimizer step; the global batch is
            ``batch_size * grad_accum * processes``.
        max_grad_norm: gradients are scaled down to this norm before the step; None never clips (the norm is
            logged all the same).
        log_every, ckpt_every: in optimizer steps; the last step is always saved.
        keep_last: complete checkpoints kept, besides those on the keep list.
        seed: of every keyed draw.
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
    batch_size: int
    run_dir: Path
    grad_accum: int = 1
    max_grad_norm: float | None = 2.0
    log_every: int = 100
    ckpt_every: int = 1000
    keep_last: int = 3
    seed: int = 0
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
