"""Tracking by TensorBoard: event files in the run directory's ``tensorboard/``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zigflow.data.picture import read_image
from zigflow.errors import needs

from .trackers import TrackedRun, register_tracker

__all__ = ["TensorBoardTracker", "import_writer"]


def import_writer() -> Any:
    """torch's ``SummaryWriter``.

    Raises:
        MissingPackageError: TensorBoard is missing; the extra to install is named.
    """
    with needs("tensorboard", "loop.tensorboard=true", extra="track"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


@register_tracker("tensorboard", check=import_writer)
class TensorBoardTracker:
    """Writes events; what a run that is continued had written past its checkpoint is hidden."""

    def __init__(self, run: TrackedRun):
        # TensorBoard drops the events of steps from purge_step on that were written before, those of a run that was cut
        # before its first checkpoint included.
        self._writer = import_writer()(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, path: Path, step: int) -> None:
        pixels = read_image(path)[1]
        self._writer.add_image(name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")
        self._writer.flush()

    def state(self) -> dict[str, Any]:
        return {}

    def finish(self) -> None:
        self._writer.close()
