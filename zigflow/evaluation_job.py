"""How a configuration samples and judges: for ``sample_acc.py``, while it trains, and for folders of images."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scans.plot import plot_scans
from zigflow import plugin_files
from zigflow.build import build_codec, build_pipeline
from zigflow.data.class_names import are_numbers
from zigflow.engine.evaluation import Judge
from zigflow.engine.in_loop import InLoopEvaluation
from zigflow.engine.launch import chosen_precision
from zigflow.engine.peak import peak_flops
from zigflow.engine.run_state import versions
from zigflow.engine.runtime import Runtime
from zigflow.engine.sample_plan import SourceRows, text_plan
from zigflow.engine.sampling_run import Pipeline, Samples, SamplingRun
from zigflow.engine.trackers import TRACKERS, Trackers
from zigflow.engine.trainer import Hook, Monitoring, Trainer
from zigflow.nn import as_denoiser
from zigflow.nn.flops import count_flops
from zigflow.nodes import make
from zigflow.preflight import check_decoding
from zigflow.real_sets import real_sets
from zigflow.registry import UnknownNameError
from zigflow.settings import Settings, SettingsError
from zigflow.sources import build_source

log = logging.getLogger(__name__)


def build_sampling_run(
    settings: Settings,
    pipeline: Pipeline,
    samples: Samples,
    *,
    folder: Path | None,
    identity: Mapping[str, Any],
    runtime: Runtime,
) -> SamplingRun:
    """How a configuration samples, for sample_acc.py and for evaluation during training.

    A model of classes takes them in turn, and a text model the texts of the data, where ``samples`` has no plan.

    Raises:
        SettingsError: the codec does not decode the model's latents, or there are no texts for a text model.
    """
    asked = as_denoiser(pipeline.model)
    *frames, channels, height, width = asked.sample_shape
    if getattr(pipeline.codec, "is_identity", False) and channels not in (1, 3):
        raise SettingsError(
            f"the model makes latents of {channels} channels and codec={settings.codec['_target_']} does "
            "not decode them: sample with codec=sd_vae codec.path=FOLDER"
        )
    if settings.upsample.skip_tuning is not None:
        try:
            asked.set_skip_tuning(settings.upsample.skip_tuning, settings.upsample.skip_tuning_range)
        except ValueError as error:
            raise SettingsError(f"upsample.skip_tuning={settings.upsample.skip_tuning}: {error}") from error
    if samples.label_of is None and asked.has_text:
        samples = replace(samples, label_of=data_texts(settings, pipeline.model)[0])
    return SamplingRun(
        pipeline,
        replace(samples, num_classes=max(asked.num_classes, 0)),
        (*frames, channels, *(settings.upsample.factor * side for side in (height, width))),
        folder=folder,
        identity=identity,
        runtime=runtime,
        mixed_precision=settings.mixed_precision or "no",
        progress=settings.loop.progress,
    )


def data_texts(settings: Settings, model: torch.nn.Module) -> tuple[Any, SourceRows]:
    """Sample i is conditioned on the text of held-out sample i modulo their number; the rows themselves too."""
    source = build_source(settings, "heldout") or build_source(settings)
    if source is None:
        raise SettingsError(
            f"a text model needs texts to sample from, data={settings.data.name} has none: give captions=FILE.npy"
        )
    rows = SourceRows(source)
    return text_plan(rows, as_denoiser(model).d_context, f"data={settings.data.name}"), rows


def build_judge(
    settings: Settings,
    *,
    runtime: Runtime,
    codec: Any,
    preview: int,
    say: bool = True,
) -> Judge:
    """The metric of a configuration with its real images; without a metric or data it counts the samples only.

    Args:
        say: log what the real sets hold.

    Raises:
        SettingsError: the real sets cannot be read, or they are videos and the metric reads images.
    """
    node = {k: v for k, v in (settings.metrics or {}).items() if k != "name"}
    metric = train = heldout = None
    if node.get("_target_") and (settings.data.source or node.get("reference_stats")):
        wanted = real_sets(settings)
        metric = make("metrics", node)
        train = build_source(settings, say=say) if "train" in wanted else None
        heldout = build_source(settings, "heldout", say=say) if "heldout" in wanted else None
    # Such a metric knows the trained size alone.
    reduced = settings.upsample.factor if getattr(metric, "fixed_size", False) else 1
    return Judge(
        metric, train, heldout, ranks=runtime.ranks, codec=codec, device=runtime.device, preview=preview,
        reduced=reduced,
    )  # fmt: skip


_OPTIONAL_CODEC_KEYS = ("shift", "latents_mean", "latents_std", "own_scale")


def sampling_facts(settings: Settings, weights: str, step: int | None) -> dict[str, Any]:
    """What samples follow from, beside the weights themselves."""
    chosen = {"SDE": settings.sde, "diffusion": settings.diffusion}.get(
        settings.sample_mode or "", settings.ode
    )
    upsample = {"upsample": asdict(settings.upsample)} if settings.upsample.factor > 1 else {}
    names = settings.data.class_names or ()
    # Names that say no more than their numbers would be another identity of samples that were made without them.
    named = {"class_names": list(names)} if names and not are_numbers(names) else {}
    return {
        **upsample,
        **named,
        "weights": weights,
        "step": step,
        "sample_mode": settings.sample_mode,
        "sampler": asdict(chosen),
        "guidance": {"scale": settings.cfg_scale, "interval": list(settings.cfg_interval)},
        "process": dict(settings.process),
        # Of its keys only those that do something: samples of 0.1 keep their names.
        "codec": {k: v for k, v in settings.codec.items() if k not in _OPTIONAL_CODEC_KEYS or v},
        "precision": settings.mixed_precision or "no",
    }


def time_facts(pipeline: Pipeline, backwards: bool = False) -> dict[str, Any]:
    """Where time started and ended, and the last step, for results; ``backwards``: data were encoded or measured."""
    sampler, process = pipeline.sampler, pipeline.process
    return {"time": asdict(sampler.time_range(process, True) if backwards else sampler.time_range(process))}


def results_protocol(settings: Settings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How a number came about, for any of our results; the samples' number and hash are still to be added."""
    files = plugin_files.digests(settings.plugins)
    return {
        **facts,
        **({"plugin_files": files} if files else {}),
        "seed": settings.global_seed,
        "steps": (facts.get("sampler") or {}).get("num_steps"),
        "codec_scale": settings.codec.get("scale", 1.0),
        "reference": {"train": settings.data.source, "heldout": settings.data.heldout},
        "class_names": list(settings.data.class_names or ()),
        "versions": versions(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def build_monitoring(
    settings: Settings, model: torch.nn.Module, runtime: Runtime, hooks: Sequence[Hook] = ()
) -> Monitoring:
    """What accompanies a training run: trackers, evaluation, utilization; ``hooks`` come last."""
    settings = replace(settings, mixed_precision=chosen_precision(settings.mixed_precision))
    own: list[Hook] = []
    trackers = _trackers(settings, runtime.ranks.is_main)
    if _tracker_names(settings):
        own.append(_ScanPicture(settings, model))
    if settings.data.sample_fid_every and _decodes(settings):
        own.append(_in_loop_evaluation(settings, runtime))
    return Monitoring(
        hooks=(*own, *hooks),
        trackers=trackers,
        training_flops=_training_flops(model),
        peak_flops=settings.loop.peak_flops or peak_flops(runtime.device, settings.mixed_precision or "no"),
    )


def _decodes(settings: Settings) -> bool:
    """Whether samples become pixels; a run on stored latents needs no autoencoder to train."""
    try:
        check_decoding(settings)
    except SettingsError as error:
        log.warning("no evaluation during training: %s", error)
        return False
    return True


def _training_flops(model: torch.nn.Module) -> float | None:
    try:
        return count_flops(model).training
    except ValueError as error:
        log.info("%s, so no utilization is logged", error)
        return None


def _in_loop_evaluation(settings: Settings, runtime: Runtime) -> InLoopEvaluation:
    if settings.upsample.skip_tuning is not None:
        raise SettingsError(
            f"upsample.skip_tuning={settings.upsample.skip_tuning} changes the model that is trained: give it to "
            "sample_acc.py, or set data.sample_fid_every=0"
        )
    data = settings.data
    codec = build_codec(settings, runtime.device)
    judge = build_judge(settings, runtime=runtime, codec=codec, preview=data.sample_vis_n, say=False)
    samples = Samples(data.sample_fid_bs, settings.global_seed, data.sample_fid_n)

    def make_run(model: torch.nn.Module, weights: str) -> SamplingRun:
        return build_sampling_run(
            settings, build_pipeline(settings, model, codec), samples, folder=None,
            identity=sampling_facts(settings, weights, None), runtime=runtime,
        )  # fmt: skip

    def protocol(run: SamplingRun, weights: str, step: int) -> dict[str, Any]:
        kept = {k: run.identity[k] for k in ("weights_sha256", "scan") if k in run.identity}
        facts = sampling_facts(settings, weights, step) | kept | time_facts(run.pipeline)
        facts["function_evaluations"] = run.function_evaluations
        return results_protocol(settings, facts)

    return _Evaluation(every=data.sample_fid_every, judge=judge, make_run=make_run, protocol=protocol)


class _Evaluation(InLoopEvaluation):
    """What cannot be judged is a mistake in the configuration."""

    def check(self, trainer: Trainer) -> None:
        try:
            super().check(trainer)
        except ValueError as error:
            raise SettingsError(
                f"evaluation during training (data.sample_fid_every={self.every}): {error}; change "
                "data.sample_fid_n or the data, or give metrics=none"
            ) from error


def _tracker_names(settings: Settings) -> list[str]:
    switched = [("wandb", settings.use_wandb), ("tensorboard", settings.loop.tensorboard)]
    return list(dict.fromkeys([*(name for name, on in switched if on), *settings.loop.trackers]))


def _trackers(settings: Settings, is_main: bool) -> Trackers:
    """The trackers that are switched on; packages that are missing are told of before the first step."""
    makers = {}
    try:
        for name in _tracker_names(settings):
            kind = TRACKERS.get(name)
            kind.check()
            makers[name] = kind.make
    except (ImportError, UnknownNameError) as error:
        raise SettingsError(str(error)) from error
    return Trackers(makers if is_main else {})


class _ScanPicture(Hook):
    """The scan orders of the model, drawn once for the trackers."""

    def __init__(self, settings: Settings, model: torch.nn.Module):
        chosen = settings.scan.get("name", "from_model")
        self._name = settings.model.get("scan_type") if chosen == "from_model" else chosen
        self._grid = as_denoiser(model).token_grid

    def begin(self, trainer: Trainer) -> None:
        if self._name is None or self._grid is None or trainer.counters.step or not trainer.trackers:
            return
        file = Path(trainer.options.run_dir) / "scans.png"
        try:
            plot_scans([str(self._name)], *self._grid[-2:], str(file))
        except ValueError as error:
            log.info("the scan orders of %s are not drawn: %s", self._name, error)
        else:
            trainer.trackers.image("scans", file, 0)
