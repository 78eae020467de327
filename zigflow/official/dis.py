"""The published keywords of DiS, and what its training script stores of them."""

from collections.abc import Mapping
from typing import Any

from .keywords import Keyword, inert, only, served
from .names import PLACEMENT

DIS_KEYWORDS: dict[str, Keyword] = {
    "img_size": served("img_dim"),
    "channels": served("in_channels"),
    **{
        name: served(name)
        for name in (
            "patch_size", "embed_dim", "depth", "num_classes", "ssm_cfg", "drop_path_rate", "norm_epsilon", "rms_norm",
            "residual_in_fp32", "learn_sigma", "mlp_time_embed", "skip", "class_dropout_prob",
        )
    },
    # These change no output: the fused path computes the same, the others are not read by the published constructor,
    # and the initialization is replaced by the weights.
    **{name: inert() for name in ("fused_add_norm", "initializer_cfg", "conv", "if_cls_token", "drop_rate")},
    "bimamba_type": only("v2", because="the published code runs with 'v2' alone"),
    **PLACEMENT,
}  # fmt: skip


def dis_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance acts on three channels, and a model with classes has the null class, unless said otherwise."""
    arguments = dict(given)
    if arguments.get("num_classes", -1) > 0:
        arguments = {"class_dropout_prob": 0.1, **arguments}
    else:
        # The published default of 0.1 is not read without classes.
        arguments.pop("class_dropout_prob", None)
    channels = arguments.get("in_channels", 3) * (2 if arguments.get("learn_sigma", True) else 1)
    return {"guided_channels": min(3, channels), **arguments, **ours}


def dis_kwargs(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """From ``args.model`` such as "DiS-H/2", ``image_size``, ``latent_space`` and ``num_classes``."""
    from zigflow.models.dis import SIZES

    size, _, patch = str(config.get("model", "")).partition("-")[2].partition("/")
    if size.lower() not in SIZES or not patch.isdigit() or not isinstance(config.get("image_size"), int):
        return None
    embed_dim, depth = SIZES[size.lower()]
    latent = bool(config.get("latent_space", False))
    return {
        "img_size": config["image_size"] // 8 if latent else config["image_size"],
        "patch_size": int(patch),
        "embed_dim": embed_dim,
        "depth": depth,
        "channels": 4 if latent else 3,
        "num_classes": config.get("num_classes", -1),
    }
