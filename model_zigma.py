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
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

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
from zigflow.nn import (
    Condition,
    CrossAttention,
    LabelEmbedder,
    LayerNorm,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    check_divisible,
    check_labels,
    check_mask,
    drop_path_scales,
    dropped_conditions,
    gated_add,
    interpolate_positions,
    read_stream,
    sincos_positions,
    unpatchify,
)
from zigflow.nn.backbone import check_sizes
from zigflow.nn.checkpointing import CHECKPOINT_POLICIES, CheckpointedBlock
from zigflow.nn.compilation import compile_in_place
from zigflow.registry import register_variant, unknown_name

MIXERS = {"mamba": MambaMixer, "bi_mamba": BiMambaMixer, "parallel_mamba": ParallelMambaMixer}
_PLANS_KEPT = 8


class Walk(NamedTuple):
    """How one layer walks the tokens: gather, fold into ``segments`` sequences, mix, unfold, gather back.

    ``order`` is None for a raster walk. ``undo`` is ``inverse`` but for published mistakes.
    """

    order: Tensor | None
    inverse: Tensor | None
    undo: Tensor | None
    undo_inverse: Tensor | None
    segments: int
    branches: Tensor | None


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

        if self.msa is not None:
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


class ZigMa(nn.Module):
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
        check_sizes(in_channels=in_channels, embed_dim=embed_dim, depth=depth)
        if use_pe not in (0, 1, 2, 3):
            raise ValueError(
                f"use_pe is 0 (none), 1 (sine-cosine), 2 (learned) or 3 (learned per block), got {use_pe}"
            )
        if has_text and d_context <= 0:
            raise ValueError(f"has_text=True needs d_context > 0, the width of a text token, got {d_context}")
        if tpe and video_frames <= 0:
            raise ValueError(f"tpe=True needs video_frames > 0, got {video_frames}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate lies in [0, 1), got {drop_path_rate}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob lies in [0, 1), got {class_dropout_prob}")
        if class_dropout_prob > 0 and num_classes <= 0 and not has_text:
            raise ValueError("class_dropout_prob > 0 needs a condition to drop: set num_classes or has_text")
        factory = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.img_dim = (img_dim, img_dim) if isinstance(img_dim, int) else (int(img_dim[0]), int(img_dim[1]))
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.video_frames = max(video_frames, 0)
        self.has_text = has_text
        self.d_context = d_context
        self.n_context_token = n_context_token
        self.num_classes = -1 if has_text else num_classes
        self.class_dropout_prob = class_dropout_prob
        self.residual_in_fp32 = residual_in_fp32
        self.use_pe = use_pe
        self.grid = (max(self.video_frames, 1), *check_divisible(*self.img_dim, patch_size))
        tokens = math.prod(self.grid)

        spec = parse_scan_type(scan_type)
        self.scan_spec = spec if scan in (None, "from_model") else spec.with_scan(scan)
        self.scan_seed = scan_seed
        self.official_temporal_reversal = official_temporal_reversal

        if use_pe in (1, 2):
            table = sincos_positions(*self.grid[1:], embed_dim).repeat(1, self.grid[0], 1)
            table = table if use_pe == 1 else torch.zeros(1, tokens, embed_dim)
            self.pos_embed = nn.Parameter(table.to(**factory), requires_grad=use_pe == 2)
        if tpe:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, self.grid[0], embed_dim, **factory))
        self.tpe = tpe

        self.x_embedder = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        self.t_embedder = TimestepEmbedder(embed_dim, scale=1000.0, **factory)
        if has_text:
            self.y_embedder = nn.Linear(d_context, embed_dim, **factory)
        elif num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, embed_dim, class_dropout_prob, **factory)

        if mixer is not None and self.scan_spec.mixer == "parallel_mamba":
            raise ValueError(
                f"mixer= replaces one walk per layer, scan_type={scan_type!r} has several at once"
            )
        options = dict(ssm_cfg or {})
        if mixer is None and self.scan_spec.mixer != "mamba":
            options["official_backward_dt_init"] = official_backward_dt_init
        if self.scan_spec.mixer == "parallel_mamba":
            options["num_orders"] = self.scan_spec.num_directions
        build_mixer = partial(
            get_mixer(mixer or MIXERS[self.scan_spec.mixer]), embed_dim, **options, **factory
        )
        norm = partial(RMSNorm if rms_norm else LayerNorm, embed_dim, eps=norm_epsilon, **factory)
        self.blocks = nn.ModuleList(
            ZigMaBlock(embed_dim, build_mixer(), norm(), has_text, tokens if use_pe == 3 else 0, **factory)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(embed_dim, patch_size * patch_size * in_channels, **factory)
        self.norm_f = norm()

        ramp = np.linspace(0, drop_path_rate, depth, dtype=np.float32).tolist()
        self.drop_path_rates = (0.0, *ramp[: depth - 1], drop_path_rate)
        self.set_checkpoint_policy("block" if use_checkpoint else "none")
        self._plans: OrderedDict[tuple, tuple[Walk, ...]] = OrderedDict()
        self._register_walks(device)
        self.reset_parameters(m_init)

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
                if not isinstance(block.mixer, tuple(MIXERS.values())):
                    continue
                weight = block.mixer.out_proj.weight
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight /= math.sqrt(self.depth)
        self.x_embedder.reset_parameters()
        self.t_embedder.reset_parameters()
        if isinstance(getattr(self, "y_embedder", None), LabelEmbedder):
            self.y_embedder.reset_parameters()
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)

    def set_checkpoint_policy(self, policy: str) -> None:
        """none, block or selective; may change at any time, also on resume."""
        if policy not in CHECKPOINT_POLICIES:
            raise unknown_name("checkpoint policy", policy, list(CHECKPOINT_POLICIES))
        for block in self.blocks:
            block.checkpoint_policy = policy

    def shard_units(self) -> list[nn.Module]:
        """What may be sharded apart; with use_pe=3 nothing, since the model reads the blocks' tables itself."""
        return [] if self.use_pe == 3 else list(self.blocks)

    def compile_blocks(self, **options) -> None:
        """Compile each block in place; keys of the state dict stay as they are."""
        compile_in_place(self.blocks, **options)

    def _walk_arrays(self, grid: tuple[int, int, int]) -> tuple[list[dict], tuple[int, ...]]:
        """The distinct walks over a grid as numpy arrays, and which of them each layer takes."""
        schedule = self.scan_spec.schedule(
            self.depth, *grid, seed=self.scan_seed, official_temporal_reversal=self.official_temporal_reversal
        )
        steps, layers = schedule.distinct()
        walks = []
        for step in steps:
            order, undo, segments = step.resolve(*grid)
            walk = dict.fromkeys(("order", "inverse", "undo", "undo_inverse"))
            raster = np.arange(len(order))
            if not (np.array_equal(order, raster) and np.array_equal(undo, raster)):
                walk = {
                    "order": order,
                    "inverse": np.argsort(order),
                    "undo": undo,
                    "undo_inverse": np.argsort(undo),
                }
            walks.append({**walk, "segments": segments, "branches": schedule.branch_orders})
        return walks, layers

    def _register_walks(self, device) -> None:
        """Keep the built grid's orders as buffers, so that they follow the model from device to device."""
        device = torch.empty(0, device=device).device
        walks, self._layer_walks = self._walk_arrays(self.grid)
        self._walk_names: list[dict] = []
        known: dict[bytes, str] = {}
        for walk in walks:
            names = dict(walk)
            for key, array in walk.items():
                if isinstance(array, np.ndarray):
                    content = array.tobytes() + repr(array.shape).encode()
                    if content not in known:
                        known[content] = f"scan_{len(known)}"
                        tensor = torch.from_numpy(array.copy())
                        self.register_buffer(known[content], tensor.to(device), persistent=False)
                    names[key] = known[content]
            self._walk_names.append(names)

    def _walks(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Walk, ...]:
        """One walk per layer: the buffers for the built grid, a small cache for others."""
        if grid == self.grid:
            own = [
                Walk(**{k: getattr(self, v) if isinstance(v, str) else v for k, v in names.items()})
                for names in self._walk_names
            ]
            return tuple(own[i] for i in self._layer_walks)
        key = (grid, device)
        if key not in self._plans:
            walks, layers = self._walk_arrays(grid)
            # Kept for training, too, which a tensor made in inference mode cannot serve.
            with torch.inference_mode(False):
                own = [
                    Walk(**{
                        k: torch.from_numpy(v.copy()).to(device) if isinstance(v, np.ndarray) else v
                        for k, v in walk.items()
                    })
                    for walk in walks
                ]  # fmt: skip
            self._plans[key] = tuple(own[i] for i in layers)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[key]

    @property
    def scan_name(self) -> str:
        """What the configuration calls the scan."""
        return self.scan_spec.text

    def scan_walks(self) -> list[tuple[Tensor | int | None, ...]]:
        """How each layer walks the built grid: gathers, segments, branches; None where it takes the raster."""
        walks = self._walks(self.grid, self.x_embedder.proj.weight.device)
        return [(walk.order, walk.undo, walk.segments, walk.branches) for walk in walks]

    def scan_state(self) -> dict[str, Tensor]:
        """The orders that a checkpoint must carry: those of random scans, by layer; else nothing."""
        if not self.scan_spec.is_seeded:
            return {}
        walks = self._walks(self.grid, self.x_embedder.proj.weight.device)
        orders = {f"layers.{i}.order": w.order for i, w in enumerate(walks) if w.order is not None}
        if walks[0].branches is not None:
            orders["branches"] = walks[0].branches
        return orders

    def check_scan_state(self, state: dict[str, Tensor]) -> None:
        """Compare stored random orders with this model's own.

        Raises:
            ValueError: an order differs: the weights were trained along another path.
        """
        own = self.scan_state()
        different = [k for k in own if k not in state or not torch.equal(own[k].cpu(), state[k].cpu())]
        if different or set(state) - set(own):
            raise ValueError(
                f"the stored random scan orders are not this model's (first difference: "
                f"{(different or sorted(set(state) - set(own)))[0]}); build it with the scan_seed it was trained "
                f"with, here scan_seed={self.scan_seed}"
            )

    def null_condition(self, y):
        """The condition that stands for "none" in guidance, built like ``y``.

        Args:
            y: labels (B,), tokens (B, S, d_context), or a ``Condition``, of which the part that this model reads is
                replaced (labels by the null class, tokens by zeros) and the rest, the mask included, stays.

        Raises:
            ValueError: the model was built without a null row, or a ``Condition`` lacks the part that it reads.
        """
        if self.class_dropout_prob <= 0:
            raise ValueError(
                "this model has no null condition, so guidance cannot be used: train it with "
                "class_dropout_prob > 0 (it adds the null class), or sample with guidance scale 1"
            )
        if isinstance(y, Condition):
            part = "tokens" if self.has_text else "labels"
            value = getattr(y, part)
            if value is None:
                raise ValueError(
                    f"this model reads {part}, and the Condition has none: give Condition({part}=...)"
                )
            return replace(y, **{part: self.null_condition(value)})
        return torch.zeros_like(y) if self.has_text else torch.full_like(y, self.num_classes)

    def _condition(self, y, batch: int, device: torch.device, t_emb_BD: Tensor):
        """The modulation vector (B, D), and for text the projected tokens and their mask."""
        mask_BS = None
        if isinstance(y, Condition):
            mask_BS = y.mask
            y = y.tokens if self.has_text else y.labels
        if not self.has_text and self.num_classes <= 0:
            return t_emb_BD, None, None
        dropped_B = None
        if self.training and self.class_dropout_prob > 0:
            dropped_B = dropped_conditions(self.class_dropout_prob, batch, device)
        if self.has_text:
            if y is None or y.dim() != 3 or y.shape[0] != batch or y.shape[-1] != self.d_context:
                given = None if y is None else tuple(y.shape)
                raise ValueError(
                    f"this model reads text: y must be tokens ({batch}, S, {self.d_context}), got {given}"
                )
            check_mask(mask_BS, y)
            y = y.to(self.y_embedder.weight.dtype)
            if dropped_B is not None:
                y = torch.where(dropped_B[:, None, None], torch.zeros_like(y), y)
            context_BSD = self.y_embedder(y)
            if mask_BS is None:
                pooled = context_BSD.mean(dim=1)
            else:
                weight = mask_BS.unsqueeze(-1).to(context_BSD.dtype)
                pooled = (context_BSD * weight).sum(1) / weight.sum(1).clamp_min(1)
            return t_emb_BD + pooled, context_BSD, mask_BS
        if y is None and self.class_dropout_prob > 0:
            y = torch.full((batch,), self.num_classes, dtype=torch.int64, device=device)
        if y is None or y.shape != (batch,) or y.is_floating_point():
            given = None if y is None else f"{tuple(y.shape)} {y.dtype}"
            raise ValueError(f"this model reads class labels: y must be integers ({batch},), got {given}")
        check_labels(y, self.num_classes, self.class_dropout_prob > 0)
        return t_emb_BD + self.y_embedder(y, dropped_B), None, None

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens (B, L, D) with positions, and the grid (T, h, w)."""
        wanted = "(B, T, C, H, W)" if self.video_frames else "(B, C, H, W)"
        if x.dim() != (5 if self.video_frames else 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"this model reads {wanted} with C={self.in_channels} (video_frames={self.video_frames}), "
                f"got {tuple(x.shape)}"
            )
        if x.shape[0] == 0:
            raise ValueError(f"a batch of 0 samples (x has shape {tuple(x.shape)}); give at least one")
        frames = x.shape[1] if self.video_frames else 1
        grid = (frames, *check_divisible(x.shape[-2], x.shape[-1], self.patch_size))
        x = self.x_embedder(x.flatten(0, -4).to(self.x_embedder.proj.weight.dtype))
        x = x.reshape(-1, math.prod(grid), self.embed_dim)
        if self.use_pe in (1, 2):
            x = x + interpolate_positions(self.pos_embed, self.grid, grid)
        if self.tpe:
            table = interpolate_positions(self.temporal_pos_embedding, (self.grid[0], 1, 1), (frames, 1, 1))
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
        hidden, grid = self._embed(x)
        batch, device = hidden.shape[0], hidden.device
        if t.shape != (batch,):
            raise ValueError(f"t must hold one time per sample, shape ({batch},), got {tuple(t.shape)}")
        c, context, mask = self._condition(y, batch, device, self.t_embedder(t))

        scales: list[Tensor | None] = [None] * (self.depth + 1)
        if self.training and max(self.drop_path_rates) > 0:
            scales = list(drop_path_scales(self.drop_path_rates, batch, device, hidden.dtype))
        stream = torch.promote_types(hidden.dtype, torch.float32) if self.residual_in_fp32 else hidden.dtype
        residual, hidden = hidden.to(stream), torch.zeros_like(hidden)
        features = {}
        for i, (block, walk) in enumerate(zip(self.blocks, self._walks(grid, device), strict=True)):
            positions = None if self.use_pe != 3 else interpolate_positions(block.pos_embed, self.grid, grid)
            args = (hidden, residual, c, walk, context, mask, scales[i], positions)
            hidden, residual = block(*args)
            if f"blocks.{i}" in return_features:
                features[f"blocks.{i}"] = hidden
        if scales[-1] is not None:
            hidden = hidden * scales[-1][:, None, None]
        out = self.final_layer(self.norm_f(residual + hidden).to(hidden.dtype))

        per_frame = out.reshape(batch * grid[0], grid[1] * grid[2], -1)
        out = unpatchify(per_frame, grid[1], grid[2], self.patch_size, self.in_channels).reshape(x.shape)
        if not return_features:
            return out
        missing = [name for name in return_features if name not in features]
        if missing:
            raise unknown_name("feature", missing[0], [f"blocks.{i}" for i in range(self.depth)])
        return out, features


SIZES = {"s": (368, 24), "b": (768, 24), "m": (768, 48), "l": (1024, 48), "h": (1536, 48)}


for _size, (_dim, _depth) in SIZES.items():
    for _patch in (1, 2, 4):
        _shape = {"embed_dim": _dim, "depth": _depth, "patch_size": _patch}
        register_variant(f"zigma_{_size}_{_patch}", ZigMa, "ZigMa", **_shape)
