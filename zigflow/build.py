"""The one place where a configuration becomes objects; everything below it takes plain arguments."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from hydra.utils import get_object

from zigflow.engine.launch import make_accelerator
from zigflow.engine.optim import ClassFactory, OptimizerFactory, build_optimizer, optimizer_named
from zigflow.engine.runtime import Runtime
from zigflow.engine.sampling_run import Pipeline
from zigflow.nodes import make
from zigflow.samplers import ChainSampler, DpmSolver, Guided, OdeSampler, SdeSampler, Upsampled
from zigflow.settings import Settings, SettingsError
from zigflow.sources import without_classes


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The model's node with the choice of ``scan=`` in it, without the label ``name``.

    Raises:
        SettingsError: a scan for a model that walks along none.
    """
    node = {k: v for k, v in settings.model.items() if k != "name"}
    _known_before_data(settings, node)
    without_classes(node)
    scan = settings.scan.get("name", "from_model")
    if scan != "from_model":
        if not _takes_scan(str(node["_target_"])):
            raise SettingsError(
                f"scan={scan}: model={settings.model.get('name')} ({node['_target_']}) reads its tokens in no order of "
                "scans: drop scan=, or choose a state-space model (zigma, dis, dim)"
            )
        node["scan"] = scan
    return node


def _known_before_data(settings: Settings, node: Mapping[str, Any]) -> None:
    """Refuse to build a model whose size follows from data that is not read.

    Raises:
        SettingsError: the key to give.
    """
    follows = {
        "img_dim": "data.image_size",
        "in_channels": "data.channels",
        "num_classes": "data.num_classes",
    }
    for key, given in follows.items():
        if key in node and node[key] is None:
            raise SettingsError(
                f"model.{key} follows from data={settings.data.name}, which is not read here: give {given}=VALUE"
            )


def _takes_scan(target: str) -> bool:
    try:
        keywords = inspect.signature(get_object(target)).parameters.values()
    except Exception:
        # What is wrong with it is told where it is built.
        return True
    return any(k.name == "scan" or k.kind is k.VAR_KEYWORD for k in keywords)


def build_model(settings: Settings) -> torch.nn.Module:
    """The model with its initial weights, which follow from ``global_seed``."""
    torch.manual_seed(settings.global_seed)
    return make("model", model_arguments(settings))


def build_codec(settings: Settings, device: Any) -> Any:
    """The codec, its autoencoder where it has one on ``device``."""
    codec = make("codec", settings.codec)
    return codec.to(device) if hasattr(codec, "to") else codec


def build_sampler(settings: Settings):
    """The sampler that ``sample_mode`` and the groups ``ode``, ``sde`` and ``diffusion`` describe."""
    if settings.sample_mode == "diffusion":
        chosen = settings.diffusion
        if chosen.sampling_method in ("ddpm", "ddim"):
            return ChainSampler(chosen.sampling_method, chosen.num_steps, chosen.eta, chosen.clip_denoised)
        return DpmSolver(
            chosen.sampling_method, chosen.variant, int(chosen.num_steps), chosen.order, chosen.grid,
            chosen.correction, chosen.lower_order_final, atol=chosen.atol, rtol=chosen.rtol,
            last_step=chosen.last_step, lambda_floor=chosen.lambda_floor,
        )  # fmt: skip
    if settings.sample_mode == "SDE":
        sde = settings.sde
        return SdeSampler(
            method=sde.sampling_method, num_steps=sde.num_steps, diffusion_form=sde.diffusion_form,
            diffusion_norm=sde.diffusion_norm, last_step=sde.last_step, last_step_size=sde.last_step_size,
        )  # fmt: skip
    ode = settings.ode
    return OdeSampler(
        method=ode.sampling_method,
        num_steps=ode.num_steps,
        atol=ode.atol,
        rtol=ode.rtol,
        last_step=ode.last_step,
    )


def build_pipeline(settings: Settings, model: torch.nn.Module, codec: Any) -> Pipeline:
    """How a configuration makes images out of noise, and numbers out of images."""
    process = make("process", settings.process)
    return Pipeline(model, process, build_sampler(settings), codec, partial(_guided, settings, process))


def _guided(settings: Settings, process: Any, model: Any) -> Any:
    """The model function that samplers call: with guidance, and for larger images with that of the small one."""
    channels = getattr(model, "guided_channels", None)
    guided = Guided(
        model, settings.cfg_scale, interval=settings.cfg_interval, process=process, channels=channels
    )
    chosen = settings.upsample
    if chosen.factor == 1:
        return guided
    return Upsampled(guided, process, chosen.factor, chosen.eta, chosen.theta, chosen.matching)


def check_optimizer(settings: Settings) -> OptimizerFactory:
    """What makes the optimizer of a configuration, its settings not yet checked.

    Raises:
        SettingsError: no optimizer has that name, or the class cannot be imported; one line with near matches.
    """
    optim = settings.optim
    try:
        if optim._target_ is None:
            return optimizer_named(optim.name)
        found = get_object(optim._target_)
    except Exception as error:
        key = "optim.name" if optim._target_ is None else "optim._target_"
        raise SettingsError(f"{key}: {' '.join(str(error).split())}") from error
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        try:
            return ClassFactory(found)
        except ValueError as error:
            raise SettingsError(f"optim._target_: {error}") from error
    if not callable(found):
        raise SettingsError(
            f"optim._target_={optim._target_} is neither an optimizer's class nor a function of a model"
        )
    return found


def make_optimizer(settings: Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of ``model``.

    Raises:
        SettingsError: a setting that it does not have, or one out of range.
    """
    optim = settings.optim
    common = {
        "lr": optim.lr,
        "weight_decay": optim.wd,
        "betas": optim.betas,
        "eps": optim.eps,
        "exclude_tagged": optim.exclude_tagged_from_decay,
    }
    try:
        return build_optimizer(check_optimizer(settings), model, common=common, **optim.args)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"optim: {error}") from error


def build_runtime(settings: Settings) -> Runtime:
    """Join the processes of a command on the device that it asks for."""
    runtime = Runtime.of(make_accelerator(cpu=settings.loop.device == "cpu"))
    # After accelerate, which counts the threads of several CPU processes itself.
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    return runtime
