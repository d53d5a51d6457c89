"""A reader of pickles that can run nothing: it builds plain values, and of classes and functions knows a few names.

Python's own unpickler imports what a pickle names and calls it. Here a name is looked up in a table of our functions,
each operation outside the list is refused, and mappings have keys of text and numbers only (nested tuples as keys, a
hundred bytes long, would take years to hash).
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.cli.display import shown

_MAX_OPERATIONS = 500_000  # a checkpoint of a thousand tensors with its optimiser has some 100,000
_MAX_SIZE = 1 << 48
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "BINBYTES8"),
    *("SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, eq=False)
class StoredNumbers:
    """The numbers of one or several tensors, to which a pickle refers by a key."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as a pickle describes it; its numbers are elsewhere in the file."""

    numbers: StoredNumbers
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Known:
    """A class or function that a pickle may name; ``call`` is ours and takes the arguments in the pickle."""

    call: Callable[..., object] | None = None
    dtype: torch.dtype | None = None


def read_pickle(file: io.BytesIO) -> tuple[Any, dict[str, StoredNumbers]]:
    """The value of the pickle at the file's position, with :class:`StoredTensor` for tensors, and all of their numbers.

    Lists, tuples, mappings (an ``OrderedDict`` too), text and numbers are themselves. ``ValueError``, whose message is
    a cause alone, for anything else, before anything of it is built, and for a pickle that is damaged.
    """
    machine = _Machine()
    try:
        for count, (name, argument) in enumerate(_operations(file)):
            if count > _MAX_OPERATIONS:
                cause = f"its pickle has more than {_MAX_OPERATIONS:,} operations"
                raise ValueError(cause)
            machine.step(name, argument)
        return machine.stack.pop(), machine.stored
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(_damaged(error)) from None


def _operations(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Names and arguments of a pickle's operations before its end."""
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STOP":
                return
            yield operation.name, argument
    except ValueError as error:
        raise ValueError(_damaged(error)) from None


def _damaged(error: object) -> str:
    return f"its pickle is damaged: {shown(error, most=100)}"


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.stored: dict[str, StoredNumbers] = {}

    def step(self, name: str, argument: Any) -> None:  # noqa: ANN401 - any literal
        """Carry out one operation."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(self.stack)
            self.stack = []
        elif name not in ("PROTO", "FRAME"):
            self._combine(name, argument)

    def _combine(self, name: str, argument: Any) -> None:  # noqa: ANN401 - any literal
        """Carry out an operation on values that are on the stack."""
        if name == "TUPLE":
            items = self._pop_mark()
            self.stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1) if name == "APPEND" else self._pop_mark()
            _require(list, self.stack[-1]).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if name == "SETITEM" else self._pop_mark()
            _require(dict, self.stack[-1]).update(_pairs(values))
        elif name == "GLOBAL":
            self.stack.append(_known(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(_known(*self._pop(2)))
        elif name == "BINPERSID":
            numbers = _numbers(*self._pop(1))
            self.stack.append(self.stored.setdefault(numbers.key, numbers))
        elif name == "REDUCE":
            known, arguments = self._pop(2)
            if not isinstance(known, _Known) or known.call is None:
                cause = f"it calls a {type(known).__name__}"
                raise ValueError(cause)
            self.stack.append(known.call(*_require(tuple, arguments)))
        elif name == "BUILD":  # the byte order of a numpy type, or the versions of modules in an OrderedDict
            (state,) = self._pop(1)
            if isinstance(self.stack[-1], np.dtype) and ">" in state:
                self.stack[-1] = self.stack[-1].newbyteorder(">")
            elif not isinstance(self.stack[-1], (np.dtype, dict)):
                cause = f"it changes a {type(self.stack[-1]).__name__}"
                raise ValueError(cause)
        else:
            cause = f"its pickle has the operation {name}, which checkpoints do not need"
            raise ValueError(cause)

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count:
            cause = "a value is missing"
            raise ValueError(cause)
        del self.stack[-count:]
        return values

    def _pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self._below.pop()
        return values


def _require(kind: type, value: Any) -> Any:  # noqa: ANN401 - checks the type of any value
    if type(value) is not kind:
        cause = f"a {kind.__name__} is needed where it has a {type(value).__name__}"
        raise TypeError(cause)
    return value


def _pairs(values: Sequence[Any]) -> Iterator[tuple[str | int, Any]]:
    """Keys and values in turn; keys whose hashes may take long, or be equal, are refused."""
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) is not str and not (type(key) is int and abs(key) < 1 << 32):
            cause = f"its pickle has a mapping whose key is a {type(key).__name__}"
            raise ValueError(cause)
        yield key, value


def _known(module: object, name: object) -> _Known:
    full = f"{module}.{name}"
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return _Known(dtype=_STORAGES[str(name)])
    if full not in _CALLS:
        cause = f"its pickle names {shown(full, most=100)}, which is no tensor, number or OrderedDict; nothing was run"
        raise ValueError(cause)
    return _Known(call=_CALLS[full])


def _numbers(reference: Any) -> StoredNumbers:  # noqa: ANN401 - any value
    """The storage of a reference ``("storage", type, key, device, count)``; older files add a view, which is none."""
    what, known, key, _, count, *view = _require(tuple, reference)
    if what != "storage" or known.dtype is None or any(one is not None for one in view):
        cause = "its pickle refers to something else than the numbers of a tensor"
        raise ValueError(cause)
    return StoredNumbers(str(key), known.dtype, _whole(count))


def _whole(value: Any) -> int:  # noqa: ANN401 - any value
    if type(value) is not int or not 0 <= value < _MAX_SIZE:
        cause = f"its pickle has a tensor with the size {shown(repr(value), most=30)}"
        raise ValueError(cause)
    return value


def _tensor(numbers: StoredNumbers, offset: int, shape: Any, stride: Any, *_: object) -> StoredTensor:  # noqa: ANN401 - unchecked
    """The arguments are those of torch's function; of gradients and hooks nothing is kept."""
    sizes, steps = (tuple(map(_whole, _require(tuple, one))) for one in (shape, stride))
    last = _whole(offset) + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    count = math.prod(sizes)
    if count > numbers.count or (count and last >= numbers.count):
        cause = f"its pickle has a tensor of shape {'x'.join(map(str, sizes[:8]))} that is larger than what is stored"
        raise ValueError(cause)
    return StoredTensor(numbers, offset, sizes, steps)


def _numpy_type(code: object, *_: object) -> np.dtype[Any]:
    if re.fullmatch(r"[<>|=]?[biufc][1-8]", str(code)) is None:
        cause = f"its pickle has the numpy type {shown(code, most=30)}, which is no number"
        raise ValueError(cause)
    return np.dtype(str(code))


def _numpy_scalar(kind: Any, data: bytes) -> object:  # noqa: ANN401 - any value
    if not isinstance(kind, np.dtype):
        cause = "a number has no type"
        raise TypeError(cause)
    return np.frombuffer(data, kind, count=1)[0].item()


def _latin1(text: str, encoding: object) -> bytes:
    """Bytes as protocol 2 writes them; there is one encoding."""
    return text.encode("latin1")


def _ordered(items: Sequence[Sequence[Any]] = ()) -> dict[str | int, Any]:
    return dict(_pairs([one for pair in items for one in pair]))


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda values: values,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _latin1,
    "numpy.dtype": _numpy_type,
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
}
