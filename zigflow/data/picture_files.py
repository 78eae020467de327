"""Which files of a folder are images, and what else lies there: nothing is left out without being counted."""

import os
from collections.abc import Collection
from pathlib import Path

from .picture import SUFFIXES

KNOWN = ", ".join(SUFFIXES)
# What viewers, file systems and network drives leave behind, besides names that begin with a dot.
_CLUTTER = {
    "@eadir", "__macosx", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip
_MAX_KINDS = 8


class LeftOut:
    """What was not taken: how many of each kind, and the first name of each. True when there is anything."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, Path]] = {}

    def add(self, kind: str, path: Path, count: int = 1) -> None:
        """Count ``path``; its ``kind`` is written in the plural."""
        before, first = self._kinds.get(kind, (0, path))
        self._kinds[kind] = before + count, first

    def update(self, other: "LeftOut") -> None:
        """Count what another one counted."""
        for kind, (count, first) in other._kinds.items():
            self.add(kind, first, count)

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        kinds = sorted(self._kinds.items(), key=lambda item: -item[1][0])
        parts = [f"{count} {kind} (first {first.as_posix()})" for kind, (count, first) in kinds[:_MAX_KINDS]]
        rest = sum(count for _, (count, _) in kinds[_MAX_KINDS:])
        return ", ".join([*parts, f"{rest} of {len(kinds) - _MAX_KINDS} further kinds"] if rest else parts)


def scan_folder(
    folder: Path, root: Path, left: LeftOut, expected: Collection[str] = ()
) -> tuple[list[Path], list[Path]]:
    """Images and sub-folders of one folder, sorted, relative to ``root``; links count as what they lead to.

    Hidden files and folders, those of viewers, and files that are no images are counted in ``left``; names that are
    ``expected`` to lie there are neither taken nor counted.

    Raises:
        OSError: the folder cannot be read.
    """
    images: list[Path] = []
    folders: list[Path] = []
    base = folder.relative_to(root)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, is_folder = base / entry.name, entry.is_dir()
            if entry.name in expected:
                continue
            suffix = path.suffix.lower()
            if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
                left.add(f"hidden {'folders' if is_folder else 'files'}", path)
            elif is_folder:
                folders.append(path)
            elif suffix.removeprefix(".") not in SUFFIXES:
                left.add(f"{suffix} files" if suffix else "files without a suffix", path)
            elif entry.is_file():
                images.append(path)
            else:
                left.add("links that lead nowhere", path)
    return images, folders


def find_images(folder: Path, root: Path, left: LeftOut) -> list[Path]:
    """All images of a folder and of those below it, sorted, relative to ``root``.

    Links to folders are followed; a folder that is reached a second time is counted in ``left``.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        facts = at.stat()
        if (facts.st_dev, facts.st_ino) in seen:
            left.add("folders reached twice by links", at.relative_to(root))
            continue
        seen.add((facts.st_dev, facts.st_ino))
        images, folders = scan_folder(at, root, left)
        found += images
        waiting += [root / path for path in reversed(folders)]
    return sorted(found)
