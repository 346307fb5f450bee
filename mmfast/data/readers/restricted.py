"""The unpickler that runs nothing.

A pickle is a program: names of functions, and calls of them. Every name is answered here from one table, by a
function that builds the thing and checks its arguments; what is not in the table is refused by its name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np

from mmfast.data.readers.opcodes import NESTING, Refused, budget, damaged

# One plain type of numpy; objects only as arrays.
_DTYPE = re.compile(r"[<>=|]?(?:[biufcSU]\d{1,9}|[?bBhHiIlLqQefdgFDSU]|O[48]?)")
_SCALARS = (str, bytes, int, float, complex, bool, type(None), np.generic)
_CONTAINERS = (list, dict, tuple, set, frozenset)


class Budget:
    """Bytes of memory that may still be taken by what is built."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Refused("its content must fit into three times the file, got a pickle that would take more")


class Answer:
    """What a name in the pickle is answered with: it can be called, and nothing else."""

    __slots__ = ("_function", "name")

    def __init__(self, name: str, function: Callable) -> None:
        self.name, self._function = name, function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state) -> None:
        raise damaged(f"a state for {self.name}")


class DType:
    """A dtype in the making."""

    __slots__ = ("value",)

    def __init__(self, value: np.dtype) -> None:
        self.value = value

    def __setstate__(self, state) -> None:
        check(type(state) is tuple and len(state) in (8, 9), "the state of a dtype")
        order, *fields, size = state[1:6]
        check(isinstance(order, str) and order in ("<", ">", "=", "|"), "the byte order of a dtype")
        check(fields == [None] * 3, "a dtype with fields")
        check(type(size) is int and size in (-1, self.value.itemsize), "the size of a dtype")
        if order in "<>":
            self.value = self.value.newbyteorder(order)


class Array(np.ndarray):
    """An array that takes its state once, and only if the state is one."""

    __slots__ = ("_spend",)

    def __setstate__(self, state) -> None:
        check(_unbuilt(self) and type(state) is tuple and len(state) == 5, "the state of an array")
        _, shape, dtype, fortran, raw = state
        dtype, count = _dtype_of(dtype), _count(shape)
        if dtype.kind == "O":
            check(type(raw) is list and len(raw) == count, f"{shape} objects of an array")
            for item in raw:
                whole = isinstance(item, Array) and not _unbuilt(item) and item.dtype.kind != "O"
                check(whole or isinstance(item, (*_SCALARS, list)), "objects of an array that are no data")
            self._spend(8 * count)
        else:
            raw = _bytes_of(raw)
            check(len(raw) == count * dtype.itemsize, f"{len(raw):,} bytes of an array {shape}")
            self._spend(len(raw))
        super().__setstate__((1, shape, dtype, bool(fortran), raw))
        _check_text(self)


