"""What can be known to fail before a device is touched or a file is written.

``Settings`` checks keys by themselves; here data, model and codec are held against each other and against the files
they name. It is asked after plug-ins are loaded, and imports the classes that the configuration names. What only
reading the data can tell is checked by ``zigflow.build``.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zigflow.engine.launcher_settings import check_agreement
from zigflow.latents import LatentScale, LatentSize
from zigflow.nodes import target
from zigflow.objective import check_objective
from zigflow.settings import Settings, SettingsError
from zigflow.shapes import model_shape, sample_shape

log = logging.getLogger(__name__)


def check_training(settings: Settings) -> None:
    """Refuse a training run that cannot work.

    Raises:
        SettingsError: data, model and codec do not fit together, or a folder is missing; one line.
    """
    source = settings.data.source
    if not source or ("root" in source and source["root"] is None):
        raise SettingsError(f"data={settings.data.name} has no source to train on: choose another data=NAME")
    _check_latents(settings)
    scaled_codec(settings.codec)
    _check_shapes(settings)
    _check_conditions(settings)
    _check_variance(settings)
    check_roots(settings)
    check_objective(settings)
    check_agreement(
        {
            "loop.compile": settings.loop.compile,
            "grad_accum": settings.grad_accum,
            "max_grad_norm": settings.max_grad_norm,
        }
    )


def check_decoding(settings: Settings) -> None:
    """Refuse to sample latents that nothing decodes.

    Raises:
        SettingsError: the codec is an autoencoder's and its folder is not given or is none.
    """
    if _is_autoencoder(settings.codec):
        if settings.codec.get("path") is None:
            raise SettingsError(
                "codec.path is missing: samples are latents, give codec.path=FOLDER, a local diffusers AutoencoderKL "
                f"such as stabilityai/sd-vae-ft-{settings.vae} (config.json and diffusion_pytorch_model.safetensors), "
                "or the file autoencoder_kl.pth"
            )
        _latent_size(settings.codec)


_SCALE_KEYS = ("scale", "shift", "latents_mean", "latents_std", "own_scale")


def scaled_codec(codec: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's node that states how latents are scaled, for checkpoints and results; others as they are.

    Raises:
        SettingsError: the node contradicts what its autoencoder says; one line.
    """
    if not _is_autoencoder(codec):
        return dict(codec)
    try:
        found = LatentScale.of(codec.get("path"), **{key: codec.get(key) for key in _SCALE_KEYS})
    except (TypeError, ValueError) as error:
        text = str(error)
        raise SettingsError(text if text.startswith("codec.") else f"codec.path: {text}") from error
    if codec.get("path") is None and codec.get("scale") is None:
        log.info("no autoencoder at hand: codec.scale=%s, that of Stable Diffusion 1 and 2", found.scale)
    return {**codec, **found.node()}


def check_roots(settings: Settings) -> None:
    """Refuse folders of shards that are not there, with what to do about it.

    Raises:
        SettingsError: ``data.source.root`` or ``data.heldout.root`` is no folder, and ``data.prepare`` says how to
            make one.
    """
    if not settings.data.prepare:
        return
    for split in ("source", "heldout"):
        root = (getattr(settings.data, split) or {}).get("root")
        if root is None or "://" in str(root):
            continue
        if not any(Path(root).glob("*.tar")):
            where = "data.tar_base" if split == "source" else "data.heldout.root"
            raise SettingsError(
                f"data={settings.data.name} finds no shards in {root} (data.{split}.root): {settings.data.prepare}; "
                f"then give {where}=FOLDER"
            )


def _is_autoencoder(codec: Mapping[str, Any]) -> bool:
    return bool(getattr(target("codec", codec), "is_autoencoder", False))


def _latent_size(codec: Mapping[str, Any]) -> LatentSize:
    try:
        return LatentSize.of(codec.get("path"))
    except ValueError as error:
        raise SettingsError(f"codec.path: {error}") from error


def _check_latents(settings: Settings) -> None:
    data, codec = settings.data, settings.codec
    if not settings.use_latent:
        if _is_autoencoder(codec):
            raise SettingsError(
                f"use_latent=false trains on pixels, codec ({codec['_target_']}) makes latents: set use_latent=true, "
                "or codec=pixels"
            )
        if settings.is_latent:
            raise SettingsError(
                f"use_latent=false, but data={data.name} reads latents: set use_latent=true; or, for pixels, "
                "is_latent=false codec=pixels and an image key in data.source.rename"
            )
    elif not settings.is_latent and _is_autoencoder(codec) and codec.get("path") is None:
        raise SettingsError(
            f"use_latent=true with the pixels of data={data.name} needs the autoencoder: give codec.path=FOLDER, a "
            f"local diffusers AutoencoderKL such as stabilityai/sd-vae-ft-{settings.vae}"
        )


def _pixel_shape(settings: Settings) -> tuple[int, ...] | None:
    """(C, H, W) or (T, C, H, W) of the data's pixels as the configuration declares it; None where it does not."""
    data, source = settings.data, settings.data.source or {}
    size = source.get("image_size", source.get("size", data.image_size))
    channels = source.get("channels", data.channels)
    return sample_shape(channels, size, data.video_frames)


def _point_shape(settings: Settings) -> tuple[int, ...] | None:
    """The shape that the network is fed, as far as the configuration tells."""
    pixels = _pixel_shape(settings)
    if pixels is None or not settings.use_latent:
        return pixels
    if not _is_autoencoder(settings.codec):
        return None
    try:
        return _latent_size(settings.codec).shape(pixels)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"data.image_size of data={settings.data.name}: {error}") from error


def _check_shapes(settings: Settings) -> None:
    given, read = _point_shape(settings), model_shape(settings.model)
    if given is None or read is None or given == read:
        return
    what = "latents" if settings.use_latent else "samples"
    raise SettingsError(
        f"data={settings.data.name} has {what} of shape {given}, model={settings.model.get('name')} reads {read}: "
        f"choose another pair, or set model.in_channels={given[-3]} model.img_dim="
        + (f"{given[-1]}" if given[-1] == given[-2] else f"[{given[-2]},{given[-1]}]")
    )


def _check_conditions(settings: Settings) -> None:
    data, model = settings.data, settings.model
    if model.get("has_text") and data.has_text and model.get("d_context") != data.d_context:
        raise SettingsError(
            f"model.d_context={model.get('d_context')} and data.d_context={data.d_context} differ: "
            "text tokens have one width"
        )
    classes = model.get("num_classes", -1)
    if isinstance(classes, int) and 0 < classes < (data.num_classes or 0) and not model.get("has_text"):
        raise SettingsError(
            f"data={data.name} has {data.num_classes} classes, model.num_classes is {classes}: "
            f"set model.num_classes={data.num_classes}"
        )


def _check_variance(settings: Settings) -> None:
    model, process = settings.model, target("process", settings.process)
    if getattr(process, "reads_variance", False):
        return
    if model.get("learn_sigma") and not model.get("drop_sigma"):
        raise SettingsError(
            f"model={model.get('name')} predicts a variance (model.learn_sigma=true), which the process "
            f"{process.__name__} does not read: set model.learn_sigma=false, or choose another process="
        )
