"""``show-config``: compose, validate, print, stop."""

import argparse
import json
from typing import Any, cast

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from zigflow import paths, plugins
from zigflow.engine.run_dir import flat


def main(argv: list[str]) -> int:
    """Print the configuration that a command with these overrides would run with."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools show-config",
        description="Print a composed and validated configuration.",
    )
    parser.add_argument("overrides", nargs="*", help="GROUP=CHOICE and KEY=VALUE, as for train_acc.py")
    parser.add_argument("--command", choices=("train", "sample"), default="train")
    parser.add_argument("--origins", action="store_true", help="one key per line, with the file that sets it")
    args = parser.parse_intermixed_args(argv)
    name = {"train": "default", "sample": "sample"}[args.command]
    unnamed = [] if _sets(args.overrides, "run_dir") else ["run_dir=outputs/shown"]
    try:
        cfg, made_from = plugins.composed([*args.overrides, *unnamed], name)
        if args.command == "train":
            plugins.validated(cfg)
    except Exception as error:
        line = plugins.explain(error, name)
        if line is None:
            raise
        raise ValueError(line) from error
    if not args.origins:
        print(OmegaConf.to_yaml(cfg, resolve=True))
        return 0
    values = flat(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    found = origins([override for override in made_from if override not in unnamed], name)
    width = min(60, max(len(f"{k}={json.dumps(v)}") for k, v in values.items()))
    for key, value in values.items():
        print(f"{f'{key}={json.dumps(value)}'.ljust(width)}  # {found.get(key, 'composed')}")
    return 0


def origins(overrides: list[str], config_name: str) -> dict[str, str]:
    """Leaf key -> what sets it last: a file of ``config/`` or of a plug-in, a registered name, or the command line."""
    plugins.prepare()
    GlobalHydra.instance().clear()
    found: dict[str, str] = {}
    with initialize_config_dir(config_dir=str(paths.config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        listed = loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).defaults
        groups = loader.list_groups("")
        repository = loader.repository  # type: ignore[attr-defined]  # of the loader that Hydra itself makes
        for default in listed:
            path = default.config_path
            result = None if path is None else repository.load_config(path)
            if path is None or result is None or path.startswith("hydra/"):
                continue
            where = _place(path, result.provider)
            keys = cast("dict[str, Any]", OmegaConf.to_container(result.config))
            for key, value in flat(keys).items():
                taken = f": {value}" if isinstance(value, str) and "${" in value else ""
                found[f"{default.package}.{key}" if default.package else key] = where + taken
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group.partition("@")[0]
        if key in groups:
            # The file that it chooses is in the list above.
            continue
        for leaf in [k for k in found if k == key or k.startswith(f"{key}.")] or [key]:
            found[leaf] = "command line"
    return found


def _place(path: str, provider: str) -> str:
    if provider == "zigflow":
        return f"registered {path.partition('/')[0]}"
    return f"config/{path}.yaml" if provider == "main" else f"{path}.yaml of {provider}"


def _sets(overrides: list[str], key: str) -> bool:
    return any(o.lstrip("+").startswith(f"{key}=") for o in overrides)
