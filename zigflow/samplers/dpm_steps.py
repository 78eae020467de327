"""The step formulas of DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), for :mod:`zigflow.samplers.dpm_solver`.

In lambda = log(alpha / sigma) the probability-flow ODE has an exact linear part, and the step from a to b, with
H = lambda_b - lambda_a in the noise form and minus that in the data form, is

    x_b = A x_a - S [phi1 m + phi2 m' + phi3 m'' ...],  phi1 = expm1(H), phi2 = phi1 / H - 1, phi3 = phi2 / H - 1/2

with A = alpha_b / alpha_a, S = sigma_b, m the noise, or A = sigma_b / sigma_a, S = alpha_b, m the data; m' and
m'' are finite differences in units of H. Both forms are one code with one sign.

Shapes: x (B, ...), every time and coefficient (B,).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zigflow.processes.process import over_batch


@dataclass(frozen=True)
class Node:
    """A time of every sample and what the schedule says there, in float64."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @classmethod
    def at(cls, path: Any, t: Tensor) -> "Node":
        return cls(t, path.alpha(t), path.sigma(t), path.log_snr(t) / 2)

    @classmethod
    def of_lambda(cls, path: Any, lam: Tensor) -> "Node":
        return cls.at(path, path.time_of_log_snr(2 * lam))


@dataclass(frozen=True)
class Steps:
    """The step formulas. ``form``: "noise" or "data"; ``correction``: how second and third order enter."""

    path: Any
    form: str
    correction: str

    def advance(self, x: Tensor, a: Node, b: Node, terms: list[tuple[Tensor | float, int, Tensor]]) -> Tensor:
        """A x - S sum of factor * phi_k * value over ``terms`` (factor, k, value)."""
        noise = self.form == "noise"
        H = b.lam - a.lam if noise else a.lam - b.lam
        phi1 = torch.expm1(H)
        phi2 = phi1 / H - 1
        phis = (phi1, phi2, phi2 / H - 0.5)
        ratio, scale = (b.alpha / a.alpha, b.sigma) if noise else (b.sigma / a.sigma, b.alpha)
        result = over_batch(ratio.to(x.dtype), x) * x
        for factor, k, value in terms:
            result = result - over_batch((scale * factor * phis[k - 1]).to(x.dtype), x) * value
        return result

    def first(self, x: Tensor, a: Node, b: Node, m: Tensor) -> Tensor:
        return self.advance(x, a, b, [(1.0, 1, m)])

    def inner(self, a: Node, b: Node, share: float) -> Node:
        """The node at a share of the way in lambda."""
        return Node.of_lambda(self.path, a.lam + share * (b.lam - a.lam))

    def second(self, x: Tensor, a: Node, mid: Node, b: Node, m: Tensor, at_mid: Tensor) -> Tensor:
        """Order 2 from the values at a and at a node between."""
        share = (mid.lam - a.lam) / (b.lam - a.lam)
        change = at_mid - m
        correction = (0.5 / share, 1, change) if self.correction == "dpm_solver" else (1 / share, 2, change)
        return self.advance(x, a, b, [(1.0, 1, m), correction])

    def third_node(self, x: Tensor, a: Node, n1: Node, n2: Node, m: Tensor, at_n1: Tensor) -> Tensor:
        """The state at the second of two inner nodes, from the values at a and at the first."""
        factor = (n2.lam - a.lam) / (n1.lam - a.lam)
        return self.advance(x, a, n2, [(1.0, 1, m), (factor, 2, at_n1 - m)])

    def third(
        self, x: Tensor, a: Node, n1: Node, n2: Node, b: Node, m: Tensor, at_n1: Tensor, at_n2: Tensor
    ) -> Tensor:
        """Order 3 from the values at a and at two nodes between."""
        h = b.lam - a.lam
        r1, r2 = (n1.lam - a.lam) / h, (n2.lam - a.lam) / h
        if self.correction == "dpm_solver":
            return self.advance(x, a, b, [(1.0, 1, m), (1 / r2, 2, at_n2 - m)])
        # First and second differences of the parabola through the three values.
        d1, d2 = at_n1 - m, at_n2 - m
        gap = r2 - r1
        return self.advance(
            x, a, b,
            [(1.0, 1, m), (r2 / (r1 * gap), 2, d1), (-r1 / (r2 * gap), 2, d2),
             (-2 / (r1 * gap), 3, d1), (2 / (r2 * gap), 3, d2)],
        )  # fmt: skip

    def multistep(self, x: Tensor, nodes: list[Node], b: Node, values: list[Tensor], order: int) -> Tensor:
        """A step of ``order`` to b from the last nodes and the values there, the latest last."""
        a, m = nodes[-1], values[-1]
        if order == 1:
            return self.first(x, a, b, m)
        h = b.lam - a.lam
        r0 = (a.lam - nodes[-2].lam) / h
        recent = m - values[-2]
        if order == 2:
            half = (0.5 / r0, 1, recent) if self.correction == "dpm_solver" else (1 / r0, 2, recent)
            return self.advance(x, a, b, [(1.0, 1, m), half])
        r1 = (nodes[-2].lam - nodes[-3].lam) / h
        older = values[-2] - values[-3]
        total = r0 + r1
        share = r0 / total
        return self.advance(
            x, a, b,
            [(1.0, 1, m), ((1 + share) / r0, 2, recent), (-share / r1, 2, older),
             (1 / (r0 * total), 3, recent), (-1 / (r1 * total), 3, older)],
        )  # fmt: skip
