"""Compiling on first use: the cache, its refusals, and what runs where there is no compiler."""

import errno
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dis_causal_conv1d.backends.cpu as conv
import dis_mamba.backends.cpu as cpu
from dis_causal_conv1d import causal_conv1d
from dis_kernels import native
from dis_kernels.native import NativeError, NativeLibrary
from dis_mamba import available_backends, selective_scan
from tests.assertions import assert_close

from .definitions import conv_arguments, conv_definition, scan_arguments, scan_definition
from .operators import compare, needs_compiler

SOURCE = '#include <cstdint>\nextern "C" int64_t answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIGFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_logged", set())
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def library(source, answer=42):
    return NativeLibrary(source, {"ANSWER": answer})


def binaries(source):
    return sorted((source.parent / "cache" / "native").iterdir())


@needs_compiler
def test_a_second_process_finds_the_binary(source, monkeypatch):
    assert library(source).load().answer() == 42
    (binary,) = binaries(source)
    assert binary.suffix == ".so"
    assert binary.stat().st_mode & 0o022 == 0
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library(source).load().answer() == 42


@needs_compiler
def test_another_source_flag_compiler_or_host_is_another_binary(source, monkeypatch):
    library(source).load()
    source.write_text(SOURCE + "// changed\n")
    library(source).load()
    library(source, answer=43).load()
    with monkeypatch.context() as patch:
        patch.setenv("ZIGFLOW_CXXFLAGS", "-DOTHER")
        library(source).load()
    with monkeypatch.context() as patch:
        patch.setattr(native, "compiler_version", lambda command: "another version")
        library(source).load()
    with monkeypatch.context() as patch:
        patch.setattr(native, "host", lambda: ("another processor",))
        library(source).load()
    assert len(binaries(source)) == 6


@needs_compiler
def test_a_damaged_binary_is_compiled_again(source):
    _, path = library(source).plan()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF half a file")
    assert library(source).load().answer() == 42
    assert path.stat().st_size > 1000


@needs_compiler
def test_a_binary_that_others_can_write_is_refused(source):
    library(source).load()
    (binary,) = binaries(source)
    binary.chmod(0o777)
    with pytest.raises(NativeError, match="can be written by one: remove it"):
        library(source).load()


@needs_compiler
def test_libraries_that_compile_at_once_do_not_meet(source):
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(lambda: library(source).load().answer()) for _ in range(4)]
    assert [answer.result() for answer in answers] == [42] * 4
    assert [path.suffix for path in binaries(source)] == [".so"]


@needs_compiler
@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_meet(source):
    code = (
        "import sys; from pathlib import Path; from dis_kernels.native import NativeLibrary; "
        "print(NativeLibrary(Path(sys.argv[1]), {'ANSWER': 7}).load().answer())"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[1])}
    running = [
        subprocess.Popen([sys.executable, "-c", code, source], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in running] == ["7"] * 2
    assert [path.suffix for path in binaries(source)] == [".so"]


@needs_compiler
def test_what_does_not_compile_says_why_and_leaves_nothing(source):
    source.write_text("int broken( { }\n")
    with pytest.raises(NativeError, match=r"cannot compile small.*error"):
        library(source).load()
    assert binaries(source) == []


@needs_compiler
def test_a_cache_that_is_no_folder_says_so(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZIGFLOW_CACHE", str(tmp_path / "file"))
    assert "kernel cache" in library(source).reason()
    monkeypatch.delenv("ZIGFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in library(source).reason()


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("ZIGFLOW_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert native.cache_folder() == Path("/a/native")
    monkeypatch.delenv("ZIGFLOW_CACHE")
    assert native.cache_folder() == Path("/b/zigflow/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native.cache_folder() == Path.home() / ".cache/zigflow/native"


@pytest.mark.parametrize("command", ["no-such-compiler -x", "/bin/false"])
def test_a_compiler_that_is_named_and_does_not_run_is_no_other(source, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(NativeError, match=command):
        library(source).load()


@needs_compiler
def test_a_folder_that_cannot_be_written_is_told_once(source, monkeypatch, caplog):
    """By both operations, whose files would have names of their own."""

    def refused(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{options['prefix']}x7f3.tmp")

    monkeypatch.setattr(native.tempfile, "mkstemp", refused)
    other = source.with_name("other.cpp")
    other.write_text(SOURCE)
    with caplog.at_level(logging.WARNING):
        reasons = {library(path).reason() for path in (source, other)}
    (reason,) = reasons
    assert reason.endswith("cannot be used: Read-only file system")
    assert len(caplog.records) == 1


@needs_compiler
def test_torch_runs_where_the_cache_folder_is_read_only(source, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # the superuser writes anywhere but among the kernel's own files
        folder = Path("/proc/self")
    if os.access(folder / "native", os.F_OK) or not folder.exists():
        pytest.skip("no folder here refuses to be written")
    monkeypatch.setenv("ZIGFLOW_CACHE", str(folder))
    for module in (cpu, conv):
        monkeypatch.setattr(module, "LIBRARY", NativeLibrary(module.LIBRARY.source, module.LIBRARY.defines))
    scan_values, conv_values = scan_arguments(1, 4, 3, 2), conv_arguments(1, 4, 3, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compare(selective_scan, scan_definition, scan_values, (1e-5, 1e-5))
            compare(causal_conv1d, conv_definition, conv_values, (1e-5, 1e-5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.fullmatch(
        "the compiled CPU kernels cannot run, 'torch' takes over: "
        f"the kernel cache {folder / 'native'} cannot be used: .+",
        record.getMessage(),
    )
    assert available_backends()["cpu"] in record.getMessage()


@needs_compiler
def test_a_mask_that_lets_the_group_write_does_not_make_a_binary_foreign(source, monkeypatch):
    run = native._run

    def linked(command):
        done = run(command)
        if "-o" in command:
            os.chmod(command[-1], 0o775)  # as a linker that makes the file anew under umask 002
        return done

    monkeypatch.setattr(native, "_run", linked)
    assert library(source).load().answer() == 42
    assert library(source).load().answer() == 42


@needs_compiler
def test_fast_arithmetic_is_refused(source, monkeypatch):
    monkeypatch.setenv("ZIGFLOW_CXXFLAGS", "-ffast-math")
    kernels = NativeLibrary(Path(cpu.__file__).parents[1] / "csrc" / "scan.cpp", {"ZIGFLOW_CHUNK": 32})
    assert "compile without -ffast-math" in str(kernels.reason())


def test_without_a_compiler_torch_runs_and_one_line_says_why(source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu, "LIBRARY", NativeLibrary(cpu.LIBRARY.source))
    arguments = {name: value.detach() for name, value in scan_arguments(1, 4, 3, 2).items()}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close("output", selective_scan(**arguments), scan_definition(**arguments))
        library(source).reason()
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled CPU kernels cannot run, 'torch' takes over: "
        "no C++ compiler: install g++ or clang++, or name one by CXX"
    ]
    assert available_backends()["cpu"].startswith("no C++ compiler")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: no C\\+\\+ compiler"):
        selective_scan(**arguments, backend="cpu")


def test_the_kernels_use_the_threads_of_torch():
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        pytest.skip("torch has no OpenMP here")
    torch.ones(1 << 16).sum()
    assert native.parallel_address() != 0
