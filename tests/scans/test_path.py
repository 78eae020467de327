"""ScanPath: the checks, the three words order / inverse / reversed, and value semantics."""

import copy
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scans import ScanPath
from tests.scans.properties import quick

permutations = st.integers(1, 30).flatmap(lambda n: st.permutations(range(n)))


def pairs_of_permutations():
    return st.integers(1, 20).flatmap(
        lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))
    )


@pytest.mark.parametrize(
    "order, error, words",
    [
        ([0, 1, 1, 3], ValueError, ["more than once: 1", "steps 1, 2", "never visited: 2"]),
        ([0, 1, 2, 4], ValueError, ["out of range 4 at step 3", "0..3", "never visited: 3"]),
        ([0, -1, 1], ValueError, ["out of range -1 at step 1", "never visited: 2"]),
        ([[0, 1]], ValueError, ["one-dimensional", r"\(1, 2\)"]),
        ([], ValueError, ["non-empty"]),
        ([0.0, 1.0], TypeError, ["integers", "float64"]),
        ([True, False], TypeError, ["integers", "bool"]),
        (np.array([0, 2**64 - 1], dtype=np.uint64), ValueError, ["out of range"]),
        (np.zeros(100, dtype=int), ValueError, ["100 in all", "99 in all"]),
    ],
)
def test_a_bad_order_is_described(order, error, words):
    with pytest.raises(error) as caught:
        ScanPath(order, name="peano")
    message = str(caught.value)
    assert "'peano'" in message
    for word in words:
        assert re.search(word, message), f"{word!r} not in {message!r}"


def test_shape_must_fit():
    with pytest.raises(ValueError, match=r"6 tokens.*\(2, 2\) has 4"):
        ScanPath(range(6), shape=(2, 2))


@quick
@given(permutations)
def test_inverse_reversed_inverted(order):
    path = ScanPath(order)
    n = len(order)
    np.testing.assert_array_equal(path.inverse, np.argsort(order))
    np.testing.assert_array_equal(path.reversed().order, order[::-1])
    np.testing.assert_array_equal(path.inverted().order, path.inverse)
    assert path.reversed().reversed() == path
    assert path.inverted().inverted() == path
    assert path.then(path.inverted()).is_identity
    assert path.inverted().then(path).is_identity
    assert path.is_identity == (list(order) == list(range(n)))
    assert len(path) == n


@quick
@given(pairs_of_permutations())
def test_then_is_two_gathers(orders):
    one, two = map(ScanPath, orders)
    x = np.random.default_rng(0).standard_normal(len(one))
    both = one.then(two)
    np.testing.assert_array_equal(x[both.order], x[one.order][two.order])
    np.testing.assert_array_equal(x[both.order][both.inverse], x)


def test_the_three_words_differ():
    path = ScanPath([1, 2, 0, 3])
    assert path.reversed() != path.inverted() != path != path.reversed()


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 tokens and .*'b' has 4"):
        ScanPath(range(3), name="a").then(ScanPath(range(4), name="b"))


def test_equality_and_hash_follow_the_order():
    path = ScanPath([2, 0, 1, 3], name="a", shape=(2, 2))
    assert path == ScanPath(np.array([2, 0, 1, 3], dtype=np.uint8), name="b")
    assert len({path, ScanPath([2, 0, 1, 3]), ScanPath([0, 1, 2, 3])}) == 2
    assert path != "a"


def test_the_given_array_is_copied():
    order = np.array([1, 0, 2])
    path = ScanPath(order)
    order[:] = 0
    np.testing.assert_array_equal(path.order, [1, 0, 2])


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_equal_and_read_only(again):
    path = ScanPath([2, 0, 1, 3], name="a", shape=(2, 2))
    other = again(path)
    assert other == path
    assert hash(other) == hash(path)
    assert (other.name, other.shape) == ("a", (2, 2))
    assert not other.order.flags.writeable
    assert not other.inverse.flags.writeable


def test_frozen():
    with pytest.raises(AttributeError):
        ScanPath([0, 1]).name = "x"
