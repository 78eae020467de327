"""Images that were generated earlier: files of a folder, or an npz archive in the layout of ADM's evaluator."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zigflow.data.picture import WHITE, Background, background_color, read_image
from zigflow.data.picture_files import KNOWN, LeftOut, scan_folder

__all__ = ["StoredImages"]

log = logging.getLogger(__name__)

_FACTS = "sampling.json"
# What our sampling writes beside its images.
_OURS = (_FACTS, "results.json", "grid.png", "videos", "lock")


class StoredImages:
    """Images in rounds, as a judge takes them.

    A folder's images count once each, as a viewer shows them, in the order of their names. Names that are numbers
    are the ids of the samples: all names or none. A ``grid`` that lies beside others is a picture of them and left
    out; that, files of other kinds and sub-folders are logged in one line. ``sampling.json``, which our sampling
    writes, says how labels follow from ids. An archive holds ``arr_0``, uint8 (N, H, W, C), and perhaps ``arr_1``,
    integer labels (N,).

    Args:
        path: the folder or the ``.npz`` file.
        batch_size: images of a round.
        background: what shows through transparent images, as the real set has it.

    Raises:
        FileNotFoundError: there is nothing, or a folder without images.
        ValueError: some names are numbers and others are not, or two are the same number; an archive of another
            layout, or one that holds Python objects.
    """

    def __init__(self, path: Path | str, batch_size: int = 100, background: Background = WHITE):
        self.path, self.batch_size = Path(path), batch_size
        self.background = background_color(background)
        self._files: list[Path] = []
        self._images: np.ndarray | None = None
        self._labels: Tensor | None = None
        if self.path.is_dir():
            self._open_folder()
        elif self.path.suffix == ".npz" and self.path.is_file():
            self._open_archive()
        else:
            raise FileNotFoundError(f"{self.path} is neither a folder nor an npz file")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_rounds(self) -> int:
        return -(-len(self) // self.batch_size)

    def round(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images uint8 (B, C, H, W), ids (B,), labels (B,) or None.

        Raises:
            ValueError: a file is no image, or of another size or mode than the first; the file is named.
        """
        part = slice(number * self.batch_size, (number + 1) * self.batch_size)
        labels = None if self._labels is None else self._labels[part]
        if self._images is not None:
            images = torch.from_numpy(np.ascontiguousarray(self._images[part].transpose(0, 3, 1, 2)))
        else:
            images = torch.stack([self._read(file) for file in self._files[part]])
        return images, self.ids[part], labels

    def _open_folder(self) -> None:
        numbered, ids = self._list_files()
        self.ids = torch.tensor(ids, dtype=torch.int64)
        facts = self.path / _FACTS
        if numbered and facts.is_file():
            made = json.loads(facts.read_text(encoding="utf-8"))
            classes, chosen = made.get("num_classes", 0), made.get("labels")
            if isinstance(chosen, list):
                self._labels = torch.tensor(chosen)[self.ids % len(chosen)]
            elif classes and chosen is None:
                self._labels = self.ids % classes
        self._shape = self._read(self._files[0]).shape

    def _open_archive(self) -> None:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files if name in ("arr_0", "arr_1")}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no archive of plain arrays: {error}") from error
        images = found.get("arr_0")
        if images is None or images.ndim != 4 or images.dtype != np.uint8:
            given = "nothing" if images is None else f"{images.dtype} {images.shape}"
            raise ValueError(f"{self.path}: arr_0 must be uint8 images (N, H, W, C), it is {given}")
        self._images = images
        self.ids = torch.arange(len(images))
        if "arr_1" in found:
            self._labels = torch.from_numpy(found["arr_1"].astype(np.int64))

    def _list_files(self) -> tuple[bool, list[int]]:
        """Set the files; returns whether their names are numbers, and the ids."""
        left = LeftOut()
        ours = _OURS if (self.path / _FACTS).is_file() else ()
        names, folders = scan_folder(self.path, self.path, left, ours)
        for folder in folders:
            left.add("folders", folder)
        grids = [name for name in names if name.stem.lower() == "grid"]
        if len(grids) < len(names):
            names = [name for name in names if name not in grids]
            for name in grids:
                left.add("grids of samples", name)
        if not names:
            raise FileNotFoundError(
                f"{self.path} holds no images ({KNOWN}){f'; it holds {left}' if left else ''}"
            )
        numbered = [name for name in names if name.stem.isdecimal()]
        others = [name for name in names if not name.stem.isdecimal()]
        if numbered and others:
            raise ValueError(
                f"{self.path} holds {len(numbered)} images whose names are numbers (first {numbered[0]}) and "
                f"{len(others)} others (first {others[0]}): move away what is not meant, or give names of one kind"
            )
        ids: dict[int, Path] = {}
        for place, name in enumerate(names):
            number = int(name.stem) if numbered else place
            if number in ids:
                raise ValueError(
                    f"{self.path}: {ids[number]} and {name} are both number {number}: move one away"
                )
            ids[number] = name
        self._files = [self.path / name for name in names]
        if left:
            log.warning("%s: %d images are read; left out are %s", self.path, len(names), left)
        return bool(numbered), list(ids)

    def _read(self, file: Path) -> Tensor:
        array = read_image(file, background=self.background)[1]
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if getattr(self, "_shape", tensor.shape) != tensor.shape:
            raise ValueError(
                f"{file} is {tuple(tensor.shape)} (channels, height, width), the images before it are "
                f"{tuple(self._shape)}: judge images of one kind, or move it away"
                + (
                    ": convert the grey ones to RGB, or all to grey"
                    if tensor.shape[1:] == self._shape[1:]
                    else ""
                )
            )
        return tensor
