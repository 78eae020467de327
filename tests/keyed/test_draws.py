"""What a draw depends on, and what it must not depend on."""

import hashlib
import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zigflow.keyed import KeyedDraws, checkpoint_contexts, current_draws, keyed_permutation, keyed_seed

KINDS = {
    "uniform": lambda draws, shape, **kw: draws.uniform("p", shape, **kw),
    "normal": lambda draws, shape, **kw: draws.normal("p", shape, **kw),
    "integers": lambda draws, shape, **kw: draws.integers("p", 1000, shape, **kw),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.tensor([0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1])


@every_kind
@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9),
    cut=st.integers(0, 9),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    seed=st.integers(-(2**70), 2**70),
)
def test_any_split_of_a_batch_gives_the_same_rows(kind, ids, cut, shape, seed):
    draw, tensor = KINDS[kind], torch.tensor(ids)
    whole = draw(KeyedDraws(seed, tensor), shape)
    assert whole.shape == (len(ids), *shape)
    parts = [draw(KeyedDraws(seed, part), shape) for part in (tensor[:cut], tensor[cut:])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), draw(KeyedDraws(seed, tensor.flip(0)), shape))


@every_kind
def test_elements_are_numbered_in_row_major_order(kind):
    draw, draws = KINDS[kind], KeyedDraws(3, IDS)
    long = draw(draws, (60,))
    assert torch.equal(draw(draws, (17,)), long[:, :17])
    assert torch.equal(draw(draws, (3, 4, 5)), long.reshape(-1, 3, 4, 5))
    assert torch.equal(draw(draws, ()), long[:, 0])
    assert draw(draws, (0, 3)).shape == (len(IDS), 0, 3)
    assert draw(KeyedDraws(3, IDS[:0]), (4,)).shape == (0, 4)


def test_large_draws_equal_small_ones():
    one, many = KeyedDraws(1, torch.arange(1)), KeyedDraws(1, torch.arange(40))
    assert torch.equal(many.normal("n", (3000,))[:1], one.normal("n", (3000,)))


@every_kind
def test_every_part_of_the_key_counts(kind):
    draw = KINDS[kind]
    base = draw(KeyedDraws(3, IDS), (8,))
    others = {
        "seed": draw(KeyedDraws(4, IDS), (8,)),
        "negative seed": draw(KeyedDraws(-3, IDS), (8,)),
        "step": draw(KeyedDraws(3, IDS, step=1), (8,)),
        "id": draw(KeyedDraws(3, IDS - 1 * (IDS > 0)), (8,)),
        "high half of the id": draw(KeyedDraws(3, IDS[:3] + 2**32), (8,)),
    }
    for name, other in others.items():
        rows = other[: len(base)]
        same = (rows == base[: len(rows)]).all(dim=1)
        # id 0 has no predecessor above.
        assert same.sum() <= (1 if name == "id" else 0), name


def test_purposes_and_kinds_are_independent():
    draws = KeyedDraws(0, torch.arange(2000))
    columns = [draws.uniform("a"), draws.uniform("b"), draws.normal("a"), draws.integers("a", 2**31).double()]
    table = np.corrcoef(np.stack([column.double().numpy() for column in columns]))
    assert np.abs(table - np.eye(4)).max() < 5 / math.sqrt(2000)


def test_stored_values():
    """A change of these values would silently change every run that is resumed or sampled again."""
    draws = KeyedDraws(42, torch.tensor([0, 1, 2**40]), step=5)
    parts = [draws.uniform("x", (50,)), draws.normal("x", (50,)), draws.integers("x", 10**6, (50,))]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    assert digest[:32] == "be70031693ffe2f82d8610bda02f062a"
    assert keyed_seed(42, "loader", 3) == 7763077987188957190
    assert keyed_permutation(10, 42, "shards", 1).tolist() == [5, 2, 4, 3, 9, 1, 7, 0, 8, 6]


@pytest.mark.parametrize("kind, mean, std", [("uniform", 0.5, 12**-0.5), ("normal", 0.0, 1.0)])
def test_moments(kind, mean, std):
    values = KINDS[kind](KeyedDraws(7, torch.arange(500)), (400,)).double()
    count = values.numel()
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(count)
    assert abs(values.std() - std) < 5 * std / math.sqrt(count)
    for left, right in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        correlation = np.corrcoef(left.flatten().numpy(), right.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(left.numel())


def test_uniforms_stay_below_one_and_on_their_grid():
    values = KeyedDraws(0, torch.arange(1000)).uniform("u", (100,))
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round())


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000, 2**31])
def test_integers_cover_their_range_evenly(high):
    values = KeyedDraws(0, torch.arange(1000)).integers("i", high, (20,)).flatten()
    assert values.min() >= 0
    assert values.max() < high
    if high <= 10:
        counts = torch.bincount(values, minlength=high).double()
        expected = len(values) / high
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    else:
        assert abs(values.double().mean() / high - 0.5) < 5 * 12**-0.5 / math.sqrt(len(values))


