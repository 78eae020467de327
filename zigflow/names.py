"""The names in a configuration, held against the registries once, after plug-ins are loaded.

The settings check types and ranges; which names there are only the registries know, to which plug-ins add theirs. Torch
is imported at the first call, so that help and the printing of a configuration do without.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from zigflow.nodes import target
from zigflow.registry import Registry, UnknownNameError, unknown_name
from zigflow.settings import Settings, SettingsError

Known = Registry[Any] | Sequence[str | None]
"""What can be typed: what is registered, or the options that a class has and no package adds to."""

# The groups whose node names a class. Its attribute ``registries`` says which of its keywords are names.
NODES = ("process", "model", "codec", "metrics")


def named_keys() -> dict[str, Known]:
    """The keys of the settings that name something, and what can be typed there."""
    from zigflow.engine.optim import OPTIMIZERS
    from zigflow.engine.start import PATCH_RULES
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
    }


def check_names(settings: Settings) -> None:
    """Refuse names that nothing answers to; the optimizer's is checked with its class (``zigflow.chosen``).

    Raises:
        SettingsError: the key, its value and near matches, in one line.
    """
    for key, known in named_keys().items():
        if not key.startswith("optim."):
            _check(key, attrgetter(key)(settings), known)
    for group in NODES:
        node: Mapping[str, Any] = getattr(settings, group) or {}
        if not node.get("_target_"):
            continue
        for keyword, known in getattr(target(group, node), "registries", {}).items():
            if isinstance(node.get(keyword), str):
                _check(f"{group}.{keyword}", node[keyword], known)


def _check(key: str, value: Any, known: Known) -> None:
    try:
        if isinstance(known, Registry):
            if value not in known:
                raise known.unknown(value, key)
        elif value not in known:
            kind = key.rpartition(".")[2].replace("_", " ")
            raise unknown_name(kind, value, ["null" if each is None else each for each in known], key)
    except (UnknownNameError, ImportError) as error:
        raise SettingsError(str(error)) from error
