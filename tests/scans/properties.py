"""Settings of the property tests: the same examples in every run, and no deadline on a busy machine."""

from hypothesis import settings

quick = settings(max_examples=30, deadline=None, derandomize=True)
