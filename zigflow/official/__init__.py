"""Official checkpoints: reading their files safely, and their weights in our models.

Official ``.pt`` files are pickles. They are read with ``weights_only=True`` under an allow-list of exactly
the types that the family's layout holds; anything else in the file is refused by name.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zigflow.registry import unknown_name

from .dim import DIM_KEYWORDS, dim_arguments, implied_by_weights
from .dis import DIS_KEYWORDS, dis_arguments, dis_kwargs
from .keywords import Keyword, read_keywords
from .names import namespace
from .transformers import (
    DIT_KEYWORDS,
    UVIT_KEYWORDS,
    UVIT_TEXT_KEYWORDS,
    dit_arguments,
    dit_kwargs,
    sit_arguments,
    uvit_arguments,
    uvit_text_arguments,
)
from .zigma import ZIGMA_KEYWORDS

log = logging.getLogger(__name__)

OFFICIAL_SUFFIXES = (".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Family:
    """One published code base: how its model is built here and what its files may contain.

    Attributes:
        target: our class, as a configuration names it.
        keywords: the published constructor's, and what becomes of each.
        allowed_types: what its files may hold beside tensors and plain containers.
        arguments: those keywords in our words, with ours beside them, as keywords of our class.
        optional_keys: weights that an official file need not have.
        check: refuses what cannot be loaded.
        ctor_kwargs: the constructor's keywords from the training arguments that a file holds, or None.
        processes: what its published models were trained under, as ``process=`` names it.
        implied: keywords of our class that only the weights tell.
    """

    target: str
    keywords: Mapping[str, Keyword]
    allowed_types: Callable[[], list[Any]] = list
    arguments: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda given, ours: {
        **given,
        **ours,
    }
    optional_keys: Callable[[str], bool] = lambda key: False
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda ctor_kwargs, ours: None
    ctor_kwargs: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda config: None
    processes: tuple[str, ...] = ("flow",)
    implied: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] = lambda state_dict: {}


@dataclass(frozen=True)
class OfficialFile:
    """What an official file holds: EMA weights, the constructor's keywords where stored, the step."""

    state_dict: dict[str, Tensor]
    ctor_kwargs: dict[str, Any] | None
    step: int | None
    config: dict[str, Any] = field(default_factory=dict)


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


