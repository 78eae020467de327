"""Compile the Triton kernels for a GPU that need not be there, and report registers and spills.

    python benchmarks/triton_compile.py --arch 90 80 --states 16
    python benchmarks/triton_compile.py --all --output benchmarks/results/triton_compile.json

Prints one JSON document; a kernel that spills registers to memory makes the exit status 1. It says what the compiler
made, not how fast it runs: nothing here is a timing, and the machine that compiles does not matter. ``sources`` in the
result is a hash of all that the binaries follow from, so that a stored table that no longer holds is found out.
"""

import argparse
import collections
import hashlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

# Contraction is asked for by name below: that its default will change is no concern of ours.
warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION")

import triton  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dis_causal_conv1d.backends import triton_conv  # noqa: E402
from dis_causal_conv1d.backends import triton_kernels as conv_kernels  # noqa: E402
from dis_kernels.tokenwise import triton_kernels as token_kernels  # noqa: E402
from dis_kernels.tokenwise import triton_tokenwise  # noqa: E402
from dis_mamba.backends import (  # noqa: E402
    triton_backward,
    triton_kernels,
    triton_scan,
)

STATES = (1, 4, 16, 17, 64, 256)
WIDTHS = (64, 256, 768, 2048, 4096)
MAIN = ("scan_forward", "scan_backward")
SEQUENCES = ("bf16", "fp16", "fp32")
_FLOAT32 = {
    "A_NE", "D", "bias", "starts", "partial", "states", "ends", "spans", "grad_E", "grad_BC", "grad_bias",
    "tiles", "carry", "taps_WE", "grad_y", "grad_taps",
}  # fmt: skip
_INTEGERS = {"L", "E", "segment_steps", "segment_chunks", "segments"}
# What the kernels on tokens alone take, beside a float32 stream.
_TOKENWISE = {"rows": "*i64", "eps": "fp32"}
_TOKENWISE |= dict.fromkeys(("residual", "stream", "base", "weight", "sums"), "*fp32")
_TOKENWISE |= dict.fromkeys(("grad_stream", "grad_residual", "grad_out"), "*fp32")
_TOKENWISE |= dict.fromkeys(
    ("length", "width", "run", "runs", "shift_step", "scale_step", "gate_step"), "i32"
)
_WATCHED = ("SHFL", "LDS", "BAR", "MUFU", "FFMA", "LDL", "STL")


