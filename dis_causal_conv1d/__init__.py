"""A causal depthwise convolution over token-major sequences: one function, several backends."""

from torch import Tensor

from dis_kernels import use_backend
from dis_kernels.checks import check_sequence, check_tensor
from dis_kernels.dispatch import Backend

from .backends import CONV
from .backends.call import ConvCall

__all__ = ["ConvCall", "available_backends", "causal_conv1d", "register_backend", "use_backend"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution in which token l sees tokens l - W + 1 to l (Mamba, arXiv 2312.00752, section 3.4).

    The values are those of ``F.conv1d(groups=E, padding=W - 1)`` without the W - 1 trailing tokens. Half-precision
    input is accumulated in float32; the parameters may be in another floating dtype than ``x``.

    Args:
        x: (B, L, E), L >= 1.
        weight: (E, W), W >= 1; the last tap meets the current token.
        bias: (E,) or None.
        activation: None, or "silu" ("swish" is the same).
        reverse: walk from the last token to the first: token l sees tokens l to l + W - 1. Equal to flipping the
            input along L and the result back.
        backend: "auto", or a name of ``available_backends()``.

    Returns:
        (B, L, E) in the dtype of ``x``.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not float32, bfloat16, float16 or float64.
        ValueError: shapes or devices do not fit, an unknown activation or backend, or the named backend does not
            take this call.
        RuntimeError: the named backend cannot run on this machine.
    """
    op = "causal_conv1d"
    check_sequence(op, "x", x, "BLE")
    check_sequence(op, "weight", weight, "EW")
    sizes = {"E": x.shape[2], "W": weight.shape[1]}
    check_tensor(op, "weight", weight, "EW", sizes, x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, "E", sizes, x.device)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: unknown activation {activation!r}, expected None, 'silu' or 'swish'")
    return CONV.run(ConvCall(x, weight, bias, activation is not None, bool(reverse)), backend)


def register_backend(backend: Backend[ConvCall, Tensor], before: str | None = None) -> None:
    """Add a backend, see :class:`dis_kernels.dispatch.Backend`; ``before`` is the one that "auto" tries after it.

    Raises:
        TypeError: it is no backend.
        ValueError: its name is taken, or there is no backend ``before``.
    """
    CONV.register(backend, before)


def available_backends() -> dict[str, str | None]:
    """The backends in the order in which "auto" tries them: name -> None, or why this machine cannot run it."""
    return CONV.available()
