"""The one place where a configuration becomes objects; everything below it takes plain arguments."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from hydra.utils import get_object

from zigflow.chosen import build_process, build_sampler, check_optimizer
from zigflow.engine.launch import make_accelerator
from zigflow.engine.optim import build_optimizer
from zigflow.engine.runtime import Runtime
from zigflow.engine.sampling_run import Pipeline
from zigflow.nn import as_denoiser, check_denoiser
from zigflow.nodes import make
from zigflow.samplers import Guided, Upsampled
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
    """The model with its initial weights, which follow from ``global_seed``.

    Raises:
        SettingsError: it is no model that the engine can train, see ``zigflow.nn.Denoiser``.
    """
    torch.manual_seed(settings.global_seed)
    model = make("model", model_arguments(settings))
    try:
        check_denoiser(model)
    except ValueError as error:
        raise SettingsError(f"model={settings.model.get('name')}: {error}") from error
    return model


def build_codec(settings: Settings, device: Any) -> Any:
    """The codec, its autoencoder where it has one on ``device``."""
    codec = make("codec", settings.codec)
    return codec.to(device) if hasattr(codec, "to") else codec


def build_pipeline(settings: Settings, model: torch.nn.Module, codec: Any) -> Pipeline:
    """How a configuration makes images out of noise, and numbers out of images."""
    process = build_process(settings)
    return Pipeline(model, process, build_sampler(settings), codec, partial(_guided, settings, process))


def _guided(settings: Settings, process: Any, model: Any) -> Any:
    """The model function that samplers call: with guidance, and for larger images with that of the small one."""
    channels = as_denoiser(model).guided_channels
    guided = Guided(
        model, settings.cfg_scale, interval=settings.cfg_interval, process=process, channels=channels
    )
    chosen = settings.upsample
    if chosen.factor == 1:
        return guided
    return Upsampled(guided, process, chosen.factor, chosen.eta, chosen.theta, chosen.matching)


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
