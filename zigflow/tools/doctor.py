"""``doctor``: what this machine has, what is missing, and what stands in the way of a run; for a bug report too."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from zigflow.environment import VARIABLES

_CPU_FLAGS = {
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve"
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the report; 1 when something of it is a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m zigflow.tools doctor", description="Report on this machine and what a run would meet."
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    args = parser.parse_args(argv)
    found = report()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for section, content in found.items():
            if section != "problems":
                print(f"{section}:")
                _show(content)
        print("problems:" if found["problems"] else "no problems found")
        _show(found["problems"])
    return 1 if found["problems"] else 0


def _show(content: Any) -> None:
    if isinstance(content, list):
        content = {f"{i + 1}.": text for i, text in enumerate(content)}
    width = max((len(key) for key in content), default=0)
    for key, value in content.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        print(f"  {key.ljust(width)}  {value}")


def report() -> dict[str, Any]:
    """Everything that is printed, as plain JSON values; ``problems`` lists what should be mended."""
    problems: list[str] = []
    return {
        "machine": _machine(),
        "torch": _torch(),
        "backends": _backends(problems),
        "packages": _packages(problems),
        "plugins": _plugins(problems),
        "launch": _launch(problems),
        "problems": problems,
    }


def _machine() -> dict[str, Any]:
    from zigflow import __version__
    from zigflow.paths import config_dir

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, flags=re.M)
    return {
        "zigflow": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "processor features": sorted(_CPU_FLAGS & set(flags[1].split())) if flags else [],
        "cores": f"{os.cpu_count()}, {usable} of them for this process",
        "memory": _memory(),
        "C++ compiler": _compiler(),
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "configuration": str(config_dir()),
    }


def _compiler() -> str:
    """That of the kernels, ``$CXX`` before others, with its version."""
    from dis_kernels.native import NativeError, compiler, compiler_version

    try:
        command = compiler()
        version = compiler_version(tuple(command)).partition("\n")[0]
    except NativeError as error:
        return f"none: {error} (the cpu kernels and loop.compile on a CPU need one)"
    return f"{' '.join([shutil.which(command[0]) or command[0], *command[1:]])} ({version})"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _torch() -> dict[str, Any]:
    import torch
    from torch import distributed

    devices = {}
    device = torch.accelerator.current_accelerator(check_available=True)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        devices[f"GPU {index}"] = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        )
    if not devices:
        devices["accelerator"] = "none: everything runs on the CPU" if device is None else device.type
    together = [
        name for name in ("nccl", "gloo", "mpi") if distributed.is_available() and _has(distributed, name)
    ]
    return {
        "version": str(torch.__version__),
        "built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "collectives": together,
        **devices,
    }


def _has(distributed: Any, name: str) -> bool:
    return getattr(distributed, f"is_{name}_available")()


def model_calls(device: Any, dtype: Any) -> dict[str, tuple[Any, Any]]:
    """Per operation its dispatcher and a call as a model makes it, to be asked which backend would run it.

    Args:
        device, dtype: of the sequences; parameters are float32.
    """
    import torch

    from dis_causal_conv1d.backends import CONV
    from dis_causal_conv1d.backends.call import ConvCall
    from dis_kernels.tokenwise.backends import READ, WRITE
    from dis_kernels.tokenwise.call import ReadCall, WriteCall
    from dis_mamba.backends import SCAN
    from dis_mamba.backends.call import ScanCall

    u, E = torch.ones(1, 4, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    scan = ScanCall(u, u, -E[:, None].expand(8, 8), u, u, E, u, E, True, False)
    conv = ConvCall(u, torch.ones(8, 4, device=device), E, True, False)
    condition = torch.ones(1, 8, device=device, dtype=dtype)
    read = ReadCall(u, u, E, condition, condition, None, None, 1e-5, False, True, dtype)
    write = WriteCall(u, u, condition, None, None)
    return {
        "selective_scan": (SCAN, scan),
        "causal_conv1d": (CONV, conv),
        "add_norm_modulate": (READ, read),
        "gated_add": (WRITE, write),
    }


def _backends(problems: list[str]) -> dict[str, str]:
    """Per operation the backend that a model's calls would take here, then each with its reason; triton's version."""
    import torch

    import dis_causal_conv1d
    import dis_mamba
    from dis_kernels.tokenwise import tokenwise_backends

    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {
        "selective_scan": dis_mamba.available_backends(),
        "causal_conv1d": dis_causal_conv1d.available_backends(),
        "add_norm_modulate": tokenwise_backends(),
        "gated_add": tokenwise_backends(),
    }
    found = {}
    for op, (dispatcher, call) in model_calls(device, torch.float32).items():
        backends = known[op]
        try:
            found[op] = f"{dispatcher.select(call).name} would run (float32 on {device})"
        except (RuntimeError, ValueError) as error:
            # A name in ZIGFLOW_BACKEND that is none, or that of a backend which cannot run.
            found[op] = f"none would run: {error}"
            problems.append(f"{op}: {error}")
        for name, reason in backends.items():
            found[f"{op}/{name}"] = "can run" if reason is None else f"cannot run: {reason}"
        if all(backends.values()):
            problems.append(f"no backend of {op} can run on this machine")
    try:
        found["triton's version"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton's version"] = "not installed"
    return found


def requirements() -> dict[str, list[Requirement]]:
    """What each extra installs, under "" what the package itself needs; read from a checkout, else from the package."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        import tomllib

        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines = {"": table["dependencies"], **table["optional-dependencies"]}
        found = {extra: [Requirement(line) for line in lines[extra]] for extra in lines}
    else:
        found: dict[str, list[Requirement]] = {}
        for line in importlib.metadata.requires("zigflow") or []:
            requirement = Requirement(line)
            extra = re.search(r"extra == [\"']([\w-]+)[\"']", str(requirement.marker or ""))
            found.setdefault(extra[1] if extra else "", []).append(requirement)
    return {extra: [r for r in needs if r.name != "zigflow"] for extra, needs in found.items()}


