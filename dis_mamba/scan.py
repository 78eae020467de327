"""The selective scan of Mamba, as one function."""

from torch import Tensor

from dis_kernels.checks import check_sequence, check_tensor
from dis_kernels.dispatch import Backend
from dis_kernels.dtypes import state_dtype

from .backends import SCAN
from .backends.call import ScanCall


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The selective state-space recurrence (Gu and Dao, arXiv 2312.00752, algorithm 2), token-major.

    With dt = softplus(delta + delta_bias)::

        h_l = exp(dt_l A) * h_(l-1) + dt_l B_l u_l        h (E, N), zero before the first token
        y_l = (C_l . h_l + D u_l) * silu(z_l)

    The state, A, D and delta_bias are float32 (float64 when ``u`` is); u, delta, B, C and z may be in any floating
    dtype, under autocast the compute dtype.

    Args:
        u: (B, L, E), L >= 1.
        delta: (B, L, E), the step size before bias and softplus.
        A: (E, N), negative for a decaying state.
        B: (B, L, N).
        C: (B, L, N).
        D: (E,) or None: the skip from u to y.
        z: (B, L, E) or None: the gate.
        delta_bias: (E,) or None.
        delta_softplus: apply softplus to delta + delta_bias.
        reverse: walk from the last token to the first, inputs and result in place: equal to flipping every
            argument of shape (B, L, .) along L and the result back.
        backend: "auto", or a name of ``available_backends()``.

    Returns:
        (B, L, E) in the dtype of ``u``.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not float32, bfloat16, float16 or float64.
        ValueError: shapes or devices do not fit, an unknown backend, or the named backend does not take this call.
        RuntimeError: the named backend cannot run on this machine; a second derivative was asked of a backend
            that has none.
    """
    op = "selective_scan"
    check_sequence(op, "u", u, "BLE")
    check_sequence(op, "A", A, "EN")
    sizes = {"B": u.shape[0], "L": u.shape[1], "E": u.shape[2], "N": A.shape[1]}
    required = (("delta", delta, "BLE"), ("A", A, "EN"), ("B", B, "BLN"), ("C", C, "BLN"))
    optional = (("D", D, "E"), ("z", z, "BLE"), ("delta_bias", delta_bias, "E"))
    for name, value, axes in required:
        check_tensor(op, name, value, axes, sizes, u.device)
    for name, value, axes in optional:
        if value is not None:
            check_tensor(op, name, value, axes, sizes, u.device)

    dtype = state_dtype(u.dtype)
    D = None if D is None else D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    call = ScanCall(u, delta, A.to(dtype), B, C, D, z, delta_bias, bool(delta_softplus), bool(reverse))
    return SCAN.run(call, backend)


def register_backend(backend: Backend[ScanCall, Tensor], before: str | None = None) -> None:
    """Add a backend, see :class:`dis_kernels.dispatch.Backend`; ``before`` is the one that "auto" tries after it.

    Raises:
        TypeError: it is no backend.
        ValueError: its name is taken, or there is no backend ``before``.
    """
    SCAN.register(backend, before)


def available_backends() -> dict[str, str | None]:
    """The backends in the order in which "auto" tries them: name -> None, or why this machine cannot run it."""
    return SCAN.available()
