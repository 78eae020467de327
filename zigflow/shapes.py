"""The shape of one sample and of its tokens, for models and for configurations that no model was built from yet."""

from collections.abc import Mapping
from typing import Any

__all__ = ["data_form", "frames_of", "model_shape", "sample_shape", "sides", "token_grid"]


def sides(size: Any) -> tuple[int, int] | None:
    """(H, W) of a side or of a pair of sides; None for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        return None
    return pair[0], pair[1]


def sample_shape(channels: Any, size: Any, frames: Any = 0) -> tuple[int, ...] | None:
    """(C, H, W) of an image, (T, C, H, W) of a video with ``frames`` > 0; None where a part is not known.

    Args:
        size: a side or (H, W).
    """
    found = sides(size)
    if found is None or not isinstance(channels, int):
        return None
    return (*((frames,) if frames and frames > 0 else ()), channels, *found)


def frames_of(shape: tuple[int, ...]) -> int:
    """T of a sample's shape (T, C, H, W); 0 of an image's, (C, H, W)."""
    return shape[0] if len(shape) == 4 else 0


def model_shape(node: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The sample that a model reads by its node of a configuration, as far as the node says."""
    return sample_shape(node.get("in_channels"), node.get("img_dim"), node.get("video_frames"))


def data_form(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``data`` by which data fit a model's node of a configuration: its frames and classes."""
    return {"video_frames": node.get("video_frames") or 0, "num_classes": node.get("num_classes", -1)}


def token_grid(node: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(T, h, w) in tokens by a model's node of a configuration, T = 1 for images; None where the node does not say."""
    found, patch = sides(node.get("img_dim")), node.get("patch_size")
    if found is None or not isinstance(patch, int) or patch < 1:
        return None
    return max(node.get("video_frames") or 0, 1), found[0] // patch, found[1] // patch
