"""U-ViT: a transformer that takes time, condition and patches as tokens alike, with long skip connections.

Paper: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023, arXiv:2209.12152.

The tensor story: an image (B, C, H, W) becomes patch tokens; before them stand the time token and one label token
([label, time, patches]) or the projected text tokens ([time, text, patches]). A learned table is added to all of
them. depth // 2 blocks keep their outputs, a middle block follows, and depth // 2 blocks each join the latest kept
output by a linear layer. Norm, linear head and a 3 x 3 convolution give (B, C, H, W).

Differences from the published code:
  - keyword names are the project's (``img_dim``, ``in_channels``, ``has_text``); zigflow.official translates;
  - ``num_classes`` counts classes, and ``class_dropout_prob`` > 0 adds the null class as one more row, dropped to in
    the model (the published table counts the null class, and its data sets drop the labels);
  - a dropped text is a learned null text, which may be set to the encoding of the empty prompt, as published;
  - attention runs in the dtype of its inputs, not in float32; weights in bfloat16 work without autocast;
  - grids need not be square, and other sizes than the one built for are accepted (positions are interpolated);
  - ``qk_norm`` and ``rope`` are options, off by default.

Legend: B batch, C channels, H W image, h w token grid, L tokens with the extra ones, D width, S context tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zigflow.nn import (
    LayerNorm,
    Mlp,
    PatchEmbed,
    SelfAttention,
    axial_rotations,
    interpolate_positions,
    read_labels,
    read_text,
    sinusoidal_embedding,
    time_mlp,
    unpatchify,
)
from zigflow.nn.backbone import Backbone
from zigflow.nn.checkpointing import CheckpointedBlock
from zigflow.nn.skip_tuning import SkipTuning

from .variants import register_variant


class UViTBlock(CheckpointedBlock):
    """Join the skipped tokens, if it is a block with ``skip``; then self-attention and an MLP, pre-normed."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool, qk_norm: bool, **factory
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, **factory)
        self.attn = SelfAttention(dim, heads, qkv_bias, qk_norm, **factory)
        self.norm2 = LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.skip_linear = nn.Linear(2 * dim, dim, **factory) if skip else None

    def layer(
        self,
        x_BLD: Tensor,
        skip_BLD: Tensor | None = None,
        rotations: Tensor | None = None,
        mask_BL: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if self.skip_linear is not None and skip_BLD is not None:
            x_BLD = self.skip_linear(torch.cat([x_BLD, skip_BLD], dim=-1))
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD).to(x_BLD.dtype), rotations, mask_BL)
        return x_BLD + self.mlp(self.norm2(x_BLD).to(x_BLD.dtype))


