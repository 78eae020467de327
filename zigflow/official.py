"""Official checkpoints: reading their files safely, and their weights in our models.

Official ``.pt`` files are pickles. They are read with ``weights_only=True`` under an allow-list of exactly
the types that the family's layout holds; anything else in the file is refused by name.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zigflow.registry import unknown_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """One published code base: how its model is built here and what its files may contain."""

    build: Callable[..., nn.Module]
    allowed_types: Callable[[], list[Any]]
    optional_keys: Callable[[str], bool] = lambda key: False
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda ctor_kwargs, ours: None


@dataclass(frozen=True)
class OfficialFile:
    """What an official file holds: EMA weights, the constructor's keywords where stored, the step."""

    state_dict: dict[str, Tensor]
    ctor_kwargs: dict[str, Any] | None
    step: int | None
    config: dict[str, Any] = field(default_factory=dict)


def _build_zigma(ctor_kwargs: Mapping[str, Any], ours: Mapping[str, Any]) -> nn.Module:
    from model_zigma import ZigMa

    return ZigMa(**{**ctor_kwargs, **ours})


def _check_zigma(ctor_kwargs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse weights of random scans: the published model draws its permutations unseeded and saves none of them."""
    from scans import parse_scan_type

    scan_type = ctor_kwargs.get("scan_type", "v2")
    if ours.get("scan_seed") is None and parse_scan_type(scan_type).is_seeded:
        raise ValueError(
            f"official checkpoints of scan_type={scan_type} do not hold their permutations, which were drawn without a "
            "seed when the model was built: no order found here is the one that these weights were trained along. "
            "Give scan_seed= to load them along other random orders all the same, or train anew"
        )


def _zigma_types() -> list[Any]:
    """The containers that ZigMa's training script stores as ``args`` (an omegaconf DictConfig)."""
    from collections import defaultdict
    from typing import Any as AnyType

    from omegaconf import DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    return [dict, list, AnyType, DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict]


FAMILIES: dict[str, Family] = {
    "zigma": Family(
        _build_zigma,
        _zigma_types,
        optional_keys=lambda k: k.startswith("blocks.") and k.endswith(".pos_embed"),
        check=_check_zigma,
    ),
}


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("official family", name, list(FAMILIES))
    return FAMILIES[name]


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DistributedDataParallel and torch.compile leave in keys."""

    def clean(key: str) -> str:
        return key.removeprefix("module.").replace("_orig_mod.", "")

    return {clean(key): value for key, value in state_dict.items()}


def load_official(
    family: str, ctor_kwargs: Mapping[str, Any], state_dict: Mapping[str, Tensor], **ours: Any
) -> nn.Module:
    """Our model with an official checkpoint's weights.

    Args:
        family: the published code base ("zigma").
        ctor_kwargs: keywords as the official constructor takes them.
        state_dict: tensors as the official checkpoint holds them; wrapper prefixes are removed.
        ours: keywords of our own, such as ``official_temporal_reversal=True``; ``scan_seed``, which random scans need,
            counts only here.

    Returns:
        The module in eval mode, float32.

    Raises:
        UnknownNameError: the family is not known.
        ValueError: keys are missing, left over or of another shape, the first ones are named; or the checkpoint was
            trained along random orders, which it does not hold, and ``scan_seed`` is not given.
    """
    known = _family(family)
    known.check(ctor_kwargs, ours)
    model = known.build(ctor_kwargs, ours).float()
    own = model.state_dict()
    given = {k: v.float() if v.is_floating_point() else v for k, v in strip_wrappers(state_dict).items()}
    missing = [k for k in own if k not in given and not known.optional_keys(k)]
    extra = [k for k in given if k not in own]
    wrong = [k for k in given if k in own and given[k].shape != own[k].shape]
    if missing or extra or wrong:
        parts = []
        for what, keys in (("missing", missing), ("left over", extra)):
            if keys:
                parts.append(f"{len(keys)} {what} (first: {keys[0]})")
        if wrong:
            k = wrong[0]
            parts.append(
                f"{len(wrong)} of another shape (first: {k} {tuple(given[k].shape)}, built {tuple(own[k].shape)})"
            )
        raise ValueError(
            f"these weights do not fit {family} built with {dict(ctor_kwargs)}: {'; '.join(parts)}. "
            "Check the constructor's keywords against the checkpoint's published configuration."
        )
    model.load_state_dict(given, strict=False)
    return model.eval()


def read_official(path: str | Path, family: str) -> OfficialFile:
    """Read an official ``.pt`` file: weights only, the allow-list of its family, nothing executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds a type outside the allow-list (named).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    allowed = _family(family).allowed_types()
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        try:
            names = {f"{t.__module__}.{t.__qualname__}" for t in allowed}
            foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - names)
        except Exception:
            foreign = []
        detail = f"it holds {', '.join(foreign)}, which {family} files do not need" if foreign else reason
        raise ValueError(f"{path} is refused as an official {family} checkpoint: {detail}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, an official {family} checkpoint is a dict"
        )

    weights = content.get("ema") or content.get("model")
    if weights is None:
        weights = content
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(
            f"{path} has neither 'ema' nor 'model' weights; its keys are {sorted(map(str, content))[:8]}"
        )
    config = _plain(content.get("args"))
    model = config.get("model", {}) if isinstance(config, dict) else {}
    kwargs = model.get("params") if isinstance(model, dict) else None
    return OfficialFile(
        state_dict=strip_wrappers(weights),
        ctor_kwargs=dict(kwargs) if kwargs else None,
        step=content.get("train_steps"),
        config=config if isinstance(config, dict) else {},
    )


def _plain(value: Any) -> Any:
    """An omegaconf container as plain dicts and lists, unresolved interpolations left as text."""
    if value is None or isinstance(value, (dict, list, str, int, float, bool)):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else vars(value)
