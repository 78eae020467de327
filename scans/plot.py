"""Pictures of scan orders. matplotlib is imported when one is drawn."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from scans.metrics import continuity, visited_cells
from scans.path import ScanPath
from scans.registry import check_grid, get_scan, list_scans
from scans.spec import parse_scan_type

MOST_PATHS = 8
JOINT_FRAMES = 4  # of scans that walk through videos only, when no number is given
COLORS = ("#2a1a6e", "#6a2c9c", "#c13b82", "#f2705a", "#fdb64b")  # from the first token to the last
_INK, _QUIET, _CELL = "#1d1b26", "#8b8894", "#f1f0f4"
_MARGIN, _HEADING, _ROW_GAP = 0.22, 0.36, 0.2  # inches
_DEPTH = (0.46, 0.34)  # how far a frame is set off to the right and upwards, in cells


@dataclass(frozen=True)
class _Group:
    """Panels of one scan, side by side under one heading."""

    title: str
    note: str
    paths: tuple[ScanPath, ...]


@dataclass(frozen=True)
class _Sheet:
    """Measures of the whole picture, in inches; ``grid`` is (t, h, w)."""

    grid: tuple[int, ...]
    columns: int
    panel: float
    gap: float

    @property
    def is_joint(self) -> bool:
        return self.grid[0] > 1

    @property
    def cells(self) -> tuple[float, float]:
        """Width and height of a panel in cells."""
        t, h, w = self.grid
        return w + (t - 1) * _DEPTH[0], h + (t - 1) * _DEPTH[1]

    @property
    def panel_height(self) -> float:
        wide, high = self.cells
        return self.panel * min(max(high / wide, 0.2), 2.5)


def plot_scans(
    names: Sequence[str] | None,
    height: int,
    width: int,
    output: str | Path,
    frames: int | None = None,
) -> Path:
    """Draw scan orders as lines colored by the time of visit, and write them to an image file.

    Every path is a panel, at most eight for each name. A ring marks its start, a square its end; steps
    between cells that do not touch are thin. The same call writes the same bytes.

    Args:
        names: scan names or strings such as "hilbert:4" or "zigzagN8"; None for two paths of every registered scan.
        height, width: the grid, in tokens.
        output: file to write; its suffix gives the format (png, pdf, svg).
        frames: draw the joint walk through that many frames, later frames behind. By default one; four when
            all names are scans that walk through videos only.

    Returns:
        The path of the file.

    Raises:
        UnknownScanError: a name is unknown.
        ValueError: a size is below 1, the list is empty, or a scan has no joint form for ``frames``.
        ImportError: matplotlib is missing.
    """
    grid = chosen_grid(names, height, width, frames)
    most = MOST_PATHS if names is not None else 2
    groups = [_group(name, grid, most) for name in (gallery(joint=grid[0] > 1) if names is None else names)]
    if not groups:
        raise ValueError("no scan to draw: give at least one name, or None for the gallery")
    joint = grid[0] > 1
    sheet = _Sheet(grid, columns=4 if joint else 8, panel=2.4 if joint else 1.25, gap=0.3 if joint else 0.16)
    lines = _pack(groups, sheet.columns)
    across = max(sum(len(group.paths) for group in line) for line in lines)
    down = _HEADING + sheet.panel_height
    size = (
        2 * _MARGIN + across * sheet.panel + (across - 1) * sheet.gap,
        2 * _MARGIN + len(lines) * down + (len(lines) - 1) * _ROW_GAP,
    )
    output = Path(output)
    # The user's own matplotlib settings must not change the picture.
    with _matplotlib("style").context("default"):
        figure = _matplotlib("figure").Figure(figsize=size, dpi=120, facecolor="white")
        canvas = _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
        for number, line in enumerate(lines):
            top = size[1] - _MARGIN - number * (down + _ROW_GAP)
            left = _MARGIN
            for group in line:
                _draw_group(figure, group, sheet, left, top)
                left += len(group.paths) * (sheet.panel + sheet.gap)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix.lower() == ".png":
            _save_png(canvas, output)
        else:
            figure.savefig(output, metadata=_undated(output.suffix))
    return output


def _save_png(canvas: Any, output: Path) -> None:
    """The picture in 128 colors: a quarter of the bytes, and no difference to be seen."""
    # Matplotlib needs Pillow itself.
    image = importlib.import_module("PIL.Image")
    canvas.draw()
    picture = image.fromarray(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    picture.quantize(128, dither=image.Dither.NONE).save(output, optimize=True)


def gallery(joint: bool) -> list[str]:
    """Registered scans of images, or of videos, without those whose paths another one all has (sweep2, sweep4)."""
    names = list_scans(dims=3 if joint else 2)
    grid = (3, 9, 10) if joint else (1, 18, 20)
    paths = {name: set(paths_of(name, grid)) for name in names}

    def is_shown(place: int, name: str) -> bool:
        return not any(
            paths[name] < paths[other] or (paths[name] == paths[other] and names.index(other) < place)
            for other in names
        )

    return [name for place, name in enumerate(names) if is_shown(place, name)]


def chosen_grid(
    names: Sequence[str] | None, height: int, width: int, frames: int | None
) -> tuple[int, int, int]:
    """(t, h, w) of a picture: without ``frames`` one, or `JOINT_FRAMES` when all names need a video.

    Raises:
        UnknownScanError: a name is unknown.
        ValueError: a size is below 1.
    """
    if frames is None:
        scans = [get_scan(parse_scan_type(name).scan) for name in names or ()]
        frames = JOINT_FRAMES if scans and all(2 not in scan.dims for scan in scans) else 1
    t, h, w = check_grid((frames, height, width))
    return t, h, w


def paths_of(name: str, grid: tuple[int, ...]) -> tuple[ScanPath, ...]:
    """The paths of a scan string over (t, h, w)."""
    t, h, w = grid
    return parse_scan_type(name).paths(t, h, w)


def shown_paths(name: str, grid: tuple[int, ...]) -> list[tuple[str, ScanPath]]:
    """At most eight paths of a scan string, each with the scan's name."""
    return [(name.partition(":")[0], path) for path in paths_of(name, grid)[:MOST_PATHS]]


