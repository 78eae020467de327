"""Zigzag (boustrophedon) paths of ZigMa: line after line, turning round at each end (arXiv 2403.13802)."""

from scans.grid import along, corner_views, raster, there_and_back
from scans.path import Order
from scans.registry import register_scan


def snake(rows: int, columns: int) -> Order:
    lines = raster(rows, columns).copy()
    lines[1::2] = lines[1::2, ::-1]
    return lines.ravel()


@register_scan("zigzag")
def zigzag(h: int, w: int) -> list[Order]:
    """Eight snakes: from the corners TL, TR, BL, BR, each by rows, then by columns. Unit steps only."""
    return along(snake, corner_views(h, w))


@register_scan("zigzag")
def joint_zigzag(t: int, h: int, w: int) -> list[Order]:
    """The eight snakes through all frames, each frame walked back from where the last one ended."""
    return there_and_back(zigzag(h, w), t)
