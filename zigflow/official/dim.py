"""DiM's published network configuration as keywords of our class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .names import renamed

_NAMES = {"sample_size": "img_dim", "num_layers": "depth", "num_embeds_ada_norm": "num_classes"}
_MIXER_NAMES = {"mamba_d_state": "d_state", "mamba_d_conv": "d_conv", "mamba_expand": "expand"}
# Nothing in the published network reads these, or only parts that are switched off below.
_DEAD = (
    "name", "pretrained_path", "use_bidirectional_rnn", "nested_order", "use_conv1d", "kv_as_one_token_idx",
    "num_2d_enc_dec_layers", "sequence_schedule", "sub_sequence_schedule", "attention_bias", "activation_fn",
    "norm_elementwise_affine", "multi_times", "freeu_param", "num_patches", "pattern_type",
)  # fmt: skip
# Switches with the one value that every published configuration gives them.
_FIXED = {
    "norm_type": "ada_norm_single", "mamba_type": "enc", "no_ff": True, "is_extra_tokens": True, "rms": True,
    "use_pad_token": True, "use_a4m_adapter": True, "use_adapter_modules": True, "encoder_start_blk_id": 1,
    "is_absorb": False, "pos_encoding_type": "learnable", "drop_path_rate": 0.0, "drop_rate": 0.0,
    "is_align_exchange_q_kv": False, "is_random_patterns": False, "is_freeu": False, "is_difffit": False,
    "mlp_time_embed": False, "is_uconnect": True,
}  # fmt: skip
_SCANS = {3: "sweep4", 1: "sweep2", 0: "sweep1"}


def dim_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``zigflow.models.dim.DiM``; ``given`` is in the published words, in ours, or mixed.

    Raises:
        ValueError: a keyword is given twice, or has a value that no published configuration has.
    """
    left = {k: v for k, v in given.items() if k not in _DEAD}
    for name, value in _FIXED.items():
        found = left.pop(name, value)
        if found != value:
            raise ValueError(
                f"{name}={found!r}: every published configuration of DiM has {value!r}, no other is known here"
            )
    left = renamed(left, _NAMES)
    made = {}
    if "attention_head_dim" in left:
        made["embed_dim"] = left.pop("attention_head_dim") * left.pop("num_attention_heads", 1)
    mixer = {new: left.pop(old) for old, new in _MIXER_NAMES.items() if old in left}
    if mixer:
        made["ssm_cfg"] = {**mixer, **left.pop("ssm_cfg", {})}
        # The published pads are as many as the convolution's taps, unless said.
        made["num_pads"] = left.pop("pad_token_len", mixer.get("d_conv", 3))
    if "pad_token_schedules" in left:
        schedules = left.pop("pad_token_schedules")
        layouts = [name for name in schedules if name != "dec_split"]
        if len(layouts) != 1:
            raise ValueError(
                f"pad_token_schedules={list(schedules)}: give one of lateral and rho_pad, beside dec_split"
            )
        made["pad_layout"] = layouts[0]
        made["num_split"] = made.get("num_pads", 3) if "dec_split" in schedules else 0
    if "scan_pattern_len" in left:
        length = max(left.pop("scan_pattern_len"), 0)
        if length not in _SCANS:
            raise ValueError(f"scan_pattern_len={length}: known are 3 (four directions), 1 (two) and 0 (one)")
        made["scan"] = _SCANS[length]
    out_channels = left.pop("out_channels", None)
    if out_channels not in (None, left.get("in_channels", out_channels)):
        raise ValueError(
            f"out_channels={out_channels}, in_channels={left['in_channels']}: published models predict the noise alone"
        )
    tuned = left.pop("is_skip_tune", False)
    if "skip_tune_param" in left and not tuned and "official_skip_tuning" not in {**left, **ours}:
        left.pop("skip_tune_param")
    if tuned:
        made["official_skip_tuning"] = "as_published"
    return {**made, **left, **ours}


def implied_by_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether skips are joined by two linear layers, which the published code decides by the width alone."""
    if any(".skip_linear." in key for key in state_dict):
        return {"split_skip": any(".skip_linear.0." in key for key in state_dict)}
    return {}
