"""Optimizers by name, their state by parameter name, and the learning rate as a function of the step."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zigflow.registry import Registry, unknown_name

from .checkpoint import CheckpointError
from .combined import Combined, WholeMatrixMuon, hidden_matrices
from .tensors import assign, clean_name, full

log = logging.getLogger(__name__)

__all__ = [
    "OPTIMIZERS",
    "ClassFactory",
    "Schedule",
    "build_optimizer",
    "decay_groups",
    "load_optimizer_state",
    "optimizer_named",
    "optimizer_state",
    "parameter_groups",
]

OptimizerFactory = Callable[..., Optimizer]
OPTIMIZERS: Registry[OptimizerFactory] = Registry("optimizer")

_NO_USE = {
    "LBFGS": "it evaluates the loss several times a step, which the training loop does not",
    "SparseAdam": "it takes sparse gradients, and every model here has dense ones",
}


def parameter_groups(
    model: nn.Module, weight_decay: float | None, *, exclude_tagged: bool = False
) -> list[dict]:
    """Trainable parameters in groups for an optimizer.

    Args:
        weight_decay: of the groups; None leaves it out, for optimizers that have none.
        exclude_tagged: parameters whose attribute ``_no_weight_decay`` is true get no weight decay. The
            official training code ignores the tags (and decays nothing by default), hence off.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters")
    return decay_groups(trainable, weight_decay, exclude_tagged)


