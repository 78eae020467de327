"""A sampling command's configuration, completed by what its checkpoint says, and where its data lies now."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.engine.run_dir import flat, with_later_keys
from zigflow.overrides import takes_keyword
from zigflow.settings import SettingsError
from zigflow.shapes import data_form
from zigflow.sources import with_old_defaults
from zigflow.typed import unknown_key

log = logging.getLogger(__name__)

_SPLITS = ("source", "heldout")
_FROM_STORED = ("model", "train", "process", "codec", "scan")
# What may differ between training and sampling: numerical margins, and where a file lies on this machine.
_MAY_CHANGE = ("train.sample_eps", "process.sample_eps", "codec.path", "codec.chunk", "codec.own_scale")


def complete_from_checkpoint(given: dict[str, Any], stored: Mapping[str, Any], ckpt: str) -> dict[str, Any]:
    """A sampling command's configuration completed by that of the checkpoint.

    Raises:
        SettingsError: the command says otherwise than the checkpoint; key and both values are named.
    """
    merged = {k: v for k, v in given.items() if v is not None or k not in stored}
    for key in ("is_latent", "use_latent", "max_grad_norm", "ema_rate"):
        merged[key] = stored.get(key) if given.get(key) is None else given[key]
    for group in _FROM_STORED:
        own, asked = with_later_keys(group, stored[group]), dict(given[group] or {})
        chosen = asked.get("name") not in ("from_checkpoint", "from_model")
        for key, value in flat(asked, f"{group}.").items():
            if value is None or (key == f"{group}.name" and not chosen):
                continue
            short = key.removeprefix(f"{group}.")
            before = flat(own).get(short)
            if key in _MAY_CHANGE:
                own[short] = value
            elif before != value:
                name = short.partition(".")[0]
                if short not in flat(own) and not takes_keyword(str(own.get("_target_")), name):
                    raise SettingsError(unknown_key(key, [f"{group}.{k}" for k in flat(own)]))
                raise SettingsError(
                    f"{key}={value} contradicts the checkpoint {ckpt}, which was trained with {key}={before}: "
                    "drop the override, or sample from another checkpoint"
                )
        merged[group] = own
    # The stored process was resolved from train.*; a margin changed there means the process too.
    margin = (given["train"] or {}).get("sample_eps")
    if margin is not None and "sample_eps" in merged["process"]:
        merged["process"]["sample_eps"] = margin
    data = dict(given["data"])
    trained = with_old_defaults(stored["data"], stored["data"])
    if data.get("name") == "from_checkpoint":
        kept = {k: v for k, v in data.items() if v is not None and k not in ("name", "source", "heldout")}
        merged["data"] = {**trained, **kept}
        for split in ("source", "heldout"):
            moved = {k: v for k, v in (data[split] or {}).items() if v is not None}
            if split == "source" and data.get("tar_base") is not None:
                moved.setdefault("root", data["tar_base"])
            if moved and trained.get(split):
                merged["data"][split] = {**trained[split], **moved}
    elif not data.get("source"):
        # data=none: the samples have the form that the model was trained on.
        merged["data"] = data | data_form(merged["model"])
    merged["data"] = _same_classes(merged["data"], merged["model"], stored["data"], ckpt)
    merged["metrics"] = _metric(given.get("metrics"), stored.get("metrics"))
    return merged


def _same_classes(
    data: Mapping[str, Any], model: Mapping[str, Any], stored: Mapping[str, Any], ckpt: str
) -> dict[str, Any]:
    """The group ``data`` with the classes of the checkpoint, by number and name; other names are a contradiction."""
    asked, before = data.get("class_names"), stored.get("class_names")
    if asked and before and list(asked) != list(before):
        raise SettingsError(
            f"data.class_names={list(asked)} contradicts the checkpoint {ckpt}, whose classes are {list(before)}: drop "
            "the override"
        )
    classes = data.get("num_classes")
    return {
        **data,
        "class_names": asked or before,
        "num_classes": model.get("num_classes", -1) if classes is None else classes,
    }


def _metric(given: Mapping[str, Any] | None, stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The metric that a command asks for; what it leaves open is the checkpoint's.

    Raises:
        SettingsError: keywords for a metric, and neither the command nor the checkpoint names one.
    """
    asked = dict(given or {})
    if asked.get("name") != "from_checkpoint":
        return asked or None
    asked = {k: v for k, v in asked.items() if k != "name"}
    if asked.get("_target_") or not asked:
        return asked or (None if stored is None else dict(stored))
    if not (stored or {}).get("_target_"):
        raise SettingsError(
            f"metrics.{next(iter(asked))} is a keyword of a metric, and the checkpoint names none: give metrics=NAME"
        )
    return {**(stored or {}), **asked}


