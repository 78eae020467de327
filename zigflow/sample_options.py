"""The keys that only sampling has, as frozen, typed values; torch-free."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zigflow.typed import SettingsError, convert, declared, key

__all__ = ["SampleOptions"]

_MOST_SEEDS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which weights of a checkpoint are sampled, which samples, on what conditions."""

    weights: str | None = key(
        None, "weights of our checkpoint: model, or an EMA profile's name; null: its first EMA profile"
    )
    labels: str | tuple[int | str, ...] = key(
        "balanced",
        "balanced | data (as frequent as there) | classes that the samples take in turn: [3,7], [cat]",
    )
    seeds: tuple[int, ...] | None = key(
        None,
        "numbers of the samples to draw, [3,17,40] or 0-63; null: 0 to num_fid_samples - 1",
        accepts=str | int | tuple[int, ...] | None,
    )
    captions: str | None = key(
        None,
        "caption features of a text model: FILE.npy, FILE.safetensors, a folder of shards or prompts; null: the data's",
    )
    npz: bool = key(False, "also one samples_NxHxWx3.npz in the layout of the ADM evaluation suite")
    batch_size: int = key(
        100, "samples per batch; the images do not depend on it", name="offline_sample_local_bs", least=1
    )

    @classmethod
    def take_from(cls, given: dict[str, Any]) -> "SampleOptions":
        """Take the keys out of a sampling command's configuration.

        Raises:
            SettingsError: a value that is not allowed.
        """
        values = {known.path: given.pop(known.path, known.default) for known in declared(cls)}
        batch_size = values.pop("offline_sample_local_bs")
        return cls(
            weights=convert("weights", values["weights"], str | None),
            labels=_read_labels(values["labels"]),
            seeds=_read_seeds(values["seeds"]),
            captions=convert("captions", values["captions"], str | None),
            npz=convert("npz", values["npz"], bool),
            batch_size=_checked(
                "offline_sample_local_bs", convert("offline_sample_local_bs", batch_size, int)
            ),
        )

    def by_number(self, class_names: Sequence[str]) -> "SampleOptions":
        """The same with the numbers of the classes that ``labels`` names.

        Raises:
            SettingsError: a name that no class has, with near matches.
        """
        if isinstance(self.labels, str):
            return self
        from zigflow.data.class_names import number_of  # with torch

        try:
            numbers = tuple(number_of(label, class_names, "class in labels") for label in self.labels)
        except ValueError as error:
            raise SettingsError(f"labels={list(self.labels)}: {error}") from error
        return replace(self, labels=numbers)

    @property
    def names_classes(self) -> bool:
        """Whether ``labels`` holds names."""
        return not isinstance(self.labels, str) and any(isinstance(label, str) for label in self.labels)

    def facts(self) -> dict[str, Any]:
        """What differs from the usual, for identities and results; empty for the defaults."""
        found: dict[str, Any] = {}
        if self.labels != "balanced":
            found["labels"] = self.labels if isinstance(self.labels, str) else list(self.labels)
        if self.seeds is not None:
            first, last = self.seeds[0], self.seeds[-1]
            # A range may have millions of numbers: as short as it is typed.
            is_range = self.seeds == tuple(range(first, last + 1))
            found["seeds"] = f"{first}-{last}" if is_range else list(self.seeds)
        return found


def _checked(path: str, value: Any) -> Any:
    about = next(known.about for known in declared(SampleOptions) if known.path == path)
    about.check(path, value)
    return value


def _read_labels(value: Any) -> str | tuple[int | str, ...]:
    if value in ("balanced", "data"):
        return value
    chosen = value if isinstance(value, list) else [value]
    if chosen and all(type(label) is int or (isinstance(label, str) and label) for label in chosen):
        return tuple(chosen)
    raise SettingsError(
        f"labels={value} is neither balanced, data nor a list of classes such as labels=[3,7] or labels=[cat,dog]"
    )


def _read_seeds(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)-(\d+)", value)):
        first, last = int(match[1]), int(match[2])
        if first <= last < first + _MOST_SEEDS:
            return tuple(range(first, last + 1))
    value = [value] if type(value) is int else value
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
        if len(set(value)) == len(value):
            return tuple(value)
        raise SettingsError(f"seeds={value} names a sample more than once: give each number once")
    raise SettingsError(
        f"seeds={value} is no list of sample numbers from 0 on: give seeds=[3,17,40] or seeds=0-63"
    )
