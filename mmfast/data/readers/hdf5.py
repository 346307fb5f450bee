"""HDF5 files, of which nothing is read that does not lie in the file itself."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.readers.expansion import Allowance, in_words
from mmfast.data.source import regular
from mmfast.errors import UserError

DEPTH, OBJECTS = 8, 300_000
# Deflate, shuffle, checksums, szip, LZF. An unknown filter would load a plugin; N-bit and scale-offset take their
# sizes from the file.
FILTERS = {1, 2, 3, 4, 32000}
DEFLATE = 1
# A deflated byte becomes 1,032 at most.
INFLATION = 1032


@dataclass(frozen=True)
class Array:
    """A data set of numbers or text: shape, and dtype as NumPy names it ("str" for text of any length)."""

    shape: tuple[int, ...]
    dtype: str
    node: Any = None

    @property
    def is_text(self) -> bool:
        return self.dtype == "str" or self.dtype.startswith("|S")


class Hdf5:
    """The groups and data sets of an open file, each object under one name.

    Attributes:
        path: of the file.
        allowance: what may still be read of it.
    """

    def __init__(self, path: Path, root) -> None:
        self.path = path
        self._root = root
        self.allowance = Allowance(path, path.stat().st_size)

    def children(self, group: str = "") -> list[str]:
        """Names in a group, sorted; nothing where there is no such group.

        Raises:
            UserError: one of them is a link to elsewhere.
        """
        node = self._root.id
        for name in filter(None, group.split("/")):
            kinds = dict(self._links(node, ""))
            if kinds.get(name) != "group":
                return []
            node = _open_group(node, name)
        return sorted(name for name, _ in self._links(node, group))

    def arrays(self) -> dict[str, Array]:
        """Key -> data set, in order of the keys.

        Raises:
            UserError: links to elsewhere, two names of one object, more than 300,000 objects, deeper than 8
                groups, data that lie in other files, filters that are not known.
        """
        h5o = _h5py().h5o
        root = h5o.get_info(self._root.id)
        found, seen, todo = {}, {(root.fileno, root.addr): "/"}, [("", self._root.id, 0)]
        while todo:
            prefix, group, depth = todo.pop()
            for name, kind in self._links(group, prefix):
                key = f"{prefix}{name}"
                info = h5o.get_info(group, _encoded(name))
                other = seen.setdefault((info.fileno, info.addr), key)
                if other is not key:
                    raise UserError(f"{self.path}: {key} must be an object of its own, got {other} again")
                if len(seen) > OBJECTS:
                    raise UserError(f"{self.path}: must hold at most {OBJECTS:,} objects, got more")
                if kind == "data set":
                    found[key] = self._array(key, group, name)
                elif kind == "group":
                    if depth == DEPTH:
                        raise UserError(f"{self.path}: groups must be at most {DEPTH} deep, got {key}")
                    todo.append((f"{key}/", _open_group(group, name), depth + 1))
        return dict(sorted(found.items()))

    def read(self, key: str, array: Array) -> np.ndarray:
        """The contents of one data set of `arrays`: numbers as they are, text as an array of str.

        Raises:
            UserError: it is neither, or too large for what the file holds.
        """
        if array.node is None:
            raise UserError(f"{self.path}: {key} must hold numbers or text, got {array.dtype}")
        return self._text(key, array) if array.is_text else self._numbers(key, array)

    def _links(self, group, prefix: str) -> Iterator[tuple[str, str]]:
        """(name, "group", "data set" or "type") of what lies in a group."""
        h5py = _h5py()
        h5g, h5l, h5o = h5py.h5g, h5py.h5l, h5py.h5o
        links = []

        def visit(name: bytes, info) -> None:
            if len(links) > OBJECTS:
                raise UserError(f"{self.path}: must hold at most {OBJECTS:,} objects, got more")
            links.append((name, info.type))

        group.links.iterate(visit, info=True)
        kinds = {h5g.GROUP: "group", h5g.DATASET: "data set"}
        for raw, kind in sorted(links):
            name = raw.decode("utf-8", "surrogateescape")
            if kind != h5l.TYPE_HARD:
                what = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}
                raise UserError(
                    f"{self.path}: {prefix + name} must lie in the file itself, got {what.get(kind, 'a link')}"
                )
            yield name, kinds.get(h5o.get_info(group, raw).type, "type")

    def _array(self, key: str, group, name: str) -> Array:
        h5py = _h5py()
        h5d, h5t = h5py.h5d, h5py.h5t
        node = h5d.open(group, _encoded(name))
        # The layout is asked for first: the shape of a virtual data set opens the files that it names.
        made = node.get_create_plist()
        if made.get_layout() == h5d.VIRTUAL:
            raise UserError(f"{self.path}: {key} must lie in the file itself, got a virtual data set")
        if made.get_external_count():
            raise UserError(f"{self.path}: {key} must lie in the file itself, got external storage")
        for i in range(made.get_nfilters()):
            if (code := made.get_filter(i)[0]) not in FILTERS:
                raise UserError(f"{self.path}: {key} must be packed by gzip, szip or LZF, got filter {code}")
        shape = node.shape
        kind = node.get_type()
        known = kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.STRING, h5t.ENUM)
        if not known or shape is None:
            return Array(() if shape is None else tuple(shape), "nothing" if known else _class_name(kind))
        text = kind.get_class() == h5t.STRING
        return Array(
            tuple(shape),
            "str"
            if text and kind.is_variable_str()
            else kind.dtype.str.lstrip("<=")
            if text
            else str(kind.dtype),
            h5py.Dataset(node),
        )

    def _numbers(self, key: str, array: Array) -> np.ndarray:
        node = array.node
        self.allowance.take(key, max(math.prod(node.shape) * node.dtype.itemsize, _chunk_bytes(node)))
        self._check_inflated(key, node)
        return node[()] if node.shape else np.asarray(node[()])

    def _text(self, key: str, array: Array) -> np.ndarray:
        if array.dtype != "str":
            return text(self._numbers(key, array))
        # Each text may be as long as the file, and all may be the same: few are fetched at a time, and counted.
        node, allowance = array.node, self.allowance
        allowance.take(key, max(math.prod(node.shape) * node.dtype.itemsize, _chunk_bytes(node)))
        self._check_inflated(key, node)
        out = np.empty(node.shape, object)
        step = max(1, allowance.limit // (4 * allowance.size) // max(math.prod(node.shape[1:]), 1))
        for start in range(0, len(out) if node.shape else 1, step):
            part = (slice(start, start + step),) if node.shape else ()
            found = np.asarray(node[part], object)
            allowance.take(key, sum(map(len, found.flat)))
            out[part] = text(found)
        return out

    def _check_inflated(self, key: str, node) -> None:
        """That no chunk inflates beyond its size, where one could do harm: the library would only see it then."""
        made = node.id.get_create_plist()
        if made.get_layout() != _h5py().h5d.CHUNKED or not made.get_nfilters():
            return
        chunks, largest = [], _chunk_bytes(node) + 4 * len(FILTERS)
        node.id.chunk_iter(lambda info: chunks.append((info.chunk_offset, info.size)))
        for offset, size in chunks:
            if size > self.allowance.size:
                raise UserError(f"{self.path}: {key} must lie in the file, got a chunk of {in_words(size)}")
            if (
                size * INFLATION > self.allowance.limit
                and made.get_filter(made.get_nfilters() - 1)[0] == DEFLATE
            ):
                _, packed = node.id.read_direct_chunk(offset)
                if len(zlib.decompressobj().decompress(packed, largest + 1)) > largest:
                    raise UserError(
                        f"{self.path}: {key} must inflate to its shape, got a chunk that holds more"
                    )


@contextmanager
def open_hdf5(path: Path) -> Iterator[Hdf5]:
    """The open file.

    Raises:
        UserError: h5py is not installed, or the file is missing, truncated, damaged or no HDF5, here or in
            the reads of the `with` block.
    """
    h5py = _h5py(path)
    path = regular(path)
    try:
        with h5py.File(path, "r") as file:
            yield Hdf5(path, file)
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError, AttributeError) as error:
        code = getattr(error, "errno", None)
        # h5py's own text for system errors runs over several lines.
        reason = os.strerror(code) if code else " ".join(str(error).split())
        raise UserError(
            f"{path}: not a readable HDF5 file, truncated or of another kind ({reason})"
        ) from None


def describe_hdf5(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(key, shape, dtype) of every data set in the file."""
    with open_hdf5(path) as file:
        return [(key, array.shape, array.dtype) for key, array in file.arrays().items()]


def text(array: np.ndarray) -> np.ndarray:
    """Bytes as str, of UTF-8 or else of Latin-1, in an array of objects; what is str stays."""
    out = np.empty(array.shape, object)
    out.flat = [_decoded(item) for item in array.flat]
    return out


def _decoded(item) -> str:
    if isinstance(item, str):
        return item
    try:
        return item.decode()
    except UnicodeDecodeError:
        return item.decode("latin1")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _h5py(path: Path | None = None):
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading HDF5 needs h5py, install mmfast[train] or h5py") from None
    return h5py


def _open_group(group, name: str):
    return _h5py().h5g.open(group, _encoded(name))


def _chunk_bytes(node) -> int:
    return math.prod(node.chunks) * node.dtype.itemsize if node.chunks else 0


def _class_name(kind) -> str:
    h5t = _h5py().h5t
    names = {
        h5t.COMPOUND: "compound",
        h5t.OPAQUE: "opaque",
        h5t.REFERENCE: "a reference",
        h5t.VLEN: "lists of any length",
        h5t.ARRAY: "array",
        h5t.BITFIELD: "bits",
        h5t.TIME: "time",
    }
    return names.get(kind.get_class(), "an unknown type")