def complete_from_defaults(
    given: dict[str, Any], ckpt: str, ctor_kwargs: Mapping[str, Any] | None = None, process: str = "flow"
) -> dict[str, Any]:
    """For an official file: its constructor's keywords where it holds them, defaults for what is not given.

    Args:
        process: what it was trained under, where the command does not say.

    Raises:
        SettingsError: neither the file nor the command says which model it is.
    """
    model = given["model"]
    if model.get("name") == "from_checkpoint":
        if not ctor_kwargs:
            raise SettingsError(
                f"ckpt={ckpt} is an official file that does not say how its model was built: give model=NAME"
            )
        model = {"name": "from_checkpoint", "_target_": "model_zigma.ZigMa", **ctor_kwargs}
    # What follows from data that are not named, such as model.num_classes, is left to the constructor.
    model = {k: v for k, v in model.items() if v is not None}
    default = _defaults_beside(given["data"], process)
    merged = {k: (default.get(k) if v is None else v) for k, v in given.items()} | {"model": model}
    for group in ("train", "process", "codec", "data"):
        if (given[group] or {}).get("name") == "from_checkpoint":
            kept = {
                k: v
                for k, v in given[group].items()
                if v is not None and not isinstance(v, dict) and k != "name"
            }
            merged[group] = {**default[group], **kept}
    if merged["process"].get("_target_") == default["process"]["_target_"]:
        # A flow process that was named takes path and prediction from train.*, which nobody named.
        named = {k: v for k, v in merged["process"].items() if v is not None}
        merged["process"] = {**default["process"], **named}
    if given["data"].get("name") == "from_checkpoint":
        merged["data"] |= data_form(model)
    merged["metrics"] = _metric(given.get("metrics"), None)
    return merged


def _defaults_beside(data: Mapping[str, Any], process: str) -> dict[str, Any]:
    """The training defaults that go with ``data=``: its codec, and whether it holds latents."""
    name = data.get("name")
    choice = "none" if name == "from_checkpoint" or name not in plugins.group_choices("data") else name
    cfg = plugins.compose_config([f"data={choice}", f"process={process}", "run_dir=unused"])
    found: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return found


def fix_roots(plain: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Make the data's folders absolute in ``plain``, a training configuration.

    Returns:
        By split, for the checkpoint: the path as ``given``, as ``absolute``, and ``from_run``, relative to the run.
        URLs and lists stay and are not among them.
    """
    found: dict[str, dict[str, str]] = {}
    for split in _SPLITS:
        node = plain["data"].get(split)
        root = (node or {}).get("root")
        if not isinstance(root, (str, Path)) or not str(root) or _is_url(str(root)):
            continue
        given = Path(root)
        absolute = str(given.resolve())
        node["root"] = absolute
        found[split] = {"given": str(given), "absolute": absolute}
        try:
            found[split]["from_run"] = os.path.relpath(absolute, Path(plain["run_dir"]).resolve())
        except ValueError:
            log.debug("%s lies on another drive than the run", absolute)
        if not given.is_absolute():
            log.info("data.%s.root: %s, from the working directory", split, absolute)
    return found


def find_roots(config: Mapping[str, Any], stored: Mapping[str, Any], roots: Any, run_dir: Path) -> None:
    """Point a completed configuration to its data where a run or its data were moved or copied.

    A path that was given absolute is tried first, then where it lay from the run. One that was given relative is
    sought from the run, from the working directory, and where it was. Which is taken is logged; if none is there, it
    stays where it was, for the source to refuse. A root that the command names is left alone.

    Args:
        config: completed; changed in place.
        stored: the checkpoint's configuration.
        roots: what :func:`fix_roots` returned when it was written; None for version 0.1.
        run_dir: where the run lies now.
    """
    for split, known in (roots or {}).items():
        node, before = (values["data"].get(split) or {} for values in (config, stored))
        if not node.get("root") or node["root"] != before.get("root"):
            continue
        from_run = run_dir.resolve() / known["from_run"] if "from_run" in known else None
        ways: list[tuple[Any, str]] = [(from_run, "from the run")]
        if os.path.isabs(known["given"]):
            ways = [(known["absolute"], "as given"), *ways]
        else:
            ways += [
                (Path(known["given"]), "from the working directory"),
                (known["absolute"], "where it was"),
            ]
        for path, how in ways:
            if path is not None and _is_there(Path(path)):
                node["root"] = str(Path(path).resolve())
                log.info("data.%s.root: %s, %s (given as %s)", split, node["root"], how, known["given"])
                break


def _is_url(root: str) -> bool:
    return "://" in root or root.startswith("pipe:")


def _is_there(path: Path) -> bool:
    """A folder or file, or the folder of a pattern of files."""
    return path.exists() or ("{" in path.name and path.parent.is_dir())
