"""The published keywords of DiS, and what its training script stores of them."""

from collections.abc import Mapping
from typing import Any

from .names import renamed

_NAMES = {"img_size": "img_dim", "channels": "in_channels"}
# Keywords of the published constructor that change no output: the fused path computes the same, the others are not read
# by it, and the initialization is replaced by the weights.
_WITHOUT_EFFECT = ("fused_add_norm", "initializer_cfg", "conv", "if_cls_token", "drop_rate")


def dis_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance acts on three channels, and a model with classes has the null class, unless said otherwise."""
    arguments = renamed({k: v for k, v in given.items() if k not in _WITHOUT_EFFECT}, _NAMES)
    mixer = arguments.pop("bimamba_type", "v2")
    if mixer != "v2":
        raise ValueError(f"bimamba_type={mixer!r}: the published code runs with 'v2' alone")
    if arguments.get("num_classes", -1) > 0:
        arguments = {"class_dropout_prob": 0.1, **arguments}
    else:
        # The published default of 0.1 is not read without classes.
        arguments.pop("class_dropout_prob", None)
    return {"guided_channels": 3, **arguments, **ours}


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
