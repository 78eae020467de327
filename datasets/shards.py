"""Samples out of tar shards: images, videos, latents, labels and captions, in the layout of ZigMa and webdataset."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.data.decode import DEFAULT_LIMITS, Limits
from zigflow.data.fields import DEFAULT_RENAME, FIELDS, FieldDecoder
from zigflow.data.picture import WHITE, Background
from zigflow.data.shards import ShardReader
from zigflow.data.streaming import StreamSource
from zigflow.data.tar import BudgetError, ShardError


class ShardSource:
    """A folder of tars, read in place through its index (see ``zigflow.data.shards``).

    Args:
        root: the folder.
        rename: file suffix -> field of the batch (pixels, latents, labels, tokens, captions), or as ZigMa writes it,
            batch key -> file suffix; of several suffixes for one field the first that a sample has is taken. None:
            the usual names, one per field.
        fields: the fields to read; None reads all that the first sample has.
        channels: 1 or 3, for encoded images.
        image_size: pixels of the shorter side after a center crop, or (height, width); None keeps the size.
        num_classes: number of labels; None takes it from the index, 0 where that does not say.
        cache_dir: where the index of a folder that is not ours is kept; None keeps it beside the tars.
        limits: budgets of one member.
        background: what shows through transparent images: a grey level, or red, green and blue, 0 to 255.
        max_skipped: problems of the tars that may be passed over when they are indexed; and how many samples may be
            unreadable before the one that fixes the shapes.
        stream: keywords of ``data.order=streaming``, which this class does not use.

    Raises:
        ValueError: ``rename`` or ``fields`` name unknown fields, or the first sample does not have them.
        ShardError: shards or index are damaged.
    """

    def __init__(
        self,
        root: str | Path,
        rename: Mapping[str, str] | None = None,
        *,
        fields: Sequence[str] | None = None,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        cache_dir: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
        max_skipped: int = 0,
        stream: Mapping[str, Any] | None = None,
    ):
        self.reader = ShardReader(root, cache_dir, max_skipped)
        meta = self.reader.index.meta
        self.class_names = tuple(meta.get("class_names", ()))
        self.num_classes = int(meta.get("num_classes", 0)) if num_classes is None else num_classes
        suffixes = [entry.suffix for entry in self.reader.sample(*self.reader.split_index(0)).entries]
        self.decoder = FieldDecoder(
            suffixes,
            rename,
            fields,
            channels=channels,
            image_size=image_size,
            num_classes=self.num_classes,
            limits=limits,
            background=background,
        )
        self.suffixes, self.limits = self.decoder.suffixes, limits
        self.shard_sizes = self.reader.sizes
        if "labels" not in self.suffixes or self.num_classes < 0:
            self.num_classes = 0
        self.contents = self.reader.contents.each(
            lambda tars: hashlib.sha256(f"{tars} {self.decoder.identity}".encode()).hexdigest()[:32]
        )
        self.fingerprint = self.contents.fingerprint
        self.first = self._first(max_skipped)
        self.image_shape = self.decoder.fix_shapes(self.first)

    @classmethod
    def stream(cls, root: str | Path | Sequence[str], rename=None, **options: Any) -> StreamSource:
        """The same samples in one pass after another instead of by number; what ``data.order=streaming`` builds."""
        options.pop("cache_dir", None)
        return StreamSource(root, rename, **options.pop("stream", None) or {}, **options)

    def _first(self, max_skipped: int) -> dict[str, Any]:
        for index in range(min(max_skipped, len(self) - 1)):
            try:
                return self[index]
            except BudgetError:
                raise
            except ShardError:
                continue
        return self[min(max_skipped, len(self) - 1)]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read sample ``index``.

        Raises:
            IndexError: there is none.
            ShardError: a member is missing, damaged, over budget, or has another shape than the first sample's.
        """
        shard, member = self.reader.split_index(index)

        def read(suffixes: set[str]) -> Mapping[str, bytes]:
            return self.reader.read(shard, member, suffixes, self.limits.max_bytes)[1]

        def error(suffix: str, message: str) -> ShardError:
            return self.reader.error(shard, member, suffix, message)

        return self.decoder(self.reader.sample(shard, member), read, error)


def example(folder: Path) -> ShardSource:
    """A tiny instance, for the test of the batch contract."""
    from zigflow.data.writer import ShardWriter, encode_npy

    values = np.arange(6 * 4 * 2 * 2, dtype=np.float32).reshape(6, 4, 2, 2) / 96
    with ShardWriter(folder, samples_per_shard=4, meta={"num_classes": 3}) as writer:
        for index, latent in enumerate(values):
            members = {"latent.npy": encode_npy(latent), "cls": str(index % 3).encode()}
            writer.add(f"{index:03d}", members)
    return ShardSource(folder)


__all__ = ["DEFAULT_RENAME", "FIELDS", "ShardError", "ShardSource", "example"]
