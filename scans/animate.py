"""Animated GIFs of scan orders, growing token by token. Pillow is imported when one is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scans.metrics import visited_cells
from scans.path import ScanPath
from scans.plot import COLORS, chosen_grid, gallery, shown_paths, touching_steps

_SMOOTH = 3  # drawn this many times larger, then scaled down
_PANEL, _GAP, _MARGIN, _HEADING, _ACROSS = 148, 14, 14, 20, 1180  # pixels
_GROUND, _CELL, _INK = (255, 255, 255), (241, 240, 244), (29, 27, 38)
_HOLD = 1500  # milliseconds that the finished walk stays


@dataclass(frozen=True)
class _Panel:
    """One path on the canvas: (L, 2) centers of its cells in order of visit, and what is drawn of each step."""

    title: str
    points: np.ndarray
    near: np.ndarray
    corner: tuple[float, float]


def animate_scans(
    names: Sequence[str] | None,
    height: int,
    width: int,
    output: str | Path,
    frames: int | None = None,
    most_pictures: int = 96,
    seconds: float = 8.0,
) -> Path:
    """Write a GIF in which each path grows from its first token to its last; all panels in step.

    Frames of a video stand side by side. Long walks grow by several tokens a picture, so that there are at
    most ``most_pictures`` of them. The same call writes the same bytes.

    Args:
        names: scan names or strings, as for ``scans.plot.plot_scans``, at most eight paths of each; None for one
            path of every registered scan.
        height, width, frames: the grid, in tokens.
        output: the file; its folder is made when absent.
        most_pictures: bound on the number of pictures.
        seconds: how long the walk takes.

    Returns:
        The path of the file.

    Raises:
        UnknownScanError: a name is unknown.
        ValueError: a size is below 1, the list is empty, a scan has no joint form, or the suffix is not ``.gif``.
        ImportError: Pillow is missing.
    """
    output = Path(output)
    if output.suffix.lower() != ".gif":
        raise ValueError(f"an animation is a GIF: give a file name that ends in .gif, not {output.name!r}")
    if most_pictures < 2 or not seconds > 0:
        raise ValueError(
            f"an animation has at least 2 pictures and lasts: got {most_pictures} pictures, {seconds} seconds"
        )
    grid = chosen_grid(names, height, width, frames)
    names = [f"{name}:1" for name in gallery(joint=grid[0] > 1)] if names is None else names
    paths = [(title, path) for name in names for title, path in shown_paths(name, grid)]
    if not paths:
        raise ValueError("no scan to draw: give at least one name, or None for the gallery")
    image_module = _pillow()
    panels, size, cell = _layout(paths, grid)
    large = (size[0] * _SMOOTH, size[1] * _SMOOTH)
    # Two sheets: jumps lie below every step to a neighbor, whenever they are made.
    below, above = (image_module.Image.new("RGB", large, _GROUND) for _ in range(2))
    covered = image_module.Image.new("1", large)
    draws = [image_module.ImageDraw.Draw(sheet) for sheet in (below, above, covered)]
    _draw_ground(image_module, draws[0], panels, grid, cell)

    length = len(paths[0][1])
    stops = np.unique(np.linspace(1, length, min(length, most_pictures)).round().astype(int))
    colors = _time_colors(length)
    pictures, before = [], 1
    for stop in stops:
        for panel in panels:
            _draw_steps(draws, panel, range(before - 1, stop - 1), colors, cell)
        before = int(stop)
        picture = below.copy()
        picture.paste(above, mask=covered)
        _draw_marks(image_module.ImageDraw.Draw(picture), panels, int(stop), length, colors, cell)
        pictures.append(picture.resize(size, image_module.Image.Resampling.BOX))
    # One palette for all, of the last picture, which holds every color: no flicker, and small differences.
    palette = pictures[-1].quantize(96, method=image_module.Image.Quantize.MEDIANCUT)
    flat = [p.quantize(palette=palette, dither=image_module.Image.Dither.NONE) for p in pictures]
    output.parent.mkdir(parents=True, exist_ok=True)
    # Browsers slow down pictures that are shown for less than 20 ms.
    pace = max(20, round(1000 * seconds / len(flat)))
    flat[0].save(
        output, format="GIF", save_all=True, append_images=flat[1:], loop=0, optimize=True, disposal=1,
        duration=[*[pace] * (len(flat) - 1), pace + _HOLD],
    )  # fmt: skip
    return output


def _pillow() -> Any:
    try:
        import PIL
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ImportError("an animation is written by Pillow: pip install pillow") from error
    return PIL


def _layout(
    paths: Sequence[tuple[str, ScanPath]], grid: tuple[int, ...]
) -> tuple[list[_Panel], tuple[int, int], float]:
    """Panels, the picture's size in pixels, and a cell's side in pixels."""
    t, h, w = grid
    cell = max(2.0, _PANEL / max(h, w) if t == 1 else min(_PANEL / max(h, w), _ACROSS / (t * (w + 1))))
    wide, high = math.ceil(cell * (t * (w + 1) - 1)), math.ceil(cell * h)
    columns = max(1, min(len(paths), (_ACROSS + _GAP) // (wide + _GAP)))
    rows = -(-len(paths) // columns)
    columns = -(-len(paths) // rows)
    panels = []
    for number, (title, path) in enumerate(paths):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (wide + _GAP)
        top = _MARGIN + row * (high + _HEADING + _GAP) + _HEADING
        cells = visited_cells(path, grid)
        points = np.stack(
            [left + cell * (cells[:, 0] * (w + 1) + cells[:, 2] + 0.5), top + cell * (cells[:, 1] + 0.5)],
            axis=1,
        )
        near = touching_steps(cells) & (np.diff(cells[:, 0]) == 0)
        panels.append(_Panel(title, points * _SMOOTH, near, (left, top)))
    size = (
        2 * _MARGIN + columns * wide + (columns - 1) * _GAP,
        2 * _MARGIN + rows * (high + _HEADING) + (rows - 1) * _GAP,
    )
    return panels, size, cell


def _draw_ground(
    module: Any, draw: Any, panels: Sequence[_Panel], grid: tuple[int, ...], cell: float
) -> None:
    t, h, w = grid
    font = module.ImageFont.load_default(size=13 * _SMOOTH)
    inset = 0.05 * cell
    title = None
    for panel in panels:
        left, top = panel.corner
        if panel.title != title:
            title = panel.title
            draw.text((left * _SMOOTH, (top - 6) * _SMOOTH), title, fill=_INK, font=font, anchor="ls")
        for frame, row, column in np.ndindex(t, h, w):
            x, y = left + cell * (frame * (w + 1) + column), top + cell * row
            box = (x + inset, y + inset, x + cell - inset, y + cell - inset)
            draw.rectangle([side * _SMOOTH for side in box], fill=_CELL)


def _time_colors(length: int) -> list[tuple[int, int, int]]:
    """A color for each step, from the first to the last of `COLORS`."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLORS], dtype=float)
    at = np.linspace(0, len(stops) - 1, length)
    mixed = np.stack([np.interp(at, np.arange(len(stops)), stops[:, i]) for i in range(3)], axis=1)
    return [(int(r), int(g), int(b)) for r, g, b in mixed.round()]


