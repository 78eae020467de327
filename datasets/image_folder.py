"""Images in a folder, one sub-folder per class."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from zigflow.data.class_names import folder_order
from zigflow.data.contents import folder_contents, keyed_sample
from zigflow.data.decode import DEFAULT_LIMITS, DecodeError, Limits, to_pixels
from zigflow.data.picture import WHITE, Background, background_color, image_size_of, read_image
from zigflow.data.picture_files import KNOWN, LeftOut, find_images, scan_folder
from zigflow.data.sizes import DECODED, EnlargedOnce, check_sizes, common_channels, enlarging
from zigflow.registry import unknown_name

log = logging.getLogger(__name__)

CLASS_ORDERS: dict[str, Callable[[list[str]], list[str]]] = {"numbers": folder_order, "text": sorted}
_FORMATS = {"jpeg": "jpg", "tif": "tiff"}
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "heldout"))


class ImageFolderSource:
    """Images as a viewer shows them, center-cropped and resized; labels follow the names of the sub-folders.

    Names that all are whole numbers are sorted by value, others as text (``zigflow.data.class_names.folder_order``).
    A folder whose images lie in it directly has no classes. For large sets make shards: they are read faster.

    Args:
        root: the folder.
        image_size: pixels of both sides, or (height, width).
        channels: 1 or 3; None: 1 if all of up to 32 images, drawn from all, are grey, else 3.
        enlarge: smaller images than ``image_size`` are made larger instead of refused.
        class_order: "numbers", or "text" to sort numbers as text, too.
        limits: budgets of one file.
        background: what shows through transparent images: a grey level, or red, green and blue, 0 to 255.
        max_skipped: how many images may be unreadable before the first readable one.

    Attributes:
        first: the first readable sample.
        left_out: what lies in the folder and is not read, in words; empty where everything is.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: it holds no images, both images and sub-folders with images, or a class without any; images are
            smaller than ``image_size``.
    """

    # What release 0.1 did where a key did not exist yet.
    before_0_2: ClassVar[Mapping[str, Any]] = {"enlarge": True, "class_order": "text"}

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int] | None,
        *,
        channels: int | None = 3,
        enlarge: bool = False,
        class_order: str = "numbers",
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
        max_skipped: int = 0,
    ):
        if image_size is None:
            raise ValueError(
                "images of a folder are read in one size, and none is given: set data.image_size=N or [HEIGHT,WIDTH]"
            )
        if class_order not in CLASS_ORDERS:
            raise unknown_name("class_order", class_order, list(CLASS_ORDERS))
        self.root, self.enlarge = Path(root), enlarge
        self.background = background_color(background)
        self.files, labels, self.class_names, self.left_out = list_images(self.root, class_order)
        self.labels = labels if self.class_names else None
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size, self.limits, self.max_skipped = (int(height), int(width)), limits, max_skipped
        self.channels = self._channels() if channels is None else channels
        self.image_shape = (self.channels, *self.image_size)
        self.num_classes = len(self.class_names)
        self.shard_sizes = (len(self.files),)
        shown = "" if self.background == WHITE else f" {self.background}"
        self.contents = folder_contents(self.root, self.files, self.image_shape, shown)
        self.fingerprint = self.contents.fingerprint
        self._enlarged = EnlargedOnce()
        if not enlarge:
            check_sizes(len(self), self._size_at, self.image_size)

    @property
    def first(self) -> dict[str, Any]:
        for index in range(min(self.max_skipped, len(self) - 1)):
            with suppress(DecodeError):
                return self[index]
        return self[min(self.max_skipped, len(self) - 1)]

    def _channels(self) -> int:
        """Of the images that are looked at."""
        kinds = []
        for index in keyed_sample(len(self), DECODED):
            with suppress(DecodeError):  # Told where it is read, if it is.
                image = read_image(self.root / self.files[index], self.limits, self.background)[1]
                kinds.append(1 if image.ndim == 2 else 3)
        return common_channels(kinds, self.root) or 3

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
        image = read_image(self.root / path, self.limits, self.background)[1]
        if not self.enlarge:
            self._enlarged.tell(str(self.root / path), enlarging(image.shape[:2], self.image_size))
        sample: dict[str, Any] = {
            "key": path.as_posix(),
            "pixels": to_pixels(image, self.channels, self.image_size),
        }
        if self.labels is not None:
            sample["labels"] = self.labels[index]
        return sample


class ImageList(NamedTuple):
    """Image paths relative to a folder, their labels, the names of the classes, and what was left out, in words."""

    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...]
    left_out: str


def list_images(root: Path, class_order: str = "numbers") -> ImageList:
    """The images of a folder, class after class, sorted; what is left out is logged in one line.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: no images, images beside sub-folders with images, a sub-folder without any beside others, or parts
            of a set (train, val) where classes are looked for.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder")
    left = LeftOut()
    flat, folders = scan_folder(root, root, left)
    files: list[Path] = []
    labels: list[int] = []
    classes: list[str] = []
    empty: list[tuple[Path, LeftOut]] = []
    named = {folder.name: folder for folder in folders}
    for name in CLASS_ORDERS[class_order](list(named)):
        folder, inside = named[name], LeftOut()
        found = find_images(root / folder, root, inside)
        left.update(inside)
        if found:
            files += found
            labels += [len(classes)] * len(found)
            classes.append(folder.name)
        else:
            empty.append((folder, inside))
    if flat and classes:
        raise ValueError(
            f"{root} holds images ({flat[0]}) beside folders of images ({classes[0]}): which is it?"
        )
    if not flat and not classes:
        raise ValueError(f"{root} holds no images ({KNOWN}){f'; it holds {left}' if left else ''}")
    if flat:
        for folder, _ in empty:
            left.add("folders without images", folder)
    elif empty:
        more = f" (and {len(empty) - 1} further classes)" if len(empty) > 1 else ""
        raise ValueError(
            f"the class folder {root / empty[0][0]}{more} holds no image ({KNOWN}) but {empty[0][1] or 'nothing'}: "
            "convert what it holds, or move the folder elsewhere"
        )
    deeper = sorted({path.parts[1] for path in files if len(path.parts) > 2})
    if deeper and all(len(path.parts) > 2 for path in files):
        _check_depth(root, classes, deeper)
    _say(root, flat or files, len(classes), left)
    return ImageList(flat or files, [0] * len(flat) if flat else labels, tuple(classes), str(left))


