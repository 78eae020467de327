"""Files of one's own: ``plugins=[my_scans.py]`` imports a Python file that registers names or holds classes.

``my_scans.py`` becomes the module ``my_scans``, so that a YAML names its classes as ``my_scans.Name``. Its folder is
put at the end of the search path: the file may import its neighbors, and data workers find it however they start.
A checkpoint records each file with its path and its SHA-256, and what opens the checkpoint loads the file again.
Torch-free; a file may import torch.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import keyword
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scans.registry import undone_on_error
from zigflow.errors import ZigflowError
from zigflow.paths import expanded
from zigflow.typed import SettingsError

__all__ = [
    "VARIABLE",
    "PluginFile",
    "broken",
    "digests",
    "from_environment",
    "in_workers",
    "load",
    "loaded",
    "try_load",
    "use",
    "wanted",
]

log = logging.getLogger(__name__)

VARIABLE = "ZIGFLOW_PLUGINS"


@dataclass(frozen=True)
class PluginFile:
    """A file that was found: as it was ``given``, its absolute ``path``, the digest of its contents."""

    given: str
    path: str
    sha256: str

    @property
    def module(self) -> str:
        return Path(self.path).stem

    def facts(self, run_dir: Path | str | None) -> dict[str, str]:
        """What a checkpoint records; ``from_run`` is the path as seen from the run's directory."""
        found = {"given": self.given, "absolute": self.path, "sha256": self.sha256}
        if run_dir is not None:
            try:
                found["from_run"] = os.path.relpath(self.path, Path(run_dir).resolve())
            except ValueError:
                log.debug("%s lies on another drive than the run", self.path)
        return found


# By module name: what this process has imported.
_loaded: dict[str, PluginFile] = {}
# What try_load could not load, with the error.
broken: dict[str, str] = {}


def load(named: Iterable[str]) -> list[PluginFile]:
    """Import the files in turn. One that was imported before is imported again only where its contents changed.

    Raises:
        SettingsError: a file is missing, is a folder, has the name of another module, raises, or is named twice.
    """
    files: dict[str, tuple[PluginFile, bytes]] = {}
    for given in named:
        file, source = _read(given)
        other, _ = files.setdefault(file.module, (file, source))
        if other is not file and other.path == file.path:
            raise SettingsError(f"plugins: {given} is named twice: name it once")
        if other is not file:
            raise SettingsError(
                f"plugins: {other.path} and {file.path} have the same name: rename one of them"
            )
    for file, source in files.values():
        _import(file, source)
    return [file for file, _ in files.values()]


def _read(given: str) -> tuple[PluginFile, bytes]:
    """The file and its contents.

    Raises:
        SettingsError: there is no such file, or it cannot be a module.
    """
    given = expanded("plugins", given)
    path = Path(os.path.abspath(given))
    where = f"plugins: {given}" if str(path) == given else f"plugins: {given} ({path})"
    if path.is_dir():
        raise SettingsError(f"{where} is a folder: name the Python files in it, plugins=[FOLDER/FILE.py]")
    if not path.is_file():
        raise SettingsError(
            f"{where} does not exist: give plugins=[FILE.py], a path from the working directory"
        )
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise SettingsError(
            f"{where} cannot be imported: rename it to a name of letters, digits and underscores that ends in .py"
        )
    try:
        source = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{where} cannot be read: {error.strerror}") from error
    return PluginFile(given, str(path), hashlib.sha256(source).hexdigest()), source


