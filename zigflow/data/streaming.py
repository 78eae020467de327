"""Shards that cannot be indexed, in one pass after another: ``data.order=streaming``.

The pipeline is the ``webdataset`` library's (URL patterns, stages, shuffle buffer). Opening, fetching and reading
tars are ours: the library's openers run shells, and its tar reader names neither shard nor offset.
"""

import hashlib
import itertools
import logging
import os
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zigflow.keyed import keyed_permutation, keyed_seed

from .batch import Batch
from .cache import FetchOptions, ShardCache
from .class_names import check_names, numbers_among
from .decode import DEFAULT_LIMITS, Limits
from .fields import FieldDecoder
from .global_batch import GlobalBatch
from .loader import DEFAULT_TIMEOUT, make_loader, pick_caption
from .mixing import StreamMixing
from .picture import WHITE, Background
from .remote import scheme_of, shown, unsigned
from .shard_index import INDEX_NAME, Sample, is_folder_index, load_folder_index, scan_open
from .shard_urls import import_webdataset, shard_urls
from .shards import read_members
from .tar import Budget, BudgetError, ShardError

log = logging.getLogger(__name__)

_OPEN_SHARDS = 16


class _Place(NamedTuple):
    """A sample that has not been read yet."""

    url: str
    sample: Sample