def _check_depth(root: Path, classes: list[str], deeper: list[str]) -> None:
    """Images lie only in folders of class folders: splits of a set are refused, others are said.

    Raises:
        ValueError: what would be read as classes are parts of a set.
    """
    if {name.lower() for name in classes} <= _SPLITS:
        raise ValueError(
            f"{root} holds parts of a set ({', '.join(classes)}), which are no classes; the folders of images lie in "
            f"them ({', '.join(deeper[:3])}): give {root / classes[0]}"
        )
    log.warning(
        "%s: the classes are %s; what their folders hold (%s) is read into them: give a deeper folder if those are "
        "the classes", root, ", ".join(classes[:3]), ", ".join(deeper[:3]),
    )  # fmt: skip


def _say(root: Path, files: list[Path], classes: int, left: LeftOut) -> None:
    """One line on what is read; a warning where something is left out, or where formats mix.

    A class that is stored in another format than the others is told apart by what its compression leaves.
    """
    formats = Counter(_FORMATS.get(name := path.suffix.lower()[1:], name) for path in files)
    log.log(
        logging.WARNING if left or len(formats) > 1 else logging.INFO,
        "%s: %d images%s are read (%s)%s",
        root,
        len(files),
        f" in {classes} classes" if classes else "",
        ", ".join(f"{count} {name}" for name, count in formats.most_common()),
        f"; left out are {left}" if left else "",
    )


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