def _import(file: PluginFile, source: bytes) -> None:
    """Run the source that was digested as the module of its name."""
    known = _loaded.get(file.module)
    if known is not None and known.sha256 == file.sha256:
        return
    if known is not None and known.path != file.path:
        raise SettingsError(
            f"plugins: this process has loaded {known.path}, and {file.path} has the same name: rename one of them"
        )
    if known is None and _is_imported(file):
        _loaded[file.module] = file
        return
    folder = str(Path(file.path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    loader = importlib.machinery.SourceFileLoader(file.module, file.path)
    spec = importlib.machinery.ModuleSpec(file.module, loader, origin=file.path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(file.module)
    sys.modules[file.module] = module
    try:
        with undone_on_error():
            exec(compile(source, file.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(file.module)
        if before is not None:
            sys.modules[file.module] = before
        if isinstance(error, _TorchWantedError):
            raise
        raise SettingsError(f"plugins: {file.path} cannot be loaded: {_reason(error, file.path)}") from error
    _loaded[file.module] = file
    log.debug("plug-in file %s (SHA-256 %s)", file.path, file.sha256)


def _is_imported(file: PluginFile) -> bool:
    """Whether its module is there already, imported by its name.

    Raises:
        SettingsError: another module has the name.
    """
    module = sys.modules.get(file.module)
    try:
        found = getattr(module, "__spec__", None) or importlib.util.find_spec(file.module)
    except (ImportError, ValueError):
        found = None
    origin = getattr(module, "__file__", None) or (found.origin if found is not None else None)
    if origin is not None and not (os.path.exists(origin) and os.path.samefile(origin, file.path)):
        raise SettingsError(
            f"plugins: {file.path} has the name of another module ({file.module}, {origin}): rename the file"
        )
    return module is not None and origin is not None


def _reason(error: BaseException, path: str) -> str:
    """The error in one line, with the line of the file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, text = [error.lineno], error.msg
    else:
        text = " ".join(str(error).split())
    line = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{line}"


class _TorchWantedError(ZigflowError):
    """A file asked for torch where it is not to be imported. No ImportError, which a file might catch."""


class _NoTorch:
    """A finder that refuses torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch":
            raise _TorchWantedError


def try_load(given: str, torch: bool = True) -> bool:
    """Load a file for a command that only shows something; one that cannot be loaded is told of in one line.

    Args:
        torch: whether the file may import torch, which takes seconds; if not, it is passed over where it does.

    Returns:
        Whether it was loaded.
    """
    finder = _NoTorch()
    if not torch:
        sys.meta_path.insert(0, finder)
    try:
        load([given])
        broken.pop(given, None)
        return True
    except SettingsError as error:
        broken[given] = str(error)
        log.warning("%s", error)
    except _TorchWantedError:
        log.warning(
            "plugins: %s imports torch and is loaded when a run begins: its names are not shown", given
        )
    finally:
        if not torch:
            sys.meta_path.remove(finder)
    return False


def loaded() -> list[PluginFile]:
    """The files that this process has imported."""
    return list(_loaded.values())


def from_environment() -> list[str]:
    """The files that the environment variable ``ZIGFLOW_PLUGINS`` names, separated as the folders of PATH are."""
    return [given for given in os.environ.get(VARIABLE, "").split(os.pathsep) if given]


def wanted(named: Sequence[str], runs: Iterable[Path | str | None]) -> list[str]:
    """The files to load: those that are named, and those of checkpoints that are not among them by name.

    Args:
        named: by the command or the configuration; they take the place of recorded files of the same name.
        runs: run directories or checkpoints, ours or not, there or not.

    Raises:
        SettingsError: a recorded file is not where it was, and nothing of its name is given.
    """
    found = list(named)
    names = {Path(given).stem for given in found}
    for run in (run for run in runs if run is not None):
        for known in _recorded(run):
            name = Path(known["absolute"]).stem
            if name not in names:
                names.add(name)
                found.append(_find(known, run))
    return found


def use(config: dict[str, Any], ckpt: str | None = None) -> list[dict[str, str]]:
    """Load the files of a configuration and of the checkpoints that it continues from, starts from or samples.

    A file that has changed since is told of; whether its scans still walk the same orders is checked with the weights.

    Args:
        config: plain; its ``plugins`` become absolute.
        ckpt: what is sampled, where the configuration does not say it.

    Returns:
        What a checkpoint records of each file.

    Raises:
        SettingsError: as :func:`load` and :func:`wanted`.
    """
    run_dir = config.get("run_dir")
    runs = [None if config.get("resume") == "never" else run_dir, ckpt or config.get("ckpt")]
    files = load(wanted(config.get("plugins") or (), runs))
    config["plugins"] = [file.path for file in files]
    for run in (run for run in runs if run is not None):
        before = {Path(known["absolute"]).stem: known for known in _recorded(run)}
        for file in files:
            was = before.get(file.module)
            if was is not None and was["sha256"] != file.sha256:
                log.warning(
                    "plug-in file %s is not what %s was written with (SHA-256 %s, then %s): the orders that its scans "
                    "make are compared, the rest is taken as it is",
                    file.path, run, file.sha256[:8], was["sha256"][:8],
                )  # fmt: skip
    return [file.facts(run_dir) for file in files]


def in_workers() -> Callable[[int], None] | None:
    """What a worker process calls first, with its number, to have the files that this one has; None without any."""
    return partial(_load_in_worker, tuple(_loaded.values())) if _loaded else None


def _load_in_worker(files: Sequence[PluginFile], worker: int) -> None:
    for file in files:
        # A forked process has what its parent had.
        if file.module in _loaded:
            continue
        now, source = _read(file.path)
        if now.sha256 != file.sha256:
            raise SettingsError(
                f"plugins: {file.path} was edited while the run goes on: start the command again"
            )
        _import(now, source)


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Absolute path -> SHA-256 of what this process has imported of these files, whatever they hold now."""
    files = (_loaded[Path(path).stem] for path in paths)
    return {file.path: file.sha256 for file in files}


def _recorded(run: Path | str) -> list[Mapping[str, str]]:
    """What a checkpoint, or the newest one of a run, records of its files; none where nothing can be read."""
    folder = Path(run)
    where = _run_of(folder)
    steps = [path for path in where.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=folder)
    chosen = folder if (folder / "trainer.json").is_file() else newest
    try:
        found = json.loads((chosen / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # What is wrong with a checkpoint is told where it is opened.
        return []
    return found.get("plugin_files") or []


def _run_of(folder: Path) -> Path:
    """The run directory of a run, of its ``checkpoints/``, of one of those, or of its ``best``."""
    folder = folder.absolute()
    if folder.name == "checkpoints" or (folder.name == "best" and not folder.exists()):
        return folder.parent
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _find(known: Mapping[str, str], run: Path | str) -> str:
    """Where a recorded file lies now: the first place that has it as it was, else the first that has it.

    Raises:
        SettingsError: it is not there.
    """
    given, absolute = Path(known["given"]), Path(known["absolute"])
    from_run = [_run_of(Path(run)).resolve() / known["from_run"]] if "from_run" in known else []
    ways = [absolute, *from_run] if given.is_absolute() else [*from_run, given, absolute]
    there = [os.path.abspath(path) for path in ways if path.is_file()]
    same = [path for path in there if hashlib.sha256(Path(path).read_bytes()).hexdigest() == known["sha256"]]
    if not there:
        raise SettingsError(
            f"{run} was written with the plug-in file {absolute} (SHA-256 {known['sha256'][:8]}), which is not there: "
            f"give plugins=[FOLDER/{absolute.name}]"
        )
    return (same or there)[0]