def scan_kernels(states: int, arch: int, reverse: bool) -> dict[str, tuple]:
    """Name -> (kernel, constants, warps), as the backend launches them with every option on."""
    sizes = {"N": states, "NB": triton_scan.state_block(states)}
    flags = {**sizes, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True, "REVERSE": reverse}
    vectors = triton_scan.vectors_of(states, (arch // 10, arch % 10))
    walk = {"CHUNK": triton_scan.CHUNK, "HAS_D": True}
    forward = {**flags, **walk, "GROUP": triton_scan.group_of(states), "STARTS": False}
    ends = {**flags, "GROUP": triton_scan._GROUP, "ADJOINT": False}
    return {
        "scan_forward": (triton_kernels.scan_forward, forward, 1),
        "scan_forward_of_segments": (triton_kernels.scan_forward, {**forward, "STARTS": True}, 1),
        "segment_ends": (triton_kernels.segment_ends, {**ends, "HAS_Z": False}, 1),
        "segment_ends_adjoint": (triton_kernels.segment_ends, {**ends, "ADJOINT": True}, 1),
        "join_segments": (triton_kernels.join_segments, {**sizes, "ADJOINT": True}, 1),
        "scan_backward": (
            triton_backward.scan_backward,
            {**flags, **walk, "GROUP": triton_scan._GROUP, "TILE": triton_scan._TILE, "VECTORS": vectors},
            1,
        ),
    }


def conv_kernels_of(reverse: bool) -> dict[str, tuple]:
    """Name -> (kernel, constants, warps) of the convolution with four taps."""
    constants = {
        "W": 4, "SILU": True, "HAS_BIAS": True, "REVERSE": reverse, "TILE": triton_conv._TILE,
        "WIDTH": 32 * triton_conv._WARPS,
    }  # fmt: skip
    names = ("conv_forward", "conv_backward_taps")
    return {name: (getattr(conv_kernels, name), constants, triton_conv._WARPS) for name in names}


def tokenwise_kernels(width: int) -> dict[str, tuple]:
    """Name -> (kernel, constants, warps) of what runs around a mixer, every option on, at tokens of a width."""
    tile = triton_tokenwise.tile(width)
    own = {"BLOCK": tile["BLOCK"], "HAS_ROWS": True}
    read = {**own, **dict.fromkeys(("HAS_WEIGHT", "MODULATED", "CENTERED"), True)}
    gradients = dict.fromkeys(("HAS_X", "HAS_NORMED", "HAS_STREAM"), True)
    options = {
        "read_forward": {**read, "HAS_HIDDEN": True, "KEEP_NORMED": True},
        "read_backward": {**read, **gradients},
        "write_forward": own,
        "write_backward": own,
    }
    return {
        name: (getattr(token_kernels, name), constants, tile["num_warps"])
        for name, constants in options.items()
    }


def tokenwise_variants(archs, widths, sequences, kernels=None):
    """As ``variants``, of what runs around a mixer."""
    for arch, dtype, width in itertools.product(archs, sequences, widths):
        for name, made in tokenwise_kernels(width).items():
            if not kernels or name in kernels:
                yield {"kernel": name, "arch": f"sm_{arch}", "sequences": dtype, "width": width}, *made


def variants(archs, states, sequences, directions, kernels=None):
    """(row head, kernel, constants, warps) of everything asked for."""
    for arch, dtype, reverse in itertools.product(archs, sequences, directions):
        for count in states:
            for name, made in scan_kernels(count, arch, reverse).items():
                if kernels and name not in kernels:
                    continue
                head = {"kernel": name, "arch": f"sm_{arch}", "sequences": dtype, "reverse": reverse}
                yield {**head, "N": count}, *made
        for name, made in conv_kernels_of(reverse).items():
            if kernels and name not in kernels:
                continue
            yield {"kernel": name, "arch": f"sm_{arch}", "sequences": dtype, "reverse": reverse}, *made


def compiled(kernel, constants: dict, warps: int, arch: int, sequences: str) -> bytes:
    """The binary for sm_``arch``, with sequences of dtype ``sequences`` (bf16, fp16, fp32).

    Pointers and sizes are multiples of 16, which is what Triton finds out, and compiles for, at a usual call.
    """
    signature, aligned = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = (
            _TOKENWISE[name] if name in _TOKENWISE and "width" in kernel.arg_names
            else "i32" if name in _INTEGERS
            else "*fp32" if name in _FLOAT32 and not (name == "bias" and "taps_WE" in kernel.arg_names)
            else f"*{sequences}"
        )  # fmt: skip
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            aligned[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


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


def sources() -> str:
    """A hash of the kernels and of the sizes they are launched with."""
    digest = hashlib.sha256()
    for module in (triton_kernels, triton_backward, conv_kernels, token_kernels):
        digest.update(inspect.getsource(module).encode())
    launches = [list(scan_kernels(n, arch, False).items()) for n in STATES for arch in (80, 90)]
    launches += [list(tokenwise_kernels(width).items()) for width in WIDTHS]
    for name, (_, constants, warps) in itertools.chain(*launches, conv_kernels_of(False).items()):
        digest.update(repr((name, sorted(constants.items()), warps)).encode())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--states", type=int, nargs="+", default=[16])
    parser.add_argument("--sequences", choices=SEQUENCES, nargs="+", default=["bf16"])
    parser.add_argument("--reverse", action="store_true", help="compile the walk from the last token")
    parser.add_argument("--widths", type=int, nargs="+", default=[768], help="of tokens around a mixer")
    names = [*scan_kernels(16, 90, False), *conv_kernels_of(False), *tokenwise_kernels(768)]
    parser.add_argument("--kernels", nargs="+", choices=names, help="only these")
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"N of {STATES}, widths of {WIDTHS}, every dtype and direction on sm_90; N=16, bf16 on sm_80",
    )
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
    wanted = itertools.chain(
        variants(given.arch, given.states, given.sequences, [given.reverse], given.kernels),
        tokenwise_variants(given.arch, given.widths, given.sequences, given.kernels),
    )
    if given.all:
        wanted = itertools.chain(
            variants([90, 80], [16], ["bf16"], [False, True]),
            variants([90], STATES, SEQUENCES, [False, True], given.kernels or MAIN),
            tokenwise_variants([90], WIDTHS, SEQUENCES, given.kernels),
            tokenwise_variants([80], WIDTHS, ["bf16"], given.kernels),
        )
    rows = [
        {**head, **measured(compiled(kernel, constants, warps, int(head["arch"][3:]), head["sequences"]))}
        for head, kernel, constants, warps in {json.dumps(row[0]): row for row in wanted}.values()
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"triton": triton.__version__, "sources": sources()}, indent=1)[:-2]
    text = f'{head},\n "kernels": [\n{lines}\n ]\n}}\n'
    sys.stdout.write(text)
    if given.output:
        given.output.write_text(text)
    return 1 if any(row["spilled_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
