"""Archives of arrays (.npz): members are read one by one and never extracted."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.readers.expansion import Allowance, in_words
from mmfast.data.source import regular
from mmfast.errors import UserError

SUFFIX = ".npy"
MEMBERS = 100_000
# Numbers and text; objects would be pickles.
KINDS = "biufcSU"
INFLATION = 1032
DAMAGE = (
    OSError,
    ValueError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """One array of an archive, as its header declares it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int
    info: Any


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """Key -> array, of all members.

    Raises:
        UserError: a missing or damaged file, a member that is no array of numbers or text, that is there twice, whose
            size is not that of its shape, or all of them beyond what is allowed (see `Allowance`).
    """

    def read(archive, members) -> dict[str, np.ndarray]:
        return {key: _array(archive, member) for key, member in members.items()}

    return _open(path, read)


def describe_archive(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(key, shape, dtype) of every array in the archive, from the headers alone."""
    return _open(path, lambda _, members: [(k, m.shape, str(m.dtype)) for k, m in members.items()])


def _open(path: Path, use):
    path = regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return use(archive, _members(path, archive))
    except UserError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: not a readable .npz archive of plain arrays ({reason})") from None


def _members(path: Path, archive: zipfile.ZipFile) -> Mapping[str, Member]:
    size = path.stat().st_size
    allowance, members = Allowance(path, size), {}
    for info in archive.infolist():
        key = info.filename.removesuffix(SUFFIX)
        if key in members:
            raise UserError(f"{path}: keys must be there once, got {key} twice")
        if len(members) == MEMBERS:
            raise UserError(f"{path}: must hold at most {MEMBERS:,} arrays, got more")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: {key} must be stored or deflated, got another kind of packing")
        packed = info.compress_size * (INFLATION if info.compress_type == zipfile.ZIP_DEFLATED else 1)
        if info.compress_size > size or info.file_size > packed:
            raise UserError(
                f"{path}: {key} must be as large as its packed bytes can be, got {in_words(info.file_size)} "
                f"in {in_words(info.compress_size)}"
            )
        allowance.take(key, info.file_size)
        members[key] = _header(path, key, archive, info)
    return members


def _header(path: Path, key: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
            # Of the third version, which is for names of fields, no array is that is read here.
        }.get(version)
        if read is None:
            raise UserError(f"{path}: {key} must be an array of numbers or text, got version {version}")
        shape, fortran, dtype = read(file)
        start = file.tell()
    if dtype.kind not in KINDS:
        kind = "objects, which would be a pickle" if dtype.hasobject else f"dtype {dtype}"
        raise UserError(f"{path}: {key} must hold numbers or text, got {kind}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - start:
        raise UserError(
            f"{path}: {key} must have the bytes of its shape {shape} and dtype {dtype}, "
            f"got {info.file_size - start:,}"
        )
    return Member(shape, dtype, fortran, start, info)


def _array(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    out = np.empty(math.prod(member.shape), member.dtype)
    with archive.open(member.info) as file:
        file.read(member.start)
        # An array of nothing has no bytes that could be looked at.
        view, done = memoryview(out.view(np.uint8) if out.nbytes else b""), 0
        while done < len(view):
            # Reading to the end is what checks the sum of the bytes.
            count = file.readinto(view[done : done + 2**20])
            if not count:
                raise EOFError("it ends early")
            done += count
        file.read(1)
    shape = member.shape[::-1] if member.fortran else member.shape
    return out.reshape(shape).T if member.fortran else out.reshape(shape)
