"""A reader of pickle protocol 2 as ``torch.save`` uses it for tensors, arrays and plain data.

The opcodes are interpreted here, by a table of what each does to a stack. A name in the file never
becomes an object of Python: it is looked up in ``_NAMES``, whose few functions check their
arguments and build tensors and arrays from bytes. So there is no import, no call and no attribute
that a file could ask for, and one that asks is refused by name.
"""

from __future__ import annotations

import math
import re
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mttl_experts.errors import ExpertError

STEPS = 4_000_000
"""Most opcodes in one file; a tensor takes about 30."""
DEPTH = 64
"""How deep containers may lie in each other."""
NODES = 2_000_000
"""Most values in what comes out, one that is referred to twice counting twice."""
_OPCODE_NAMES = {opcode.code: opcode.name for opcode in opcodes}
_show = reprlib.Repr()  # never longer than a line, however large or deep the value
_show.maxlevel, _show.maxstring, _show.maxlong = 2, 60, 40

LoadStorage = Callable[[str, torch.dtype, int], Tensor]
"""Gives the (n,) values of a storage by its key, dtype and number of elements."""


class RefusedFileError(ExpertError, ValueError):
    """A file holds what this version does not read; nothing in it was run."""


class _Function(NamedTuple):
    """A name that a file may use, and what stands for it here."""

    name: str
    call: Callable[..., Any] | None


@dataclass
class _Dtype:
    code: str
    order: str = "<"

    def build(self, state: Any) -> None:
        """Take (version, byte order, …) as numpy pickles it."""
        if not (isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|", "=")):
            raise RefusedFileError("a dtype with fields or of an unknown form")
        if any(part is not None for part in state[2:5]):
            raise RefusedFileError("a dtype with fields; only plain numbers are read")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """An array between being made empty and being filled."""

    value: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        """Take (version, shape, dtype, Fortran order, bytes)."""
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype)):
            raise RefusedFileError("an array of an unknown form")
        _, shape, dtype, fortran, data = state
        data = _bytes(data)
        if _count(shape) * dtype.numpy().itemsize != len(data):
            raise RefusedFileError(f"an array of shape {_show.repr(shape)} with {len(data)} bytes")
        flat = np.frombuffer(data, dtype.numpy())
        self.value = flat.reshape(shape, order="F" if fortran else "C")  # no copy yet


