"""Whose a folder of results is: what was computed in one run is never given for another's."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zigflow import files
from zigflow.errors import ZigflowError

from .scan_order import changed_scan

__all__ = ["IDENTITY", "MEASURED", "SamplingFolderError", "claim_folder"]

log = logging.getLogger(__name__)

IDENTITY = "sampling.json"
MEASURED = "measuring.json"
# Facts that folders of 0.1 do not state; what they do state is compared.
_SINCE = ("scan",)


class SamplingFolderError(ZigflowError, RuntimeError):
    """The folder belongs to another sampling run, or its samples cannot be PNG files."""


def claim_folder(folder: Path, name: str, identity: Mapping[str, Any], started: bool) -> None:
    """Write who a folder belongs to, or refuse one that another run has ``started`` to fill.

    Raises:
        SamplingFolderError: the folder holds results of another identity; what differs is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for other in {IDENTITY, MEASURED} - {name}:
        if (folder / other).is_file():
            raise SamplingFolderError(
                f"{folder} holds {other} of a run of another kind; give another folder, sample_dir=PATH"
            )
    file = folder / name
    wanted = json.loads(json.dumps(identity))
    if started:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        unknown = [key for key in _SINCE if key in wanted and key not in found] if found else []
        if unknown:
            log.info("%s does not say its %s: it is compared by the rest", file, ", ".join(unknown))
        different = sorted(
            k for k in set(found) | set(wanted) if k not in unknown and found.get(k) != wanted.get(k)
        )
        if different:
            detail = "; ".join(_difference(k, found.get(k), wanted.get(k)) for k in different[:4])
            raise SamplingFolderError(
                f"{folder} holds samples of another run ({detail}); give another folder, "
                "sample_dir=PATH, or remove its files"
            )
    files.replace_json(file, wanted)


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "scan" and before and now:
        return changed_scan(before, now)
    return f"{key}: there {before!r}, now {now!r}"
