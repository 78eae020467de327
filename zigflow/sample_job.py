"""What ``sample_acc.py`` does: open a checkpoint, sample or measure, judge, write results with their protocol."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from zigflow import plugin_files, plugins
from zigflow.build import build_codec, build_pipeline, build_runtime
from zigflow.data.class_names import renumbered
from zigflow.data.contents import exact_fingerprint
from zigflow.engine.evaluation import Judge, sample_size
from zigflow.engine.launch import chosen_precision
from zigflow.engine.lock import sole_writer
from zigflow.engine.measure import MeasuringRun
from zigflow.engine.npz import npz_name, write_npz
from zigflow.engine.runtime import Runtime
from zigflow.engine.sample_plan import SampleOptions, class_plan, open_captions, text_plan
from zigflow.engine.sampling_run import Pipeline, Samples, SamplingRun
from zigflow.engine.tensors import save_tensors
from zigflow.evaluation_job import (
    build_judge,
    build_sampling_run,
    data_texts,
    results_protocol,
    sampling_facts,
    time_facts,
)
from zigflow.metrics.base import SampleIds
from zigflow.metrics.pictures import save_frame_grid, save_sample_grid
from zigflow.metrics.report import table
from zigflow.metrics.results import write_results
from zigflow.nn import as_denoiser
from zigflow.samplers.chain import chain_of
from zigflow.settings import Settings, SettingsError
from zigflow.shapes import frames_of
from zigflow.sources import build_source, check_shape, class_names
from zigflow.stored_config import Trained, open_trained

log = logging.getLogger(__name__)

_SHOWN = 100  # images in the grid
_DEBUG_BATCHES = 4
_ANOTHER = "another folder, sample_dir=PATH"


def _folder_name(facts: Mapping[str, Any], settings: Settings, batch_size: int) -> str:
    """Tells every other way of sampling apart."""
    chosen = facts["sampler"]
    solver = chosen["sampling_method"].replace("/", "-")
    step = "" if facts["step"] is None else f"_{facts['step']}"
    rest = json.dumps([_identity(facts), batch_size], sort_keys=True, default=str)
    return (
        f"{facts['weights']}{step}_{settings.sample_mode}_{solver}_{chosen['num_steps']}_w{settings.cfg_scale:g}"
        f"_seed{settings.global_seed}_{hashlib.sha256(rest.encode()).hexdigest()[:6]}"
    )


def _identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What samples follow from; a checkpoint may move."""
    return {k: v for k, v in facts.items() if k != "ckpt"}


def sample_from_config(cfg: DictConfig) -> Path:
    """Sample and judge as configured; returns the folder of samples."""
    given = plugins.plain(cfg)
    ckpt, options = given.pop("ckpt", None), SampleOptions.take_from(given)
    if ckpt is None:
        raise SettingsError("ckpt is missing: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file")
    if given["loop"].get("compile"):
        raise SettingsError(
            "loop.compile=true compiles training, and samples are computed uncompiled: drop it (a launcher's "
            "--dynamo_backend inductor asks for it too)"
        )
    given["mixed_precision"] = chosen_precision(given["mixed_precision"])
    plugins.load_plugins()
    plugin_files.use(given)
    trained = open_trained(given, str(ckpt), options.weights)
    settings = trained.settings
    runtime = build_runtime(settings)
    pipeline = build_pipeline(settings, trained.model, build_codec(settings, runtime.device)).on(
        runtime.device
    )
    facts = {"ckpt": str(ckpt), **sampling_facts(settings, trained.weights, trained.step)}
    if settings.measures_data:
        return _measure_data(trained, pipeline, facts, options, runtime)
    return _sample(trained, pipeline, facts, options, runtime)


