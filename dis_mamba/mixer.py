"""Sequence mixers around the selective scan: one direction, two directions, several orders.

Paper: Gu and Dao, "Mamba", 2023 (arXiv 2312.00752), figure 3; the two-direction form with shared projections is
that of Vision Mamba (arXiv 2401.09417) and DiS (arXiv 2402.05608). Parameter names, shapes and order are those of
the ZigMa and DiS checkpoints.

Dtypes: under autocast the sequences (u, delta, B, C, z) are in the compute dtype. A, D, the step bias and the
state are float32 (float64 in a float64 model) whatever the module was cast to; a module created with a
half-precision ``dtype`` keeps A_log and D in float32.

Shapes: B batch, L tokens, D model width, E = expand * D inner channels, N states, R step rank, W conv taps.
"""

import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_causal_conv1d import causal_conv1d
from dis_causal_conv1d.backends import CONV
from dis_kernels.dispatch import Dispatcher
from dis_kernels.dtypes import state_dtype
from dis_kernels.tokenwise import permute

from .backends import SCAN
from .initialisation import init_step_projection, skip_weight, state_matrix_log
from .scan import selective_scan


class _Weights(NamedTuple):
    """What one direction of a mixer owns."""

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor


class _Mixer(nn.Module):
    """Sizes, factories for the parts that the mixers share, and one direction's computation."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise _unknown_options(type(self).__name__, unknown)
        if isinstance(dt_rank, str):
            if dt_rank != "auto":
                raise ValueError(f"dt_rank = {dt_rank!r}: expected 'auto' or a number")
            dt_rank = math.ceil(d_model / 16)
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, dt_rank
        self.d_inner = int(expand * d_model)
        for name in ("d_model", "d_state", "d_conv", "dt_rank", "d_inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        self.backend = backend
        self._bias, self._conv_bias = bias, conv_bias
        self._step_options = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, backend={self.backend!r}"

    def _make_in_proj(self) -> nn.Linear:
        return nn.Linear(self.d_model, 2 * self.d_inner, bias=self._bias, **self._factory)

    def _make_out_proj(self) -> nn.Linear:
        return nn.Linear(self.d_inner, self.d_model, bias=self._bias, **self._factory)

    def _make_weights(self, init_step: bool = True) -> _Weights:
        """One direction's parts; ``init_step=False`` leaves dt_proj at the default of ``nn.Linear``."""
        # The convolution is computed by causal_conv1d; nn.Conv1d gives names, shapes and default initialization.
        conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            groups=self.d_inner,
            bias=self._conv_bias,
            **self._factory,
        )
        x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **self._factory)
        dt_proj = nn.Linear(self.dt_rank, self.d_inner, **self._factory)
        if init_step:
            init_step_projection(dt_proj, *self._step_options)
        A_log = state_matrix_log(self.d_inner, self.d_state, **self._factory)
        return _Weights(conv1d, x_proj, dt_proj, A_log, skip_weight(self.d_inner, **self._factory))

    def _direction(
        self, x_BLE: Tensor, weights: _Weights, z: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """Convolution and scan with one set of weights; the gate only where ``z`` is given."""
        conv, dt_proj = weights.conv1d, weights.dt_proj
        u_BLE = causal_conv1d(
            x_BLE,
            conv.weight.squeeze(1),
            conv.bias,
            activation="silu",
            reverse=reverse,
            backend=_of(CONV, self.backend),
        )
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt_BLR, B_BLN, C_BLN = weights.x_proj(u_BLE).split(sizes, dim=-1)
        return selective_scan(
            u_BLE,
            F.linear(dt_BLR, dt_proj.weight),
            -torch.exp(weights.A_log.to(state_dtype(u_BLE.dtype))),
            B_BLN,
            C_BLN,
            D=weights.D,
            z=z,
            delta_bias=dt_proj.bias,
            delta_softplus=True,
            reverse=reverse,
            backend=_of(SCAN, self.backend),
        )


class MambaMixer(_Mixer):
    """The Mamba mixer: in_proj to x and z, convolution and SiLU, selective scan gated by z, out_proj.

    Args:
        d_model: width D of the tokens.
        d_state: N, the states of every channel.
        d_conv: W, the taps of the causal convolution.
        expand: inner channels E over D.
        dt_rank: R, the rank of the step projection; "auto" is ceil(D / 16).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: see ``initialisation.init_step_projection``.
        conv_bias: give the convolution a bias.
        bias: give in_proj and out_proj a bias.
        backend: for the convolution and the scan, one that only one of them has for that one; see
            ``mixer_backends``.
        device, dtype: of the parameters.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option out of its range.
    """

    def __init__(self, d_model: int, **options: Any):
        super().__init__(d_model, **options)
        weights = self._make_weights()
        self.A_log, self.D = weights.A_log, weights.D
        self.in_proj = self._make_in_proj()
        self.conv1d, self.x_proj, self.dt_proj = weights[:3]
        self.out_proj = self._make_out_proj()

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix along L, first token to last. (B, L, D) to (B, L, D)."""
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        weights = _Weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        return self.out_proj(self._direction(x_BLE, weights, z=z_BLE))


class BiMambaMixer(_Mixer):
    """Both directions at once: a second set of weights (``*_b``) walks from the last token to the first.

    Both read one in_proj; their results are summed, not halved, gated once by z, and share one out_proj.

    Args:
        d_model: width D of the tokens.
        official_backward_dt_init: leave dt_proj_b at the default of ``nn.Linear``, as the published code does (a
            model that zeroes its biases then starts it at softplus(0) = 0.69); by default it starts as dt_proj.
        options: as in ``MambaMixer``.

    Raises:
        TypeError, ValueError: as ``MambaMixer``.
    """

    def __init__(self, d_model: int, *, official_backward_dt_init: bool = False, **options: Any):
        super().__init__(d_model, **options)
        ahead, back = self._make_weights(), self._make_weights(init_step=not official_backward_dt_init)
        self.A_log, self.D = ahead.A_log, ahead.D
        self.A_b_log, self.D_b = back.A_log, back.D
        self.in_proj = self._make_in_proj()
        self.conv1d, self.x_proj, self.dt_proj = ahead[:3]
        self.conv1d_b, self.x_proj_b, self.dt_proj_b = back[:3]
        self.out_proj = self._make_out_proj()

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix along L in both directions. (B, L, D) to (B, L, D)."""
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        ahead = _Weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        back = _Weights(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        y_BLE = self._direction(x_BLE, ahead) + self._direction(x_BLE, back, reverse=True)
        return self.out_proj(y_BLE * F.silu(z_BLE))


class ParallelMambaMixer(_Mixer):
    """k visiting orders at once, each with its own weights; results put back to the raster, summed, gated once.

    Branch 0 uses the plain weights, branch i >= 1 entry i - 1 of the ``*_b_list`` containers. The published
    containers have k entries, so that the last one belongs to no branch, and hold it under a second name
    (``A_b_log``, ``conv1d_b``, ...). Both are kept: checkpoints fit, and a file may hold either name or both.

    Args:
        d_model: width D of the tokens.
        orders: (k, L) int64, the visiting orders, kept as a non-persistent buffer; or None, then ``forward`` takes
            them and ``num_orders`` says how many.
        num_orders: k, when ``orders`` is None.
        official_backward_dt_init: as in ``BiMambaMixer``, for every entry of the lists.
        options: as in ``MambaMixer``.

    Raises:
        TypeError, ValueError: as ``MambaMixer``; orders that are no permutations, or neither orders nor their number.
    """

    orders: Tensor | None
    inverses: Tensor | None

    def __init__(
        self,
        d_model: int,
        orders: Tensor | None = None,
        *,
        num_orders: int | None = None,
        official_backward_dt_init: bool = False,
        **options: Any,
    ):
        super().__init__(d_model, **options)
        orders, inverses = (None, None) if orders is None else _checked(orders, self._factory["device"])
        if orders is not None:
            num_orders = len(orders) if num_orders is None else num_orders
            if len(orders) != num_orders:
                raise ValueError(f"num_orders = {num_orders}, but orders has shape {tuple(orders.shape)}")
        if num_orders is None or num_orders < 1:
            raise ValueError(f"num_orders = {num_orders}: give orders (k,L), or their number k >= 1")
        self.num_orders = num_orders
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("inverses", inverses, persistent=False)

        plain = self._make_weights()
        sets = [self._make_weights(init_step=not official_backward_dt_init) for _ in range(num_orders)]
        self.A_log, self.D = plain.A_log, plain.D
        self.A_b_log, self.D_b = sets[-1].A_log, sets[-1].D
        self.in_proj = self._make_in_proj()
        self.conv1d, self.x_proj, self.dt_proj = plain[:3]
        self.conv1d_b, self.x_proj_b, self.dt_proj_b = sets[-1][:3]
        self.A_b_log_list = nn.ParameterList(s.A_log for s in sets)
        self.conv1d_b_list = nn.ModuleList(s.conv1d for s in sets)
        self.x_proj_b_list = nn.ModuleList(s.x_proj for s in sets)
        self.dt_proj_b_list = nn.ModuleList(s.dt_proj for s in sets)
        self.D_b_list = nn.ParameterList(s.D for s in sets)
        self.out_proj = self._make_out_proj()
        self.register_load_state_dict_pre_hook(_fill_second_names)

    def forward(self, x_BLD: Tensor, orders: Tensor | None = None) -> Tensor:
        """Mix along every order. (B, L, D) to (B, L, D); ``orders`` (k, L) replaces the stored ones.

        Raises:
            ValueError: no orders are known, or they fit neither the mixer nor the sequence.
        """
        inverses = self.inverses
        if orders is None:
            orders = self.orders
        else:
            inverses = orders.argsort(dim=-1)
        if orders is None or inverses is None:
            raise ValueError("ParallelMambaMixer: no orders: give them to the constructor or to forward")
        wanted = (self.num_orders, x_BLD.shape[1])
        if orders.shape != wanted:
            raise ValueError(
                f"ParallelMambaMixer: orders have shape {tuple(orders.shape)}, expected (k,L) = {wanted}"
            )
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        y_BLE = 0.0
        for i in range(self.num_orders):
            visited_BLE = permute(x_BLE, orders[i], inverses[i])
            y_BLE = y_BLE + permute(self._direction(visited_BLE, self._weights(i)), inverses[i], orders[i])
        out_BLD = self.out_proj(y_BLE * F.silu(z_BLE))
        if self.training and torch.is_grad_enabled():
            # Distributed training waits for the gradient of every parameter: those of no branch receive zeros.
            spare = self._weights(self.num_orders)
            parameters = [
                *spare.conv1d.parameters(),
                spare.x_proj.weight,
                *spare.dt_proj.parameters(),
                *spare[3:],
            ]
            out_BLD = out_BLD + 0.0 * sum(parameter.sum() for parameter in parameters)
        return out_BLD

    def _weights(self, i: int) -> _Weights:
        if i == 0:
            return _Weights(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        lists = (
            self.conv1d_b_list,
            self.x_proj_b_list,
            self.dt_proj_b_list,
            self.A_b_log_list,
            self.D_b_list,
        )
        return _Weights(*(entries[i - 1] for entries in lists))  # type: ignore[arg-type]


def _fill_second_names(module: ParallelMambaMixer, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a state dict holds the last list entries under one of their two names, give it the other one."""
    last = module.num_orders - 1
    for own in [key for key in module.state_dict() if f"_list.{last}" in key]:
        entry = prefix + own
        alias = prefix + own.replace(f"_list.{last}", "")
        if entry in state_dict:
            state_dict.setdefault(alias, state_dict[entry])
        elif alias in state_dict:
            state_dict[entry] = state_dict[alias]


def _checked(orders: Tensor, device: Any) -> tuple[Tensor, Tensor]:
    """Orders (k, L) on ``device`` and their inverses, once every row is known to be a permutation."""
    orders = torch.as_tensor(orders)
    if orders.ndim != 2 or orders.dtype != torch.int64:
        raise ValueError(f"orders: expected (k,L) int64, got {tuple(orders.shape)} {orders.dtype}")
    inverses = orders.argsort(dim=-1)
    wrong = (orders.gather(1, inverses) != torch.arange(orders.shape[1], device=orders.device)).any(1)
    if wrong.any():
        raise ValueError(f"orders: rows {wrong.nonzero().flatten().tolist()} are no permutations of 0..L-1")
    return orders.to(device), inverses.to(device)


def mixer_backends() -> list[str]:
    """The backends that a mixer's ``backend`` names: those of the scan, of the convolution, or of both, and "auto"."""
    return ["auto", *dict.fromkeys([*SCAN.names(), *CONV.names()])]


def _of(op: Dispatcher[Any, Any], backend: str) -> str:
    """``backend``, or "auto" for an operation that has none of that name while the mixer's other one has."""
    return "auto" if backend not in op.names() and backend in mixer_backends() else backend


def _unknown_options(mixer: str, unknown: Iterable[str]) -> TypeError:
    allowed = [
        name
        for name in inspect.signature(_Mixer.__init__).parameters
        if name not in ("self", "d_model", "unknown")
    ]
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
        hints.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return TypeError(f"{mixer}: unknown option {', '.join(hints)}. Allowed: {', '.join(allowed)}")
