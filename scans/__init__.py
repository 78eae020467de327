"""Scan orders: the order in which a grid of tokens is read, as data. Needs numpy only.

    from scans import get_scan
    path = get_scan("zigzag")(16, 16)[0]
    y = mixer(x[:, path.order])[:, path.inverse]

A new order is one function under `register_scan`; every test, plot and ``scan=`` override finds it by name.
"""

# First: a scheme may take its decorator from here.
from scans.registry import Scan, UnknownScanError, get_scan, list_scans, register_scan

# isort: split
# Importing a scheme registers it.
from scans import (  # noqa: F401
    diagonal,
    hilbert,
    hilbert_official,
    joint,
    morton,
    random,
    spiral,
    sweep,
    window,
    zigzag,
)
from scans.layout import TokenLayout
from scans.metrics import PathMetrics, path_metrics
from scans.mirrored import ComposedWalk, composed_walk, mirrored_schedule
from scans.path import ScanPath
from scans.schedule import ResolvedStep, ScanSchedule, ScanStep
from scans.spec import ScanSpec, parse_scan_type
from scans.video import factorized_steps

__all__ = [
    "ComposedWalk",
    "PathMetrics",
    "ResolvedStep",
    "Scan",
    "ScanPath",
    "ScanSchedule",
    "ScanSpec",
    "ScanStep",
    "TokenLayout",
    "UnknownScanError",
    "composed_walk",
    "factorized_steps",
    "get_scan",
    "list_scans",
    "mirrored_schedule",
    "parse_scan_type",
    "path_metrics",
    "register_scan",
]
