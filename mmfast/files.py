"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfast.errors import UserError


def write_atomically(path: str | os.PathLike, data: bytes | memoryview | str) -> None:
    """Replace the file at ``path`` by ``data``, or leave it as it is.

    The data go to a temporary file in the same folder, reach the disk (fsync), and take the name in one step, so a
    full disk or a kill at any moment leaves the previous file intact. The folder is created when it does not exist.

    Raises:
        UserError: the data cannot be written; the previous file, if any, is untouched.
    """
    path = Path(path)
    # One fixed name: what a killed process left behind is overwritten by the next attempt.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the previous file is untouched" if path.exists() else ""
        raise UserError(f"cannot save {path}: {error.strerror or error}{kept}") from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """:func:`write_atomically` of :func:`to_json`."""
    write_atomically(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """A value as JSON; NaN and infinity, which JSON does not know, become null."""

    def known(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: known(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [known(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(known(value), indent=2, allow_nan=False)


def _sync_folder(folder: Path) -> None:
    # The new name itself is only durable once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
