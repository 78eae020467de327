"""Compiled and chunked kernels against the definitions in float64, of any shape and dtype; what they keep."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from dis_causal_conv1d import causal_conv1d
from dis_mamba import selective_scan

from .definitions import conv_arguments, conv_definition, scan_arguments, scan_definition
from .operators import compare, needs_compiler, saved_bytes

# Of the largest value, output and gradients; bfloat16 rounds what was computed in float32, once, by 2^-8 at most.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 4e-3), torch.float64: (1e-12, 1e-11)}

# The cpu kernels are compiled for several vector widths and have more cases; the torch ones are slower to try.
backends = pytest.mark.parametrize(
    "backend,most", [pytest.param("cpu", (19, 70, 40, 21), marks=needs_compiler), ("torch", (3, 140, 20, 9))]
)
either = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiler), "torch"])
few = hypothesis.settings(max_examples=25)


@backends
@few
@hypothesis.given(data=st.data(), dtype=st.sampled_from(list(LIMITS)), reverse=st.booleans())
def test_scans_of_any_shape(backend, most, data, dtype, reverse):
    sizes = data.draw(st.tuples(*(st.integers(1, size) for size in most)), "B, L, E, N")
    options = data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias"])), "options")
    arguments = scan_arguments(*sizes, dtype=dtype, options=tuple(options), seed=sum(sizes))
    compare(
        functools.partial(selective_scan, backend=backend),
        scan_definition,
        arguments,
        LIMITS[dtype],
        delta_softplus=True,
        reverse=reverse,
    )


@backends
@few
@hypothesis.given(
    data=st.data(),
    dtype=st.sampled_from(list(LIMITS)),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    reverse=st.booleans(),
)
def test_convolutions_of_any_shape(backend, most, data, dtype, bias, activation, reverse):
    sizes = data.draw(st.tuples(*(st.integers(1, size) for size in (*most[:3], 6))), "B, L, E, W")
    arguments = conv_arguments(*sizes, dtype=dtype, bias=bias, seed=sum(sizes))
    compare(
        functools.partial(causal_conv1d, backend=backend),
        conv_definition,
        arguments,
        LIMITS[dtype],
        activation=activation,
        reverse=reverse,
    )


@either
@pytest.mark.parametrize("L", [16, 32, 33, 65, 256])
@pytest.mark.parametrize("dtype,chunk", [(torch.float32, 32), (torch.bfloat16, 64), (torch.float64, 32)])
def test_the_scan_keeps_at_most_half_an_activation(backend, dtype, chunk, L):
    scan = functools.partial(selective_scan, backend=backend, delta_softplus=True)
    kept = saved_bytes(scan, scan_arguments(2, L, 24, 16, dtype=dtype))
    assert kept <= dtype.itemsize * 2 * L * 24 / 2
    assert kept == max(4, dtype.itemsize) * 2 * (-(-L // chunk) - 1) * 24 * 16


@either
def test_the_convolution_keeps_nothing_beside_its_arguments(backend):
    conv = functools.partial(causal_conv1d, backend=backend, activation="silu")
    assert saved_bytes(conv, conv_arguments(2, 32, 24, 4)) == 0
