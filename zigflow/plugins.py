"""What happens before a configuration is composed: resolvers, nodes for registered scans, plug-ins.

Torch-free. Plug-ins are found through two entry-point groups: ``zigflow.scans`` (modules that register
scan orders, loaded by ``scans`` itself) and ``zigflow.plugins`` (everything else). The YAML folder
``config/`` of a ``zigflow.plugins`` package joins Hydra's search path without importing the package; its
modules are imported by ``load_plugins`` after main has begun.
"""

import contextlib
import copy
import errno
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

import scans
from zigflow import hydra_folders, paths, plugin_files
from zigflow.engine import launch, launcher_settings
from zigflow.errors import ZigflowError
from zigflow.hydra_folders import run_id
from zigflow.overrides import check_added, check_nodes, compose_leniently, signs, with_signs
from zigflow.preflight import check_training
from zigflow.registry import Registry, UnknownNameError, near_names
from zigflow.settings import WANDB_KEY, Settings, SettingsError
from zigflow.typed import unknown_key
from zigflow.typed_arguments import as_meant, check_grammar, check_hydra_folders, name_no_job
from zigflow.typed_plugins import with_plugin_files
from zigflow.wandb_key import refuse_key, types_key

log = logging.getLogger(__name__)

GROUP = "zigflow.plugins"
# Groups whose choice is the data's own where nothing is typed and a file of its name exists.
FOLLOW_DATA = ("codec", "metrics")


# Folders of --config-dir; of the two commands only while the command line is checked, Hydra adds it afterwards.
_typed_folders: list[Path] = []


def add_config_dir(folder: str) -> None:
    """Compose with the YAML of this folder, too.

    Raises:
        SettingsError: there is no such folder.
    """
    path = Path(paths.expanded("--config-dir", folder))
    if not folder or not path.is_dir():
        raise SettingsError(
            f"--config-dir {folder or 'FOLDER'}: there is no such folder: give one with GROUP/NAME.yaml in it"
        )
    if path.absolute() not in _typed_folders:
        _typed_folders.append(path.absolute())


@contextlib.contextmanager
def _looking_in(config_dir: str | None) -> Iterator[None]:
    """Compose with the YAML of ``--config-dir`` inside."""
    before = list(_typed_folders)
    _typed_folders.extend([] if config_dir is None else [Path(config_dir).absolute()])
    try:
        yield
    finally:
        _typed_folders[:] = before


class PluginConfigs(SearchPathPlugin):
    """Appends each plug-in package's ``config/`` folder to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for entry in importlib.metadata.entry_points(group=GROUP):
            folder = _package_folder(entry.value.partition(":")[0])
            if folder is not None and (folder / "config").is_dir():
                search_path.append(provider=f"plug-in {entry.name}", path=f"file://{folder / 'config'}")
        for folder in _typed_folders:
            search_path.append(provider="command-line", path=f"file://{folder}")


def _package_folder(module: str) -> Path | None:
    """The folder of a top-level package, found without importing it."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def load_plugins() -> list[str]:
    """Import the modules of the group ``zigflow.plugins``; returns the names of those that loaded.

    A plug-in that fails is reported by name and does not take the others down.
    """
    loaded = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            importlib.import_module(entry.value.partition(":")[0])
            loaded.append(entry.name)
        except Exception as error:
            log.warning("plug-in %s (%s) failed to load: %s", entry.name, entry.value, error)
    return loaded


def job_suffix() -> str:
    """What tells the jobs of a multirun apart in configurations of 0.1: "/0", "/1", ...; empty for a single run."""
    return f"/{HydraConfig.get().job.num}" if is_sweep() else ""


def is_sweep() -> bool:
    """Whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_plain_sweep() -> bool:
    """Whether this is a job of Hydra's own sweeper, which tries what it is told and compares nothing."""
    return is_sweep() and _is_plain(HydraConfig.get().sweeper)


def _is_plain(sweeper: Any) -> bool:
    return str(sweeper._target_) == f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"


