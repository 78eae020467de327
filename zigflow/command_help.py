"""What ``--help`` prints: groups with their choices, then every key with its value and meaning; torch-free."""

import json
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

from zigflow import plugins
from zigflow.overrides import compose_leniently
from zigflow.sample_options import SampleOptions
from zigflow.settings import Settings
from zigflow.typed import Key, declared

__all__ = ["PRESETS", "help_text", "keys_of"]

# Groups that stand in no defaults list, and what their choices are.
PRESETS = {
    "experiment": "published and reference runs",
    "debug": "small runs that show whether something works",
}
_HIDDEN = ("hydra", "accelerate", "recipe", *PRESETS)
_WIDTH = 110


def keys_of(config_name: str) -> list[Key]:
    """The declared keys of a command; ``default`` trains, ``sample`` samples."""
    return [
        *declared(Settings),
        *(declared(SampleOptions, used="sampling") if config_name == "sample" else ()),
    ]


def help_text(typed: Any, config_name: str) -> str:
    """The help of a command with its overrides applied.

    Args:
        typed: the parsed command line.
        config_name: ``default`` or ``sample``.
    """
    with plugins.hydra_of(typed) as hydra:
        made = partial(compose, typed.config_name or config_name, return_hydra_config=True)
        cfg = compose_leniently(made, typed.overrides)[0]
        HydraConfig.instance().set_config(cfg)
        loader = hydra.config_loader()
        choices = {g: loader.get_group_options(g, ObjectType.CONFIG) for g in loader.list_groups("")}
    return "\n".join(_lines(cfg, choices, keys_of(config_name)))


def _lines(cfg: DictConfig, choices: dict[str, list[str]], keys: list[Key]) -> Iterator[str]:
    about = {key.path: key.about.text for key in keys}
    yield str(cfg.hydra.help.header)
    yield ""
    yield "Groups (GROUP=CHOICE):"
    samples = cfg.hydra.job.name == "sample"
    for group in [*(g for g in about if g in choices), *(g for g in choices if g not in about)]:
        offered = _offered(group, choices, samples)
        if group in _HIDDEN or len(offered) < 2:
            continue
        yield f"  {group}: {about.get(group, 'a group of a plug-in')}"
        more = ["that of data="] if group in plugins.FOLLOW_DATA and not samples else []
        yield from _wrapped(", ".join([*offered, *more]))
    yield ""
    yield "Presets (PRESET=CHOICE):"
    for preset, text in PRESETS.items():
        yield f"  {preset}: {text}"
        yield from _wrapped(", ".join(choices.get(preset, [])))
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    yield ""
    yield "Keys (KEY=VALUE), with their values as they stand:"
    yield from _table(
        (key.path, _shown(values[key.path], key), key.about.text) for key in keys if key.path in values
    )
    yield ""
    yield "Keys inside groups; those of a node with _target_ are the arguments of its class:"
    yield from _table(_inner(values, about))
    yield ""
    yield "Print the configuration and stop: --cfg job      Resolve interpolations too: --cfg job --resolve"
    yield "Every key on one page: docs/keys.md              All names that can be typed: python -m zigflow.tools list"


def _offered(group: str, choices: dict[str, list[str]], samples: bool) -> list[str]:
    """Choices worth typing: a data set's own codec and metrics come with it; a training has no checkpoint to ask."""
    hidden = set(choices["data"]) - {"none"} if group in plugins.FOLLOW_DATA else set()
    return sorted(
        name for name in choices[group] if name not in hidden and (samples or name != "from_checkpoint")
    )


def _inner(values: dict[str, Any], about: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
        for name, value in node.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict) and value:
                yield from walk(value, f"{path}.")
            elif prefix:
                yield path, _shown(value, None), about.get(path, "")

    yield from walk({name: node for name, node in values.items() if name != "hydra"}, "")


def _shown(value: Any, key: Key | None) -> str:
    if key is not None and (key.group or isinstance(value, dict)):
        return "..."
    return value if isinstance(value, str) and value else json.dumps(value)


def _table(rows: Any) -> Iterator[str]:
    rows = list(rows)
    first = max(len(path) for path, _, _ in rows)
    second = min(32, max(len(value) for _, value, _ in rows))
    for path, value, text in rows:
        yield f"  {path.ljust(first)}  {value.ljust(second)}  {text}".rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
