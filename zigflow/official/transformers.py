"""Keywords of DiT, SiT and U-ViT as keywords of our classes."""

from collections.abc import Mapping
from typing import Any

from .names import renamed

_DIT_NAMES = {"input_size": "img_dim", "hidden_size": "embed_dim"}


def dit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance acts on three channels, as published, unless ``guided_channels`` says otherwise."""
    return {"guided_channels": 3, **renamed(given, _DIT_NAMES), **ours}


def sit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dit_arguments(given, ours)
    return {"drop_sigma": arguments.get("learn_sigma", True), **arguments}


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


_UVIT_NAMES = {"img_size": "img_dim", "in_chans": "in_channels"}
_UVIT_TEXT_NAMES = {**_UVIT_NAMES, "clip_dim": "d_context", "num_clip_token": "n_context_token"}


def uvit_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The published ``num_classes`` counts the null class; with ``class_dropout_prob`` of ours it is the last row."""
    arguments = renamed({k: v for k, v in given.items() if k != "name"}, _UVIT_NAMES)
    if arguments.pop("qk_scale", None) is not None:
        raise ValueError("qk_scale had no effect in the published attention: leave it out")
    null_is_counted = ours.get("class_dropout_prob", 0) > 0 and "class_dropout_prob" not in given
    if null_is_counted and "num_classes" not in ours and arguments.get("num_classes", -1) > 0:
        arguments["num_classes"] -= 1
    return {**arguments, **ours}


def uvit_text_arguments(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    text = {"has_text": True, "d_context": 768, "n_context_token": 77}
    return {**text, **uvit_arguments(renamed(given, _UVIT_TEXT_NAMES), ours)}
