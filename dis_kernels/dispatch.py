"""Choosing a backend for an operation: the one mechanism of all operations.

An operation has a tuple of backends, fastest first; the last one of ours is the definition, and other packages register
theirs. ``backend="auto"`` takes the first that accepts the call and logs the choice once. A backend that is named
explicitly runs or raises. What a backend raises while it runs reaches the caller: nothing falls back to a slower path.

Environment: ``ZIGFLOW_BACKEND`` names the backend of every call that says "auto", as if the whole process ran inside
``use_backend``.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level  # torch.func has no public way to ask
from torch.autograd import forward_ad

CallT = TypeVar("CallT", contravariant=True)
ResultT = TypeVar("ResultT", covariant=True)

_dispatchers: list["Dispatcher[Any, Any]"] = []
_announced: set[tuple[str, str]] = set()
_preferred = "auto"


class Backend(Protocol[CallT, ResultT]):
    """One way to compute an operation. A call is the operation's NamedTuple of validated arguments."""

    name: str

    def unavailable(self) -> str | None:
        """Why this machine cannot run the backend (a package or device is missing), or None."""
        ...

    def accepts(self, call: CallT, /) -> str | None:
        """Why the backend does not take this call, or None when it does."""
        ...

    def run(self, call: CallT, /) -> ResultT: ...


class Dispatcher(Generic[CallT, ResultT]):
    """The backends of one operation in the order in which ``auto`` tries them.

    A name that ``use_backend`` or the environment prefers and that only other operations know stands here for
    ``otherwise``, the name of one of ``backends`` or "auto"; without it such a name is an error. So does, in compiled
    code, the name of a backend whose ``eager_only`` is true: torch.compile makes the operation one kernel with its
    neighbors.
    """

    def __init__(self, op: str, backends: Sequence[Backend[CallT, ResultT]], otherwise: str | None = None):
        self.op = op
        self.backends = tuple(backends)
        self.otherwise = otherwise
        _dispatchers.append(self)

    def register(self, backend: Backend[CallT, ResultT], before: str | None = None) -> None:
        """Add a backend, of another package too.

        Args:
            before: the name of the backend that "auto" tries after this one. None puts it behind the definition, which
                takes every call: the backend then runs where it is named.

        Raises:
            TypeError: it lacks ``name``, ``unavailable``, ``accepts`` or ``run``.
            ValueError: its name is taken, or there is no backend ``before``.
        """
        name = getattr(backend, "name", None)
        if not isinstance(name, str) or not all(
            callable(getattr(backend, method, None)) for method in ("unavailable", "accepts", "run")
        ):
            raise TypeError(
                f"{self.op}: {type(backend).__name__} is no backend: it needs name, unavailable(), accepts(call) and "
                "run(call)"
            )
        known = self.names()
        if name in (*known, "auto"):
            raise ValueError(f"{self.op}: backend {name!r} is already registered, choose another name")
        if before is not None and before not in known:
            raise _unknown(self.op, before, known)
        place = len(known) if before is None else known.index(before)
        self.backends = (*self.backends[:place], backend, *self.backends[place:])

    def names(self) -> list[str]:
        """The names of all backends, in the order in which ``auto`` tries them."""
        return [backend.name for backend in self.backends]

    def available(self) -> dict[str, str | None]:
        """Every backend by name, with the reason why it cannot run on this machine or None."""
        return {backend.name: backend.unavailable() for backend in self.backends}

    def select(self, call: CallT, name: str = "auto") -> Backend[CallT, ResultT]:
        """The backend that will run ``call``.

        Raises:
            ValueError: no backend has that name, or the named one does not take this call.
            RuntimeError: the named backend cannot run on this machine, or no backend takes the call.
        """
        if name == "auto":
            name = self._own(_preferred)
        if name == "auto":
            name = self._own(_from_environment())
            known = ["auto", *(backend.name for backend in self.backends)]
            if name not in known:
                raise _unknown(f"{self.op}: ZIGFLOW_BACKEND", name, known[1:])
        if name != "auto":
            return self._named(call, name)
        refusals = []
        for backend in self.backends:
            # The cheap question first: a backend may compile its kernel to answer the other one.
            reason = backend.accepts(call) or backend.unavailable()
            if reason is None:
                return backend
            refusals.append(f"{backend.name}: {reason}")
        raise RuntimeError(f"{self.op}: no backend takes this call. " + "; ".join(refusals))

    def run(self, call: CallT, name: str = "auto") -> ResultT:
        """Select a backend as ``select`` does, log a first choice, and compute.

        A call on the meta device only asks for shapes or operations: what it takes is no choice and not logged.
        """
        backend = self.select(call, name)
        if not _computes_nothing(call):
            _announce(self.op, backend.name)
        return backend.run(call)

    def _own(self, preferred: str) -> str:
        """``preferred``, or what stands for it where only another operation has a backend of that name."""
        compiling = torch.compiler.is_compiling()
        own = [b.name for b in self.backends if not (compiling and getattr(b, "eager_only", False))]
        if self.otherwise is None or preferred in ("auto", *own) or preferred not in _known_names():
            return preferred
        return self.otherwise

    def _named(self, call: CallT, name: str) -> Backend[CallT, ResultT]:
        for backend in self.backends:
            if backend.name == name:
                reason = backend.unavailable()
                if reason is not None:
                    raise RuntimeError(f"{self.op}: backend {name!r} cannot run here: {reason}")
                reason = backend.accepts(call)
                if reason is not None:
                    raise ValueError(f"{self.op}: backend {name!r} does not take this call: {reason}")
                return backend
        raise _unknown(self.op, name, self.names())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, calls with ``backend="auto"`` of every operation run as if they named ``name``.

    The choice belongs to the process, not to the thread, so that activation checkpointing, which runs a forward
    pass again in a thread of autograd's, sees it too. An explicit ``backend=`` argument wins.

    Raises:
        ValueError: no operation has a backend of that name.
    """
    global _preferred
    if name not in _known_names():
        raise _unknown("use_backend", name, _known_names())
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


def transform_reason(tensors: Sequence[Tensor | None]) -> str | None:
    """Why a registered custom operator would be wrong here, or None: a torch.func transform or a tangent is in play.

    Such an operator has no forward-mode rule and yet raises nothing: its tangents come out as zeros.
    """
    if _inside_functorch():
        return (
            "it runs inside a torch.func transform (grad, vjp, jvp, vmap, ...): use use_backend('reference')"
        )
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            return "an input carries a forward-mode tangent: use use_backend('reference')"
    return None


# torch.compile cannot trace the query, whose answer is fixed while it traces (transforms are part of the trace).
@torch.compiler.assume_constant_result
def _inside_functorch() -> bool:
    return maybe_current_level() is not None


@torch.compiler.assume_constant_result
def _from_environment() -> str:
    return os.environ.get("ZIGFLOW_BACKEND") or "auto"


@torch.compiler.assume_constant_result
def _announce(op: str, backend: str) -> None:
    if (op, backend) not in _announced:
        _announced.add((op, backend))
        logging.getLogger(__name__).info("%s runs on backend %r", op, backend)


def _computes_nothing(call: Any) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "meta" for value in call)


def _known_names() -> list[str]:
    return sorted({backend.name for each in _dispatchers for backend in each.backends})


def _unknown(op: str, name: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(str(name), [*known, "auto"], n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"{op}: unknown backend {name!r}.{hint} Known: auto, {', '.join(known)}")
