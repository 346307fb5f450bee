"""Any source of utterances by name or path."""

from __future__ import annotations

import inspect as signatures
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmfast.data.corpus import MultimodalData
from mmfast.data.readers import ict_mmmo
from mmfast.data.readers import npz as storage
from mmfast.data.readers.hdf5 import SIGNATURE as HDF5
from mmfast.data.readers.hdf5 import describe_hdf5
from mmfast.data.synthetic import synthetic
from mmfast.errors import UserError


@dataclass(frozen=True)
class Format:
    """How files of one kind are told apart, read, and listed."""

    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], MultimodalData]
    contents: Callable[[Path], list[tuple[str, tuple[int, ...], str]]]
    padding: Callable[[Path], str]


FORMATS = (
    Format(
        "an ICT-MMMO folder (audio_train.h5, ...)",
        ict_mmmo.is_ict_mmmo,
        ict_mmmo.read_ict_mmmo,
        ict_mmmo.contents,
        ict_mmmo.padding,
    ),
    Format(
        "an mmfast .npz file",
        storage.is_saved,
        storage.read_saved,
        storage.contents,
        lambda path: "none, stored without",
    ),
)


def load(source, **options) -> MultimodalData:
    """The corpus called `source`: "synthetic" (options as in `synthetic`), or a path, recognised by content.

    Raises:
        UserError: nothing there, unknown options, or content of no known kind (which is then listed).
    """
    if source == "synthetic":
        known = signatures.signature(synthetic).parameters
        for name in options.keys() - known:
            raise UserError(f"load: synthetic takes the options {list(known)}, got {name!r}")
        return synthetic(**options)
    if options:
        raise UserError(f"load: a path takes no options, got {list(options)} for {source}")
    path = Path(source)
    return recognise(path).read(path)


def recognise(path: Path) -> Format:
    """The format of a file or folder, or a UserError that lists what was found there."""
    if not path.exists():
        raise UserError(f'load: {path} does not exist (a path or "synthetic" is wanted)')
    for kind in FORMATS:
        if kind.recognises(path):
            return kind
    known = " and ".join(kind.title for kind in FORMATS)
    raise UserError(f"load: {path} is of no known kind: found {_describe(path)}; recognised are {known}")


def _describe(path: Path) -> str:
    try:
        if path.is_dir():
            return f"a folder with {_few(sorted(p.name for p in path.iterdir()))}"
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        return f"something unreadable ({error.strerror})"
    if not start:
        return "an empty file"
    if start == HDF5:
        try:
            return f"an HDF5 file with {_few([key for key, *_ in describe_hdf5(path)])}"
        except UserError as error:
            return f"an HDF5 file that cannot be read ({error})"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return f"an archive with {_few(archive.namelist())}"
        except (zipfile.BadZipFile, OSError):
            return "an archive that is truncated or damaged"
    return f"a {path.suffix or 'nameless'} file that starts with the bytes {start.hex(' ')}"


def _few(names: list[str], limit: int = 6) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "nothing in it"
