"""Processes that are threads, and a metric on raw pixels: what the tests of evaluation share."""

import threading
from contextlib import contextmanager

import torch

from tests.engine.toys import CLASSES, SHAPE, EulerToy, TinyModel, ToyProcess, batch_at, make_sampling_run
from zigflow.codec import IdentityCodec
from zigflow.engine.evaluation import Judge
from zigflow.engine.in_loop import InLoopEvaluation
from zigflow.errors import OtherRankError
from zigflow.metrics.frechet import FrechetMetric


class ThreadRanks:
    """Rank r of n threads that meet at a barrier."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self._barrier, self._slots = barrier, slots

    def gather(self, payload):
        self._slots[self.rank] = payload
        self._barrier.wait(30)
        found = list(self._slots)
        self._barrier.wait(30)
        return found

    def sum(self, values):
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def any(self, flag):
        return any(self.gather(bool(flag)))

    @contextmanager
    def together(self, what):
        failed = True
        try:
            yield
            failed = False
        finally:
            elsewhere = self.any(failed)
        if elsewhere:
            raise OtherRankError(what)


def on_threads(size, work):
    """``work(ranks)`` on every rank; results or exceptions by rank."""
    barrier, slots, found = threading.Barrier(size), [None] * size, [None] * size

    def run(rank):
        try:
            found[rank] = work(ThreadRanks(rank, size, barrier, slots))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a process hangs"
    return found


class ToySource:
    """``count`` labeled images, counting how often each one is read."""

    image_shape, num_classes, fingerprint = SHAPE, CLASSES, "toy"

    def __init__(self, count=11, first=1000):
        self.count, self.first, self.reads = count, first, [0] * count
        self.shard_sizes = (count,)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.reads[index] += 1
        batch = batch_at([self.first + index])
        return {"pixels": batch.pixels[0], "labels": int(batch.labels[0]), "key": str(index)}


def pixel_metric(**options):
    return FrechetMetric(pixels, **options)


def pixels(images):
    return images.flatten(1)[:, :5].double()


def sampling_run(model=None, *, folder=None, ranks=None, num_samples=10, batch_size=4, **changes):
    settings = {
        "model": model or TinyModel(), "ranks": ranks, "num_samples": num_samples, "batch_size": batch_size,
        "process": ToyProcess(), "sampler": EulerToy(), "codec": IdentityCodec(), "shape": SHAPE, "seed": 3,
        "num_classes": CLASSES, "progress": False, **changes,
    }  # fmt: skip
    return make_sampling_run(folder=folder, **settings)


PROTOCOL = {
    "sampler": "toy", "steps": 4, "guidance": None, "precision": "no", "codec_scale": 1.0, "reference": "toy",
    "versions": {}, "command": None,
}  # fmt: skip


def in_loop(ranks, every=2, metric=None, source=None, **run):
    judge = Judge(metric or pixel_metric(), source or ToySource(), None, ranks=ranks, preview=6)
    return InLoopEvaluation(
        every=every,
        judge=judge,
        make_run=lambda model, weights: sampling_run(model, ranks=ranks, **run),
        protocol=lambda run, weights, step: {
            **PROTOCOL, "weights": weights, "step": step, "weights_sha256": run.identity["weights_sha256"]
        },
    )  # fmt: skip


def equal_states(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
