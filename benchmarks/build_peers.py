"""Build mamba-ssm and causal-conv1d from their sources for one GPU, to be timed beside this project's kernels.

Both `setup.py` name up to nine architectures, whatever TORCH_CUDA_ARCH_LIST says: all but one are struck out, which
makes hours into minutes. The packages go into a folder of their own, without what they require: a benchmark imports
their compiled modules and nothing of `mamba_ssm`. Sources are given, or downloaded by pip.

    python benchmarks/build_peers.py --target build/peers                   # on a GPU, for it
    python benchmarks/build_peers.py --arch 90 mamba_ssm-2.3.2.post1.tar.gz causal_conv1d-1.7.0.tar.gz
    PYTHONPATH=build/peers python benchmarks/kernels.py --device cuda
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

PACKAGES = ("causal-conv1d", "mamba-ssm")
# Compiled here, and not looked for on the network; a later mamba-ssm skips its scan unless told otherwise.
FORCED = ("CAUSAL_CONV1D_FORCE_BUILD", "MAMBA_FORCE_BUILD", "MAMBA_KEEP_CUDA_BUILD")
BUILD_TOOLS = ("pip", "setuptools", "wheel", "packaging", "ninja")
# The compiled module of each, by the name that its source begins with.
MODULES = {"causal": "causal_conv1d_cuda", "mamba": "selective_scan_cuda"}
_ARCHITECTURE = re.compile(r"arch=compute_(\w+),code=(?:sm|compute)_(\w+)")


def restricted(source: str, arch: str) -> str:
    """A `setup.py` that compiles for ``sm_<arch>`` alone.

    The first `flags.append("-gencode")` and the `flags.append("arch=...")` after it stay and get the architecture;
    every other such pair becomes `pass`, as it may be all that a branch holds.

    Raises:
        SystemExit: no such lines, or architectures that are named otherwise too.
    """
    tree = ast.parse(source)
    appended = [
        (node, node.value.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "append"
        and len(node.value.args) == 1
        and isinstance(node.value.args[0], ast.Constant)
        and isinstance(node.value.args[0].value, str)
    ]
    flags = sorted((node for node, text in appended if text == "-gencode"), key=_place)
    values = sorted((node for node, text in appended if _ARCHITECTURE.fullmatch(text)), key=_place)
    named = sum(
        bool(_ARCHITECTURE.search(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    if not flags or len(flags) != len(values) or named != len(values):
        raise SystemExit(
            f"setup.py names {named} architectures, {len(values)} of them in lines of the form "
            'flags.append("arch=..."): restrict it by hand'
        )
    lines = source.encode().split(b"\n")
    for node in sorted([*flags, *values], key=_place, reverse=True):
        text = b"pass"
        if node is flags[0]:
            continue
        if node is values[0]:
            text = _ARCHITECTURE.sub(
                f"arch=compute_{arch},code=sm_{arch}", ast.get_source_segment(source, node) or ""
            ).encode()
        # Parsed nodes have an end; the fields are optional for those that a program makes.
        last_line = node.end_lineno or node.lineno
        first, last = lines[node.lineno - 1], lines[last_line - 1]
        lines[node.lineno - 1 : last_line] = [first[: node.col_offset] + text + last[node.end_col_offset :]]
    return b"\n".join(lines).decode()


def _place(node: ast.Expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def unpacked(sdist: Path, folder: Path) -> Path:
    """The folder of sources that an sdist holds, made anew below ``folder``."""
    place = folder / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(place, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    found = list(place.glob("*/setup.py"))
    if len(found) != 1:
        raise SystemExit(f"{sdist.name} holds {len(found)} setup.py, one is expected: is it an sdist?")
    return found[0].parent


def installed(package: str) -> bool:
    with suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def missing(arch: str | None) -> str | None:
    """What stands in the way of a build for ``arch``, None for the GPU that is there; or None."""
    # Looking for pip's module would spoil setuptools for this process.
    tools = [name for name in BUILD_TOOLS if not (installed(name) or shutil.which(name))]
    if tools:
        return f"the Python packages {', '.join(tools)}: pip install {' '.join(tools)}"
    if not installed("torch"):
        return "torch"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"a torch for CUDA: {torch.__version__} is for the CPU"
    compiler = None if CUDA_HOME is None else shutil.which("nvcc", path=Path(CUDA_HOME) / "bin")
    if CUDA_HOME is None or compiler is None:
        return f"nvcc of CUDA {torch.version.cuda}, in $CUDA_HOME/bin (a CUDA toolkit)"
    if not (Path(CUDA_HOME) / "include" / "cuda_runtime_api.h").is_file():
        return f"cuda_runtime_api.h in {CUDA_HOME}/include: set CUDA_HOME to the toolkit's folder"
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        given = "says no version" if release is None else f"is of CUDA {release[1]}"
        return f"nvcc of CUDA {torch.version.cuda}: {compiler} {given}"
    if arch is None and not torch.cuda.is_available():
        return "a GPU: name the architecture to build for, as in --arch 90"
    return None


def present() -> str:
    """The architecture of the GPU that is there."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


