"""The directory of one run: its layout, its identity, its one writer."""

import json
import logging
import secrets
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zigflow import files

from . import checkpoint
from .lock import Lock, RunDirError

__all__ = ["RunDir", "RunDirError", "check_same_config"]

log = logging.getLogger(__name__)

MODEL_SECTIONS = ("model", "scan", "codec", "process")

# Keys that checkpoints of 0.1 do not have, with what 0.1 did.
_LATER_KEYS = {
    "zigflow.codec.AutoencoderKLCodec": {
        "shift": 0.0,
        "latents_mean": None,
        "latents_std": None,
        "own_scale": None,
    }
}
# How an old value is kept by name.
_KEPT_BY = {"codec.scale": "codec.scale={before} codec.own_scale=true continues with the checkpoint's. "}
# What says how a key is to be read, and not what the weights belong to.
_SAYS_NOTHING = ("codec.own_scale",)


class RunDir:
    """One run's files; used by the main process alone as a context manager that holds the lock.

    Layout: ``run.json`` (id, creation time), ``lock``, ``checkpoints/``, ``metrics.jsonl``, ``exit/`` (how each
    process left).

    Args:
        path: created with its parents when missing.
        resume: ``auto`` continues what is there; ``never`` refuses a directory that holds a run.

    Raises:
        RunDirError: on entering: another process writes there (its pid is named), or the directory is in use
            and ``resume`` is ``never``.
    """

    def __init__(self, path: Path | str, *, resume: str = "auto"):
        self.path = Path(path)
        self.resume = resume
        self._lock: Lock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def run_id(self) -> str:
        return self._identity()["run_id"]

    def __enter__(self) -> "RunDir":
        with files.operation("mkdir", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.path)
        try:
            if self.resume == "never" and self.in_use():
                raise RunDirError(
                    f"{self.path} holds a run already and resume=never; choose another run_dir, or resume=auto"
                )
            files.make_dir(self.checkpoints)
            checkpoint.clean(self.checkpoints)
            self._identity()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def in_use(self) -> bool:
        """Whether a run has left anything here that it could continue from or would overwrite."""
        return bool(checkpoint.list_complete(self.checkpoints)) or self.metrics.exists()

    def latest(self, *, verify: bool = True) -> checkpoint.Checkpoint | None:
        """The newest complete checkpoint, its contents compared with its seal unless told otherwise.

        Raises:
            checkpoint.CheckpointError: its files differ from the seal. An older one is not taken in silence:
                remove the damaged directory to continue from the one before.
        """
        found = checkpoint.find_latest(self.checkpoints)
        if found is not None and verify:
            checkpoint.verify(found.path)
        return found

    def _identity(self) -> dict[str, Any]:
        file = self.path / "run.json"
        if not file.exists():
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            files.replace_json(
                file, {"run_id": secrets.token_hex(4), "created": created, "format_version": 1}
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {**found, "run_id": str(found["run_id"])}
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirError(f"{file} is damaged ({error!r}): remove it, a new one is written") from error


def check_same_config(
    given: Mapping[str, Any],
    stored: Mapping[str, Any],
    sections: Collection[str] = MODEL_SECTIONS,
    refusal: str = "the run cannot continue with another model",
    remedy: str = "Drop the override, or choose another run_dir",
) -> None:
    """Compare the configuration of a run that resumes with the one in its checkpoint.

    Differences inside ``sections`` (what the weights belong to) are errors, others are logged. ``refusal`` and
    ``remedy`` begin and end the error.

    Raises:
        RunDirError: naming every contradicting key with both values.
    """
    old, new = (
        flat({key: with_later_keys(key, value) for key, value in config.items()})
        for config in (stored, given)
    )
    contradictions, kept = [], ""
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key, "(absent)"), new.get(key, "(absent)")
        if before == now or key in _SAYS_NOTHING:
            continue
        if key.split(".")[0] in sections:
            contradictions.append(f"{key}: the checkpoint has {before!r}, the command says {now!r}")
            kept += _KEPT_BY.get(key, "").format(before=before)
        else:
            log.info("%s was %r in the checkpoint and is %r now", key, before, now)
    if contradictions:
        raise RunDirError(f"{refusal}: {'; '.join(contradictions)}. {kept}{remedy}")


def with_later_keys(section: str, node: Any) -> Any:
    """A section of a checkpoint's configuration with the keys that have come since, at what stood in their place."""
    if section != "codec" or not isinstance(node, Mapping):
        return dict(node) if isinstance(node, Mapping) else node
    later = _LATER_KEYS.get(str(node.get("_target_")), {})
    # Statistics take the place of a shift.
    return {**(later if not node.get("latents_mean") else {**later, "shift": None}), **node}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys; tuples become lists, as JSON has them."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{name}.")
        else:
            leaves[name] = list(value) if isinstance(value, tuple) else value
    return leaves
