"""What the models of images with classes or text share: how they are described, checked, compiled and sharded."""

import torch
from torch import Tensor, nn

from zigflow.registry import unknown_name

from .checkpointing import CHECKPOINT_POLICIES
from .compilation import compile_in_place
from .conditioning import NO_NULL, null_condition
from .patch import check_divisible


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for the first that is less than 1, by its name."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")


class Backbone(nn.Module):
    """Base of a model that predicts from (B, C, H, W), a time per sample, and a class or a text.

    A model calls :meth:`describe` first in its constructor, builds its parts, and lists its blocks in
    ``named_blocks``. A learned null text is its parameter ``null_text`` (S, d_context).
    """

    video_frames = 0
    guided_channels: int

    def describe(
        self,
        *,
        in_channels: int,
        img_dim: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_classes: int,
        class_dropout_prob: float,
        has_text: bool,
        d_context: int,
        n_context_token: int,
    ) -> None:
        """Check what all models ask of these keywords and keep them; ``grid`` is (h, w) in tokens.

        With text there are no classes: ``num_classes`` becomes -1.

        Raises:
            ValueError: values that exclude each other, named with what is allowed.
        """
        check_sizes(in_channels=in_channels, embed_dim=embed_dim)
        if depth < 0:
            raise ValueError(f"depth is at least 0, got {depth}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob lies in [0, 1), got {class_dropout_prob}")
        if has_text and d_context <= 0:
            raise ValueError(f"has_text=True needs d_context > 0, the width of a text token, got {d_context}")
        if class_dropout_prob > 0 and num_classes <= 0 and not has_text:
            raise ValueError(
                f"class_dropout_prob={class_dropout_prob} needs a condition to drop: set num_classes or has_text, or "
                "class_dropout_prob=0"
            )
        self.in_channels = in_channels
        self.img_dim = (img_dim, img_dim) if isinstance(img_dim, int) else (int(img_dim[0]), int(img_dim[1]))
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.grid = check_divisible(*self.img_dim, patch_size)
        self.class_dropout_prob = class_dropout_prob
        self.num_classes = -1 if has_text else num_classes
        self.has_text, self.d_context, self.n_context_token = has_text, d_context, n_context_token

    def named_blocks(self) -> dict[str, nn.Module]:
        """Every block by its name in the state dict, in the order in which they run."""
        raise NotImplementedError(f"{type(self).__name__} lists its blocks in named_blocks()")

    def set_checkpoint_policy(self, policy: str) -> None:
        """none, block or selective; may change at any time, also on resume.

        Raises:
            UnknownNameError: another policy.
        """
        if policy not in CHECKPOINT_POLICIES:
            raise unknown_name("checkpoint policy", policy, list(CHECKPOINT_POLICIES))
        for block in self.named_blocks().values():
            block.checkpoint_policy = policy  # type: ignore[assignment]

    def shard_units(self) -> list[nn.Module]:
        """What may be sharded apart."""
        return list(self.named_blocks().values())

    def compile_blocks(self, **options) -> None:
        """Compile each block in place; keys of the state dict stay as they are."""
        compile_in_place(self.named_blocks().values(), **options)

    def null_condition(self, y):
        """The condition that stands for "none" in guidance, built like ``y``: the null class, or the null text.

        Args:
            y: labels (B,), tokens (B, S, d_context), or a ``Condition``, of which the part that this model reads is
                replaced.

        Raises:
            ValueError: the model was built without a null row, or a ``Condition`` lacks the part that it reads.
        """
        if self.class_dropout_prob <= 0:
            raise ValueError(NO_NULL)
        return null_condition(y, self.num_classes, getattr(self, "null_text", None))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y, cfg_scale: float = 1.5) -> Tensor:
        """The guided call on a doubled batch, as DiT and DiS publish it.

        Args:
            x: (2 B, C, H, W), of which the first B rows are read, for both halves.
            t: (2 B,). y: the condition of B rows, then their null condition.
            cfg_scale: w in uncond + w (cond - uncond), on the first ``guided_channels`` channels.

        Returns:
            (2 B, out_channels, H, W): both halves hold the guided channels, and each its own of the others.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out[:, : self.guided_channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, self.guided_channels :]], dim=1)

    def check_input(self, x: Tensor, t: Tensor) -> tuple[int, int]:
        """The token grid (h, w) of an input x (B, C, H, W) at times t (B,).

        Raises:
            ValueError: another shape than the model reads, or no sample.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"this model reads (B, C, H, W) with C={self.in_channels}, got {tuple(x.shape)}")
        if x.shape[0] == 0:
            raise ValueError(f"a batch of 0 samples (x has shape {tuple(x.shape)}); give at least one")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must hold one time per sample, shape ({x.shape[0]},), got {tuple(t.shape)}")
        return check_divisible(x.shape[2], x.shape[3], self.patch_size)

    def with_features(self, out: Tensor, features: dict[str, Tensor], wanted: tuple[str, ...]):
        """``out``, and with ``wanted`` names the features beside it.

        Raises:
            UnknownNameError: a name that is no block's.
        """
        if not wanted:
            return out
        missing = [name for name in wanted if name not in features]
        if missing:
            raise unknown_name("feature", missing[0], list(self.named_blocks()))
        return out, features