def _packages(problems: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for extra, needs in requirements().items():
        remedy = f"pip install 'zigflow[{extra}]'" if extra else "pip install zigflow"
        for need in needs:
            try:
                version = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                state = f"missing: {remedy}"
            else:
                fits = need.specifier.contains(version, prereleases=True)
                state = version if fits else f"{version}, but {need.specifier} is needed: {remedy}"
            if need.name not in found:
                found[need.name] = state
            if not extra and state.endswith(remedy):
                problems.append(f"{need.name} {state}")
    return found


def _plugins(problems: list[str]) -> dict[str, str]:
    from zigflow.tools.list import names

    found = names("plugins")
    problems += [
        f"plug-in {name}: {state}" for name, state in found.items() if state.endswith("failed to load")
    ]
    return found


def _launch(problems: list[str]) -> dict[str, Any]:
    """What a training process started from this shell would believe about its launch."""
    from zigflow.engine import launch

    try:
        size = launch.check_environment()
        machines = launch.machines()
        state = f"{size} process(es) on {machines} machine(s)"
        if machines > 1 and not (os.environ.get("RUN_ID") or os.environ.get("SLURM_JOB_ID")):
            problems.append(f"{machines} machines and no RUN_ID: export RUN_ID=NAME on each of them")
    except launch.LaunchError as error:
        state = str(error)
        problems.append(state)
    told = {v.name: "***" if v.secret else os.environ[v.name] for v in VARIABLES if v.name in os.environ}
    return {
        "a run started here": state,
        "variables": told,
        "accelerate's own defaults": _accelerate_defaults(),
    }


def _accelerate_defaults() -> str:
    from accelerate.commands.config.config_args import default_config_file

    if not Path(default_config_file).is_file():
        return "none"
    return f"{default_config_file}: `accelerate launch` without --config_file obeys it"
