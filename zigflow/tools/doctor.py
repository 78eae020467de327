"""``doctor``: what this machine has, for a bug report."""

import argparse
import importlib.metadata
import os
import platform
import shutil


def main(argv: list[str]) -> int:
    """Print versions, devices and kernel backends with the reason why one cannot run."""
    argparse.ArgumentParser(
        prog="python -m zigflow.tools doctor", description="Report on this machine."
    ).parse_args(argv)
    import torch

    import dis_causal_conv1d
    import dis_mamba
    from zigflow import __version__
    from zigflow.paths import config_dir

    print(f"zigflow {__version__}, python {platform.python_version()} on {platform.platform()}")
    for name in (
        "torch",
        "numpy",
        "accelerate",
        "hydra-core",
        "omegaconf",
        "safetensors",
        "torchdiffeq",
        "triton",
    ):
        try:
            print(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name} is not installed")
    print(
        f"  cores {os.cpu_count()}, threads of torch {torch.get_num_threads()}, C compiler {shutil.which('cc')}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            print(f"  GPU {index}: {torch.cuda.get_device_name(index)}")
    else:
        print("  no CUDA device: everything runs on the CPU")
    for op, backends in (
        ("selective_scan", dis_mamba.available_backends()),
        ("causal_conv1d", dis_causal_conv1d.available_backends()),
    ):
        for backend, reason in backends.items():
            print(f"  {op} backend {backend}: {'can run' if reason is None else reason}")
    print(f"  configuration: {config_dir()}")
    return 0
