"""Splits that are listed by name, in a file or a mapping."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmfast.data.dataset import MultimodalDataset
from mmfast.data.shares import TEST, TRAIN, VALID
from mmfast.data.source import regular
from mmfast.data.units import values_of
from mmfast.errors import UserError

NOWHERE = -1
# What published files call the splits.
PARTS = {"train": TRAIN, "valid": VALID, "val": VALID, "dev": VALID, "validation": VALID, "test": TEST}
# The columns of a table by which samples are named.
COLUMNS = ("name", "video")


def by_lists(
    dataset: MultimodalDataset, source: str | Mapping[str, Sequence[str]], group: str = "video"
) -> np.ndarray:
    """(N,) the part of each sample, TRAIN, VALID or TEST, or NOWHERE where no list names it.

    An entry is the name of a sample or a value of the group, such as a video.

    Args:
        source: split -> entries, or a file of the same: .json, or .csv with the columns name or video and split.

    Raises:
        UserError: an unreadable or foreign file, an entry that names nothing, a sample that is named twice.
    """
    where = "split" if isinstance(source, Mapping) else str(source)
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(dataset.names):
        rows.setdefault(name, []).append(i)
    of_group: dict[str, list[int]] = {}
    if group in dataset.groups:
        for i, value in enumerate(values_of(dataset, group)):
            of_group.setdefault(value, []).append(i)
    part, by = np.full(len(dataset), NOWHERE), {}
    unknown: dict[str, list[str]] = {}
    for split, entry in _entries(where, source):
        if entry == "" or not (found := rows.get(entry) or of_group.get(entry)):
            unknown.setdefault(split, []).append(entry)
            continue
        for i in found:
            if part[i] != NOWHERE:
                first, other = by[i]
                raise UserError(
                    f"{where}: every sample must be named once, got {dataset.names[i]!r} by {first!r} in {other} and "
                    f"by {entry!r} in {split}"
                )
            part[i], by[i] = PARTS[split], (entry, split)
    for split, entries in unknown.items():
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        kinds = f"samples or values of {group}" if of_group else "samples"
        raise UserError(f"{where}: {split} must hold names of {kinds} of the data, got {entries[0]!r}{more}")
    if not (part == TRAIN).any():
        raise UserError(f"{where}: train must name at least one sample, got none")
    return part


def _entries(where: str, source: str | Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """(split, name) for every entry."""
    if not isinstance(source, Mapping):
        text = _text(Path(source))
        if where.lower().endswith(".csv"):
            yield from _table(where, text)
            return
        source = _json(where, text)
    if not isinstance(source, Mapping):
        raise UserError(
            f'{where}: must hold lists such as {{"train": ["name", ...]}}, got {type(source).__name__}'
        )
    for split, entries in source.items():
        _check_split(where, split)
        if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
            raise UserError(f"{where}: {split} must be a list of names, got {type(entries).__name__}")
        for entry in entries:
            if not isinstance(entry, (str, int)) or isinstance(entry, bool):
                raise UserError(f"{where}: {split} must hold names, got {type(entry).__name__}")
            yield split, str(entry)


def _check_split(where: str, split) -> None:
    if split not in PARTS:
        raise UserError(f"{where}: a split must be one of {', '.join(PARTS)}, got {split!r}")


def _text(path: Path) -> str:
    try:
        return regular(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: must be text in UTF-8, got the byte {error.object[error.start]:#x}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json(where: str, text: str):
    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(f"{where}: must be JSON, got a fault: {reason}") from None


def _table(where: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip().lower() for cell in next(rows, [])]
        column = next((header.index(name) for name in COLUMNS if name in header), None)
        if column is None or "split" not in header:
            raise UserError(
                f"{where}: must have the columns split and {' or '.join(COLUMNS)}, got {', '.join(header) or 'none'}"
            )
        for row in filter(None, rows):
            if len(row) != len(header):
                raise UserError(
                    f"{where}: line {rows.line_num} must have {len(header)} cells, got {len(row)}"
                )
            split = row[header.index("split")].strip().lower()
            _check_split(f"{where}: line {rows.line_num}", split)
            yield split, row[column].strip()
    except csv.Error as error:
        raise UserError(f"{where}: line {rows.line_num} must be CSV, got a fault: {error}") from None
