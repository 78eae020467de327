"""DiM: a diffusion backbone of Mamba blocks that read a padded grid in four directions, with long skip connections.

Paper: Teng et al., "DiM: Diffusion Mamba for Efficient High-Resolution Image Synthesis", 2024, arXiv:2405.14224.

The tensor story: an image (B, C, H, W) becomes patch tokens. A learned table is added to them, to a time token and to
a class token; a depthwise convolution smooths the patches. Learned pad tokens end every row of the patch grid and fill
rows below it, three learned tokens divide the time and class tokens from the grid: [time, class, split, padded grid].
Each block walks the grid in one of four directions (rows, rows backwards, columns, columns backwards), a cycle that
goes up to the middle block and back down, so that a block of the second half has the direction of the block of the
first half whose output it joins. Tokens stay in the order of the latest block: one gather per block, composed of the
inverse of one order and the next order (``scans.composed_walk``). The patches are taken out, smoothed, normalized,
modulated and give the prediction by a linear layer.

Time and class come in twice: through an embedding that modulates every block (one linear layer for all blocks, plus a
table per block), and as tokens, whose plain sum modulates the output.

Differences from the published code:
  - keyword names are the project's (``img_dim``, ``embed_dim``, ``depth``); zigflow.official translates;
  - any height and width, not five squares; layouts and orders are built once per grid, without a loop over tokens;
  - any registered scan over the padded grid (``scan``);
  - the residual stream is float32 also where blocks compute in half precision (published: cast down in every block);
  - labels are dropped in the model (published: in the data sets), the null class being the last row of both tables;
  - the published switches (``mlp_time_embed``, ``conv``, ``learn_sigma``, ``num_paths``, ``plain_blocks``,
    ``smoother_dilation``) are keywords here, off by default; zigflow.official says which others are refused;
  - skip tuning is off by default; published configurations that name it run with it off in effect (``"as_published"``)
    where weights from 1 to 0.82 were meant (``"as_intended"``).

Legend: B batch, C channels, H W image, h w patch grid, N = h * w patches, L all tokens, D width.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from dis_mamba import MambaMixer, mixer_backends
from scans import ComposedWalk, ScanSchedule, TokenLayout, composed_walk, get_scan, mirrored_schedule
from zigflow.nn import (
    PatchEmbed,
    RMSNorm,
    gated_add,
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
from zigflow.nn.skip_tuning import SkipTuning, check_skip_tuning
from zigflow.registry import unknown_name

from .variants import register_variant

PAD_LAYOUTS: dict[str, Literal["rows", "cycle"]] = {"lateral": "rows", "rho_pad": "cycle"}
_SPLIT_SKIP_ABOVE = 512
_TIME_FREQUENCIES = 256


def padded_layout(height: int, width: int, num_pads: int, pad_layout: str, num_split: int) -> TokenLayout:
    """Where [time, class, split tokens] and the (h + P, w + P) padded grid stand.

    In the table of learned tokens: time, class, the split tokens, the P pads.

    Args:
        pad_layout: "lateral": the k-th row below is pad k throughout (published for 256 x 256 images); "rho_pad": the
            rows below read pad 0, 1, .., P-1, 0, 1, .. in raster order (published for larger ones).

    Raises:
        UnknownNameError: another ``pad_layout``.
    """
    if pad_layout not in PAD_LAYOUTS:
        raise unknown_name("pad layout", pad_layout, list(PAD_LAYOUTS))
    return TokenLayout.row_end_pads(
        height, width, num_pads, bottom=PAD_LAYOUTS[pad_layout], num_prefix=2 + num_split
    )


class Plan(NamedTuple):
    """The gathers over one grid; see ``scans.ComposedWalk``.

    ``moves[i]`` is (order, inverse) before block i, None where the tokens stay.
    """

    enter: Any
    moves: tuple[tuple[Any, Any], ...]
    leave: Any


class DiMBlock(CheckpointedBlock):
    """Join the skipped tokens, if it is a block with ``skip``; move on; then a modulated and gated Mamba mixer."""

    def __init__(self, dim: int, ssm_cfg: dict, skip: bool, split_skip: bool, **factory):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(3, dim, **factory))
        self.norm1 = nn.ModuleDict({"norm": RMSNorm(dim, **factory)})
        self.attn1 = MambaMixer(dim, **ssm_cfg, **factory)
        self.skip_linear = None
        if skip and split_skip:
            self.skip_linear = nn.ModuleList(nn.Linear(dim, dim, **factory) for _ in range(2))
        elif skip:
            self.skip_linear = nn.Linear(2 * dim, dim, **factory)

    def layer(
        self,
        x_BLD: Tensor,
        modulation_B3D: Tensor,
        order_L: Tensor | None = None,
        inverse_L: Tensor | None = None,
        skip_BLD: Tensor | None = None,
        skip_weight_B: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) in the order of the block before -> (B, L, D) in this block's order."""
        if self.skip_linear is not None and skip_BLD is not None:
            x_BLD = self._join(self.skip_linear, x_BLD, skip_BLD, skip_weight_B)
        if order_L is not None and inverse_L is not None:
            x_BLD = permute(x_BLD, order_L, inverse_L)
        shift, scale, gate = (self.scale_shift_table + modulation_B3D).unbind(1)
        normed, _, _ = read_stream(self.norm1["norm"], None, x_BLD, shift, scale, dtype=shift.dtype)
        return gated_add(x_BLD, self.attn1(normed), 1 + gate)

    def _join(
        self, linear: nn.Module, x_BLD: Tensor, skip_BLD: Tensor, skip_weight_B: Tensor | None
    ) -> Tensor:
        """One linear layer on both, or the sum of one on each; the result replaces the stream, in its dtype."""
        if skip_weight_B is not None:
            skip_BLD = skip_BLD * skip_weight_B[:, None, None]
        dtype = self.scale_shift_table.dtype
        if isinstance(linear, nn.ModuleList):
            own, kept = linear
            return (own(x_BLD.to(dtype)) + kept(skip_BLD.to(dtype))).to(x_BLD.dtype)
        return linear(torch.cat([x_BLD, skip_BLD], dim=-1).to(dtype)).to(x_BLD.dtype)


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, **factory):
        super().__init__()
        self.linear_1 = nn.Linear(_TIME_FREQUENCIES, dim, **factory)
        self.linear_2 = nn.Linear(dim, dim, **factory)

    def forward(self, t_B: Tensor) -> Tensor:
        frequencies = sinusoidal_embedding(t_B, _TIME_FREQUENCIES).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(frequencies)))


