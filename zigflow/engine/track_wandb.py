"""Tracking by wandb.

Keys are wandb's own business: it takes them from WANDB_API_KEY or from the file that ``wandb login`` wrote. Ours
never holds one. Without any key the run is tracked offline, to be sent later by ``wandb sync``.
"""

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from zigflow.errors import needs

from .trackers import TrackedRun, register_tracker

__all__ = ["WandbTracker", "choose_mode", "import_wandb"]

log = logging.getLogger(__name__)


def import_wandb() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is missing; the extra to install is named.
    """
    with needs("wandb", "use_wandb=true", extra="track"):
        import wandb
    return wandb


def choose_mode(asked: str | None) -> str:
    """``online``, ``offline`` or ``disabled``: what was asked for, else WANDB_MODE, else whether there is a key."""
    mode = asked or os.environ.get("WANDB_MODE")
    if mode:
        return mode
    if _has_key():
        return "online"
    log.info("wandb has no key (WANDB_API_KEY, wandb login): tracking offline, send it later with wandb sync")
    return "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return file.exists() and netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


STEP = "trainer/step"


class WandbTracker:
    """One run of wandb, with the same id after a resume, so that its charts go on.

    Charts are drawn over ``trainer/step``. wandb's own steps only rise, and what is logged below the last one is
    dropped in silence: a run that was cut behind its last checkpoint would not show the steps that it makes again.

    Args:
        run: our run; a first start takes our run id as wandb's.
        mode: ``online``, ``offline``, ``disabled``, or None to choose.
        name: shown in wandb; by default the run directory's.
    """

    def __init__(
        self,
        run: TrackedRun,
        *,
        entity: str | None = None,
        project: str | None = None,
        mode: str | None = None,
        name: str | None = None,
    ):
        wandb = import_wandb()
        self._wandb = wandb
        self.id = str(run.stored.get("id") or run.run_id)
        chosen = choose_mode(mode)
        self._run = wandb.init(
            id=self.id, resume="allow", entity=entity, project=project, mode=chosen, name=name or run.folder.name,
            dir=str(run.folder), config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )  # fmt: skip
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if run.stored:
            log.info("wandb run %s continues after step %s, %s", self.id, run.stored.get("step"), chosen)
        else:
            log.info("wandb run %s, %s", self.id, chosen)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)), STEP: step})

    def state(self) -> dict[str, Any]:
        return {"id": self.id}

    def finish(self) -> None:
        self._run.finish()


@register_tracker("wandb", check=import_wandb)
def _as_configured(run: TrackedRun) -> WandbTracker:
    """By the group ``wandb`` of the run's configuration."""
    chosen = run.config.get("wandb") or {}
    return WandbTracker(run, **{key: chosen.get(key) for key in ("entity", "project", "mode", "name")})
