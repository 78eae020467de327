"""Problems with known answers."""

import torch


class Gaussian:
    """The exact network for data N(mean, std^2 I): every quantity is affine in x."""

    def __init__(self, flow, mean=0.7, std=0.5):
        self.flow, self.mean, self.std = flow, mean, std

    def __call__(self, x, t, y=None):
        path = self.flow.path
        shape = (-1, *(1,) * (x.ndim - 1))
        alpha, sigma = path.alpha(t).reshape(shape), path.sigma(t).reshape(shape)
        rest = (x - alpha * self.mean) / self.variance(t).reshape(shape)
        x1 = self.mean + alpha * self.std**2 * rest
        x0 = sigma * rest
        if self.flow.prediction == "velocity":
            return path.d_alpha(t).reshape(shape) * x1 + path.d_sigma(t).reshape(shape) * x0
        return {"data": x1, "noise": x0, "score": -rest}[self.flow.prediction]

    def variance(self, t):
        return (self.flow.path.alpha(t) * self.std) ** 2 + self.flow.path.sigma(t) ** 2

    def moments(self, t):
        """Mean and variance of x_t."""
        t = torch.tensor(t, dtype=torch.float64)
        return (self.flow.path.alpha(t) * self.mean).item(), self.variance(t).item()


class Network:
    """A small random network whose products depend, in their last bits, on the batch size.

    On some CPUs a product with few columns depends on the row, too; 16 columns are enough for it not to.
    """

    null_row = 5

    def __init__(self, dims=16, width=48):
        g = torch.Generator().manual_seed(3)
        self.w1 = torch.randn(dims, width, generator=g) / dims**0.5
        self.w2 = torch.randn(width, dims, generator=g) / width**0.5
        self.table = torch.randn(self.null_row + 1, width, generator=g)
        self.calls = []
        self.times = []

    def null_condition(self, y):
        return torch.full_like(y, self.null_row)

    def __call__(self, x, t, y=None):
        self.calls.append(x.shape[0])
        self.times.append(t.clone())
        hidden = x @ self.w1.to(x.dtype) + 3 * t[:, None]
        if y is not None:
            hidden = hidden + self.table.to(x.dtype)[y]
        return torch.tanh(hidden) @ self.w2.to(x.dtype)


def slope(steps, errors):
    """The order p in error ~ steps^-p, by least squares on logarithms."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())
