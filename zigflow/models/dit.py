"""DiT: a transformer over image patches whose blocks are modulated by time and class (adaLN-Zero).

Paper: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, arXiv:2212.09748. SiT (Ma et al.,
ECCV 2024, arXiv:2401.08740) is the same network under the flow process: ``drop_sigma=True``. With ``has_text`` each
block also attends to text tokens, as in the "DiT-clipped" derivative; the condition of the modulation is then the
time alone.

The tensor story: an image (B, C, H, W) becomes tokens (B, L, D) in raster order plus a frozen sine-cosine table.
Each block adds gated self-attention, gated cross-attention with text, and a gated MLP; shift, scale and gate come
from time and class. A modulated norm and a linear head give (B, C, H, W), or (B, 2 C, H, W) with ``learn_sigma``:
the prediction, then what the Gaussian process reads as its variance.

Differences from the published code:
  - keyword names are the project's (``img_dim``, ``embed_dim``); zigflow.official translates;
  - grids need not be square, and other sizes than the one built for are accepted (positions are interpolated);
  - weights in bfloat16 work without autocast; unconditional models (``num_classes=-1``) exist;
  - guidance acts on all channels of the prediction; ``guided_channels=3`` is the published one;
  - a dropped text is a learned null text, in training as in guidance;
  - ``qk_norm`` and ``rope`` are options, off by default.

Legend: B batch, C channels, H W image, h w token grid, L = h * w tokens, D width, S context tokens, p patch size.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from zigflow.nn import (
    CrossAttention,
    LabelEmbedder,
    LayerNorm,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedder,
    axial_rotations,
    gated_add,
    interpolate_positions,
    modulate,
    read_labels,
    read_stream,
    read_text,
    sincos_positions,
    unpatchify,
)
from zigflow.nn.backbone import Backbone
from zigflow.nn.checkpointing import CheckpointedBlock

from .variants import register_variant


def _plain_norm(dim: int) -> LayerNorm:
    return LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class DiTBlock(CheckpointedBlock):
    """Self-attention, with text cross-attention, and an MLP, each modulated and gated by the condition."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, d_context: int = 0, qk_norm: bool = False, **factory
    ):
        super().__init__()
        self.norm1 = _plain_norm(dim)
        self.attn = SelfAttention(dim, heads, qk_norm=qk_norm, **factory)
        self.cross_norm = _plain_norm(dim) if d_context else None
        self.cross_attn = (
            CrossAttention(dim, d_context, heads, dim // heads, **factory) if d_context else None
        )
        self.norm2 = _plain_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="tanh", **factory)
        self.chunks = 9 if d_context else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.chunks * dim, **factory))

    def layer(
        self,
        x_BLD: Tensor,
        c_BD: Tensor,
        rotations: Tensor | None = None,
        context_BSD: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        chunks = self.adaLN_modulation(c_BD).chunk(self.chunks, dim=1)
        shift, scale, gate = chunks[:3]
        normed, _, _ = read_stream(self.norm1, None, x_BLD, shift, scale, dtype=x_BLD.dtype)
        x_BLD = gated_add(x_BLD, self.attn(normed, rotations), gate)
        if self.cross_attn is not None and self.cross_norm is not None:
            shift, scale, gate = chunks[6:]
            normed, _, _ = read_stream(self.cross_norm, None, x_BLD, shift, scale, dtype=x_BLD.dtype)
            x_BLD = gated_add(x_BLD, self.cross_attn(normed, context_BSD, mask_BS), gate)
        shift, scale, gate = chunks[3:6]
        normed, _, _ = read_stream(self.norm2, None, x_BLD, shift, scale, dtype=x_BLD.dtype)
        return gated_add(x_BLD, self.mlp(normed), gate)


class FinalLayer(nn.Module):
    """LayerNorm without parameters (eps 1e-6), modulated, then Linear."""

    def __init__(self, dim: int, out_features: int, **factory):
        super().__init__()
        self.norm_final = _plain_norm(dim)
        self.linear = nn.Linear(dim, out_features, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **factory))

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BLD).to(x_BLD.dtype), shift, scale))