def _matplotlib(part: str) -> ModuleType:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError("drawing scan orders needs matplotlib: pip install matplotlib") from error


def _undated(suffix: str) -> dict[str, Any]:
    """Metadata without dates and versions, so that equal pictures are equal files."""
    return {
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        ".svg": {"Date": None, "Creator": None},
    }.get(suffix.lower(), {})


def _group(name: str, grid: tuple[int, ...], most: int) -> _Group:
    paths = paths_of(name, grid)
    shown = paths[:most]
    count = f"{len(paths)} path{'s' * (len(paths) > 1)}"
    if len(shown) < len(paths):
        count = f"{len(shown)} of {count}"
    return _Group(name.partition(":")[0], f"{count}, {_steps_note(paths)}", shown)


def _steps_note(paths: Sequence[ScanPath]) -> str:
    share = float(np.mean([continuity(path) for path in paths]))
    if share == 1.0:
        return "unit steps"
    touching = all(touching_steps(visited_cells(path)).all() for path in paths)
    return "touching steps" if touching else f"{share:.0%} unit steps"


def touching_steps(cells: np.ndarray) -> np.ndarray:
    """(L - 1,) which steps of the (L, dims) cells go to one of the neighbors, diagonal ones included."""
    return np.abs(np.diff(cells, axis=0)).max(axis=1, initial=0) <= 1


def _pack(groups: Sequence[_Group], columns: int) -> list[list[_Group]]:
    """Lines of at most ``columns`` panels, in the order given; a longer group goes on in the next line."""
    lines: list[list[_Group]] = []
    free = 0
    for group in groups:
        for first in range(0, len(group.paths), columns):
            part = _Group(group.title, group.note, group.paths[first : first + columns])
            if len(part.paths) > free:
                lines.append([])
                free = columns
            lines[-1].append(part if first == 0 else _Group("", "", part.paths))
            free -= len(part.paths)
    return lines


