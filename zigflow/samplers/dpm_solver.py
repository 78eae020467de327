"""DPM-Solver and DPM-Solver++: exponential integrators of the probability-flow ODE in lambda = log(alpha / sigma).

Lu et al. 2022a (DPM-Solver: noise form), 2022b (DPM-Solver++: data form). The step formulas are in ``dpm_steps``.

Why our own and not diffusers' schedulers: those round times to integers, keep float32 tables, and do not make the
single-step variants that U-ViT's results were sampled with, nor the adaptive one. Here all coefficients are float64,
and lambda comes from expm1 where the published code loses up to 1e-3 of it near the data. Further differences: the
adaptive variant controls each sample's step by its own error (``coupled`` is the published way), and its last step
ends on the interval's end exactly; every variant then makes a last step to the data, as DDIM does, and starts no
further in the noise than ``lambda_floor``.

Shapes: x (B, ...), every time and coefficient (B,).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zigflow.keyed import KeyedDraws
from zigflow.processes import Process, has_path, predict
from zigflow.processes.process import ModelFunction, over_batch, working_dtype
from zigflow.registry import unknown_name

from .conditions import pad_batch
from .doubts import Doubts, dpm_doubts
from .dpm_grids import GRIDS, VARIANTS, Span, plan, raised_start
from .dpm_steps import Node, Steps
from .guidance import Guided
from .solver import (
    DIFFUSION_SAMPLERS,
    Callback,
    FiniteWatch,
    SamplingError,
    TimeRange,
    last_step_to_data,
    name_rows,
)
from .upsampling import Upsampled

FORMS = {"dpm_solver": "noise", "dpm_solver++": "data"}
CORRECTIONS = ("dpm_solver", "taylor")
LAMBDA_FLOOR = -5.1
"""Where the cosine schedule is at s = 0.9946, the published start in continuous time."""

Evaluate = Callable[[Tensor, Node], Tensor]


class DpmSolver:
    """Deterministic sampling by DPM-Solver.

    Args:
        method: "dpm_solver" (noise form) or "dpm_solver++" (data form).
        variant: "singlestep" (steps of that order, as many as fit), "fast" (as many as fit, then a lower one, on a grid
            with an interval for each call), "fast_equal_spans" (the same orders with an interval for each step: the
            "fast" of the first published code, for grid "logSNR"), "multistep" (earlier values instead of inner
            nodes; it starts with a step of order 1, whose error keeps the global order at 2), "adaptive".
        num_steps: calls of the model before the last step, which "fast" and "multistep" make exactly, "singlestep" at
            most; unused by "adaptive".
        order: 1, 2 or 3 (adaptive: 2 or 3).
        grid: of the steps: "logSNR" (even in lambda), "time_uniform", "time_quadratic".
        correction: "dpm_solver" or "taylor", how the higher orders enter; they differ beyond their order.
        lower_order_final: multistep ends with lower orders, 2 and 1: beside the data a grid even in time has steps that
            are long in lambda, on which a high order is far worse than a low one.
        interval: (low, high) process times instead of the process's own, then without a floor.
        atol, rtol, max_steps, coupled: of "adaptive", per sample and on the root mean square over its elements;
            coupled: one step for all samples, as published.
        batch_size: pad smaller batches to this size, so that a sample's bits do not depend on how many there are.
        last_step: end with the data that the model expects at the interval's end, whose noise is else left in the
            samples; one more call of the model.
        lambda_floor: start no further in the noise than this lambda, where the state is still taken as pure noise: a
            schedule such as the discrete cosine's begins at -10, and its first steps are too long for any order. None:
            at the process's first time, as published.

    ``num_function_evaluations`` counts the calls of the model in the last run. What is known to be worse than first
    order (DDIM) with as many calls is logged as a warning, once.

    Raises:
        UnknownNameError: an unknown name.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        method: str = "dpm_solver++",
        variant: str = "fast",
        num_steps: int | str = 50,
        order: int = 3,
        grid: str = "time_uniform",
        correction: str = "dpm_solver",
        lower_order_final: bool = True,
        interval: tuple[float, float] | None = None,
        atol: float = 0.0078,
        rtol: float = 0.05,
        max_steps: int = 10_000,
        coupled: bool = False,
        batch_size: int | None = None,
        last_step: bool = True,
        lambda_floor: float | None = LAMBDA_FLOOR,
    ):
        for what, name, known in (
            ("DPM-Solver", method, list(FORMS)),
            ("correction", correction, list(CORRECTIONS)),
        ):
            if name not in known:
                raise unknown_name(what, name, known)
        layout = VARIANTS.get(variant)
        GRIDS.get(grid)
        if not (2 if layout.adaptive else 1) <= order <= 3:
            raise ValueError(f"order={order}: give 1, 2 or 3, and 2 or 3 for variant=adaptive")
        if not str(num_steps).isdecimal() or int(num_steps) < order:
            raise ValueError(
                f"num_steps={num_steps} of {method} must be a number, and at least the order ({order})"
            )
        if lambda_floor is not None and not lambda_floor < 0:
            raise ValueError(f"lambda_floor is {lambda_floor}; give a negative number, or None for no floor")
        if not (atol >= 0 and rtol >= 0 and atol + rtol > 0):
            raise ValueError(f"atol is {atol} and rtol {rtol}; give numbers >= 0 that are not both 0")
        self.method, self.variant, self.num_steps, self.order = method, variant, int(num_steps), order
        self.layout = layout
        self.grid, self.correction, self.lower_order_final = grid, correction, lower_order_final
        self.interval = interval
        self.atol, self.rtol, self.max_steps, self.coupled = atol, rtol, max_steps, coupled
        self.batch_size = batch_size
        self.last_step, self.lambda_floor = last_step, lambda_floor
        self._doubts = Doubts()
        self.num_function_evaluations = 0

    def time_range(self, process: Process) -> TimeRange:
        """From where to where a run goes, and whether it ends with a step to the data.

        Raises:
            TypeError: the process has no path of alpha and sigma.
        """
        if not has_path(process):
            raise TypeError(_no_path(process))
        path = process.path
        if self.interval is not None:
            low, high = self.interval
        else:
            low, high = process.interval("ode")
            low = low if self.lambda_floor is None else raised_start(path, low, self.lambda_floor)
        return TimeRange(low, high, "data" if self.last_step else None)

    def unfit(self, process: Process) -> str | None:
        """A process without a path of alpha and sigma, or one whose lambda is infinite at an end of its interval."""
        if not has_path(process):
            return _no_path(process)
        ends = self.time_range(process)
        times = torch.tensor([ends.start, ends.stop], dtype=torch.float64)
        if bool(torch.isfinite(process.path.log_snr(times)).all()):
            return None
        return (
            f"{self.method} steps in log(alpha / sigma), which is infinite at an end of the interval "
            f"({ends.start}, {ends.stop}) of {process!r}: set sample_mode=ODE, or train with process=gaussian, vp or "
            "sd_discrete"
        )

    def spans(self, process: Process) -> list[Span]:
        """The steps of a fixed variant, without the last one; see :func:`plan`."""
        ends, path = self.time_range(process), getattr(process, "path", None)
        return plan(self.variant, self.grid, self.num_steps, self.order, path, ends.start, ends.stop)

    def doubts(self, process: Process) -> list[str]:
        """What is known to be worse than DDIM with as many calls; the warnings of a run."""
        if self.layout.adaptive:
            return []
        return dpm_doubts(self, getattr(process, "path", None), self.spans(process))

    @torch.no_grad()
    def sample(
        self,
        process: Process,
        model: ModelFunction,
        x0: Tensor,
        y: Any = None,
        draws: KeyedDraws | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Samples (B, ...) in float32 (float64 for float64 noise) from initial noise x0 (B, ...).

        ``draws`` is accepted for symmetry with the stochastic samplers; nothing is drawn.

        Raises:
            TypeError: the process has no path of alpha and sigma.
            ValueError: lambda is infinite at an end of the interval.
            SamplingError: a state is not finite, or the adaptive variant takes too many steps.
        """
        x, y, _ = pad_batch(x0.to(working_dtype(x0)), y, None, self.batch_size)
        ends = self.time_range(process)
        path: Any = getattr(process, "path", None)
        if self.layout.adaptive and isinstance(model, (Guided, Upsampled)) and not self.coupled:
            model = model.always_doubled()
        form = FORMS[self.method]
        self.num_function_evaluations = 0

        def evaluate(x: Tensor, node: Node) -> Tensor:
            self.num_function_evaluations += 1
            output = predict(process, model, x, node.t, y)
            return process.noise(output, x, node.t) if form == "noise" else process.data(output, x, node.t)

        low, high = ends.start, ends.stop
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        first, last = (
            Node.at(path, torch.full((len(x),), end, dtype=wide, device=x.device)) for end in (low, high)
        )
        if not bool(torch.isfinite(first.lam).all() and torch.isfinite(last.lam).all()):
            raise ValueError(
                f"log(alpha / sigma) is infinite at an end of the interval ({low}, {high}) of {process!r}; give "
                "interval=(low, high) inside it"
            )
        steps, made = Steps(path, form, self.correction), 0

        def after(step: int, t: Tensor, x: Tensor) -> None:
            nonlocal made
            made = step
            if callback is not None:
                callback(step, t, x)

        if self.layout.adaptive:
            x = self._adaptive(steps, evaluate, x, first, last, after)
        else:
            self._doubts.tell(self.doubts(process))
            x = self._fixed(steps, evaluate, x, self.spans(process), after)
        if self.last_step:
            self.num_function_evaluations += 1
            x = last_step_to_data(process, model, x, high, y, made + 1, callback)
        return x[: len(x0)]

    def _fixed(
        self, steps: Steps, evaluate: Evaluate, x: Tensor, spans: list[Span], callback: Callback
    ) -> Tensor:
        wide = torch.float32 if x.device.type == "mps" else torch.float64

        def node(t: float) -> Node:
            return Node.at(steps.path, torch.full((len(x),), t, dtype=wide, device=x.device))

        watch = FiniteWatch(x)
        nodes: list[Node] = []
        values: list[Tensor] = []
        for number, span in enumerate(spans, 1):
            a, b = nodes[-1] if nodes else node(span.times[0]), node(span.times[-1])
            if self.layout.multistep:
                nodes, values = nodes or [a], [*values, evaluate(x, a)][-3:]
                left = len(spans) - number + 1
                order = min(self.order, number, left if self.lower_order_final else self.order)
                x = steps.multistep(x, nodes, b, values, order)
                nodes = [*nodes, b][-3:]
            else:
                x = self._single(steps, evaluate, x, a, [node(t) for t in span.times[1:-1]], b)
                nodes = [b]
            watch.check(x, number, last=number == len(spans))
            callback(number, b.t.to(x.dtype), x)
        return x

    def _single(
        self, steps: Steps, evaluate: Evaluate, x: Tensor, a: Node, inner: list[Node], b: Node
    ) -> Tensor:
        m = evaluate(x, a)
        if not inner:
            return steps.first(x, a, b, m)
        at_n1 = evaluate(steps.first(x, a, inner[0], m), inner[0])
        if len(inner) == 1:
            return steps.second(x, a, inner[0], b, m, at_n1)
        at_n2 = evaluate(steps.third_node(x, a, inner[0], inner[1], m, at_n1), inner[1])
        return steps.third(x, a, inner[0], inner[1], b, m, at_n1, at_n2)

    def _adaptive(
        self,
        steps: Steps,
        evaluate: Evaluate,
        x: Tensor,
        first: Node,
        last: Node,
        callback: Callback,
    ) -> Tensor:
        """Lu et al. 2022a, appendix C.3: orders k-1 and k from the same values, error of their difference."""
        watch, here, previous = FiniteWatch(x), first, x
        tiny = 1e-9 * (last.lam - first.lam)
        h = torch.full_like(first.lam, 0.05)
        for number in range(1, self.max_steps + 1):
            active = here.lam < last.lam - tiny
            # Rows that have arrived walk back instead, where the model is at home; the result is thrown away.
            target = torch.where(active, here.lam + h, torch.maximum(here.lam - 0.05, first.lam))
            ends = active & (here.lam + h >= last.lam - tiny)
            b = Node.at(steps.path, torch.where(ends, last.t, steps.path.time_of_log_snr(2 * target)))
            lower, higher = self._pair(steps, evaluate, x, here, b)
            allowed = (self.rtol * torch.maximum(lower.abs(), previous.abs())).clamp_min(self.atol)
            error = ((higher - lower) / allowed).flatten(1).double().square().mean(1).sqrt()
            error = torch.where(active, error, 0.0)
            if self.coupled:
                error = error.max().expand_as(error)
            accept = active & (error <= 1)
            taken = over_batch(accept, x)
            x, previous = torch.where(taken, higher, x), torch.where(taken, lower, previous)
            pairs = ((b.t, here.t), (b.alpha, here.alpha), (b.sigma, here.sigma), (b.lam, here.lam))
            here = Node(*(torch.where(accept, new, old) for new, old in pairs))
            # A step that is not finite fails here, and not as one that is rejected for ever.
            watch.check(torch.where(over_batch(active, x), higher, x), number)
            h = torch.minimum(0.9 * h * error.pow(-1 / self.order), last.lam - here.lam)
            callback(number, here.t.to(x.dtype), x)
            if not bool((here.lam < last.lam - tiny).any()):
                watch.check(x, number, last=True)
                return x
        late = (here.lam < last.lam - tiny).cpu()
        raise SamplingError(
            f"{name_rows(late)} did not arrive in max_steps={self.max_steps} steps; raise atol, rtol or max_steps"
        )

    def _pair(self, steps: Steps, evaluate: Evaluate, x: Tensor, a: Node, b: Node) -> tuple[Tensor, Tensor]:
        """The states at b of order k - 1 and of order k."""
        m = evaluate(x, a)
        if self.order == 2:
            mid = steps.inner(a, b, 0.5)
            at_mid = evaluate(steps.first(x, a, mid, m), mid)
            return steps.first(x, a, b, m), steps.second(x, a, mid, b, m, at_mid)
        n1, n2 = steps.inner(a, b, 1 / 3), steps.inner(a, b, 2 / 3)
        at_n1 = evaluate(steps.first(x, a, n1, m), n1)
        at_n2 = evaluate(steps.third_node(x, a, n1, n2, m, at_n1), n2)
        return steps.second(x, a, n1, b, m, at_n1), steps.third(x, a, n1, n2, b, m, at_n1, at_n2)


def _register(method: str) -> None:
    def make(
        *,
        num_steps: str = "50",
        eta: float = 0.0,
        variant: str = "fast",
        order: int = 3,
        grid: str = "time_uniform",
        correction: str = "dpm_solver",
        lower_order_final: bool = True,
        last_step: bool = True,
        lambda_floor: float | None = LAMBDA_FLOOR,
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> DpmSolver:
        if eta:
            raise ValueError(f"eta={eta} is for ddim, not {method}: drop it")
        return DpmSolver(
            method, variant, num_steps, order, grid, correction, lower_order_final,
            atol=atol, rtol=rtol, last_step=last_step, lambda_floor=lambda_floor,
        )  # fmt: skip

    DIFFUSION_SAMPLERS.register(method, make)


for _method in FORMS:
    _register(_method)


def _no_path(process: Process) -> str:
    return (
        f"{type(process).__name__} has no path of alpha and sigma: use a sampler of its own, or an ODE method"
    )