def load(file, spend: Budget, more: dict | None = None, persistent: Callable | None = None) -> object:
    """The pickle at the position of an open file, which must have passed `scan`.

    `more` are answers beside those of the table, `persistent` finds what stands outside of the pickle.
    """
    try:
        return _Unpickler(file, spend, more or {}, persistent).load()
    except Refused:
        raise
    except Exception as error:  # whatever a damaged stream makes of the functions below
        text = " ".join(str(error).split())[:200].encode("ascii", "backslashreplace").decode()
        raise damaged(text or type(error).__name__) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, spend: Budget, more: dict, persistent: Callable | None) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._spend, self._more = spend, more
        self._answers: dict[tuple[str, str], Answer] = {}
        if persistent is not None:
            self.persistent_load = persistent

    def find_class(self, module: str, name: str) -> Answer:
        key = module, name
        if key not in self._answers:
            if module == "numpy.dtypes" and name in _DTYPES:
                function = partial(self._dtype, _DTYPES[name])
            elif key in self._more:
                function = self._more[key]
            elif key in _TABLE:
                function = getattr(self, _TABLE[key])
            else:
                shown = f"{module}.{name}"[:200].encode("ascii", "backslashreplace").decode()
                raise Refused(
                    f"holds {shown}, which is code or an unknown type; "
                    "only arrays, numbers, text and containers are read"
                )
            self._answers[key] = Answer(name, function)
        return self._answers[key]

    def _reconstruct(self, kind, shape, code) -> Array:
        check(isinstance(kind, Answer) and kind.name == "ndarray", "an array of another class")
        check(shape == (0,) and code in ("b", b"b"), "an array with a shape before its state")
        array = np.ndarray.__new__(Array, (0,), np.dtype("V1"))
        array._spend = self._spend
        return array

    def _frombuffer(self, raw, dtype, shape, order, axes=None) -> np.ndarray:
        dtype, count = _dtype_of(dtype), _count(shape)
        check(dtype.kind != "O", "objects in a buffer")
        raw = _bytes_of(raw)
        check(len(raw) == count * dtype.itemsize, f"{len(raw):,} bytes of an array {shape}")
        self._spend(len(raw))
        # numpy reads no items of no bytes.
        array = np.frombuffer(raw, dtype) if len(raw) else np.empty(count, dtype)
        check(order in ("C", "F", "K"), "the order of an array")
        array = array.reshape(shape, order="F" if order == "F" else "C")
        if order == "K" and axes is not None:
            array = array.transpose(axes)
        return _check_text(array).view(Array)

    def _scalar(self, dtype, raw) -> np.generic:
        dtype, raw = _dtype_of(dtype), _bytes_of(raw)
        check(dtype.kind != "O" and 0 < len(raw) == dtype.itemsize, "the bytes of a number")
        self._spend(len(raw))
        return _check_text(np.frombuffer(raw, dtype))[0]

    def _dtype(self, code, align=False, copy=False) -> DType:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        check(isinstance(code, str) and _DTYPE.fullmatch(code), "the name of a dtype")
        return DType(np.dtype(code))

    def _ndarray(self, *args):
        raise damaged("a call of numpy.ndarray")

    def _encode(self, text, encoding="latin1") -> bytes:
        check(isinstance(text, str) and encoding in ("latin1", "latin-1"), "text for bytes")
        self._spend(len(text))
        return text.encode("latin1")

    def _dict(self, *args) -> dict:
        """Of `dict`, of an ordered one, which has a list of pairs, and of one with a factory."""
        pairs = args[0] if args and isinstance(args[0], (list, tuple)) else []
        self._spend(100 * len(pairs))
        check(all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs), "pairs")
        return {_flat(key): value for key, value in pairs}

    def _items(self, items=()) -> list | tuple:
        check(isinstance(items, (list, tuple)), "the items of a container")
        self._spend(80 * len(items))
        return items

    def _set(self, items=()) -> set:
        return {_flat(item) for item in self._items(items)}

    def _frozenset(self, items=()) -> frozenset:
        return frozenset(_flat(item) for item in self._items(items))

    def _tuple(self, items=()) -> tuple:
        return tuple(_flat(item) for item in self._items(items))

    def _list(self, items=()) -> list:
        return list(self._items(items))

    def _bytes(self, raw=b"", encoding="latin1") -> bytes:
        return self._encode(raw, encoding) if isinstance(raw, str) else bytes(self._buffer(raw))

    def _bytearray(self, raw=b"", encoding="latin1") -> bytearray:
        return bytearray(self._encode(raw, encoding) if isinstance(raw, str) else self._buffer(raw))

    def _buffer(self, raw):
        if isinstance(raw, list):
            raw = bytes(self._items(raw))
        check(isinstance(raw, (bytes, bytearray)), "bytes")
        self._spend(len(raw))
        return raw

    def _int(self, *args) -> int:
        return int(*_short(args))

    def _float(self, *args) -> float:
        return float(*_short(args))

    def _complex(self, *args) -> complex:
        return complex(*_short(args))

    def _bool(self, *args) -> bool:
        return bool(*_short(args))

    def _str(self, text="", *rest) -> str:
        check(isinstance(text, str) and not rest, "text")
        return text

    def _slice(self, *args) -> slice:
        return slice(*_short(args))

    def _range(self, *args) -> range:
        steps = range(*_short(args))
        self._spend(40 * len(steps))
        return steps


