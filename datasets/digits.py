"""The 1,797 handwritten digits that travel inside scikit-learn: 8 x 8 grey images of 10 classes.

Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998 (its test part).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zigflow.data.shard_index import INDEX_NAME
from zigflow.data.split import stratified_split
from zigflow.data.writer import ShardWriter, encode_png, writing_order
from zigflow.errors import needs
from zigflow.files import publishing_folder
from zigflow.registry import unknown_name

from .shards import ShardSource

SPLITS = ("train", "heldout")
SPLIT_SEED = 0


class DigitsSource(ShardSource):
    """One half of the digits; the shards of both halves are made under ``root`` when they are absent.

    The values 0..16 become 8-bit grey levels, pixels are (1, 8, 8) in [-1, 1]. The halves hold 899 and 898
    images, every class divided evenly. Making them is atomic: processes that start at once end up with one copy.

    Args:
        root: folder of the shards.
        split: "train" or "heldout".
        image_size: resize to this many pixels; None keeps 8.
        enlarge: let ``image_size`` be more than 8.

    Raises:
        ValueError: an unknown split.
        FileExistsError: ``root`` holds something else.
        ShardError: the shards are damaged.
    """

    def __init__(
        self,
        root: str | Path = "data/digits",
        split: str = "train",
        *,
        image_size: int | Sequence[int] | None = None,
        enlarge: bool = False,
    ):
        if split not in SPLITS:
            raise unknown_name("split of the digits", split, list(SPLITS))
        self.split = split
        folder = Path(root)
        if not (folder / SPLITS[-1] / INDEX_NAME).is_file():
            write_digits(folder)
        super().__init__(folder / split, channels=1, image_size=image_size, enlarge=enlarge)


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 grey levels 0..255 and (1797,) labels.

    Raises:
        MissingPackageError: scikit-learn, which has them, is missing.
    """
    with needs("scikit-learn", "data=digits"):
        from sklearn.datasets import load_digits as load

    values, labels = load(return_X_y=True)
    levels = np.floor(np.asarray(values, dtype=np.float64) * 255 / 16 + 0.5).astype(np.uint8)
    return levels.reshape(-1, 8, 8), np.asarray(labels, dtype=np.int64)


def write_digits(
    root: Path, fraction: float = 0.5, samples_per_shard: int = 256, order: str = "given"
) -> None:
    """Write ``root``/train and ``root``/heldout.

    Args:
        root: must not exist, or be empty.
        fraction: part of every class that is for training.
        samples_per_shard: size of the shards.
        order: "given", scikit-learn's own, in which classes alternate and which the demo's numbers stand for; or
            "mixed".

    Raises:
        FileExistsError: ``root`` holds something that is no complete set of digits.
        ValueError: one part would be empty.
    """
    images, labels = load_digits()
    parts = stratified_split(labels, fraction, SPLIT_SEED)
    if not all(len(part) for part in parts):
        raise ValueError(f"a fraction of {fraction} leaves one of the parts {SPLITS} empty")
    with publishing_folder(root, f"{SPLITS[-1]}/{INDEX_NAME}") as folder:
        for split, part in zip(SPLITS, parts, strict=True):
            meta = {"name": f"digits/{split}", "num_classes": 10, "class_names": [str(n) for n in range(10)]}
            part, mixing = writing_order(part, order, SPLIT_SEED, split)
            meta |= mixing
            with ShardWriter(folder / split, samples_per_shard, prefix="digits", meta=meta) as writer:
                for index in part:
                    # Stored, not compressed: the bytes (and the fingerprint) then depend on no zlib version.
                    image = encode_png(images[index], compress_level=0)
                    members = {"image.png": image, "cls_id.cls": str(labels[index]).encode()}
                    writer.add(f"digit-{index:04d}", members)


def example(folder: Path) -> DigitsSource:
    """A tiny instance, for the test of the batch contract."""
    return DigitsSource(folder / "digits", "heldout")
