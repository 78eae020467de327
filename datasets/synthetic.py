"""Colored shapes that stand or move: small sets that need no files, for tests, examples and checks of a machine."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws

SHAPES = ("disc", "square", "diamond", "ring")


class ShapesSource:
    """Shape and color follow from the label, place and size from the sample's number.

    Args:
        num_samples: how many.
        size: pixels of both sides, or (height, width).
        channels: channels of the image.
        num_classes: labels, of which the first four differ in shape and the further ones in color; 0 for none.
        num_frames: 0 for images; otherwise videos whose shape moves and comes back at the opposite edge.
        tokens: (L, D) of text-like features, one matrix per class, with a caption; None for none.
        as_latents: deliver the values as ``latents`` instead of ``pixels``.
        seed: any integer.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        num_samples: int = 64,
        size: int | tuple[int, int] = 16,
        *,
        channels: int = 3,
        num_classes: int = 4,
        num_frames: int = 0,
        tokens: tuple[int, int] | None = None,
        as_latents: bool = False,
        seed: int = 0,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        if min(num_samples, height, width, channels) < 1 or min(num_classes, num_frames) < 0:
            raise ValueError(
                f"sizes must be positive, got {num_samples} samples of {channels} x {height} x {width}, "
                f"{num_classes} classes, {num_frames} frames"
            )
        self.num_samples, self.height, self.width, self.channels = num_samples, height, width, channels
        self.num_classes, self.num_frames, self.tokens = num_classes, num_frames, tokens
        self.as_latents, self.seed = as_latents, seed
        frames = (num_frames,) if num_frames else ()
        self.image_shape = (*frames, channels, height, width)
        self.shard_sizes = (num_samples,)
        self.fingerprint = f"shapes-1-{num_samples}-{self.image_shape}-{num_classes}-{tokens}-{seed}"

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"no sample {index} among {self.num_samples}")
        label = index % self.num_classes if self.num_classes else 0
        draws = KeyedDraws(self.seed, torch.tensor([index]))
        center, radius, speed = (
            draws.uniform("center", (2,))[0],
            draws.uniform("radius")[0],
            draws.uniform("speed", (2,))[0],
        )
        frames = [
            self._frame(label, center + time * (speed - 0.5) * 0.25, 0.2 + 0.2 * float(radius))
            for time in range(max(self.num_frames, 1))
        ]
        image = torch.stack(frames) if self.num_frames else frames[0]
        sample: dict[str, Any] = {
            "key": f"shape-{index:06d}",
            "latents" if self.as_latents else "pixels": image,
        }
        if self.num_classes:
            sample["labels"] = label
        if self.tokens is not None:
            of_class = KeyedDraws(self.seed, torch.tensor([label]))
            sample["tokens"] = of_class.normal("tokens", tuple(self.tokens))[0]
            sample["captions"] = (f"a {SHAPES[label % len(SHAPES)]} of color {label // len(SHAPES)}",)
        return sample

    def _frame(self, label: int, center: Tensor, radius: float) -> Tensor:
        """(C, H, W) with the shape at ``center`` (fractions of height and width, on a torus)."""
        rows = (torch.arange(self.height) + 0.5) / self.height
        columns = (torch.arange(self.width) + 0.5) / self.width
        dy = ((rows - center[0] + 0.5) % 1.0 - 0.5).abs()[:, None]
        dx = ((columns - center[1] + 0.5) % 1.0 - 0.5).abs()[None, :]
        # Sums and squares of multiples of 2**-24: no transcendental function whose bits differ by machine.
        square_distance = dx * dx + dy * dy
        inside = {
            "disc": square_distance < radius * radius,
            "square": torch.maximum(dx.expand_as(square_distance), dy.expand_as(square_distance)) < radius,
            "diamond": dx + dy < radius,
            "ring": (square_distance < radius * radius) & (square_distance > radius * radius / 3),
        }[SHAPES[label % len(SHAPES)]]
        levels = torch.tensor([1.0 - 0.5 * ((label // len(SHAPES) + c) % 4) for c in range(self.channels)])
        return torch.where(inside[None], levels[:, None, None], torch.tensor(-1.0))


def example(folder: Path) -> ShapesSource:
    """A tiny instance, for the test of the batch contract."""
    return ShapesSource(6, (6, 8), num_frames=2, tokens=(3, 4))
