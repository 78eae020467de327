"""Optimizers by name, their state by parameter name, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zigflow.registry import Registry, unknown_name

from .checkpoint import CheckpointError
from .tensors import assign, clean_name, full

__all__ = [
    "OPTIMIZERS",
    "Schedule",
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_state",
    "parameter_groups",
]

OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry("optimizer")


def parameter_groups(model: nn.Module, weight_decay: float, *, exclude_tagged: bool = False) -> list[dict]:
    """Trainable parameters in groups for an optimizer.

    Args:
        exclude_tagged: parameters whose attribute ``_no_weight_decay`` is true get no weight decay. The
            official training code ignores the tags (and decays nothing by default), hence off.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    if not exclude_tagged:
        return [{"params": trainable, "weight_decay": weight_decay}]
    decayed = [p for p in trainable if not getattr(p, "_no_weight_decay", False)]
    spared = [p for p in trainable if getattr(p, "_no_weight_decay", False)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@OPTIMIZERS.register("adamw")
def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    exclude_tagged: bool = False,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019), official defaults."""
    groups = parameter_groups(model, weight_decay, exclude_tagged=exclude_tagged)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps)


def build_optimizer(name: str, model: nn.Module, **settings: object) -> Optimizer:
    """The optimizer registered as ``name`` over the trainable parameters of ``model``.

    Raises:
        zigflow.registry.UnknownNameError: no optimizer has that name.
        ValueError: a setting out of range.
    """
    return OPTIMIZERS.get(name)(model, **settings)


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor as a pure function of how far the run is; nothing to save or restore.

    Args:
        kind: ``constant`` (after the warm-up) or ``cosine`` (half a cosine from 1 to ``final``).
        warmup: length of the linear warm-up, in ``unit``. Its n-th step (n = 0, 1, ...) has the factor
            ``(n + 1) / warmup``, so that the first step already learns.
        total: where the cosine ends, in ``unit``; needed for ``cosine`` alone.
        final: factor at and after ``total``.
        unit: ``steps`` (optimizer steps) or ``images`` (images seen).

    Raises:
        ValueError: an unknown kind or unit, or a value out of range.
    """

    kind: str = "constant"
    warmup: int = 0
    total: int | None = None
    final: float = 0.0
    unit: str = "steps"

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine"):
            raise unknown_name("learning-rate schedule", self.kind, ["constant", "cosine"])
        if self.unit not in ("steps", "images"):
            raise unknown_name("schedule unit", self.unit, ["steps", "images"])
        if self.warmup < 0:
            raise ValueError(f"warmup must be >= 0 {self.unit}, got {self.warmup}")
        if self.kind == "cosine" and (self.total is None or self.total <= self.warmup):
            raise ValueError(
                f"a cosine schedule needs total > warmup = {self.warmup}, got total={self.total}"
            )
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must lie in [0, 1], got {self.final}")

    def factor(self, step: int, images_seen: int, batch: int = 1) -> float:
        """Factor of the step that follows ``step`` finished steps and ``images_seen`` images.

        Args:
            batch: images of one optimizer step; the warm-up in images counts the step's own.
        """
        position, stride = (step, 1) if self.unit == "steps" else (images_seen, batch)
        if position < self.warmup:
            return min(1.0, (position + stride) / self.warmup)
        if self.kind == "constant" or self.total is None:
            return 1.0
        share = min(1.0, (position - self.warmup) / (self.total - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * share))


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: clean_name(name) for name, parameter in model.named_parameters()}


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict]]:
    """The optimizer's state under parameter names, whole and on the CPU (sharded: all ranks together).

    Returns:
        Tensors ``"<state>/<parameter>"`` (``exp_avg/blocks.0.norm.weight``; 0-dimensional ``step`` included)
        and, per parameter group, the plain settings with the names of its parameters.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor a number.
        ValueError: it holds a parameter that is none of the model's.
    """
    names = _names(model)
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        members = []
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a {tuple(parameter.shape)} tensor that is no model parameter"
                )
            name = names[parameter]
            members.append(name)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, (int, float)):
                    value = torch.tensor(value, dtype=torch.float64)
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer state {key!r} of {name} is a {type(value).__name__}, not a tensor"
                    )
                tensors[f"{key}/{name}"] = full(value)
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({"parameters": members, **settings})
    return tensors, groups


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def load_optimizer_state(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], groups: list[dict]
) -> None:
    """Put a stored state back; parameters are found by name, whatever their order.

    The groups' settings (learning rate, betas, ...) stay those of ``optimizer``: the run's configuration
    decides them, the learning rate follows from the step.

    Raises:
        CheckpointError: the stored state belongs to other parameters.
    """
    parameters = {
        name: parameter
        for parameter, name in _names(model).items()
        if any(parameter is p for group in optimizer.param_groups for p in group["params"])
    }
    stored = {name for group in groups for name in group["parameters"]}
    if stored != set(parameters):
        difference = sorted(stored.symmetric_difference(parameters))[:4]
        raise CheckpointError(
            f"the stored optimizer state belongs to other parameters; differing: {', '.join(difference)}; train the "
            "same parameters as before, or start a new run_dir from the weights alone"
        )
    on_device = {
        p
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for p in group["params"]
    }
    optimizer.state.clear()
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"optimizer state {key!r} belongs to no trainable parameter")
        if value.shape == parameter.shape and kind != "step":
            target = torch.zeros_like(parameter, dtype=value.dtype)
            assign(target, value)
        else:
            target = value.to(parameter.device if parameter in on_device else "cpu", copy=True)
        optimizer.state[parameter][kind] = target
