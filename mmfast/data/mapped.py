"""Tensors of a safetensors file, mapped into memory: read when they are touched, and pickled by their place.

The layout is https://huggingface.co/docs/safetensors: the length of a header, the header in JSON, the tensors one
after another. `safetensors.safe_open` reserves memory for the whole file, and opens none that is larger than that.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mmfast.errors import UserError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Beyond what data sets need, and little enough that a hostile one fits into memory many times over.
LONGEST_HEADER = 1 << 20
PREFIX = 8
# Pages that are never written need no memory to be reserved for them. Python 3.11 does not name the flag.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Entry(NamedTuple):
    """Where a tensor lies: `start` counts from the first byte of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class MappedFile:
    """A safetensors file: its `metadata` (str -> str) and the `entries` (key -> Entry) of its header.

    Raises:
        UserError: no regular file, a header that is none, tensors that overlap or leave the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                self.identity = _identity(self.path, descriptor)
                header, first = _header(self.path, descriptor, self.identity[0])
                # Private, so that a tensor written to is changed here and never in the file.
                self._map = mmap.mmap(
                    descriptor,
                    self.identity[0],
                    flags=mmap.MAP_PRIVATE | NO_RESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self.metadata, self.entries = _entries(self.path, header, first, self.identity[0])
        _OPEN[self.path, self.identity] = self

    def tensor(self, key: str) -> Tensor:
        """A tensor over the mapped bytes; nothing is read yet."""
        entry = self.entries[key]
        if not entry.size:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        count = math.prod(entry.shape)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start).view(
            entry.shape
        )


# Open files by path and identity: the tensors of one share its mapping when they are unpickled, too.
_OPEN: WeakValueDictionary[tuple[Path, tuple[int, ...]], MappedFile] = WeakValueDictionary()


class Mapped:
    """A tensor of a file; pickled, as for the workers of a loader, it is a path and a key."""

    def __init__(self, file: MappedFile, key: str):
        self.file, self.key = file, key
        self.tensor = file.tensor(key)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def __reduce__(self):
        return _again, (self.file.path, self.file.identity, self.key)


def _again(path: Path, identity: tuple[int, ...], key: str) -> Mapped:
    file = _OPEN.get((path, identity)) or MappedFile(path)
    if file.identity != identity:
        raise UserError(f"{path}: must stay as it is while its data are used, got another file in its place")
    return Mapped(file, key)


def plan(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file that will hold such tensors, and where each of them belongs.

    Raises:
        UserError: more to say than a header may hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    entries, end = {}, 0
    # Wide types first, so that each tensor is aligned.
    for key, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        entry = entries[key] = Entry(dtype, tuple(shape), end)
        end += entry.size
        header[key] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [entry.start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PREFIX)
    if len(text) > LONGEST_HEADER:
        raise UserError(
            f"save: what describes the data must fit into {LONGEST_HEADER} bytes, got {len(text)}"
        )
    first = PREFIX + len(text)
    moved = {key: entry._replace(start=first + entry.start) for key, entry in entries.items()}
    return len(text).to_bytes(PREFIX, "little") + text, moved


def _identity(path: Path, descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: must be a regular file, got another kind")
    return status.st_size, status.st_mtime_ns, status.st_ino


def _header(path: Path, descriptor: int, size: int) -> tuple[bytes, int]:
    """The header's bytes, and where the tensors begin."""
    length = int.from_bytes(os.pread(descriptor, PREFIX, 0), "little")
    if size < PREFIX or length > size - PREFIX:
        raise UserError(f"{path}: the header must lie within the file's {size} bytes, got {length} for it")
    if length > LONGEST_HEADER:
        raise UserError(f"{path}: the header must have at most {LONGEST_HEADER} bytes, got {length}")
    return os.pread(descriptor, length, PREFIX), PREFIX + length


def _entries(path: Path, header: bytes, first: int, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    table = parse_json(path, "the header", header)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must be texts by name, got {told(metadata)}")
    entries = {key: _entry(path, key, row, first) for key, row in table.items()}
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise UserError(
                f"{path}: {key} must begin at byte {end}, where the tensor before it ends, got {entry.start}"
            )
        end += entry.size
    if end != size:
        raise UserError(f"{path}: the tensors must end with the file, at byte {size}, got {end}")
    return metadata, entries


def _entry(path: Path, key: str, row: Any, first: int) -> Entry:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: {key} must have dtype, shape and data_offsets, got {told(row)}")
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        raise UserError(f"{path}: {key} must be of {', '.join(DTYPES)}, got {told(row['dtype'])}")
    numbers = {name: row[name] for name in ("shape", "data_offsets")}
    for name, value in numbers.items():
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
            raise UserError(f"{path}: {name} of {key} must be whole numbers, 0 or more, got {told(value)}")
    dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
    if len(shape) > 2:
        raise UserError(f"{path}: {key} must have two dimensions at most, got {told(list(shape))}")
    start, *end = numbers["data_offsets"]
    entry = Entry(dtype, shape, first + start)
    if end != [start + entry.size] or entry.start % dtype.itemsize:
        raise UserError(
            f"{path}: data_offsets of {key} must be aligned and hold its {entry.size} bytes, "
            f"got {told(numbers['data_offsets'])}"
        )
    return entry


def parse_json(path: Path, what: str, text: bytes | str) -> dict[str, Any]:
    """A JSON object with each key once.

    Raises:
        UserError: anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} must be JSON, got something else ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} must be a JSON object, got {told(value)}")
    return value


def told(value: Any) -> str:
    """A value of a file in a refusal, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
