"""Arrays out of npz archives, within fixed budgets."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .decode import DEFAULT_LIMITS, DecodeError, Limits, decode_npy

_MAX_MEMBERS = 64


def read_npz(
    path: str | Path, names: Sequence[str], limits: Limits = DEFAULT_LIMITS
) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an npz archive; others in it are not looked at, nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        DecodeError: no archive, an array is missing, damaged, or over budget; the file is named.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()[:_MAX_MEMBERS]}
            missing = [name for name in names if name not in members]
            if missing:
                raise DecodeError(f"it has no {' and no '.join(missing)}; it holds {sorted(members)[:8]}")
            out = {}
            for name in names:
                if members[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DecodeError(f"{name} is compressed in a way that numpy does not write")
                with archive.open(members[name]) as member:
                    # One byte more than allowed: what a header says of its size need not be true.
                    data = member.read(limits.max_bytes + 1)
                if len(data) > limits.max_bytes:
                    raise DecodeError(f"{name} has more than {limits.max_bytes} bytes, which is the budget")
                out[name] = decode_npy(data, limits)
            return out
    except FileNotFoundError:
        raise
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from error
    # Damage shows as errors of zipfile, of zlib and of the decompressors that it calls.
    except Exception as error:
        raise DecodeError(f"{path} is no readable npz archive: {type(error).__name__}: {error}") from error
