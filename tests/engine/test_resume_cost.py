"""Resuming late costs what resuming early costs: counted in calls, reads and bytes, not in seconds."""

import os
import sys

import torch

from tests.engine.toys import TinyModel, make_trainer
from zigflow.data import order as order_module
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import training_loader
from zigflow.data.order import DataOrder
from zigflow.engine.log import MetricsFile

LATE = 100_000


class Counting:
    """A data source that counts what is read."""

    image_shape, num_classes, shard_sizes, fingerprint = (1, 4, 4), 0, (300, 200, 500), "x"

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return sum(self.shard_sizes)

    def __getitem__(self, index):
        self.reads += 1
        return {"key": str(index), "pixels": torch.full((1, 4, 4), index / 1000.0)}


def calls_of(function):
    """How many functions, of Python and of C, ``function`` calls."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def resumed_at(folder, step):
    """A run that stands at ``step``, with a metrics line for each step before it; its directory."""
    trainer = make_trainer(folder, steps=step, epoch_size=1000)
    trainer.counters.step, trainer.counters.images_seen = step - 1, 4 * (step - 1)
    trainer.fit()
    with open(folder / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"step": {k}, "loss": 0.5}}\n' for k in range(1, step + 1))
    return folder


def test_a_late_run_opens_restores_and_steps_with_as_many_calls_as_an_early_one(tmp_path):
    counts = {}
    # The first one pays for what is imported and cached once.
    for name, step in (("warm", 100), ("early", 100), ("late", LATE)):
        folder = resumed_at(tmp_path / name, step)
        again = make_trainer(folder, steps=step + 1, model=TinyModel(seed=8), epoch_size=1000)
        counts[name] = calls_of(again.fit)
        assert again.counters.step == step + 1
        assert again.data.loader.starts == [step]
        assert len(again.data.loader.given) == 1
    assert abs(counts["late"] - counts["early"]) <= 0.01 * counts["early"], counts


def test_the_first_batch_of_a_late_step_reads_that_batch_and_nothing_else(monkeypatch):
    found = {}
    for step in (100, LATE):
        source, permuted = Counting(), []
        real = order_module.keyed_permutation
        monkeypatch.setattr(
            order_module,
            "keyed_permutation",
            lambda n, *key, real=real, permuted=permuted: permuted.append(n) or real(n, *key),
        )
        loader = training_loader(source, DataOrder(source.shard_sizes, 0), GlobalBatch(8), start_step=step)
        batch = next(iter(loader))
        monkeypatch.undo()
        assert batch.ids.tolist() == list(range(8 * step, 8 * step + 8))
        found[step] = (source.reads, sorted(permuted))
    assert found[100] == found[LATE]
    assert found[LATE][0] == 8


def test_rewinding_reads_the_end_of_the_metrics_only(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text("".join(f'{{"step": {k}, "loss": 0.5}}\n' for k in range(1, LATE + 1)))
    size = os.path.getsize(file.path)
    looked = []
    from zigflow.engine import log

    real = log._is_kept
    monkeypatch.setattr(log, "_is_kept", lambda line, step: looked.append(line) or real(line, step))
    file.rewind(LATE - 50)
    assert len(looked) == 51
    assert os.path.getsize(file.path) < size
    assert file.path.read_bytes().endswith(f'{{"step": {LATE - 50}, "loss": 0.5}}\n'.encode())
