"""The Triton kernels without a GPU: interpreted against the definitions, and compiled for GPUs that are not here."""

import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dis_causal_conv1d
import dis_mamba
from dis_causal_conv1d.backends import triton_conv
from dis_causal_conv1d.backends.call import ConvCall
from dis_kernels.tokenwise import add_norm_modulate, gated_add, triton_tokenwise
from dis_kernels.tokenwise.call import ReadCall, WriteCall
from dis_mamba import selective_scan
from dis_mamba.backends import triton_scan
from dis_mamba.backends.call import ScanCall

from .definitions import scan_arguments, with_gradients
from .tokenwise.definitions import a_walk, read_arguments, write_arguments

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

TABLE = ROOT / "benchmarks/results/triton_compile.json"
REFRESH = f"python benchmarks/triton_compile.py --all --output {TABLE.relative_to(ROOT)}"
MAIN = ("scan_forward", "scan_backward")
TOKENWISE = ("read_forward", "read_backward", "write_forward", "write_backward")

has_triton = importlib.util.find_spec("triton") is not None


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command], env={**ENV, **env}, cwd=ROOT, capture_output=True, text=True, timeout=500
    )


needs_triton = pytest.mark.skipif(not has_triton, reason="triton has no package for this platform")


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_agree_with_the_definitions():
    done = run("-m", "tests.kernels.triton_interpreter", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    files = ("triton_interpreter.py", "tokenwise/triton_checks.py")
    text = "".join((ROOT / "tests/kernels" / name).read_text() for name in files)
    checks = re.findall(r"^@check\ndef (\w+)", text, re.M)
    assert [line for line in done.stdout.splitlines() if line.endswith(": passed")] == [
        f"{name}: passed" for name in checks
    ]


def kernel_id(row):
    return tuple(row.get(name) for name in ("kernel", "arch", "sequences", "reverse", "N", "width"))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "options,count",
    [
        (["--arch", "90"], 12),
        (["--sequences", "fp32", "--states", "64", "--reverse", "--kernels", "scan_forward"], 1),
        (["--arch", "80", "--reverse", "--kernels", "scan_backward"], 1),
        (["--arch", "80", "--widths", "4096", "--kernels", *TOKENWISE], 4),
    ],
)
def test_compiled_kernels_spill_nothing(options, count, tmp_path):
    done = run("benchmarks/triton_compile.py", *options, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    made = json.loads(done.stdout)
    assert len(made["kernels"]) == count
    for row in made["kernels"]:
        assert row["spilled_bytes"] == row["LDL"] == row["STL"] == 0, row
    stored = json.loads(TABLE.read_text())
    assert made["sources"] == stored["sources"], f"the kernels have changed: {REFRESH}"
    if made["triton"] == stored["triton"]:
        kept = {kernel_id(row): row for row in stored["kernels"]}
        assert all(kept[kernel_id(row)] == row for row in made["kernels"])


@needs_triton
def test_the_stored_table_of_registers_is_that_of_these_kernels(monkeypatch):
    """No kernel spills, and a recurrence exchanges nothing between lanes: each holds the states of its channel."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    triton_compile = importlib.import_module("triton_compile")
    table = json.loads(TABLE.read_text())
    assert set(table) == {"triton", "sources", "kernels"}
    assert table["sources"] == triton_compile.sources(), f"the kernels have changed: {REFRESH}"
    rows = {kernel_id(row): row for row in table["kernels"]}
    assert len(rows) == len(table["kernels"])
    everything = itertools.product(
        MAIN, ["sm_90"], ("bf16", "fp16", "fp32"), (False, True), (1, 4, 16, 17, 64, 256), [None]
    )
    assert set(everything) <= set(rows)
    usual = list(triton_compile.scan_kernels(16, 90, False))
    directions = (False, True)
    assert {(name, "sm_80", "bf16", reverse, 16, None) for name in usual for reverse in directions} <= set(
        rows
    )
    widths = triton_compile.WIDTHS
    tokens = itertools.product(TOKENWISE, ["sm_90"], ("bf16", "fp16", "fp32"), [None], [None], widths)
    assert {*tokens, *itertools.product(TOKENWISE, ["sm_80"], ["bf16"], [None], [None], widths)} <= set(rows)
    for row in rows.values():
        assert row["spilled_bytes"] == row["LDL"] == row["STL"] == 0, row
        assert 16 <= row["registers"] <= 255
        if row["kernel"] in TOKENWISE:
            continue  # a sum over a token's channels is one over lanes and warps
        assert row["LDS"] == row["shared_bytes"] == 0, row
        if row["kernel"] == "scan_backward":
            assert row["SHFL"] == 16, "what sums over channels takes: 16 exchanges for 8 steps of B and C"
        else:
            assert row["SHFL"] == row["BAR"] == 0, row


@needs_triton
def test_a_table_makes_its_folder_and_knows_its_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    triton_compile = importlib.import_module("triton_compile")
    for name in ("variants", "tokenwise_variants"):
        monkeypatch.setattr(triton_compile, name, lambda *_: [])
    target = tmp_path / "new" / "table.json"
    monkeypatch.setattr(sys, "argv", ["triton_compile.py", "--output", str(target)])
    assert triton_compile.main() == 0
    assert json.loads(target.read_text())["kernels"] == []
    monkeypatch.setattr(sys, "argv", ["triton_compile.py", "--kernels", "scan_forwards"])
    with pytest.raises(SystemExit):
        triton_compile.main()
    assert "invalid choice: 'scan_forwards'" in capsys.readouterr().err


@pytest.mark.parametrize("length", [1, 64, 65, 256, 1024])
def test_saved_states_are_at_most_half_an_activation_in_bfloat16(length):
    with FakeTensorMode():
        u = torch.empty(2, length, 24, dtype=torch.bfloat16)
        A = torch.empty(24, 16)
        B = torch.empty(2, length, 16, dtype=torch.bfloat16)
        out, states = triton_scan.triton_scan(u, u, A, B, B, None, u, None, True, False)
    assert out.shape == u.shape and out.dtype == u.dtype
    assert states.dtype == torch.float32
    assert states.shape == (2, -(-length // 64) - 1, 16, 24)
    assert states.nbytes <= u.nbytes / 2


@hypothesis.given(programs=st.integers(1, 5000), length=st.integers(1, 20000))
def test_sequences_are_cut_into_whole_chunks_where_programs_are_few(programs, length):
    segments, per_segment = triton_scan._cut(programs, length)
    chunks = -(-length // triton_scan.CHUNK)
    assert (segments - 1) * per_segment < chunks <= segments * per_segment
    assert programs * segments <= max(programs, triton_scan._PROGRAMS)
    if 2 * programs > triton_scan._PROGRAMS:
        assert segments == 1
    elif chunks >= triton_scan._PROGRAMS:
        assert programs * segments > triton_scan._PROGRAMS / 4


@hypothesis.given(batch=st.integers(1, 5000), length=st.integers(1, 20000), width=st.integers(1, 4096))
def test_runs_of_tokens_cover_a_row_of_the_batch(batch, length, width):
    runs, tokens = triton_tokenwise.runs_of(batch, length)
    assert (runs - 1) * tokens < length <= runs * tokens
    assert min(length, 4) <= tokens <= 64
    tile = triton_tokenwise.tile(width)
    assert width <= tile["BLOCK"] < 2 * width
    assert tile["BLOCK"] <= 128 * tile["num_warps"] <= max(128, tile["BLOCK"]) <= 32 * 128


def conv_call(batch, length, channels):
    x = torch.empty(batch, length, channels, device="meta")
    return ConvCall(x, torch.empty(channels, 4, device="meta"), None, True, False)


def scan_call(batch, length, channels):
    u = torch.empty(batch, length, channels, device="meta")
    B = torch.empty(batch, length, 16, device="meta")
    A, D = torch.empty(channels, 16, device="meta"), torch.empty(channels, device="meta")
    return ScanCall(u, u, A, B, B, D, u, None, True, False)


@pytest.mark.parametrize(
    "batch,length,channels",
    [(1000, 5_000_000, 1536), (1, 2**26 - 8, 1), (2**31 - 1, 1, 1), (1, 1, 8_000_000)],
)
def test_any_shape_is_launched_within_the_limits_of_a_grid(monkeypatch, batch, length, channels):
    along_tokens, along_channels = triton_conv.conv_grid(batch, length, channels)
    assert along_tokens <= 2**31 - 1 and along_channels <= 65_535
    assert along_tokens * triton_conv._TILE >= batch * length
    for module in (triton_conv, triton_scan):
        monkeypatch.setattr(module, "interpreted", lambda: True)
    assert triton_conv.TritonConv().accepts(conv_call(batch, length, channels)) is None
    call = scan_call(batch, length, channels)
    assert triton_scan.TritonScan().accepts(call) is None
    calls = list(triton_scan._by_channels(call))
    for name, dim in {"u": 2, "delta": 2, "z": 2, "A": 0, "D": 0}.items():
        widths = [getattr(part, name).shape[dim] for part in calls]
        assert sum(widths) == channels and max(widths) <= 65_535 * 32
    assert all(part.B is call.B and part.delta_bias is None for part in calls)


@pytest.mark.parametrize(
    "backend,shape,reason",
    [
        ("conv", (1, 2**30 + 1, 1), "1073741824 tokens, got 1073741825"),
        ("scan", (1, 2**26, 1), "1073741824 tokens times states, got 67108864 times 16"),
        *(
            (
                backend,
                (2**31, 1, 1),
                "2147483647 programs for the batch and tokens, and this needs 2147483648",
            )
            for backend in ("conv", "scan")
        ),
        ("conv", (1, 1, 65_535 * 128 + 1), "65535 programs for the channels, and this needs 65536"),
    ],
)
def test_what_no_grid_takes_is_refused(monkeypatch, backend, shape, reason):
    for module in (triton_conv, triton_scan):
        monkeypatch.setattr(module, "interpreted", lambda: True)
    found = {
        "conv": lambda: triton_conv.TritonConv().accepts(conv_call(*shape)),
        "scan": lambda: triton_scan.TritonScan().accepts(scan_call(*shape)),
    }[backend]()
    assert found is not None and reason in found and found.endswith("use backend='torch'")


@pytest.mark.parametrize(
    "shape,dtype,reason",
    [
        ((1000, 2_000_000, 1536), torch.bfloat16, None),
        ((1, 2, 4096), torch.float32, None),
        ((1, 2, 4097), torch.float32, "more than 4096 channels does not fit into registers, got 4097"),
        (
            (2**31, 1, 1),
            torch.float16,
            "2147483647 programs for the batch and tokens, and this needs 2147483648",
        ),
        ((1, 2**30 + 1, 1), torch.float32, "1073741824 tokens, got 1073741825"),
        ((1, 2, 3), torch.float64, "it computes in float32, and an argument is float64"),
    ],
)
def test_what_is_read_and_written_by_tokens(monkeypatch, shape, dtype, reason):
    x = torch.empty(shape, dtype=dtype, device="meta")
    read = ReadCall(x, x, None, x[:, 0], x[:, 0], None, None, 1e-5, False, True, dtype)
    write = WriteCall(x, x, x[:, 0], None, None)
    backends = ((triton_tokenwise.TritonRead(), read), (triton_tokenwise.TritonWrite(), write))
    for backend, call in backends:
        assert backend.accepts(call) == "it takes CUDA tensors, got meta"
    monkeypatch.setattr(triton_tokenwise, "interpreted", lambda: True)
    for backend, call in backends:
        found = backend.accepts(call)
        assert (
            (found or "") == ""
            if reason is None
            else reason in found and found.endswith("use backend='torch'")
        )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for backend, call in backends:
        assert backend.accepts(call).startswith("torch.compile makes one kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_without_a_gpu_it_says_so():
    for listing in (dis_mamba.available_backends(), dis_causal_conv1d.available_backends()):
        assert listing["triton"] == "no CUDA device"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: no CUDA device"):
        selective_scan(**scan_arguments(1, 2, 2, 2), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 3, 1), (2, 65, 33, 16), (1, 200, 130, 5), (3, 1024, 256, 16), (600, 65, 33, 4), (1, 130, 40, 65)],
)
def test_matches_the_torch_backend_on_a_gpu(shape, dtype, reverse):
    arguments = {
        k: v.detach().cuda().requires_grad_() for k, v in scan_arguments(*shape, dtype=dtype).items()
    }
    weight = torch.randn(shape[:3], dtype=torch.float64, device="cuda")
    flags = {"delta_softplus": True, "reverse": reverse}
    out, grads = with_gradients(selective_scan, arguments, weight, backend="triton", **flags)
    want, want_grads = with_gradients(selective_scan, arguments, weight, backend="torch", **flags)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert (out - want).abs().max() <= limit * want.abs().max()
    for name, grad in grads.items():
        assert (grad - want_grads[name]).abs().max() <= 10 * limit * want_grads[name].abs().max() + 1e-6
    again = with_gradients(selective_scan, arguments, weight, backend="triton", **flags)
    assert torch.equal(out, again[0])
    assert all(torch.equal(grads[name], again[1][name]) for name in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 65, 33), (2, 200, 768), (600, 33, 64), (1, 130, 4096)])
def test_tokens_match_the_torch_backend_on_a_gpu(shape, dtypes, centered):
    walk = {name: rows.cuda() for name, rows in a_walk(shape[1]).items()}
    # A sum is in the wider of its dtypes.
    options = ("weight", "shift", "scale", *(["hidden"] if dtypes != (torch.bfloat16, torch.float32) else []))
    read, write = read_arguments(*shape, *dtypes, options), write_arguments(*shape, *dtypes)
    flags = {"keep_normed": True, "centered": centered, "dtype": dtypes[1], "eps": 1e-3, **walk}

    def reads(backend, hidden=None, **given):
        x, normed, stream = add_norm_modulate(hidden, **given, backend=backend, **flags)
        return torch.cat([x.float(), normed.float(), stream.float()], -1)

    def writes(backend, **given):
        return gated_add(**given, **walk, backend=backend)

    for function, arguments in ((reads, read), (writes, write)):
        if function is writes and "hidden" not in options:
            continue
        values = {k: v.detach().cuda().requires_grad_() for k, v in arguments.items()}
        weight = torch.randn(function("torch", **values).shape, dtype=torch.float64, device="cuda")
        out, grads = with_gradients(functools.partial(function, "triton"), values, weight)
        want, want_grads = with_gradients(functools.partial(function, "torch"), values, weight)
        limit = 1e-5 if dtypes == (torch.float32, torch.float32) else 2e-2
        assert (out - want).abs().max() <= limit * want.abs().max()
        for name, grad in grads.items():
            assert (grad - want_grads[name]).abs().max() <= 10 * limit * want_grads[name].abs().max() + 1e-6
        again = with_gradients(functools.partial(function, "triton"), values, weight)
        assert torch.equal(out, again[0])
        assert all(torch.equal(grads[name], again[1][name]) for name in grads)