def _draw_group(figure: Any, group: _Group, sheet: _Sheet, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    baseline = (top - 0.2) / height
    room = len(group.paths) * (sheet.panel + sheet.gap) - sheet.gap
    title = figure.text(left / width, baseline, group.title, color=_INK, fontsize=12, fontweight="bold")
    after = title.get_window_extent().x1 / figure.dpi + 0.09
    note = figure.text(after / width, baseline, group.note, color=_QUIET, fontsize=8.5)
    if note.get_window_extent().x1 / figure.dpi > left + room:
        note.remove()
    for index, path in enumerate(group.paths):
        x = left + index * (sheet.panel + sheet.gap)
        y = top - _HEADING - sheet.panel_height
        axes = figure.add_axes((x / width, y / height, sheet.panel / width, sheet.panel_height / height))
        axes.axis("off")
        wide, high = sheet.cells
        axes.set_xlim(-0.5, wide - 0.5)
        axes.set_ylim(sheet.grid[1] - 0.5, sheet.grid[1] - 0.5 - high)
        axes.set_aspect("equal")
        _draw_cells(axes, sheet)
        _draw_path(axes, path, sheet)


def _project(cells: np.ndarray) -> np.ndarray:
    """(n, 2) points of (n, 3) cells (t, h, w): later frames further right and up."""
    frame, row, column = cells.T
    return np.stack([column + _DEPTH[0] * frame, row - _DEPTH[1] * frame], axis=1)


def _draw_cells(axes: Any, sheet: _Sheet) -> None:
    collections, patches = _matplotlib("collections"), _matplotlib("patches")
    t, h, w = sheet.grid
    if sheet.is_joint:
        corners = np.array(
            [
                [f, r, c]
                for f in (0, t - 1)
                for r, c in ((0, 0), (0, w - 1), (h - 1, w - 1), (h - 1, 0), (0, 0))
            ]
        )
        near, far = np.split(_project(corners), 2)
        edges = [near, far, *np.stack([near, far], axis=1)]
        axes.add_collection(collections.LineCollection(edges, colors="#d9d7df", linewidths=0.7, zorder=0))
        return
    inset = 0.05 if max(h, w) <= 32 else 0.0
    side = 1 - 2 * inset
    corner = inset - 0.5
    tiles = [patches.Rectangle((c + corner, r + corner), side, side) for r in range(h) for c in range(w)]
    axes.add_collection(collections.PatchCollection(tiles, facecolor=_CELL, edgecolor="none", zorder=0))


def _draw_path(axes: Any, path: ScanPath, sheet: _Sheet) -> None:
    collections, colormaps = _matplotlib("collections"), _matplotlib("colors").LinearSegmentedColormap
    cells = visited_cells(path, sheet.grid)
    points = _project(cells)
    colors = colormaps.from_list("time", COLORS)(np.linspace(0, 1, max(len(path), 2)))
    cell = 72 * min(sheet.panel / sheet.cells[0], sheet.panel_height / sheet.cells[1])  # points per cell
    bold = float(np.clip((0.16 if sheet.is_joint else 0.3) * cell, 0.5, 3.6))
    segments = np.stack([points[:-1], points[1:]], axis=1)
    touching = touching_steps(cells)
    depth = cells[:-1, 0] + cells[1:, 0]
    for level in np.unique(depth)[::-1]:
        for near in (False, True):
            chosen = (depth == level) & (touching == near)
            if not chosen.any():
                continue
            if sheet.is_joint:
                # White edges, short of the joints, tell a near line from the far ones that it crosses.
                middle = segments[chosen].mean(axis=1, keepdims=True)
                edges = list(middle + 0.7 * (segments[chosen] - middle))
                axes.add_collection(
                    collections.LineCollection(edges, colors="white", linewidths=2.2 * bold, zorder=2)
                )
            axes.add_collection(
                collections.LineCollection(
                    list(segments[chosen]),
                    colors=colors[:-1][chosen],
                    linewidths=bold if near else max(0.28 * bold, 0.4),
                    alpha=1.0 if near else 0.5,
                    capstyle="round",
                    zorder=2,
                )
            )
    mark = float(np.clip((0.34 if sheet.is_joint else 0.52) * cell, 2.0, 8.0))
    ring = max(0.34 * bold, 0.8)
    axes.plot(
        *points[0], "o", markersize=mark, color="white", mec=colors[0], mew=ring, zorder=4, clip_on=False
    )
    if len(path) > 1:
        axes.plot(
            *points[-1],
            "s",
            markersize=0.84 * mark,
            color=colors[-1],
            mec="white",
            mew=0.5,
            zorder=4,
            clip_on=False,
        )