def _draw_steps(draws: Sequence, panel: _Panel, steps: range, colors: Sequence, cell: float) -> None:
    below, above, covered = draws
    bold = max(2, round(0.3 * cell * _SMOOTH))
    for step in steps:
        ends = [tuple(panel.points[step]), tuple(panel.points[step + 1])]
        if not panel.near[step]:
            pale = tuple((channel + 255) // 2 for channel in colors[step])
            below.line(ends, fill=pale, width=max(1, bold // 4))
            continue
        for draw, color in ((above, colors[step]), (covered, 1)):
            draw.line(ends, fill=color, width=bold)
            for x, y in ends:
                draw.ellipse((x - bold / 2, y - bold / 2, x + bold / 2, y + bold / 2), fill=color)


def _draw_marks(
    draw: Any, panels: Sequence[_Panel], stop: int, length: int, colors: Sequence, cell: float
) -> None:
    """A ring at the first token, and the token reached: a dot, a square at the end."""
    radius = max(3.0, 0.26 * cell * _SMOOTH)
    for panel in panels:
        x, y = panel.points[0]
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=_GROUND, outline=colors[0], width=max(1, round(radius / 3)))
        x, y = panel.points[stop - 1]
        box = (x - radius, y - radius, x + radius, y + radius)
        shape = draw.rectangle if stop == length else draw.ellipse
        shape(box, fill=colors[stop - 1], outline=_GROUND, width=max(1, round(radius / 4)))
