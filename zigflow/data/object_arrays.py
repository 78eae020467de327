"""Pickled numpy arrays of objects, read without unpickling.

``numpy.save`` of a pair such as (moments, label) writes a pickle. Here no object is built by it: its operations are
followed on plain values, the few that describe arrays, numbers and texts are known, and every other one ends the
reading with its name. Nothing named by the file is imported or called.

Source: the pickle protocols 3 and 4 (PEP 3154; ``pickletools``), numpy's ``ndarray.__reduce__``, ``dtype.__reduce__``.
"""

import io
import math
import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .decode import DEFAULT_LIMITS, DecodeError, Limits, npy_header

ADMITTED = "arrays of numbers, numbers and texts are read, nothing else"
_MAX_OPERATIONS = 10_000
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_FUNCTIONS = ("_reconstruct", "ndarray", "dtype", "scalar")
_NUMBERS = re.compile(r"[fiu][1248]|b1")


@dataclass
class _Global:
    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "|"

    def numpy(self) -> np.dtype:
        if not _NUMBERS.fullmatch(self.code) or self.order not in "<>|=":
            raise DecodeError(f"an array of type {self.order}{self.code} inside: {ADMITTED}")
        return np.dtype(self.order.replace("=", "<") + self.code)


@dataclass
class _Array:
    """Empty until its state is set: numbers, or the items of the array of objects."""

    value: np.ndarray | None = None
    items: tuple[Any, ...] | None = None


class _Mark:
    pass


