"""The digit judge's eyes: two small convolutional nets that vote, fitted in seconds on the CPU.

Legend: N images, C channels, H height, W width, F features, K classes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zigflow.keyed import KeyedDraws, keyed_permutation

__all__ = ["JudgeNet", "fit_judge_net", "one_thread"]

_PEAK_LEARNING_RATE = 6e-3
_WARMUP_SHARE = 0.3
_WEIGHT_DECAY = 1e-2
_LABEL_SMOOTHING = 0.05
_EVALUATION_BATCH = 1024


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order whatever the thread count, so that a set of samples has one verdict."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Member(nn.Module):
    """Three 3x3 convolutions with one halving, then features, then classes."""

    num_features = 24

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = image_shape
        cpu = {"device": "cpu", "dtype": torch.float32}
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, **cpu)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, **cpu)
        self.conv3 = nn.Conv2d(24, 32, 3, padding=1, **cpu)
        self.to_features = nn.Linear(32 * (height // 2) * (width // 2), self.num_features, **cpu)
        self.to_classes = nn.Linear(self.num_features, num_classes, **cpu)

    @torch.no_grad()
    def initialize(self, seed: int, member: int) -> None:
        """He normal weights and zero biases, keyed."""
        draws = KeyedDraws(seed, torch.tensor([member]))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                spread = math.sqrt(2.0 / parameter[0].numel())
                parameter.copy_(draws.normal(f"judge {name}", tuple(parameter.shape))[0] * spread)

    def features(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = F.relu(self.conv2(F.relu(self.conv1(x_NCHW))))
        x_NCHW = F.relu(self.conv3(F.max_pool2d(x_NCHW, 2)))
        return F.relu(self.to_features(x_NCHW.flatten(1)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.to_classes(self.features(x_NCHW))


class JudgeNet(nn.Module):
    """Classes and features of uint8 images (N, C, H, W), on the CPU in float32.

    For digits of 8 x 8 pixels: 46,292 parameters.

    Args:
        image_shape: (C, H, W), H and W at least 2.
        num_classes: K.
    """

    num_members = 2
    num_features = num_members * _Member.num_features

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        if min(image_shape[1:]) < 2:
            raise ValueError(f"the judge's net halves its images once: {image_shape} is too small")
        # Modules draw weights when they are made: the caller's generator must not notice.
        with torch.random.fork_rng(devices=[]):
            self.members = nn.ModuleList(_Member(image_shape, num_classes) for _ in range(self.num_members))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, F) float32: the members' penultimate layers side by side."""
        return self._in_batches(
            images, lambda x: torch.cat([member.features(x) for member in self.each_member()], 1)
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, K) float32: the members' mean."""
        return self._in_batches(
            images, lambda x: sum(m(x).softmax(1) for m in self.members) / self.num_members
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def each_member(self) -> list[_Member]:
        return cast("list[_Member]", list(self.members))

    def _in_batches(self, images: Tensor, function) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.cat([function(_scaled(part.cpu())) for part in images.split(_EVALUATION_BATCH)])


def fit_judge_net(images: Tensor, labels: Tensor, seed: int, steps: int = 750, batch: int = 64) -> JudgeNet:
    """Fit both members with AdamW, a warm-up and a cosine, label smoothing and shifts by one pixel.

    The result follows from the arguments alone: draws are keyed and the fit runs on one CPU thread, whatever
    grad mode, autocast or default dtype the caller is in.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), classes 0..K-1.
        seed: of weights, order and shifts.
        steps: optimizer steps per member.
        batch: images per step.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        one_thread(),
    ):
        # Clones: tensors made in inference mode cannot enter a graph.
        x, y = _scaled(images.cpu().clone()), labels.cpu().clone()
        _, channels, height, width = images.shape
        net = JudgeNet((channels, height, width), int(y.max()) + 1)
        for number, member in enumerate(net.each_member()):
            member.initialize(seed, number)
            _fit_member(member, x, y, seed, number, steps, batch)
    return net.eval().requires_grad_(False)


def _fit_member(
    member: _Member, x_NCHW: Tensor, y_N: Tensor, seed: int, number: int, steps: int, batch: int
) -> None:
    optimizer = _AdamW(list(member.parameters()))
    draws = KeyedDraws(seed, torch.arange(len(x_NCHW)))
    order, epoch, shifted = [], 0, x_NCHW
    for step in range(steps):
        if not order:
            permutation = torch.from_numpy(keyed_permutation(len(x_NCHW), seed, "judge order", number, epoch))
            shifted = _shift(x_NCHW, draws.integers(f"judge shift {number}", 9, step=epoch))
            order, epoch = list(permutation.split(batch)), epoch + 1
        index = order.pop(0)
        loss = F.cross_entropy(member(shifted[index]), y_N[index], label_smoothing=_LABEL_SMOOTHING)
        optimizer.step(loss, _PEAK_LEARNING_RATE * _schedule((step + 1) / steps))


class _AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), betas 0.9 and 0.999.

    torch.optim would load torch's compiler, which takes as long as the fit.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.means = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    def step(self, loss: Tensor, learning_rate: float) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.steps += 1
        rate = learning_rate / (1 - 0.9**self.steps)
        unbias = 1 - 0.999**self.steps
        with torch.no_grad():
            for p, g, mean, square in zip(self.parameters, gradients, self.means, self.squares, strict=True):
                mean.lerp_(g, 0.1)
                square.mul_(0.999).addcmul_(g, g, value=0.001)
                p.mul_(1 - learning_rate * _WEIGHT_DECAY)
                p.addcdiv_(mean, (square / unbias).sqrt_().add_(1e-8), value=-rate)


def _schedule(progress: float) -> float:
    if progress < _WARMUP_SHARE:
        return progress / _WARMUP_SHARE
    return 0.5 * (1.0 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1.0 - _WARMUP_SHARE)))


def _shift(x_NCHW: Tensor, which_N: Tensor) -> Tensor:
    """Each image moved by one of the nine steps of at most one pixel; what enters is black."""
    height, width = x_NCHW.shape[2:]
    padded = F.pad(x_NCHW, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    rows = (which_N // 3)[:, None] + torch.arange(height)
    columns = (which_N % 3)[:, None] + torch.arange(width)
    image = torch.arange(len(x_NCHW))[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _scaled(images: Tensor) -> Tensor:
    # Fresh strides: with C = 1 a tensor may pass for channels-last as well, and convolutions round differently.
    return torch.empty(images.shape, dtype=torch.float32).copy_(images) / 255.0
