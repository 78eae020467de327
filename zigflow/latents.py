"""The size of an autoencoder's latents, known from its folder before anything is loaded; torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path

_FILE_SUFFIXES = (".pth", ".pt", ".ckpt")


def is_checkpoint_file(path: str | Path) -> bool:
    """Whether ``codec.path`` names one file of weights, and not a folder."""
    return Path(path).suffix in _FILE_SUFFIXES and not Path(path).is_dir()


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
        file = Path(path) / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            return cls(int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is no folder of a diffusers AutoencoderKL: there is no config.json in it"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not describe a diffusers AutoencoderKL: {error!r}") from error

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
