"""One of two processes over gloo; started by test_evaluation_processes.py with the folder to write in."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import distributed

from tests.engine.evaluation_toys import ToySource, in_loop, pixel_metric, sampling_run
from tests.engine.toys import assert_same_bits, snapshot
from tests.engine.worker import trainer
from zigflow.engine.evaluation import Judge
from zigflow.engine.log import read_metrics
from zigflow.engine.ranks import Ranks
from zigflow.metrics.results import read_results


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    accelerator = Accelerator()
    ranks = Ranks()
    assert ranks.size == 2
    payload = bytes(range(3 + 4 * ranks.rank))
    assert ranks.gather(payload) == [bytes(range(3)), bytes(range(7))]
    assert ranks.gather(b"x" * ranks.rank) == [b"", b"x"]

    source = ToySource()
    judgement = Judge(pixel_metric(), source, None, ranks=ranks, preview=6, batch_size=3)(
        sampling_run(ranks=ranks)
    )
    assert sum(source.reads) < len(source), "the real images are shared"
    if ranks.is_main:
        (folder / "judgement.json").write_text(json.dumps([judgement.metrics, judgement.protocol]))

    # Uneven: three batches for two processes; the run is cut between two logged lines.
    straight = trainer(
        folder / "straight", ranks, accelerator, steps=6, log_every=4, hooks=[in_loop(ranks, 2)]
    )
    straight.fit()
    trainer(folder / "cut", ranks, accelerator, steps=3, log_every=4, hooks=[in_loop(ranks, 2)]).fit()
    again = trainer(folder / "cut", ranks, accelerator, steps=6, log_every=4, hooks=[in_loop(ranks, 2)])
    again.fit()
    plain = trainer(folder / "plain", ranks, accelerator, steps=6, log_every=4)
    plain.fit()
    assert_same_bits(snapshot(again), snapshot(straight))
    assert_same_bits(snapshot(plain), snapshot(straight))
    if ranks.is_main:
        losses = []
        for name in ("straight", "cut", "plain"):
            lines = read_metrics(folder / name / "metrics.jsonl")
            losses.append([(x["step"], x["loss"], x["loss_by_time"]) for x in lines if "loss" in x])
        assert losses[0] == losses[1] == losses[2], "a line's bits do not depend on where the run was cut"
        assert [step for step, *_ in losses[0]] == [1, 4]
    # Sharded parameters: every process calls the model equally often.
    sharded = trainer(folder / "sharded", ranks, accelerator, steps=4, hooks=[in_loop(ranks, 2)], shard=True)
    sharded.fit()
    assert all(hasattr(p, "full_tensor") for p in sharded.model.parameters())
    if ranks.is_main:
        for step in (2, 4):
            evaluated = [
                read_results(folder / n / "eval" / f"step-{step:07d}.json") for n in ("straight", "sharded")
            ]
            (plain_metrics, plain_protocol), (metrics, protocol) = evaluated
            assert metrics["frechet"] == pytest.approx(plain_metrics["frechet"], rel=1e-2)
            assert protocol["ids_sha256"] == plain_protocol["ids_sha256"]
    (folder / f"done_{ranks.rank}.json").write_text("{}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
