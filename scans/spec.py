"""ScanSpec, and the one place that reads official scan strings (``zigzagN8``, ``v2``, ``zzvideo_sst``)."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from scans.path import ScanPath
from scans.registry import Scan, UnknownScanError, check_grid, get_scan, list_scans, unknown_scan
from scans.schedule import ScanSchedule, ScanStep
from scans.video import factorized_steps

Mixer = Literal["mamba", "bi_mamba", "parallel_mamba"]

VARIANTS = 8  # of zigzag and of hilbert: four corners, rows or columns first
FORMS = (
    "v1",
    "v2",
    "zigzagN{k}",
    "hilbertN{k}",
    "randomN{k}",
    "parallelN{k}",
    "zzvideo_{word}",
    "video_{word}",
    "{scan}",
    "{scan}:{k}",
)
_COUNTED = {"zigzag": "zigzag", "hilbert": "hilbert_official", "random": "random", "parallel": "zigzag"}
_EXAMPLES = ["v1", "v2", *(f"{stem}N8" for stem in _COUNTED), "zzvideo_sst", "video_sst"]


@dataclass(frozen=True)
class ScanSpec:
    """A scan string, read: which mixer, which scan and how the layers share its paths.

    Args:
        mixer: "mamba", "bi_mamba" (two weight sets, the second one backwards) or "parallel_mamba".
        scan: name of a registered scan.
        num_paths: how many of its paths are used, from the first; None for all.
        word: letters of a factorized video schedule, "" for none.
        num_directions: weight sets per layer: 1, 2 (bi_mamba), or the branches of parallel_mamba.
        text: the string it was read from.
    """

    mixer: Mixer
    scan: str
    num_paths: int | None = None
    word: str = ""
    num_directions: int = 1
    text: str = ""

    @property
    def is_seeded(self) -> bool:
        """True when the paths follow from a seed (and belong beside the weights)."""
        return "seed" in get_scan(self.scan).options

    def with_scan(self, name: str) -> "ScanSpec":
        """This spec with another scan (``scan=`` on the command line): "spiral", or its first four, "spiral:4".

        The mixer, its directions and the folds stay. Temporal layers keep walking along time. A scan that has
        only a joint (t, h, w) form, such as "hilbert3d", walks the whole video in every layer instead. A
        parallel mixer whose scan has fewer paths than it has branches uses them again from the first.

        Raises:
            UnknownScanError: no scan of that name.
            ValueError: the number of paths is not positive.
        """
        named = _read_name(name)
        if named is None:
            raise unknown_scan(f"unknown scan {name!r}.", name, list_scans())
        text = f"{self.text} with {name}"
        word = self.word if 2 in get_scan(named.scan).dims else ""
        return dataclasses.replace(self, scan=named.scan, num_paths=named.num_paths, word=word, text=text)

    def paths(self, t: int, h: int, w: int, seed: int = 0) -> tuple[ScanPath, ...]:
        """The paths in use over one frame (t = 1, or a factorized word) or over a whole video.

        Raises:
            ValueError: the scan has fewer paths than asked for (both numbers are named) or no joint form.
        """
        scan = get_scan(self.scan)
        paths = scan.over(1 if self.word else t, h, w, **self._options(scan, seed))
        if self.num_paths is None:
            return paths
        if self.num_paths > len(paths):
            raise ValueError(
                f"{self.text or self.scan!r} asks for {self.num_paths} paths, "
                f"scan {self.scan!r} has {len(paths)}"
            )
        return paths[: self.num_paths]

    def schedule(
        self, depth: int, t: int, h: int, w: int, seed: int = 0, official_temporal_reversal: bool = False
    ) -> ScanSchedule:
        """One step per layer: layer i takes path i modulo the number of paths.

        Args:
            depth: number of layers.
            t, h, w: the token grid; t = 1 for images.
            seed: of seeded scans; others ignore it.
            official_temporal_reversal: see `factorized_steps`; without temporal layers it changes nothing.

        Raises:
            ValueError: depth or a size is below 1, or as `paths`.
        """
        t, h, w = check_grid((t, h, w))
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        paths = self.paths(t, h, w, seed)
        if self.mixer == "parallel_mamba":
            branches = tuple(paths[i % len(paths)] for i in range(self.num_directions))
            step = ScanStep(ScanPath.identity(t * h * w, shape=(t, h, w)))
            return ScanSchedule((step,) * depth, (t, h, w), branches)
        if self.word:
            steps = factorized_steps(self.word, depth, paths, t, official_temporal_reversal)
        else:
            shared = [ScanStep(path) for path in paths[:depth]]
            steps = tuple(shared[i % len(paths)] for i in range(depth))
        return ScanSchedule(steps, (t, h, w))

    def _options(self, scan: Scan, seed: int) -> dict[str, Any]:
        options: dict[str, Any] = {"seed": seed, "count": self.num_paths}
        return {k: v for k, v in options.items() if k in scan.options and v is not None}


def parse_scan_type(text: str) -> ScanSpec:
    """Read a scan string.

    ===================================  ==============  =====================================================
    string                               mixer           layer i
    ===================================  ==============  =====================================================
    ``v1``                               mamba           raster order
    ``v2``                               bi_mamba        raster order, both ways, two weight sets
    ``zigzagN{k}``                       mamba           zigzag path i mod k
    ``hilbertN{k}``                      mamba           hilbert_official path i mod k (as published)
    ``randomN{k}``                       mamba           random path i mod k
    ``parallelN{k}``                     parallel_mamba  the first k zigzag paths at once
    ``zzvideo_{word}``, ``video_{word}`` mamba           the word's letters: s zigzag per frame, t along time
    ``{scan}``, ``{scan}:{k}``           mamba           path i mod k of a registered scan (all its paths)
    ===================================  ==============  =====================================================

    Raises:
        TypeError: ``text`` is not a string.
        UnknownScanError: no such form; it is a ValueError and lists forms, scans and near matches.
        ValueError: k is 0 or above the number of paths (both numbers are named), or a bad word.
    """
    if not isinstance(text, str):
        raise TypeError(f"a scan string is a str such as 'zigzagN8', got {text!r}")
    if text in ("v1", "v2"):
        mixer, directions = ("mamba", 1) if text == "v1" else ("bi_mamba", 2)
        return ScanSpec(mixer, "sweep1", text=text, num_directions=directions)
    if match := re.fullmatch(r"(?:zz)?video_(\w*)", text):
        word = match[1]
        if not re.fullmatch("[st]+", word):
            raise ValueError(
                f"{text!r}: the word after 'video_' has letters s and t only, such as 'sst'; got {word!r}"
            )
        return ScanSpec("mamba", "zigzag", word=word, text=text)
    if match := re.fullmatch(rf"({'|'.join(_COUNTED)})N(\d+)", text):
        stem, k = match[1], int(match[2])
        if k < 1 or (k > VARIANTS and stem != "random"):
            most = "any number" if stem == "random" else f"{VARIANTS} paths"
            raise ValueError(f"{text!r} asks for {k} paths; {stem}N{{k}} has {most}, from 1 on")
        if stem == "parallel":
            return ScanSpec("parallel_mamba", _COUNTED[stem], k, num_directions=k, text=text)
        return ScanSpec("mamba", _COUNTED[stem], k, text=text)
    named = _read_name(text)
    if named is None:
        problem = f"unknown scan string {text!r}; the forms are {', '.join(FORMS)}."
        raise unknown_scan(problem, text, [*_EXAMPLES, *list_scans()], kind="Examples and registered scans")
    return named


def _read_name(text: str) -> ScanSpec | None:
    """The spec of "name" or "name:k", None when it is neither or nothing is registered under the name."""
    name, colon, count = text.partition(":")
    if colon and not re.fullmatch(r"\d+", count):
        return None
    try:
        get_scan(name)
    except UnknownScanError:
        return None
    if colon and int(count) < 1:
        raise ValueError(f"{text!r} asks for {count} paths; at least 1")
    return ScanSpec("mamba", name, int(count) if colon else None, text=text)
