"""The published keywords of ZigMa, which our class has by the same names."""

from .keywords import Keyword, inert, served
from .names import PLACEMENT

ZIGMA_KEYWORDS: dict[str, Keyword] = {
    **{
        name: served(name)
        for name in (
            "in_channels", "embed_dim", "depth", "img_dim", "patch_size", "has_text", "num_classes", "drop_path_rate",
            "n_context_token", "d_context", "ssm_cfg", "norm_epsilon", "rms_norm", "fused_add_norm", "residual_in_fp32",
            "scan_type", "video_frames", "tpe", "use_pe", "use_jit", "m_init", "use_checkpoint",
        )
    },
    # Of the initialization, which the weights replace.
    "initializer_cfg": inert(),
    **PLACEMENT,
}  # fmt: skip
