"""The first samples of another source."""

import hashlib
from collections.abc import Mapping
from typing import Any

from .contents import contents_of
from .source import DataSource


class Subset:
    """The first ``limit`` samples of ``source``, as one shard.

    Raises:
        ValueError: the source has fewer samples.
    """

    def __init__(self, source: DataSource, limit: int):
        if not 1 <= limit <= len(source):
            raise ValueError(
                f"data.limit={limit} of a source with {len(source)} samples; give 1..{len(source)}"
            )
        self.source, self.limit = source, limit
        self.image_shape = source.image_shape
        self.num_classes = source.num_classes
        self.class_names = tuple(getattr(source, "class_names", ()))
        self.shard_sizes = (limit,)
        self.contents = contents_of(source).each(
            lambda whole: hashlib.sha256(f"{whole}[:{limit}]".encode()).hexdigest()
        )
        self.fingerprint = self.contents.fingerprint

    @property
    def first(self) -> Mapping[str, Any]:
        """A readable sample, which shows the fields of all."""
        return getattr(self.source, "first", None) or self.source[0]

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < self.limit:
            raise IndexError(f"sample {index} of {self.limit}")
        return self.source[index]