def _launched(key: str, default: Any) -> Any:
    """What the launcher was told for a key of ours, or the key's default."""
    told = launcher_settings.launched(key)
    return default if told is None else told


def prepare() -> None:
    """Make ``scan=NAME``, the resolvers and the plug-ins' YAML known to Hydra; may be called twice."""
    for name, resolver in (
        ("run_id", run_id),
        ("job_suffix", job_suffix),
        ("expanded", lambda value: paths.expanded("run_dir", str(value))),
        ("main_only", lambda value: value if os.environ.get("RANK", "0") == "0" else None),
        ("launched", _launched),
        ("default_run_dir", hydra_folders.default_run_dir),
        ("job_folder", hydra_folders.job_folder),
        ("rank_suffix", lambda: "" if os.environ.get("RANK", "0") == "0" else f"-{os.environ['RANK']}"),
    ):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)
    store = ConfigStore.instance()
    for name in scans.list_scans():
        store.store(group="scan", name=name, node={"name": name}, provider="zigflow")
    if PluginConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(PluginConfigs)


def compose_config(overrides: list[str] | None = None, config_name: str = "default") -> DictConfig:
    """Compose as the commands do, for tools, tests and notebooks."""
    return composed(overrides, config_name)[0]


def composed(
    overrides: list[str] | None = None, config_name: str = "default"
) -> tuple[DictConfig, list[str]]:
    """Compose as the commands do; the overrides as Hydra takes them, too.

    Raises:
        SettingsError: a mistake, in one line; a HydraException for one that Hydra finds.
    """
    typed = as_meant(with_plugin_files(list(overrides or [])))
    prepare()
    check_grammar(typed)
    check_choices(typed)
    with _hydra():
        cfg, made_from = compose_leniently(partial(compose, config_name), typed)
    check_added(cfg, made_from)
    return cfg, made_from


@contextlib.contextmanager
def _hydra(config_dir: Path | None = None) -> Iterator[GlobalHydra]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir or paths.config_dir()), version_base="1.3"):
        yield GlobalHydra.instance()


def group_choices(group: str) -> list[str]:
    """The names that ``group=`` takes, those of plug-ins included."""
    prepare()
    with _hydra() as hydra:
        return sorted(hydra.config_loader().get_group_options(group, results_filter=ObjectType.CONFIG))


def _groups() -> list[str]:
    """The groups whose choices can be typed: folders of ``config/`` and of plug-ins."""
    with _hydra() as hydra:
        groups = hydra.config_loader().list_groups("")
    return [group for group in groups if group not in ("hydra", "accelerate", "recipe")]


# What Hydra takes for something else than the name of a choice.
_NO_NAME = re.compile(r"|null|true|false|[-+]?[0-9][0-9_.]*", re.IGNORECASE)


def check_choices(arguments: list[str]) -> None:
    """Refuse a choice that does not exist where Hydra would not tell it.

    In groups that follow ``data=`` it passes over such a choice in silence, and null or a number for any group is
    answered by a traceback.

    Raises:
        SettingsError: the group, the choice and near matches.
    """
    for argument in arguments:
        group, given, choices = argument.lstrip("+").partition("=")
        follows = group in FOLLOW_DATA and bool(choices)
        if not given or not re.fullmatch(r"[\w/]+", group):
            continue
        if not follows and not any(_NO_NAME.fullmatch(choice) for choice in choices.split(",")):
            continue
        known = group_choices(group)
        if follows and not set(choices.split(",")) <= set(known):
            known = _with_registered(group, known)
        for choice in choices.split(",") if known else ():
            if choice not in known:
                raise SettingsError(_no_such_choice(group, choice, known))


def _with_registered(group: str, known: list[str]) -> list[str]:
    """The choices of a group, and what is registered for it without a file; plug-ins are loaded and torch imported."""
    from zigflow.codec import CODECS
    from zigflow.metrics.base import METRICS

    load_plugins()
    registry: Registry[Any] = {"codec": CODECS, "metrics": METRICS}[group]
    for name in set(registry) - set(known):
        found = registry.get(name)
        node = {"_target_": f"{found.__module__}.{found.__qualname__}"}
        ConfigStore.instance().store(group=group, name=name, node=node, provider="zigflow")
    return sorted({*known, *registry})


