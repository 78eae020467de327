"""ZigMa: a diffusion backbone of Mamba blocks that read an image along zigzag scan orders.

Paper: Hu et al., "ZigMa: A DiT-style Zigzag Mamba Diffusion Model", ECCV 2024, arXiv:2403.13802.

The tensor story: an image (B, C, H, W), or a video (B, T, C, H, W), becomes tokens (B, L, D) in raster
order, frame after frame. Each block adds the previous block's output to a float32 residual stream,
normalizes it, modulates it by time and condition, gathers the tokens along its scan order, mixes them as
a plain sequence, gathers them back and adds the gated result to the *normalized* tokens. A final norm and
an unmodulated linear head give the prediction, (B, C, H, W) again.

Differences from the published code, each with its published behavior under a name:
  - temporal layers of factorized video put frames back in their own order (``official_temporal_reversal``);
  - the backward branch of the bidirectional mixer gets the initialization of the forward one
    (``official_backward_dt_init``);
  - ``use_pe=3`` is one learned table per block, in the state dict;
  - ``use_pe=1`` works for video; parallel scans, plain norms and the scan ``v1`` work;
  - grids need not be square, and other sizes than the one built for are accepted;
  - ``class_dropout_prob`` > 0 gives the null condition that guidance needs.

Legend: B batch, T frames, C channels, H W image, h w token grid, L = T * h * w tokens, D width,
S context tokens, p patch size.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dis_mamba import (
    BiMambaMixer,
    MambaMixer,
    ParallelMambaMixer,
    get_mixer,
    list_mixers,
    mixer_backends,
)
from scans import parse_scan_type
from zigflow.models import register_variant
from zigflow.nn import (
    Condition,
    CrossAttention,
    LabelEmbedder,
    LayerNorm,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    drop_path_ramp,
    drop_path_scales,
    dropped_conditions,
    gated_add,
    interpolate_positions,
    read_labels,
    read_stream,
    read_text,
    sincos_positions,
    unpatchify,
)
from zigflow.nn.backbone import Backbone
from zigflow.nn.checkpointing import CheckpointedBlock
from zigflow.nn.orders import GridOrders

MIXERS = {"mamba": MambaMixer, "bi_mamba": BiMambaMixer, "parallel_mamba": ParallelMambaMixer}


class Walk(NamedTuple):
    """How one layer walks the tokens: gather, fold into ``segments`` sequences, mix, unfold, gather back.

    ``order`` is None for a raster walk. ``undo`` is ``inverse`` but for published mistakes. ``branches`` (k, L) are the
    orders of a parallel mixer.
    """

    order: Any
    inverse: Any
    undo: Any
    undo_inverse: Any
    segments: int
    branches: Any


class ZigMaBlock(CheckpointedBlock):
    """Norm, modulate, mix along a scan order, gate; then, with text, cross-attention."""

    def __init__(
        self, dim: int, mixer: nn.Module, norm: nn.Module, has_text: bool, pos_tokens: int, **factory
    ):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(dim, (6 if has_text else 3) * dim, **factory)
        )
        self.msa = CrossAttention(dim, dim, **factory) if has_text else None
        self.norm_msa = LayerNorm(dim, eps=1e-6, elementwise_affine=False) if has_text else None
        self.pos_embed = nn.Parameter(torch.zeros(1, pos_tokens, dim, **factory)) if pos_tokens else None

    def layer(
        self,
        hidden_BLD: Tensor,
        residual_BLD: Tensor,
        c_BD: Tensor,
        walk: Walk,
        context_BSD: Tensor | None = None,
        mask_BS: Tensor | None = None,
        drop_scale_B: Tensor | None = None,
        positions_1LD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer. Returns the layer's output and the residual stream before the norm."""
        if drop_scale_B is not None:
            hidden_BLD = hidden_BLD * drop_scale_B[:, None, None]
        if positions_1LD is not None:
            residual_BLD = residual_BLD + positions_1LD
        dtype = hidden_BLD.dtype
        chunks = self.adaLN_modulation(c_BD).chunk(3 if self.msa is None else 6, dim=1)
        shift, scale, gate = chunks[:3]

        x, normed_BLD, residual_BLD = read_stream(
            self.norm,
            hidden_BLD,
            residual_BLD,
            shift,
            scale,
            walk.order,
            walk.inverse,
            dtype=dtype,
            keep_normed=True,
        )
        shape = x.shape
        if walk.segments > 1:
            x = x.reshape(shape[0] * walk.segments, shape[1] // walk.segments, shape[2])
        x = self.mixer(x) if walk.branches is None else self.mixer(x, walk.branches)
        x = x.reshape(shape)
        out_BLD = gated_add(normed_BLD, x, gate, walk.undo, walk.undo_inverse)

        if self.msa is not None and self.norm_msa is not None:
            shift, scale, gate = chunks[3:]
            x, _, _ = read_stream(self.norm_msa, None, out_BLD, shift, scale, dtype=out_BLD.dtype)
            out_BLD = gated_add(out_BLD, self.msa(x, context_BSD, mask_BS), gate)
        return out_BLD.to(dtype), residual_BLD


class FinalLayer(nn.Module):
    """LayerNorm without parameters (eps 1e-6), then Linear; not modulated by the condition."""

    def __init__(self, dim: int, out_features: int, **factory):
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_features, **factory)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.linear(self.norm(x_BLD).to(x_BLD.dtype))