class DiT(Backbone):
    """The DiT backbone; the defaults are those of the published class.

    Args:
        in_channels, img_dim, patch_size: the input; ``img_dim`` is a side or (height, width).
        embed_dim, depth, num_heads, mlp_ratio: width D, blocks, heads, hidden width of the MLP over D.
        num_classes: > 0 for class labels. ``class_dropout_prob`` > 0 adds the null class, and drops labels in
            training.
        learn_sigma: C more output channels, the variance of the Gaussian process.
        drop_sigma: those channels exist in the weights and are left out of the output (SiT).
        has_text, d_context, n_context_token: text tokens (B, S, d_context) through cross-attention, which replace
            the labels. ``class_dropout_prob`` > 0 adds a learned null text of S = n_context_token tokens, and drops
            texts in training.
        guided_channels: guidance acts on the first so many channels; None: all of the prediction, C.
        qk_norm: RMS norm of each head's queries and keys. rope: rotary positions, beside the table.
        use_checkpoint: recompute each block in the backward pass (policy "block").

    Raises:
        ValueError: values that exclude each other, named with what is allowed.
    """

    time_scale = 1.0

    def __init__(
        self,
        in_channels: int = 4,
        embed_dim: int = 1152,
        depth: int = 28,
        img_dim: int | tuple[int, int] = 32,
        patch_size: int = 2,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        drop_sigma: bool = False,
        has_text: bool = False,
        d_context: int = 0,
        n_context_token: int = 0,
        guided_channels: int | None = None,
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
            n_context_token=n_context_token,
        )  # fmt: skip
        if has_text and class_dropout_prob > 0 and n_context_token <= 0:
            raise ValueError(
                f"class_dropout_prob > 0 with text needs n_context_token > 0, the tokens of the null text, got "
                f"{n_context_token}"
            )
        if drop_sigma and not learn_sigma:
            raise ValueError("drop_sigma=True leaves out the channels of learn_sigma=True, which is off")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if guided_channels is not None:
            self.guided_channels = guided_channels
        self.head_channels = 2 * in_channels if learn_sigma else in_channels
        self.out_channels = in_channels if drop_sigma else self.head_channels
        if guided_channels is not None and not 1 <= guided_channels <= self.out_channels:
            raise ValueError(
                f"guided_channels is 1..{self.out_channels} (output channels), or None for the prediction, "
                f"got {guided_channels}"
            )
        self.rope = rope

        tokens = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **factory), requires_grad=False)
        self.x_embedder = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        self.t_embedder = TimestepEmbedder(embed_dim, **factory)
        if has_text and class_dropout_prob > 0:
            self.null_text = nn.Parameter(torch.zeros(n_context_token, d_context, **factory))
        elif not has_text and num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, embed_dim, class_dropout_prob, **factory)
        self.blocks = nn.ModuleList(
            DiTBlock(embed_dim, num_heads, mlp_ratio, d_context if has_text else 0, qk_norm, **factory)
            for _ in range(depth)
        )
        self.head_dim = embed_dim // num_heads
        if rope:  # refuses heads whose width cannot be turned
            axial_rotations(self.grid, self.grid, self.head_dim, device="meta")
        self.final_layer = FinalLayer(embed_dim, patch_size * patch_size * self.head_channels, **factory)
        self.set_checkpoint_policy("block" if use_checkpoint else "none")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialization: a fresh model's output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.pos_embed.copy_(sincos_positions(*self.grid, self.embed_dim))
        self.x_embedder.reset_parameters()
        self.t_embedder.reset_parameters()
        if self.null_text is not None:
            nn.init.normal_(self.null_text, std=0.02)
        if self.num_classes > 0:
            self.y_embedder.reset_parameters()
        modulated = (*(cast(DiTBlock, block) for block in self.blocks), self.final_layer)
        for layer in (*(module.adaLN_modulation[1] for module in modulated), self.final_layer.linear):
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def _embed(self, x: Tensor, t: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, L, D) with positions, and the grid (h, w)."""
        grid = self.check_input(x, t)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        return tokens + interpolate_positions(self.pos_embed, (1, *self.grid), (1, *grid)), grid

    def forward(self, x: Tensor, t: Tensor, y=None, return_features: tuple[str, ...] = ()):
        """Predict from a noisy image.

        Args:
            x: (B, C, H, W); H and W multiples of the patch size.
            t: (B,) times as the process feeds them: integers 0..999, or [0, 1] under the flow process.
            y: labels (B,), tokens (B, S, d_context), a ``Condition``, or None: the null condition.
            return_features: "blocks.{i}" for the outputs of those blocks, (B, L, D).

        Returns:
            (B, out_channels, H, W): C channels of prediction, with ``learn_sigma`` C of variance; with
            ``return_features`` also a dict of features.
        """
        hidden, grid = self._embed(x, t)
        batch, c, context = x.shape[0], self.t_embedder(t), (None, None)
        if self.has_text:
            context = read_text(
                y, batch, self.d_context, self.null_text, self.class_dropout_prob, self.training
            )
            context = (context[0].to(hidden.dtype), context[1])
        elif self.num_classes > 0:
            labels = read_labels(y, batch, self.num_classes, self.class_dropout_prob, self.training, x.device)
            c = c + self.y_embedder(labels)
        rotations = axial_rotations(self.grid, grid, self.head_dim, device=x.device) if self.rope else None
        features = {}
        for name, block in self.named_blocks().items():
            hidden = block(hidden, c, rotations, *context)
            if name in return_features:
                features[name] = hidden
        out = unpatchify(self.final_layer(hidden, c), *grid, self.patch_size, self.head_channels)
        return self.with_features(out[:, : self.out_channels], features, return_features)


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


for _size, (_dim, _depth, _heads) in SIZES.items():
    for _patch in (2, 4, 8):
        _shape = {"embed_dim": _dim, "depth": _depth, "num_heads": _heads, "patch_size": _patch}
        register_variant(f"dit_{_size}_{_patch}", DiT, "DiT", **_shape)
        register_variant(f"sit_{_size}_{_patch}", DiT, "SiT", **_shape, drop_sigma=True)
register_variant(
    "dit_clipped", DiT, "DiT with text", embed_dim=768, depth=16, num_heads=12, has_text=True, d_context=768,
    n_context_token=77,
)  # fmt: skip