def decay_groups(parameters: list, weight_decay: float | None, exclude_tagged: bool) -> list[dict]:
    """``parameters`` as :func:`parameter_groups` divides them."""
    if weight_decay is None:
        return [{"params": parameters}]
    if not exclude_tagged:
        return [{"params": parameters, "weight_decay": weight_decay}]
    decayed = [p for p in parameters if not getattr(p, "_no_weight_decay", False)]
    spared = [p for p in parameters if getattr(p, "_no_weight_decay", False)]
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
    **own: Any,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019), official defaults."""
    groups = parameter_groups(model, weight_decay, exclude_tagged=exclude_tagged)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, **own)


@OPTIMIZERS.register("muon")
def muon(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    exclude_tagged: bool = False,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
) -> Optimizer:
    """Orthogonalized momentum for hidden matrices (Jordan et al. 2024; arXiv:2502.16982), AdamW for the rest.

    Args:
        lr: of both; ``match_rms_adamw`` gives a matrix' update the size that AdamW's would have, so that one rate
            serves both. With ``adjust_lr_fn="original"`` the two need rates of their own.
        betas: of AdamW; eps likewise.
        momentum: of Muon, with ``nesterov`` and ``ns_steps`` steps of the Newton-Schulz iteration.
        adamw_lr, adamw_weight_decay: of AdamW, where they differ.

    Raises:
        ValueError: the model has no blocks with linear layers, or a setting is out of range.
    """
    matrices = hidden_matrices(model)
    if not matrices:
        raise ValueError(
            f"optimizer muon finds no linear layers in the blocks of {type(model).__name__}: choose another optimizer, "
            "or give the model shard_units()"
        )
    inside = set(matrices)
    rest = [p for p in model.parameters() if p.requires_grad and p not in inside]
    own: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
    parts: list[Optimizer] = [
        WholeMatrixMuon(
            decay_groups(matrices, weight_decay, exclude_tagged), lr=lr, adjust_lr_fn=adjust_lr_fn, **own
        )
    ]
    if rest:
        decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        groups = decay_groups(rest, decay, exclude_tagged)
        rate = lr if adamw_lr is None else adamw_lr
        parts.append(torch.optim.AdamW(groups, lr=rate, betas=(betas[0], betas[1]), eps=eps))
    return Combined(*parts)


class ClassFactory:
    """An optimizer's class as a factory: ``factory(model, lr=..., weight_decay=..., **own)``.

    ``accepts`` holds the keywords of the class, so that a setting which it does not have is refused by name.

    Raises:
        ValueError: a class of torch that cannot train here, with the reason.
    """

    def __init__(self, cls: type[Optimizer]):
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _NO_USE:
            raise ValueError(_useless(cls.__name__))
        if cls is torch.optim.Muon:
            raise ValueError("torch.optim.Muon takes matrices alone: optim=muon gives it those of a model")
        self.cls = cls
        self.__name__ = self.__qualname__ = cls.__name__
        self.__module__ = cls.__module__
        keywords = inspect.signature(cls.__init__).parameters.values()
        self.takes_any = any(k.kind is k.VAR_KEYWORD for k in keywords)
        self.accepts = frozenset(k.name for k in keywords if k.kind is not k.VAR_KEYWORD) - {"self", "params"}

    def __call__(self, model: nn.Module, *, exclude_tagged: bool = False, **keywords: Any) -> Optimizer:
        decay = keywords.pop("weight_decay", None)
        return self.cls(parameter_groups(model, decay, exclude_tagged=exclude_tagged), **keywords)


def _register_torch_optimizers() -> None:
    for name, cls in vars(torch.optim).items():
        usable = isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
        # Muon takes matrices alone: the factory above gives it those of a model, and AdamW the rest.
        if usable and name not in (*_NO_USE, "Muon") and name.lower() not in OPTIMIZERS:
            OPTIMIZERS.register(name.lower(), ClassFactory(cls))


_register_torch_optimizers()


def optimizer_named(name: str) -> OptimizerFactory:
    """The optimizer registered as ``name``: those of torch by their class names in lower case, and others.

    Raises:
        zigflow.registry.UnknownNameError: no optimizer has that name; near matches are named.
        ValueError: one of torch's that training cannot use; the reason is named.
    """
    for cls in _NO_USE:
        if name == cls.lower() and name not in OPTIMIZERS:
            raise ValueError(_useless(cls))
    return OPTIMIZERS.get(name)


def _useless(cls: str) -> str:
    return f"torch.optim.{cls} cannot train here: {_NO_USE[cls]}; choose another optimizer"


def build_optimizer(
    optimizer: str | OptimizerFactory,
    model: nn.Module,
    *,
    common: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Optimizer:
    """An optimizer over the trainable parameters of ``model``.

    Args:
        optimizer: a registered name, or a factory ``(model, **settings) -> Optimizer``.
        common: settings that every optimizer is offered: ``lr``, and those of ``COMMON_DEFAULTS``. A value that differs
            from the default there goes before the optimizer's own default; one that the optimizer does not have is
            logged, weight decay refused. ``settings`` go before both.
        settings: its own settings.

    Raises:
        zigflow.registry.UnknownNameError: no optimizer has that name.
        ValueError: a setting out of range, or one that this optimizer does not have.
    """
    factory = optimizer_named(optimizer) if isinstance(optimizer, str) else optimizer
    name = optimizer if isinstance(optimizer, str) else getattr(factory, "__name__", type(factory).__name__)
    accepts, takes_any = _keywords(factory)
    chosen = dict(settings)
    for key, value in (common or {}).items():
        # Betas and eps that nobody changed are the optimizer's own, which differ from one to the next.
        left = key not in ("lr", "weight_decay") and value == COMMON_DEFAULTS.get(key)
        # A class that takes anything is given the rate, and what was changed.
        taken = key in accepts or (
            takes_any and key != "exclude_tagged" and value != COMMON_DEFAULTS.get(key)
        )
        if taken and not left:
            chosen.setdefault(key, value)
        elif taken and key not in chosen:
            _tell_own(factory, name, key, value)
        elif not taken and (key == "lr" or value != COMMON_DEFAULTS.get(key, value)):
            _unused(name, key, value)
    unknown = [] if takes_any else sorted(set(settings) - accepts)
    if unknown:
        raise ValueError(
            f"optimizer {name} has no setting {unknown[0]!r}; it has {', '.join(sorted(accepts))}"
        )
    try:
        return factory(model, **chosen)
    except TypeError as error:
        given = ", ".join(f"{key}={value}" for key, value in chosen.items())
        raise ValueError(f"optimizer {name}: {given} do not fit: {error}") from error


def _tell_own(factory: OptimizerFactory, name: str, key: str, value: Any) -> None:
    """Say where the default of the optimizer, which stands, is not ours."""
    target = factory.cls.__init__ if isinstance(factory, ClassFactory) else factory
    keyword = inspect.signature(target).parameters.get(key)
    own = value if keyword is None or keyword.default is keyword.empty else keyword.default
    if own != value:
        log.info("optimizer %s: %s=%s is its own default; optim.args.%s sets another", name, key, own, key)


def _unused(name: str, key: str, value: Any) -> None:
    """Refuse weight decay for an optimizer without; of what a recipe sets for another one, say that it is not used."""
    if key == "weight_decay":
        raise ValueError(f"optimizer {name} has no weight decay, which is set to {value}: set optim.wd=0")
    log.warning("optimizer %s has no %s: the value %s is not used", name, key, value)


COMMON_DEFAULTS = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "exclude_tagged": False}


def _keywords(factory: OptimizerFactory) -> tuple[frozenset[str], bool]:
    """The keywords of a factory, and whether it takes others, too."""
    if isinstance(factory, ClassFactory):
        tagged = {"exclude_tagged"} if "weight_decay" in factory.accepts else set()
        return factory.accepts | tagged, factory.takes_any
    own = list(inspect.signature(factory).parameters.values())[1:]
    named = frozenset(k.name for k in own if k.kind is not k.VAR_KEYWORD)
    return named, any(k.kind is k.VAR_KEYWORD for k in own)


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
        and, per parameter group, the plain settings with the names of its parameters; numbers and texts of the state
        that are no tensors stand under ``scalars``, by the same names.

    Raises:
        TypeError: the optimizer keeps something that is neither a tensor nor a plain value.
        ValueError: it holds a parameter that is none of the model's.
    """
    names = _names(model)
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        members, scalars = [], {}
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a {tuple(parameter.shape)} tensor that is no model parameter"
                )
            name = names[parameter]
            members.append(name)
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is None or isinstance(value, (bool, int, float, str)):
                    scalars[f"{key}/{name}"] = value
                    continue
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer state {key!r} of {name} is a {type(value).__name__}, not a tensor"
                    )
                tensors[f"{key}/{name}"] = full(value)
        settings = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({"parameters": members, **settings, **({"scalars": scalars} if scalars else {})})
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
    scalars = {key: value for group in groups for key, value in group.get("scalars", {}).items()}
    for key, value in [*tensors.items(), *scalars.items()]:
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"optimizer state {key!r} belongs to no trainable parameter")
        if not isinstance(value, Tensor):
            target = value
        elif value.shape == parameter.shape and kind != "step":
            target = torch.zeros_like(parameter, dtype=value.dtype)
            assign(target, value)
        else:
            # Torch keeps the counter of steps on the CPU unless a fused or captured step reads it.
            counter = kind == "step" and parameter not in on_device
            target = value.to("cpu" if counter else parameter.device, copy=True)
        optimizer.state[parameter][kind] = target