def _sample(
    trained: Trained, pipeline: Pipeline, facts: dict[str, Any], options: SampleOptions, runtime: Runtime
) -> Path:
    """Draw the samples, judge them, and write results, pictures and the one file of all samples."""
    settings, ranks = trained.settings, runtime.ranks
    plan, plan_facts = _conditions(settings, pipeline.model, options)
    facts |= plan_facts
    folder = _folder(trained, _folder_name(facts, settings, options.batch_size))
    count = _count(
        settings, options, settings.num_fid_samples if options.seeds is None else len(options.seeds)
    )
    ids = None if options.seeds is None else options.seeds[:count]
    samples = Samples(options.batch_size, settings.global_seed, count, ids, label_of=plan)
    run = build_sampling_run(
        settings, pipeline, samples, folder=folder, identity=_identity(facts), runtime=runtime
    )
    judge = _ready_judge(settings, run, runtime)
    with sole_writer(folder, ranks, _ANOTHER):
        run.open()
        try:
            judgement = judge(run)
        except ValueError as error:
            raise SettingsError(
                f"the samples are in {folder}, but metrics ({(settings.metrics or {}).get('_target_')}) cannot judge "
                f"them: {error}; give metrics=none, or another num_fid_samples"
            ) from error
        if not ranks.is_main or judgement is None:
            return folder
        grid = _pictures(run, folder, pipeline.model, options)
        facts |= {
            **{k: run.identity[k] for k in ("weights_sha256", "scan") if k in run.identity},
            "function_evaluations": run.function_evaluations,
            **time_facts(run.pipeline),
        }
        protocol = results_protocol(settings, facts) | judgement.protocol
        results = write_results(folder / "results.json", judgement.metrics, protocol)
        for line in table(judgement.metrics, protocol):
            log.info("%s", line)
        log.info("sampled %d images: %s, grid %s, results %s", run.num_samples, folder, grid, results)
        return folder


def _pictures(run: SamplingRun, folder: Path, model: torch.nn.Module, options: SampleOptions) -> Path:
    """The grid, the frames of videos and the one file of all samples, from the samples' own files."""
    result = run.collect(_SHOWN)
    # Rows of ten for a model without classes.
    shown = result.images
    rows = np.arange(len(shown)) // 10 if result.labels is None else result.labels[: len(shown)]
    grid = save_sample_grid(folder / "grid.png", shown, rows)
    frames = frames_of(as_denoiser(model).sample_shape)
    if frames:
        for index, strip in zip(result.ids, run.images(), strict=True):
            save_frame_grid(folder / "videos" / f"{index:06d}.png", strip, frames)
    if options.npz:
        height, width = shown.shape[2], shown.shape[3] // (frames or 1)
        path = folder / npz_name(len(result.ids), height, width)
        write_npz(path, run.images(), len(result.ids), result.labels, frames)
        log.info("all samples in one file: %s", path)
    return grid


def _conditions(
    settings: Settings, model: torch.nn.Module, options: SampleOptions
) -> tuple[Any, dict[str, Any]]:
    """What each sample is conditioned on, a function of sample numbers or None, and the facts about it."""
    asked = as_denoiser(model)
    if asked.num_classes > 0 and not isinstance(options.labels, str):
        # Numbers alone need no training set at hand.
        names = class_names(settings) if options.names_classes else settings.data.class_names or ()
        _tell_numbers(options.labels, names)
        options = options.by_number(names)
    facts = options.facts()
    if not asked.has_text:
        if options.captions is not None:
            raise SettingsError(
                f"captions={options.captions} needs a text model, this one reads none: drop captions="
            )
        streamed = settings.data.order == "streaming" and settings.data.heldout
        split = "heldout" if streamed else "source"
        source = build_source(settings, split) if options.labels == "data" else None
        if source is not None:
            facts["labels_of"] = exact_fingerprint(source)
        return class_plan(options, asked.num_classes, source, settings.global_seed), facts
    if options.labels != "balanced":
        raise SettingsError(
            f"labels={options.labels} needs a model of classes, this one reads text: drop labels="
        )
    if options.captions is None:
        plan, rows = data_texts(settings, model)
    else:
        rows = open_captions(options.captions)
        plan = text_plan(rows, asked.d_context, f"captions={options.captions}")
    return plan, {**facts, "captions": rows.fingerprint}


def _tell_numbers(labels: tuple[int | str, ...], names: tuple[str, ...]) -> None:
    """Say which classes numbers are where some class is named by a number that is not its own."""
    moved = renumbered(names)
    numbers = dict.fromkeys(label for label in labels if type(label) is int and 0 <= label < len(names))
    if not moved or not numbers:
        return
    taken = ", ".join(f"{number} is {names[number]!r}" for number in numbers)
    log.warning(
        "labels are numbers of classes, and %d classes are named by other numbers: %s; names go in quotes: "
        "'labels=[\"%s\"]'", len(moved), taken, moved[0][0],
    )  # fmt: skip


def _folder(trained: Trained, name: str) -> Path:
    return Path(trained.settings.sample_dir) if trained.settings.sample_dir else trained.folder / name


def _count(settings: Settings, options: SampleOptions, asked: int) -> int:
    return min(asked, _DEBUG_BATCHES * options.batch_size) if settings.sample_debug else asked


