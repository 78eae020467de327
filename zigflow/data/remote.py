"""Opening what a URL names, piece by piece: http(s), s3, and commands where they are allowed. Never a shell.

The library's own opener (``webdataset.gopen``) passes URLs to a shell; none of it is used.
"""

import contextlib
import http.client
import importlib
import re
import select
import shlex
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib import error as url_errors
from urllib import request as url_requests
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from zigflow.errors import ZigflowError, needs
from zigflow.registry import unknown_name

_PIECE = 1 << 16
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_SIGNATURES = re.compile(
    r"^(x-amz-.*|x-goog-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|token|"
    r"sig|se|sp|sv|sr|st|spr|access_token)$",
    re.IGNORECASE,
)
SCHEMES = ("http", "https", "s3", "file")


class TransientError(ZigflowError):
    """A failure that may pass: worth another attempt."""


class PermanentError(ZigflowError):
    """A failure that another attempt would not change."""


@dataclass(frozen=True)
class Part:
    """An open stream of bytes.

    Attributes:
        start: offset of its first byte; 0 where the other side does not continue.
        total: bytes of the whole, None when unknown.
        tag: tells one version of the contents from another, "" when unknown.
        read: the next bytes, at least one unless it has ended.
    """

    start: int
    total: int | None
    tag: str
    read: Callable[[], bytes]


def scheme_of(url: str) -> str:
    """``http``, ``https``, ``s3``, ``pipe``, or ``file`` for a local path.

    Raises:
        ValueError: another scheme, or a URL that carries a password.
    """
    if url.startswith("pipe:"):
        return "pipe"
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+):", url)
    if match is None:
        return "file"
    scheme = match.group(1).lower()
    if scheme not in SCHEMES:
        raise unknown_name("URL scheme", scheme, list(SCHEMES))
    if "@" in urlsplit(url).netloc:
        raise ValueError(f"{shown(url)} carries a user name or password: use a signed URL in a list file")
    return scheme


def unsigned(url: str) -> str:
    """The URL without the parts that sign it, which change and must not be stored."""
    if scheme_of(url) not in ("http", "https"):
        return url
    parts = urlsplit(url)
    kept = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNATURES.match(pair[0])]
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(kept), ""))


def shown(url: str) -> str:
    """The URL as it may stand in a log: no query, no user name."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_part(
    url: str, start: int, tag: str, timeout: float, allow_pipe: bool = False
) -> AbstractContextManager[Part]:
    """Open ``url`` at ``start`` if its contents still have ``tag``, else at 0.

    Raises:
        TransientError: another attempt may succeed (also while the part is read).
        PermanentError: it will not.
        MissingPackageError: s3 without its package.
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        if not allow_pipe:
            raise PermanentError("it is a command, and stream.allow_pipe is false")
        return _open_command(url.removeprefix("pipe:"), timeout)
    return _open_s3(url, start, tag) if scheme == "s3" else _open_http(url, start, tag, timeout)


class _SafeRedirects(url_requests.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and never from https to http."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise PermanentError(f"a redirect from {old} to {new or 'nowhere'} is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> url_requests.OpenerDirector:
    """An opener that knows http and https alone: neither ftp nor files."""
    opener = url_requests.OpenerDirector()
    handlers = (
        url_requests.ProxyHandler(),
        url_requests.HTTPHandler(),
        url_requests.HTTPSHandler(context=ssl.create_default_context()),
        _SafeRedirects(),
        url_requests.HTTPDefaultErrorHandler(),
        url_requests.HTTPErrorProcessor(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


@contextmanager
def _open_http(url: str, start: int, tag: str, timeout: float) -> Iterator[Part]:
    headers = {"Accept-Encoding": "identity", "User-Agent": "zigflow"}
    if start and tag:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    try:
        response = _opener().open(url_requests.Request(url, headers=headers), timeout=timeout)
    except url_errors.HTTPError as error:
        error.close()
        kind = TransientError if error.code in _AGAIN or error.code == 416 else PermanentError
        raise kind(f"the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from None
    with response:

        def read() -> bytes:
            try:
                return response.read1(_PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise TransientError(f"{type(error).__name__}: {error}") from None

        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else None
        strong = response.headers.get("ETag", "")
        found = response.headers.get("Last-Modified", "") if strong[:2] in ("", "W/") else strong
        if response.status == 206:
            match = re.match(r"^bytes (\d+)-\d+/(\d+)$", response.headers.get("Content-Range", ""))
            if match is None or int(match.group(1)) != start:
                raise TransientError(f"the server sends another range than the one from {start}")
            yield Part(start, int(match.group(2)), found, read)
        else:
            yield Part(0, total, found, read)


@contextmanager
def _open_s3(url: str, start: int, tag: str) -> Iterator[Part]:
    """Through s3fs, which takes keys from where its own documentation says, never from a URL."""
    with needs("s3fs", f"{url} (unlike a signed https URL)", extra="s3"):
        s3fs: Any = importlib.import_module("s3fs")
    system = s3fs.S3FileSystem()
    # s3fs turns most failures into OSError and lets some of its libraries' own pass.
    try:
        info = system.info(url)
        found = str(info.get("ETag", ""))
        begin = start if tag and tag == found else 0
        file = system.open(url, "rb")
        file.seek(begin)
    except (FileNotFoundError, PermissionError) as error:
        raise PermanentError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error

    def read() -> bytes:
        try:
            return file.read(1 << 20)
        except Exception as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error

    with contextlib.closing(file):
        yield Part(begin, int(info["size"]), found, read)


@contextmanager
def _open_command(command: str, timeout: float) -> Iterator[Part]:
    """What a command writes. It is split into words and run as it stands: no shell, no expansion."""
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        )
    except (OSError, ValueError) as error:
        raise PermanentError(f"the command cannot be run: {error}") from error
    stdout = process.stdout
    assert stdout is not None

    def read() -> bytes:
        if not select.select([stdout], [], [], timeout)[0]:
            raise TransientError(f"the command wrote nothing for {timeout} s")
        piece = stdout.read(_PIECE)
        if not piece and process.wait(timeout):
            raise TransientError(f"the command failed with exit code {process.returncode}")
        return piece

    try:
        yield Part(0, None, "", read)
    finally:
        process.kill()
        process.wait()
        stdout.close()
