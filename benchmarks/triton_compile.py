"""Compile the Triton kernels for a GPU that need not be there, and report registers and spills.

    python benchmarks/triton_compile.py --arch 90 80 --states 16

Prints one JSON document; a kernel that spills registers to memory makes the exit status 1. It says what the compiler
made, not how fast it runs: nothing here is a timing on a GPU.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dis_causal_conv1d.backends import triton_conv
from dis_causal_conv1d.backends import triton_kernels as conv_kernels
from dis_mamba.backends import triton_kernels as scan_kernels
from dis_mamba.backends import triton_scan

_FLOAT32 = {
    "A_NE", "D", "bias", "states", "grad_A", "grad_B", "grad_C", "grad_D", "grad_bias", "tiles", "carry",
    "taps_WE", "grad_y", "grad_taps",
}  # fmt: skip
_WATCHED = ("SHFL", "LDS", "BAR", "MUFU", "FFMA", "LDL", "STL")


def kernels(states: int) -> dict[str, tuple]:
    """Name -> (kernel, constants, warps), as the backends launch them with every option on."""
    scan = {
        "N": states, "NP": 1 << (states - 1).bit_length(), "CHUNK": triton_scan.CHUNK, "HAS_D": True, "HAS_Z": True,
        "HAS_BIAS": True, "SOFTPLUS": True, "REVERSE": False,
    }  # fmt: skip
    forward, backward = triton_scan._FORWARD_WARPS, triton_scan._BACKWARD_WARPS
    conv = {
        "W": 4, "SILU": True, "HAS_BIAS": True, "REVERSE": False, "TILE": triton_conv._TILE,
        "WIDTH": 32 * triton_conv._WARPS,
    }  # fmt: skip
    return {
        "scan_forward": (scan_kernels.scan_forward, {**scan, "WIDTH": 32 * forward, "STAGES": 4}, forward),
        "scan_backward": (
            scan_kernels.scan_backward,
            {**scan, "WIDTH": 32 * backward, "TILE": triton_scan._TILE, "STAGES": 3},
            backward,
        ),
        "conv_forward": (conv_kernels.conv_forward, conv, triton_conv._WARPS),
        "conv_backward_taps": (conv_kernels.conv_backward_taps, conv, triton_conv._WARPS),
    }


def compiled(kernel, constants: dict, warps: int, arch: int, sequences: str) -> bytes:
    """The binary for sm_``arch``, with sequences of dtype ``sequences`` (bf16, fp16, fp32)."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants
        else "i32" if name in ("L", "E")
        else "*fp32" if name in _FLOAT32 and not (name == "bias" and "taps_WE" in names)
        else f"*{sequences}"
        for name in names
    }  # fmt: skip
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}).asm[
        "cubin"
    ]


def measured(binary: bytes) -> dict[str, int]:
    """Registers, bytes of stack (spills) and shared memory, and how often some instructions occur."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    seen = collections.Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", listing, re.M)
    )
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]),
        "shared_bytes": int(found["SHARED"]),
        **{name: seen[name] for name in _WATCHED},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--states", type=int, nargs="+", default=[16])
    parser.add_argument("--sequences", choices=("bf16", "fp16", "fp32"), nargs="+", default=["bf16"])
    given = parser.parse_args()
    rows = []
    for arch in given.arch:
        for states in given.states:
            for sequences in given.sequences:
                for name, (kernel, constants, warps) in kernels(states).items():
                    binary = compiled(kernel, constants, warps, arch, sequences)
                    rows.append(
                        {
                            "kernel": name,
                            "arch": f"sm_{arch}",
                            "N": states,
                            "sequences": sequences,
                            **measured(binary),
                        }
                    )
    json.dump({"triton": triton.__version__, "kernels": rows}, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 1 if any(row["spilled_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
