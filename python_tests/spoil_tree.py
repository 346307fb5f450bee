"""What a pickle, torch file, archive or HDF5 file holds, with single values, shapes and keys changed."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import reject
from hypothesis import strategies as st

VALUES: tuple[Any, ...] = (
    None,
    True,
    3,
    -1.5,
    float("nan"),
    10**400,
    -(2**63),
    "text",
    "two\nlines \x1b[31m",
    "x" * 5000,
    b"\xff\xfe",
    [],
    {},
    [[1], [2, 3]],
    {"a": 1},
    {1, 2},
    1j,
    np.zeros(0),
    np.zeros((2, 0, 3)),
    np.array("x"),
    np.array(7),
    np.array([None, "a", [1]], object),
    np.float32("inf"),
    torch.zeros(2, 3),
    torch.tensor(1.0),
)
KEYS: tuple[Any, ...] = (
    3,
    None,
    (1,),
    b"text",
    "",
    "two\nlines \x1b[31m",
    "x" * 5000,
    "text",
    "audio",
    "train",
    "labels",
)
DTYPES = ("f8", "f2", "i8", "u1", "bool", "c8", "U", "S", "O", "longdouble", ">f4")


def parse(content: bytes) -> tuple[str, Any] | None:
    """Kind of the file and what it holds; None for a file of another kind."""
    if content.startswith(b"\x89HDF"):
        import h5py

        with h5py.File(io.BytesIO(content)) as file:
            return "hdf5", _tree(file)
    if content.startswith(b"PK"):
        if b"/data.pkl" in content:
            return "torch", torch.load(io.BytesIO(content), weights_only=False)
        return "npz", dict(np.load(io.BytesIO(content), allow_pickle=True))
    return ("pickle", pickle.loads(content, encoding="latin1")) if content.startswith(b"\x80") else None


def _tree(node: Any) -> Any:
    if hasattr(node, "keys"):
        return {key: _tree(node[key]) for key in node}
    return np.asarray(node[()]) if node.dtype.kind != "O" else node[()]


def content_of(kind: str, tree: Any) -> bytes:
    """The bytes of a file; the example is rejected if such a file cannot hold such a thing."""
    out = io.BytesIO()
    try:
        if kind == "pickle":
            return pickle.dumps(tree, 4)
        if kind == "torch":
            torch.save(tree, out)
        elif kind == "npz":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                np.savez(out, **{str(key): np.asarray(value) for key, value in tree.items()})
        else:
            import h5py

            with h5py.File(out, "w") as file:
                _put(file, tree)
    except (TypeError, ValueError, AttributeError, RuntimeError, OSError, OverflowError):
        reject()
    return out.getvalue()


def _put(group: Any, tree: dict) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _put(group.create_group(str(key)), value)
        else:
            group[str(key)] = value.numpy() if isinstance(value, torch.Tensor) else value


def changed(draw: Callable, tree: Any) -> Any:
    """The tree with one place in it changed, drawn on a way down from its root."""
    keys = _keys(tree)
    if not keys or draw(st.integers(0, 5)) == 0:
        return _other(draw, tree)
    key = draw(st.sampled_from(keys))
    return _with(tree, key, changed(draw, tree[key]))


def _keys(tree: Any) -> list:
    if isinstance(tree, dict):
        return list(tree)
    is_list = isinstance(tree, (list, tuple)) or (
        isinstance(tree, np.ndarray) and tree.dtype == object and tree.ndim == 1
    )
    return list(range(len(tree))) if is_list else []


def _with(tree: Any, key: Any, value: Any) -> Any:
    if isinstance(tree, tuple):
        return (*tree[:key], value, *tree[key + 1 :])
    tree = tree.copy()
    tree[key] = value
    return tree


def _other(draw: Callable, value: Any) -> Any:
    choices: list[Callable] = [lambda: draw(st.sampled_from(VALUES))]
    if isinstance(value, torch.Tensor):
        return torch.from_numpy(np.ascontiguousarray(_array(draw, value.numpy(), DTYPES[:5])))
    if isinstance(value, np.ndarray):
        choices += [lambda: _array(draw, value, DTYPES)] * 4
    if isinstance(value, dict) and value:
        choices += [lambda: _dict(draw, value)] * 2
    if isinstance(value, (list, tuple)) and value:
        choices += [lambda: _list(draw, value)] * 2
    return choices[draw(st.integers(0, len(choices) - 1))]()


def _array(draw: Callable, array: np.ndarray, dtypes) -> np.ndarray:
    how = draw(
        st.sampled_from(["cut", "twice", "axis", "flat", "turned", "narrow", "dtype", "cells", "none"])
    )
    if how == "dtype" or (how == "cells" and array.dtype.kind not in "fiu"):
        try:
            with np.errstate(all="ignore"):
                return array.astype(draw(st.sampled_from(dtypes)))
        except (TypeError, ValueError):
            reject()
    if how == "cells":
        new = np.array(array, float if array.dtype.kind != "f" else array.dtype)
        with np.errstate(all="ignore"):
            count = draw(st.integers(1, max(1, new.size)))
            new.reshape(-1)[:count] = draw(
                st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -7, 0.5, 0, 2**62])
            )
        return new
    if how == "narrow":
        return array[..., :1] if array.ndim else array[None]
    make = {
        "cut": lambda: array[:-1] if array.ndim else array[None],
        "twice": lambda: np.concatenate([np.atleast_1d(array)] * 2),
        "axis": lambda: array[..., None],
        "flat": lambda: array.reshape(-1),
        "turned": lambda: array.T,
        "none": lambda: array[:0] if array.ndim else array[None],
    }
    return make[how]()


def _dict(draw: Callable, value: dict) -> dict:
    key = draw(st.sampled_from(list(value)))
    rest = {k: v for k, v in value.items() if k != key}
    how = draw(st.sampled_from(["drop", "rename", "copy", "swap"]))
    if how == "drop":
        return rest
    if how == "swap":
        other = draw(st.sampled_from(list(value)))
        return {**value, key: value[other], other: value[key]}
    name = draw(st.sampled_from(KEYS) | st.sampled_from(list(value)))
    return {**(rest if how == "rename" else value), name: value[key]}


def _list(draw: Callable, value: list | tuple) -> Any:
    items = list(value)
    how = draw(st.sampled_from(["cut", "twice", "turned", "more", "array", "other"]))
    if how == "array":
        try:
            return np.array(items)
        except ValueError:
            reject()
    if how == "other":
        return tuple(items) if isinstance(value, list) else items
    made = {"cut": items[:-1], "twice": items * 2, "turned": items[::-1], "more": [*items, None]}[how]
    return type(value)(made)


def file_with(draw: Callable, kind: str, tree: Any) -> bytes:
    """A file of what one of a kind holds, with one or two places in it changed; rejected if there can be none."""
    for _ in range(draw(st.integers(1, 2))):
        tree = changed(draw, tree)
    if kind in ("npz", "hdf5") and not isinstance(tree, dict):
        reject()
    return content_of(kind, tree)
