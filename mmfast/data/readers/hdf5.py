"""HDF5 files, with errors a user can read."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from mmfast.errors import UserError

SIGNATURE = b"\x89HDF\r\n\x1a\n"


@contextmanager
def open_hdf5(path: Path):
    """The open `h5py.File` of an existing file.

    Raises:
        UserError: h5py is not installed, or the file is missing, truncated, damaged or no HDF5, here or in
            the reads of the `with` block.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading HDF5 needs h5py, install mmfast[train] or h5py") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
        code = getattr(error, "errno", None)
        # h5py's own text for system errors runs over several lines.
        reason = os.strerror(code) if code else error
        raise UserError(
            f"{path}: not a readable HDF5 file, truncated or of another kind ({reason})"
        ) from None


def describe_hdf5(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(key, shape, dtype) of every data set in the file."""
    found = []

    def visit(name, node) -> None:
        if hasattr(node, "shape"):
            found.append((name, tuple(node.shape or ()), str(node.dtype)))

    with open_hdf5(path) as file:
        file.visititems(visit)
    return found
