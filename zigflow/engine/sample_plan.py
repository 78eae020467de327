"""Which samples to draw and what each is conditioned on: numbers, classes, caption features.

Everything about a sample follows from its number: noise, class, caption. A sample is therefore the same in a run
over all numbers and in one over a few of them.

Legend: B batch, N rows of a file, K captions of a row, L tokens, D token width.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zigflow.data.contents import exact_fingerprint
from zigflow.data.decode import DEFAULT_LIMITS, DecodeError, decode
from zigflow.data.feature_files import (
    FEATURE_LIMITS,
    check_complete,
    fingerprint,
    numbers_of,
    read_bytes,
    to_tokens,
)
from zigflow.data.object_arrays import decode_objects
from zigflow.data.shards import ShardReader
from zigflow.files import file_digest
from zigflow.keyed import KeyedDraws
from zigflow.sample_options import SampleOptions
from zigflow.typed import SettingsError

__all__ = ["CaptionRows", "SampleOptions", "SourceRows", "class_plan", "open_captions", "text_plan"]

Plan = Callable[[Tensor], Tensor]
_CAPTION_SUFFIX = "caption_feature.npy"


def class_plan(options: SampleOptions, num_classes: int, source: Any, seed: int) -> Plan | None:
    """The class of each sample: a function of sample numbers (B,), None for a model without classes.

    Args:
        source: where ``labels=data`` counts classes; sample i takes the class of a data sample drawn by
            (seed, i). Else not used.

    Raises:
        SettingsError: classes that the model does not have, or no labels to count.
    """
    chosen = options.labels
    if num_classes < 1:
        if chosen != "balanced":
            raise SettingsError(f"labels={chosen} needs a model of classes, this one has none: drop labels=")
        return None
    if chosen == "balanced":
        return lambda ids: ids % num_classes
    if chosen == "data":
        if source is None or "labels" not in source[0]:
            raise SettingsError(
                "labels=data needs data with labels: choose another data=NAME, or labels=balanced"
            )
        return _DataClasses(source, num_classes, seed)
    outside = [label for label in chosen if not isinstance(label, int) or not 0 <= label < num_classes]
    if outside:
        raise SettingsError(f"labels has {outside[0]}, the model's classes are 0..{num_classes - 1}")
    table = torch.tensor(chosen)
    if options.seeds is None:
        return lambda ids: table[ids % len(table)]
    # In turn over the samples that were asked for, whatever their numbers are.
    places = {number: place for place, number in enumerate(options.seeds)}
    return lambda ids: table[torch.tensor([places[i] for i in ids.tolist()]) % len(table)]


class _DataClasses:
    """Classes of data samples picked by keyed draws; each is read once."""

    def __init__(self, source: Any, num_classes: int, seed: int):
        self._source, self._num_classes, self._seed = source, num_classes, seed
        self._known: dict[int, int] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        picked = KeyedDraws(self._seed, ids).integers("sample.label", len(self._source)).tolist()
        for index in picked:
            if index not in self._known:
                label = int(self._source[index]["labels"])
                if not 0 <= label < self._num_classes:
                    raise SettingsError(
                        f"labels=data: sample {index} has the class {label}, the model's are 0..{self._num_classes - 1}"
                    )
                self._known[index] = label
        return torch.tensor([self._known[index] for index in picked])


class CaptionRows(Protocol):
    """N rows of caption features; ``fingerprint`` tells them from others."""

    fingerprint: str

    def __len__(self) -> int: ...

    def row(self, index: int) -> Tensor:
        """(L, D) or (K, L, D)."""
        ...


def text_plan(rows: CaptionRows, width: int, name: str) -> Plan:
    """Tokens (B, L, D) of sample numbers: sample i takes row i modulo N, of several captions the (i // N)-th in turn.

    Args:
        width: D of the model.
        name: what the messages call the rows.

    Raises:
        SettingsError: no rows, another width, or rows of different length.
    """
    if not len(rows):
        raise SettingsError(f"{name} has no captions")
    first = rows.row(0)
    if first.ndim not in (2, 3) or first.shape[-1] != width or 0 in first.shape:
        raise SettingsError(
            f"{name} has rows of shape {tuple(first.shape)}, the model reads (tokens, {width}) or (captions, tokens, "
            f"{width}): model.d_context is {width}"
        )

    def tokens_of(ids: Tensor) -> Tensor:
        chosen = []
        for number in ids.tolist():
            row = rows.row(number % len(rows)).float()
            row = row if row.ndim == 2 else row[(number // len(rows)) % len(row)]
            if row.shape != first.shape[-2:] or not bool(row.isfinite().all()):
                raise SettingsError(
                    f"{name}: row {number % len(rows)} has shape {tuple(row.shape)} or is not finite; row 0 has "
                    f"{tuple(first.shape[-2:])}"
                )
            chosen.append(row)
        return torch.stack(chosen)

    return tokens_of


def open_captions(path: str) -> CaptionRows:
    """Caption features of a .npy or .safetensors file, (N, L, D) or (N, K, L, D), or of a folder.

    A folder holds shards, or U-ViT's prompts: ``0.npy``, ``1.npy``, ..., each a pickled pair (text, features (L, D)).

    A safetensors file holds one tensor, or one named ``tokens``. Nothing is unpickled, and rows are read when needed.

    Raises:
        SettingsError: no such file, another kind of file, or another shape.
    """
    file = Path(path)
    try:
        if file.is_dir():
            return _PromptRows(file) if (file / "0.npy").is_file() else _ShardRows(file)
        if file.suffix == ".npy":
            return _NpyRows(file)
        if file.suffix == ".safetensors":
            return _SafetensorRows(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingsError(f"captions={path}: {error}") from error
    raise SettingsError(
        f"captions={path} is neither a .npy file, a .safetensors file nor a folder of shards or prompts"
    )


def _check_rows(shape: tuple[int, ...]) -> None:
    if len(shape) not in (3, 4):
        raise ValueError(f"caption features have shape (N, L, D) or (N, K, L, D), these {shape}")


class _NpyRows:
    def __init__(self, file: Path):
        self._array = np.load(file, mmap_mode="r", allow_pickle=False)
        _check_rows(self._array.shape)
        if self._array.dtype.kind != "f":
            raise ValueError(f"caption features are floating-point numbers, these {self._array.dtype}")
        self.fingerprint = file_digest(file)

    def __len__(self) -> int:
        return len(self._array)

    def row(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._array[index], dtype=np.float32))


class _SafetensorRows:
    def __init__(self, file: Path):
        self._file = safe_open(str(file), framework="pt")
        names = list(self._file.keys())
        if "tokens" not in names and len(names) != 1:
            raise ValueError(
                f"it needs one tensor, or one named 'tokens'; it has {', '.join(names) or 'none'}"
            )
        self._slice = self._file.get_slice("tokens" if "tokens" in names else names[0])
        _check_rows(tuple(self._slice.get_shape()))
        self.fingerprint = file_digest(file)

    def __len__(self) -> int:
        return self._slice.get_shape()[0]

    def row(self, index: int) -> Tensor:
        return self._slice[index : index + 1][0]


class _PromptRows:
    def __init__(self, folder: Path):
        numbers = numbers_of(folder, r"(0|[1-9]\d{0,9})\.npy")[:, 0]
        self._paths = [folder / f"{i}.npy" for i in range(check_complete(numbers, folder, "{}.npy"))]
        self.fingerprint = fingerprint(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def row(self, index: int) -> Tensor:
        path = self._paths[index]
        try:
            items = decode_objects(read_bytes(path), FEATURE_LIMITS)
            if len(items) != 2 or not isinstance(items[0], str) or isinstance(items[1], str):
                raise DecodeError(f"a pair of text and features is needed, there are {len(items)} objects")
            return to_tokens(items[1])
        except DecodeError as error:
            raise DecodeError(f"{path}: {error}") from error


class _ShardRows:
    def __init__(self, folder: Path):
        self._reader = ShardReader(folder)
        self.fingerprint = exact_fingerprint(self._reader)
        suffixes = sorted(entry.suffix for entry in self._reader.sample(0, 0).entries)
        if _CAPTION_SUFFIX not in suffixes:
            raise ValueError(
                f"its samples have no {_CAPTION_SUFFIX}; the first one has {', '.join(suffixes)}"
            )

    def __len__(self) -> int:
        return len(self._reader)

    def row(self, index: int) -> Tensor:
        shard, member = self._reader.split_index(index)
        _, data = self._reader.read(shard, member, {_CAPTION_SUFFIX})
        if _CAPTION_SUFFIX not in data:
            raise self._reader.error(shard, member, _CAPTION_SUFFIX, "missing")
        value = decode(_CAPTION_SUFFIX, data[_CAPTION_SUFFIX], DEFAULT_LIMITS)
        return torch.from_numpy(np.array(value, dtype=np.float32))


class SourceRows:
    """The tokens of a data source as caption rows."""

    def __init__(self, source: Any):
        self._source = source
        self.fingerprint = exact_fingerprint(source)

    def __len__(self) -> int:
        return len(self._source)

    def row(self, index: int) -> Tensor:
        sample: Mapping[str, Any] = self._source[index]
        if "tokens" not in sample:
            raise SettingsError(
                f"a text model needs caption features to sample from, the data has {sorted(sample)}: give "
                "captions=FILE.npy, or name the key in data.source.rename"
            )
        return torch.as_tensor(sample["tokens"])
