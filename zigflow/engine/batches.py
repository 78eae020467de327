"""What the training loop takes out of a batch, and what it prepares in a model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zigflow.nn import as_denoiser

__all__ = ["condition", "flipped", "prepare_blocks"]


def flipped(batch: Any, draws: Any) -> Any:
    """The batch with the pixels of some samples mirrored left to right, each by a keyed draw with probability 1/2.

    The frames of a video go together.

    Args:
        draws: keyed draws of the batch's samples.

    Raises:
        ValueError: the batch has no pixels; the latents of a mirrored image are not mirrored latents.
    """
    pixels: Tensor | None = batch.pixels
    if pixels is None:
        raise ValueError("random_flip mirrors pixels, and the batch holds none: set data.random_flip=false")
    turned_B = draws.uniform("train.flip") < 0.5
    turned = turned_B.reshape(-1, *(1,) * (pixels.ndim - 1)).to(pixels.device)
    return replace(batch, pixels=torch.where(turned, pixels.flip(-1), pixels))


def condition(batch: Any, model: nn.Module, draws: Any) -> Any:
    """What the model is conditioned on.

    A batch may bring a finished ``condition``; else a text model (``has_text``) gets the tokens, one caption
    of each sample picked by keyed draw when there are several, and any other model the labels.

    Args:
        draws: keyed draws of the batch's samples.

    Returns:
        Labels (B,), tokens (B, L, D), whatever ``batch.condition`` is, or None.

    Raises:
        ValueError: a text model and a batch without tokens.
    """
    ready = getattr(batch, "condition", None)
    if ready is not None:
        return ready
    if not as_denoiser(model).has_text:
        return batch.labels
    tokens: Tensor | None = batch.tokens
    if tokens is None:
        raise ValueError(
            "the model reads text and the batch has no tokens; give the source a caption-feature key"
        )
    if tokens.ndim == 4:
        choice = draws.integers("train.caption", tokens.shape[1])
        tokens = tokens[torch.arange(tokens.shape[0], device=tokens.device), choice]
    return tokens


def prepare_blocks(model: nn.Module, policy: str, compiled: bool) -> None:
    """Checkpoint policy first, then compilation in place, so that no parameter is renamed.

    Raises:
        ValueError: the model has no blocks that keep a policy, or none to compile.
    """
    asked = as_denoiser(model)
    if policy != "none":
        asked.set_checkpoint_policy(policy)
    if compiled:
        asked.compile_blocks()
