"""The models that the stored trajectories of the transport were made with."""

import torch

from zigflow.processes import Flow


class Mixture:
    """The exact prediction for data from a mixture of isotropic Gaussians, at any time of a path.

    It is computed in float64 whatever the state: a prediction of noise is multiplied by up to 1000 in the
    drift, and the rounding of the stand-in would hide that of the code under test.
    """

    def __init__(self, spec, process):
        self.spec = spec
        self.process = process

    def __call__(self, x, t, y=None):
        return self.exact(x.double(), t.double()).to(x.dtype)

    def exact(self, x, t):
        path = self.process.path
        alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
        mu = torch.tensor(self.spec["mu"], dtype=x.dtype)[None]
        sd = torch.tensor(self.spec["sd"], dtype=x.dtype)[None, :, None]
        weight = torch.tensor(self.spec["w"], dtype=x.dtype)[None]
        variance = alpha**2 * sd**2 + sigma**2
        rest = x[:, None] - alpha * mu
        log_part = weight.log() - 0.5 * (rest**2).sum(-1) / variance[..., 0]
        log_part = log_part - 0.5 * x.shape[1] * variance[..., 0].log()
        part = torch.softmax(log_part, dim=1)[..., None]
        if self.process.prediction == "score":
            return -(part * rest / variance).sum(1)
        x0 = (part * sigma * rest / variance).sum(1)
        if self.process.prediction == "noise":
            return x0
        x1 = (part * (mu + alpha * sd**2 * rest / variance)).sum(1)
        return path.d_alpha(t)[:, None] * x1 + path.d_sigma(t)[:, None] * x0


class Affine:
    """v = x A^T + b t."""

    def __init__(self, spec):
        self.spec = spec

    def __call__(self, x, t, y=None):
        a, b = (torch.tensor(self.spec[k], dtype=x.dtype) for k in ("A", "b"))
        return x @ a.T + b * t[:, None]


def build(fixture, row):
    process = Flow(
        row["path"],
        row["prediction"],
        train_eps=row["train_eps"] or None,
        sample_eps=row["sample_eps"] or None,
    )
    spec = fixture.meta["sampler"]["models"][row["model"]]
    return process, Affine(spec) if "A" in spec else Mixture(spec, process)
