"""Named tensors in and out of files: safetensors written piece by piece, sharded tensors made whole.

The layout written is the public one of safetensors: eight little-endian bytes with the length of a JSON
header, the header padded with spaces to a multiple of eight, then the raw data without gaps.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from zigflow import files

__all__ = ["assign", "clean_name", "full", "load_tensors", "named_floating", "save_tensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def clean_name(name: str) -> str:
    """A parameter's name without the segments that compilation and checkpoint wrappers put in."""
    return ".".join(
        part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")
    )


def named_floating(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters of ``model``, frozen ones included, by clean name."""
    return {clean_name(n): p for n, p in model.named_parameters() if p.dtype.is_floating_point}


def full(tensor: Tensor) -> Tensor:
    """A plain contiguous CPU copy; for a sharded tensor every rank must call this together."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole ``value`` into ``target``, distributing it when ``target`` is sharded."""
    with torch.no_grad():
        value = value.to(device=target.device, dtype=target.dtype)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write a durable safetensors file; return its size and SHA-256.

    Args:
        tensors: plain CPU tensors of any shape, 0-dimensional and empty ones included.

    Raises:
        TypeError: a tensor's dtype has no name in the format.
    """
    return files.write_bytes(path, _pieces(tensors, metadata))


def _pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    if sys.byteorder != "little":
        raise RuntimeError("safetensors files are little-endian, and this machine is not")
    # Wide types first: every tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no valid safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
