"""Pickled numpy pairs without unpickling: what numpy writes comes back, everything else is refused by name."""

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from zigflow.data.decode import DecodeError, Limits
from zigflow.data.object_arrays import decode_objects

HEADER = b"\x93NUMPY\x01\x00v\x00"


def header(count=2):
    text = f"{{'descr': '|O', 'fortran_order': False, 'shape': ({count},), }}"
    return HEADER + text.ljust(117).encode() + b"\n"


def saved(items, protocol=4, module=None):
    """What ``numpy.save`` writes of a tuple; ``protocol=3`` is what numpy 1 wrote."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    data = pickle.dumps(array, protocol=protocol)
    # numpy 1 called its package numpy.core; in protocol 4 the name stands behind its length.
    if module is not None:
        new, old = module.encode(), b"numpy._core.multiarray"
        data = data.replace(bytes([len(old)]) + old, bytes([len(new)]) + new).replace(
            old + b"\n", new + b"\n"
        )
    if protocol == 4 and module is not None:
        data = data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]
    return header(len(items)) + data


NUMBERS = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).flatmap(
    lambda shape: st.sampled_from(["<f4", "<f8", ">f4", "<f2", "<i8", "<u2", "|u1", "|b1"]).flatmap(
        lambda dtype: arrays.arrays(dtype, shape)
    )
)
ITEMS = st.one_of(
    NUMBERS,
    NUMBERS.map(np.asfortranarray),
    st.integers(-(2**62), 2**62).map(np.int64),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(max_size=20),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ITEMS, min_size=1, max_size=3), st.sampled_from([3, 4]))
def test_what_numpy_writes_comes_back(items, protocol):
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    found = decode_objects(header(len(items)) + pickle.dumps(array, protocol=protocol))
    assert len(found) == len(items)
    for item, value in zip(items, found, strict=True):
        if isinstance(item, str):
            assert value == item
        else:
            assert isinstance(value, np.ndarray)
            np.testing.assert_array_equal(value, np.asarray(item))
            assert value.dtype == np.asarray(item).dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [None, "numpy.core.multiarray"])
def test_the_names_of_both_generations_of_numpy(protocol, module):
    moments = np.arange(16, dtype=np.float32).reshape(4, 2, 2)
    data = saved((moments, np.int64(7)), protocol, module)
    assert (b"numpy.core." in data) == (module is not None)
    first, label = decode_objects(data)
    np.testing.assert_array_equal(first, moments)
    assert (label.dtype, label.shape, label) == (np.int64, (), 7)
    loaded = np.load(io.BytesIO(data), allow_pickle=True)
    np.testing.assert_array_equal(loaded[0], first)


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def pair(item, protocol=4):
    return saved((np.zeros(2, np.float32), item), protocol)


def assembled(body):
    """A pickle of protocol 3 from its operations."""
    return header() + b"\x80\x03" + body + b"."


HUGE = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
FLOAT = (
    b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R"
    + b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
HOSTILE = {
    "a call of os.system": (pair(Calls(os.system, "touch PWNED")), r"posix\.system|nt\.system"),
    "the same, protocol 3": (pair(Calls(os.system, "touch PWNED"), 3), r"posix\.system|nt\.system"),
    "eval": (pair(Calls(eval, "open('PWNED', 'w')")), r"builtins\.eval"),
    "a class of another package": (pair(io.BytesIO()), r"_io\.BytesIO"),
    "a numpy function that loads": (assembled(b"cnumpy\nload\nX\x05\x00\x00\x00PWNED\x85R"), r"numpy\.load"),
    "a hidden attribute": (assembled(b"cnumpy.core.multiarray\n__builtins__\n"), "__builtins__"),
    "a dictionary": (pair({"a": 1}), "EMPTY_DICT"),
    "a set": (pair({1}), "EMPTY_SET"),
    "an instance by the old operation": (assembled(b"(ios\nsystem\n"), "INST"),
    "a persistent name": (assembled(b"Pabc\n"), "PERSID"),
    "an extension code": (assembled(b"\x82\x01"), "EXT1"),
    "an array of objects within": (pair(np.array([None, 1], dtype=object)), "an array of objects inside"),
    "a list": (pair([1, 2]), "a list inside"),
    "a structured array": (pair(np.zeros(2, dtype=[("a", "f4")])), "not known|not admitted"),
    "complex numbers": (pair(np.zeros(2, np.complex64)), "c8 inside"),
    "dates": (pair(np.zeros(2, "M8[s]")), "not known|not admitted"),
    "numbers without end": (pair(2**2000), "64 bits"),
    "no array at all": (header() + pickle.dumps("text", protocol=4), "no array of objects"),
    "a declared terabyte": (
        assembled(HUGE + b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01\x85" + FLOAT + b"\x89C\x04abcdtb"),
        r"declares 4398046511104 bytes of data, 4 are there",
    ),
    "a negative shape": (assembled(HUGE + b"(K\x01J\xff\xff\xff\xff\x85" + FLOAT + b"\x89C\x04abcdtb"), "shape"),
    "too many operations": (assembled(b"N0" * 6000), "POP|operations"),
    "many marks": (assembled(b"(" * 20_000), "more than 10000 operations"),
    "text behind the end": (pair(np.int64(1)) + b"x", "1 bytes follow"),
    "an unknown place in the memo": (assembled(b"h\x07"), "damaged pickle"),
    "nothing": (header(), "damaged pickle"),
    "another count": (header(3) + saved((1, 2))[128:], r"declares shape \(3,\), there are 2"),
    "protocol 0": (header() + pickle.dumps(np.array([1, "a"], dtype=object), protocol=0), "not admitted|damaged|holds"),
    "protocol 5": (header() + pickle.dumps(np.array([1, np.zeros(2)], dtype=object), protocol=5), "_frombuffer"),
    "numbers": (header().replace(b"'|O'", b"'<f4'"), "array of objects is needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_everything_else_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, match = HOSTILE[name]
    with pytest.raises(DecodeError, match=match):
        decode_objects(data)
    assert not any(tmp_path.iterdir()), "nothing was executed"


def test_every_cut_is_an_error():
    data = saved((np.zeros((8, 2, 2), np.float32), np.int64(3)))
    for end in range(len(data)):
        with pytest.raises(DecodeError):
            decode_objects(data[:end])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_are_an_error_or_other_values(data):
    content = bytearray(
        saved((np.zeros((2, 2, 2), np.float32), np.int64(3)), data.draw(st.sampled_from([3, 4])))
    )
    for place in data.draw(st.lists(st.integers(128, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        items = decode_objects(bytes(content))
    except DecodeError:
        return
    assert all(
        isinstance(item, (str, np.ndarray)) and not getattr(item, "dtype", np.dtype("i1")).hasobject
        for item in items
    )


def test_memory_is_bounded():
    shared = b"C\xff" + bytes(255) + b"q\x01"
    one = HUGE + b"(K\x01M\xff\x00\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R\x89h\x01tb"
    bomb = assembled(b"(" + shared + one * 600)
    limits = Limits(max_bytes=1 << 16)
    with pytest.raises(DecodeError, match="together|budget"):
        decode_objects(bomb, limits)
    for place in (b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f"):
        tracemalloc.start()
        with pytest.raises(DecodeError):
            decode_objects(assembled(b"K\x01" + place))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    for wide in (b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f"):
        tracemalloc.start()
        with pytest.raises(DecodeError, match="damaged"):
            decode_objects(assembled(wide))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    with pytest.raises(DecodeError, match="the budget is 65536"):
        decode_objects(bytes(1 << 17), limits)
    with pytest.raises(DecodeError, match="characters of text"):
        decode_objects(pair("x" * 2_000_000))
