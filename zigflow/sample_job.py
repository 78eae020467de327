"""What ``sample_acc.py`` does: open a checkpoint, sample or measure, judge, write results with their protocol."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from zigflow import plugins
from zigflow.build import (
    build_codec,
    build_model,
    model_arguments,
)
from zigflow.chosen import build_process, build_sampler
from zigflow.data.class_names import renumbered
from zigflow.data.contents import exact_fingerprint
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine.evaluation import Judge, sample_size
from zigflow.engine.launch import launched_precision, make_accelerator
from zigflow.engine.lock import sole_writer
from zigflow.engine.measure import MeasuringRun
from zigflow.engine.npz import npz_name, write_npz
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_weights
from zigflow.engine.sample_plan import SampleOptions, class_plan, open_captions, text_plan
from zigflow.engine.sampling_run import SamplingRun
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
from zigflow.official import OFFICIAL_SUFFIXES, family_of, load_official, process_of, read_official
from zigflow.preflight import check_decoding, scaled_codec
from zigflow.settings import Settings, SettingsError
from zigflow.shapes import frames_of
from zigflow.sources import build_source, check_shape, class_names
from zigflow.stored_config import complete_from_checkpoint, complete_from_defaults, find_roots

log = logging.getLogger(__name__)

_SHOWN = 100  # images in the grid
_DEBUG_BATCHES = 4
_ANOTHER = "another folder, sample_dir=PATH"


@dataclass(frozen=True)
class _Trained:
    """A checkpoint brought to life for sampling."""

    settings: Settings
    model: torch.nn.Module
    weights: str
    step: int | None
    folder: Path


def _open_trained(given: dict[str, Any], ckpt: str, wanted: str | None) -> _Trained:
    """The model of a checkpoint, ours or official, and the configuration completed by it."""
    if Path(ckpt).suffix in OFFICIAL_SUFFIXES:
        asked = given["model"]
        family = family_of(asked) if asked.get("_target_") else "zigma"
        try:
            file = read_official(ckpt, family)
        except ValueError as error:
            raise SettingsError(f"ckpt: {error}") from error
        process = _published_process(given, family)
        settings = _settings(complete_from_defaults(given, ckpt, file.ctor_kwargs, process))
        _check_before_building(settings)
        arguments = {k: v for k, v in model_arguments(settings).items() if k != "_target_"}
        seed = {k: arguments.pop(k) for k in ("scan_seed",) if k in arguments}
        model = load_official(family, arguments, file.state_dict, **seed)
        return _Trained(settings, model, "official", file.step, Path("samples") / Path(ckpt).stem)
    stored = checkpoints.open_checkpoint(ckpt)
    path = Path(stored.path)
    root = path.parent.parent if path.parent.name == "checkpoints" else path
    completed = complete_from_checkpoint(given, stored.config, ckpt)
    find_roots(completed, stored.config, stored.trainer.get("roots"), root)
    settings = _settings(completed)
    _check_before_building(settings)
    model = build_model(settings)
    weights = load_weights(model, stored, wanted)
    return _Trained(settings, model, weights, stored.step, root / "samples")


def _settings(completed: dict[str, Any]) -> Settings:
    return plugins.checked({**completed, "codec": scaled_codec(completed["codec"])}, trains=False)


def _published_process(given: Mapping[str, Any], family: str) -> str:
    """What an official file was trained under; a process that the command names goes before it."""
    if (given["process"] or {}).get("_target_"):
        return "flow"
    try:
        return process_of(family)
    except ValueError as error:
        raise SettingsError(f"process is missing: {error}") from error


def _check_before_building(settings: Settings) -> None:
    """Encoding stored latents and measuring their likelihood need no autoencoder, pictures do."""
    if not (settings.likelihood or settings.ode.likelihood or settings.ode.reverse):
        check_decoding(settings)


def _sampling_facts(
    trained: _Trained, ckpt: str, batch_size: int, extra: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The folder's name, which tells every other way of sampling apart, and what the samples follow from."""
    settings = trained.settings
    facts = {"ckpt": ckpt, **sampling_facts(settings, trained.weights, trained.step)}
    chosen = facts["sampler"]
    solver = chosen["sampling_method"].replace("/", "-")
    step = "" if trained.step is None else f"_{trained.step}"
    facts |= extra
    rest = json.dumps(
        [{k: v for k, v in facts.items() if k != "ckpt"}, batch_size], sort_keys=True, default=str
    )
    name = (
        f"{trained.weights}{step}_{settings.sample_mode}_{solver}_{chosen['num_steps']}_w{settings.cfg_scale:g}"
        f"_seed{settings.global_seed}_{hashlib.sha256(rest.encode()).hexdigest()[:6]}"
    )
    return name, facts


