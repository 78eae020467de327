"""``list``: the names that can be typed, and what they stand for."""

import argparse
import importlib.metadata
import json
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from zigflow import paths, plugin_files, plugins

KINDS = (
    "scans", "models", "mixers", "data", "processes", "samplers", "metrics", "codecs", "optimizers", "trackers",
    "backends", "experiments", "debug", "accelerate", "config", "plugins",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Print what is registered, all kinds or one."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools list", description="Print names that can be typed."
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind; default: all")
    parser.add_argument("--json", action="store_true", help="as one JSON object: kind -> name -> what it is")
    args = parser.parse_args(argv)
    found = {kind: names(kind) for kind in KINDS if args.kind in (None, kind)}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for kind, entries in found.items():
        print(f"{kind}:")
        width = max((len(name) for name in entries), default=0)
        print("\n".join(f"  {name.ljust(width)}  {text}".rstrip() for name, text in entries.items()))
    return 0


def names(kind: str) -> dict[str, str]:
    """Name -> what it is, of one of ``KINDS``; those of plug-ins included."""
    plugins.load_plugins()
    special = {
        "scans": _scans,
        "models": _models,
        "mixers": _mixers,
        "processes": _processes,
        "samplers": _samplers,
        "optimizers": _optimizers,
        "trackers": _trackers,
        "backends": _backends,
        "config": _config,
        "plugins": _plugins,
    }
    if kind in special:
        return special[kind]()
    return choices({"metrics": "metrics", "codecs": "codec", "experiments": "experiment"}.get(kind, kind))


def choices(group: str) -> dict[str, str]:
    """The choices of a configuration group, ours and those of plug-ins, with the first line of each file."""
    plugins.prepare()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(paths.config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        options = sorted(loader.get_group_options(group, ObjectType.CONFIG))
        folders = [
            source.path.removeprefix("file://")
            for source in loader.get_search_path().get_path()
            if source.path and source.path.startswith(("file://", "/"))
        ]
    return {name: next((t for f in folders if (t := _headline(f, group, name))), "") for name in options}


def _headline(folder: str, group: str, name: str) -> str:
    """The comment that opens a YAML file."""
    file = Path(folder) / group / f"{name}.yaml"
    if not file.is_file():
        return ""
    lines = [
        line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")
    ]
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def _scans() -> dict[str, str]:
    from scans import list_scans

    return {name: f"scan={name}" for name in list_scans()}


def _models() -> dict[str, str]:
    from zigflow.models import list_variants

    variants = dict.fromkeys(list_variants(), "a variant: zigflow.models.build_variant")
    return {name: text or f"model={name}" for name, text in choices("model").items()} | variants


def _mixers() -> dict[str, str]:
    from dis_mamba import list_mixers

    return {name: f"model.mixer={name}" for name in list_mixers()}


def _trackers() -> dict[str, str]:
    from zigflow.engine import track_tensorboard, track_wandb  # noqa: F401  # they register themselves
    from zigflow.engine.trackers import TRACKERS

    return {name: f"loop.trackers=[{name}]" for name in TRACKERS.names()}


def _processes() -> dict[str, str]:
    from zigflow.processes import BETAS, DIFFUSION_FORMS, INTERPOLANTS, PREDICTIONS, SCHEDULES, TIME_LAWS

    return choices("process") | {
        "train.path_type": ", ".join(INTERPOLANTS.names()),
        "train.prediction": ", ".join(PREDICTIONS),
        "process.betas": ", ".join(BETAS.names()),
        "process.schedule": ", ".join(SCHEDULES.names()),
        "process.time_law": ", ".join(TIME_LAWS.names()),
        "sde.diffusion_form": ", ".join(DIFFUSION_FORMS.names()),
    }


def _samplers() -> dict[str, str]:
    from zigflow.samplers import DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS

    found = {
        f"ode.sampling_method={name}": "each sample adapts its steps" if solver.adaptive else "fixed steps"
        for name, solver in ((name, ODE_SOLVERS.get(name)) for name in ODE_SOLVERS)
    }
    found |= {f"sde.sampling_method={name}": "sample_mode=SDE" for name in SDE_STEPS}
    return found | {
        f"diffusion.sampling_method={name}": "sample_mode=diffusion" for name in DIFFUSION_SAMPLERS
    }


def _optimizers() -> dict[str, str]:
    from zigflow.engine.optim import OPTIMIZERS

    return {name: f"optim.name={name}" for name in OPTIMIZERS.names()}


def _backends() -> dict[str, str]:
    import dis_causal_conv1d
    import dis_mamba

    found = {
        "selective_scan": dis_mamba.available_backends(),
        "causal_conv1d": dis_causal_conv1d.available_backends(),
    }
    return {
        f"{op}/{name}": "can run" if reason is None else f"cannot run: {reason}"
        for op, backends in found.items()
        for name, reason in backends.items()
    }


def _config() -> dict[str, str]:
    plugins.prepare()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(paths.config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [g for g in loader.list_groups("") if g not in ("hydra", "accelerate")]
        return {g: ", ".join(sorted(loader.get_group_options(g, ObjectType.CONFIG))) for g in sorted(groups)}


def _plugins() -> dict[str, str]:
    loaded = plugins.load_plugins()
    found = {}
    for group in ("zigflow.plugins", "zigflow.scans"):
        for entry in importlib.metadata.entry_points(group=group):
            broken = group == plugins.GROUP and entry.name not in loaded
            version = entry.dist.version if entry.dist is not None else "?"
            found[f"{group}/{entry.name}"] = f"{entry.value} {version}" + (
                " failed to load" if broken else ""
            )
    found |= {
        f"file/{file.path}": f"{file.module} SHA-256 {file.sha256[:8]}" for file in plugin_files.loaded()
    }
    return found | {f"file/{name}": f"{why} failed to load" for name, why in plugin_files.broken.items()}
