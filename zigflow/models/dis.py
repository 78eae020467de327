"""DiS: a diffusion backbone of bidirectional Mamba blocks that takes time, class and patches as tokens alike.

Paper: Fei et al., "Scalable Diffusion Models with State Space Backbone", 2024, arXiv:2402.05608.

The tensor story: an image (B, C, H, W) becomes patch tokens in raster order; before them stand the time token and,
with classes, the class token: [class, time, patches]. A learned table is added to all of them. Every block adds the
previous block's output to a float32 residual stream, normalizes the stream and mixes it in both directions; what goes
on is the mixer's output. depth // 2 blocks keep that output, a middle block follows, and depth // 2 blocks each join
the latest kept output to their input by a linear layer, before it is added to the stream. Two norms in a row, the
second one modulated by time + class where there are classes, and a linear head give (B, C, H, W), or (B, 2 C, H, W)
with ``learn_sigma``: the prediction, then what the Gaussian process reads as its variance.

Differences from the published code:
  - keyword names are the project's (``img_dim``, ``in_channels``); zigflow.official translates;
  - the backward branch of a mixer gets the initialization of the forward one (``official_backward_dt_init``);
  - ``class_dropout_prob`` is 0 by default, since a model without classes has nothing to drop;
  - guidance acts on all channels of the prediction; ``guided_channels=3`` is the published one;
  - grids need not be square, and other sizes than the one built for are accepted (positions are interpolated);
  - the patches may be visited along any registered scan (``scan``), the extra tokens staying in front.

Legend: B batch, C channels, H W image, h w token grid, L tokens with the extra ones, D width, p patch size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dis_mamba import BiMambaMixer, get_mixer, list_mixers, mixer_backends
from scans import TokenLayout, parse_scan_type
from zigflow.nn import (
    LabelEmbedder,
    LayerNorm,
    PatchEmbed,
    RMSNorm,
    drop_path_ramp,
    drop_path_scales,
    interpolate_positions,
    modulate,
    permute,
    read_labels,
    read_stream,
    sinusoidal_embedding,
    time_mlp,
    unpatchify,
)
from zigflow.nn.backbone import Backbone
from zigflow.nn.checkpointing import CheckpointedBlock
from zigflow.nn.orders import GridOrders
from zigflow.nn.skip_tuning import SkipTuning

from .variants import register_variant

# A block's order of all tokens and its inverse; None where it takes the raster.
Walk = tuple[Tensor | None, Tensor | None]


class DiSBlock(CheckpointedBlock):
    """Join the skipped tokens, if it is a block with ``skip``; add to the stream, norm, mix along an order."""

    def __init__(self, dim: int, mixer: nn.Module, norm: nn.Module, skip: bool, **factory):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.skip_linear = nn.Linear(2 * dim, dim, **factory) if skip else None

    def layer(
        self,
        hidden_BLD: Tensor,
        residual_BLD: Tensor,
        skip_BLD: Tensor | None = None,
        drop_scale_B: Tensor | None = None,
        order_L: Tensor | None = None,
        inverse_L: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer. Returns the mixer's output and the residual stream before the norm, tokens in raster order."""
        if self.skip_linear is not None and skip_BLD is not None:
            hidden_BLD = self.skip_linear(torch.cat([hidden_BLD, skip_BLD], dim=-1))
        if drop_scale_B is not None:
            hidden_BLD = hidden_BLD * drop_scale_B[:, None, None]
        x, _, residual_BLD = read_stream(
            self.norm, hidden_BLD, residual_BLD, None, None, order_L, inverse_L, dtype=hidden_BLD.dtype
        )
        if order_L is None or inverse_L is None:
            return self.mixer(x), residual_BLD
        return permute(self.mixer(x), inverse_L, order_L), residual_BLD


class FinalLayer(nn.Module):
    """LayerNorm without parameters (eps 1e-6), modulated where there is a condition, then Linear."""

    def __init__(self, dim: int, out_features: int, conditional: bool, **factory):
        super().__init__()
        self.norm_final = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features, **factory)
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **factory)) if conditional else None
        )

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        x = self.norm_final(x_BLD).to(x_BLD.dtype)
        if self.adaLN_modulation is not None:
            x = modulate(x, *self.adaLN_modulation(c_BD).chunk(2, dim=1))
        return self.linear(x)


