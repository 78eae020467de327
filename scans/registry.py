"""The names of scan orders: registering, finding, building and caching them, and their plug-ins."""

import difflib
import functools
import importlib.metadata
import inspect
import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from scans.path import ScanPath

logger = logging.getLogger(__name__)

PLUGIN_GROUP = "zigflow.scans"
ScanFunction = Callable[..., Iterable[ScanPath | ArrayLike]]
F = TypeVar("F", bound=ScanFunction)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = re.compile(r"v\d+|(zz)?video_.*|from_model|none|null")


class UnknownScanError(KeyError, ValueError):
    """A scan name, or scan string, that nothing answers to; the message lists near matches."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class _Entry:
    function: ScanFunction
    options: tuple[str, ...]

    @property
    def origin(self) -> str:
        return f"{self.function.__module__}.{getattr(self.function, '__qualname__', repr(self.function))}"


_ENTRIES: dict[tuple[str, int], _Entry] = {}
_BROKEN_PLUGINS: dict[str, str] = {}
_plugins_loaded = False


def register_scan(name: str) -> Callable[[F], F]:
    """Decorator that makes a function a scan order under ``name``.

    The function takes the grid, ``(h, w)`` for images or ``(t, h, w)`` for a joint walk through a
    video, and returns its paths: integer arrays of visiting orders, or ScanPaths. Its required
    positional parameters tell which of the two it is, and one name may have one of each.
    Parameters with a default (``seed``, ``count``) are options that the caller may name.

    Raises:
        ValueError: the name is not lower_case, is reserved for the official scan strings, or is
            taken by another function (the message names both modules).
        TypeError: the function does not take two or three sizes.
    """

    def add(function: F) -> F:
        if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a scan: use lower_case letters, digits and underscores, "
                "and none of the official forms (v1, v2, video_*, zzvideo_*) or 'from_model'"
            )
        dims, options = _read_signature(name, function)
        entry = _Entry(function, options)
        known = _ENTRIES.get((name, dims))
        if known is not None and known.origin != entry.origin:
            sizes = "(h, w)" if dims == 2 else "(t, h, w)"
            raise ValueError(
                f"scan {name!r} over {sizes} is already registered by {known.origin}; "
                f"{entry.origin} must choose another name"
            )
        _ENTRIES[(name, dims)] = entry
        return function

    return add


def _read_signature(name: str, function: ScanFunction) -> tuple[int, tuple[str, ...]]:
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    sizes = [p for p in parameters if p.default is p.empty and p.kind in positional]
    options = tuple(p.name for p in parameters if p.default is not p.empty)
    if len(sizes) not in (2, 3) or len(sizes) + len(options) != len(parameters):
        raise TypeError(
            f"scan {name!r}: the function must take (h, w) or (t, h, w), and options with defaults; "
            f"{getattr(function, '__name__', function)!r} takes {inspect.signature(function)}"
        )
    return len(sizes), options


@dataclass(frozen=True)
class Scan:
    """A registered scan order; call it with a grid to get its paths."""

    name: str

    @property
    def dims(self) -> tuple[int, ...]:
        """(2,), (3,) or (2, 3): the number of sizes it can be called with."""
        return tuple(dims for dims in (2, 3) if (self.name, dims) in _ENTRIES)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options, over all of its forms."""
        return tuple(dict.fromkeys(o for dims in self.dims for o in _ENTRIES[(self.name, dims)].options))

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        doc = inspect.getdoc(_ENTRIES[(self.name, self.dims[0])].function) or ""
        return doc.partition("\n")[0]

    def __call__(self, *sizes: int, **options: Any) -> tuple[ScanPath, ...]:
        """The paths over an (h, w) or a (t, h, w) grid; cached, and immutable.

        Raises:
            ValueError: a size is below 1, or there is no form for that many sizes.
            TypeError: a size is not an integer, or an option is unknown.
        """
        grid = check_grid(sizes)
        entry = _ENTRIES.get((self.name, len(grid)))
        if entry is None:
            raise ValueError(self._no_form(len(grid)))
        unknown = sorted(set(options) - set(entry.options))
        if unknown:
            allowed = ", ".join(entry.options) or "none"
            raise TypeError(f"scan {self.name!r} has no option {', '.join(unknown)}; it has: {allowed}")
        return _build(entry, self.name, grid, tuple(sorted(options.items())))

    def over(self, t: int, h: int, w: int, **options: Any) -> tuple[ScanPath, ...]:
        """The paths over t frames: the (h, w) form for a single frame, the joint one for more."""
        if t == 1 and 2 in self.dims:
            return self(h, w, **options)
        return self(t, h, w, **options)

    def _no_form(self, dims: int) -> str:
        others = ", ".join(list_scans(dims=dims))
        if dims == 3:
            return (
                f"scan {self.name!r} has no joint (t, h, w) form; these have: {others}. "
                "A factorized schedule such as 'video_sst' takes any (h, w) scan"
            )
        if dims == 2:
            return f"scan {self.name!r} has only a joint (t, h, w) form; these take (h, w): {others}"
        return f"a scan takes (h, w) or (t, h, w), got {dims} sizes"


