"""The Stable-Diffusion autoencoder in the layout of CompVis (``autoencoder_kl.pth``), as weights for diffusers.

Rombach et al., "High-resolution image synthesis with latent diffusion models" (CVPR 2022). The network is diffusers'
``AutoencoderKL``, which the codec uses anyway: it computes the same function, so that a second implementation here
would only be one more to test. What differs are the names, the order of the decoder's levels, and the attention's
weights, 1 x 1 convolutions there and matrices here. This file maps them, and needs no diffusers itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["diffusers_layout", "diffusers_weights", "read_autoencoder"]

_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.(conv\..+))"
)
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])\.(.+)|attn_1\.(\w+)\.(weight|bias))")


def diffusers_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of diffusers' ``AutoencoderKL`` for weights in CompVis names, read off their shapes.

    The groups of the group norms, which no shape tells, are 32 as in all published ones.

    Raises:
        ValueError: these are no weights of such an autoencoder.
    """
    try:
        levels = 1 + max(int(m[2]) for m in map(_LEVEL.fullmatch, state_dict) if m and m[1] == "encoder.down")
        depth = 1 + max(
            int(m[3]) for m in map(_LEVEL.fullmatch, state_dict) if m and m[1] == "encoder.down" and m[3]
        )
        widths = tuple(
            state_dict[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        )
        return {
            "in_channels": state_dict["encoder.conv_in.weight"].shape[1],
            "out_channels": state_dict["decoder.conv_out.weight"].shape[0],
            "latent_channels": state_dict["post_quant_conv.weight"].shape[1],
            "block_out_channels": widths,
            "layers_per_block": depth,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "norm_num_groups": 32,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            "these are no weights of a CompVis autoencoder (encoder.down.0.block.0.conv1.weight, ..., "
            f"post_quant_conv.bias); the first names are {sorted(map(str, state_dict))[:4]}"
        ) from error


def diffusers_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under diffusers' names.

    Raises:
        ValueError: a name that is not of a CompVis autoencoder.
    """
    levels = len(diffusers_layout(state_dict)["block_out_channels"])
    return {
        new: weight.flatten(1) if ".attentions." in new and weight.ndim == 4 else weight
        for new, weight in ((_renamed(key, levels), weight) for key, weight in state_dict.items())
    }


def _renamed(key: str, levels: int) -> str:
    part = key.partition(".")[0]
    if match := _LEVEL.fullmatch(key):
        _, level, block, rest, resample = match.groups()
        # The published decoder counts its levels from the image, diffusers from the latent.
        place = (
            f"encoder.down_blocks.{level}"
            if part == "encoder"
            else f"decoder.up_blocks.{levels - 1 - int(level)}"
        )
        if resample:
            return f"{place}.{'down' if part == 'encoder' else 'up'}samplers.0.{resample}"
        return f"{place}.resnets.{block}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
    if match := _MIDDLE.fullmatch(key):
        part, block, rest, weight, kind = match.groups()
        if block:
            return f"{part}.mid_block.resnets.{int(block) - 1}.{rest}"
        if weight in _ATTENTION:
            return f"{part}.mid_block.attentions.0.{_ATTENTION[weight]}.{kind}"
    if not key.startswith(_PREFIXES) or match:
        raise ValueError(f"{key!r} is no weight of a CompVis autoencoder")
    return key.replace("coder.norm_out.", "coder.conv_norm_out.")


def read_autoencoder(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keywords and weights for diffusers' ``AutoencoderKL`` out of a file of tensors in CompVis names.

    The file is read with ``weights_only=True`` and no type beside tensors: the published ones are plain state dicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds other things than tensors, or no autoencoder's weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A foreign file ends in errors of pickle, zip and torch.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):
            reason = "it holds more than tensors by name, or is damaged"  # Torch advises to unpickle it all the same.
        raise ValueError(f"{path} is refused as an autoencoder: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is refused as an autoencoder: it holds something else than tensors by name")
    try:
        return diffusers_layout(content), diffusers_weights(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
