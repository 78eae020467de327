"""Errors that are written for the user: one line that says what was given, what is allowed and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingPackageError", "OtherRankError", "SettingsError", "ZigflowError", "needs"]


class ZigflowError(Exception):
    """Base of all errors of this package and of its plug-ins; the commands print their message and no traceback.

    ``scans`` and ``dis_*`` are usable alone, so ``UnknownScanError`` and ``NativeError`` do not inherit from it.
    ``Stopped`` does not either: no handler of errors may take a signal for one.
    """


class SettingsError(ZigflowError, ValueError):
    """A configuration that cannot run; the message is one line."""


class OtherRankError(ZigflowError, RuntimeError):
    """Another process of the run failed; its own message is in its own output."""


class MissingPackageError(ZigflowError, ImportError):
    """A package that only a part of zigflow needs is not installed; the message has the command that installs it."""


@contextmanager
def needs(package: str, what: str, extra: str | None = None) -> Iterator[None]:
    """Around the import of a package that only ``what`` needs.

    Args:
        package: its name on the package index.
        what: what was asked for, as it is typed: "use_wandb=true".
        extra: the extra of zigflow that has the package in its range; None where the package itself is named.

    Raises:
        MissingPackageError: the import failed.
    """
    try:
        yield
    except ImportError as error:
        wanted = f"'zigflow[{extra}]'" if extra else package
        # One that is there lacks a package of its own or is broken, which then is the news.
        why = f", which is installed and cannot be imported ({error})" if _is_installed(package) else ""
        raise MissingPackageError(f"{what} needs {package}{why}: pip install {wanted}") from error


def _is_installed(package: str) -> bool:
    from importlib import metadata

    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
