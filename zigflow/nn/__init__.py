"""Building blocks that two model families use unchanged."""

from dis_mamba import permute

from .attention import CrossAttention
from .conditioning import Condition, LabelEmbedder, dropped_conditions
from .drop_path import drop_path_scales
from .modulation import modulate
from .norm import LayerNorm, RMSNorm
from .patch import PatchEmbed, check_divisible, unpatchify
from .positions import interpolate_positions, sincos_positions
from .time_embedding import TimestepEmbedder, sinusoidal_embedding

__all__ = [
    "Condition",
    "CrossAttention",
    "LabelEmbedder",
    "LayerNorm",
    "PatchEmbed",
    "RMSNorm",
    "TimestepEmbedder",
    "check_divisible",
    "drop_path_scales",
    "dropped_conditions",
    "interpolate_positions",
    "modulate",
    "permute",
    "sincos_positions",
    "sinusoidal_embedding",
    "unpatchify",
]
