"""Which real images an evaluation reads, and whether they can be read; asked before any device is touched."""

import inspect

from hydra.utils import get_object

from zigflow.preflight import check_decoding
from zigflow.settings import Settings, SettingsError


def real_sets(settings: Settings) -> tuple[str, ...]:
    """Which of data.source ("train") and data.heldout the metric of a configuration reads.

    Raises:
        SettingsError: one that it needs cannot be read sample by sample, or is not there; one line.
    """
    node = settings.metrics or {}
    if not node.get("_target_"):
        return ()
    try:
        metric = get_object(str(node["_target_"]))
    except Exception as error:
        cause = " ".join(str(error).split())
        raise SettingsError(f"metrics names a class that cannot be imported: {cause}") from error
    name, data = f"metrics ({node['_target_']})", settings.data
    if data.video_frames and not getattr(metric, "reads_videos", False):
        raise SettingsError(
            f"{name} compares images, and data={data.name} holds videos of {data.video_frames} frames, each of which "
            "it would take for one wide image: set metrics=none, or name a metric whose class says reads_videos = True"
        )
    if node.get("reference_stats"):
        return ()  # A published reference needs no data, which may lie elsewhere.
    wanted = metric.real_sets(node) if hasattr(metric, "real_sets") else ("train", "heldout")
    if wanted == ("heldout",) and not data.heldout:
        raise SettingsError(
            f"{name} compares with held-out data, which data={data.name} has none of: give data.heldout, or set "
            "metrics=none"
        )
    if "train" in wanted and data.source and data.order == "streaming":
        keys = inspect.signature(metric).parameters
        ways = [
            f"metrics.{key}={value}"
            for key, value in (("reference", "heldout"), ("reference_stats", "FILE.npz"))
            if key in keys
        ]
        raise SettingsError(
            f"{name} compares with the training set, whose samples data.order=streaming does not number: set "
            f"{', '.join([*ways, 'metrics=none'])}, or download the shards and set data.order=indexed"
        )
    return wanted


def check_evaluation(settings: Settings) -> None:
    """Refuse an evaluation during training whose real images or texts cannot be read."""
    if not settings.data.sample_fid_every:
        return
    try:
        check_decoding(settings)
    except SettingsError:
        return  # There will be none, which is told then.
    real_sets(settings)
    data = settings.data
    if settings.model.get("has_text") and data.order == "streaming" and not data.heldout:
        raise SettingsError(
            f"evaluation samples from the texts of held-out data, which data={data.name} has none of, and "
            "data.order=streaming does not number those of the training set: give data.heldout, or set "
            "data.sample_fid_every=0"
        )
