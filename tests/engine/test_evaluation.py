"""Evaluation: each sample once on any number of processes, and nothing of it is left in the training."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.evaluation_toys import (
    ThreadRanks,
    ToySource,
    in_loop,
    on_threads,
    pixel_metric,
    sampling_run,
)
from tests.engine.toys import CLASSES, SHAPE, TinyModel, assert_same_bits, make_trainer, snapshot
from zigflow.engine import checkpoint
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.evaluation import Judge
from zigflow.engine.log import read_metrics
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_weights
from zigflow.errors import OtherRankError
from zigflow.metrics.digit_judge import DigitJudge
from zigflow.metrics.results import read_results


def judge_toy(ranks, source=None, num_samples=10, batch_size=4, metric=None, heldout=None):
    judge = Judge(
        metric or pixel_metric(), source or ToySource(), heldout, ranks=ranks, preview=6, batch_size=3
    )
    return judge(sampling_run(ranks=ranks, num_samples=num_samples, batch_size=batch_size))


@pytest.mark.parametrize("num_samples", [10, 8, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_counts_every_sample_once(size, num_samples):
    whole_source, source = ToySource(), ToySource()
    whole = judge_toy(Ranks(), whole_source, num_samples)
    found = on_threads(size, lambda ranks: judge_toy(ranks, source, num_samples))
    assert source.reads == whole_source.reads == [1] * len(source), "each real sample is read once"
    main = found[0]
    assert main.metrics["frechet"] == pytest.approx(whole.metrics["frechet"], rel=1e-9)
    assert main.protocol == whole.protocol
    assert (main.protocol["n"], main.protocol["reference_n"]) == (num_samples, 11)
    assert torch.equal(main.images, whole.images)
    assert main.labels.tolist() == [i % CLASSES for i in range(min(6, num_samples))]
    assert all(other.metrics == {} for other in found[1:])


def test_a_metric_that_keeps_images_sees_them_in_the_order_of_their_ids():
    class Halves:
        def __init__(self, first):
            self.inner = ToySource(60, first)
            self.image_shape, self.num_classes, self.shard_sizes = SHAPE, CLASSES, (60,)

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return self.inner[index]

    def work(ranks):
        metric = DigitJudge(fit_steps=2, num_subsets=2, k=2)
        metric._net = None
        return judge_toy(ranks, Halves(0), 10, 4, metric, Halves(5000))

    whole, split = work(Ranks()), on_threads(2, work)[0]
    assert split.metrics == whole.metrics, "to the bit"
    assert split.protocol == whole.protocol


def test_without_a_metric_the_samples_are_counted():
    found = on_threads(2, lambda ranks: Judge(None, None, None, ranks=ranks)(sampling_run(ranks=ranks)))[0]
    assert found.metrics == {"n": 10}
    assert found.protocol["metric"] is None
    assert found.protocol["ids_sha256"] == judge_toy(Ranks()).protocol["ids_sha256"]


def test_an_error_on_one_process_is_one_on_all():
    def work(ranks):
        run = sampling_run(ranks=ranks)
        if ranks.rank == 1:
            run.pipeline = replace(run.pipeline, sampler=None)
        return Judge(pixel_metric(), ToySource(), None, ranks=ranks)(run)

    found = on_threads(3, work)
    assert isinstance(found[1], AttributeError)
    assert isinstance(found[0], OtherRankError) and isinstance(found[2], OtherRankError)


@pytest.mark.parametrize("size", [1, 2])
def test_asked_to_stop_no_process_goes_on(size):
    def work(ranks):
        asked = []

        def should_stop():
            asked.append(len(asked) == 1 and ranks.rank == 0)
            return ranks.any(asked[-1])

        return Judge(pixel_metric(), ToySource(), None, ranks=ranks)(
            sampling_run(ranks=ranks, num_samples=20), should_stop
        )

    found = on_threads(size, work) if size > 1 else [work(Ranks())]
    assert found == [None] * size


def test_nothing_real_to_compare_with():
    with pytest.raises(ValueError, match="heldout data, which there is none of"):
        Judge(pixel_metric(reference="heldout"), ToySource(), None, ranks=Ranks())(sampling_run())


@pytest.mark.parametrize("every", [1, 2])
def test_training_with_evaluation_equals_training_without(tmp_path, every):
    plain = make_trainer(tmp_path / "plain", steps=5)
    plain.fit()
    grown = []

    def note(trainer, record):
        grown.append(trainer.model.training and trainer.model.drop.training)

    watched = make_trainer(tmp_path / "watched", steps=5, hooks=[in_loop(Ranks(), every), note])
    watched.fit()
    assert_same_bits(snapshot(watched), snapshot(plain))
    assert grown == [True] * 5

    def losses(name):
        return [
            (x["step"], x["loss"]) for x in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x
        ]

    assert losses("watched") == losses("plain")


def test_it_judges_the_averaged_weights_of_its_step(tmp_path):
    make_trainer(tmp_path, steps=4, ckpt_every=2, hooks=[in_loop(Ranks(), 2)]).fit()
    for step in (2, 4):
        model = TinyModel(seed=5)
        load_weights(model, checkpoint.open_checkpoint(tmp_path / "checkpoints" / f"step-{step:07d}"))
        again = Judge(pixel_metric(), ToySource(), None, ranks=Ranks())(sampling_run(model))
        metrics, protocol = read_results(tmp_path / "eval" / f"step-{step:07d}.json")
        assert metrics == again.metrics, "the same number as offline, to the bit"
        assert protocol["ids_sha256"] == again.protocol["ids_sha256"]
        assert (protocol["weights"], protocol["step"], protocol["n"]) == ("ema_short", step, 10)
        assert (tmp_path / "eval" / f"step-{step:07d}.png").exists()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[-1]["eval"] == metrics


class Scripted:
    """A judge whose number is given by step."""

    def __init__(self, values, direction="min"):
        self.values = values
        self.metric = type("Toy", (), {"best_by": ("score", direction)})

    def check(self, count, labels, size=None):
        assert count > 0

    def __call__(self, run, should_stop):
        from zigflow.engine.evaluation import Judgement

        return Judgement({"score": self.values.pop(0)}, {"n": 1, "ids_sha256": "0"}, None, None)


@pytest.mark.parametrize("direction, best", [("min", 4), ("max", 2)])
def test_the_best_checkpoint_is_kept_apart_from_the_last(tmp_path, direction, best):
    hook = in_loop(Ranks(), 2)
    hook.judge = Scripted([5.0, 1.0, 2.0, 3.0, 4.0], direction)
    make_trainer(tmp_path, steps=9, ckpt_every=3, keep_last=1, hooks=[hook]).fit()
    assert [c.step for c in checkpoint.list_complete(tmp_path / "checkpoints")] == [best, 9]
    assert checkpoint.open_checkpoint(tmp_path).step == 9
    found = checkpoint.open_checkpoint(tmp_path / "best")
    assert found.step == best
    assert checkpoint.read_best(tmp_path)["step"] == best
    assert len(list((tmp_path / "eval").glob("*.json"))) == 5, "every second step, and the last"
    make_trainer(tmp_path / "plain", steps=1).fit()
    with pytest.raises(CheckpointError, match="no evaluation was made"):
        checkpoint.open_checkpoint(tmp_path / "plain" / "best")


def test_a_cut_evaluation_is_made_up_for(tmp_path, monkeypatch):
    hook = in_loop(Ranks(), 3)
    trainer = make_trainer(tmp_path, steps=5, hooks=[hook])
    real = type(hook.judge).__call__

    def stopped(judge, run, should_stop):
        trainer.request_stop()
        return real(judge, run, should_stop)

    with monkeypatch.context() as patch:
        patch.setattr(type(hook.judge), "__call__", stopped)
        assert trainer.fit().step == 3
    assert not (tmp_path / "eval").exists()
    again = make_trainer(tmp_path, steps=5, hooks=[in_loop(Ranks(), 3)])
    again.fit()
    straight = make_trainer(tmp_path / "straight", steps=5, hooks=[in_loop(Ranks(), 3)])
    straight.fit()
    assert_same_bits(snapshot(again), snapshot(straight))
    names = sorted(p.name for p in (tmp_path / "eval").glob("*.json"))
    assert names == ["step-0000003.json", "step-0000005.json"]
    for name in names:
        own, other = (json.loads((tmp_path / f / "eval" / name).read_text()) for f in (".", "straight"))
        assert own == other
    assert again.counters.best == straight.counters.best


def test_rounds_without_a_folder_are_those_with_one(tmp_path):
    files, memory = sampling_run(folder=tmp_path), sampling_run()
    files.run(keep=False)
    for number in range(3):
        for a, b in zip(files.round(number), memory.round(number), strict=True):
            assert torch.equal(a, b)
    assert files.num_rounds == memory.num_rounds == 3
    assert memory.round(2)[1].tolist() == [8, 9], "what only fills the batch up is left out"
    late = sampling_run(ranks=ThreadRanks(3, 4, None, None))
    assert late.num_rounds == 1 and late.round(0) is None
    assert np.array_equal(files.collect().images[8:], memory.round(2)[0].numpy())


def test_what_cannot_be_judged_is_refused_before_the_first_step(tmp_path):
    hook = in_loop(Ranks(), 2)
    hook.judge.metric.check_request = lambda count, labels: (_ for _ in ()).throw(ValueError("too many"))
    trainer = make_trainer(tmp_path, steps=4, hooks=[hook])
    with pytest.raises(ValueError, match="too many"):
        trainer.fit()
    assert trainer.counters.step == 0


def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(tmp_path, monkeypatch):
    hook = in_loop(Ranks(), 3)
    with monkeypatch.context() as patch:
        patch.setattr(type(hook.judge), "__call__", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_trainer(tmp_path, steps=5, hooks=[hook]).fit()
    assert checkpoint.open_checkpoint(tmp_path).step == 3
    make_trainer(tmp_path, steps=5, hooks=[in_loop(Ranks(), 3)]).fit()
    assert sorted(p.name for p in (tmp_path / "eval").glob("*.json")) == [
        "step-0000003.json",
        "step-0000005.json",
    ]
