"""``python -m zigflow.tools plot-scans``: draw scan orders into an image file or an animation."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scans.animate import animate_scans
from scans.plot import plot_scans
from zigflow.typed_plugins import load_scan


def main(argv: Sequence[str]) -> int:
    """Parse ``argv``, write the pictures and print their paths; 2 when a name or a size is refused."""
    parser = argparse.ArgumentParser(prog="python -m zigflow.tools plot-scans", description=__doc__)
    parser.add_argument(
        "--scan",
        action="append",
        metavar="NAME",
        help="a registered scan, a scan string (hilbert, spiral:4, zigzagN8) or one of a file of your own "
        "(FILE.py:NAME); repeatable; default: a gallery",
    )
    parser.add_argument("--height", type=int, default=16, help="tokens down (default 16)")
    parser.add_argument("--width", type=int, default=16, help="tokens across (default 16)")
    parser.add_argument("--frames", type=int, help="draw the joint walk through this many frames")
    parser.add_argument(
        "--output", help="picture to write (default outputs/scans.png, or none with --animate)"
    )
    parser.add_argument("--animate", metavar="FILE.gif", help="write an animation of the growing paths")
    options = parser.parse_args(argv)
    options.scan = options.scan and [load_scan(name) for name in options.scan]
    drawings: list[tuple[Callable[..., Path], str]] = (
        [(animate_scans, options.animate)] if options.animate else []
    )
    if options.output or not drawings:
        drawings.append((plot_scans, options.output or "outputs/scans.png"))
    for draw, output in drawings:
        try:
            print(draw(options.scan, options.height, options.width, output, options.frames))
        except (ValueError, ImportError) as error:
            print(f"plot-scans: {error}", file=sys.stderr)
            return 2
    return 0