class _ClassEmbedder(nn.Module):
    def __init__(self, rows: int, dim: int, **factory):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim, **factory)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class SharedModulation(nn.Module):
    """Time and class as the shift, scale and gate (B, 3, D) that all blocks share."""

    def __init__(self, dim: int, rows: int, **factory):
        super().__init__()
        self.emb = nn.ModuleDict(
            {
                "timestep_embedder": _TimestepEmbedder(dim, **factory),
                "class_embedder": _ClassEmbedder(rows, dim, **factory),
            }
        )
        self.linear = nn.Linear(dim, 3 * dim, **factory)

    def forward(self, t_B: Tensor, labels_B: Tensor) -> Tensor:
        embedded = self.emb["timestep_embedder"](t_B) + self.emb["class_embedder"](labels_B)
        return self.linear(nn.functional.silu(embedded)).unflatten(-1, (3, -1))


class PadsAndSmoothers(nn.Module):
    """The learned pad and split tokens, and the 3 x 3 depthwise convolutions before and after the blocks."""

    def __init__(self, dim: int, num_pads: int, num_split: int, dilation: int = 1, **factory):
        super().__init__()
        if num_split:
            self.pad_token_dec_split = nn.Parameter(torch.empty(1, num_split, dim, **factory))
        self.pad_token = nn.Parameter(torch.empty(1, dim, num_pads, **factory))
        taps = {"padding": dilation, "dilation": dilation, "groups": dim, **factory}
        self.first_smoother = nn.Conv2d(dim, dim, 3, **taps)
        self.last_smoother = nn.Conv2d(dim, dim, 3, **taps)
        self.num_split = num_split

    def extra_repr(self) -> str:
        return f"pads={self.pad_token.shape[-1]}, split={self.num_split}"

    def tokens(self, batch: int) -> list[Tensor]:
        """The split tokens and the pads, each (B, n, D)."""
        split = [self.pad_token_dec_split] if self.num_split else []
        return [table.expand(batch, -1, -1) for table in (*split, self.pad_token.transpose(1, 2))]

    @staticmethod
    def smooth(convolution: nn.Conv2d, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) -> (B, N, D) over the patch grid (h, w), zeros around it."""
        x_BDhw = x_BND.transpose(1, 2).unflatten(2, grid)
        return convolution(x_BDhw).flatten(2).transpose(1, 2)


def _check_options(
    depth: int,
    num_pads: int,
    num_split: int,
    num_paths: int | None,
    plain_blocks: int,
    smoother_dilation: int,
) -> None:
    if num_pads < 1 or num_split < 0:
        raise ValueError(f"num_pads is at least 1 and num_split at least 0, got {num_pads}, {num_split}")
    if num_paths is not None and num_paths < 1:
        raise ValueError(f"num_paths is at least 1, or None for all paths of the scan, got {num_paths}")
    if not 0 <= plain_blocks <= depth or smoother_dilation < 1:
        raise ValueError(
            f"plain_blocks lies in 0..depth ({depth}) and smoother_dilation is at least 1, got {plain_blocks}, "
            f"{smoother_dilation}"
        )


class DiM(SkipTuning, Backbone):
    """The DiM backbone; the defaults are those of the published model for 256 x 256 images of ImageNet, size H.

    Args:
        in_channels, img_dim, patch_size: the input; ``img_dim`` is a side or (height, width).
        embed_dim, depth: width D and number of blocks: ``plain_blocks`` blocks, k blocks whose outputs are kept, k
            blocks that join them; where these do not add up to the depth, there is a plain block in the middle.
        learn_sigma: C more output channels, the variance of the Gaussian process.
        mlp_time_embed, conv: Linear, SiLU, Linear on the time token; a 3 x 3 convolution over the output.
        plain_blocks: blocks before the first whose output is kept; they walk path 0.
        smoother_dilation: of the convolutions before and after the blocks.
        num_classes, class_dropout_prob: classes, and how often a label is replaced by the null class in training. The
            tables always have a row for the null class; guidance needs ``class_dropout_prob`` > 0.
        unconditional: feed the null class always, as the published CIFAR-10 model, whose tables have ten rows that
            nothing reads.
        pad_layout, num_pads, num_split: see ``padded_layout``.
        scan: a registered scan over the padded grid; its paths are the cycle. "sweep4" is the published one.
        num_paths: the cycle is the first so many paths of the scan; None: all.
        scan_seed: the seed of random scans.
        skip: the long skip connections. split_skip: two linear layers whose results are summed in the place of one
            on both; None: two above width 512, as published.
        official_skip_tuning: weights of the kept outputs: None for none, "as_published" or "as_intended". Block by
            block they lie at ``1 - (1 - b) t / 1000``, b going evenly from ``skip_tune_param[1]`` in the first joining
            block to ``skip_tune_param[0]`` in the last one, and t as diffusion processes feed it, 1000 for noise; the
            published code takes t = 1 whatever the time is.
        ssm_cfg: keywords of the mixer (d_state, d_conv, expand, dt_rank, ..., backend); d_conv is 3 by default.
        residual_in_fp32: keep the residual stream in float32 whatever the blocks compute in.
        use_checkpoint: recompute each block in the backward pass (policy "block").

    Raises:
        ValueError: values that exclude each other, named with what is allowed.
    """

    # Flow times lie in [0, 1]; the sinusoids are made for 0..1000.
    registries: ClassVar = {"ssm_cfg.backend": mixer_backends}
    time_scale = 1000.0
    position_tables = ("additional_embed",)
    position_mode = "bilinear"
    output_layers = ("proj_out_2",)
    free_keywords = ("pad_layout", "official_skip_tuning", "skip_tune_param")

    def __init__(
        self,
        in_channels: int = 4,
        embed_dim: int = 1536,
        depth: int = 49,
        img_dim: int | tuple[int, int] = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        unconditional: bool = False,
        learn_sigma: bool = False,
        mlp_time_embed: bool = False,
        conv: bool = False,
        plain_blocks: int = 1,
        smoother_dilation: int = 1,
        pad_layout: str = "lateral",
        num_pads: int = 3,
        num_split: int = 3,
        scan: str = "sweep4",
        num_paths: int | None = None,
        scan_seed: int = 0,
        skip: bool = True,
        split_skip: bool | None = None,
        official_skip_tuning: str | None = None,
        skip_tune_param: tuple[float, float] = (0.82, 1.0),
        ssm_cfg: dict | None = None,
        residual_in_fp32: bool = True,
        use_checkpoint: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_classes = max(num_classes, 0)
        self.describe(
            in_channels=in_channels, img_dim=img_dim, patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            num_classes=-1 if unconditional or num_classes == 0 else num_classes, class_dropout_prob=class_dropout_prob,
        )  # fmt: skip
        _check_options(depth, num_pads, num_split, num_paths, plain_blocks, smoother_dilation)
        check_skip_tuning(official_skip_tuning)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.null_label = num_classes
        self.pad_layout, self.num_pads, self.num_split = pad_layout, num_pads, num_split
        self.scan, self.scan_seed, self.num_paths = scan, scan_seed, num_paths
        self.plain_blocks, self.skip = plain_blocks, skip
        self.joining = (depth - plain_blocks) // 2 if skip else 0
        last, first = skip_tune_param
        self.official_skip_tuning, self.skip_tune_param = official_skip_tuning, (last, first)
        self.residual_in_fp32 = residual_in_fp32
        split_skip = embed_dim > _SPLIT_SKIP_ABOVE if split_skip is None else split_skip

        # Names and their order are those of the published checkpoints, "pos_embed" for the patches included.
        patches = self.grid[0] * self.grid[1]
        self.additional_embed = nn.Parameter(torch.zeros(1, 2 + patches, embed_dim, **factory))
        self.pos_embed = PatchEmbed(in_channels, embed_dim, patch_size, **factory)
        mixer = {"d_conv": 3, **(ssm_cfg or {})}
        self.transformer_blocks = nn.ModuleList(
            DiMBlock(embed_dim, mixer, depth - i <= self.joining, split_skip, **factory) for i in range(depth)
        )
        self.norm_out = nn.ModuleDict({"norm": RMSNorm(embed_dim, **factory)})
        self.adaln_single = SharedModulation(embed_dim, num_classes + 1, **factory)
        self.label_emb = nn.Embedding(num_classes + 1, embed_dim, **factory)
        self.time_embed = time_mlp(embed_dim, **factory) if mlp_time_embed else nn.Identity()
        self.a4m_adapter = PadsAndSmoothers(embed_dim, num_pads, num_split, smoother_dilation, **factory)
        self.proj_out_2 = nn.Linear(embed_dim, patch_size * patch_size * self.out_channels, **factory)
        self.proj_out_1 = nn.Linear(embed_dim, 2 * embed_dim, **factory)
        self.final_layer = nn.Identity()
        if conv:
            self.final_layer = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1, **factory)
        self.set_checkpoint_policy("block" if use_checkpoint else "none")
        self.orders: GridOrders[Plan] = GridOrders(self._plan, self.grid, device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialization; mixers and convolutions have drawn theirs already, nothing starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                if not getattr(module.bias, "_no_reinit", False):
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.adaln_single.emb["timestep_embedder"].children():
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        for table in self.a4m_adapter.parameters(recurse=False):
            nn.init.normal_(table, std=0.02)
        for module in self.transformer_blocks:
            block = cast(DiMBlock, module)
            nn.init.normal_(block.scale_shift_table, std=self.embed_dim**-0.5)
            weight = block.attn1.out_proj.weight
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            weight.div_(math.sqrt(self.depth))

    def named_blocks(self) -> dict[str, nn.Module]:
        """Every block by its name in the state dict, in the order in which they run."""
        return {f"transformer_blocks.{i}": block for i, block in enumerate(self.transformer_blocks)}

    def walk(self, grid: tuple[int, int]) -> tuple[ScanSchedule, ComposedWalk]:
        """The schedule over the L tokens of a patch grid, and its gathers."""
        layout = padded_layout(*grid, self.num_pads, self.pad_layout, self.num_split)
        scan = get_scan(self.scan)
        options = {"seed": self.scan_seed} if "seed" in scan.options else {}
        paths = scan(*(layout.body_shape or grid), **options)[: self.num_paths]
        schedule = mirrored_schedule(layout, paths, self.depth, self.plain_blocks)
        return schedule, composed_walk(layout, schedule)

    def _plan(self, grid: tuple[int, ...]) -> tuple[Any, ...]:
        """The plan of a grid (h, w), as arrays."""
        height, width = grid
        walk = self.walk((height, width))[1]
        distinct = dict.fromkeys(walk.moves)
        moves = {path: (None, None) if path.is_identity else (path.order, path.inverse) for path in distinct}
        return Plan(walk.enter, ((None, None), *(moves[path] for path in walk.moves)), walk.leave)

    @property
    def scan_name(self) -> str:
        """What the configuration calls the scan."""
        return self.scan

    def scan_walks(self) -> list[tuple[Tensor | None, ...]]:
        """The gathers over the built grid: on entering, before each block, on leaving; None where tokens stay."""
        plan = self.orders.at(self.grid, self.additional_embed.device)
        return [(plan.enter,), *plan.moves, (plan.leave,)]

    def scan_state(self) -> dict[str, Tensor]:
        """The orders that a checkpoint must carry: those of random scans, by layer; else nothing."""
        if "seed" not in get_scan(self.scan).options:
            return {}
        schedule = self.walk(self.grid)[0]
        return {f"layers.{i}.order": torch.from_numpy(s.path.order.copy()) for i, s in enumerate(schedule)}

    def _labels(self, y, batch: int, device: torch.device) -> Tensor:
        if self.num_classes < 0:
            return torch.full((batch,), self.null_label, dtype=torch.int64, device=device)
        return read_labels(y, batch, self.num_classes, self.class_dropout_prob, self.training, device)

    def _embed(self, x: Tensor, t: Tensor, y) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], Plan]:
        """Tokens (B, L, D) as block 0 reads them, what modulates the blocks and the output, the grid, its gathers."""
        batch, grid = x.shape[0], self.check_input(x, t)
        plan = self.orders.at(grid, x.device)
        labels = self._labels(y, batch, x.device)
        dtype = self.additional_embed.dtype
        time = self.time_embed(sinusoidal_embedding(t, self.embed_dim).to(dtype))
        label = self.label_emb(labels)
        extras, table = self.additional_embed[:, :2], self.additional_embed[:, 2:]
        table = interpolate_positions(table, (1, *self.grid), (1, *grid), mode=self.position_mode)
        patches = self.pos_embed(x.to(dtype)) + table
        patches = self.a4m_adapter.smooth(self.a4m_adapter.first_smoother, patches, grid)
        front = torch.stack([time, label], dim=1) + extras
        tokens = torch.cat([patches, front, *self.a4m_adapter.tokens(batch)], dim=1)
        return tokens.index_select(1, plan.enter), self.adaln_single(t, labels), time + label, grid, plan

    def forward(self, x: Tensor, t: Tensor, y=None, return_features: tuple[str, ...] = ()):
        """Predict from a noisy image.

        Args:
            x: (B, C, H, W); H and W multiples of the patch size.
            t: (B,) times as the process feeds them, 0..1000.
            y: labels (B,), a ``Condition``, or None: the null class.
            return_features: "transformer_blocks.{i}" for the outputs of those blocks, (B, L, D) in the order of the
                layout: time, class, split tokens, padded grid.

        Returns:
            (B, out_channels, H, W): C channels of prediction, with ``learn_sigma`` C of variance; with
            ``return_features`` also a dict of features.
        """
        hidden, modulation, condition, grid, plan = self._embed(x, t, y)
        if self.residual_in_fp32:
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        features, kept = {}, []
        weights = [None] * (self.depth - self.joining) + self.skip_weights(t, self.joining)
        for i, (block, move, weight) in enumerate(
            zip(self.transformer_blocks, plan.moves, weights, strict=True)
        ):
            skip = None if block.skip_linear is None else kept.pop()
            if skip is not None and skip is hidden:
                # The first joining block joins its own input, which torch.compile would make a graph of its own for.
                skip = skip.view_as(skip)
            hidden = block(hidden, modulation, *move, skip, weight)
            if self.plain_blocks <= i < self.plain_blocks + self.joining:
                kept.append(hidden)
            if (name := f"transformer_blocks.{i}") in return_features:
                home = torch.from_numpy(self.walk(grid)[1].homes[i].order.copy())
                features[name] = hidden.index_select(1, home.to(hidden.device))
        dtype = self.additional_embed.dtype
        out = hidden.index_select(1, plan.leave).to(dtype)
        out = self.a4m_adapter.smooth(self.a4m_adapter.last_smoother, out, grid)
        shift, scale = self.proj_out_1(nn.functional.silu(condition)).chunk(2, dim=-1)
        out = self.proj_out_2(modulate(self.norm_out["norm"](out).to(shift.dtype), shift, scale))
        out = self.final_layer(unpatchify(out, *grid, self.patch_size, self.out_channels))
        return self.with_features(out, features, return_features)


_SHAPES = {
    "s": {"embed_dim": 512, "depth": 25},
    "l": {"embed_dim": 1024, "depth": 49},
    "h": {"embed_dim": 1536, "depth": 49},
}
_CIFAR = {
    "in_channels": 3,
    "img_dim": 32,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
    "unconditional": True,
}
_UPSAMPLED = {"pad_layout": "rho_pad", "class_dropout_prob": 0.15, "official_skip_tuning": "as_published"}
# Name -> (shape, the rest): the published configurations; h_1024 and h_1536 are the grids of 2x and 3x upsampling.
PUBLISHED = {
    "s": ("s", _CIFAR),
    "l": ("l", {"class_dropout_prob": 0.15}),
    "h": ("h", {}),
    "h_512": ("h", {"img_dim": 64, "pad_layout": "rho_pad", "class_dropout_prob": 0.15}),
    "h_1024": ("h", {"img_dim": 128, **_UPSAMPLED}),
    "h_1536": ("h", {"img_dim": 192, **_UPSAMPLED}),
}


for _name, (_shape, _rest) in PUBLISHED.items():
    register_variant(f"dim_{_name}", DiM, "DiM", **_SHAPES[_shape], **_rest)
