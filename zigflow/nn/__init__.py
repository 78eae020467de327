"""Building blocks that two model families use unchanged."""

from dis_kernels.tokenwise import gated_add, permute

from .attention import CrossAttention, SelfAttention
from .conditioning import (
    Condition,
    LabelEmbedder,
    check_labels,
    check_mask,
    dropped_conditions,
    null_condition,
    read_labels,
    read_text,
)
from .denoiser import Denoiser, as_denoiser, check_denoiser
from .drop_path import drop_path_ramp, drop_path_scales
from .mlp import Mlp
from .modulation import modulate, read_stream
from .norm import LayerNorm, RMSNorm
from .patch import PatchEmbed, check_divisible, unpatchify
from .positions import axial_rotations, interpolate_positions, rotate, sincos_positions
from .time_embedding import TimestepEmbedder, sinusoidal_embedding, time_mlp

__all__ = [
    "Condition",
    "CrossAttention",
    "Denoiser",
    "LabelEmbedder",
    "LayerNorm",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "SelfAttention",
    "TimestepEmbedder",
    "as_denoiser",
    "axial_rotations",
    "check_denoiser",
    "check_divisible",
    "check_labels",
    "check_mask",
    "drop_path_ramp",
    "drop_path_scales",
    "dropped_conditions",
    "gated_add",
    "interpolate_positions",
    "modulate",
    "null_condition",
    "permute",
    "read_labels",
    "read_stream",
    "read_text",
    "rotate",
    "sincos_positions",
    "sinusoidal_embedding",
    "time_mlp",
    "unpatchify",
]
