"""One of two processes; started by test_two_processes.py with the folder to write in."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.engine.toys import (
    PROFILES,
    TinyModel,
    ToyProcess,
    assert_same_bits,
    batch_at,
    make_trainer,
    snapshot,
)
from zigflow.engine import checkpoint
from zigflow.engine.ema import EmaProfiles
from zigflow.engine.optim import adamw, load_optimizer_state, optimizer_state
from zigflow.engine.precision import clip_gradients, gradient_norm
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_model_state, model_state
from zigflow.engine.step import NonFiniteError
from zigflow.errors import OtherRankError

LOCAL = 4


class Split:
    """Rank r's part of the global batches that a single process with batch 8 would see."""

    batch_size, grad_accum = LOCAL, 1

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def __call__(self, start):
        step = start
        while True:
            first = (step * self.size + self.rank) * LOCAL
            yield batch_at(range(first, first + LOCAL))
            step += 1


def trainer(folder, ranks, accelerator, **changes):
    model = changes.pop("model", None) or TinyModel(dropout=0.0)
    return make_trainer(
        folder,
        model=model,
        loader=Split(ranks.rank, ranks.size),
        accelerator=accelerator,
        batch_size=LOCAL,
        **changes,
    )


def train_and_resume(folder, ranks, accelerator):
    straight = trainer(folder / "straight", ranks, accelerator, steps=6)
    straight.fit()
    unbroken = snapshot(straight)
    trainer(folder / "cut", ranks, accelerator, steps=3).fit()
    again = trainer(folder / "cut", ranks, accelerator, steps=6, model=TinyModel(seed=9, dropout=0.0))
    again.fit()
    assert_same_bits(snapshot(again), unbroken)
    names = {p.name for p in (folder / "cut" / "checkpoints" / "step-0000006").iterdir()}
    assert {"rank_0000.safetensors", "rank_0001.safetensors", "rank_0001.json"} <= names
    checkpoint.verify(folder / "cut" / "checkpoints" / "step-0000006")


def stop_together(folder, ranks, accelerator):
    # Sample 21 is in rank 1's part of step 3.
    run = trainer(
        folder / "nan", ranks, accelerator, steps=6, ckpt_every=1, process=ToyProcess({21: float("nan")})
    )
    with pytest.raises(NonFiniteError if ranks.rank == 1 else OtherRankError, match="step 3"):
        run.fit()
    assert checkpoint.find_latest(folder / "nan").step == 2


def sharded_parameters(folder, ranks):
    """Weights, averages and optimizer state of DTensor parameters equal those of plain ones."""
    mesh = init_device_mesh("cpu", (ranks.size,))

    def build(seed, sharded):
        model = TinyModel(seed=seed, dropout=0.0)
        if sharded:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, adamw(model, lr=0.01), EmaProfiles(model, PROFILES)

    def train(model, optimizer, ema):
        batch = batch_at(range(8))
        trained = [p for p in model.parameters() if p.requires_grad]
        for step in range(3):
            optimizer.zero_grad()
            model(batch.pixels, torch.zeros(8), batch.labels).pow(2).mean().backward()
            norm = gradient_norm(trained)
            clip_gradients(trained, 0.05, norm)
            optimizer.step()
            ema.update(step * 8, 8)
        return float(norm)

    def state(model, optimizer, ema):
        tensors, groups = optimizer_state(model, optimizer)
        return {"model": model_state(model), "optimizer": tensors} | {
            n: ema.state_dict(n) for n in ema.names()
        }, groups

    plain, whole = build(0, False), build(0, True)
    assert abs(train(*plain) - train(*whole)) < 1e-5
    (want, _), (got, groups) = state(*plain), state(*whole)
    for part in want:
        assert set(want[part]) == set(got[part]), part
        for name in want[part]:
            assert torch.allclose(want[part][name].double(), got[part][name].double(), atol=1e-5), (
                part,
                name,
            )
    fresh = build(7, True)
    load_model_state(fresh[0], got["model"])
    load_optimizer_state(fresh[0], fresh[1], got["optimizer"], groups)
    for name in fresh[2].names():
        fresh[2].load_state_dict(name, got[name])
    again, _ = state(*fresh)
    for part in got:
        assert_same_bits(again[part], got[part])


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = Accelerator()
    ranks = Ranks()
    assert ranks.size == accelerator.num_processes == 2
    train_and_resume(folder, ranks, accelerator)
    stop_together(folder, ranks, accelerator)
    sharded_parameters(folder, ranks)
    (folder / f"done_{ranks.rank}.json").write_text(json.dumps({"rank": ranks.rank}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
