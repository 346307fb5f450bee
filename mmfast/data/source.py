"""What stands at a path, opened so that nothing blocks, nothing runs, and nothing outside is read."""

from __future__ import annotations

import os
import stat
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfast.errors import UserError

HDF5 = b"\x89HDF\r\n\x1a\n"
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Names of a folder that are looked at; more are none of a layout.
MOST_FILES = 1_000_000


def regular(path: str | os.PathLike) -> Path:
    """The path, if a regular file (or a link to one) stands there that can be read: others may block for ever.

    Raises:
        UserError: nothing there, a FIFO, a device, a folder, no permission.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = (
            "no such file" if missing else f"cannot be read ({getattr(error, 'strerror', None) or error})"
        )
        raise UserError(f"{path}: {reason}") from None
    if not stat.S_ISREG(mode):
        found = KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"{path}: must be a regular file, got {found}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (Permission denied)")
    return path


class Source:
    """A file or folder that is to be read; what is known of its content is found out once.

    Attributes:
        path: as given; it may be a link.
        is_folder: whether it is one.
        start: the first 16 bytes of a file, b"" of a folder.

    Raises:
        UserError: nothing there, or something that is neither a regular file nor a folder.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self.is_folder = stat.S_ISDIR(self.path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f'load: {path} does not exist (a path or "synthetic" is wanted)') from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        self.start = b""
        if not self.is_folder:
            try:
                with regular(self.path).open("rb") as file:
                    self.start = file.read(16)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @cached_property
    def kind(self) -> str:
        """folder, hdf5, torch, zip, safetensors, pickle or other: by content, whatever the name."""
        if self.is_folder:
            return "folder"
        if self.start.startswith(HDF5):
            return "hdf5"
        if self.start.startswith(b"PK\x03\x04"):
            return "torch" if any(n.endswith("/data.pkl") for n in self.members) else "zip"
        header = int.from_bytes(self.start[:8], "little")
        if self.start[8:9] == b"{" and header > 0:
            return "safetensors"
        from mmfast.data.readers.torch_file import MAGIC
        from mmfast.data.readers.unpickle import is_pickle

        if self.start.startswith(MAGIC):
            return "torch"
        return "pickle" if is_pickle(self.path) else "other"

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names in a zip archive, () where there is none or its directory is damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, MemoryError, OverflowError):
            return ()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Relative name -> path of the files in the two top levels of a folder, sorted; hidden ones are left out."""
        found: dict[str, Path] = {}
        if not self.is_folder:
            return found
        for folder in [self.path, *(p for p in self._entries(self.path) if p.is_dir())]:
            for path in self._entries(folder):
                if path.is_file():
                    found[path.relative_to(self.path).as_posix()] = path
                if len(found) > MOST_FILES:
                    raise UserError(f"{self.path}: must hold at most {MOST_FILES} files, got more")
        return found

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from None

    def file(self, name: str) -> Path:
        """The path of a regular file in the folder by its relative name.

        Raises:
            UserError: no such file, or one that a link or ``..`` puts outside of the folder.
        """
        path = self.path / name
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path)):
            raise UserError(f"{path}: must stay inside its folder, leads to {os.path.realpath(path)}")
        return regular(path)

    def inside(self, name: str) -> Source:
        """The source of a file in the folder, by its relative name: the same one each time.

        Raises:
            UserError: as `file`.
        """
        if name not in self._inside:
            self._inside[name] = Source(self.file(name))
        return self._inside[name]

    @cached_property
    def _inside(self) -> dict[str, Source]:
        return {}

    def object(self) -> Any:
        """What a pickle or a torch file holds: arrays, numbers, text and containers, built without running code.

        Raises:
            UserError: anything else in it, or a damaged file.
        """
        return self._object

    @cached_property
    def _object(self) -> Any:
        from mmfast.data.readers.unpickle import load_torch, unpickle

        return load_torch(self.path) if self.kind == "torch" else unpickle(self.path)
