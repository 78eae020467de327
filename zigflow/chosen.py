"""What a configuration chose by name, as objects: process, sampler and optimizer, and whether they fit each other.

Everything here is cheap and touches no device. What an object can do is asked of it, never told by its name.
"""

import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from zigflow.engine.optim import ClassFactory, OptimizerFactory, optimizer_named
from zigflow.names import check_names
from zigflow.nodes import make, target
from zigflow.processes import Process
from zigflow.samplers import DIFFUSION_SAMPLERS, OdeSampler, Sampler, SdeSampler, Upsampled
from zigflow.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def check_chosen(settings: Settings, trains: bool = True) -> None:
    """Refuse unknown names, and what was chosen that does not fit; once, after plug-ins are loaded.

    Args:
        trains: the configuration trains; where it samples, its optimizer is not looked at.

    Raises:
        SettingsError: the key, what was given and what to do, in one line.
    """
    check_names(settings)
    if trains:
        check_optimizer(settings)
    process = build_process(settings)
    samplers = {mode: make_sampler(settings) for mode, make_sampler in _SAMPLERS.items()}
    _check_sampler(settings, samplers[settings.sample_mode or "ODE"], process)
    _check_upsampling(settings, process)
    _check_codec(settings)


def build_process(settings: Settings) -> Process:
    """The process, which knows no device.

    Raises:
        SettingsError: a keyword that it does not have, or a value that it refuses.
    """
    return make("process", settings.process)


def build_sampler(settings: Settings) -> Sampler:
    """The sampler that ``sample_mode`` and the groups ``ode``, ``sde`` and ``diffusion`` describe.

    Raises:
        SettingsError: a value that it refuses.
    """
    return _SAMPLERS[settings.sample_mode or "ODE"](settings)


def _ode(settings: Settings) -> Sampler:
    ode = settings.ode
    return _made(
        "ode", OdeSampler, method=ode.sampling_method, num_steps=ode.num_steps, atol=ode.atol, rtol=ode.rtol,
        last_step=ode.last_step,
    )  # fmt: skip


def _sde(settings: Settings) -> Sampler:
    sde = settings.sde
    return _made(
        "sde", SdeSampler, method=sde.sampling_method, num_steps=sde.num_steps, diffusion_form=sde.diffusion_form,
        diffusion_norm=sde.diffusion_norm, last_step=sde.last_step, last_step_size=sde.last_step_size,
    )  # fmt: skip


def _diffusion(settings: Settings) -> Sampler:
    """The registered sampler, given those keys of the group that are its keywords."""
    chosen = dataclasses.asdict(settings.diffusion)
    factory = DIFFUSION_SAMPLERS.get(chosen.pop("sampling_method"))
    keywords = inspect.signature(factory).parameters.values()
    taken = {k.name for k in keywords}
    if any(k.kind is k.VAR_KEYWORD for k in keywords):
        taken |= set(chosen)
    return _made("diffusion", factory, **{key: value for key, value in chosen.items() if key in taken})


_SAMPLERS: dict[str, Callable[[Settings], Sampler]] = {"ODE": _ode, "SDE": _sde, "diffusion": _diffusion}


def _made(group: str, factory: Callable[..., Sampler], **keywords: Any) -> Sampler:
    try:
        return factory(**keywords)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError(_with_group(group, str(error), keywords)) from error


def _with_group(group: str, text: str, keys: Mapping[str, Any]) -> str:
    """A message of a sampler, whose KEY=VALUE becomes the key as it is typed."""
    found = re.match(r"(\w+)=", text)
    return f"{group}.{text}" if found and found[1] in keys else f"{group}: {text}"


def _check_sampler(settings: Settings, sampler: Sampler, process: Process) -> None:
    mode = settings.sample_mode or "ODE"
    group = mode.lower()
    chosen = dataclasses.asdict(getattr(settings, group))
    reason = sampler.unfit(process)
    if reason is not None:
        start = f"sample_mode={mode} ({group}.sampling_method={chosen['sampling_method']})"
        text = _with_group(group, reason, chosen)
        raise SettingsError(text if not text.startswith(f"{group}: ") else f"{start}: {reason}")
    if settings.likelihood or settings.ode.likelihood:
        reason = _cannot_measure(sampler, process)
        if reason is not None:
            raise SettingsError(
                f"likelihood=true with sample_mode={mode}: {reason}; set sample_mode=ODE, or for the variational bound "
                "of process=gaussian sample_mode=diffusion diffusion.sampling_method=ddpm"
            )
    if settings.ode.reverse:
        reason = _cannot_encode(sampler)
        if reason is not None:
            raise SettingsError(
                f"ode.reverse=true with sample_mode={mode}: {reason}; set sample_mode=ODE, or sample_mode=diffusion "
                "diffusion.sampling_method=ddim diffusion.eta=0"
            )


def _cannot_measure(sampler: Any, process: Process) -> str | None:
    if hasattr(sampler, "log_likelihood"):
        return None
    if hasattr(sampler, "bound"):
        return sampler.unfit_to_bound(process)
    return f"{type(sampler).__name__} has neither a likelihood nor a bound"


def _cannot_encode(sampler: Any) -> str | None:
    if not hasattr(sampler, "encode"):
        return f"{type(sampler).__name__} has no inverse"
    unfit = getattr(sampler, "unfit_to_encode", None)
    return None if unfit is None else unfit()


def _check_upsampling(settings: Settings, process: Process) -> None:
    upsample = settings.upsample
    if upsample.factor == 1:
        return
    try:
        Upsampled(None, process, upsample.factor, upsample.eta, upsample.theta, upsample.matching)
    except (ValueError, TypeError) as error:
        raise SettingsError(_with_group("upsample", str(error), dataclasses.asdict(upsample))) from error
    if upsample.skip_tuning is not None and not getattr(process, "feeds_noise_level", False):
        raise SettingsError(
            f"upsample.skip_tuning={upsample.skip_tuning} weighs by the noise level 0..1000 that diffusion processes "
            f"feed the model, {type(process).__name__} feeds it otherwise: drop upsample.skip_tuning"
        )


def _check_codec(settings: Settings) -> None:
    identity = getattr(target("codec", settings.codec), "is_identity", False)
    if settings.use_latent and not settings.is_latent and identity:
        raise SettingsError(
            f"use_latent=true, but data={settings.data.name} holds pixels and codec=pixels does not encode them: give "
            "codec=sd_vae codec.path=FOLDER, or set use_latent=false"
        )


def check_optimizer(settings: Settings) -> OptimizerFactory:
    """What makes the optimizer of a configuration, its settings not yet checked.

    Raises:
        SettingsError: no optimizer has that name, or the class cannot be imported; one line with near matches.
    """
    optim = settings.optim
    if optim._target_ is None:
        try:
            return optimizer_named(optim.name)
        except ValueError as error:
            raise SettingsError(f"optim.name={optim.name!r}: {error}") from error
    found: Any = target("optim", {"_target_": optim._target_})
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        try:
            return ClassFactory(found)
        except ValueError as error:
            raise SettingsError(f"optim._target_: {error}") from error
    if not callable(found):
        raise SettingsError(
            f"optim._target_={optim._target_} is neither an optimizer's class nor a function of a model"
        )
    return cast(OptimizerFactory, found)
