"""Images in a folder, one sub-folder per class."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from zigflow.data.class_names import folder_order
from zigflow.data.decode import DEFAULT_LIMITS, DecodeError, Limits, decode, to_pixels
from zigflow.data.sizes import check_sizes, enlarging, image_size_of
from zigflow.registry import unknown_name

CLASS_ORDERS: dict[str, Callable[[list[str]], list[str]]] = {"numbers": folder_order, "text": sorted}
SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFolderSource:
    """PNG and JPEG files, center-cropped and resized; labels follow the names of the sub-folders.

    Names that all are whole numbers are sorted by value, others as text (``zigflow.data.class_names.folder_order``).
    A folder whose images lie in it directly has no classes. For large sets make shards: they are read faster.

    Args:
        root: the folder.
        image_size: pixels of both sides, or (height, width).
        channels: 1 or 3.
        enlarge: smaller images than ``image_size`` are made larger instead of refused.
        class_order: "numbers", or "text" to sort numbers as text, too.
        limits: budgets of one file.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: it holds no images, or both images and sub-folders with images; images are smaller than
            ``image_size``.
    """

    # What release 0.1 did where a key did not exist yet.
    before_0_2: ClassVar[Mapping[str, Any]] = {"enlarge": True, "class_order": "text"}

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int],
        *,
        channels: int = 3,
        enlarge: bool = False,
        class_order: str = "numbers",
        limits: Limits = DEFAULT_LIMITS,
    ):
        if class_order not in CLASS_ORDERS:
            raise unknown_name("class_order", class_order, list(CLASS_ORDERS))
        self.root, self.enlarge = Path(root), enlarge
        self.files, labels, self.class_names = list_images(self.root, class_order)
        self.labels = labels if self.class_names else None
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size, self.channels, self.limits = (int(height), int(width)), channels, limits
        self.image_shape = (channels, *self.image_size)
        self.num_classes = len(self.class_names)
        self.shard_sizes = (len(self.files),)
        digest = hashlib.sha256(f"{self.image_shape}".encode())
        for path in self.files:
            digest.update(f"\n{path.as_posix()} {(self.root / path).stat().st_size}".encode())
        self.fingerprint = digest.hexdigest()[:32]
        if not enlarge:
            check_sizes(len(self), self._size_at, self.image_size)

    def _size_at(self, index: int) -> tuple[str, tuple[int, int] | None]:
        path = self.root / self.files[index]
        return str(path), image_size_of(path.read_bytes())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read image ``index``.

        Raises:
            IndexError: there is none.
            DecodeError: the file, which is named, is damaged or over budget.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no image {index} among {len(self)}")
        path = self.files[index]
        try:
            image = decode(path.suffix, (self.root / path).read_bytes(), self.limits)
            problem = "" if self.enlarge else enlarging(image.shape[:2], self.image_size)
            if problem:
                raise DecodeError(problem)
        except DecodeError as error:
            raise DecodeError(f"{self.root / path}: {error}") from error
        sample: dict[str, Any] = {
            "key": path.as_posix(),
            "pixels": to_pixels(image, self.channels, self.image_size),
        }
        if self.labels is not None:
            sample["labels"] = self.labels[index]
        return sample


def list_images(root: Path, class_order: str = "numbers") -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Image paths relative to ``root``, class by class, their labels, and the names of the classes.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: no images, or images beside sub-folders with images.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder")
    flat = _images(root, root)
    files: list[Path] = []
    labels: list[int] = []
    classes: list[str] = []
    names = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for name in CLASS_ORDERS[class_order](names):
        folder = root / name
        found = [path for path in sorted(folder.rglob("*")) if _is_image(path)]
        if found:
            files += [path.relative_to(root) for path in found]
            labels += [len(classes)] * len(found)
            classes.append(folder.name)
    if flat and classes:
        raise ValueError(
            f"{root} holds images ({flat[0]}) beside folders of images ({classes[0]}): which is it?"
        )
    if not flat and not classes:
        raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)})")
    return (flat, [0] * len(flat), ()) if flat else (files, labels, tuple(classes))


def _images(folder: Path, root: Path) -> list[Path]:
    return [path.relative_to(root) for path in sorted(folder.iterdir()) if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def example(folder: Path) -> ImageFolderSource:
    """A tiny instance, for the test of the batch contract."""
    import numpy as np

    from zigflow.data.writer import encode_png

    for index in range(4):
        target = folder / ("cat", "dog")[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        image = np.full((9, 12 + index, 3), 60 * index, dtype=np.uint8)
        (target / f"{index}.png").write_bytes(encode_png(image))
    return ImageFolderSource(folder, 8)
