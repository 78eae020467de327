"""``evaluate``: judge images that lie in a folder or an archive, as ``sample_acc.py`` judges its own."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from zigflow import plugins
from zigflow.settings import SettingsError

USAGE = """usage: python -m zigflow.tools evaluate samples=FOLDER|FILE.npz [output=FILE] [GROUP=CHOICE] [KEY=VALUE]

Judge the images of a folder (all of one size and kind; names are all numbers or none; a grid beside them is left out),
or the arrays of an npz file (arr_0: uint8 (N, H, W, C); arr_1, if it is there: labels), with the metrics and the real
images of a configuration, as train_acc.py composes it (data=..., metrics=...). Transparent images are shown on the
background of the real set (data.source.background).
The result is written to FOLDER/results.json (FILE.results.json for an archive) with its protocol."""


def main(argv: list[str]) -> int:
    """Judge, write the results, print them."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    given = dict(argument.split("=", 1) for argument in argv if argument.startswith(("samples=", "output=")))
    if "samples" not in given:
        raise SettingsError("samples is missing: give samples=FOLDER of images, or samples=FILE.npz")
    overrides = [argument for argument in argv if argument.partition("=")[0] not in given]
    try:
        settings = plugins.validated(plugins.compose_config([*overrides, "run_dir=outputs/evaluated"]))
    except Exception as error:
        line = plugins.explain(error, "default")
        if line is None:
            raise
        raise ValueError(line) from error
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    samples = Path(given["samples"])
    output = given.get("output")
    written, metrics = evaluate(settings, samples, None if output is None else Path(output))
    for name, value in metrics.items():
        print(f"{name:40s} {value}")
    print(written)
    return 0


def evaluate(settings: Any, samples: Path, output: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Judge ``samples`` as configured; returns the results file and the numbers.

    Raises:
        ValueError: no images, images of several sizes, or a metric that cannot judge them.
    """
    import torch

    from zigflow.build import build_codec
    from zigflow.engine.runtime import Runtime
    from zigflow.evaluation_job import build_judge, results_protocol
    from zigflow.metrics.results import read_results, write_results
    from zigflow.metrics.stored_images import StoredImages

    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    background = _background_of(settings)
    images = StoredImages(samples, background=background)
    if output is None:
        output = samples / "results.json" if samples.is_dir() else samples.with_suffix(".results.json")
    # What sample_acc.py wrote about how these images were made stays true.
    before: dict[str, Any] = {}
    if samples.is_dir() and (samples / "results.json").is_file():
        before = read_results(samples / "results.json")[1]
    elif samples.is_dir() and (samples / "sampling.json").is_file():
        before = json.loads((samples / "sampling.json").read_text(encoding="utf-8"))
    facts = {
        key: before.get(key)
        for key in (
            "weights", "weights_sha256", "step", "sample_mode", "sampler", "guidance", "process", "codec", "precision",
            "seed", "ckpt", "function_evaluations",
        )
    }  # fmt: skip
    settings, names = _classes_of(settings, samples)
    judge = build_judge(settings, runtime=Runtime(), codec=build_codec(settings, "cpu"), preview=0)
    if judge.metric is None:
        raise SettingsError("there is nothing to judge with: give metrics=NAME and data=NAME with a source")
    judgement = judge(images)
    assert judgement is not None
    protocol = {
        **results_protocol(settings, facts),
        "class_names": names,
        "seed": facts["seed"],
        "codec_scale": (facts["codec"] or {}).get("scale"),
        "samples": str(samples.resolve()),
        "background": background,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **judgement.protocol,
    }
    return write_results(output, judgement.metrics, protocol), judgement.metrics


def _background_of(settings: Any) -> Any:
    """What shows through transparent samples: the background that the real set is given, white without."""
    from zigflow.data.picture import WHITE

    chosen = (settings.data.heldout or {}).get("background", (settings.data.source or {}).get("background"))
    return WHITE if chosen is None else chosen


def _classes_of(settings: Any, samples: Path) -> tuple[Any, list[str]]:
    """The configuration whose real sets are numbered as the samples are, by the names that our sampling wrote."""
    file = samples / "sampling.json"
    if not samples.is_dir() or not file.is_file():
        return settings, list(settings.data.class_names or ())
    names = json.loads(file.read_text(encoding="utf-8")).get("class_names") or settings.data.class_names or ()
    return replace(settings, data=replace(settings.data, class_names=tuple(names) or None)), list(names)
