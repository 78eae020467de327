"""A tiny model, process and data source, so that a whole training run takes a tenth of a second."""

from itertools import count

import torch
from accelerate import Accelerator
from torch import nn

from zigflow.codec import IdentityCodec
from zigflow.data.batch import Batch
from zigflow.data.global_batch import GlobalBatch
from zigflow.engine.ema import EmaProfile
from zigflow.engine.optim import adamw
from zigflow.engine.options import TrainingData, TrainOptions
from zigflow.engine.run_state import RunRecord
from zigflow.engine.runtime import Runtime
from zigflow.engine.sampling_run import Pipeline, Samples, SamplingRun
from zigflow.engine.trainer import Hook, Monitoring, Trainer
from zigflow.keyed import KeyedDraws, current_draws

SHAPE = (1, 4, 4)
CLASSES = 3


class TinyModel(nn.Module):
    """Two blocks with dropout (torch's generator), a class table, a frozen parameter and an integer buffer."""

    time_scale = 1.0

    def __init__(self, width=8, seed=0, dropout=0.3, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_classes = CLASSES
        self.table = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.enter, self.leave = nn.Linear(17, width), nn.Linear(width, 16)
        self.drop = nn.Dropout(dropout)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.to(dtype)

    def forward(self, x, t, y=None, return_features=()):
        if self.training:
            self.calls += 1
        h = torch.cat([x.flatten(1), t.reshape(-1, 1).to(x.dtype)], dim=1)
        h = self.enter(h)
        if y is not None:
            h = h + self.table(y)
        for block in self.blocks:
            h = h + self.drop(torch.tanh(block(h)))
        return self.leave(h).reshape(x.shape)


class ToyProcess:
    """Linear path, velocity target; ``poison`` maps a sample id to what its loss is multiplied by."""

    def __init__(self, poison=None):
        self.poison = poison or {}

    def sample_time(self, u):
        return u

    def loss(self, model, x1, x0, t, y=None):
        t_ = t.reshape(-1, 1, 1, 1)
        error = model(t_ * x1 + (1 - t_) * x0, t, y) - (x1 - x0)
        loss = error.float().pow(2).flatten(1).mean(1)
        ids = current_draws().ids.tolist()
        return loss * torch.tensor([float(self.poison.get(i, 1.0)) for i in ids])


class EulerToy:
    """A sampler of four steps that uses keyed noise, so that it depends on the ids and nothing else."""

    num_function_evaluations = 4

    def __init__(self):
        self.batches = []

    def sample(self, process, model, x0, y=None, draws=None):
        self.batches.append(draws.ids.tolist())
        x = x0
        for i in range(4):
            t = torch.full((x.shape[0],), i / 4)
            x = x + 0.25 * model(x, t, y) + 0.01 * draws.normal("noise", x.shape[1:], step=i)
        return x


def batch_at(ids):
    ids = torch.as_tensor(ids, dtype=torch.int64)
    draws = KeyedDraws(7, ids)
    return Batch(
        pixels=draws.uniform("data", SHAPE) * 2 - 1,
        latents=None,
        labels=draws.integers("label", CLASSES),
        tokens=None,
        ids=ids,
        keys=tuple(str(i) for i in ids.tolist()),
    )


class Loader:
    """Endless micro-batches from a global batch on; remembers every id that it gave."""

    def __init__(self, batch_size=4, grad_accum=1, stop=None):
        self.batch_size, self.grad_accum, self.stop = batch_size, grad_accum, stop
        self.starts, self.given = [], []

    def __call__(self, start):
        self.starts.append(start)
        return self._run(start)

    def _run(self, start):
        for micro in count(start * self.grad_accum):
            if self.stop is not None and micro >= self.stop:
                return
            ids = list(range(micro * self.batch_size, (micro + 1) * self.batch_size))
            self.given.append(ids)
            yield batch_at(ids)


PROFILES = (EmaProfile("short", half_life=20, ramp=0.5), EmaProfile("official", rate=0.99))


class After(Hook):
    """A function of trainer and record as a hook."""

    def __init__(self, function):
        self.function = function

    def after_step(self, trainer, record):
        self.function(trainer, record)


def make_trainer(run_dir, *, steps=6, model=None, loader=None, process=None, lr=1e-2, **changes):
    """A trainer on the CPU from flat keywords: those of options, data, record and monitoring, then those of Trainer.

    ``hooks`` may hold functions of trainer and record.
    """

    def taken(kind, **names):
        known = {names.get(field, field): field for field in kind.__dataclass_fields__}
        return {known[key]: changes.pop(key) for key in list(changes) if key in known}

    batch_size, grad_accum = changes.pop("batch_size", 4), changes.pop("grad_accum", 1)
    runtime = Runtime.of(changes.pop("accelerator", None) or Accelerator(cpu=True))
    options = {
        "train_steps": steps,
        "run_dir": run_dir,
        "log_every": 2,
        "ckpt_every": 100,
        "ema": PROFILES,
        "progress": False,
        **taken(TrainOptions),
    }
    hooks = tuple(hook if isinstance(hook, Hook) else After(hook) for hook in changes.pop("hooks", ()))
    ranks = runtime.ranks
    return Trainer(
        model=model or TinyModel(),
        process=process or ToyProcess(),
        codec=changes.pop("codec", IdentityCodec()),
        data=TrainingData(
            loader=loader or Loader(batch_size, grad_accum),
            batch=GlobalBatch.of(batch_size, grad_accum, ranks.size, ranks.rank),
            **taken(TrainingData, identity="data_identity"),
        ),
        optimizer=changes.pop("optimizer", lambda m: adamw(m, lr=lr)),
        options=TrainOptions(**options),
        runtime=runtime,
        record=RunRecord(**taken(RunRecord)),
        monitoring=Monitoring(hooks=hooks, **taken(Monitoring)),
        **changes,
    )


def split_run(changes):
    """Flat keywords of a run over samples as a pipeline, samples and what is left."""
    parts = [
        {name: changes.pop(name) for name in list(changes) if name in kind.__dataclass_fields__}
        for kind in (Pipeline, Samples)
    ]
    ranks = changes.pop("ranks", None)
    if ranks is not None:
        changes["runtime"] = Runtime(ranks=ranks)
    return Pipeline(**parts[0]), Samples(**parts[1])


def make_sampling_run(*, folder, **changes):
    """A sampling run from flat keywords."""
    pipeline, samples = split_run(changes)
    return SamplingRun(pipeline, samples, folder=folder, **changes)


def snapshot(trainer):
    """Everything that a resumed run must share with an unbroken one."""
    from zigflow.engine.optim import optimizer_state
    from zigflow.engine.run_state import model_state

    state = {f"model/{k}": v for k, v in model_state(trainer.model).items()}
    for name in trainer.ema.names():
        state |= {f"ema_{name}/{k}": v for k, v in trainer.ema.state_dict(name).items()}
    state |= {f"optimizer/{k}": v for k, v in optimizer_state(trainer.model, trainer.optimizer)[0].items()}
    state["generator"] = torch.get_rng_state()
    return state


def assert_same_bits(a, b):
    assert set(a) == set(b)
    different = [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]
    assert not different, f"these differ: {different}"