def _ready_judge(settings: Settings, run: SamplingRun, runtime: Runtime) -> Judge:
    """What judges the samples, asked before anything is sampled whether it could.

    Raises:
        SettingsError: it could not, in one line; with ``sample_debug`` the samples are then counted only.
    """
    given = {"runtime": runtime, "codec": run.pipeline.codec, "preview": 0}
    try:
        judge = build_judge(settings, **given)
        labels = run.class_labels()
        labels = None if labels is None else torch.as_tensor(labels)
        judge.check(run.num_samples, labels, sample_size(run))
    except (SettingsError, ValueError) as error:
        if settings.sample_debug:
            log.warning("not judged: %s", error)
            return build_judge(replace(settings, metrics=None), **given)
        raise SettingsError(
            f"metrics ({(settings.metrics or {}).get('_target_')}) cannot judge {run.num_samples} samples: {error}; "
            "give metrics=none, another num_fid_samples, or say where the data is (data.source.root, data.heldout.root)"
        ) from error
    return judge


def _counted(ids: Any) -> dict[str, Any]:
    counted = SampleIds()
    counted.add(torch.as_tensor(ids))
    return {"n": len(counted), "ids_sha256": counted.sha256()}


def _measure_data(
    trained: Trained, pipeline: Pipeline, facts: dict[str, Any], options: SampleOptions, runtime: Runtime
) -> Path:
    """Instead of sampling: bits per dimension of held-out data, or a bound, or the noise that they are encoded into."""
    settings, codec, ranks = trained.settings, pipeline.codec, runtime.ranks
    encodes = settings.ode.reverse
    if options.facts() or options.captions is not None or options.npz:
        raise SettingsError(
            "seeds=, labels=, captions= and npz= choose samples to draw; likelihood=true and ode.reverse=true "
            "measure the data's own: drop them"
        )
    source = build_source(settings, "heldout") or build_source(settings)
    if source is None:
        raise SettingsError(f"there is no data to measure: data={settings.data.name} has none")
    check_shape(settings, trained.model, source, codec, "heldout" if settings.data.heldout else "source")
    # Grey levels of 8-bit images in [-1, 1] are 2/255 apart; latents have no levels.
    level = codec.scale * 2 / 255 if getattr(codec, "is_identity", False) and not settings.is_latent else None
    facts["precision"] = "no"
    bounds = not encodes and not hasattr(pipeline.sampler, "log_likelihood")
    if bounds:
        if level != 2 / 255:
            raise SettingsError(
                "the variational bound (likelihood=true sample_mode=diffusion) is that of 8-bit images, and this model "
                "works on latents or scaled pixels: set sample_mode=ODE"
            )
        steps = len(chain_of(pipeline.process, pipeline.sampler.spacing))
        facts["estimate"] = f"variational bound over {steps} steps"
    elif not encodes:
        facts["dequantization"] = "none" if level is None else "uniform over 256 levels"
        facts["trace"] = "one Hutchinson probe"
    name = f"{'encoding' if encodes else 'likelihood'}_{_folder_name(facts, settings, options.batch_size)}"
    folder = _folder(trained, name)
    count = _count(settings, options, settings.num_fid_samples)
    run = MeasuringRun(
        pipeline,
        Samples(options.batch_size, settings.global_seed, count),
        quantity="noise" if encodes else "bound" if bounds else "bits_per_dim",
        source=source,
        folder=folder,
        level=None if encodes or bounds else level,
        identity=_identity(facts),
        runtime=runtime,
        progress=settings.loop.progress,
    )
    with sole_writer(folder, ranks, _ANOTHER):
        run.run()
        ranks.barrier()
        if not ranks.is_main:
            return folder
        values, ids = run.collect()
        if encodes:
            save_tensors(folder / "noise.safetensors", {"x0": values, "ids": ids})
            metrics = {"noise_mean": float(values.mean()), "noise_std": float(values.std())}
        else:
            metrics = {
                "bits_per_dim": float(values.mean()),
                "bits_per_dim_std": float(values.std(correction=0)),
            }
        facts |= {k: run.identity[k] for k in ("weights_sha256", "scan", "data") if k in run.identity}
        facts["best_by"] = None if encodes else ["bits_per_dim", "min"]
        if not bounds:
            facts |= time_facts(run.pipeline, backwards=True)
        results = write_results(
            folder / "results.json", metrics, results_protocol(settings, facts) | _counted(ids)
        )
        told = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        log.info("measured %d samples: %s; %s", len(ids), told, results)
        return folder
