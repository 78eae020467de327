"""What ``ckpt=`` brings: a checkpoint of ours or an official file, opened once for whoever needs it.

Sampling takes the model and completes its configuration by what the checkpoint says; training starts from the weights;
``convert-checkpoint`` writes an official file's anew.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from zigflow import files, plugins
from zigflow.build import build_model, model_arguments
from zigflow.engine.checkpoint import Checkpoint, open_checkpoint
from zigflow.engine.run_dir import check_same_config, flat, with_later_keys
from zigflow.engine.run_state import all_averages, check_scan_state, inference_weights, load_weights
from zigflow.engine.scan_order import check_scan
from zigflow.engine.start import Start, start_model
from zigflow.nn import as_denoiser
from zigflow.nn.resizing import FREE_KEYWORDS
from zigflow.official import (
    OFFICIAL_SUFFIXES,
    OfficialFile,
    family_of,
    load_official,
    process_of,
    read_official,
)
from zigflow.overrides import takes_keyword
from zigflow.preflight import check_decoding, scaled_codec
from zigflow.settings import Settings, SettingsError
from zigflow.shapes import data_form, token_grid
from zigflow.sources import with_old_defaults
from zigflow.typed import unknown_key

log = logging.getLogger(__name__)

_SPLITS = ("source", "heldout")
_FROM_STORED = ("model", "train", "process", "codec", "scan")
# What may differ between training and sampling: numerical margins, and where a file lies on this machine.
_MAY_CHANGE = ("train.sample_eps", "process.sample_eps", "codec.path", "codec.chunk", "codec.own_scale")


@dataclass(frozen=True)
class Stored:
    """What was opened.

    Attributes:
        path: the checkpoint's directory, or the official file.
        checkpoint: of ours, verified; None for an official file.
        official: what an official file holds; None for a checkpoint of ours.
        family: the code base that an official file comes from.
    """

    path: Path
    checkpoint: Checkpoint | None = None
    official: OfficialFile | None = None
    family: str = ""

    @property
    def step(self) -> int | None:
        """Optimizer steps behind the weights; None where an official file does not say."""
        return self.checkpoint.step if self.checkpoint is not None else self._file().step

    @property
    def run_dir(self) -> Path:
        """The run of a checkpoint of ours; its directory itself where it lies in none."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path

    @property
    def ctor_kwargs(self) -> Mapping[str, Any] | None:
        """Keywords of the published constructor, where an official file holds them."""
        return None if self.official is None else self.official.ctor_kwargs

    def weights(self) -> dict[str, Tensor]:
        """The state that sampling takes by default."""
        return (
            inference_weights(self.checkpoint)
            if self.checkpoint is not None
            else dict(self._file().state_dict)
        )

    def averages(self) -> dict[str, dict[str, Tensor]]:
        """By EMA profile; an official file has none besides its weights."""
        return {} if self.checkpoint is None else all_averages(self.checkpoint)

    def official_model(
        self, arguments: Mapping[str, Any], null_text: Tensor | None = None
    ) -> torch.nn.Module:
        """The model of an official file.

        Args:
            arguments: keywords of its published constructor. A random scan's orders are not in the file, so that its
                ``scan_seed`` may be among them.
            null_text: the encoded empty prompt (S, D).

        Raises:
            ValueError: the file's weights are not of such a model.
        """
        seed = {k: arguments[k] for k in ("scan_seed",) if k in arguments}
        given = {k: v for k, v in arguments.items() if k not in seed}
        return load_official(self.family, given, self._file().state_dict, null_text=null_text, **seed)

    def _file(self) -> OfficialFile:
        if self.official is None:
            raise ValueError(f"{self.path} is a checkpoint of ours, not an official file")
        return self.official


def open_stored(path: str | Path, model: Mapping[str, Any], family: str | None = None) -> Stored:
    """Open what ``ckpt=`` names.

    Args:
        path: a run directory, a checkpoint in it, RUN_DIR/best, or an official file.
        model: the model's node, as far as it is known; says which code base an official file comes from.
        family: says so in its place; ``path`` is then an official file, whatever its name ends in.

    Raises:
        SettingsError: there is no such official file.
        FileNotFoundError: the same, where ``family`` was given.
        ValueError: an official file that cannot be read.
        CheckpointError: no checkpoint is there, or it is damaged.
    """
    if family is None and Path(path).suffix not in OFFICIAL_SUFFIXES:
        found = open_checkpoint(path)
        return Stored(Path(found.path), checkpoint=found)
    if family is None and not Path(path).exists():
        raise SettingsError(
            f"ckpt={path} does not exist: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file"
        )
    chosen = family or (family_of(model) if model.get("_target_") else "zigma")
    return Stored(Path(path), official=read_official(path, chosen), family=chosen)


@dataclass(frozen=True)
class Trained:
    """A model to sample from.

    Attributes:
        settings: the command's, completed.
        weights: which of the checkpoint's the model has: "model", "ema_<profile>" or "official".
        step: optimizer steps behind them, where known.
        folder: where samples go by default.
    """

    settings: Settings
    model: torch.nn.Module
    weights: str
    step: int | None
    folder: Path