@pytest.mark.parametrize(
    "ids, error",
    [
        (torch.tensor([3, -1]), ValueError),
        (torch.tensor([1.0]), TypeError),
        (torch.tensor([1], dtype=torch.int32), TypeError),
        (torch.tensor([[1]]), TypeError),
        ([1, 2], TypeError),
    ],
)
def test_bad_ids(ids, error):
    with pytest.raises(error, match="ids"):
        KeyedDraws(0, ids)


def test_bad_numbers():
    draws = KeyedDraws(0, torch.arange(2))
    for step in (-1, 2**32):
        with pytest.raises(ValueError, match="step"):
            KeyedDraws(0, torch.arange(2), step)
        with pytest.raises(ValueError, match="step"):
            draws.uniform("p", step=step)
    for high in (0, 2**31 + 1):
        with pytest.raises(ValueError, match="high"):
            draws.integers("p", high)
    with pytest.raises(ValueError, match=r"2\*\*34"):
        draws.uniform("p", (2**34 + 1,))
    with pytest.raises(TypeError, match="seed"):
        KeyedDraws(1.5, torch.arange(2))
    with pytest.raises(TypeError, match="step"):
        KeyedDraws(0, torch.arange(2), 1.5)


def test_select_keeps_rows():
    draws = KeyedDraws(0, torch.arange(10), step=3)
    values = draws.normal("n", (4,))
    for index in (slice(2, 5), torch.arange(10) % 2 == 0, torch.tensor([7, 1])):
        assert torch.equal(draws.select(index).normal("n", (4,)), values[index])
    with pytest.raises(ValueError, match="keeps rows"):
        draws.select(3)


def test_drawing_leaves_torch_alone():
    before = torch.random.get_rng_state()
    draws = KeyedDraws(0, torch.arange(10))
    draws.normal("n", (4,)), draws.uniform("u"), draws.integers("i", 5), keyed_permutation(50, 0, "p")
    assert torch.equal(before, torch.random.get_rng_state())


def test_ambient_draws_nest_and_end():
    outer, inner = KeyedDraws(0, torch.arange(2)), KeyedDraws(1, torch.arange(2))
    assert current_draws() is None
    with outer.active():
        with inner.active() as given_back:
            assert current_draws() is inner is given_back
        assert current_draws() is outer
        with pytest.raises(RuntimeError), inner.active():
            raise RuntimeError
        assert current_draws() is outer
    assert current_draws() is None


def on_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_context_carries_the_draws_to_another_thread():
    draws, seen = KeyedDraws(0, torch.arange(2)), []

    def recompute():
        seen.append(current_draws())
        for _ in range(2):
            with context:
                seen.append(current_draws())
            seen.append(current_draws())

    with draws.active():
        _, context = checkpoint_contexts()
        on_a_thread(recompute)
    assert seen == [None, draws, None, draws, None]


@pytest.mark.slow
def test_a_checkpointed_block_is_recomputed_with_the_draws_of_its_forward():
    from torch.utils.checkpoint import checkpoint

    draws, seen = KeyedDraws(0, torch.arange(2)), []

    def block(x):
        seen.append(current_draws())
        return torch.sin(x) * 2

    x = torch.ones(3, requires_grad=True)
    with draws.active():
        y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)
    on_a_thread(lambda: y.sum().backward())
    assert seen == [draws, draws]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 300), seed=st.integers(0, 2**40), key=st.integers(0, 9))
def test_permutations(n, seed, key):
    order = keyed_permutation(n, seed, "p", key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, keyed_permutation(n, seed, "p", key))
    if n > 30:
        for other in ((seed + 1, "p", key), (seed, "q", key), (seed, "p", key + 1), (seed, "p", str(key))):
            assert not np.array_equal(order, keyed_permutation(n, *other))


def test_permutations_are_uniform():
    counts = np.zeros((6, 6))
    for key in range(3000):
        counts[np.arange(6), keyed_permutation(6, 0, "uniform", key)] += 1
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500)
    with pytest.raises(ValueError, match="n >= 0"):
        keyed_permutation(-1, 0, "p")


def test_keys_are_told_apart():
    seeds = {
        keyed_seed(0, *keys) for keys in [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", "2"), ()]
    }
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(TypeError, match="integers and strings"):
        keyed_seed(0, 1.5)


@pytest.mark.slow
def test_other_processes_and_thread_counts_agree():
    code = (
        "import torch; from zigflow.keyed import KeyedDraws; torch.set_num_threads({n});"
        "import hashlib; d = KeyedDraws(1, torch.arange(300));"
        "print(hashlib.sha256(d.normal('n', (777,)).numpy().tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.format(n=n)], capture_output=True, text=True, check=True
        ).stdout
        for n in (1, 2)
    }
    assert len(digests) == 1