_ALIKE = (
    "set",
    "frozenset",
    "list",
    "dict",
    "tuple",
    "bytearray",
    "complex",
    "int",
    "float",
    "str",
    "bytes",
    "bool",
)
# Classes of dtypes that take no argument.
_DTYPES = {
    "BoolDType": "?",
    **{
        f"{name}{bits}DType": f"{kind}{bits // 8}"
        for name, kind in (("Int", "i"), ("UInt", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"Float{bits}DType": f"f{bits // 8}" for bits in (16, 32, 64)},
}
_TABLE = {
    ("numpy", "ndarray"): "_ndarray",
    ("numpy", "dtype"): "_dtype",
    ("_codecs", "encode"): "_encode",
    ("collections", "OrderedDict"): "_dict",
    ("collections", "defaultdict"): "_dict",
    ("__builtin__", "unicode"): "_str",
    ("__builtin__", "long"): "_int",
    ("__builtin__", "xrange"): "_range",
}
for _numpy in ("numpy.core", "numpy._core"):
    _TABLE[f"{_numpy}.multiarray", "_reconstruct"] = "_reconstruct"
    _TABLE[f"{_numpy}.multiarray", "scalar"] = "_scalar"
    _TABLE[f"{_numpy}.numeric", "_frombuffer"] = "_frombuffer"
for _builtins in ("builtins", "__builtin__"):
    _TABLE |= {(_builtins, name): f"_{name}" for name in (*_ALIKE, "slice", "range")}


def check(fits, what: str) -> None:
    if not fits:
        raise damaged(what)


def _unbuilt(array: Array) -> bool:
    return array.dtype.kind == "V"


def _dtype_of(dtype) -> np.dtype:
    check(isinstance(dtype, DType), "the dtype of an array")
    return dtype.value


def _count(shape) -> int:
    check(type(shape) is tuple and len(shape) <= 32, "the shape of an array")
    check(all(type(n) is int and 0 <= n < 1 << 48 for n in shape), "the shape of an array")
    count = 1
    for n in shape:
        count *= max(n, 1)
        check(count < 1 << 48, "the shape of an array")
    return 0 if 0 in shape else count


def _bytes_of(raw) -> bytes | bytearray:
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin1")
    check(isinstance(raw, (bytes, bytearray)), "the bytes of an array")
    return raw


def _check_text(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "U" and array.size:
        codes = (
            np.asarray(array).reshape(-1, order="A").view(np.dtype("u4").newbyteorder(array.dtype.byteorder))
        )
        check(not ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any(), "text that is none")
    return array


def _flat(item):
    """An item that is hashed: nothing that holds others, lest hashing it take for ever."""
    check(isinstance(item, _SCALARS), "a key that is no text and no number")
    return item


def _short(args: tuple) -> tuple:
    for item in args:
        check(isinstance(item, _SCALARS) and len(str(item)[:65]) <= 64, "a number")
    return args


def check_tree(content: object, opcodes: int, size: int) -> None:
    """Refuse what nests too deep, contains itself, or would be far larger written out than in its file."""
    objects, memory = 1000 + 10 * opcodes, budget(size)
    open_containers = [iter((content,))]
    while open_containers:
        for item in open_containers[-1]:
            if isinstance(item, float):
                continue
            if isinstance(item, str):
                if not item.isascii():
                    _check_unicode(item)
            elif isinstance(item, _CONTAINERS) or (isinstance(item, np.ndarray) and item.dtype.kind == "O"):
                objects -= 1 + len(item)
                if objects < 0:
                    raise Refused("the pickle must hold everything about once, got one that repeats itself")
                if len(open_containers) >= NESTING:
                    raise Refused(f"the pickle must nest at most {NESTING} deep, got more")
                within = item.flat if isinstance(item, np.ndarray) else item
                open_containers.append(chain(item, item.values()) if isinstance(item, dict) else iter(within))
                break
            elif isinstance(item, np.ndarray):
                memory -= item.nbytes
                if memory < 0:
                    raise Refused("the pickle must hold every array about once, got one that repeats them")
        else:
            open_containers.pop()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise damaged("text that is none") from None