def open_trained(given: dict[str, Any], ckpt: str, wanted: str | None) -> Trained:
    """The model of a checkpoint, ours or official, and the configuration completed by it.

    Args:
        given: the sampling command's configuration.
        wanted: "model", an EMA profile, or None for the first profile.

    Raises:
        SettingsError: the checkpoint cannot be opened, or the command contradicts it.
    """
    try:
        stored = open_stored(ckpt, given["model"])
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"ckpt: {error}") from error
    ours = stored.checkpoint
    if ours is None:
        process = _published_process(given, stored.family)
        completed = complete_from_defaults(given, ckpt, stored.ctor_kwargs, process)
    else:
        completed = complete_from_checkpoint(given, ours.config, ckpt)
        find_roots(completed, ours.config, ours.trainer.get("roots"), stored.run_dir)
    settings = plugins.checked({**completed, "codec": scaled_codec(completed["codec"])}, trains=False)
    if not settings.measures_data:
        # Encoding stored latents and measuring their likelihood need no autoencoder, pictures do.
        check_decoding(settings)
    if ours is None:
        model = stored.official_model({k: v for k, v in model_arguments(settings).items() if k != "_target_"})
        return Trained(settings, model, "official", stored.step, Path("samples") / stored.path.stem)
    model = build_model(settings)
    weights = load_weights(model, ours, wanted)
    return Trained(settings, model, weights, stored.step, stored.run_dir / "samples")


def _published_process(given: Mapping[str, Any], family: str) -> str:
    """What an official file was trained under; a process that the command names goes before it."""
    if (given["process"] or {}).get("_target_"):
        return "flow"
    try:
        return process_of(family)
    except ValueError as error:
        raise SettingsError(f"process is missing: {error}") from error


def start_from(settings: Settings, model: torch.nn.Module, config: Mapping[str, Any], write: bool) -> Start:
    """Weights and their averages: a run that starts from a checkpoint is a new run, with its own optimizer and step 0.

    The run begins at the weights that sampling takes: those of the first EMA profile, if there is one. What became of
    each parameter is logged, and with ``write`` noted in the run directory, ``adapted.json``.

    Raises:
        SettingsError: the checkpoint is missing, or its model is another one; the first difference is named.
    """
    ckpt = str(settings.ckpt)
    try:
        stored = open_stored(ckpt, config["model"])
        how = {} if stored.checkpoint is None else _how_to_start(model, stored.checkpoint, config)
        start = start_model(model, stored.weights(), stored.averages(), patches=settings.ckpt_patches, **how)
    except SettingsError:
        raise
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SettingsError(f"ckpt={ckpt}: {error}") from error
    start.report.log(ckpt)
    if write:
        Path(settings.run_dir).mkdir(parents=True, exist_ok=True)
        files.replace_json(Path(settings.run_dir) / "adapted.json", {"ckpt": ckpt, **asdict(start.report)})
    return start


def _how_to_start(model: torch.nn.Module, stored: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of :func:`start_model`, from both configurations.

    Raises:
        RunDirError: they are of other models.
    """
    # What another model may have that starts from these weights; the rest says what they mean.
    free = ("name", *as_denoiser(model).resizing().keywords)
    given, kept = ({k: _fixed(k, c, free) for k, c in v.items()} for v in (config, stored.config))
    check_same_config(
        given, kept, ("model", "scan"), "its weights are another model's", "Drop the override, or ckpt="
    )
    built = token_grid(stored.config["model"])
    if built is None or built == token_grid(config["model"]):
        check_scan_state(model, stored)
    elif _walks_alike(config["model"], stored.config["model"], free):
        # What the scan's name stands for is compared on the size that the weights know.
        check_scan(model, stored, built)
    counters = stored.trainer["counters"]
    return {
        "built": built,
        "same_classes": stored.config["model"].get("num_classes") == config["model"].get("num_classes"),
        "classes": (_class_names(stored.config), _class_names(config)),
        "images": int(counters["images_seen"]) + int(counters.get("ema_images", 0)),
    }


def _walks_alike(node: Mapping[str, Any], stored: Mapping[str, Any], free: tuple[str, ...]) -> bool:
    """Whether two models that differ in size alone should walk one grid in the same way."""
    chosen = ("video_frames", *(key for key in free if key not in FREE_KEYWORDS))
    return all(node.get(key) == stored.get(key) for key in chosen if key != "name")


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's classes by number; () where there are none, or others than the model has."""
    names = tuple((config.get("data") or {}).get("class_names") or ())
    return names if len(names) == config["model"].get("num_classes") else ()


def _fixed(section: str, values: Any, free: tuple[str, ...]) -> Any:
    if section != "model":
        return values
    return {k: v for k, v in values.items() if k not in free}


def complete_from_checkpoint(given: dict[str, Any], stored: Mapping[str, Any], ckpt: str) -> dict[str, Any]:
    """A sampling command's configuration completed by that of the checkpoint.

    Raises:
        SettingsError: the command says otherwise than the checkpoint; key and both values are named.
    """
    merged: dict[str, Any] = {k: v for k, v in given.items() if v is not None or k not in stored}
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
    merged: dict[str, Any] = {k: (default.get(k) if v is None else v) for k, v in given.items()}
    merged["model"] = model
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
