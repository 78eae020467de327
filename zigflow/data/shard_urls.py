"""What a data root names: a folder, a pattern, a list of URLs."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zigflow.errors import needs

from .remote import scheme_of, shown, unsigned

_MAX_SHARDS = 10_000_000


def shard_urls(root: str | Path | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """The shards that ``root`` names; see :class:`zigflow.data.streaming.StreamSource`.

    Raises:
        ValueError: none, too many, a scheme that is not allowed, or a signed URL outside of a list file.
    """
    listed = False
    if isinstance(root, (str, Path)):
        text = str(root)
        if text.startswith("pipe:"):
            urls = [text]
        elif scheme_of(text) == "file" and Path(text).is_dir():
            urls = [str(path) for path in sorted(Path(text).glob("*.tar")) if path.is_file()]
        elif text.endswith(".txt") and scheme_of(text) == "file":
            lines = [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines()]
            urls, listed = [line for line in lines if line and not line.startswith("#")], True
        else:
            import_webdataset()
            with needs("braceexpand", f"{{..}} in {text}", extra="stream"):
                import braceexpand

            parts = (braceexpand.braceexpand(part) for part in text.split("::"))
            urls = list(itertools.islice(itertools.chain.from_iterable(parts), _MAX_SHARDS + 1))
    else:
        urls = [str(url) for url in root]
    if not urls or len(urls) > _MAX_SHARDS:
        raise ValueError(f"{root} names {len(urls)} shards, between 1 and {_MAX_SHARDS} are needed")
    for url in urls:
        scheme = scheme_of(url)
        if scheme == "pipe" and not allow_pipe:
            raise ValueError(
                f"{url[:80]} is a command: commands are run only with stream.allow_pipe=true, and without a shell"
            )
        if not listed and scheme in ("http", "https") and unsigned(url) != url:
            raise ValueError(
                f"{shown(url)} is signed, and data.source.root is stored with every checkpoint: "
                "write signed URLs into a .txt file, one per line, and name that file"
            )
    return urls


def import_webdataset() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is missing; the extra to install is named.
    """
    with needs("webdataset", "data.order=streaming", extra="stream"):
        import webdataset
    return webdataset
