"""Between pixels and what the network sees; the only owner of the latent scale.

Legend: B batch, C channels, H height, W width, h and w of the latents; video has T frames after B.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from zigflow.compvis import read_autoencoder
from zigflow.errors import needs
from zigflow.keyed import current_draws
from zigflow.latents import LatentScale, LatentSize, is_checkpoint_file
from zigflow.registry import Registry

__all__ = ["CODECS", "AutoencoderKLCodec", "Codec", "IdentityCodec", "to_uint8"]

_LOG_VARIANCES = (-30.0, 20.0)


class Codec(Protocol):
    """What the engine asks of a codec.

    A class may also say ``is_identity = True`` (values stay as they are, up to ``scale``), or ``is_autoencoder = True``
    (it has the keywords of :class:`AutoencoderKLCodec`, whose ``path`` says the latents' shape and scale).
    """

    def encode(self, batch: Any) -> Tensor:
        """The data point x1 of a batch: (B,C,h,w) or (B,T,C,h,w), scaled. ``batch`` has pixels, latents or moments."""
        ...

    def decode(self, x_BChw: Tensor) -> Tensor:
        """Pixels (B,C,H,W) or (B,T,C,H,W), nominally in [-1, 1], unclamped."""
        ...


CODECS: Registry[Callable[..., Codec]] = Registry("codec")
"""What ``codec=NAME`` names beside the files of ``config/codec``: classes built with the keywords of the node."""


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to grey levels: ``127.5 x + 128`` clamped to [0, 255], then cut to an integer.

    This is the official rule of DiT, SiT and ZigMa. The cut after adding 128 rounds to the nearest level of
    ``127.5 x + 127.5``; -1 maps to 0, 0 to 128, 1 to 255. Non-finite pixels are an error, not a grey level.

    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    if not torch.isfinite(pixels).all():
        raise ValueError(
            "the decoded images hold NaN or infinite pixels: the model, the sampler or its step is at fault"
        )
    return (pixels.float() * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8)


def _stored(batch: Any, posterior: str = "sample") -> Tensor | None:
    """The latents of a batch that brings them, or the moments that they are drawn from; unscaled."""
    moments = getattr(batch, "moments", None)
    if moments is None:
        return getattr(batch, "latents", None)
    mean, log_variance = moments.chunk(2, dim=-3)
    if posterior == "mode":
        return mean
    return mean + (0.5 * log_variance.clamp(*_LOG_VARIANCES)).exp() * _noise(mean)


def _noise(like: Tensor) -> Tensor:
    """Normals by the ambient keyed draws, or by torch's generator where there are none.

    The purpose is one, so that a latent is the same whether its moments were stored or have just been computed.
    """
    draws = current_draws()
    return (
        torch.randn_like(like)
        if draws is None
        else draws.normal("codec.encode", tuple(like.shape[1:])).to(like)
    )


@CODECS.register("pixels")
class IdentityCodec:
    """The network sees pixels, or stored latents as they are (or drawn from their moments), times ``scale``.

    Args:
        scale: x1 = scale * pixels; decoding divides.

    Raises:
        ValueError: ``scale`` is not positive.
    """

    is_identity = True

    def __init__(self, scale: float = 1.0):
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale!r}")
        self.scale = scale

    def encode(self, batch: Any) -> Tensor:
        x = batch.pixels if batch.pixels is not None else _stored(batch)
        if x is None:
            raise ValueError(
                "the batch has neither pixels nor latents; give the data source an image or latent key"
            )
        return x if self.scale == 1.0 else x * self.scale

    def decode(self, x_BChw: Tensor) -> Tensor:
        return x_BChw if self.scale == 1.0 else x_BChw / self.scale


@CODECS.register("sd_vae")
class AutoencoderKLCodec:
    """Latents of a Stable-Diffusion autoencoder (Rombach et al., CVPR 2022), through diffusers.

    Stored latents are unscaled, as ZigMa's shards hold them, and only need the scale; pixels are encoded.

    Args:
        path: local directory of a diffusers ``AutoencoderKL``, or a file of the published CompVis layout such as
            ``autoencoder_kl.pth`` (see ``zigflow.compvis``); nothing is downloaded. None serves training on stored
            latents, which needs no autoencoder, and nothing else.
        scale, shift, latents_mean, latents_std: x1 = (latents - shift) * scale, with statistics
            (latents - mean) / std * scale per channel. None is what the folder's ``config.json`` says; without a folder
            0.18215, that of Stable Diffusion 1 and 2, and neither shift nor statistics. What contradicts the folder is
            an error.
        own_scale: what is stated is meant, whatever the folder says.
        posterior: ``sample`` draws the latent with the ambient keyed draws (torch's generator without any), of pixels
            and of stored moments; ``mode`` takes its mean.
        chunk: images that are encoded or decoded at a time.

    Raises:
        MissingPackageError: diffusers is missing; the extra to install is named.
        ValueError: an unknown ``posterior``, a ``scale`` that is not positive or contradicts the folder, a folder or
            file without an autoencoder.
    """

    is_autoencoder = True

    def __init__(
        self,
        path: str | None = None,
        *,
        scale: float | None = None,
        shift: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        own_scale: bool | None = None,
        posterior: str = "sample",
        chunk: int = 16,
    ):
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior must be 'sample' or 'mode', got {posterior!r}")
        self.latent_scale = LatentScale.of(
            path,
            scale=scale,
            shift=shift,
            latents_mean=latents_mean,
            latents_std=latents_std,
            own_scale=own_scale,
        )
        self.posterior = posterior
        self.chunk = chunk
        self._vae = None if path is None else _load(path)

    def to(self, device: torch.device | str) -> "AutoencoderKLCodec":
        """Move the autoencoder; in place."""
        if self._vae is not None:
            self._vae.to(device)
        return self

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of an image (C,H,W) or a video (T,C,H,W).

        Raises:
            ValueError: height or width is not divisible by the autoencoder's factor.
        """
        config = None if self._vae is None else self._vae.config
        size = (
            LatentSize()
            if config is None
            else LatentSize(config.latent_channels, 2 ** (len(config.block_out_channels) - 1))
        )
        return size.shape(image_shape)

    @property
    def scale(self) -> float:
        return self.latent_scale.scale

    def _scaled(self, z_BChw: Tensor) -> Tensor:
        by = self.latent_scale
        if by.mean is not None:
            z_BChw = (z_BChw - _per_channel(by.mean, z_BChw)) / _per_channel(by.std, z_BChw)
        elif by.shift:
            z_BChw = z_BChw - by.shift
        return z_BChw * by.scale

    def _unscaled(self, x_BChw: Tensor) -> Tensor:
        by = self.latent_scale
        z_BChw = x_BChw / by.scale
        if by.mean is not None:
            return z_BChw * _per_channel(by.std, z_BChw) + _per_channel(by.mean, z_BChw)
        return z_BChw + by.shift if by.shift else z_BChw

    def _autoencoder(self, what: str) -> Any:
        if self._vae is None:
            raise ValueError(
                f"{what} needs the autoencoder: give codec.path=FOLDER, the folder of a diffusers AutoencoderKL, "
                "or the file autoencoder_kl.pth"
            )
        return self._vae

    @torch.no_grad()
    def encode(self, batch: Any) -> Tensor:
        stored = _stored(batch, self.posterior)
        if stored is not None:
            return self._scaled(stored)
        if batch.pixels is None:
            raise ValueError(
                "the batch has neither pixels nor latents; give the data source an image or latent key"
            )
        vae = self._autoencoder("encoding pixels")
        pixels, lead = _fold(batch.pixels)
        posteriors = [vae.encode(part).latent_dist for part in pixels.split(self.chunk)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
        mean, std = (value.reshape(*lead, *mean.shape[1:]) for value in (mean, std))
        latents = mean if self.posterior == "mode" else mean + std * _noise(mean)
        return self._scaled(latents)

    @torch.no_grad()
    def decode(self, x_BChw: Tensor) -> Tensor:
        vae = self._autoencoder("decoding latents")
        latents, lead = _fold(self._unscaled(x_BChw))
        pixels = torch.cat([vae.decode(part).sample for part in latents.split(self.chunk)])
        return pixels.reshape(*lead, *pixels.shape[1:])


def _load(path: str) -> Any:
    with needs("diffusers", "the autoencoder codec", extra="codec"):
        from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]  # made at use
    if is_checkpoint_file(path):
        layout, weights = read_autoencoder(path)
        vae: Any = AutoencoderKL(**layout)
        try:
            # Strict, so that no weight stays as it was drawn.
            vae.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not hold all of an autoencoder's weights: {reason}") from error
    else:
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True)
    return vae.eval().requires_grad_(False)


def _per_channel(values: Any, like: Tensor) -> Tensor:
    """(C,) as (C, 1, 1); latents of another number of channels are an error."""
    if len(values) != like.shape[-3]:
        raise ValueError(
            f"latents have {like.shape[-3]} channels, the autoencoder's statistics {len(values)}"
        )
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _fold(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Frames into the batch: (B,T,C,H,W) -> (B T,C,H,W); also the leading sizes to undo it."""
    return (x, (x.shape[0],)) if x.ndim == 4 else (x.flatten(0, 1), (x.shape[0], x.shape[1]))
