"""Samples as one .npz file in the layout of the ADM evaluation suite (Dhariwal and Nichol 2021).

``arr_0`` holds the images, uint8 (N, H, W, 3); ``arr_1`` the classes, int64 (N,), of a class-conditional model.

Legend: N samples, C channels, T frames, H x W pixels.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from zigflow import files

__all__ = ["npz_name", "write_npz"]

# Zip entries carry a date: a fixed one makes equal samples equal files.
_DATE = (1980, 1, 1, 0, 0, 0)


def npz_name(count: int, height: int, width: int) -> str:
    """``samples_{N}x{H}x{W}x3.npz``, the name that ADM gives."""
    return f"samples_{count}x{height}x{width}x3.npz"


def write_npz(
    path: Path, images: Iterable[np.ndarray], count: int, labels: np.ndarray | None, frames: int = 0
) -> Path:
    """Write the file in whole or not at all; one image is in memory at a time.

    Args:
        path: the file, replaced when there.
        images: ``count`` times uint8 (C, H, W), C 1 (repeated) or 3; of a video (C, H, T*W), frames side by side.
        labels: (N,) classes, or None.
        frames: T of videos, whose ``arr_0`` is (N, T, H, W, 3); 0 for images.

    Raises:
        ValueError: another number of images than ``count``, or images of different shapes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # Only appended to: the sizes then follow the data in the zip, which its readers know.
        with (
            files.DurableFile(temporary) as file,
            zipfile.ZipFile(_Forward(file), "w", zipfile.ZIP_STORED) as archive,
        ):
            _write_images(archive, images, count, frames)
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy", _DATE), "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    files.rename(temporary, path)
    return path


def _write_images(archive: zipfile.ZipFile, images: Iterable[np.ndarray], count: int, frames: int) -> None:
    with archive.open(zipfile.ZipInfo("arr_0.npy", _DATE), "w", force_zip64=True) as member:
        shape, written = None, 0
        for image in images:
            array = _last_channels(image, frames)
            if shape is None:
                shape = array.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_2_0(member, header)
            if array.shape != shape or written == count:
                raise ValueError(
                    f"image {written} has shape {array.shape}; expected are {count} images of shape {shape}"
                )
            member.write(np.ascontiguousarray(array).tobytes())
            written += 1
        if written != count:
            raise ValueError(f"{count} images were announced, {written} were given")


def _last_channels(image: np.ndarray, frames: int) -> np.ndarray:
    """(H, W, 3), or (T, H, W, 3)."""
    array = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    if not frames:
        return array
    height, width = array.shape[:2]
    return array.reshape(height, frames, width // frames, 3).transpose(1, 0, 2, 3)


class _Forward:
    """A file that can only be appended to, as zipfile takes it."""

    def __init__(self, file: files.DurableFile):
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits in between."""

    def close(self) -> None:
        """Whoever opened the file closes it."""
