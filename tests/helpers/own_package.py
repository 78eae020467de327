"""A package of one's own that registers one of each kind, found as an installed one is: by its entry points."""

import sys

import pytest
from hydra.core.config_store import ConfigStore

import dis_mamba
from dis_causal_conv1d.backends import CONV
from dis_kernels.tokenwise.backends import READ, WRITE
from dis_mamba.backends import SCAN
from zigflow import names
from zigflow.codec import CODECS
from zigflow.metrics.base import METRICS
from zigflow.processes import BETAS, SCHEDULES, TIME_LAWS
from zigflow.registry import Registry

MODULE = '''
"""One of each kind, registered from outside of zigflow."""

import torch

import dis_mamba
from dis_mamba.backends.reference import ReferenceScan
from zigflow.codec import CODECS
from zigflow.engine.optim import OPTIMIZERS
from zigflow.engine.trackers import register_tracker
from zigflow.metrics.base import METRICS, Metric
from zigflow.processes import BETAS, DIFFUSION_FORMS, INTERPOLANTS, TIME_LAWS, Flow, Interpolant, Prediction
from zigflow.processes import register_prediction
from zigflow.processes.time_laws import TimeLaw
from zigflow.samplers import DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS, SdeStep
from zigflow.samplers.ode_fixed import FixedStep
from zigflow.samplers.solver import TimeRange, full_time

ODE_SOLVERS.register("ralston", FixedStep("ralston", 2, ((), (2 / 3,)), (0.25, 0.75)))


def advance(drift, x, t, h, spread):
    return x + h * drift(x, full_time(t, x)) + 0.5 * spread


SDE_STEPS.register("quiet", SdeStep("quiet", 0.5, 0.5, 1, False, advance))


@DIFFUSION_FORMS.register("flat_form")
def flat_form(path, t, norm):
    return torch.full_like(t, 0.1 * norm)


@DIFFUSION_SAMPLERS.register("one_jump")
class OneJump:
    """The data that the model expects at the noise's end."""

    def __init__(self, num_steps="1"):
        if num_steps != "1":
            raise ValueError(f"num_steps={num_steps}: there is one jump, give 1")
        self.num_function_evaluations = 0

    def time_range(self, process):
        return TimeRange(process.interval("ode")[0], 1.0, "data")

    def unfit(self, process):
        return None if hasattr(process, "data") else "the process has no data prediction"

    def sample(self, process, model, x0, y=None, draws=None, callback=None):
        self.num_function_evaluations = 1
        t = full_time(process.interval("ode")[0], x0)
        return process.data(model(x0, process.time_map(t, model), y)[:, : x0.shape[1]], x0, t)


@INTERPOLANTS.register("Square")
class Square(Interpolant):
    def alpha(self, t):
        return t * t

    def sigma(self, t):
        return 1 - t


@register_prediction("half_v")
class HalfV(Prediction):
    def pair(self, path, t):
        return -0.5 * path.sigma(t), 0.5 * path.alpha(t)


@TIME_LAWS.register("late")
class Late(TimeLaw):
    def quantile(self, u, low, high):
        return low + (high - low) * u.sqrt()


@BETAS.register("even")
def even(num_steps):
    return torch.full((num_steps,), 0.01, dtype=torch.float64)


@OPTIMIZERS.register("own_sgd")
def own_sgd(model, *, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


@CODECS.register("halves")
class Halves:
    """Half of each value; its scale is its own."""

    def __init__(self, part=0.5):
        self.part = part

    def encode(self, batch):
        return self.part * batch.pixels

    def decode(self, x):
        return x / self.part


@METRICS.register("brightness")
class Brightness(Metric):
    name = "brightness"

    def __init__(self):
        super().__init__()
        self._forget()

    @classmethod
    def real_sets(cls, options):
        return ()

    def set_reference(self, train, heldout=None):
        pass

    def _take(self, images, labels, ids):
        self.total += float(images.double().sum())
        self.values += images.numel()

    def _forget(self):
        self.total, self.values = 0.0, 0

    def _state(self):
        return {"sums": torch.tensor([self.total, self.values], dtype=torch.float64)}

    def _absorb(self, state):
        self.total += float(state["sums"][0])
        self.values += int(state["sums"][1])

    def compute(self):
        self._require_samples()
        return {"brightness": self.total / self.values}


@register_tracker("lines")
class Lines:
    def __init__(self, run):
        self.file = run.folder / "lines.txt"

    def log(self, values, step):
        with self.file.open("a") as file:
            file.write(f"{step} {sorted(values)}\\n")

    def image(self, name, path, step):
        pass

    def state(self):
        return {"kept": 1}

    def finish(self):
        pass


@dis_mamba.register_mixer("last_token")
class LastToken(torch.nn.Module):
    def __init__(self, d_model, *, device=None, dtype=None, **_):
        super().__init__()
        self.mix = torch.nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x):
        return self.mix(x + x[:, -1:])


class CountedScan(ReferenceScan):
    name = "counted"
    calls = 0

    def run(self, call):
        CountedScan.calls += 1
        return super().run(call)


dis_mamba.register_backend(CountedScan())


class OwnFlow(Flow):
    """A subclass under another name."""


class OwnIdentity(CODECS.get("pixels")):
    """A subclass under another name."""
'''


def _registries() -> list[Registry]:
    known = [each for each in names.named_keys().values() if isinstance(each, Registry)]
    return [*known, CODECS, METRICS, BETAS, SCHEDULES, TIME_LAWS]


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """Puts the package onto the path; what it registers is gone after the test."""
    registries = _registries()
    kept = [(dict(each._entries), dict(each._origins)) for each in registries]
    dispatchers = [(each, each.backends) for each in (SCAN, CONV, READ, WRITE)]
    mixers = dict(dis_mamba.registry._mixers)
    store = {group: set(ConfigStore.instance().repo.get(group, {})) for group in ("codec", "metrics")}
    folder = tmp_path / "site"
    info = folder / "own_kinds-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zigflow.plugins]\nown_kinds = own_kinds\n")
    (folder / "own_kinds.py").write_text(MODULE)

    def install():
        monkeypatch.syspath_prepend(str(folder))

    yield install
    sys.modules.pop("own_kinds", None)
    for each, (entries, origins) in zip(registries, kept, strict=True):
        each._entries, each._origins = entries, origins
    for each, backends in dispatchers:
        each.backends = backends
    dis_mamba.registry._mixers.clear()
    dis_mamba.registry._mixers.update(mixers)
    for group, names_before in store.items():
        for name in set(ConfigStore.instance().repo.get(group, {})) - names_before:
            del ConfigStore.instance().repo[group][name]