def headers() -> dict[str, str]:
    """An environment in which compilers find headers of the CUDA libraries that torch came with, after the toolkit's.

    A small toolkit lacks those of cuSPARSE and cuBLAS, which torch's own headers ask for.
    """
    import torch

    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    folder = f"cu{(torch.version.cuda or '').partition('.')[0]}"
    found = [place / folder / "include" for place in places if (place / folder / "include").is_dir()]
    return {"CPATH": os.pathsep.join(filter(None, [os.environ.get("CPATH"), *map(str, found)]))}


def pip(*words: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(f"pip {words[0]} failed with exit status {done.returncode}: its output is above")


def build(sdist: Path, arch: str, work: Path, target: Path) -> str:
    """Build and install one package; the name of its compiled module, which has been imported once.

    Raises:
        SystemExit: a step failed.
    """
    source = unpacked(sdist, work)
    setup = source / "setup.py"
    setup.write_text(restricted(setup.read_text(), arch))
    wheels = source.parent / "wheels"
    flags = ("--no-build-isolation", "--no-deps", "--no-cache-dir")
    pip(
        "wheel",
        *flags,
        "--verbose",
        "--wheel-dir",
        wheels,
        source,
        **dict.fromkeys(FORCED, "TRUE"),
        **headers(),
    )
    pip("install", "--no-deps", "--upgrade", "--target", target, *wheels.glob("*.whl"))
    module = next(name for start, name in MODULES.items() if sdist.name.startswith(start))
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, {module}"],
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} was built and cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return module


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sdists", nargs="*", type=Path, help="by default pip downloads both packages' latest")
    parser.add_argument("--arch", help="as in 90 for sm_90; by default that of the GPU that is there")
    parser.add_argument("--work", type=Path, default=Path("build/peers_work"), help="for sources and wheels")
    parser.add_argument("--target", type=Path, default=Path("build/peers"), help="for the built packages")
    given = parser.parse_args(words)
    if given.arch is not None and not re.fullmatch(r"\d{2,3}[af]?", given.arch):
        parser.error(f"--arch {given.arch}: two or three digits as in 90, or 90a")
    for sdist in given.sdists:
        if not sdist.is_file() or not sdist.name.endswith(".tar.gz"):
            parser.error(f"{sdist}: no sdist, a file that ends in .tar.gz")
        if not sdist.name.startswith(tuple(MODULES)):
            parser.error(f"{sdist.name}: neither causal_conv1d nor mamba_ssm")
    return given


def main() -> None:
    given = arguments()
    lacking = missing(given.arch)
    if lacking:
        raise SystemExit(f"cannot build here, missing: {lacking}")
    arch = given.arch or present()
    work, target = given.work.resolve(), given.target.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sdists = given.sdists
    if not sdists:
        downloads = work / "sdists"
        shutil.rmtree(downloads, ignore_errors=True)
        pip(
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "-d",
            downloads,
            *PACKAGES,
        )
        sdists = sorted(downloads.glob("*.tar.gz"))
    for sdist in sdists:
        began = time.perf_counter()
        module = build(sdist, arch, work, target)
        print(f"{module} for sm_{arch} from {sdist.name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"now: PYTHONPATH={given.target} python benchmarks/kernels.py --device cuda")


if __name__ == "__main__":
    main()
