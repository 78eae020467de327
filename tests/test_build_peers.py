"""benchmarks/build_peers.py: one architecture is left of a package's own; what is missing is told before any work."""

import ast
import importlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# The kind of lines that the packages have: pairs, some in branches that hold nothing else.
SETUP = """
flags = []
toolkit = {toolkit}
if toolkit:
    flags.append("-O3")
    flags.append("-gencode")
    flags.append("arch=compute_75,code=sm_75")
    flags.append("-gencode")
    flags.append(
        "arch=compute_80,code=sm_80"
    )
    if toolkit >= 11.8:
        flags.append("-gencode")
        flags.append("arch=compute_90,code=sm_90")  # Größe
    if toolkit >= 12.8: flags.append("-gencode"); flags.append("arch=compute_100,code=sm_100")
flags.append("--threads")
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("build_peers")


def flags_of(source):
    found = {}
    exec(compile(source, "setup.py", "exec"), found)
    return found["flags"]


@pytest.mark.parametrize("toolkit", [11.0, 11.8, 13.0])
@pytest.mark.parametrize("arch", ["90", "75", "90a", "120"])
def test_one_architecture_is_left(bench, toolkit, arch):
    source = SETUP.format(toolkit=toolkit)
    assert len(flags_of(source)) == 2 + 2 * (2 + (toolkit >= 11.8) + (toolkit >= 12.8))
    restricted = bench.restricted(source, arch)
    assert flags_of(restricted) == ["-O3", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "--threads"]
    assert len(restricted.splitlines()) <= len(source.splitlines())
    assert "# Größe" in restricted


@pytest.mark.parametrize(
    "more, named",
    [
        ('flags += ["-gencode", "arch=compute_103,code=sm_103"]', 5),
        ('flags.append("-gencode=arch=compute_103,code=sm_103")', 5),
        ('flags.append("-gencode")', 4),
    ],
)
def test_other_ways_to_name_one_are_refused(bench, more, named):
    with pytest.raises(SystemExit, match=f"names {named} architectures, 4 of them .* restrict it by hand"):
        bench.restricted(SETUP.format(toolkit=13.0) + more, "90")
    with pytest.raises(SystemExit, match="names 0 architectures"):
        bench.restricted("flags = []", "90")


def sdist(folder, files, name="mamba_ssm-9.9.tar.gz"):
    with tarfile.open(folder / name, "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return folder / name


def test_sources_are_unpacked_anew_and_inside(bench, tmp_path):
    path = sdist(tmp_path, {"mamba_ssm-9.9/setup.py": SETUP, "mamba_ssm-9.9/csrc/a.cu": ""})
    for _ in range(2):
        source = bench.unpacked(path, tmp_path / "work")
        assert source == tmp_path / "work" / "mamba_ssm-9.9" / "mamba_ssm-9.9"
        assert not (source / "left").exists()
        (source / "left").touch()
    outside = sdist(tmp_path, {"../setup.py": SETUP})
    with pytest.raises(tarfile.OutsideDestinationError):
        bench.unpacked(outside, tmp_path / "work")
    with pytest.raises(SystemExit, match="holds 0 setup.py"):
        bench.unpacked(sdist(tmp_path, {"a/b.py": ""}), tmp_path / "work")


@pytest.mark.slow
def test_a_package_is_built_and_installed_beside_nothing_else(bench, tmp_path, monkeypatch):
    """By real pip, with a stand-in that compiles nothing: what it is built with becomes its module."""
    setup = """
import os
from setuptools import setup
flags = []
flags.append("-gencode")
flags.append("arch=compute_75,code=sm_75")
flags.append("-gencode")
flags.append("arch=compute_80,code=sm_80")
with open("selective_scan_cuda.py", "w") as file:
    file.write(f"flags, forced = {flags!r}, {os.environ['MAMBA_FORCE_BUILD']!r}")
setup(name="mamba_ssm", version="9.9", py_modules=["selective_scan_cuda"], install_requires=["never-there"])
"""
    path = sdist(tmp_path, {"mamba_ssm-9.9/setup.py": setup})
    target = tmp_path / "target"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert bench.build(path, "90", tmp_path / "work", target) == "selective_scan_cuda"
    built = (target / "selective_scan_cuda.py").read_text()
    assert ast.literal_eval(built.partition(" = ")[2]) == (["-gencode", "arch=compute_90,code=sm_90"], "TRUE")


def test_what_is_missing_is_told_before_any_work(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(sys, "argv", ["build_peers.py", "--arch", "90"])
    with pytest.raises(SystemExit, match="^cannot build here, missing: nvcc of CUDA 13.2, in"):
        bench.main()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="missing: a torch for CUDA"):
        bench.main()
    assert not list(tmp_path.iterdir())


def toolkit(folder, release, headers=True):
    (folder / "bin").mkdir(parents=True)
    compiler = folder / "bin" / "nvcc"
    compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    compiler.chmod(0o755)
    (folder / "include").mkdir()
    if headers:
        (folder / "include" / "cuda_runtime_api.h").touch()
    return str(folder)


def test_a_toolkit_must_fit(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    home = "torch.utils.cpp_extension.CUDA_HOME"
    monkeypatch.setattr(home, toolkit(tmp_path / "old", "12.4"))
    assert bench.missing("90").startswith("nvcc of CUDA 13.2: ")
    assert bench.missing("90").endswith("is of CUDA 12")
    monkeypatch.setattr(home, toolkit(tmp_path / "bare", "13.0", headers=False))
    assert "cuda_runtime_api.h" in bench.missing("90")
    monkeypatch.setattr(home, toolkit(tmp_path / "good", "13.0"))
    assert bench.missing("90") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.missing(None) == "a GPU: name the architecture to build for, as in --arch 90"
    monkeypatch.setattr(bench, "BUILD_TOOLS", ("pip", "no-such-tool"))
    assert bench.missing("90") == "the Python packages no-such-tool: pip install no-such-tool"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--arch", "sm_90"], "--arch sm_90: two or three digits"),
        (["nothing.tar.gz"], "nothing.tar.gz: no sdist"),
        (["torch-1.tar.gz"], "torch-1.tar.gz: neither causal_conv1d nor mamba_ssm"),
    ],
)
def test_wrong_words_are_refused(bench, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("torch-1.tar.gz").touch()
    with pytest.raises(SystemExit):
        bench.arguments(words)
    assert said in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['build_peers.py', '--help']; "
        "runpy.run_path(sys.path.pop(), run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.append({str(BENCHMARKS / 'build_peers.py')!r}); {code}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--arch" in done.stdout
