"""What a data set holds, in one object and one line."""

from dataclasses import dataclass
from typing import Any

from .class_names import renumbered, shown

_ORDER = ("pixels", "latents", "moments", "labels", "tokens", "captions")


@dataclass(frozen=True)
class DataFacts:
    """What was found in a data source.

    Attributes:
        name: what the configuration calls it.
        samples: how many; None for a stream.
        shape: of the pixels, or of the latents where there are no pixels.
        num_classes: number of labels; 0 without labels, None where there are labels and nothing says how many.
        class_names: names of the classes by number; empty where they have none.
        fields: what a sample holds.
        ignored: suffixes of members that are not read.
    """

    name: str
    samples: int | None
    shape: tuple[int, ...]
    num_classes: int | None
    class_names: tuple[str, ...]
    fields: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @property
    def has_labels(self) -> bool:
        return "labels" in self.fields

    @property
    def has_pixels(self) -> bool:
        return "pixels" in self.fields

    def line(self) -> str:
        """``shards: 899 samples, 3 x 32 x 32, 10 classes (cat, dog, ...), fields pixels, labels; ignored: txt``."""
        count = "a stream of samples" if self.samples is None else f"{self.samples} samples"
        return (
            f"{self.name}: {count}, {' x '.join(map(str, self.shape))}, {self.classes()}, fields "
            f"{', '.join(self.fields)}" + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")
        )

    def classes(self) -> str:
        """``2 classes (cat, dog)``."""
        if not self.has_labels:
            return "no labels"
        if self.num_classes is None:
            return "labels (nothing says of how many classes)"
        named = f" ({shown(self.class_names)})" if self.class_names else ""
        return f"{self.num_classes} class{'' if self.num_classes == 1 else 'es'}{named}"

    def renumbered(self) -> str:
        """What is to be said of classes whose names are other numbers than theirs; "" for nothing."""
        moved = renumbered(self.class_names)
        if not moved:
            return ""
        examples = ", ".join(f"{name} is class {place}" for name, place in moved[:4])
        return f"{self.name}: {len(moved)} classes are named by a number that is not theirs: {examples}"


def facts_of(source: Any, name: str) -> DataFacts:
    """The facts of a data source (``zigflow.data.source``) or a stream."""
    first = getattr(source, "first", None) or source[0]
    fields = tuple(field for field in _ORDER if first.get(field) is not None)
    labels = "labels" in fields
    return DataFacts(
        name=name,
        samples=len(source) if hasattr(source, "__len__") else None,
        shape=tuple(source.image_shape),
        num_classes=(getattr(source, "stated_classes", source.num_classes) or None) if labels else 0,
        class_names=tuple(getattr(source, "class_names", ())) if labels else (),
        fields=fields,
        ignored=tuple(getattr(innermost(source), "ignored", ())),
    )


def innermost(source: Any) -> Any:
    """The source that a chain of :class:`~.subset.Subset` and :class:`~.class_names.NamedClasses` ends in."""
    while hasattr(source, "source"):
        source = source.source
    return source