class ZigMa(Backbone):
    """The ZigMa backbone.

    Args:
        in_channels, img_dim, patch_size: the input; ``img_dim`` is a side or (height, width).
        embed_dim, depth: width D and number of blocks.
        scan_type: an official string (v1, v2, zigzagN8, hilbertN2, randomN4, parallelN8, zzvideo_sst,
            video_sst, ...) or the name of a registered scan, see ``scans.parse_scan_type``.
        scan: a registered scan that replaces the path of every layer and keeps the mixer; None keeps
            ``scan_type``'s own.
        scan_seed: the seed of random scans.
        use_pe: positions: 0 none, 1 frozen sine-cosine, 2 learned, 3 learned per block.
        tpe: adds a learned table per frame.
        video_frames: T for video input (B, T, C, H, W); 0 for images.
        num_classes: > 0 for class labels. ``class_dropout_prob`` > 0 adds the null class.
        has_text, d_context, n_context_token: text tokens (B, S, d_context) through cross-attention.
        drop_path_rate: last block's stochastic depth; blocks 0 and 1 have none.
        ssm_cfg: keywords of the mixer (d_state, d_conv, expand, dt_rank, ..., backend).
        mixer: a name of ``dis_mamba.list_mixers()``, or a factory called as ``mixer(embed_dim, **ssm_cfg, device=...,
            dtype=...)``, that replaces the mixer of ``scan_type``: any module from (B, L, D) to (B, L, D); every
            scan pairs with it.
        rms_norm, norm_epsilon, residual_in_fp32: the norms and the residual stream.
        fused_add_norm, use_jit: accepted for compatibility; they never change a result.
        m_init: the published re-initialization of the linear layers.
        use_checkpoint: recompute each block in the backward pass (policy "block").
        official_temporal_reversal, official_backward_dt_init: published behaviors, see the module's head.

    Raises:
        ValueError: values that exclude each other, named with what is allowed.
    """

    time_scale = 1.0
    registries: ClassVar = {"mixer": list_mixers, "ssm_cfg.backend": mixer_backends}
    time_factor = 1000.0  # of the time embedding; diffusion processes feed so much less
    frame_tables = ("temporal_pos_embedding",)
    free_keywords = ("official_backward_dt_init",)

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 24,
        img_dim: int | tuple[int, int] = 32,
        patch_size: int = 1,
        has_text: bool = False,
        d_context: int = 0,
        n_context_token: int = 0,
        num_classes: int = -1,
        scan_type: str = "v2",
        use_pe: int = 0,
        video_frames: int = 0,
        tpe: bool = False,
        drop_path_rate: float = 0.1,
        ssm_cfg: dict | None = None,
        rms_norm: bool = True,
        norm_epsilon: float = 1e-5,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        m_init: bool = True,
        use_checkpoint: bool = False,
        use_jit: bool = False,
        device=None,
        dtype=None,
        class_dropout_prob: float = 0.0,
        scan: str | None = None,
        scan_seed: int = 0,
        mixer: str | Callable[..., nn.Module] | None = None,
        official_temporal_reversal: bool = False,
        official_backward_dt_init: bool = False,
    ):
        super().__init__()
        self.describe(
            in_channels=in_channels, img_dim=img_dim, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_classes=num_classes, class_dropout_prob=class_dropout_prob, has_text=has_text, d_context=d_context,
            n_context_token=n_context_token, video_frames=video_frames,
        )  # fmt: skip
        self.drop_path_rates = drop_path_ramp(drop_path_rate, depth, depth)
        self.residual_in_fp32 = residual_in_fp32
        spec = parse_scan_type(scan_type)
        self.scan_spec = spec if scan in (None, "from_model") else spec.with_scan(scan)
        self.scan_seed = scan_seed
        self.official_temporal_reversal = official_temporal_reversal

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._add_positions(use_pe, tpe, factory)
        self.x_embedder = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        self.t_embedder = TimestepEmbedder(embed_dim, scale=1000.0, **factory)
        if has_text:
            self.y_embedder = nn.Linear(d_context, embed_dim, **factory)
        elif num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, embed_dim, class_dropout_prob, **factory)
        build_mixer = self._mixer_factory(mixer, ssm_cfg, official_backward_dt_init, factory)
        norm = partial(RMSNorm if rms_norm else LayerNorm, embed_dim, eps=norm_epsilon, **factory)
        pos_tokens = math.prod(self.token_grid) if use_pe == 3 else 0
        self.blocks = nn.ModuleList(
            ZigMaBlock(embed_dim, build_mixer(), norm(), has_text, pos_tokens, **factory)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(embed_dim, patch_size * patch_size * in_channels, **factory)
        self.norm_f = norm()

        self.set_checkpoint_policy("block" if use_checkpoint else "none")
        self.orders: GridOrders[tuple[Walk, ...]] = GridOrders(self._walks, self.token_grid, device)
        self.reset_parameters(m_init)

    def _add_positions(self, use_pe: int, tpe: bool, factory: dict[str, Any]) -> None:
        """The tables of all tokens and of frames; those of ``use_pe=3`` belong to the blocks."""
        if use_pe not in (0, 1, 2, 3):
            raise ValueError(
                f"use_pe is 0 (none), 1 (sine-cosine), 2 (learned) or 3 (learned per block), got {use_pe}"
            )
        if tpe and self.video_frames <= 0:
            raise ValueError(f"tpe=True needs video_frames > 0, got {self.video_frames}")
        self.use_pe, self.tpe = use_pe, tpe
        frames, width = self.token_grid[0], self.embed_dim
        if use_pe in (1, 2):
            table = torch.zeros(1, math.prod(self.token_grid), width)
            if use_pe == 1:
                table = sincos_positions(*self.grid, width).repeat(1, frames, 1)
            self.pos_embed = nn.Parameter(table.to(**factory), requires_grad=use_pe == 2)
        if tpe:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, frames, width, **factory))

    def _mixer_factory(
        self,
        mixer: str | Callable[..., nn.Module] | None,
        ssm_cfg: dict[str, Any] | None,
        official_backward_dt_init: bool,
        factory: dict[str, Any],
    ) -> Callable[[], nn.Module]:
        """What builds the mixer of a block: one's own, or that of ``scan_type``."""
        spec, options = self.scan_spec, dict(ssm_cfg or {})
        if mixer is not None and spec.mixer == "parallel_mamba":
            raise ValueError(
                f"mixer= replaces one walk per layer, scan_type={spec.text!r} has several at once"
            )
        if mixer is None and spec.mixer != "mamba":
            options["official_backward_dt_init"] = official_backward_dt_init
        if spec.mixer == "parallel_mamba":
            options["num_orders"] = spec.num_directions
        return partial(get_mixer(mixer or MIXERS[spec.mixer]), self.embed_dim, **options, **factory)

    @torch.no_grad()
    def reset_parameters(self, m_init: bool = True) -> None:
        """The published initialization; the mixers have drawn theirs already."""
        if m_init:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
            for block in self.blocks:
                if isinstance(block.mixer, MambaMixer | BiMambaMixer | ParallelMambaMixer):
                    weight = block.mixer.out_proj.weight
                    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                    weight.div_(math.sqrt(self.depth))
        self.x_embedder.reset_parameters()
        self.t_embedder.reset_parameters()
        if isinstance(getattr(self, "y_embedder", None), LabelEmbedder):
            self.y_embedder.reset_parameters()
        for block in self.blocks:
            _, linear = cast(ZigMaBlock, block).adaLN_modulation
            nn.init.zeros_(cast(nn.Linear, linear).weight)
            nn.init.zeros_(cast(nn.Linear, linear).bias)

    def shard_units(self) -> list[nn.Module]:
        """What may be sharded apart; with use_pe=3 nothing, since the model reads the blocks' tables itself."""
        return [] if self.use_pe == 3 else list(self.blocks)

    def _walks(self, grid: tuple[int, ...]) -> tuple[Walk, ...]:
        """One walk per layer over a grid (T, h, w), as arrays."""
        schedule = self.scan_spec.schedule(
            self.depth, *grid, seed=self.scan_seed, official_temporal_reversal=self.official_temporal_reversal
        )
        steps, layers = schedule.distinct()
        walks = []
        for step in steps:
            order, undo, segments = step.resolve(*grid)
            raster = np.arange(len(order))
            if np.array_equal(order, raster) and np.array_equal(undo, raster):
                walks.append(Walk(None, None, None, None, segments, schedule.branch_orders))
                continue
            # One array where they agree, so that a kernel's arguments coincide in every layer or in none.
            undo = order if np.array_equal(order, undo) else undo
            inverse = np.argsort(order)
            undo_inverse = inverse if undo is order else np.argsort(undo)
            walks.append(Walk(order, inverse, undo, undo_inverse, segments, schedule.branch_orders))
        return tuple(walks[i] for i in layers)

    @property
    def scan_name(self) -> str:
        """What the configuration calls the scan."""
        return self.scan_spec.text

    def _built_walks(self) -> tuple[Walk, ...]:
        return self.orders.at(self.token_grid, self.x_embedder.proj.weight.device)

    def scan_walks(self) -> list[tuple[Tensor | int | None, ...]]:
        """How each layer walks the built grid: gathers, segments, branches; None where it takes the raster."""
        return self.scan_walks_at(self.token_grid)

    def scan_walks_at(self, grid: tuple[int, int, int]) -> list[tuple[Tensor | int | None, ...]]:
        """The same for the token grid (T, h, w) of another size."""
        walks = self.orders.at(grid, self.x_embedder.proj.weight.device)
        return [(walk.order, walk.undo, walk.segments, walk.branches) for walk in walks]

    def scan_state(self) -> dict[str, Tensor]:
        """The orders that a checkpoint must carry: those of random scans, by layer; else nothing."""
        if not self.scan_spec.is_seeded:
            return {}
        walks = self._built_walks()
        orders = {f"layers.{i}.order": w.order for i, w in enumerate(walks) if w.order is not None}
        if walks[0].branches is not None:
            orders["branches"] = walks[0].branches
        return orders

    def null_condition(self, y: Any) -> Any:
        """The condition that stands for "none" in guidance, built like ``y``: the null class, or tokens of zeros.

        Args:
            y: labels (B,), tokens (B, S, d_context), or a ``Condition``, of which the part that this model reads is
                replaced and the rest, the mask included, stays.

        Raises:
            ValueError: the model was built without a null row, or a ``Condition`` lacks the part that it reads.
        """
        if not self.has_text or not self.has_null:
            return super().null_condition(y)
        if not isinstance(y, Condition):
            return torch.zeros_like(y)
        if y.tokens is None:
            raise ValueError(
                "this model reads tokens, and the Condition has none: give Condition(tokens=...)"
            )
        return replace(y, tokens=torch.zeros_like(y.tokens))

    def _condition(self, y: Any, batch: int, t_emb_BD: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The modulation vector (B, D), and for text the projected tokens and their mask."""
        dropping = self.class_dropout_prob if self.training else 0.0
        if self.has_text:
            y, mask_BS = read_text(y, batch, self.d_context, None, dropping, self.training)
            y = y.to(self.y_embedder.weight.dtype)
            if dropping:
                dropped_B = dropped_conditions(dropping, batch, t_emb_BD.device)
                y = torch.where(dropped_B[:, None, None], torch.zeros_like(y), y)
            context_BSD = self.y_embedder(y)
            if mask_BS is None:
                pooled = context_BSD.mean(dim=1)
            else:
                weight = mask_BS.unsqueeze(-1).to(context_BSD.dtype)
                pooled = (context_BSD * weight).sum(1) / weight.sum(1).clamp_min(1)
            return t_emb_BD + pooled, context_BSD, mask_BS
        if self.num_classes <= 0:
            return t_emb_BD, None, None
        labels_B = read_labels(
            y, batch, self.num_classes, self.class_dropout_prob, self.training, t_emb_BD.device
        )
        return t_emb_BD + self.y_embedder(labels_B), None, None

    def _embed(self, x: Tensor, t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens (B, L, D) with positions, and the grid (T, h, w)."""
        height, width = self.check_input(x, t)
        grid = (x.shape[1] if self.video_frames else 1, height, width)
        x = self.x_embedder(x.flatten(0, -4).to(self.x_embedder.proj.weight.dtype))
        x = x.reshape(-1, math.prod(grid), self.embed_dim)
        if self.use_pe in (1, 2):
            x = x + interpolate_positions(self.pos_embed, self.token_grid, grid)
        if self.tpe:
            built, frames = self.token_grid[0], grid[0]
            table = interpolate_positions(self.temporal_pos_embedding, (built, 1, 1), (frames, 1, 1))
            x = x + table.repeat_interleave(grid[1] * grid[2], dim=1)
        return x, grid

    def forward(self, x: Tensor, t: Tensor, y=None, return_features: tuple[str, ...] = ()):
        """Predict from a noisy image.

        Args:
            x: (B, C, H, W), or (B, T, C, H, W) for video; H and W multiples of the patch size.
            t: (B,) times in [0, 1]; 1 is data.
            y: labels (B,), tokens (B, S, d_context), a ``Condition``, or None.
            return_features: "blocks.{i}" for the outputs of those blocks, (B, L, D).

        Returns:
            The prediction, shaped like ``x``; with ``return_features`` also a dict of features.
        """
        hidden, grid = self._embed(x, t)
        batch, device = hidden.shape[0], hidden.device
        c, context, mask = self._condition(y, batch, self.t_embedder(t))

        scales: list[Tensor | None] = [None] * (self.depth + 1)
        if self.training and max(self.drop_path_rates) > 0:
            scales = list(drop_path_scales(self.drop_path_rates, batch, device, hidden.dtype))
        stream = torch.promote_types(hidden.dtype, torch.float32) if self.residual_in_fp32 else hidden.dtype
        residual, hidden = hidden.to(stream), torch.zeros_like(hidden)
        features = {}
        walks = self.orders.at(grid, device)
        for i, (name, block) in enumerate(self.named_blocks().items()):
            positions = None
            if self.use_pe == 3:
                positions = interpolate_positions(cast(Tensor, block.pos_embed), self.token_grid, grid)
            hidden, residual = block(hidden, residual, c, walks[i], context, mask, scales[i], positions)
            if name in return_features:
                features[name] = hidden
        if scales[-1] is not None:
            hidden = hidden * scales[-1][:, None, None]
        out = self.final_layer(self.norm_f(residual + hidden).to(hidden.dtype))

        per_frame = out.reshape(batch * grid[0], grid[1] * grid[2], -1)
        out = unpatchify(per_frame, grid[1], grid[2], self.patch_size, self.in_channels).reshape(x.shape)
        return self.with_features(out, features, return_features)


SIZES = {"s": (368, 24), "b": (768, 24), "m": (768, 48), "l": (1024, 48), "h": (1536, 48)}


for _size, (_dim, _depth) in SIZES.items():
    for _patch in (1, 2, 4):
        _shape = {"embed_dim": _dim, "depth": _depth, "patch_size": _patch}
        register_variant(f"zigma_{_size}_{_patch}", ZigMa, "ZigMa", **_shape)