def sample_from_config(cfg: DictConfig) -> Path:
    """Sample and judge as configured; returns the folder of samples."""
    given = plugins.plain(cfg)
    ckpt, options = given.get("ckpt"), SampleOptions.take_from(given)
    if ckpt is None:
        raise SettingsError("ckpt is missing: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file")
    if Path(str(ckpt)).suffix in OFFICIAL_SUFFIXES and not Path(str(ckpt)).exists():
        raise SettingsError(
            f"ckpt={ckpt} does not exist: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file"
        )
    if given["loop"].get("compile"):
        raise SettingsError(
            "loop.compile=true compiles training, and samples are computed uncompiled: drop it (a launcher's "
            "--dynamo_backend inductor asks for it too)"
        )
    if given["mixed_precision"] is None and launched_precision() != "no":
        given["mixed_precision"] = launched_precision()
    plugins.load_plugins()
    trained = _open_trained(given, str(ckpt), options.weights)
    settings = trained.settings
    accelerator = make_accelerator(cpu=settings.loop.device == "cpu")
    # After accelerate, which counts the threads of several CPU processes itself.
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    model = trained.model.to(accelerator.device).eval()
    process, sampler = build_process(settings), build_sampler(settings)
    ranks = Ranks(accelerator.device if accelerator.device.type == "cuda" else "cpu")
    common = {
        "model": model, "process": process, "sampler": sampler, "codec": build_codec(settings, accelerator.device),
        "seed": settings.global_seed, "batch_size": options.batch_size, "device": accelerator.device,
        "ranks": ranks, "progress": settings.loop.progress,
    }  # fmt: skip
    if settings.likelihood or settings.ode.likelihood or settings.ode.reverse:
        return _measure_data(trained, str(ckpt), options, common)

    plan, plan_facts = _conditions(settings, model, options)
    name, facts = _sampling_facts(trained, str(ckpt), options.batch_size, plan_facts)
    folder = Path(settings.sample_dir) if settings.sample_dir else trained.folder / name
    count = settings.num_fid_samples if options.seeds is None else len(options.seeds)
    count = min(count, _DEBUG_BATCHES * options.batch_size) if settings.sample_debug else count
    run = build_sampling_run(
        settings, model, codec=common["codec"], num_samples=count, batch_size=options.batch_size, folder=folder,
        identity={k: v for k, v in facts.items() if k != "ckpt"}, device=accelerator.device, ranks=ranks,
        ids=None if options.seeds is None else options.seeds[:count], label_of=plan,
    )  # fmt: skip
    judge = _ready_judge(settings, run, ranks, common["codec"], accelerator.device)
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
        grid = _pictures(run, folder, model, options)
        facts |= {
            **{k: run.identity[k] for k in ("weights_sha256", "scan") if k in run.identity},
            "function_evaluations": run.function_evaluations,
            **time_facts(sampler, process),
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


def _ready_judge(
    settings: Settings, run: SamplingRun, ranks: Ranks, codec: Any, device: torch.device
) -> Judge:
    """What judges the samples, asked before anything is sampled whether it could.

    Raises:
        SettingsError: it could not, in one line; with ``sample_debug`` the samples are then counted only.
    """
    given = {"ranks": ranks, "codec": codec, "device": device, "preview": 0}
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


def _measure_data(trained: _Trained, ckpt: str, options: SampleOptions, common: dict[str, Any]) -> Path:
    """Instead of sampling: bits per dimension of held-out data, or a bound, or the noise that they are encoded into."""
    settings, codec, ranks = trained.settings, common["codec"], common["ranks"]
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
    extra: dict[str, Any] = {"precision": "no"}
    bounds = not encodes and not hasattr(common["sampler"], "log_likelihood")
    if bounds:
        if level != 2 / 255:
            raise SettingsError(
                "the variational bound (likelihood=true sample_mode=diffusion) is that of 8-bit images, and this model "
                "works on latents or scaled pixels: set sample_mode=ODE"
            )
        estimate = getattr(common["sampler"], "estimate", None)
        extra["estimate"] = "bound" if estimate is None else estimate(common["process"])
    elif not encodes:
        extra["dequantization"] = "none" if level is None else "uniform over 256 levels"
        extra["trace"] = "one Hutchinson probe"
    name, facts = _sampling_facts(trained, ckpt, options.batch_size, extra)
    name = f"{'encoding' if encodes else 'likelihood'}_{name}"
    folder = Path(settings.sample_dir) if settings.sample_dir else trained.folder / name
    count = settings.num_fid_samples
    run = MeasuringRun(
        **common,
        quantity="noise" if encodes else "bound" if bounds else "bits_per_dim",
        source=source,
        num_samples=min(count, _DEBUG_BATCHES * options.batch_size) if settings.sample_debug else count,
        folder=folder,
        level=None if encodes or bounds else level,
        identity={k: v for k, v in facts.items() if k != "ckpt"},
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
            facts |= time_facts(common["sampler"], common["process"], backwards=True)
        results = write_results(
            folder / "results.json", metrics, results_protocol(settings, facts) | _counted(ids)
        )
        told = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        log.info("measured %d samples: %s; %s", len(ids), told, results)
        return folder
