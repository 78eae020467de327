"""Transformers with their parameters in shards (fully_shard, two processes over gloo)."""

import pytest

from tests.workers import run_two


@pytest.mark.slow
def test_sharded_transformers_equal_whole_ones():
    run_two("tests.models.shard_worker")
