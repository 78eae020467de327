"""Images that were generated earlier: numbered PNG files, or an npz archive in the layout of ADM's evaluator."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["StoredImages"]


class StoredImages:
    """Images in rounds, as a judge takes them.

    A folder's PNG files are read in the order of their names; a file name that is a number is the sample's id (all or
    none). ``sampling.json``, which our sampling writes, says how labels follow from ids. An archive holds ``arr_0``,
    uint8 (N, H, W, C), and perhaps ``arr_1``, integer labels (N,).

    Args:
        path: the folder or the ``.npz`` file.
        batch_size: images of a round.

    Raises:
        FileNotFoundError: there is nothing, or a folder without PNG files.
        ValueError: an archive of another layout, or one that holds Python objects.
    """

    def __init__(self, path: Path | str, batch_size: int = 100):
        self.path, self.batch_size = Path(path), batch_size
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
        self._files = sorted(self.path.glob("*.png"))
        numbered = [file for file in self._files if file.stem.isdecimal()]
        # Our folders hold a grid of the samples beside them.
        self._files = numbered or self._files
        if not self._files:
            raise FileNotFoundError(f"{self.path} holds no PNG files")
        ids = [int(file.stem) for file in numbered] or list(range(len(self._files)))
        self.ids = torch.tensor(ids, dtype=torch.int64)
        facts = self.path / "sampling.json"
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

    def _read(self, file: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(file) as image:
                if image.mode not in ("L", "RGB"):
                    image = image.convert("RGB")
                array = np.array(image)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file} is no image: {error}") from error
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if getattr(self, "_shape", tensor.shape) != tensor.shape:
            raise ValueError(
                f"{file} is {tuple(tensor.shape)}, the images before it are {tuple(self._shape)}"
            )
        return tensor
