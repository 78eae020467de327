"""Pictures to look at: samples by class, and a loss curve.

Legend: N images, C channels, T frames, H height, W width.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from zigflow.errors import needs
from zigflow.metrics.base import check_images, check_labels

__all__ = ["save_frame_grid", "save_loss_curve", "save_sample_grid"]

_VISIBLE_PIXELS = 48
_BACKGROUND = (255, 255, 255)
_EMPTY = (232, 232, 232)
_INK = (40, 40, 40)


def save_sample_grid(
    path: str | Path,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    columns: int = 10,
    scale: int | None = None,
    margin: int = 4,
) -> Path:
    """Write a PNG with one row per class, the class number at its left.

    A row shows the first ``columns`` images of its class in the order given; places that stay empty are gray.

    Args:
        path: the file; its folder is made when absent.
        images: uint8 (N, C, H, W), C 1 or 3.
        labels: int (N,).
        columns: most images in a row.
        scale: whole factor of enlargement (nearest neighbor); by default what brings 48 pixels a side.
        margin: pixels between images.

    Returns:
        ``path``.

    Raises:
        ValueError: shape, dtype, channels, or a number out of range.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = Path(path)
    images = check_images("images", images).cpu()
    labels = check_labels("labels", labels, len(images))
    if not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"a grid needs gray (C = 1) or RGB (C = 3) images, got {tuple(images.shape)}")
    height, width = images.shape[2:]
    scale = max(1, math.ceil(_VISIBLE_PIXELS / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1 or margin < 0:
        raise ValueError(
            f"columns and scale must be at least 1, margin at least 0; got {columns}, {scale}, {margin}"
        )
    classes = labels.unique().tolist()
    columns = min(columns, int(labels.bincount().max()))
    height, width = height * scale, width * scale

    font = ImageFont.load_default(size=max(10, min(28, height // 2)))
    boxes = {label: font.getbbox(str(label)) for label in classes}
    gutter = math.ceil(max(box[2] for box in boxes.values())) + 3 * margin
    size = (gutter + columns * (width + margin), margin + len(classes) * (height + margin))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(classes):
        top = margin + row * (height + margin)
        middle = (gutter - margin // 2) // 2, top + height // 2
        draw.text(middle, str(label), fill=_INK, font=font, anchor="mm")
        shown = images[labels == label][:columns]
        for column in range(columns):
            left = gutter + column * (width + margin)
            if column >= len(shown):
                draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_EMPTY)
                continue
            pixels = shown[column].permute(1, 2, 0).expand(-1, -1, 3)
            pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels.numpy())), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG", optimize=True)
    return path


def save_frame_grid(path: str | Path, strip: np.ndarray, frames: int, margin: int = 2) -> Path:
    """Write a PNG of a video's frames in reading order, in rows that make the picture about square.

    Args:
        path: the file; its folder is made when absent.
        strip: uint8 (C, H, T*W), the frames side by side, C 1 or 3.
        frames: T.
        margin: pixels between frames.

    Returns:
        ``path``.

    Raises:
        ValueError: shape or channels, or a width that is no multiple of ``frames``.
    """
    from PIL import Image

    path = Path(path)
    if strip.ndim != 3 or strip.shape[0] not in (1, 3) or frames < 1 or strip.shape[2] % frames:
        raise ValueError(f"expected (C, H, {frames} * W) with C 1 or 3, got {tuple(strip.shape)}")
    height, width = strip.shape[1], strip.shape[2] // frames
    columns = min(frames, max(1, round(math.sqrt(frames * height / width))))
    rows = -(-frames // columns)
    size = (columns * (width + margin) - margin, rows * (height + margin) - margin)
    canvas = Image.new("RGB", size, _BACKGROUND)
    pixels = np.broadcast_to(strip, (3, *strip.shape[1:])).transpose(1, 2, 0)
    for frame in range(frames):
        row, column = divmod(frame, columns)
        part = np.ascontiguousarray(pixels[:, frame * width : (frame + 1) * width])
        canvas.paste(Image.fromarray(part), (column * (width + margin), row * (height + margin)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
    return path


def save_loss_curve(
    path: str | Path,
    history: Sequence[tuple[int, int, float]],
    half_life: float | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG of the loss over steps: raw, and smoothed in the logarithm.

    Args:
        path: the file; its folder is made when absent.
        history: rows (step, images_seen, loss), steps increasing; losses positive.
        half_life: of the smoothing's weights, in steps; by default an eightieth of the run.
        title: a line above the picture.

    Returns:
        ``path``.

    Raises:
        ValueError: no rows, steps that do not increase, a loss that is not positive and finite.
        MissingPackageError: matplotlib is missing.
    """
    with needs("matplotlib", "a loss curve"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    path = Path(path)
    steps, seen, losses = _check_history(history)
    span = max((steps[-1] - steps[0]) / 80, 1e-9) if half_life is None else half_life
    if not span > 0:
        raise ValueError(f"half_life must be positive, got {half_life}")

    # No pyplot: its global state would belong to whoever imported it first.
    figure = Figure(figsize=(8.0, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, marker=marker, label="loss")
    smooth = _smooth_log(steps, losses, span)
    axes.plot(steps, smooth, color="#12406f", linewidth=1.8, marker=marker, label="smoothed in the logarithm")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(True, which="both", alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    _set_ticks(axes)
    if len(steps) > 1 and (np.diff(seen) > 0).all():
        _images_axis(axes, steps, seen)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _check_history(history: Sequence[tuple[int, int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not len(history):
        raise ValueError("there is no loss to draw")
    table = np.asarray(history, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 3:
        raise ValueError(f"history must hold rows (step, images_seen, loss), got shape {table.shape}")
    steps, seen, losses = table.T
    if not (np.diff(steps) > 0).all():
        raise ValueError("the steps of a history must increase; drop what was run twice")
    bad = np.flatnonzero(~(np.isfinite(losses) & (losses > 0)))
    if len(bad):
        raise ValueError(f"the loss at step {steps[bad[0]]:.0f} is {losses[bad[0]]}, not positive and finite")
    return steps, seen, losses


def _smooth_log(steps: np.ndarray, losses: np.ndarray, half_life: float) -> np.ndarray:
    """Weighted mean of log(loss) around every step, weights halved per ``half_life`` steps away on both sides."""
    logs = np.log(losses)
    total, weight = _decayed_sums(steps, logs, half_life)
    total_after, weight_after = _decayed_sums(-steps[::-1], logs[::-1], half_life)
    # The step itself is in both sums.
    return np.exp((total + total_after[::-1] - logs) / (weight + weight_after[::-1] - 1.0))


def _decayed_sums(steps: np.ndarray, values: np.ndarray, half_life: float) -> tuple[np.ndarray, np.ndarray]:
    totals, weights = np.empty_like(values), np.empty_like(values)
    total = weight = 0.0
    previous = steps[0]
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        kept = 0.5 ** ((step - previous) / half_life)
        total, weight, previous = kept * total + value, kept * weight + 1.0, step
        totals[i], weights[i] = total, weight
    return totals, weights


def _set_ticks(axes) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # A training loss seldom spans decades: with the default a curve from 0.9 to 0.3 has no labeled tick at all.
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")


def _images_axis(axes, steps: np.ndarray, seen: np.ndarray) -> None:
    """A second scale above: images seen, interpolated, and continued at the mean rate beyond the data."""
    rate = (seen[-1] - seen[0]) / (steps[-1] - steps[0])

    def convert(x, source, target, slope):
        x = np.asarray(x, dtype=np.float64)
        inside = np.interp(x, source, target)
        return inside + slope * (np.minimum(x - source[0], 0) + np.maximum(x - source[-1], 0))

    above = axes.secondary_xaxis(
        "top",
        functions=(lambda x: convert(x, steps, seen, rate), lambda x: convert(x, seen, steps, 1 / rate)),
    )
    above.set_xlabel("images seen")