def _zigma_kwargs(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    model = config.get("model", {})
    return model.get("params") if isinstance(model, dict) else None


_UVIT_WEIGHTS = "nnet_ema.pth"

FAMILIES: dict[str, Family] = {
    "dim": Family(
        "zigflow.models.dim.DiM",
        DIM_KEYWORDS,
        arguments=dim_arguments,
        implied=implied_by_weights,
        processes=("sd_discrete", "vp"),
    ),
    "zigma": Family(
        "model_zigma.ZigMa",
        ZIGMA_KEYWORDS,
        _zigma_types,
        optional_keys=lambda k: k.startswith("blocks.") and k.endswith(".pos_embed"),
        check=_check_zigma,
        ctor_kwargs=_zigma_kwargs,
    ),
    "dis": Family(
        "zigflow.models.dis.DiS",
        DIS_KEYWORDS,
        namespace,
        dis_arguments,
        ctor_kwargs=dis_kwargs,
        processes=("gaussian",),
    ),
    "dit": Family(
        "zigflow.models.dit.DiT",
        DIT_KEYWORDS,
        namespace,
        dit_arguments,
        ctor_kwargs=dit_kwargs,
        processes=("gaussian",),
    ),
    "sit": Family("zigflow.models.dit.DiT", DIT_KEYWORDS, namespace, sit_arguments, ctor_kwargs=dit_kwargs),
    "uvit": Family(
        "zigflow.models.uvit.UViT", UVIT_KEYWORDS, arguments=uvit_arguments, processes=("vp", "sd_discrete")
    ),
    "uvit_t2i": Family(
        "zigflow.models.uvit.UViT",
        UVIT_TEXT_KEYWORDS,
        arguments=uvit_text_arguments,
        processes=("sd_discrete",),
    ),
}


def family_of(model: Mapping[str, Any]) -> str:
    """The family whose official files fit a model's node (``_target_`` and keywords).

    Raises:
        ValueError: no published code base has that model.
    """
    target = model.get("_target_")
    found = [name for name, known in FAMILIES.items() if known.target == target]
    if not found:
        raise ValueError(
            f"there are no official checkpoints of {target}: known are {', '.join(k.target for k in FAMILIES.values())}"
        )
    second = {"dit": model.get("drop_sigma"), "uvit": model.get("has_text")}.get(found[0])
    return found[1] if second else found[0]


def target_of(family: str) -> str:
    """Our class for a family, as a configuration names it.

    Raises:
        UnknownNameError: the family is not known.
    """
    return _family(family).target


def process_of(family: str) -> str:
    """The process that a family's published models were trained under, as ``process=`` names it.

    Raises:
        UnknownNameError: the family is not known.
        ValueError: there are several, and only its user knows which one a file belongs to.
    """
    known = _family(family).processes
    if len(known) != 1:
        choices = " or ".join(f"process={name}" for name in known)
        raise ValueError(
            f"official {family} files were trained under {choices} and do not say which: give it"
        )
    return known[0]


def read_null_text(path: str | Path) -> Tensor:
    """The encoded empty prompt (S, d_context) from an ``empty_context.npy``; no pickled content is read.

    Raises:
        ValueError: the file holds something else.
    """
    array = np.load(path, allow_pickle=False)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}, a null text is floats (S, d_context)"
        )
    return torch.from_numpy(array.astype(np.float32))


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_name("official family", name, list(FAMILIES))
    return FAMILIES[name]


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DistributedDataParallel and torch.compile leave in keys."""

    def clean(key: str) -> str:
        return key.removeprefix("module.").replace("_orig_mod.", "")

    return {clean(key): value for key, value in state_dict.items()}


def official_arguments(family: str, ctor_kwargs: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
    """The keywords of our class for a published model, what is implied there made explicit.

    Args:
        ctor_kwargs: keywords of the published constructor, or of our class.
        ours: keywords of our class alone.

    Raises:
        UnknownNameError: the family, or a keyword, is not known; near matches are named.
        ValueError: a keyword is given twice, or has a value that is not served.
    """
    known = _family(family)
    own = [name for name in inspect.signature(_class_of(known)).parameters if name != "self"]
    given = read_keywords(family, known.keywords, ctor_kwargs, own)
    return known.arguments(given, read_keywords(family, {}, ours, own))


def _class_of(family: Family) -> Callable[..., nn.Module]:
    module, _, name = family.target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def load_official(
    family: str,
    ctor_kwargs: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    null_text: Tensor | None = None,
    **ours: Any,
) -> nn.Module:
    """Our model with an official checkpoint's weights.

    Args:
        family: the published code base: "zigma", "dim", "dis", "dit", "sit", "uvit" or "uvit_t2i".
        ctor_kwargs: keywords as the official constructor takes them, or as our class does.
        state_dict: tensors as the official checkpoint holds them; wrapper prefixes are removed.
        null_text: (S, d_context), the encoded empty prompt that guidance of a text model needs; official files do
            not hold it.
        ours: keywords of our own, such as ``official_temporal_reversal=True``; ``scan_seed``, which random scans need,
            counts only here. For "uvit", ``class_dropout_prob`` > 0 says that the last row of ``num_classes`` is the
            null class.

    Returns:
        The module in eval mode, float32.

    Raises:
        UnknownNameError: the family, or a keyword, is not known.
        ValueError: a keyword has a value that is not served; keys are missing, left over or of another shape, the
            first ones are named; the checkpoint was trained along random orders, which it does not hold, and
            ``scan_seed`` is not given; or a null text is needed and not given.
    """
    known = _family(family)
    known.check(ctor_kwargs, ours)
    if null_text is not None:
        ours = {"class_dropout_prob": ctor_kwargs.get("class_dropout_prob", 0.1), **ours}
    given = {k: v.float() if v.is_floating_point() else v for k, v in strip_wrappers(state_dict).items()}
    arguments = official_arguments(family, ctor_kwargs, **ours)
    model = _class_of(known)(**{**known.implied(given), **arguments}).float()
    own = model.state_dict()
    if null_text is not None:
        given["null_text"] = null_text.float()
    elif "null_text" in own and "null_text" not in given:
        raise ValueError(
            f"official {family} files do not hold the encoded empty prompt, which guidance needs: give null_text=, "
            "a tensor (S, d_context) such as the published empty_context.npy (convert-checkpoint --null-text), or "
            "class_dropout_prob=0"
        )
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

    Of a folder ``N.ckpt`` of U-ViT's or DiM's training the EMA weights are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds a type outside the allow-list (named).
    """
    path = Path(path)
    if family.startswith(("uvit", "dim")) and path.is_dir():
        path = path / _UVIT_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    allowed = _family(family).allowed_types()
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or "it is empty or cut").splitlines()[0]
        if reason.startswith("Weights only load failed"):
            reason = "it is no file of torch, or damaged"  # Torch's own words advise to unpickle it without restraint.
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

    if "pytorch-lightning_version" in content:
        raise ValueError(_lightning_refusal(path, content.get("state_dict")))
    weights = content.get("ema") or content.get("model")
    if weights is None:
        weights = content
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(
            f"{path} has neither 'ema' nor 'model' weights; its keys are {sorted(map(str, content))[:8]}"
        )
    config = _plain(content.get("args"))
    kwargs = _family(family).ctor_kwargs(config) if isinstance(config, dict) else None
    return OfficialFile(
        state_dict=strip_wrappers(weights),
        ctor_kwargs=dict(kwargs) if kwargs else None,
        step=content.get("train_steps"),
        config=config if isinstance(config, dict) else {},
    )


def _lightning_refusal(path: Path, weights: Any) -> str:
    """Why a Lightning checkpoint is not read; that of the one published derivative is recognised by its parts."""
    names = [str(key) for key in weights] if isinstance(weights, dict) else []
    parts = {name.partition(".")[0] for name in names}
    if {"encoder", "x_embedder", "blocks"} <= parts:
        count = sum(name.startswith("blocks.") for name in names)
        return (
            f"{path} is a DiT-clipped checkpoint of Lightning ({count} weights of blocks, beside its CLIP encoder): "
            "its blocks are another network than model=dit_clipped, so its weights cannot be loaded; train "
            "model=dit_clipped on data=mscoco256_features instead (docs/formats.md)"
        )
    return (
        f"{path} is a Lightning checkpoint, which no published family here writes: save its weights as a plain dict, "
        "torch.save(model.state_dict(), FILE), in the official names"
    )


def _plain(value: Any) -> Any:
    """An omegaconf container as plain dicts and lists, unresolved interpolations left as text."""
    if value is None or isinstance(value, (dict, list, str, int, float, bool)):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else vars(value)