class UViT(SkipTuning, Backbone):
    """The U-ViT backbone.

    Args:
        in_channels, img_dim, patch_size: the input; ``img_dim`` is a side or (height, width).
        embed_dim, depth, num_heads, mlp_ratio: width D, depth, heads, hidden width of the MLP over D; there are
            2 (depth // 2) + 1 blocks, an odd number.
        qkv_bias, mlp_time_embed, conv, skip: a bias of queries, keys and values; Linear, SiLU, Linear on the time
            token; the last convolution; the long skip connections.
        num_classes: > 0 for a label token. ``class_dropout_prob`` > 0 adds the null class, and drops labels in
            training.
        has_text, d_context, n_context_token: S = n_context_token text tokens (B, S, d_context), which replace the
            label. ``class_dropout_prob`` > 0 adds a learned null text, and drops texts in training.
        qk_norm: RMS norm of each head's queries and keys. rope: rotary positions of the patches, beside the table.
        use_checkpoint: recompute each block in the backward pass (policy "block").

    Raises:
        ValueError: values that exclude each other, named with what is allowed.
    """

    # Flow times lie in [0, 1]; the sinusoid of the time token is made for 0..1000.
    time_scale = 1000.0
    output_layers = ("decoder_pred",)

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        img_dim: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        conv: bool = True,
        skip: bool = True,
        class_dropout_prob: float = 0.0,
        has_text: bool = False,
        d_context: int = 0,
        n_context_token: int = 0,
        qk_norm: bool = False,
        rope: bool = False,
        use_checkpoint: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.describe(
            in_channels=in_channels, img_dim=img_dim, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_classes=num_classes, class_dropout_prob=class_dropout_prob, has_text=has_text, d_context=d_context,
            n_context_token=n_context_token, least_depth=0,
        )  # fmt: skip
        if has_text and n_context_token <= 0:
            raise ValueError(
                f"has_text=True needs n_context_token > 0, the number of text tokens, got {n_context_token}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_channels = in_channels
        self.rope = rope
        self.extras = 1 + (n_context_token if has_text else int(num_classes > 0))

        tokens = self.extras + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **factory))
        if has_text and class_dropout_prob > 0:
            self.null_text = nn.Parameter(torch.zeros(n_context_token, d_context, **factory))
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        self.time_embed = time_mlp(embed_dim, **factory) if mlp_time_embed else nn.Identity()
        if has_text:
            self.context_embed = nn.Linear(d_context, embed_dim, **factory)
        elif num_classes > 0:
            self.label_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), embed_dim, **factory)

        def block(joins: bool) -> UViTBlock:
            return UViTBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, joins, qk_norm, **factory)

        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.skip = skip
        self.head_dim = embed_dim // num_heads
        if rope:  # refuses heads whose width cannot be turned
            axial_rotations(self.grid, self.grid, self.head_dim, device="meta")
        self.norm = LayerNorm(embed_dim, **factory)
        self.decoder_pred = nn.Linear(embed_dim, patch_size * patch_size * in_channels, **factory)
        self.final_layer = (
            nn.Conv2d(in_channels, in_channels, 3, padding=1, **factory) if conv else nn.Identity()
        )
        self.set_checkpoint_policy("block" if use_checkpoint else "none")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialization: truncated normals; convolutions and label rows keep PyTorch's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.null_text is not None:
            nn.init.trunc_normal_(self.null_text, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def named_blocks(self) -> dict[str, nn.Module]:
        named: list[tuple[str, nn.Module]] = [
            (f"in_blocks.{i}", block) for i, block in enumerate(self.in_blocks)
        ]
        named.append(("mid_block", self.mid_block))
        named += [(f"out_blocks.{i}", block) for i, block in enumerate(self.out_blocks)]
        return dict(named)

    def _tokens(self, x: Tensor, t: Tensor, y) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """All tokens (B, L, D) with positions, what may be read of them (B, L) or None, and the grid (h, w)."""
        batch, grid = x.shape[0], self.check_input(x, t)
        dtype = self.pos_embed.dtype
        patches = self.patch_embed(x.to(dtype))
        time = self.time_embed(sinusoidal_embedding(t, self.embed_dim).to(dtype)).unsqueeze(1)
        parts, mask = [time, patches], None
        if self.has_text:
            context, mask = read_text(
                y, batch, self.d_context, self.null_text, self.class_dropout_prob, self.training
            )
            if context.shape[1] != self.n_context_token:
                raise ValueError(
                    f"this model reads texts of n_context_token={self.n_context_token} tokens, got {context.shape[1]}"
                )
            parts = [time, self.context_embed(context.to(dtype)), patches]
        elif self.num_classes > 0:
            labels = read_labels(y, batch, self.num_classes, self.class_dropout_prob, self.training, x.device)
            parts = [self.label_emb(labels).unsqueeze(1), time, patches]
        if mask is not None:
            mask = nn.functional.pad(mask, (1, 0), value=True)
            mask = nn.functional.pad(mask, (0, patches.shape[1]), value=True)
        table = interpolate_positions(self.pos_embed, (1, *self.grid), (1, *grid), extras=self.extras)
        return torch.cat(parts, dim=1) + table, mask, grid

    def forward(self, x: Tensor, t: Tensor, y=None, return_features: tuple[str, ...] = ()):
        """Predict from a noisy image.

        Args:
            x: (B, C, H, W); H and W multiples of the patch size.
            t: (B,) times as the process feeds them, 0..1000.
            y: labels (B,), tokens (B, S, d_context), a ``Condition``, or None.
            return_features: names of blocks ("in_blocks.0", "mid_block", "out_blocks.0", ...) for their outputs,
                (B, L, D) with the extra tokens first.

        Returns:
            The prediction, shaped like ``x``; with ``return_features`` also a dict of features.
        """
        hidden, mask, grid = self._tokens(x, t, y)
        rotations = None
        if self.rope:
            rotations = axial_rotations(self.grid, grid, self.head_dim, self.extras, device=x.device)
        features, kept = {}, []
        weights = self.skip_weights(t, len(self.out_blocks))
        for name, block in self.named_blocks().items():
            joined = kept.pop() if self.skip and name.startswith("out_") else None
            if joined is not None and (weight := weights.pop(0)) is not None:
                joined = joined * weight[:, None, None].to(joined.dtype)
            hidden = block(hidden, joined, rotations, mask)
            if name.startswith("in_"):
                kept.append(hidden)
            if name in return_features:
                features[name] = hidden
        out = self.decoder_pred(self.norm(hidden).to(hidden.dtype))[:, self.extras :]
        out = self.final_layer(unpatchify(out, *grid, self.patch_size, self.in_channels))
        return self.with_features(out, features, return_features)


_SHAPES = {
    "small": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "small_deep": {"embed_dim": 512, "depth": 16, "num_heads": 8},
    "mid": {"embed_dim": 768, "depth": 16, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 20, "num_heads": 16},
    "huge": {"embed_dim": 1152, "depth": 28, "num_heads": 16, "conv": False},
}
_LATENT = {"img_dim": 32, "patch_size": 2, "in_channels": 4}
_IMAGENET = {"num_classes": 1000, "class_dropout_prob": 0.15}
_TEXT = {"has_text": True, "d_context": 768, "n_context_token": 77, "class_dropout_prob": 0.1}
# Name -> (shape, the rest). The shapes alone are for 32 x 32 latents of an autoencoder.
PUBLISHED = {
    "small_cifar10": ("small", {"img_dim": 32, "patch_size": 2, "in_channels": 3}),
    "small_celeba64": ("small", {"img_dim": 64, "patch_size": 4, "in_channels": 3}),
    "mid_imagenet64": ("mid", {"img_dim": 64, "patch_size": 4, "in_channels": 3, "num_classes": 1000}),
    "large_imagenet64": ("large", {"img_dim": 64, "patch_size": 4, "in_channels": 3, "num_classes": 1000}),
    "large_imagenet256": ("large", {**_LATENT, **_IMAGENET}),
    "huge_imagenet256": ("huge", {**_LATENT, **_IMAGENET, "class_dropout_prob": 0.1}),
    "large_imagenet512": ("large", {**_LATENT, **_IMAGENET, "img_dim": 64, "patch_size": 4}),
    "huge_imagenet512": (
        "huge",
        {**_LATENT, **_IMAGENET, "class_dropout_prob": 0.1, "img_dim": 64, "patch_size": 4},
    ),
    "small_coco": ("small", {**_LATENT, **_TEXT}),
    "small_deep_coco": ("small_deep", {**_LATENT, **_TEXT}),
}


for _name, _shape in _SHAPES.items():
    register_variant(f"uvit_{_name}", UViT, "U-ViT", **_LATENT, **_shape)
for _name, (_shape, _rest) in PUBLISHED.items():
    register_variant(f"uvit_{_name}", UViT, "U-ViT", **_SHAPES[_shape], **_rest)
