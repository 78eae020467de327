"""Slices of the global batch, for every number of processes and micro-steps."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zigflow.data.global_batch import GlobalBatch, GlobalBatchSampler, split_global_batch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 50))
def test_ranks_and_micro_steps_tile_the_step(world, accum, local, step):
    size = world * accum * local
    seen = []
    for micro, rank in itertools.product(range(accum), range(world)):
        part = GlobalBatch(size, world, rank, accum)
        assert part.local_size == local
        seen += part.positions(step, micro)
    assert seen == list(range(step * size, (step + 1) * size))


def test_a_sampler_started_late_is_the_tail():
    batch = GlobalBatch(12, 2, 1, 3)
    whole = list(GlobalBatchSampler(batch, 0, 6))
    assert len(whole) == len(GlobalBatchSampler(batch, 0, 6)) == 18
    for start in range(7):
        assert list(GlobalBatchSampler(batch, start, 6)) == whole[start * 3 :]
    endless = GlobalBatchSampler(batch, 10**9)
    assert next(iter(endless)) == list(batch.positions(10**9, 0))
    with pytest.raises(TypeError, match="length"):
        len(endless)
    for bad in ((-1, None), (3, 2)):
        with pytest.raises(ValueError, match="steps"):
            GlobalBatchSampler(batch, *bad)


def test_sizes_that_do_not_divide_come_with_numbers():
    with pytest.raises(ValueError, match=r"128 .* 3 processes x 1 .* = 3 parts; 126 or 129 would"):
        GlobalBatch(128, 3)
    with pytest.raises(ValueError, match="= 8 parts; 8 would"):
        GlobalBatch(4, 2, 0, 4)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1"):
        GlobalBatch(4, 2, 2)
    with pytest.raises(ValueError, match="at least 1"):
        GlobalBatch(0)
    with pytest.raises(ValueError, match="no micro-step 2 of 2"):
        GlobalBatch(4, 1, 0, 2).positions(0, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 64))
def test_splitting_for_another_world_size(size, world, limit):
    if size % world:
        with pytest.raises(ValueError, match=f"global batch of {size} does not divide by {world}") as refused:
            split_global_batch(size, world, limit)
        works = refused.value.args[0].rsplit(": ", 1)[1]
        assert all(size % int(n) == 0 for n in works.split(", "))
        return
    local, accum = split_global_batch(size, world, limit)
    assert local * accum * world == size
    assert local <= limit
    share = size // world
    assert all(share % n for n in range(local + 1, min(limit, share) + 1)), "a larger local batch divides"
    assert GlobalBatch(size, world, world - 1, accum).local_size == local
