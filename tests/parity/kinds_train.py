"""Three optimizer steps of the published training script, run through our trainer.

As published, gradients are clipped after the step, which changes nothing: ``max_grad_norm=None`` here.
"""

import tempfile
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from zigflow.codec import IdentityCodec
from zigflow.data.batch import Batch
from zigflow.data.global_batch import GlobalBatch
from zigflow.engine.ema import EmaProfile
from zigflow.engine.optim import adamw
from zigflow.engine.options import TrainingData, TrainOptions
from zigflow.engine.run_state import model_state
from zigflow.engine.runtime import Runtime
from zigflow.engine.trainer import Hook, Monitoring, Trainer
from zigflow.official import load_official
from zigflow.processes.flow import Flow


class Keep(Hook):
    """Keeps the records."""

    def __init__(self):
        self.records = []

    def after_step(self, trainer, record):
        self.records.append(record)


class StoredDraws:
    """The recorded times and noise in place of keyed ones; the id of a batch's first sample is its step."""

    def __init__(self, fixture: Fixture, step: int):
        self.fixture, self.step = fixture, step

    def to(self, device):
        return self

    def active(self):
        return nullcontext()

    def uniform(self, purpose, shape=()):
        assert purpose == "train.time"
        return self.fixture.tensors[f"step{self.step}/t"]

    def normal(self, purpose, shape=()):
        assert purpose == "train.noise"
        return self.fixture.tensors[f"step{self.step}/x0"]


def stored(fixture: Fixture, name: str, dtype: torch.dtype):
    """The stored tensor if there is one of that type: labels are integers, texts are not."""
    value = fixture.tensors.get(name, None)
    return value if value is not None and value.dtype == dtype else None


def batches(fixture: Fixture, start: int):
    for step in range(start, len(fixture.meta["losses"])):
        x1 = fixture.tensors[f"step{step}/x1"]
        yield Batch(
            pixels=x1,
            latents=None,
            labels=stored(fixture, f"step{step}/y", torch.int64),
            tokens=stored(fixture, f"step{step}/y", torch.float32),
            ids=torch.full((x1.shape[0],), step),
            keys=(),
        )


def transport_of(fixture: Fixture) -> tuple[str, str]:
    """Names of the path and of the prediction."""
    return (
        fixture.word("path_type", r"[Tt]ransport:? (\w+)\W", r"\bpath[ =:]+(\w+)"),
        fixture.word("prediction", r"[Tt]ransport:? \w+\W+(\w+)", r"\bprediction[ =:]+(\w+)"),
    )


@parity_kind("zigma.train_steps")
def check_train_steps(fixture: Fixture, case: str) -> None:
    meta = fixture.meta
    kept = Keep()
    model = load_official(
        "zigma",
        {**meta["ctor_kwargs"].plain(), "drop_path_rate": meta["drop_path_rate"]},
        fixture.under("param0/"),
    )
    # Clipping after the step, as published, changes nothing.
    limit = meta["max_grad_norm"]
    clipped = {"published": None, "clip_before": limit}[meta["order"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            process=Flow(*transport_of(fixture)),
            codec=IdentityCodec(),
            data=TrainingData(
                loader=lambda start: batches(fixture, start),
                batch=GlobalBatch(fixture.tensors["step0/x1"].shape[0]),
                draws=lambda seed, ids: StoredDraws(fixture, int(ids[0])),
            ),
            optimizer=lambda m: adamw(
                m, lr=meta["lr"], betas=meta["betas"], weight_decay=meta["weight_decay"], eps=meta["eps"]
            ),
            options=TrainOptions(
                train_steps=len(meta["losses"]),
                run_dir=folder,
                max_grad_norm=clipped,
                ema=(EmaProfile("official", rate=meta["ema_decay"]),),
                progress=False,
            ),
            runtime=Runtime.of(Accelerator(cpu=True)),
            monitoring=Monitoring(hooks=(kept,)),
        )
        trainer.fit()
    assert [r.loss for r in kept.records] == pytest.approx(meta["losses"], rel=1e-5)
    wanted = meta["grad_norms_before_clip"]
    assert [r.grad_norm for r in kept.records] == pytest.approx(wanted, rel=GRADIENT_RTOL_OF_MAX)
    final, averages = model_state(model), trainer.ema.state_dict("official")
    for name, value in fixture.under("final/").items():
        assert_close(f"final {name}", final[name], value)
    for name, value in fixture.under("ema/").items():
        assert_close(f"ema {name}", averages[name], value)
