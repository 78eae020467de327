"""The names in a configuration, held against the registries once, after plug-ins are loaded.

The settings check types and ranges; which names there are only the registries know, to which plug-ins add theirs. Torch
is imported at the first call, so that help and the printing of a configuration do without.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from zigflow.nodes import target
from zigflow.registry import Registry, UnknownNameError, unknown_name
from zigflow.settings import Settings, SettingsError

Known = Registry[Any] | Sequence[str | None] | Callable[[], Sequence[str]]
"""What can be typed: what is registered here or, by a function, with another package; or the options of a class."""

# The groups whose node names a class. Its attribute ``registries`` says which keywords (by their paths) are names.
NODES = ("process", "model", "codec", "metrics")


def named_keys() -> dict[str, Known]:
    """The keys of the settings that name something, and what can be typed there."""
    import zigflow.engine.track_tensorboard
    import zigflow.engine.track_wandb  # noqa: F401
    from zigflow.engine.optim import OPTIMIZERS
    from zigflow.engine.start import PATCH_RULES
    from zigflow.engine.trackers import TRACKERS
    from zigflow.nn.skip_tuning import SKIP_TUNING
    from zigflow.processes import DIFFUSION_FORMS, INTERPOLANTS, PREDICTIONS
    from zigflow.processes.flow import LOSS_WEIGHTS
    from zigflow.samplers import DIFFUSION_SAMPLERS, GRIDS, ODE_SOLVERS, SDE_STEPS, VARIANTS
    from zigflow.samplers.dpm_solver import CORRECTIONS
    from zigflow.samplers.sde import LAST_STEPS
    from zigflow.samplers.upsampling import MATCHINGS

    return {
        "train.path_type": INTERPOLANTS,
        "train.prediction": PREDICTIONS,
        "train.loss_weight": LOSS_WEIGHTS,
        "optim.name": OPTIMIZERS,
        "ode.sampling_method": ODE_SOLVERS,
        "sde.sampling_method": SDE_STEPS,
        "sde.diffusion_form": DIFFUSION_FORMS,
        "sde.last_step": LAST_STEPS,
        "diffusion.sampling_method": DIFFUSION_SAMPLERS,
        "diffusion.variant": VARIANTS,
        "diffusion.grid": GRIDS,
        "diffusion.correction": CORRECTIONS,
        "upsample.matching": MATCHINGS,
        "upsample.skip_tuning": (None, *SKIP_TUNING),
        "ckpt_patches": PATCH_RULES,
        "loop.trackers": TRACKERS,
    }


def check_names(settings: Settings) -> None:
    """Refuse names that nothing answers to; the optimizer's is checked with its class (``zigflow.chosen``).

    Raises:
        SettingsError: the key, its value and near matches, in one line.
    """
    for key, known in named_keys().items():
        if not key.startswith("optim."):
            value = attrgetter(key)(settings)
            for each in value if isinstance(value, tuple) else (value,):
                _check(key, each, known)
    for group in NODES:
        node: Mapping[str, Any] = getattr(settings, group) or {}
        if not node.get("_target_"):
            continue
        for keyword, known in getattr(target(group, node), "registries", {}).items():
            value: Any = node
            for part in keyword.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, str):
                _check(f"{group}.{keyword}", value, known)


def _check(key: str, value: Any, known: Known) -> None:
    try:
        if isinstance(known, Registry):
            if value not in known:
                raise known.unknown(value, key)
            return
        names = known() if callable(known) else known
        if value not in names:
            kind = key.rpartition(".")[2].replace("_", " ")
            raise unknown_name(kind, value, ["null" if each is None else each for each in names], key)
    except (UnknownNameError, ImportError) as error:
        raise SettingsError(str(error)) from error
