"""A table beside sound files that says what each of them is."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmfast.data.readers.parts import SPLIT_NAMES
from mmfast.data.source import Source, regular
from mmfast.errors import UserError
from mmfast.wording import one_of

PATH, LABEL, SPLIT = "path", "label", "split"
DELIMITERS = "\t,;"
HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Table:
    """A manifest.

    Attributes:
        name: of the file.
        rows: relative name of a sound file, label or None, groups, split.
        numbers: whether labels are numbers.
    """

    name: str
    rows: Sequence[tuple[str, str | float | None, dict[str, str], str]]
    numbers: bool


def is_manifest(path: Path) -> bool:
    """Whether the file is a table with a column ``path``."""
    return _delimiter(path) is not None


def tables(source: Source) -> list[str]:
    """Names of the tables with a column ``path`` that stand in a folder."""
    return [
        name
        for name, path in source.files.items()
        if "/" not in name and path.suffix.lower() in (".csv", ".tsv") and is_manifest(path)
    ]


def read_manifest(source: Source, name: str) -> Table:
    """The table of this name in a folder.

    A header names the columns, which tabs, commas or semicolons divide: ``path`` relative to the file; ``label``,
    numbers or else classes, empty for none; ``split``; any other is a kind of group, such as ``speaker``.

    Raises:
        UserError: a damaged file, a path that is absolute, leaves the folder or is listed twice, an infinite number,
            a split of another name.
    """
    path = source.file(name)
    rows, listed = [], set()
    with _reading(path) as lines:
        header = [cell.strip().lower() for cell in next(lines)]
        for column in header:
            if not column or header.count(column) > 1:
                raise UserError(
                    f"{path}: columns must have names, each its own, got {column!r} in the header"
                )
        for cells in lines:
            if not cells:
                continue
            where = f"{path}: line {lines.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{where} must have {len(header)} cells as the header, got {len(cells)}")
            row = {column: cell.strip() for column, cell in zip(header, cells, strict=True)}
            file, label, split = row.pop(PATH), row.pop(LABEL, ""), row.pop(SPLIT, None)
            sound = _inside(where, file)
            if sound in listed:
                raise UserError(f"{where}: {PATH} must be listed once, got {file} again")
            listed.add(sound)
            if split is not None and split.lower() not in SPLIT_NAMES:
                raise UserError(f"{where}: {SPLIT} must be {one_of(SPLIT_NAMES)}, got {split[:40]!r}")
            part = "all" if split is None else SPLIT_NAMES[split.lower()]
            rows.append((sound, label or None, row, part))
    labels = [row[1] for row in rows if row[1] is not None]
    numbers = bool(labels) and all(map(_is_number, labels))
    if numbers:
        rows = [(sound, _number(path, sound, label), *rest) for sound, label, *rest in rows]
    return Table(name, rows, numbers)


def _delimiter(path: Path) -> str | None:
    try:
        with regular(path).open("rb") as file:
            head = file.read(HEADER_BYTES).decode("utf-8-sig", "ignore").splitlines()
        for delimiter in DELIMITERS if head else "":
            if PATH in [cell.strip().lower() for cell in next(csv.reader(head[:1], delimiter=delimiter))]:
                return delimiter
    except (OSError, UserError, csv.Error, StopIteration):
        pass
    return None


@contextmanager
def _reading(path: Path) -> Iterator:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield csv.reader(file, delimiter=_delimiter(path) or ",", strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        found = error.object[error.start :][:4].hex(" ")
        raise UserError(f"{path}: must be text in UTF-8, got the bytes {found}") from None
    except (csv.Error, StopIteration) as error:
        raise UserError(
            f"{path}: must be a table with a header and as many cells in each line ({error})"
        ) from None


def _inside(where: str, file: str) -> str:
    """The relative name, without detours."""
    parts: list[str] = []
    for part in PurePosixPath(file).parts:
        if part == ".." and not parts:
            break
        parts = parts[:-1] if part == ".." else [*parts, part]
    else:
        if parts and parts[0] != "/" and "\0" not in file:
            return "/".join(parts)
    raise UserError(
        f"{where}: {PATH} must be relative to the table and stay in its folder, got {file[:200]!r}"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _number(path: Path, sound: str, label: str | None) -> float | None:
    if label is None or math.isnan(number := float(label)):
        return None
    if math.isinf(number):
        raise UserError(f"{path}: {LABEL} must be finite, got {label} for {sound}")
    return number