def _no_such_choice(group: str, choice: str, known: list[str]) -> str:
    close = near_names(choice, known, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    own = (
        f"; of a file of your own: {group}=FILE.py:{choice}, or plugins=[FILE.py]" if group == "scan" else ""
    )
    return f"{group}={choice} does not exist: {hint}known: {', '.join(sorted(known))}{own}"


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain values: interpolations resolved, paths expanded, names of classes texts.

    Raises:
        SettingsError: a path that cannot be expanded, or a name that is none, in one line.
    """
    values = paths.with_expanded_paths(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    data = values.get("data")
    for node in (data, *((data or {}).get(split) for split in ("source", "heldout"))):
        if isinstance(node, dict) and isinstance(node.get("class_names"), list):
            node["class_names"] = [_class_name(name) for name in node["class_names"]]
    return values


def _class_name(name: Any) -> str:
    """A name as it was typed: ``[10,2,1]`` is read as numbers."""
    if isinstance(name, str) or type(name) in (int, float):
        return str(name)
    raise SettingsError(
        f"data.class_names has {name!r}, the name of a class is a text: write data.class_names=['\"{name}\"', ...]"
    )


def validated(cfg: DictConfig) -> Settings:
    """The composed configuration as frozen settings, see :func:`checked`."""
    return checked(plain(cfg))


def checked(values: Mapping[str, Any], trains: bool = True) -> Settings:
    """Plain values as frozen settings whose names are known and whose choices fit: the one check of all commands.

    Plug-ins are loaded for it, and torch is imported; no device is touched.

    Args:
        trains: the configuration trains; where it samples, its optimizer is not looked at.

    Raises:
        SettingsError: it cannot run, in one line that names the key.
    """
    settings = Settings.from_mapping(values)
    load_plugins()
    plugin_files.load(settings.plugins)
    from zigflow.chosen import check_chosen

    check_chosen(settings, trains)
    check_nodes(values)
    return settings


@dataclass(frozen=True)
class CommandLine:
    """A command line that has been checked.

    Attributes:
        arguments: as Hydra composes them, see :mod:`zigflow.overrides`.
        typed: the same, parsed.
        job: a single run's composed configuration, Hydra's node included; None for a sweep and for what only shows.
        sweep: whether there is one run for each choice.
    """

    arguments: list[str]
    typed: Any
    job: DictConfig | None = None
    sweep: bool = False


def check_command_line(arguments: list[str], config_name: str) -> CommandLine:
    """Check the launch, then compose and validate before Hydra makes a run directory.

    Every job of a sweep is checked before the first one starts. What only shows something is not validated.

    Raises:
        SettingsError: a mistake, in one line; a HydraException for one that Hydra finds.
    """
    if any(types_key(argument) for argument in arguments):
        # Before Hydra writes the command line into the run directory.
        raise SettingsError(WANDB_KEY)
    processes = launch.check_environment()
    launcher_settings.check_settings()
    typed = _parser().parse_args(arguments)
    overrides = typed.overrides
    sweep = typed.multirun or "hydra.mode=MULTIRUN" in overrides
    check_grammar(overrides, sweep)
    named = hydra_folders.typed_run_dir(overrides) is not None
    if sweep:
        if processes > 1 or "RANK" in os.environ:
            raise SettingsError(
                "--multirun inside a launched process would run the whole sweep in each of them: start the sweep with "
                "plain `python`, which runs one process per job, or launch one run per choice from a shell loop"
            )
        if any(a.lstrip("+").startswith("run_dir=") for a in overrides):
            raise SettingsError(
                "run_dir= with --multirun would put every job into one directory: give hydra.sweep.dir=FOLDER, whose "
                "sub-folders are the runs"
            )
        # The launcher's own processes, which resolve it again, must agree on the sweep's name.
        os.environ["RUN_ID"] = run_id()
    elif not named:
        run_id()
    with _looking_in(typed.config_dir):
        check_choices(overrides)
    if any((typed.help, typed.hydra_help, typed.shell_completion, typed.experimental_rerun)):
        return CommandLine(arguments, typed)
    if typed.resolve and not typed.cfg:
        raise SettingsError("--resolve goes with --cfg job: it prints what interpolations stand for")
    shows = bool(typed.cfg or typed.info)
    changed: dict[str, str] = {}
    subdirs: list[tuple[str, str]] = []
    single = None
    jobs = _sweep(typed, overrides, config_name) if sweep else [(overrides, True)]
    for job, whole in jobs:
        cfg, made_from = _composed_as_typed(typed, job, config_name)
        changed |= signs(job, made_from)
        if not sweep and not shows:
            single = copy.deepcopy(cfg)
        with flag_override(cfg, "struct", False):
            name_no_job(cfg)
            subdirs.append(hydra_folders.subdir_of(cfg))
            hydra = cfg.pop("hydra")
            refuse_key(cfg, hydra)
        if shows:
            continue
        check_hydra_folders(hydra)
        check_added(cfg, made_from)
        plain(cfg)
        if config_name == "default" and whole:
            check_training(validated(cfg))
    if sweep and not shows:
        hydra_folders.check_folders(subdirs, all(whole for _, whole in jobs))
    made = with_signs(arguments, changed)
    if sweep or shows:
        typed = _parser().parse_args(made)
    if sweep:
        typed.overrides = [*typed.overrides, _told_apart_by(typed.overrides)]
    return CommandLine(made, typed, single, sweep and not shows)


def _told_apart_by(overrides: list[str]) -> str:
    """Hydra's own setting after which ``hydra.job.override_dirname`` holds what is swept and nothing else."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    fixed = [o.key_or_group for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]
    return f"++hydra.job.config.override_dirname.exclude_keys={json.dumps(fixed)}"


def _parser() -> Any:
    """Hydra's own parser of command lines.

    Raises:
        SettingsError: this Hydra cannot make one on this Python; argparse checks help texts from 3.14 on.
    """
    try:
        return get_args_parser()
    except ValueError as error:
        raise SettingsError(
            f"Python {platform.python_version()}: hydra-core {importlib.metadata.version('hydra-core')} cannot read a "
            f"command line on it ({error}; hydra issue 3121): use Python 3.11 to 3.13, or a newer hydra-core"
        ) from error


def _composed_as_typed(typed: Any, overrides: list[str], config_name: str) -> tuple[DictConfig, list[str]]:
    """As Hydra will compose, with its own node, from where --config-dir, --config-path and --config-name say.

    Returns:
        What was composed, and the overrides that Hydra composes the same from.
    """
    try:
        with hydra_of(typed):
            made = partial(compose, typed.config_name or config_name, return_hydra_config=True)
            return compose_leniently(made, overrides)
    except TypeError as error:
        # Hydra looks for text in each entry of a list.
        chosen = [item for item in overrides if "=[" in item]
        if not chosen:
            raise
        raise SettingsError(
            f"{' '.join(chosen)}: a group takes the name of a choice, such as scan=zigzagN8, and no number"
        ) from error


@contextlib.contextmanager
def hydra_of(typed: Any) -> Iterator[GlobalHydra]:
    """Hydra with the folders that a parsed command line names by --config-path and --config-dir."""
    folder = None if typed.config_path is None else Path(__file__).parent / typed.config_path
    with _looking_in(typed.config_dir), _hydra(folder) as hydra:
        yield hydra


def _jobs(overrides: list[str], foreign: bool = False) -> list[tuple[list[str], bool]]:
    """The overrides of each job that Hydra's own sweeper would make, and True.

    What another sweeper (``foreign``, or chosen by ``hydra/sweeper=``) would try is not known here: one job without
    what is swept, and False.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    settings = [str(o.input_line) for o in parsed if o.key_or_group.startswith("hydra")]
    chosen = [o for o in parsed if not o.key_or_group.startswith("hydra")]
    if foreign or any(o.key_or_group == "hydra/sweeper" for o in parsed):
        return [([*settings, *(str(o.input_line) for o in chosen if not o.is_sweep_override())], False)]
    return [([*settings, *map(str, job)], True) for job in BasicSweeper.split_arguments(chosen, None)[0]]


def _sweep(typed: Any, overrides: list[str], config_name: str) -> list[tuple[list[str], bool]]:
    """The jobs of a sweep; of another sweeper's one that has null for the keys that are swept."""
    (base, _), *_ = _jobs(overrides, foreign=True)
    node = _composed_as_typed(typed, [f"run_dir={os.devnull}", *base], config_name)[0].hydra.sweeper
    if _is_plain(node):
        return _jobs(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = [str(o.get_key_element()) for o in parsed if o.is_sweep_override()]
    return [([*base, *(f"{key}=null" for key in swept if "." in key)], False)]


def _known_keys(config_name: str, key: str, parent: DictConfig | None) -> list[str]:
    """The keys of the configuration as it stands; beside ``key`` those of ``parent``, the choice made there."""
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{prefix}{key}.")

    walk(compose_config(config_name=config_name), "")
    keys += [group for group in _groups() if group not in keys]
    place = key.rpartition(".")[0]
    if place and isinstance(parent, DictConfig):
        keys = [name for name in keys if not name.startswith(f"{place}.")]
        walk(parent, f"{place}.")
    return keys


def is_mistake(error: BaseException) -> bool:
    """Whether the configuration is at fault, not the run."""
    return isinstance(error, (SettingsError, UnknownNameError, HydraException, OmegaConfBaseException))


def explain(error: BaseException, config_name: str) -> str | None:
    """One line for a mistake in the configuration or an error of our own; None for any other."""
    if isinstance(error, (SettingsError, UnknownNameError)):
        return _one_line(str(error))
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return _no_such_choice(group, choice, list(error.options))
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        twice = re.match(r"Multiple values for ([\w/]+)\.|([\w/]+) appears more than once", str(error))
        if twice:
            return f"{twice[1] or twice[2]}= is given more than once: give it once"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OmegaConfBaseException) and "not in struct" in str(cause):
                key = cause.full_key or str(cause.key)
                return unknown_key(key, _known_keys(config_name, key, cause.parent_node))
            variable = re.search(r"Interpolation key '(\w+)' not found", str(cause))
            if variable and (variable[1] in os.environ or variable[1].isupper()):
                name, key = variable[1], getattr(cause, "full_key", None)
                return (
                    f"{f'{key}: ' if key else ''}${{{name}}} is no key of the configuration: for the environment "
                    f"variable write ${name} in a path, or ${{oc.env:{name}}}"
                )
            cause = cause.__cause__
        return _one_line(str(error))
    # Errors of our own are written for the user: a run directory in use, a damaged checkpoint, a NaN loss.
    if not is_foreign(error):
        return _one_line(str(error))
    storage = (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    )
    named = (*storage, errno.EEXIST, errno.ENOTDIR)
    if isinstance(error, OSError) and error.errno in (named if error.filename else storage):
        # Hydra's, when it writes its files, and those of pictures and archives, which do not say which file it was.
        remedy = "free space there, make it writable, or choose another run_dir"
        return f"{error.filename or 'a file of results'} cannot be written: {error.strerror}; {remedy}"
    return None


def is_foreign(error: BaseException) -> bool:
    """Whether the error was not written for the user: only its traceback says what is wrong."""
    return not isinstance(error, ZigflowError)


def _one_line(text: str) -> str:
    lines = text.strip().splitlines()
    if re.match(r"Caught \w+ in DataLoader worker process", lines[0] if lines else ""):
        # Torch puts the worker's whole traceback into the message; its last line is the error's own.
        text = lines[-1].strip().partition(": ")[2] or lines[-1]
    return " ".join(part.strip() for part in text.splitlines() if part.strip())
