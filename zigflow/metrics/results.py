"""results.json: numbers that never travel without the way they were obtained."""

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zigflow import __version__
from zigflow.files import replacing

__all__ = ["FORMAT_VERSION", "PROTOCOL_KEYS", "library_versions", "read_results", "write_results"]

FORMAT_VERSION = 1

# What others need to reproduce a number. A key that does not apply is written as null, never left out.
PROTOCOL_KEYS = (
    "n",
    "ids_sha256",
    "sampler",
    "steps",
    "guidance",
    "precision",
    "codec_scale",
    "weights_sha256",
    "reference",
    "versions",
    "command",
)


def library_versions() -> dict[str, str]:
    """Versions of what computes: zigflow, Python, torch, numpy."""
    return {
        "zigflow": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def write_results(path: str | Path, metrics: Mapping[str, Any], protocol: Mapping[str, Any]) -> Path:
    """Write ``{"format_version", "metrics", "protocol"}``, keys sorted, in whole or not at all.

    Args:
        path: the file; its folder is made when absent.
        metrics: nested mappings and lists of finite numbers, booleans and strings, by metric.
        protocol: the same, with None allowed; holds at least :data:`PROTOCOL_KEYS`.

    Returns:
        ``path``.

    Raises:
        ValueError: an entry of the protocol is missing, ``metrics`` is empty, a number is not finite; the
            message names it.
        TypeError: a value that JSON does not know.
    """
    path = Path(path)
    missing = [key for key in PROTOCOL_KEYS if key not in protocol]
    if missing:
        raise ValueError(
            f"results without their protocol are not written; missing: {', '.join(missing)} "
            "(give None where one does not apply)"
        )
    if not metrics:
        raise ValueError("there is no metric to write")
    document = {
        "format_version": FORMAT_VERSION,
        "metrics": _plain(metrics, "metrics"),
        "protocol": _plain(protocol, "protocol"),
    }
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    return path


def read_results(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, protocol) of a file that :func:`write_results` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results file, or one of a newer format.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no results file: {error}") from None
    parts = ("metrics", "protocol")
    if not isinstance(document, dict) or not all(isinstance(document.get(part), dict) for part in parts):
        raise ValueError(f"{path} is no results file: it needs the objects 'metrics' and 'protocol'")
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {document.get('format_version')!r}; this zigflow reads {FORMAT_VERSION}"
        )
    return document["metrics"], document["protocol"]


def _plain(value: Any, where: str) -> Any:
    """Numbers of numpy and torch as Python's, mappings as dicts, paths as strings."""
    if isinstance(value, torch.Tensor | np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise TypeError(f"{where}: keys must be strings, got {bad[0]!r}")
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; results hold finite numbers only")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where}: {type(value).__name__} cannot be written as JSON")
