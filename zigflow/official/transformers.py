"""Keywords of DiT, SiT and U-ViT as keywords of our classes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .keywords import Keyword, inert, only, served

DIT_KEYWORDS: dict[str, Keyword] = {
    "input_size": served("img_dim"),
    "hidden_size": served("embed_dim"),
    **{
        name: served(name)
        for name in (
            "patch_size", "in_channels", "depth", "num_heads", "mlp_ratio", "class_dropout_prob", "num_classes",
            "learn_sigma",
        )
    },
}  # fmt: skip


def dit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance acts on the first three channels, as published, unless ``guided_channels`` says otherwise."""
    learned = given.get("learn_sigma", True) and not {**given, **ours}.get("drop_sigma", False)
    channels = given.get("in_channels", 4) * (2 if learned else 1)
    return {"guided_channels": min(3, channels), **given, **ours}


def sit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    return dit_arguments({"drop_sigma": given.get("learn_sigma", True), **given}, ours)


def dit_kwargs(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """From ``args.model`` such as "DiT-XL/2", ``args.image_size`` and ``args.num_classes``."""
    from zigflow.models.dit import SIZES

    size, _, patch = str(config.get("model", "")).partition("-")[2].partition("/")
    if size.lower() not in SIZES or not patch.isdigit() or not isinstance(config.get("image_size"), int):
        return None
    hidden, depth, heads = SIZES[size.lower()]
    return {
        "input_size": config["image_size"] // 8,
        "patch_size": int(patch),
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "num_classes": config.get("num_classes", 1000),
    }


UVIT_KEYWORDS: dict[str, Keyword] = {
    "img_size": served("img_dim"),
    "in_chans": served("in_channels"),
    **{
        name: served(name)
        for name in (
            "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "mlp_time_embed", "num_classes",
            "use_checkpoint", "conv", "skip",
        )
    },
    "qk_scale": only(None, because="it had no effect in the published attention"),
    "norm_layer": only(nn.LayerNorm, because="no other norm was published"),
    # Of the configuration, not of the constructor.
    "name": inert(),
}  # fmt: skip
UVIT_TEXT_KEYWORDS = {
    **{name: keyword for name, keyword in UVIT_KEYWORDS.items() if name != "num_classes"},
    "clip_dim": served("d_context"),
    "num_clip_token": served("n_context_token"),
}


def uvit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The published ``num_classes`` counts the null class; with ``class_dropout_prob`` of ours it is the last row."""
    arguments = dict(given)
    null_is_counted = ours.get("class_dropout_prob", 0) > 0 and "class_dropout_prob" not in given
    if null_is_counted and "num_classes" not in ours and arguments.get("num_classes", -1) > 0:
        arguments["num_classes"] -= 1
    return {**arguments, **ours}


def uvit_text_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    text = {"has_text": True, "d_context": 768, "n_context_token": 77}
    return {**text, **uvit_arguments(given, ours)}
