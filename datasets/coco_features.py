"""MS-COCO as U-ViT extracts it: moments of latents and CLIP features of every caption, one file each."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zigflow.data.decode import DecodeError, Limits, decode_npy
from zigflow.data.feature_files import (
    FEATURE_LIMITS,
    check_complete,
    fingerprint,
    numbers_of,
    read_bytes,
    spread,
    to_moments,
    to_tokens,
)
from zigflow.data.source import image_shape
from zigflow.registry import unknown_name

_NUMBER = r"(0|[1-9]\d{0,9})"
SPLITS = ("train", "val")
EMPTY = "empty_context.npy"


class CocoFeaturesSource:
    """``{split}/{i}.npy``, the moments (2 C, h, w) of image i, and ``{split}/{i}_{k}.npy``, its caption k as (L, D).

    The published sets have 82,783 (train) and 40,504 (val) images of 256 x 256, moments (8, 32, 32), five captions or
    more each, features (77, 768); any number is read here. Beside the splits lies ``empty_context.npy``, the
    features of the empty text.

    Args:
        root: the folder that holds the splits.
        split: "train" or "val".
        empty_context: False does without that file.
        limits: budgets of one file.

    Attributes:
        empty_context: (L, D) float32, or None.

    Raises:
        NotADirectoryError: the folder of the split is missing.
        FileNotFoundError: there is no ``empty_context.npy``.
        ValueError: an unknown split; a number is missing; an image has no captions, or captions no image.
        DecodeError: the first files, or the empty context, are damaged or of another shape; the file is named.
    """

    num_classes = 0

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        empty_context: bool = True,
        limits: Limits = FEATURE_LIMITS,
    ):
        if split not in SPLITS:
            raise unknown_name("split of the COCO features", split, list(SPLITS))
        self.root, self.split, self.limits = Path(root), split, limits
        self.folder = self.root / split
        images = numbers_of(self.folder, _NUMBER + r"\.npy")[:, 0]
        self.count = check_complete(images, self.folder, "{}.npy")
        self.captions = self._count_captions(numbers_of(self.folder, _NUMBER + "_" + _NUMBER + r"\.npy"))
        self.shard_sizes = (self.count,)
        self.empty_context = self._read_empty() if empty_context else None
        self.token_shape = None if self.empty_context is None else tuple(self.empty_context.shape)
        self.shape: tuple[int, ...] | None = None
        self.first = self[0]
        self.shape, self.token_shape = (
            tuple(self.first["moments"].shape),
            tuple(self.first["tokens"].shape[1:]),
        )
        self.image_shape = image_shape(self.first)
        paths = [self.folder / f"{i}{end}.npy" for i in spread(self.count) for end in ("", "_0")]
        self.fingerprint = fingerprint(paths, self.count, self.captions.tobytes())

    def _count_captions(self, pairs: np.ndarray) -> np.ndarray:
        """(N,) captions of each image, which are 0, 1, 2, ... without a gap."""
        if len(pairs) and pairs[-1, 0] >= self.count:
            image, caption = pairs[pairs[:, 0] >= self.count][0]
            raise ValueError(f"{self.folder} has the caption {image}_{caption}.npy, but no {image}.npy")
        counts = np.bincount(pairs[:, 0], minlength=self.count)
        if not counts.all():
            first = int(np.flatnonzero(counts == 0)[0])
            raise ValueError(
                f"{self.folder} has no captions of {first}.npy ({first}_0.npy, ...), and of "
                f"{int((counts == 0).sum()) - 1} images more"
            )
        # Sorted by image and caption: within an image the captions count up from 0.
        wanted = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
        gaps = np.flatnonzero(pairs[:, 1] != wanted)
        if len(gaps):
            raise ValueError(f"{self.folder} has no {pairs[gaps[0], 0]}_{wanted[gaps[0]]}.npy")
        return counts.astype(np.int64)

    def _read_empty(self) -> torch.Tensor:
        path = self.root / EMPTY
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, the features of the empty text: U-ViT's extract_empty_feature.py writes it; "
                "give empty_context=false to do without"
            )
        return to_tokens(self._read(path))

    def _read(self, path: Path) -> np.ndarray:
        try:
            return decode_npy(read_bytes(path, self.limits), self.limits)
        except DecodeError as error:
            raise DecodeError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read image ``index`` and all its captions.

        Raises:
            IndexError: there is none.
            DecodeError: a file, which is named, is damaged, over budget, or of another shape than the first one's.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"no image {index} among {self.count}")
        path = self.folder / f"{index}.npy"
        try:
            moments, tokens = to_moments(self._read(path), self.shape), []
            for caption in range(self.captions[index]):
                path = self.folder / f"{index}_{caption}.npy"
                tokens.append(to_tokens(self._read(path), self.token_shape))
                self.token_shape = self.token_shape or tuple(tokens[0].shape)
        except DecodeError as error:
            raise DecodeError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        return {"key": f"{self.split}/{index}", "moments": moments, "tokens": torch.stack(tokens)}


def example(folder: Path) -> CocoFeaturesSource:
    """A tiny instance, for the test of the batch contract."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    values = np.arange(4 * 8 * 2 * 2, dtype=np.float32).reshape(4, 8, 2, 2) / 96
    for index, moments in enumerate(values):
        np.save(folder / "train" / f"{index}.npy", moments)
        for caption in range(2):
            np.save(folder / "train" / f"{index}_{caption}.npy", np.full((3, 5), index + caption, np.float32))
    np.save(folder / EMPTY, np.zeros((3, 5), np.float32))
    return CocoFeaturesSource(folder)
