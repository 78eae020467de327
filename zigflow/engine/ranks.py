"""The processes of a run: who am I, do we all agree, did any of us fail."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from zigflow.errors import OtherRankError

__all__ = ["Ranks"]


class Ranks:
    """A few collective operations over all processes; with one process they cost nothing.

    Args:
        device: where the tensors of a collective live (the accelerator with nccl, the CPU with gloo).

    Attributes:
        rank, size, is_main: of this process.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.size = distributed.get_world_size() if joined else 1
        self.is_main = self.rank == 0
        self._device = torch.device(device)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over the processes, in float64."""
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self._device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.size == 1 else self.sum([float(flag)])[0] > 0

    def gather(self, payload: bytes) -> list[bytes]:
        """The bytes of every process, by rank; all processes get all of them."""
        if self.size == 1:
            return [payload]
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        sizes[self.rank] = len(payload)
        distributed.all_reduce(sizes)
        lengths = sizes.tolist()
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        if payload:
            own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        own = own.to(self._device)
        gathered = [torch.empty_like(own) for _ in lengths]
        distributed.all_gather(gathered, own)
        return [part[:n].cpu().numpy().tobytes() for part, n in zip(gathered, lengths, strict=True)]

    def barrier(self) -> None:
        self.any(False)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Meet at the end of the ``with`` block; when it failed anywhere, it fails everywhere.

        Raises:
            OtherRankError: the block succeeded here and failed on another process.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            elsewhere = self.any(failed)
        if elsewhere:
            raise OtherRankError(f"{what} failed on another process of the run; see its output")
