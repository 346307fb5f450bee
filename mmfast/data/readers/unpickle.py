"""Pickles of arrays, numbers, text and containers, read without running anything that they name."""

from __future__ import annotations

import io
import mmap
import os
import pickletools
import stat
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from mmfast.data.readers import torch_file
from mmfast.data.readers.opcodes import Refused, budget, scan
from mmfast.data.readers.restricted import Budget, check_tree, load
from mmfast.errors import UserError


def unpickle(path) -> object:
    """The object in a pickle of any protocol, of Python 2 or 3 and numpy 1 or 2; Python 2 strings are Latin-1.

    Arrays are read-only where they lie in the bytes of the file. Whatever is returned is a tree at most 64 deep: no
    cycle, nothing written out much more often than it stands in the file.

    Raises:
        UserError: no pickle, truncated, damaged; a name that is none of data; more memory than three times the file
            and 64 MiB, more nesting or more opcodes than files of data have.
    """
    return read_with(path, _load)


def load_torch(path) -> object:
    """What `torch.save` wrote, read with the same care; tensors as arrays, bfloat16 as float32.

    Neither torch's own reader, which trusts the sizes in a file, nor torch itself is used.

    Raises:
        UserError: as `unpickle`; entries that are compressed, missing or of another size than announced.
    """
    return read_with(path, torch_file.load_file)


def _load(file, size: int) -> object:
    found = scan(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    spend = Budget(budget(size) - found.memory)
    content = load(file, spend, torch_file.answers(spend))
    check_tree(content, found.opcodes, size)
    return content


def read_with(path, read: Callable) -> object:
    """`read(file, size)` of a regular file, with the file's name before whatever it refuses."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise Refused("must hold something, got an empty file")
            return read(file, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Refused as error:
        raise UserError(f"{path}: {error}") from None


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, open for reading; a pipe or device is refused, not waited for."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("must be a regular file")
    return open(descriptor, "rb", buffering=1 << 18)


def is_pickle(path) -> bool:
    """Whether the file begins like a pickle (and ends like one, in the protocols 0 and 1 that have no mark)."""
    try:
        with open_regular(Path(path)) as file:
            start = file.read(1024)
            file.seek(-min(2, os.fstat(file.fileno()).st_size), os.SEEK_END)
            end = file.read().rstrip(b"\n")[-1:]
    except (OSError, Refused):
        return False
    if start[:1] == b"\x80":
        return start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not start.startswith(torch_file.MAGIC)
    if start[:1] not in (b"(", b"]", b"}", b"c") or end != b".":
        return False
    try:
        return len(list(islice(pickletools.genops(start), 8))) > 0
    except ValueError:
        return len(start) == 1024  # it ends within an opcode
