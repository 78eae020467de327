"""Moments of latents, with labels or without, as U-ViT and DiM extract them: one numbered file per image."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.data.decode import DecodeError, Limits, decode_npy, npy_header
from zigflow.data.feature_files import (
    FEATURE_LIMITS,
    check_complete,
    fingerprint,
    numbers_of,
    read_bytes,
    spread,
    to_moments,
)
from zigflow.data.npz import read_npz
from zigflow.data.object_arrays import decode_objects
from zigflow.data.source import image_shape

_NUMBER = r"(0|[1-9]\d{0,9})"
_SUFFIXES = (".npy", ".npy.npz")


class LatentFeaturesSource:
    """Files ``{i}.npy`` or ``{i}.npy.npz``, i = 0, 1, 2, ..., each the moments (2 C, h, w) of one image's latent.

    Three kinds are read: a pickled pair (moments, label), U-ViT's ImageNet features; an archive of ``z`` (the moments)
    and ``label``, DiM's; plain moments, without a label. The pair is read without unpickling anything
    (``zigflow.data.object_arrays``). The published extraction writes each batch of images and then the same mirrored,
    so the number of files is twice that of the images.

    Args:
        root: the folder of the files.
        num_classes: number of labels; 0 or less leaves labels unread.
        limits: budgets of one file.

    Raises:
        NotADirectoryError: ``root`` is no folder.
        ValueError: it holds no such files, both kinds of names, or a number is missing.
        DecodeError: the first file is damaged, hostile or of another kind; it is named.
    """

    def __init__(self, root: str | Path, num_classes: int = 0, *, limits: Limits = FEATURE_LIMITS):
        self.root, self.limits = Path(root), limits
        self.num_classes = max(num_classes, 0)
        kinds = [suffix for suffix in _SUFFIXES if (self.root / f"0{suffix}").is_file()]
        if len(kinds) == 2 or (not kinds and self.root.is_dir()):
            what = "0.npy as well as 0.npy.npz" if kinds else "neither 0.npy nor 0.npy.npz"
            raise ValueError(f"{self.root} holds {what}: the features are numbered files of one kind")
        self.suffix = kinds[0] if kinds else _SUFFIXES[0]
        numbers = numbers_of(self.root, _NUMBER + re.escape(self.suffix))[:, 0]
        self.count = check_complete(numbers, self.root, "{}" + self.suffix)
        self.shard_sizes = (self.count,)
        self.shape: tuple[int, ...] | None = None
        self.first = self[0]
        self.shape = tuple(self.first["moments"].shape)
        self.image_shape = image_shape(self.first)
        self.fingerprint = fingerprint(
            map(self.path, spread(self.count)), self.count, self.shape, self.num_classes > 0
        )

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.root / f"{index}{self.suffix}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read file ``index``.

        Raises:
            IndexError: there is none.
            DecodeError: the file, which is named, is damaged, hostile, over budget, or unlike the first one.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"no features {index} among {self.count}")
        path = self.path(index)
        try:
            moments, label = self._read(path)
            sample: dict[str, Any] = {"key": str(index), "moments": to_moments(moments, self.shape)}
            if self.num_classes:
                sample["labels"] = self._label(label)
        except DecodeError as error:
            raise DecodeError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        return sample

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
        if self.suffix == ".npy.npz":
            arrays = read_npz(path, ("z", "label") if self.num_classes else ("z",), self.limits)
            return arrays["z"], arrays.get("label")
        data = read_bytes(path, self.limits)
        if npy_header(data)[-1] != np.dtype(object):
            return decode_npy(data, self.limits), None
        items = decode_objects(data, self.limits)
        if len(items) != 2 or isinstance(items[0], str) or isinstance(items[1], str):
            raise DecodeError(f"a pair of moments and label is needed, there are {len(items)} objects")
        return items[0], items[1]

    def _label(self, label: np.ndarray | None) -> int:
        if label is None:
            raise DecodeError("there is no label: give num_classes=0 to do without")
        if label.size != 1 or label.dtype.kind not in "iu":
            raise DecodeError(f"a label is one integer, this is {label.dtype} {label.shape}")
        number = int(label.reshape(-1)[0])
        if not 0 <= number < self.num_classes:
            raise DecodeError(f"label {number} is outside 0..{self.num_classes - 1}")
        return number


def example(folder: Path) -> LatentFeaturesSource:
    """A tiny instance, for the test of the batch contract."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.arange(6 * 8 * 2 * 2, dtype=np.float32).reshape(6, 8, 2, 2) / 96
    for index, moments in enumerate(values):
        np.savez(folder / f"{index}.npy", z=moments, label=np.int64(index % 3))
    return LatentFeaturesSource(folder, 3)
