"""``python -m zigflow.tools plot-scans``: draw scan orders into an image file."""

import argparse
import sys
from collections.abc import Sequence

from scans.plot import plot_scans


def main(argv: Sequence[str]) -> int:
    """Parse ``argv``, write the picture and print its path; 2 when a name or a size is refused."""
    parser = argparse.ArgumentParser(prog="python -m zigflow.tools plot-scans", description=__doc__)
    parser.add_argument(
        "--scan",
        action="append",
        metavar="NAME",
        help="a registered scan or a scan string (hilbert, spiral:4, zigzagN8); repeatable; default: a gallery",
    )
    parser.add_argument("--height", type=int, default=8, help="tokens down (default 8)")
    parser.add_argument("--width", type=int, default=8, help="tokens across (default 8)")
    parser.add_argument("--frames", type=int, help="draw the joint walk through this many frames")
    parser.add_argument("--output", default="scans.png", help="file to write (default scans.png)")
    options = parser.parse_args(argv)
    try:
        written = plot_scans(options.scan, options.height, options.width, options.output, options.frames)
    except (ValueError, ImportError) as error:
        print(f"plot-scans: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0
