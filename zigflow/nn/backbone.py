"""What the model families share: how they are described, checked, compiled, sharded and resized."""

from typing import Any

import torch
from torch import Tensor, nn

from zigflow.registry import unknown_name

from .conditioning import NO_NULL, null_condition
from .denoiser import DenoiserDefaults
from .patch import check_divisible
from .resizing import FREE_KEYWORDS, Resizing


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for the first that is less than 1, by its name."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, got {value}")


class Backbone(DenoiserDefaults, nn.Module):
    """Base of a model that predicts from (B, C, H, W) or (B, T, C, H, W), a time per sample, and a class or a text.

    A model calls :meth:`describe` first in its constructor and builds its parts. Its blocks are the list ``blocks``, or
    what ``named_blocks`` gives; a learned null text is its parameter ``null_text`` (S, d_context). The rest of what the
    engine asks (``zigflow.nn.Denoiser``) is answered here.
    """

    # For weights of another size, see zigflow.nn.resizing.
    position_tables: tuple[str, ...] = ("pos_embed",)
    position_mode = "bicubic"
    frame_tables: tuple[str, ...] = ()
    output_layers: tuple[str, ...] = ("final_layer.linear",)
    free_keywords: tuple[str, ...] = ()

    null_text: nn.Parameter | None

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
        has_text: bool = False,
        d_context: int = 0,
        n_context_token: int = 0,
        video_frames: int = 0,
        least_depth: int = 1,
    ) -> None:
        """Check what all models ask of these keywords and keep them; ``grid`` is (h, w) in tokens, of one frame.

        With text there are no classes: ``num_classes`` becomes -1.

        Raises:
            ValueError: values that exclude each other, named with what is allowed.
        """
        check_sizes(in_channels=in_channels, embed_dim=embed_dim)
        if depth < least_depth:
            raise ValueError(f"depth is at least {least_depth}, got {depth}")
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
        self.video_frames = max(video_frames, 0)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.grid = check_divisible(*self.img_dim, patch_size)
        self.class_dropout_prob = class_dropout_prob
        self.num_classes = -1 if has_text else num_classes
        self.has_text, self.d_context, self.n_context_token = has_text, d_context, n_context_token
        self.guided_channels = in_channels
        self.null_text = None

    @property
    def token_grid(self) -> tuple[int, int, int]:
        return (max(self.video_frames, 1), *self.grid)

    def extra_repr(self) -> str:
        reads = [
            f"sample_shape={self.sample_shape}",
            f"patch_size={self.patch_size}",
            f"tokens={self.token_grid}",
        ]
        if self.has_text:
            reads.append(f"text=({self.n_context_token}, {self.d_context})")
        elif self.num_classes > 0:
            reads.append(f"num_classes={self.num_classes}")
        if self.class_dropout_prob:
            reads.append(f"class_dropout_prob={self.class_dropout_prob}")
        if self.scan_name:
            reads.append(f"scan={self.scan_name}")
        return ", ".join(reads)

    def resizing(self) -> Resizing:
        return Resizing(
            grid=self.token_grid,
            patch_size=self.patch_size,
            positions=self.position_tables,
            mode=self.position_mode,
            frames=self.frame_tables,
            outputs=self.output_layers,
            keywords=(*FREE_KEYWORDS, *self.free_keywords),
        )

    @property
    def has_null(self) -> bool:
        return self.class_dropout_prob > 0

    def null_condition(self, y: Any) -> Any:
        """The condition that stands for "none" in guidance, built like ``y``: the null class, or the null text.

        Args:
            y: labels (B,), tokens (B, S, d_context), or a ``Condition``, of which the part that this model reads is
                replaced.

        Raises:
            ValueError: the model was built without a null row, or a ``Condition`` lacks the part that it reads.
        """
        if not self.has_null:
            raise ValueError(NO_NULL)
        return null_condition(y, self.num_classes, self.null_text)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y, cfg_scale: float = 1.5) -> Tensor:
        """The guided call on a doubled batch, as DiT and DiS publish it.

        Args:
            x: (2 B, C, H, W), or of videos (2 B, T, C, H, W); the first B rows are read, for both halves.
            t: (2 B,). y: the condition of B rows, then their null condition.
            cfg_scale: w in uncond + w (cond - uncond), on the first ``guided_channels`` channels.

        Returns:
            (2 B, out_channels, H, W): both halves hold the guided channels, and each its own of the others.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        channels = self.in_channels if self.guided_channels is None else self.guided_channels
        cond, uncond = out.narrow(-3, 0, channels).chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        rest = out.narrow(-3, channels, out.shape[-3] - channels)
        return torch.cat([torch.cat([guided, guided]), rest], dim=-3)

    def check_input(self, x: Tensor, t: Tensor) -> tuple[int, int]:
        """The token grid (h, w) of an input x (B, C, H, W), of a video's frame (B, T, C, H, W), at times t (B,).

        Raises:
            ValueError: another shape than the model reads, or no sample.
        """
        wanted = "(B, T, C, H, W)" if self.video_frames else "(B, C, H, W)"
        if x.dim() != (5 if self.video_frames else 4) or x.shape[-3] != self.in_channels:
            more = f" (video_frames={self.video_frames})" if x.dim() in (4, 5) else ""
            raise ValueError(
                f"this model reads {wanted} with C={self.in_channels}{more}, got {tuple(x.shape)}"
            )
        if x.shape[0] == 0:
            raise ValueError(f"a batch of 0 samples (x has shape {tuple(x.shape)}); give at least one")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must hold one time per sample, shape ({x.shape[0]},), got {tuple(t.shape)}")
        return check_divisible(x.shape[-2], x.shape[-1], self.patch_size)

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
