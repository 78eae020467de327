"""DiM's published network configuration as keywords of our class."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .keywords import Keyword, inert, only, served

_OTHER_NETWORK = "another network, of which no configuration was published"
_COMPOSITE = (
    "attention_head_dim", "num_attention_heads", "mamba_d_state", "mamba_d_conv", "mamba_expand", "pad_token_len",
    "pad_token_schedules", "scan_pattern_len", "out_channels", "num_patches", "is_skip_tune",
)  # fmt: skip
# Nothing on the way that published networks take reads these; the paths that ``drop_path_rate`` would drop are not on
# it either, and the rest belongs to parts that ``_FIXED`` refuses. The last two are of the configuration, not of the
# constructor.
_INERT = (
    "use_bidirectional_rnn", "nested_order", "use_conv1d", "kv_as_one_token_idx", "num_2d_enc_dec_layers",
    "sequence_schedule", "sub_sequence_schedule", "attention_bias", "activation_fn", "norm_elementwise_affine",
    "norm_eps", "multi_times", "freeu_param", "ff_dim_mult", "apply_adapter_last_linear", "is_adapter_proj_in", "nocat",
    "dropout", "drop_path_rate", "norm_num_groups", "use_linear_projection", "only_cross_attention", "upcast_attention",
    "name", "pretrained_path",
)  # fmt: skip
# Switches with the one value that every published configuration gives them, or leaves them at.
_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_single", "mamba_type": "enc", "no_ff": True, "is_extra_tokens": True, "rms": True,
    "use_pad_token": True, "use_a4m_adapter": True, "use_adapter_modules": True, "is_absorb": False,
    "pos_encoding_type": "learnable", "drop_rate": 0, "is_align_exchange_q_kv": False, "is_random_patterns": False,
    "is_freeu": False, "is_difffit": False, "is_doubel_extra_tokens": False, "use_reverse": False, "conv_dilation": 1,
    "pattern_type": "base", "cross_attention_dim": None, "double_self_attention": False, "num_vector_embeds": None,
    "attention_type": "default", "caption_channels": None,
}  # fmt: skip
DIM_KEYWORDS: dict[str, Keyword] = {
    "sample_size": served("img_dim"),
    "num_layers": served("depth"),
    "num_embeds_ada_norm": served("num_classes"),
    "is_uconnect": served("skip"),
    "use_final_conv": served("conv"),
    "encoder_start_blk_id": served("plain_blocks"),
    "tkn_conv_dilated_rate": served("smoother_dilation"),
    **{name: served(name) for name in ("patch_size", "in_channels", "mlp_time_embed", "skip_tune_param")},
    **{name: served(name) for name in _COMPOSITE},
    **{name: inert() for name in _INERT},
    **{name: only(value, because=_OTHER_NETWORK) for name, value in _FIXED.items()},
}
_MIXER_NAMES = {"mamba_d_state": "d_state", "mamba_d_conv": "d_conv", "mamba_expand": "expand"}
# What the published constructor takes where these are left out, and our class has another default.
_PUBLISHED_DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 88, "depth": 1, "in_channels": 3, "mamba_d_conv": 4,
    "pad_token_schedules": ("dec_split", "lateral"),
}  # fmt: skip
_DIRECTIONS = 4


def dim_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``zigflow.models.dim.DiM``; ``given`` in the published words, in ours, or mixed.

    Raises:
        ValueError: a value that no published configuration has.
    """
    left = dict(given)
    if "attention_head_dim" in left or "num_attention_heads" in left:
        left = {**_PUBLISHED_DEFAULTS, **left}
    made: dict[str, Any] = {}
    if "attention_head_dim" in left:
        made["embed_dim"] = left.pop("attention_head_dim") * left.pop("num_attention_heads")
    if left.get("num_classes", 0) is None:
        raise ValueError(
            f"num_embeds_ada_norm=None of dim is not served: {_OTHER_NETWORK}; unconditional models have a table of "
            "classes and feed its null class"
        )
    mixer = {new: left.pop(old) for old, new in _MIXER_NAMES.items() if old in left}
    pads = left.pop("pad_token_len", None)
    if mixer:
        made["ssm_cfg"] = {**mixer, **(left.pop("ssm_cfg", None) or {})}
        # The published pads are as many as the convolution's taps, unless said.
        pads = mixer.get("d_conv", 3) if pads is None else pads
    if pads is not None:
        made["num_pads"] = pads
    if "pad_token_schedules" in left:
        schedules = list(left.pop("pad_token_schedules"))
        layouts = [name for name in schedules if name != "dec_split"]
        if layouts not in (["lateral"], ["rho_pad"]):
            raise ValueError(
                f"pad_token_schedules={schedules}: give one of lateral and rho_pad, beside dec_split"
            )
        made["pad_layout"] = layouts[0]
        made["num_split"] = made.get("num_pads", 3) if "dec_split" in schedules else 0
    if "scan_pattern_len" in left:
        made |= _paths(left.pop("scan_pattern_len"), ours)
    made |= _channels(left)
    if left.get("num_patches") is not None:
        made |= _table_side(left)
    left.pop("num_patches", None)
    tuned = left.pop("is_skip_tune", False)
    if "skip_tune_param" in left and not tuned and "official_skip_tuning" not in {**left, **ours}:
        left.pop("skip_tune_param")
    if tuned:
        made["official_skip_tuning"] = "as_published"
    return {**left, **made, **ours}


def _paths(length: int, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The first ``length + 1`` directions; for 0 and less the published blocks leave the order alone."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise ValueError(f"scan_pattern_len={length!r}: a whole number, one less than the directions in turn")
    if "scan" in ours:
        return {}
    count = max(length, 0) + 1
    return {"scan": "sweep4", "num_paths": count if count < _DIRECTIONS else None}


def _channels(left: dict[str, Any]) -> dict[str, Any]:
    """``out_channels``: the prediction, or with as many again a variance."""
    if "out_channels" not in left:
        return {}
    out, channels = left.pop("out_channels"), left.get("in_channels", 4)
    if out is None or out == channels:
        return {"learn_sigma": False}
    if out != 2 * channels:
        raise ValueError(
            f"out_channels={out}, in_channels={channels}: a model predicts in_channels, or twice as many with a "
            f"learned variance ({channels} or {2 * channels})"
        )
    return {"learn_sigma": True}


def _table_side(left: dict[str, Any]) -> dict[str, Any]:
    """``num_patches``: the grids that are served, of which the first is that of the table."""
    patches, patch_size = left["num_patches"], left.get("patch_size", 2)
    largest = patches if isinstance(patches, int) else next(iter(patches))
    side = math.isqrt(largest)
    if side * side != largest:
        raise ValueError(f"num_patches={patches}: the table is that of a square grid, {largest} is no square")
    return {"img_dim": side * patch_size}


def implied_by_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether skips are joined by two linear layers, which the published code decides by the width alone."""
    if any(".skip_linear." in key for key in state_dict):
        return {"split_skip": any(".skip_linear.0." in key for key in state_dict)}
    return {}
