"""What a run starts from: old weights, ours or official, also those of a smaller image size; and its data order."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zigflow.data.mixing import tell_sorted_shards
from zigflow.data.order import DataOrder
from zigflow.data.tar import ShardError
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine import durable
from zigflow.engine.elastic import shards_at_once_for
from zigflow.engine.run_dir import check_same_config
from zigflow.engine.run_state import all_averages, check_scan_state, inference_weights
from zigflow.engine.start import Start, start_model
from zigflow.nn import as_denoiser
from zigflow.official import OFFICIAL_SUFFIXES, family_of, read_official
from zigflow.settings import Settings, SettingsError
from zigflow.shapes import token_grid


def start_from(settings: Settings, model: torch.nn.Module, config: Mapping[str, Any], write: bool) -> Start:
    """Weights and their averages: a run that starts from a checkpoint is a new run, with its own optimizer and step 0.

    The run begins at the weights that sampling takes: those of the first EMA profile, if there is one. What became of
    each parameter is logged, and with ``write`` noted in the run directory, ``adapted.json``.

    Raises:
        SettingsError: the checkpoint is missing, or its model is another one; the first difference is named.
    """
    ckpt = str(settings.ckpt)
    try:
        if Path(ckpt).suffix in OFFICIAL_SUFFIXES:
            weights = read_official(ckpt, family_of(config["model"])).state_dict
            start = start_model(model, weights, {}, patches=settings.ckpt_patches)
        else:
            stored = checkpoints.open_checkpoint(ckpt)
            # What another model may have that starts from these weights; the rest says what they mean.
            free = ("name", *as_denoiser(model).resizing().keywords)
            given, kept = ({k: _fixed(k, c, free) for k, c in v.items()} for v in (config, stored.config))
            check_same_config(
                given,
                kept,
                ("model", "scan"),
                "its weights are another model's",
                "Drop the override, or ckpt=",
            )
            built = token_grid(stored.config["model"])
            if built is None or built == token_grid(config["model"]):
                check_scan_state(model, stored)
            weights, averages = inference_weights(stored), all_averages(stored)
            start = start_model(
                model,
                weights,
                averages,
                built=built,
                same_classes=stored.config["model"].get("num_classes") == config["model"].get("num_classes"),
                classes=(_class_names(stored.config), _class_names(config)),
                patches=settings.ckpt_patches,
                images=int(stored.trainer["counters"]["images_seen"])
                + int(stored.trainer["counters"].get("ema_images", 0)),
            )
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SettingsError(f"ckpt={ckpt}: {error}") from error
    start.report.log(ckpt)
    if write:
        Path(settings.run_dir).mkdir(parents=True, exist_ok=True)
        durable.replace_json(Path(settings.run_dir) / "adapted.json", {"ckpt": ckpt, **asdict(start.report)})
    return start


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a model's classes by number; () where there are none, or others than the model has."""
    names = tuple((config.get("data") or {}).get("class_names") or ())
    return names if len(names) == config["model"].get("num_classes") else ()


def build_order(settings: Settings, source: Any) -> DataOrder:
    """The order of an indexed source: as configured, or as the run that continues began; sorted sets are told of.

    Raises:
        SettingsError: ``data.shards_at_once`` is not what the run began with.
    """
    asked, shards = settings.data.shards_at_once, len(source.shard_sizes)
    try:
        at_once = shards_at_once_for(Path(settings.run_dir), asked, shards)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    order = DataOrder(source.shard_sizes, settings.global_seed, shards_at_once=at_once)
    with suppress(ShardError):  # A damaged label is told, or passed over, when its sample is read.
        tell_sorted_shards(source, order.shards_at_once, f"data={settings.data.name}")
    return order


def _fixed(section: str, values: Any, free: tuple[str, ...]) -> Any:
    if section != "model":
        return values
    return {k: v for k, v in values.items() if k not in free}