def get_scan(name: str) -> Scan:
    """The scan registered as ``name``, plug-ins included.

    Raises:
        UnknownScanError: nothing has that name; near matches and broken plug-ins are listed.
    """
    if not _is_registered(name):
        _load_plugins()
    if not _is_registered(name):
        raise unknown_scan(f"unknown scan {name!r}.", name, list_scans())
    return Scan(name)


def list_scans(dims: int | None = None) -> list[str]:
    """Sorted names of all registered scans, or of those with a form for ``dims`` (2 or 3) sizes."""
    _load_plugins()
    return sorted({name for name, form in _ENTRIES if dims is None or form == dims})


def unknown_scan(
    problem: str, given: object, allowed: list[str], kind: str = "Registered"
) -> UnknownScanError:
    """The error for ``given``: the problem, near matches among ``allowed``, all of them, broken plug-ins."""
    close = difflib.get_close_matches(str(given), allowed, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    broken = "".join(
        f" Plug-in {name!r} could not be loaded: {why}." for name, why in _BROKEN_PLUGINS.items()
    )
    own = " A scan of a file of your own needs plugins=[FILE.py] on the command line."
    return UnknownScanError(f"{problem}{hint} {kind}: {', '.join(allowed)}.{broken}{own}")


def check_grid(sizes: Iterable[int]) -> tuple[int, ...]:
    """The sizes as plain positive ints.

    Raises:
        TypeError: one is not an integer.
        ValueError: one is below 1.
    """
    grid = []
    for size in sizes:
        if isinstance(size, bool):
            raise TypeError(f"grid sizes are integers, got {size!r}")
        try:
            grid.append(operator.index(size))
        except TypeError:
            raise TypeError(f"grid sizes are integers, got {size!r}") from None
    if any(size < 1 for size in grid):
        raise ValueError(f"grid sizes must be at least 1, got {tuple(grid)}")
    return tuple(grid)


def _is_registered(name: str) -> bool:
    return (name, 2) in _ENTRIES or (name, 3) in _ENTRIES


@functools.lru_cache(maxsize=32)
def _build(entry: _Entry, name: str, grid: tuple[int, ...], options: tuple) -> tuple[ScanPath, ...]:
    paths = []
    for index, item in enumerate(entry.function(*grid, **dict(options))):
        order, label = (item.order, item.name) if isinstance(item, ScanPath) else (item, "")
        try:
            paths.append(ScanPath(order, name=label or f"{name}[{index}]", shape=grid))
        except (TypeError, ValueError) as error:
            raise type(error)(f"scan {name!r} ({entry.origin}) over {grid}: {error}") from error
    if not paths:
        raise ValueError(f"scan {name!r} ({entry.origin}) over {grid} returned no path")
    return tuple(paths)


@contextmanager
def undone_on_error() -> Iterator[None]:
    """Take back what is registered inside where it raises."""
    before = dict(_ENTRIES)
    try:
        yield
    except BaseException:
        _ENTRIES.clear()
        _ENTRIES.update(before)
        raise


def _load_plugins() -> None:
    """Import every entry point of the group once; a broken one is reported and leaves nothing behind."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        try:
            with undone_on_error():
                point.load()
        except Exception as error:
            _BROKEN_PLUGINS[point.name] = f"{type(error).__name__}: {error}"
            logger.warning(
                "scan plug-in %r (%s) could not be loaded and is left out: %s: %s",
                point.name,
                point.value,
                type(error).__name__,
                error,
            )
