"""The weights that a new run starts from, also those of a model for another grid or patch size.

"Weak-to-strong" training (DiM) goes from small images to large ones: parameters of equal shape are copied, tables of
positions are interpolated as the model does it for other sizes, patch layers are spread over the new patches. What is
in the model and not in the weights keeps its initial value. Each parameter's fate is reported.

Spread over a patch of k x k times as many pixels, an input weight is repeated and divided by k^2, an output weight is
repeated: the model sees the old patch in the means of the new one, and draws it k times as large. "as_published"
repeats the first pixel's weight of either and divides by nothing.

Legend: p patch size, h w token grid, T frames, E extra tokens, D width, C channels.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from zigflow.data.class_names import are_numbers, shown
from zigflow.nn import PatchEmbed, as_denoiser, interpolate_positions
from zigflow.registry import unknown_name

from .tensors import assign, clean_name, named_floating

__all__ = ["PATCH_RULES", "Adapted", "Start", "start_model"]

log = logging.getLogger(__name__)

PATCH_RULES = ("spread", "as_published")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Adapted:
    """What became of the parameters, by name.

    Attributes:
        copied: as they were. adapted: and how. new: at their initial values, and why.
        left_over: in the weights and not in the model.
    """

    copied: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)

    def log(self, what: str) -> None:
        """One line, and one for each parameter that was not copied."""
        log.info(
            "starting from %s: %d parameters copied, %d adapted, %d new, %d left over",
            what, len(self.copied), len(self.adapted), len(self.new), len(self.left_over),
        )  # fmt: skip
        for name, how in self.adapted.items():
            log.info("adapted %s: %s", name, how)
        for name, why in self.new.items():
            log.warning("new %s: %s", name, why)
        for name in self.left_over:
            log.warning("left over %s: the model has no such parameter", name)


@dataclass(frozen=True)
class Start:
    """What a new run takes over beside the weights in its model.

    Attributes:
        report: of the model's parameters.
        averages: those of the EMA profiles, by name.
        images: that are behind the averages.
    """

    report: Adapted
    averages: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    images: int = 0


def start_model(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Mapping[str, Tensor]],
    *,
    built: Grid | None = None,
    same_classes: bool = False,
    classes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    patches: str = "spread",
    images: int = 0,
) -> Start:
    """Put ``weights`` into ``model``, adapted to its grid and patches.

    Args:
        averages: by EMA profile, adapted in the same way.
        built: the grid that the weights were trained on; None: of the proportions of the model's.
        same_classes: class i of the weights is class i of the model, which may have a null class more or less.
        classes: names of the classes of the weights and of the model. Where both have some that are no plain numbers,
            each class starts from the one of its name, and ``same_classes`` is not asked.
        patches: "spread" or "as_published".
        images: that are behind the averages.

    Raises:
        ValueError: a parameter of another shape, for which there is no rule.
    """
    if patches not in PATCH_RULES:
        raise unknown_name("rule for patch layers", patches, list(PATCH_RULES))
    rules = _Rules(model, built, same_classes, classes, patches)
    targets = {clean_name(name): value for name, value in model.state_dict().items()}
    report = Adapted()
    kept = {
        profile: rules.adapt(state, named_floating(model), Adapted()) for profile, state in averages.items()
    }
    for name, value in rules.adapt(weights, targets, report).items():
        assign(targets[name], value)
    return Start(report, kept, images)


class _Rules:
    """How a parameter of one model becomes that of another."""

    def __init__(
        self,
        model: nn.Module,
        built: Grid | None,
        same_classes: bool,
        names: tuple[Sequence[str], Sequence[str]],
        patches: str,
    ):
        self.sizes = as_denoiser(model).resizing()
        self.built = built
        self.same_classes, self.patches = same_classes, patches
        self.names = None if any(are_numbers(n) for n in names) else (list(names[0]), list(names[1]))
        modules = {clean_name(name): module for name, module in model.named_modules()}
        self.patch_inputs = {f"{n}.proj.weight" for n, m in modules.items() if isinstance(m, PatchEmbed)}
        self.classes = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}

    def adapt(
        self, state: Mapping[str, Tensor], targets: Mapping[str, Tensor], report: Adapted
    ) -> dict[str, Tensor]:
        """The values for ``targets``: names and shapes of the model; ``report`` is filled."""
        made: dict[str, Tensor] = {}
        for name, target in targets.items():
            initial = target.detach()
            if name not in state:
                report.new[name] = "not in the weights"
                made[name] = initial.clone()
                continue
            value, how = self._adapted(name, state[name], initial)
            made[name] = value
            if how is None:
                report.copied.append(name)
            elif how.startswith("other classes"):
                report.new[name] = how
            else:
                report.adapted[name] = how
        report.left_over.extend(name for name in state if name not in targets)
        return made

    def _adapted(self, name: str, value: Tensor, initial: Tensor) -> tuple[Tensor, str | None]:
        """A parameter for the model, and how it came about where it is not the value itself."""
        if value.ndim == initial.ndim == 3 and value.shape[-1] == initial.shape[-1]:
            if self.sizes.grid is not None and self.sizes.is_positions(name):
                return self._table(name, value, initial, self.sizes.grid)
            if self.sizes.is_frames(name) and value.shape != initial.shape:
                before, now = value.shape[1], initial.shape[1]
                table = interpolate_positions(value, (before, 1, 1), (now, 1, 1))
                return table, f"{before} -> {now} frames, linear"
        if name in self.classes and self.names is not None and value.shape[1:] == initial.shape[1:]:
            return self._classes_by_name(value, initial, *self.names)
        if value.shape == initial.shape:
            return value, None
        if name in self.patch_inputs and value.shape[:2] == initial.shape[:2]:
            return self._patch_input(value, initial.shape[-1])
        if self.sizes.is_output(name) and value.shape[1:] == initial.shape[1:]:
            found = self._patch_output(value, initial)
            if found is not None:
                return found
        if name in self.classes and value.shape[1:] == initial.shape[1:]:
            return self._classes(value, initial)
        raise ValueError(
            f"{name} is {tuple(value.shape)} there and {tuple(initial.shape)} in the model, and there is no rule by "
            "which the one becomes the other: only positions, patch layers and class tables may differ"
        )

    def _table(self, name: str, value: Tensor, initial: Tensor, now: Grid) -> tuple[Tensor, str | None]:
        extras, mode = initial.shape[1] - math.prod(now), self.sizes.mode
        before = self.built or _proportional(now, value.shape[1] - extras)
        if before is None or extras < 0 or value.shape[1] - math.prod(before) != extras:
            raise ValueError(
                f"{name} has {value.shape[1]} positions there and {initial.shape[1]} in the model, {extras} of them "
                f"not on its grid {now}: the rest there is no grid {before or 'of these proportions'}"
            )
        if before == now:
            return value, None
        table = interpolate_positions(value, before, now, mode, extras)
        shown = [" x ".join(map(str, g if g[0] > 1 or now[0] > 1 else g[1:])) for g in (before, now)]
        return table, f"{shown[0]} -> {shown[1]}, {mode}"

    def _patch_input(self, value: Tensor, now: int) -> tuple[Tensor, str]:
        """(D, C, p, p)."""
        before = value.shape[-1]
        if self.patches == "as_published":
            return value[..., :1, :1].expand(
                *value.shape[:2], now, now
            ).clone(), f"first of {before} x {before} pixels"
        spread = _resized(value, now)
        return spread * (before / now) ** 2, _shown(before, now)

    def _patch_output(self, value: Tensor, initial: Tensor) -> tuple[Tensor, str] | None:
        """(p p C, ...), the channel the fastest."""
        now = self.sizes.patch_size
        if not isinstance(now, int) or initial.shape[0] % now**2:
            return None
        channels = initial.shape[0] // now**2
        before = math.isqrt(value.shape[0] // channels)
        if before**2 * channels != value.shape[0]:
            return None
        pixels = value.reshape(before, before, channels, -1)
        if self.patches == "as_published":
            spread = pixels[:1, :1].expand(now, now, -1, -1)
            how = f"first of {before} x {before} pixels"
        else:
            spread = _resized(pixels.permute(2, 3, 0, 1), now).permute(2, 3, 0, 1)
            how = _shown(before, now)
        return spread.reshape(initial.shape).clone(), how

    def _classes(self, value: Tensor, initial: Tensor) -> tuple[Tensor, str]:
        rows = min(len(value), len(initial))
        if not self.same_classes:
            return initial.clone(), f"other classes: {len(value)} rows there, {len(initial)} here"
        result = initial.clone()
        result[:rows] = value[:rows].to(result)
        return result, f"{rows} rows copied, {len(initial) - rows} new"

    def _classes_by_name(
        self, value: Tensor, initial: Tensor, before: list[str], now: list[str]
    ) -> tuple[Tensor, str | None]:
        """Rows of the classes, then that of the null class, if there is one."""
        rows = {place: before.index(label) for place, label in enumerate(now) if label in before}
        if len(value) > len(before) and len(initial) > len(now):
            rows[len(now)] = len(before)
        result = initial.clone()
        result[list(rows)] = value[list(rows.values())].to(result)
        if before == now and len(value) == len(initial):
            return result, None
        new, gone = ([n for n in one if n not in other] for one, other in ((now, before), (before, now)))
        told = [f"{what}: {shown(some)}" for what, some in (("new", new), ("left out", gone)) if some]
        return result, "; ".join([f"{len(now) - len(new)} of {len(now)} classes by their names", *told])


def _proportional(now: Grid, tokens: int) -> Grid | None:
    """The grid of so many tokens with the proportions of ``now``, where there is one."""
    frames, height, width = now
    factor = math.sqrt(max(tokens, 0) / math.prod(now))
    found = (frames, round(height * factor), round(width * factor))
    return found if math.prod(found) == tokens else None


def _resized(pixels: Tensor, size: int) -> Tensor:
    """(..., p, p) -> (..., size, size): repeated, or block means.

    Raises:
        ValueError: neither size is a multiple of the other.
    """
    before = pixels.shape[-1]
    if size % before == 0:
        return pixels.repeat_interleave(size // before, -1).repeat_interleave(size // before, -2)
    if before % size == 0:
        k = before // size
        return pixels.unflatten(-1, (-1, k)).unflatten(-3, (-1, k)).mean((-3, -1))
    raise ValueError(
        f"patches of {before} pixels do not become patches of {size}: take a multiple or a divisor"
    )


def _shown(before: int, now: int) -> str:
    return f"patches of {before} x {before} -> {now} x {now} pixels"
