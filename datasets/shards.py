"""Samples out of tar shards: images, videos, latents, labels and captions, in the layout of ZigMa and webdataset."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zigflow.data.class_names import check_names
from zigflow.data.contents import keyed_sample
from zigflow.data.decode import DEFAULT_LIMITS, Limits
from zigflow.data.fields import DEFAULT_RENAME, FIELDS, FieldDecoder
from zigflow.data.json_fields import label_hint
from zigflow.data.mixing import class_of_key
from zigflow.data.picture import WHITE, Background, image_size_of
from zigflow.data.shards import ShardReader
from zigflow.data.sizes import DECODED, check_sizes, common_channels
from zigflow.data.streaming import StreamSource
from zigflow.data.tar import BudgetError, ShardError


class ShardSource:
    """A folder of tars, read in place through its index (see ``zigflow.data.shards``).

    Args:
        root: the folder.
        rename: file suffix -> field of the batch (pixels, latents, labels, tokens, captions), or as ZigMa writes it,
            batch key -> file suffix; of several suffixes for one field the first that a sample has is taken.
            ``json.label`` is the field ``label`` of the member ``json``. None: the usual names, one per field. One that
            names neither pixels nor latents takes those by their usual names.
        fields: the fields to read; None reads all that the first sample has.
        channels: 1 or 3, for encoded images; None: those of the first one.
        image_size: pixels of the shorter side after a center crop, or (height, width); None keeps the size.
        enlarge: smaller images than ``image_size`` are made larger instead of refused.
        num_classes: number of labels; None takes it from the index, 0 where that does not say.
        class_names: names of the classes by number, of a set whose index has none; labels may be stored as names.
        cache_dir: where the index of a folder that is not ours is kept; None keeps it beside the tars.
        limits: budgets of one member.
        background: what shows through transparent images: a grey level, or red, green and blue, 0 to 255.
        max_skipped: problems of the tars that may be passed over when they are indexed; and how many samples may be
            unreadable before the one that fixes the shapes.
        stream: keywords of ``data.order=streaming``, which this class does not use.

    Attributes:
        class_names: as the index lists them, or as given.
        counted: number of labels as the index says; 0 where it does not.
        stated_classes: number of labels as the index or the names say; 0 for neither.
        ignored: suffixes of the first sample that are not read.

    Raises:
        ValueError: ``rename`` or ``fields`` name unknown fields, or the first sample does not have them; images are
            smaller than ``image_size``.
        ShardError: shards or index are damaged.
    """

    # What release 0.1 did where a key did not exist yet.
    before_0_2: ClassVar[Mapping[str, Any]] = {"enlarge": True}

    def __init__(
        self,
        root: str | Path,
        rename: Mapping[str, str] | None = None,
        *,
        fields: Sequence[str] | None = None,
        channels: int | None = 3,
        image_size: int | Sequence[int] | None = None,
        enlarge: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        cache_dir: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
        max_skipped: int = 0,
        stream: Mapping[str, Any] | None = None,
    ):
        self.reader = ShardReader(root, cache_dir, max_skipped)
        meta = self.reader.index.meta
        own = check_names(meta.get("class_names", ()), str(root))
        self.class_names = own or check_names(class_names or (), "class_names")
        self.counted = int(meta.get("num_classes", 0)) or len(own)
        self.stated_classes = self.counted or len(self.class_names)
        self.num_classes = self.stated_classes if num_classes is None else num_classes
        suffixes = [entry.suffix for entry in self.reader.sample(*self.reader.split_index(0)).entries]
        self.decoder = FieldDecoder(
            suffixes,
            rename,
            fields,
            channels=channels,
            image_size=image_size,
            enlarge=enlarge,
            num_classes=self.num_classes,
            class_names=self.class_names,
            limits=limits,
            background=background,
        )
        self.suffixes, self.limits, self.ignored = self.decoder.suffixes, limits, self.decoder.ignored
        self.shard_sizes = self.reader.sizes
        if "labels" not in self.suffixes or self.num_classes < 0:
            self.num_classes = 0
        if not enlarge:
            check_sizes(len(self), self._size_at, self.decoder.image_size)
        if channels is None and "pixels" in self.suffixes:
            self.decoder.channels = self._channels()
        self.first = self._first(max_skipped)
        self.image_shape = self.decoder.fix_shapes(self.first)
        self.contents = self.reader.contents.each(
            lambda tars: hashlib.sha256(f"{tars} {self.decoder.identity}".encode()).hexdigest()[:32]
        )
        self.fingerprint = self.contents.fingerprint

    @classmethod
    def stream(cls, root: str | Path | Sequence[str], rename=None, **options: Any) -> StreamSource:
        """The same samples in one pass after another instead of by number; what ``data.order=streaming`` builds."""
        options.pop("cache_dir", None)
        return StreamSource(root, rename, **options.pop("stream", None) or {}, **options)

    def limit_classes(self, num_classes: int) -> None:
        """Labels run from 0 to ``num_classes`` - 1, which the index does not say."""
        self.num_classes = self.decoder.num_classes = num_classes

    def label_hint(self) -> str:
        """The ``rename`` that would read labels out of members that are not read, or ""."""
        shard, member = self.reader.split_index(0)
        small = {
            e.suffix for e in self.reader.sample(shard, member).entries
            if e.suffix in self.ignored and e.size <= self.limits.max_text
        }  # fmt: skip
        return label_hint(self.reader.read(shard, member, small)[1], self.limits)

    def _size_at(self, index: int) -> tuple[str, tuple[int, int] | None]:
        """Key and (height, width) of an encoded image."""
        shard, member = self.reader.split_index(index)
        try:
            key, data = self.reader.read(
                shard, member, set(self.suffixes.get("pixels", ())), self.limits.max_bytes
            )
        except ShardError:
            return "", None  # Told where it is read, if it is.
        return key, next((size for size in map(image_size_of, data.values()) if size), None)

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

    def _channels(self) -> int | None:
        """Of the images that are looked at; None where none of them can be read."""
        kinds = []
        for index in keyed_sample(len(self), DECODED):
            with suppress(ShardError):  # Told where it is read, if it is.
                kinds.append(self._decoded(index, self._only("pixels"))["pixels"].shape[-3])
        return common_channels(kinds, self.reader.root)

    def _only(self, field: str) -> FieldDecoder:
        """A decoder of one field, without a budget of classes: nothing else of a sample is read."""
        decoder = copy.copy(self.decoder)
        decoder.suffixes, decoder.num_classes = {field: self.suffixes[field]}, 0
        return decoder

    def class_of(self, index: int) -> str | None:
        """The class of sample ``index`` as its label says, else as its key does; None where neither tells.

        Nothing but the label is read.
        """
        if "labels" in self.suffixes:
            with suppress(ShardError):  # Told where it is read, if it is.
                return str(self._decoded(index, self._only("labels"))["labels"])
            return None
        shard, member = self.reader.split_index(index)
        known = {entry.suffix for entry in self.reader.sample(shard, member).entries}
        label = [suffix for suffix in ("cls_id.cls", "cls") if suffix in known]
        key, data = self.reader.read(shard, member, set(label[:1]), 64)
        return data[label[0]].decode(errors="replace") if label else class_of_key(key)

    def highest_label(self, most: int = 512) -> tuple[int, int] | None:
        """The highest of up to ``most`` labels and how many were read; None where none of them can be read."""
        if "labels" not in self.suffixes:
            return None
        decoder, labels = self._only("labels"), []
        for index in keyed_sample(len(self), most):
            with suppress(ShardError):  # Told where it is read, if it is.
                labels.append(self._decoded(index, decoder)["labels"])
        return (max(labels), len(labels)) if labels else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read sample ``index``.

        Raises:
            IndexError: there is none.
            ShardError: a member is missing, damaged, over budget, or has another shape than the first sample's.
        """
        return self._decoded(index, self.decoder)

    def _decoded(self, index: int, decoder: FieldDecoder) -> dict[str, Any]:
        shard, member = self.reader.split_index(index)

        def read(suffixes: set[str]) -> Mapping[str, bytes]:
            return self.reader.read(shard, member, suffixes, self.limits.max_bytes)[1]

        def error(suffix: str, message: str) -> ShardError:
            return self.reader.error(shard, member, suffix, message)

        return decoder(self.reader.sample(shard, member), read, error)


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