def decode_objects(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[np.ndarray | str, ...]:
    """The items of a one-dimensional npy array of objects: arrays of numbers (a number has shape ()) and texts.

    Args:
        data: the whole file.
        limits: bytes of the file and of all arrays in it together, and of a text.

    Raises:
        DecodeError: the file is damaged, over budget, or holds anything else; what was found is named.
    """
    if len(data) > limits.max_bytes:
        raise DecodeError(f"{len(data)} bytes, the budget is {limits.max_bytes}")
    begin, shape, _, dtype = npy_header(data)
    if dtype != np.dtype(object):
        raise DecodeError(f"an npy array of objects is needed, this one has type {dtype}")
    result = _Machine(limits).run(data[begin:])
    if not isinstance(result, _Array) or result.items is None:
        raise DecodeError(f"no array of objects but {_what(result)}: {ADMITTED}")
    if len(shape) != 1 or shape[0] != len(result.items):
        raise DecodeError(
            f"the npy header declares shape {str(shape)[:80]}, there are {len(result.items)} objects"
        )
    return tuple(_item(item) for item in result.items)


def _item(item: Any) -> np.ndarray | str:
    if isinstance(item, str):
        return item
    if isinstance(item, _Array) and item.value is not None:
        return item.value
    if isinstance(item, (int, float)):
        try:
            return np.array(item, dtype=np.float64 if isinstance(item, float) else np.int64)
        except OverflowError as error:
            raise DecodeError("a number of more than 64 bits inside") from error
    raise DecodeError(f"{_what(item)} inside: {ADMITTED}")


def _what(value: Any) -> str:
    if isinstance(value, _Global):
        return value.name
    if isinstance(value, _Array):
        return "an array of objects" if value.items is not None else "an array without contents"
    return f"a {type(value).__name__.strip('_').lower()}"


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.bytes_left = limits.max_bytes

    def run(self, data: bytes) -> Any:
        count, end = 0, len(data)
        stream = io.BytesIO(data)
        try:
            for operation, argument, _ in pickletools.genops(stream):
                count += 1
                if count > _MAX_OPERATIONS:
                    raise DecodeError(f"a pickle of more than {_MAX_OPERATIONS} operations")
                self._step(operation.name, argument)
        except DecodeError:
            raise
        # A damaged pickle ends in exceptions of many kinds, of pickletools and of the stack.
        except Exception as error:
            raise DecodeError(f"a damaged pickle: {type(error).__name__}: {str(error)[:120]}") from error
        if stream.tell() != end:
            raise DecodeError(f"{end - stream.tell()} bytes follow the end of the pickle")
        if len(self.stack) != 1:
            raise DecodeError(f"a damaged pickle: it leaves {len(self.stack)} values")
        return self.stack[0]

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            if isinstance(argument, str) and len(argument) > self.limits.max_text:
                raise DecodeError(f"{len(argument)} characters of text, the budget is {self.limits.max_text}")
            self.stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name == "MARK":
            self.stack.append(_Mark)
        elif name == "EMPTY_LIST":
            self.stack.append([])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self.stack.pop() for _ in range(int(name[-1]))]
            self.stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            self.stack.append(tuple(self._to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [self.stack.pop()] if name == "APPEND" else self._to_mark()
            self._top(list).extend(items)
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            self.stack.append(_known(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(_known(str(module)[:80], str(attribute)[:80]))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = self.stack.pop()
            self._set_state(self.stack[-1], state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise DecodeError(f"the pickle operation {name} is not admitted: {ADMITTED}")

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise DecodeError(f"a damaged pickle: {_what(self.stack[-1])} where a {kind.__name__} is needed")
        return self.stack[-1]

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _Mark:
            items.append(item)
        return items[::-1]

    def _call(self, function: Any, arguments: Any) -> Any:
        called = function.name if isinstance(function, _Global) else _what(function)
        if isinstance(arguments, tuple):
            if called == "dtype" and len(arguments) == 3 and isinstance(arguments[0], str):
                return _Dtype(arguments[0][:8])
            if called == "_reconstruct" and arguments == (_Global("ndarray"), (0,), b"b"):
                return _Array()
            if called == "scalar" and len(arguments) == 2 and isinstance(arguments[0], _Dtype):
                return _Array(self._numbers(arguments[0], (), False, arguments[1]))
        raise DecodeError(f"a call of {called} with unknown arguments: {ADMITTED}")

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, _Dtype) and isinstance(state, tuple) and len(state) == 8:
            version, order, *rest = state[:5]
            # Behind the byte order: no sub-type, no names, no fields.
            if version == 3 and isinstance(order, str) and rest == [None, None, None]:
                target.order = order
                return
        elif isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, content = state
            if target.value is None and target.items is None and isinstance(dtype, _Dtype):
                if dtype.code == "O8":
                    target.items = self._objects(shape, content)
                else:
                    target.value = self._numbers(dtype, shape, bool(fortran), content)
                return
        raise DecodeError(f"a state of {_what(target)} that is not known: {ADMITTED}")

    @staticmethod
    def _objects(shape: Any, content: Any) -> tuple[Any, ...]:
        if not isinstance(content, list) or not isinstance(shape, tuple) or shape != (len(content),):
            raise DecodeError(f"an array of objects of shape {str(shape)[:80]} that holds {_what(content)}")
        return tuple(content)

    def _numbers(self, dtype: _Dtype, shape: Any, fortran: bool, content: Any) -> np.ndarray:
        kind = dtype.numpy()
        if (
            not isinstance(shape, tuple)
            or len(shape) > 8
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise DecodeError(f"an array of shape {str(shape)[:80]} inside")
        if not isinstance(content, bytes):
            raise DecodeError(f"an array of {kind} that holds {_what(content)} inside")
        declared = math.prod(shape) * kind.itemsize
        if declared != len(content):
            raise DecodeError(f"an array declares {declared} bytes of data, {len(content)} are there")
        # Arrays may share their bytes in the file, which would multiply them here.
        self.bytes_left -= declared
        if self.bytes_left < 0:
            raise DecodeError(
                f"arrays of more than {self.limits.max_bytes} bytes together, which is the budget"
            )
        array = np.frombuffer(content, dtype=kind).reshape(shape, order="F" if fortran else "C")
        return array.astype(kind.newbyteorder("="), order="C", copy=True)


def _known(module: str, attribute: str) -> _Global:
    if module not in _MODULES or attribute not in _FUNCTIONS:
        raise DecodeError(f"it holds {module[:80]}.{attribute[:80]}: {ADMITTED}")
    return _Global(attribute)


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
        "SHORT_BINBYTES",
    )
)  # fmt: skip
