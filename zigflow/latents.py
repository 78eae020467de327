"""What an autoencoder's folder says of its latents, before anything is loaded: their size and scale; torch-free."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt")


# That of Stable Diffusion 1 and 2, and what diffusers takes where a config.json does not say.
DEFAULT_SCALE = 0.18215


def is_checkpoint_file(path: str | Path) -> bool:
    """Whether ``codec.path`` names one file of weights, and not a folder."""
    return Path(path).suffix in _FILE_SUFFIXES and not Path(path).is_dir()


def _read_config(path: str | Path) -> Mapping[str, Any]:
    """``config.json`` of a diffusers AutoencoderKL.

    Raises:
        ValueError: there is none in the folder, it is damaged, or that of another class.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is no folder of a diffusers AutoencoderKL: there is no config.json in it"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} does not describe a diffusers AutoencoderKL: {error!r}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} does not describe a diffusers AutoencoderKL: it holds no keys")
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"{file} describes a diffusers {name}; an AutoencoderKL is needed")
    return config


@dataclass(frozen=True)
class LatentScale:
    """How an autoencoder's latents z become what a network is trained on, and back.

    ``x = (z - shift) * scale``, with statistics ``x = (z - mean) / std * scale`` per channel: as the pipelines of
    diffusers apply ``scaling_factor``, ``shift_factor``, ``latents_mean`` and ``latents_std`` of a ``config.json``.
    """

    scale: float = DEFAULT_SCALE
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale must be positive, got {self.scale!r}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be finite, got {self.shift!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("latents_mean and latents_std belong together: give both, or none")
        if self.mean is None or self.std is None:
            return
        if self.shift:
            raise ValueError(
                f"a shift ({self.shift}) and per-channel statistics (latents_mean) exclude each other"
            )
        if len(self.mean) != len(self.std) or not all(s > 0 and math.isfinite(s) for s in self.std):
            raise ValueError(
                f"latents_std must be {len(self.mean)} positive numbers, as many as latents_mean has"
            )
        if not all(map(math.isfinite, self.mean)):
            raise ValueError("latents_mean must be finite")

    @classmethod
    def of(
        cls,
        path: str | Path | None,
        *,
        scale: float | None = None,
        shift: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        own_scale: bool | None = None,
    ) -> "LatentScale":
        """What the folder's ``config.json`` says, held against what is stated.

        Without a folder, and for a file of weights (CompVis), nothing is said: what is stated stands, beside the scale
        of Stable Diffusion 1 and 2. A shift that is stated, 0 included, says that there are no statistics.

        Args:
            own_scale: what is stated is meant, whatever the folder says.

        Raises:
            ValueError: what is stated contradicts the folder, key and both values named; or it says nothing that could
                be applied; or ``own_scale`` without anything stated.
        """
        stated = {
            "scale": scale,
            "shift": shift,
            "mean": None if latents_mean is None else tuple(map(float, latents_mean)),
            "std": None if latents_std is None else tuple(map(float, latents_std)),
        }
        given = {key: value for key, value in stated.items() if value is not None}
        if own_scale and not given:
            raise ValueError(
                "own_scale=true keeps the scale that is stated, and none is: give scale, or drop own_scale and take "
                "what the autoencoder says"
            )
        if path is None or is_checkpoint_file(path) or own_scale:
            return cls(**given)
        said = _said_by(path)
        for key, value in given.items():
            # A config that leaves its factor out says nothing; what else it leaves out is not applied.
            theirs = said.get(key, value if key == "scale" else getattr(cls(), key))
            if not _close(value, theirs):
                raise ValueError(_contradiction(key, value, _NAMES[key], theirs, path))
        if shift is not None and "mean" in said:
            raise ValueError(_contradiction("shift", shift, "latents_mean", said["mean"], path))
        return cls(**{**said, **given})

    def node(self) -> dict[str, Any]:
        """As keywords of ``of`` and of the codec, all of them stated."""
        lists = {
            f"latents_{key}": None if value is None else list(value)
            for key, value in (("mean", self.mean), ("std", self.std))
        }
        return {"scale": self.scale, "shift": None if self.mean else self.shift, **lists}


_NAMES = {
    "scale": "scaling_factor",
    "shift": "shift_factor",
    "mean": "latents_mean",
    "std": "latents_std",
}


def _said_by(path: str | Path) -> dict[str, Any]:
    config = _read_config(path)
    said = {ours: config[theirs] for ours, theirs in _NAMES.items() if config.get(theirs) is not None}
    try:
        for key, value in said.items():
            said[key] = tuple(map(float, value)) if key in ("mean", "std") else float(value)
        found = LatentScale(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}/config.json: {error}") from error
    channels = config.get("latent_channels")
    if found.mean is not None and channels is not None and len(found.mean) != channels:
        raise ValueError(
            f"{path}/config.json: latents_mean has {len(found.mean)} entries, latent_channels is {channels}"
        )
    return said


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) or isinstance(other, tuple):
        same = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
        return same and all(map(_close, one, other))
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)


def _contradiction(key: str, value: Any, name: str, theirs: Any, path: str | Path) -> str:
    key = f"codec.{_NAMES[key] if key in ('mean', 'std') else key}"
    value, theirs = (list(v) if isinstance(v, tuple) else v for v in (value, theirs))
    return (
        f"{key}={value} contradicts the autoencoder {path}, whose config.json says {name}={theirs}: drop {key}, give "
        "the autoencoder that it belongs to, or codec.own_scale=true for a model that is trained so"
    )


@dataclass(frozen=True)
class LatentSize:
    """How an autoencoder turns (3, H, W) into (channels, H / factor, W / factor)."""

    channels: int = 4
    factor: int = 8

    @classmethod
    def of(cls, path: str | Path | None) -> "LatentSize":
        """Read from ``config.json`` of a diffusers AutoencoderKL.

        Without a folder, and for a file of weights (CompVis), that of Stable Diffusion 1 and 2.

        Raises:
            ValueError: the folder has no such file, or the file does not say; there is no file of weights.
        """
        if path is None:
            return cls()
        if is_checkpoint_file(path):
            if not Path(path).is_file():
                raise ValueError(f"there is no file {path}")
            return cls()
        config = _read_config(path)
        try:
            return cls(int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}/config.json does not describe a diffusers AutoencoderKL: {error!r}"
            ) from error

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., C, H, W) of the pixels to (..., channels, H / factor, W / factor).

        Raises:
            ValueError: height or width is not divisible by the factor.
        """
        *lead, _, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height} x {width} cannot be encoded: both sides must be divisible by {self.factor}"
            )
        return (*lead, self.channels, height // self.factor, width // self.factor)