class DiS(SkipTuning, Backbone):
    """The DiS backbone; the defaults are those of the published class, but for ``class_dropout_prob``.

    Args:
        in_channels, img_dim, patch_size: the input; ``img_dim`` is a side or (height, width).
        embed_dim, depth: width D and depth; there are 2 (depth // 2) + 1 blocks, an odd number.
        num_classes: > 0 for a class token and the modulated head. ``class_dropout_prob`` > 0 adds the null class, and
            drops labels in training.
        learn_sigma: C more output channels, the variance of the Gaussian process.
        mlp_time_embed, skip: Linear, SiLU, Linear on the time token; the long skip connections.
        drop_path_rate: last block's stochastic depth; blocks 0 and 1 have none.
        ssm_cfg: keywords of the mixer (d_state, d_conv, expand, dt_rank, ..., backend).
        rms_norm, norm_epsilon, residual_in_fp32: the norms and the residual stream.
        guided_channels: guidance acts on the first so many channels; None: all of the prediction, C.
        scan, scan_seed: a registered scan along which the patches are visited, block i taking its path i; None is the
            raster. The seed is that of random scans.
        mixer: a name of ``dis_mamba.list_mixers()``, or a factory called as ``mixer(embed_dim, **ssm_cfg, device=...,
            dtype=...)``, that replaces the bidirectional mixer: any module from (B, L, D) to (B, L, D).
        official_backward_dt_init: the published initialization, see the module's head.

    Raises:
        ValueError: values that exclude each other, named with what is allowed.
    """

    # Flow times lie in [0, 1]; the sinusoid of the time token is made for 0..1000.
    registries: ClassVar = {"mixer": list_mixers, "ssm_cfg.backend": mixer_backends}
    time_scale = 1000.0
    free_keywords = ("official_backward_dt_init",)

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        img_dim: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_classes: int = -1,
        class_dropout_prob: float = 0.0,
        learn_sigma: bool = True,
        mlp_time_embed: bool = True,
        skip: bool = True,
        drop_path_rate: float = 0.1,
        ssm_cfg: dict | None = None,
        rms_norm: bool = True,
        norm_epsilon: float = 1e-5,
        residual_in_fp32: bool = True,
        guided_channels: int | None = None,
        scan: str | None = None,
        scan_seed: int = 0,
        mixer: str | Callable[..., nn.Module] | None = None,
        official_backward_dt_init: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.describe(
            in_channels=in_channels, img_dim=img_dim, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_classes=num_classes, class_dropout_prob=class_dropout_prob, least_depth=0,
        )  # fmt: skip
        self.num_blocks = 2 * (depth // 2) + 1
        self.drop_path_rates = drop_path_ramp(drop_path_rate, depth, self.num_blocks)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        if guided_channels is not None and not 1 <= guided_channels <= self.out_channels:
            raise ValueError(
                f"guided_channels is 1..{self.out_channels} (output channels), or None for the prediction, "
                f"got {guided_channels}"
            )
        if guided_channels is not None:
            self.guided_channels = guided_channels
        self.residual_in_fp32 = residual_in_fp32
        self.skip = skip
        self.extras = 1 + int(num_classes > 0)

        tokens = self.extras + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **factory))
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        self.time_embed = time_mlp(embed_dim, **factory) if mlp_time_embed else nn.Identity()
        if num_classes > 0:
            self.label_emb = LabelEmbedder(num_classes, embed_dim, class_dropout_prob, **factory)

        options = dict(ssm_cfg or {})
        if mixer is None:
            mixer, options = BiMambaMixer, {"official_backward_dt_init": official_backward_dt_init, **options}
        build_mixer = partial(get_mixer(mixer), embed_dim, **options, **factory)
        norm = partial(RMSNorm if rms_norm else LayerNorm, embed_dim, eps=norm_epsilon, **factory)

        def block(joins: bool) -> DiSBlock:
            return DiSBlock(embed_dim, build_mixer(), norm(), joins, **factory)

        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm_f = norm()
        self.final_layer = FinalLayer(
            embed_dim, patch_size * patch_size * self.out_channels, num_classes > 0, **factory
        )

        self.scan_spec = None if scan in (None, "from_model") else parse_scan_type("v2").with_scan(scan)
        self.scan_seed = scan_seed
        self.orders: GridOrders[tuple[Walk, ...]] = GridOrders(self._walks, self.grid, device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialization; mixers, convolutions and the weights of linear layers have drawn theirs."""
        nn.init.zeros_(self.pos_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LabelEmbedder):
                module.reset_parameters()
            elif isinstance(module, BiMambaMixer):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                module.out_proj.weight /= math.sqrt(max(self.depth, 1))

    def named_blocks(self) -> dict[str, nn.Module]:
        named: list[tuple[str, nn.Module]] = [
            (f"in_blocks.{i}", block) for i, block in enumerate(self.in_blocks)
        ]
        named.append(("mid_block", self.mid_block))
        named += [(f"out_blocks.{i}", block) for i, block in enumerate(self.out_blocks)]
        return dict(named)

    def _walks(self, grid: tuple[int, ...]) -> tuple[tuple[Any, Any], ...]:
        """Each block's walk over a grid (h, w), as arrays; the raster where all of them take it."""
        raster = ((None, None),) * self.num_blocks
        if self.scan_spec is None:
            return raster
        steps, layers = self.scan_spec.schedule(self.num_blocks, 1, *grid, seed=self.scan_seed).distinct()
        layout = TokenLayout.prefix(math.prod(grid), self.extras)
        paths = [layout.lift(step.path) for step in steps]
        if all(path.is_identity for path in paths):
            return raster
        walks = [(path.order, path.inverse) for path in paths]
        return tuple(walks[i] for i in layers)

    @property
    def scan_name(self) -> str:
        """What the configuration calls the scan."""
        return "from_model" if self.scan_spec is None else self.scan_spec.scan

    def scan_walks(self) -> tuple[Walk, ...]:
        """Each block's order of all tokens of the built grid and its inverse; None where it takes the raster."""
        return self.orders.at(self.grid, self.pos_embed.device)

    def scan_state(self) -> dict[str, Tensor]:
        """The orders that a checkpoint must carry: those of random scans, by block; else nothing."""
        if self.scan_spec is None or not self.scan_spec.is_seeded:
            return {}
        walks = enumerate(self.scan_walks())
        return {f"blocks.{i}.order": order for i, (order, _) in walks if order is not None}

    def _tokens(self, x: Tensor, t: Tensor, y) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """All tokens (B, L, D) with positions, time + class (B, D) for the head, and the grid (h, w)."""
        batch, grid = x.shape[0], self.check_input(x, t)
        dtype = self.pos_embed.dtype
        c = self.time_embed(sinusoidal_embedding(t, self.embed_dim).to(dtype))
        parts = [c.unsqueeze(1), self.patch_embed(x.to(dtype))]
        if self.num_classes > 0:
            labels = read_labels(y, batch, self.num_classes, self.class_dropout_prob, self.training, x.device)
            label = self.label_emb(labels)
            parts, c = [label.unsqueeze(1), *parts], c + label
        table = interpolate_positions(self.pos_embed, (1, *self.grid), (1, *grid), extras=self.extras)
        return torch.cat(parts, dim=1) + table, c, grid

    def forward(self, x: Tensor, t: Tensor, y=None, return_features: tuple[str, ...] = ()):
        """Predict from a noisy image.

        Args:
            x: (B, C, H, W); H and W multiples of the patch size.
            t: (B,) times as the process feeds them, 0..1000.
            y: labels (B,), a ``Condition``, or None: the null class.
            return_features: names of blocks ("in_blocks.0", "mid_block", "out_blocks.0", ...) for what their mixers
                give, (B, L, D) with the extra tokens first.

        Returns:
            (B, out_channels, H, W): C channels of prediction, with ``learn_sigma`` C of variance; with
            ``return_features`` also a dict of features.
        """
        hidden, c, grid = self._tokens(x, t, y)
        batch = hidden.shape[0]
        scales: list[Tensor | None] = [None] * len(self.drop_path_rates)
        if self.training and max(self.drop_path_rates) > 0:
            scales = list(drop_path_scales(self.drop_path_rates, batch, hidden.device, hidden.dtype))
        stream = torch.promote_types(hidden.dtype, torch.float32) if self.residual_in_fp32 else hidden.dtype
        residual = torch.zeros_like(hidden, dtype=stream)
        features, kept = {}, []
        walks = self.orders.at(grid, hidden.device)
        weights = self.skip_weights(t, len(self.out_blocks))
        for i, (name, block) in enumerate(self.named_blocks().items()):
            joined = kept.pop() if self.skip and name.startswith("out_") else None
            if joined is not None and (weight := weights.pop(0)) is not None:
                joined = joined * weight[:, None, None].to(joined.dtype)
            hidden, residual = block(hidden, residual, joined, scales[i], *walks[i])
            if name.startswith("in_"):
                kept.append(hidden)
            if name in return_features:
                features[name] = hidden
        if scales[-1] is not None:
            hidden = hidden * scales[-1][:, None, None]
        out = self.norm_f(residual + hidden).to(hidden.dtype)
        out = unpatchify(
            self.final_layer(out, c)[:, self.extras :], *grid, self.patch_size, self.out_channels
        )
        return self.with_features(out, features, return_features)


SIZES = {"s": (368, 24), "b": (768, 24), "m": (768, 48), "l": (1024, 48), "h": (1536, 48)}
_LATENT_CLASSES = {"in_channels": 4, "img_dim": 32, "num_classes": 1000, "class_dropout_prob": 0.1}


for _size, (_dim, _depth) in SIZES.items():
    for _patch in (2, 4):
        _shape = {"embed_dim": _dim, "depth": _depth, "patch_size": _patch}
        register_variant(f"dis_{_size}_{_patch}", DiS, "DiS", **_LATENT_CLASSES, **_shape)
