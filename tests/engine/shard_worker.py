"""One of two processes; started by test_sharding.py with the folder to write in."""

import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import distributed

from model_zigma import ZigMa
from tests.engine.test_real_model import dis, zigma
from tests.engine.toys import PROFILES, assert_same_bits, batch_at, make_trainer, snapshot
from zigflow.engine import checkpoint
from zigflow.engine.launch import LaunchError, check_same, make_accelerator
from zigflow.engine.optim import build_optimizer
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_weights
from zigflow.engine.sharding import shard
from zigflow.processes import Gaussian
from zigflow.processes.flow import Flow
from zigflow.samplers import OdeSampler

LOCAL, ACCUMULATED = 2, 2


def loader(rank, size):
    def batches(start):
        for micro in count(start * ACCUMULATED):
            first = (micro * size + rank) * LOCAL
            yield batch_at(range(first, first + LOCAL))

    return batches


def samples(model):
    """What the weights make of fixed noise."""
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn((4, 1, 4, 4), generator=generator)
    model.eval()
    with torch.no_grad():
        return OdeSampler(method="heun", num_steps=4).sample(Flow(), model, x0, torch.tensor([0, 1, 2, 0]))


def trained(folder, ranks, accelerator, steps, *, sharded, model=None, process=None, **changes):
    trainer = make_trainer(
        folder, steps=steps, model=model or zigma(0), loader=loader(ranks.rank, ranks.size),
        process=process or Flow(), ema=PROFILES, batch_size=LOCAL, grad_accum=ACCUMULATED, max_grad_norm=0.05,
        shard=sharded, accelerator=accelerator, **changes,
    )  # fmt: skip
    trainer.fit()
    state = snapshot(trainer)
    del state["generator"]
    return trainer, state


def with_tables():
    torch.manual_seed(0)
    return ZigMa(
        in_channels=1,
        img_dim=4,
        embed_dim=16,
        depth=2,
        patch_size=1,
        scan_type="zigzagN8",
        use_pe=3,
        num_classes=3,
    )


def close(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.allclose(got[name].double(), value.double(), atol=2e-5), name


def nearly_the_same_path(got, want, start):
    """Muon's iteration runs in bfloat16, which a gradient's last bit moves by 2^-8: compared with what was learned."""
    for name, before in start.items():
        learned = (want[name].double() - before.double()).norm()
        assert (got[name].double() - want[name].double()).norm() <= 0.05 * learned, name


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = make_accelerator()
    ranks = Ranks()
    assert ranks.size == accelerator.num_processes == 2

    check_same(ranks, "run_dir", "outputs/a", "say so")
    with pytest.raises(LaunchError, match="different run_dir"):
        check_same(ranks, "run_dir", f"outputs/{ranks.rank}", "say so")

    run, straight = trained(folder / "straight", ranks, accelerator, 4, sharded=True)
    blocks = [p for n, p in run.model.named_parameters() if n.startswith("blocks.") and p.ndim > 1]
    assert all(p.to_local().numel() < p.numel() for p in blocks), "every process holds whole parameters"

    trained(folder / "cut", ranks, accelerator, 2, sharded=True)
    _, resumed = trained(folder / "cut", ranks, accelerator, 4, sharded=True, model=zigma(1))
    assert_same_bits(resumed, straight)

    _, plain = trained(folder / "plain", ranks, accelerator, 4, sharded=False)
    close(straight, plain)

    # Switched on and off on resume, with another checkpoint policy.
    trained(folder / "switched", ranks, accelerator, 1, sharded=False, checkpoint_policy="selective")
    trained(folder / "switched", ranks, accelerator, 2, sharded=True, checkpoint_policy="block")
    _, switched = trained(folder / "switched", ranks, accelerator, 4, sharded=False)
    close(switched, plain)

    # The position tables of use_pe=3 are read outside of the blocks.
    runs = [
        trained(folder / f"tables_{sharded}", ranks, accelerator, 2, sharded=sharded, model=with_tables())[1]
        for sharded in (True, False)
    ]
    close(*runs)

    # A stream that starts at zero, long skips, a learned variance: as copies, in shards, and resumed.
    dis_runs = []
    for name, sharded, stops in (("whole", False, (4,)), ("shards", True, (4,)), ("cut", True, (2, 4))):
        for seed, steps in enumerate(stops):
            _, state = trained(
                folder / f"dis_{name}", ranks, accelerator, steps, sharded=sharded, model=dis(seed),
                process=Gaussian(),
            )  # fmt: skip
        dis_runs.append(state)
    close(*dis_runs[:2])
    assert_same_bits(*dis_runs[1:])

    # Two optimizers as one: matrices inside the blocks by Muon, as copies, in shards, and resumed.
    muon_runs = []
    for name, sharded, stops in (("whole", False, (4,)), ("shards", True, (4,)), ("cut", True, (2, 4))):
        for seed, steps in enumerate(stops):
            _, state = trained(
                folder / f"muon_{name}", ranks, accelerator, steps, sharded=sharded, model=zigma(seed),
                optimizer=lambda m: build_optimizer("muon", m, lr=0.01, weight_decay=0.1),
            )  # fmt: skip
        muon_runs.append(state)
    assert any(key.startswith("optimizer/momentum_buffer/") for key in muon_runs[0])
    nearly_the_same_path(
        muon_runs[1], muon_runs[0], {f"model/{k}": v for k, v in zigma(0).state_dict().items()}
    )
    assert_same_bits(*muon_runs[1:])

    model = zigma(7)
    shard(model, 2)
    load_weights(model, checkpoint.open_checkpoint(folder / "straight"), "official")
    torch.save(samples(model), folder / f"samples_{ranks.rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
