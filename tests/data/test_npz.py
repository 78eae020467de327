"""npz archives within budgets: what numpy writes comes back, damage and bombs are errors that name the file."""

import zipfile

import numpy as np
import pytest

from zigflow.data.decode import DecodeError, Limits
from zigflow.data.npz import read_npz


def test_only_what_was_asked_for_is_looked_at(tmp_path):
    path = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, z=np.arange(6.0).reshape(2, 3), label=np.int64(4), evil=np.array([print], dtype=object))
        found = read_npz(path, ("z", "label"))
        np.testing.assert_array_equal(found["z"], np.arange(6.0).reshape(2, 3))
        assert (set(found), found["label"].shape, int(found["label"])) == ({"z", "label"}, (), 4)


def test_what_cannot_be_read_names_the_file(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        read_npz(path, ("z",))
    np.savez(path, z=np.zeros(400))
    whole = path.read_bytes()
    cases = {
        "no readable npz": whole[:-30],
        "no readable npz archive": b"none",
        "no readable npz archive: BadZipFile": whole.replace(bytes(64), b"x" * 64, 1),
    }
    for match, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(DecodeError, match=match) as error:
            read_npz(path, ("z",))
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    with pytest.raises(DecodeError, match=r"has no y and no x; it holds \['z'\]"):
        read_npz(path, ("y", "x", "z"))
    np.savez(path, z=np.array([print], dtype=object))
    with pytest.raises(DecodeError, match="type object"):
        read_npz(path, ("z",))


def test_a_small_file_that_unfolds_is_stopped(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z.npy", bytes(1 << 24))
    with pytest.raises(DecodeError, match="more than 65536 bytes"):
        read_npz(path, ("z",), Limits(max_bytes=1 << 16))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("z.npy", b"x")
    with pytest.raises(DecodeError, match="numpy does not write"):
        read_npz(path, ("z",))
