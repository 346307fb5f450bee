"""What `torch.save` writes, zip archives and the older files: pickles beside the bytes of their tensors.

Read by the restricted unpickler, into arrays. torch.load(weights_only=True) trusts the number of elements that a file
announces, beyond the end of what it has, and hashes whatever is given as a key.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import numpy as np

from mmfast.data.readers.opcodes import Refused, budget, damaged, scan
from mmfast.data.readers.restricted import Budget, check, check_tree, load

# The first opcodes of files before torch 1.6: PROTO 2, LONG1 of their magic number, STOP.
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
BFLOAT16 = "BFloat16Storage"
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    BFLOAT16: "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class Storage:
    """The elements of tensors, one after another."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __setstate__(self, state) -> None:
        raise damaged("a state for a storage")


def load_file(file, size: int) -> object:
    """The object in an open file of `size` bytes."""
    if file.read(len(MAGIC)) == MAGIC:
        file.seek(0)
        return _load_old(file.read(), Budget(budget(size) - size))
    try:
        with zipfile.ZipFile(file) as archive:
            return _load_zip(archive, size)
    except Refused:
        raise
    except Exception as error:  # zipfile has many for damaged archives
        raise Refused(f"the archive is truncated or damaged ({error})") from None


def answers(spend: Budget) -> dict[tuple[str, str], Callable]:
    """Module and name -> function, for the tensors in pickles."""
    more = {("torch", name): _no_call for name in _STORAGES}
    more["torch._utils", "_rebuild_tensor_v2"] = lambda *args: _tensor(spend, *args)
    more["torch.storage", "_load_from_bytes"] = lambda raw: _load_old(raw, spend)
    return more


def _no_call(*args):
    raise damaged("a call of a storage")


def _load_zip(archive: zipfile.ZipFile, size: int) -> object:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"must hold one data.pkl as files of torch do, found {len(pickles)}")
    if len(entries) < len(archive.infolist()):
        raise Refused("the archive must hold every entry once, got one twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise Refused("the archive must be without compression as files of torch are, got an entry with it")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise Refused(f"the archive must hold at most its own {size:,} bytes, got entries of more")
    folder = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
    check(order in (b"little", b"big"), "the order of bytes")
    raw = archive.read(pickles[0])
    found, known = scan(raw), {}
    spend = Budget(budget(size) - found.memory)

    def persistent(identity) -> Storage:
        name, key, count = _identity(identity)
        if key not in known:
            check(f"{folder}data/{key}" in entries, f"no entry data/{key}")
            known[key] = (
                name,
                _storage(spend, name, archive.read(f"{folder}data/{key}"), count, order == b"big"),
            )
        check(known[key][0] == name, "a storage of two types")
        return known[key][1]

    content = load(io.BytesIO(raw), spend, answers(spend), persistent)
    check_tree(content, found.opcodes, size)
    return content


def _load_old(raw, spend: Budget) -> object:
    """Five pickles (magic number, version, system, the object, keys of its storages), then the storages' bytes."""
    check(isinstance(raw, (bytes, bytearray)) and raw.startswith(MAGIC), "a tensor of another form")
    scans, starts = [], [0]
    for _ in range(5):
        scans.append(scan(raw, starts[-1]))
        starts.append(scans[-1].end)
        spend(scans[-1].memory)

    def pickled(i: int, *more):
        return load(io.BytesIO(raw[starts[i] : starts[i + 1]]), spend, *more)

    system, keys = pickled(2), pickled(4)
    check(isinstance(system, dict) and isinstance(keys, list), "the heads of a file of torch")
    check(all(isinstance(key, str) for key in keys), "the keys of storages")
    announced, known = {}, {}

    def note(identity) -> None:
        name, key, count = _identity(identity)
        check(announced.setdefault(key, (name, count)) == (name, count), "a storage of two types")

    # The bytes lie behind the keys, but how many there are of each only the object says.
    pickled(3, answers(spend) | {("torch._utils", "_rebuild_tensor_v2"): lambda *args: None}, note)
    position = starts[5]
    for key in keys:
        check(key in announced, "a storage that no tensor has")
        name, count = announced[key]
        end = position + 8 + count * np.dtype(_STORAGES[name]).itemsize
        known[key] = _storage(
            spend, name, raw[position + 8 : end], count, system.get("little_endian") is False
        )
        position = end
    content = pickled(3, answers(spend), lambda identity: known[_identity(identity)[1]])
    check_tree(content, scans[3].opcodes, len(raw))
    return content


def _identity(identity) -> tuple[str, str, int]:
    check(
        isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage",
        "a persistent id",
    )
    kind, key, _, count = identity[1:5]
    name = getattr(kind, "name", None)
    check(isinstance(name, str) and name in _STORAGES, "the type of a storage")
    check(isinstance(key, str) and type(count) is int and 0 <= count < 1 << 48, "the id of a storage")
    check(identity[5:] in ((), (None,)), "a view of a storage")
    return name, key, count


def _storage(spend: Budget, name: str, raw: bytes, count: int, big: bool) -> Storage:
    dtype = np.dtype(_STORAGES[name]).newbyteorder(">" if big else "<")
    check(len(raw) == count * dtype.itemsize, f"a storage of {count:,} elements in {len(raw):,} bytes")
    spend(len(raw))
    values = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
    if name == BFLOAT16:
        spend(4 * count)
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return Storage(values)


def _tensor(spend: Budget, storage, offset, size, stride, *rest) -> np.ndarray:
    check(isinstance(storage, Storage), "a tensor without its storage")
    check(isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32, "a shape")
    check(all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *size, *stride)), "a shape")
    values = storage.values
    if 0 in size:
        return np.empty(size, values.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    check(last < len(values), f"a tensor {size} in a storage of {len(values):,}")
    view = np.lib.stride_tricks.as_strided(
        values[offset:], size, [step * values.itemsize for step in stride], writeable=False
    )
    if not view.flags.c_contiguous:
        spend(view.nbytes)
        view = view.copy()
    return view
