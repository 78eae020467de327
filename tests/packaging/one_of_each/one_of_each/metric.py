"""A metric: ``metrics=each_brightness`` (config/metrics/each_brightness.yaml)."""

import torch

from zigflow.metrics.base import Metric


class Brightness(Metric):
    """How far the mean grey level of the samples lies from that of the real images."""

    name = "each_brightness"
    best_by = ("brightness_error", "min")

    def __init__(self):
        super().__init__()
        self._real = None
        self._forget()

    @classmethod
    def real_sets(cls, options):
        return ("train",)

    def set_reference(self, train, heldout=None):
        self._real = float(torch.as_tensor(train[0]).double().mean())

    def _has_reference(self):
        return self._real is not None

    def _take(self, images, labels, ids):
        self._sum += float(images.double().mean((1, 2, 3)).sum())

    def _forget(self):
        self._sum = 0.0

    def _state(self):
        return {"sum": torch.tensor(self._sum, dtype=torch.float64)} if self.count else {}

    def _absorb(self, state):
        self._sum += float(state["sum"])

    def compute(self):
        self._require_samples()
        return {"brightness_error": abs(self._sum / self.count - self._real)}