class Machine:
    """Interprets one pickle.

    Args:
        data: the pickle.
        load_storage: where tensors get their values from.
        room: most bytes of tensors and arrays, one that is referred to twice counting twice.
    """

    def __init__(self, data: bytes, load_storage: LoadStorage, room: int) -> None:
        """Nothing is read yet."""
        self._data = data
        self._room = room
        self._place = 0
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks set aside by MARK
        self._memo: dict[int, Any] = {}
        self._nodes = 0

    def run(self) -> Any:
        """The value in the file, made of dict, list, tuple, str, bytes, numbers, tensors, arrays.

        Raises:
            RefusedFileError: saying what in the file is refused.
        """
        try:
            for _ in range(STEPS):
                code = self._take(1)
                if code == b".":
                    return self._finished(self._pop(), 0)
                step = _OPCODES.get(code)
                if step is None:
                    name = _OPCODE_NAMES.get(code.decode("latin1"), code)
                    raise RefusedFileError(f"the opcode {name!r}")
                step(self)
        except (IndexError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise RefusedFileError(f"no whole pickle ({type(error).__name__}: {error})") from None
        raise RefusedFileError(f"more than {STEPS} opcodes")

    # Bytes and stack.

    def _take(self, count: int) -> bytes:
        part = self._data[self._place : self._place + count]
        if len(part) != count:
            raise RefusedFileError("no whole pickle (it ends early)")
        self._place += count
        return part

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._place, self._place + 256)
        if end < 0:
            raise RefusedFileError("no whole pickle (a name without an end)")
        return self._take(end + 1 - self._place)[:-1].decode()

    def _pop(self) -> Any:
        return self._stack.pop()

    def _popped_to_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    # What the opcodes do.

    def _proto(self) -> None:
        version = self._number("<B")
        if version != 2:
            raise RefusedFileError(f"pickle protocol {version}; torch.save writes protocol 2")

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _text(self) -> None:
        self._stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _tuple(self, count: int | None = None) -> None:
        parts = self._popped_to_mark() if count is None else [self._pop() for _ in range(count)]
        self._stack.append(tuple(parts if count is None else reversed(parts)))

    def _append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise RefusedFileError(f"an append to a {type(self._stack[-1]).__name__}")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise RefusedFileError(f"items set in a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Huge numbers could be chosen to have one hash.
            if not isinstance(key, str) and not (type(key) is int and abs(key) < 1 << 31):
                raise RefusedFileError(f"the key {_show.repr(key)}")
            target[key] = value

    def _set_one(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise RefusedFileError(f"no whole pickle (value {index} is used before it is there)")
        self._stack.append(self._memo[index])

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name not in _NAMES and name not in _STORAGES:
            raise RefusedFileError(f"the name {name!r}")
        self._stack.append(_Function(name, _NAMES.get(name)))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not (isinstance(function, _Function) and function.call and type(arguments) is tuple):
            what = function.name if isinstance(function, _Function) else type(function).__name__
            raise RefusedFileError(f"a call of {what!r}")
        try:
            made = function.call(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RefusedFileError):
                raise
            raise RefusedFileError(f"{function.name!r} with wrong arguments") from None
        if isinstance(made, bytes):
            self._spend(len(made))
        self._stack.append(made)

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, (_Dtype, _Array)):
            try:
                target.build(state)
            except (TypeError, ValueError) as error:
                if isinstance(error, RefusedFileError):
                    raise
                raise RefusedFileError("an array of an unknown form") from None
        elif not (isinstance(target, dict) and isinstance(state, dict) and {*state} <= _ASIDE):
            raise RefusedFileError(f"attributes set on a {type(target).__name__}")

    def _storage(self) -> None:
        match self._pop():
            case ("storage", _Function(name), str(key), str(), int(count)) if name in _STORAGES:
                self._stack.append(self._load_storage(key, _STORAGES[name], count))
            case other:
                raise RefusedFileError(f"the persistent id {_show.repr(other)}")

    # What comes out.

    def _finished(self, value: Any, depth: int) -> Any:
        """The value with nothing of ours in it; bounded in depth and size, so never a cycle."""
        self._nodes += 1
        if depth > DEPTH or self._nodes > NODES:
            raise RefusedFileError("values that lie too deep in each other, or too many of them")
        if isinstance(value, dict):
            return {key: self._finished(part, depth + 1) for key, part in value.items()}
        if isinstance(value, list):
            return [self._finished(part, depth + 1) for part in value]
        if type(value) is tuple:
            return tuple(self._finished(part, depth + 1) for part in value)
        if isinstance(value, _Array):
            if value.value is None:
                raise RefusedFileError("an array without content")
            self._spend(value.value.nbytes)
            return value.value.astype(value.value.dtype.newbyteorder("="))  # a copy, and writable
        if isinstance(value, Tensor):
            self._spend(value.nbytes)
        if isinstance(value, (_Function, _Dtype)):
            what = value.name if isinstance(value, _Function) else value.code
            raise RefusedFileError(f"the value {what!r}, which is no data")
        return value

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise RefusedFileError("tensors or arrays that are many times larger than the file")


_ASIDE = {"_metadata"}  # of a state dict: version numbers of modules


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *rest: Any
) -> Tensor:
    """A view of a storage, if it lies within and shows no element twice."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise RefusedFileError("a tensor without a storage")
    count = _count(size)
    _count(stride)
    if type(offset) is not int or offset < 0 or len(size) != len(stride):
        raise RefusedFileError(f"a tensor at {_show.repr(offset)} of shape {_show.repr(size)}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.numel() or count > storage.numel()):
        raise RefusedFileError(
            f"a tensor of shape {_show.repr(size)} that does not fit its {storage.numel()} elements"
        )
    if hooks:
        raise RefusedFileError("a tensor with hooks")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _count(shape: Any) -> int:
    if type(shape) is not tuple or any(type(n) is not int or not 0 <= n < 1 << 40 for n in shape):
        raise RefusedFileError(f"the shape {_show.repr(shape)}")
    return math.prod(shape)


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, which protocol 2 writes as text of which each letter is one byte."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedFileError(f"text in the encoding {_show.repr(encoding)}")
    return text.encode("latin1")


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise RefusedFileError(f"an array whose content is a {type(data).__name__}")
    return data


def _dtype(code: Any, *flags: Any) -> _Dtype:
    if not isinstance(code, str) or not re.fullmatch("b1|[iu][1248]|f[248]", code):
        raise RefusedFileError(f"an array of dtype {_show.repr(code)}; only plain numbers are read")
    return _Dtype(code)


def _empty_array(kind: Any, shape: Any, code: Any) -> _Array:
    if not isinstance(kind, _Function) or kind.name != "numpy.ndarray":
        raise RefusedFileError("a subclass of ndarray")
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _Dtype) or len(_bytes(data)) != dtype.numpy().itemsize:
        raise RefusedFileError("a number of an unknown form")
    return np.frombuffer(data, dtype.numpy())[0].item()


_NAMES: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "_codecs.encode": _encoded,
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_Step = Callable[[Machine], None]


def _pushing(make: Callable[[Machine], Any]) -> _Step:
    return lambda machine: machine._stack.append(make(machine))


_OPCODES: dict[bytes, _Step] = {
    b"\x80": Machine._proto,
    b"(": Machine._mark,
    b"}": _pushing(lambda m: {}),
    b"]": _pushing(lambda m: []),
    b")": _pushing(lambda m: ()),
    b"N": _pushing(lambda m: None),
    b"\x88": _pushing(lambda m: True),
    b"\x89": _pushing(lambda m: False),
    b"J": _pushing(lambda m: m._number("<i")),
    b"K": _pushing(lambda m: m._number("<B")),
    b"M": _pushing(lambda m: m._number("<H")),
    b"G": _pushing(lambda m: m._number(">d")),
    b"\x8a": Machine._long,
    b"X": Machine._text,
    b"t": Machine._tuple,
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._popped_to_mark()),
    b"s": Machine._set_one,
    b"u": lambda m: m._set(m._popped_to_mark()),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": Machine._global,
    b"R": Machine._reduce,
    b"b": Machine._build,
    b"Q": Machine._storage,
}