class StreamSource:
    """Tars behind URLs, each fetched whole into a cache and read from there.

    Args:
        root: a pattern such as ``https://host/train-{000000..000124}.tar``, several joined by ``::``, a list of
            URLs, the name of a ``.txt`` file with one URL per line, a local folder, or local files by a pattern.
        rename, fields, channels, image_size, enlarge, num_classes, class_names, limits, background: see
            ``zigflow.datasets.shards.ShardSource``.
        max_skipped: unreadable samples and shards that may follow each other.
        shuffle_buffer: samples that mix; 0 keeps the order of the shards' contents.
        cache_dir: folder of the cache.
        options: further fields of :class:`~zigflow.data.cache.FetchOptions`.

    Attributes:
        shards: the URLs.
        first: the first readable sample; all others have its fields and shapes.
        class_names, stated_classes, ignored: see ``zigflow.datasets.shards.ShardSource``; an index is read where all
            shards lie in a local folder of ours.
        image_shape, num_classes, fingerprint: as every data source has them; the fingerprint covers names only.

    Raises:
        MissingPackageError: the package webdataset is missing; the extra to install is named.
        ValueError: no shards, a scheme that is not allowed, or a signed URL outside of a list file.
        ShardError: the first shard cannot be fetched or read.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str],
        rename: Mapping[str, str] | None = None,
        *,
        fields: Sequence[str] | None = None,
        channels: int | None = 3,
        image_size: int | Sequence[int] | None = None,
        enlarge: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
        max_skipped: int = 0,
        shuffle_buffer: int = 1000,
        cache_dir: str | Path = "data/stream_cache",
        **options: Any,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"stream.shuffle_buffer must not be negative, got {shuffle_buffer}")
        fetch = FetchOptions(Path(cache_dir).absolute(), **options)
        self.shards = shard_urls(root, fetch.allow_pipe)
        self.shuffle_buffer, self.max_skipped, self.limits = shuffle_buffer, max_skipped, limits
        self.cache = ShardCache(fetch)
        self._files: OrderedDict[str, int] = OrderedDict()
        skips = _Skips(max_skipped)
        places = self._places(iter(self.shards), skips)
        try:
            head = next(places)
        except StopIteration:
            raise ShardError("none of the shards has a readable sample", shown(self.shards[0])) from None
        meta = _meta_of(self.shards)
        own = check_names(meta.get("class_names", ()), "index.json")
        self.class_names = own or check_names(class_names or (), "class_names")
        self.stated_classes = int(meta.get("num_classes", 0)) or len(self.class_names)
        classes = self.stated_classes if num_classes is None else max(num_classes, 0)
        self.decoder = FieldDecoder(
            [entry.suffix for entry in head.sample.entries],
            rename,
            fields,
            channels=channels,
            image_size=image_size,
            enlarge=enlarge,
            num_classes=classes,
            class_names=self.class_names,
            limits=limits,
            background=background,
        )
        self.numbers: tuple[int, ...] = ()
        self.num_classes = classes if "labels" in self.decoder.suffixes else 0
        self.ignored = self.decoder.ignored
        self.first = next(self._samples(itertools.chain([head], places), skips))
        self.image_shape = self.decoder.fix_shapes(self.first)
        names = "\n".join(unsigned(url) for url in self.shards)
        self.fingerprint = hashlib.sha256(f"{names}\n{self.decoder.identity}".encode()).hexdigest()[:32]
        self.close()

    def limit_classes(self, num_classes: int) -> None:
        """Labels run from 0 to ``num_classes`` - 1."""
        self.num_classes = self.decoder.num_classes = num_classes

    def number_by(self, names: Sequence[str]) -> None:
        """Give the classes the numbers that they have among ``names``; each of them stays a class of its own.

        Raises:
            ValueError: a class of the stream is not among ``names``.
        """
        numbers = numbers_among(self.class_names, names)
        if numbers is None:
            return
        self.numbers, self.class_names = numbers, tuple(names)
        self.num_classes = self.stated_classes = len(self.class_names)
        self.first = self._numbered(self.first)

    def _numbered(self, sample: dict[str, Any]) -> dict[str, Any]:
        if not self.numbers or "labels" not in sample:
            return sample
        return {**sample, "labels": self.numbers[sample["labels"]]}

    def identity(self, seed: int) -> dict[str, Any]:
        """What the order depends on, for a checkpoint: plain JSON values."""
        return {
            "kind": "streaming",
            "resume": "approximate",
            "seed": seed,
            "shards": len(self.shards),
            "shuffle_buffer": self.shuffle_buffer,
        }

    def samples(
        self, reader: int, readers: int, seed: int, start: int, at_least: int = 1
    ) -> Iterator[dict[str, Any]]:
        """The samples of one of ``readers`` readers, without end.

        Epoch e takes the shards in a keyed permutation of (seed, start, e), each reader every ``readers``-th of
        them, and mixes their samples in a buffer; each sample of them comes once.

        Args:
            start: the optimizer step at which the stream began; another start is another permutation.
            at_least: samples that the reader's part must have.

        Raises:
            ShardError: a shard or a sample cannot be read, beyond what may be skipped.
        """
        wds = import_webdataset()
        skips = _Skips(self.max_skipped)

        def places(source: Iterable[str]) -> Iterator[_Place]:
            return self._places(source, skips)

        def decoded(source: Iterable[_Place]) -> Iterator[dict[str, Any]]:
            return self._samples(source, skips)

        watched = StreamMixing(self.shuffle_buffer) if reader == 0 else None
        for epoch in itertools.count():
            order = keyed_permutation(len(self.shards), seed, "stream.shards", start, epoch)[reader::readers]
            stages: list[Any] = [_Shards([self.shards[int(shard)] for shard in order]), places]
            if self.shuffle_buffer:
                rng = random.Random(keyed_seed(seed, "stream.buffer", start, epoch, reader))
                initial = max(self.shuffle_buffer // 4, 1)
                stages.append(wds.shuffle(self.shuffle_buffer, initial=initial, rng=rng))
            count = 0
            for sample in wds.DataPipeline(*stages, decoded):
                count += 1
                if watched is not None:
                    watched.see(sample)
                yield sample
            if count < at_least:
                raise BudgetError(
                    f"the {len(order)} shards of reader {reader} of {readers} hold {count} readable samples, a "
                    f"batch takes {at_least}: lower data.batch_size or data.num_workers"
                )

    def _places(self, urls: Iterable[str], skips: "_Skips") -> Iterator[_Place]:
        for url in urls:
            try:
                samples = self._scan(url, skips)
            except BudgetError:
                raise
            except ShardError as error:
                skips.report(error)
                continue
            for sample in samples:
                yield _Place(url, sample)

    def _scan(self, url: str, skips: "_Skips") -> list[Sample]:
        fd = self._open(url)
        try:
            return scan_open(fd, shown(url), False, Budget())
        except ShardError:
            if not self._forget(url) and not self.max_skipped:
                raise
        # Damage of a cached copy may be the cache's own: it is fetched once more before it counts.
        budget = Budget(self.max_skipped)
        samples = scan_open(self._open(url), shown(url), False, budget)
        for error in budget.errors:
            skips.report(error)
        return samples

    def _samples(self, places: Iterable[_Place], skips: "_Skips") -> Iterator[dict[str, Any]]:
        for place in places:
            try:
                sample = self._numbered(self._read(place))
            except BudgetError:
                raise
            except ShardError as error:
                skips.report(error)
                continue
            skipped = skips.take()
            yield {**sample, "skipped": skipped} if skipped else sample

    def _read(self, place: _Place) -> dict[str, Any]:
        sample, name = place.sample, shown(place.url)

        def read(suffixes: set[str]) -> Mapping[str, bytes]:
            return read_members(self._open(place.url), name, sample, suffixes, self.limits.max_bytes)

        def error(suffix: str, message: str) -> ShardError:
            offsets = [entry.offset for entry in sample.entries if entry.suffix == suffix]
            offset = offsets[0] if offsets else min(entry.offset for entry in sample.entries)
            return ShardError(f"{suffix}: {message}", name, offset, sample.key)

        return self.decoder(sample, read, error)

    def _open(self, url: str) -> int:
        if url not in self._files:
            self._files[url] = self.cache.open(url)
            while len(self._files) > _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(url)
        return self._files[url]

    def _forget(self, url: str) -> bool:
        if url in self._files:
            os.close(self._files.pop(url))
        return self.cache.forget(url)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _meta_of(shards: Sequence[str]) -> Mapping[str, Any]:
    """What the index of our own local shards says of them all; {} for shards that have none."""
    folders = {Path(url).parent if scheme_of(url) == "file" else None for url in shards}
    folder = folders.pop()
    if folders or folder is None or not is_folder_index(folder / INDEX_NAME):
        return {}
    return load_folder_index(folder).meta


class _Skips:
    """What one reader has passed over since the last sample that it could read."""

    def __init__(self, limit: int):
        self.limit = limit
        self._waiting: list[str] = []

    def report(self, error: ShardError) -> None:
        if not self.limit:
            raise error
        self._waiting.append(str(error))
        if len(self._waiting) > self.limit:
            raise BudgetError(
                f"{len(self._waiting)} problems in a row, data.max_skipped is {self.limit}; the last: {error}"
            ) from error

    def take(self) -> list[str]:
        waiting, self._waiting = self._waiting, []
        return waiting


class _Shards(IterableDataset):
    """The first stage of a webdataset pipeline."""

    def __init__(self, urls: list[str]):
        self.urls = urls

    def __iter__(self) -> Iterator[str]:
        return iter(self.urls)


class _Batches(IterableDataset):
    """Lists of samples, one per micro-step, whose ids are the positions of the micro-step."""

    def __init__(
        self,
        source: StreamSource,
        batch: GlobalBatch,
        seed: int,
        start: int,
        stop: int | None,
        captions: bool,
    ):
        self.source, self.batch, self.seed = source, batch, seed
        self.start, self.stop, self.captions = start, stop, captions

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        info, batch = get_worker_info(), self.batch
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = batch.rank * workers + worker, batch.world_size * workers
        samples = self.source.samples(reader, readers, self.seed, self.start, batch.local_size)
        # Torch's loader takes from its workers in turn: worker w delivers the micro-steps w, w + workers, ...
        for turn in itertools.count(worker, workers):
            step, micro = divmod(turn, batch.grad_accum)
            if self.stop is not None and self.start + step >= self.stop:
                return
            rows = []
            for position in batch.positions(self.start + step, micro):
                sample = {**next(samples), "id": position}
                rows.append(pick_caption(sample, self.seed) if self.captions else sample)
            yield rows


def streaming_loader(
    source: StreamSource,
    batch: GlobalBatch,
    seed: int,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    pick_captions: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
) -> DataLoader[Batch]:
    """Batches of this rank from a stream, one per micro-step; ids are the positions, as with an indexed order.

    Which samples come depends on the number of processes and workers and on ``start_step``.

    Raises:
        ValueError: there are fewer shards than readers, with the numbers.
    """
    check_readers(source, batch.world_size, num_workers)
    if start_step:
        log.warning(
            "resuming a stream at step %d is approximate: its shards are drawn anew, some samples of the epoch "
            "come again and others later",
            start_step,
        )
    dataset = _Batches(source, batch, seed, start_step, stop_step, pick_captions)
    return make_loader(dataset, None, num_workers, pin_memory, 2, timeout)


def check_readers(source: StreamSource, world_size: int, num_workers: int) -> None:
    """Refuse fewer shards than readers.

    Raises:
        ValueError: with the numbers that would work.
    """
    shards, readers = len(source.shards), world_size * max(num_workers, 1)
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    if shards < readers:
        most = shards // world_size
        cure = f"set data.num_workers to {most} or less" if most else f"use at most {shards} processes"
        raise ValueError(
            f"{shards} shards for {readers} readers ({world_size} processes x {max(num_workers, 1)} workers): each "
            f"reader needs a shard of its own; {cure}, or split the set into more shards"
        )
