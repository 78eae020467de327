"""Checkpoints that a crash at any moment cannot break: a directory, sealed, then renamed.

``checkpoints/step-0001234/`` holds safetensors and JSON files only. It is written as
``.incomplete-step-0001234``: every file is synced, then ``SEAL.json`` with the size and SHA-256 of every file,
then the directory gets its name. So a directory that has its name is complete, and what is incomplete is never
looked at and is removed: at once when a save fails, at the next start when it was cut. Old checkpoints lose their
name first and their files after.

=========================  ==========================================================================
model.safetensors          the model's state dict
ema_<profile>.safetensors  averages by parameter name
optimizer.safetensors      ``<state>/<parameter>``
paths.safetensors          scan orders, when the model has a ``scan_state()``
rank_0000.safetensors      torch's generator states of that process
rank_0000.json             what else belongs to one process
trainer.json               counters, data position, scaler, scheduler, best, run id, versions, plug-ins
config.json                the resolved configuration
SEAL.json                  format version, step, sizes and digests
=========================  ==========================================================================
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from zigflow import files
from zigflow.errors import OtherRankError, ZigflowError

from .ranks import Ranks
from .tensors import load_tensors, save_tensors

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointError",
    "check_names",
    "clean",
    "find_latest",
    "list_complete",
    "open_checkpoint",
    "prune",
    "save",
    "verify",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
SEAL = "SEAL.json"
_INCOMPLETE, _DELETED = ".incomplete-", ".deleted-"


class CheckpointError(ZigflowError, RuntimeError):
    """A checkpoint that is missing, damaged, of another format, or that does not fit what it is loaded into."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint directory."""

    path: Path

    @property
    def step(self) -> int:
        return _step_of(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    @cached_property
    def trainer(self) -> dict[str, Any]:
        return self.json("trainer.json")

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``<name>.safetensors`` on the CPU.

        Raises:
            CheckpointError: the checkpoint has no such file; those that it has are named.
        """
        if not self.has(f"{name}.safetensors"):
            known = sorted(file.stem for file in self.path.glob("*.safetensors"))
            raise CheckpointError(f"{self.path} has no {name}.safetensors; it has {', '.join(known)}")
        return load_tensors(self.path / f"{name}.safetensors")

    @property
    def ema_names(self) -> list[str]:
        found = self.path.glob("ema_*.safetensors")
        return sorted(file.name.removeprefix("ema_").removesuffix(".safetensors") for file in found)


def check_names(what: str, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of stored tensors with those that they are loaded into.

    Raises:
        CheckpointError: naming the first difference in the model's own sequence (missing, unexpected or of another
            shape) with both shapes.
    """
    names = [*wanted, *(name for name in stored if name not in wanted)]
    different = [name for name in names if _shape(stored, name) != _shape(wanted, name)]
    if not different:
        return
    first = different[0]
    there, here = (
        "missing" if _shape(side, first) is None else str(_shape(side, first)) for side in (stored, wanted)
    )
    more = f" ({len(different) - 1} more differ)" if len(different) > 1 else ""
    raise CheckpointError(
        f"{what} does not fit the model: {first} is {there} there and {here} in the model{more}; "
        "build the model with the arguments that the weights were trained with, or choose another checkpoint"
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _map_digest(sealed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def save(
    directory: Path,
    step: int,
    *,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    ranks: Ranks,
) -> Path:
    """Write one checkpoint; every rank calls this together.

    Args:
        directory: the run's ``checkpoints/``, on a file system that all ranks see; it exists.
        shared: file name -> contents, written by rank 0: a mapping of tensors for ``.safetensors``, a JSON
            value for ``.json``.
        own: the same for the files of this rank.

    Returns:
        The checkpoint's directory. A complete checkpoint of that step which is there already stays.

    Raises:
        OSError: a file could not be written; earlier checkpoints are untouched, what was written is removed.
        ValueError: a file name with another ending.
    """
    target = directory / _name(step)
    with ranks.together("looking for an earlier checkpoint"):
        done = is_complete(target)
    if done:
        log.info("%s is complete already", target)
        return target
    temporary = directory / f"{_INCOMPLETE}{target.name}"
    try:
        _save(temporary, target, step, shared, own, ranks)
    except (OSError, OtherRankError):
        # All ranks have met since, so none writes there any more. A disk that is full must not be kept full.
        if ranks.is_main and temporary.is_dir():
            with suppress(OSError):
                files.remove_tree(temporary)
        raise
    return target


def _save(
    temporary: Path, target: Path, step: int, shared: Mapping[str, Any], own: Mapping[str, Any], ranks: Ranks
) -> None:
    with ranks.together("opening the checkpoint"):
        if ranks.is_main:
            if temporary.exists():
                files.remove_tree(temporary)
            files.make_dir(temporary)
    with ranks.together("writing the checkpoint of a process"):
        seals = {name: _write(temporary / name, contents) for name, contents in own.items()}
    with ranks.together("writing the checkpoint"):
        if ranks.is_main:
            seals |= {name: _write(temporary / name, contents) for name, contents in shared.items()}
            # The other ranks' files: read back, since digests do not travel between processes.
            for path in temporary.iterdir():
                if path.name not in seals:
                    seals[path.name] = {"size": path.stat().st_size, "sha256": files.file_digest(path)}
            files.sync_dir(temporary)
            seal = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "files": seals,
                "digest": _map_digest(seals),
            }
            files.write_json(temporary / SEAL, seal)
            files.sync_dir(temporary)
            if target.exists():
                _discard(target)
            files.rename(temporary, target)


def _write(path: Path, contents: Any) -> dict[str, int | str]:
    if path.suffix == ".safetensors":
        return save_tensors(path, contents)
    if path.suffix == ".json":
        return files.write_json(path, contents)
    raise ValueError(f"a checkpoint holds .safetensors and .json files, not {path.name!r}")


def _read_seal(path: Path) -> dict[str, Any] | None:
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        intact = seal["digest"] == _map_digest(seal["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seal if intact else None


def is_complete(path: Path) -> bool:
    """Whether the directory has its seal and every sealed file its size; contents are not read."""
    seal = _read_seal(path)
    if seal is None:
        return False
    try:
        return all((path / name).stat().st_size == entry["size"] for name, entry in seal["files"].items())
    except OSError:
        return False


def verify(path: Path) -> None:
    """Compare every file with the seal.

    Raises:
        CheckpointError: no valid seal, an unknown format, or a file that is missing, of another size or of
            other contents; the file is named.
    """
    seal = _read_seal(path)
    if seal is None:
        raise CheckpointError(f"{path} has no valid {SEAL}: the save was cut short or the file was changed")
    if seal["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {seal['format_version']}, this zigflow reads up to {FORMAT_VERSION}; "
            "install a newer zigflow"
        )
    for name, entry in seal["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}, which its seal lists")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its seal says {entry['size']}")
        if files.file_digest(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file} is damaged: its contents differ from the seal; use another checkpoint"
            )


def list_complete(directory: Path) -> list[Checkpoint]:
    """The complete checkpoints in a ``checkpoints/`` directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [
        path for path in directory.iterdir() if re.fullmatch(r"step-\d+", path.name) and is_complete(path)
    ]
    return [Checkpoint(path) for path in sorted(found, key=_step_of)]


def find_latest(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run directory (or its ``checkpoints/``), or None."""
    inside = directory / "checkpoints"
    found = list_complete(inside if inside.is_dir() else directory)
    return found[-1] if found else None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The verified checkpoint that ``path`` means: its directory, or the newest of a run directory.

    ``RUN_DIR/best`` means the one whose evaluation during training was the best.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    if path.name == "best" and not path.exists():
        path = _best(path.parent)
    if re.fullmatch(r"step-\d+", path.name):
        if not path.is_dir():
            there = [c.path.name for c in list_complete(path.parent)]
            raise CheckpointError(
                f"there is no {path}; complete checkpoints there: {', '.join(there) or 'none'}"
            )
        found = Checkpoint(path)
    else:
        latest = find_latest(path)
        if latest is None:
            raise CheckpointError(
                f"{path} holds no complete checkpoint; give a run directory or a step-* in it"
            )
        found = latest
    verify(found.path)
    return found


def write_best(run_dir: Path, best: Mapping[str, Any]) -> None:
    """Note the best evaluation of a run, ``{"metric", "value", "step"}``; the main process alone."""
    files.replace_json(run_dir / "best.json", dict(best))


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """The best evaluation of a run, or None.

    Raises:
        CheckpointError: the note is damaged.
    """
    file = run_dir / "best.json"
    if not file.is_file():
        return None
    try:
        best = json.loads(file.read_text(encoding="utf-8"))
        return {"metric": str(best["metric"]), "value": float(best["value"]), "step": int(best["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}): remove it; the next evaluation writes it"
        ) from error


def _best(run_dir: Path) -> Path:
    latest = find_latest(run_dir)
    best = read_best(run_dir)
    if latest is None or best is None:
        raise CheckpointError(
            f"{run_dir} has no best checkpoint: no evaluation was made during training; give {run_dir} for the newest"
        )
    return latest.path.with_name(_name(best["step"]))


def clean(directory: Path) -> None:
    """Remove what saves and deletions that were cut short have left. Only the run's one writer may do it."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.startswith((_INCOMPLETE, _DELETED)) and path.is_dir():
            log.info("removing %s, left by a run that was cut", path)
            files.remove_tree(path)


def prune(directory: Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Delete old checkpoints, never the only good one.

    The newest is read back and compared with its seal first; when it is damaged, nothing is deleted.

    Args:
        keep_last: complete checkpoints that stay, at least 1.
        keep: steps that stay besides.
    """
    found = list_complete(directory)
    surplus = [c for c in found[: -max(keep_last, 1)] if c.step not in keep]
    if not surplus:
        return
    try:
        verify(found[-1].path)
    except CheckpointError:
        log.exception("the newest checkpoint is damaged, so older ones stay")
        return
    for checkpoint in surplus:
        _discard(checkpoint.path)


def _discard(path: Path) -> None:
    # Without its name first: a deletion that is cut short must not leave half a checkpoint under a good name.
    gone = path.with_name(f"{_DELETED}{path.name}")
    if gone.exists():
        files.remove_tree(gone)
    files.rename(path, gone)
    files.remove_tree(gone)
