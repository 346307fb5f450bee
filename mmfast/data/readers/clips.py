"""What slp's and MISA's pickles have in common: splits that are lists of samples, each with arrays of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.readers import padded
from mmfast.data.readers.format import Contents
from mmfast.data.readers.labels import of_list
from mmfast.data.readers.parts import SPLIT_NAMES
from mmfast.errors import UserError

# Their name of a split -> its samples.
Splits = dict[str, Sequence]


def splits_of(content: Any) -> Splits:
    """The lists under keys that name splits, or the first three of a tuple of three or four; {} if there are none."""
    if isinstance(content, (tuple, list)) and len(content) in (3, 4):
        content = dict(zip(("train", "valid", "test"), content, strict=False))
    if not isinstance(content, dict):
        return {}
    found = {k: v for k, v in content.items() if isinstance(k, str) and k in SPLIT_NAMES}
    return found if all(isinstance(v, (list, tuple)) for v in found.values()) else {}


def first_sample(splits: Mapping[str, Sequence]) -> Any:
    """The first of the first split that has any, else None."""
    return next((samples[0] for samples in splits.values() if len(samples)), None)


def listed(splits: Mapping[str, Sequence], arrays) -> Contents:
    """(split, number of samples), and (split[0] and key, shape, dtype) of what `arrays` names in its first sample."""
    rows = []
    for split, samples in splits.items():
        rows.append((split, (len(samples),), "samples"))
        for key, value in arrays(samples[0]) if len(samples) else ():
            rows.append(padded.listed(f"{split}[0].{str(key)[:40]}", value))
    return rows


def label_table(path: Path, samples: Mapping[str, Sequence], label: Callable[[Any], Any]) -> np.ndarray:
    """(N, K) labels of all samples of all splits, one split after another.

    Raises:
        UserError: no sample, no numbers, another number of them in one sample.
    """
    given = [padded.plain(f"{path}: label", label(one)) for part in samples.values() for one in part]
    if not given:
        raise UserError(f"{path}: must hold at least one sample, got none")
    return of_list(f"{path}: label", given)


class Matrices:
    """Reads the arrays of samples; the same few in many samples are refused, as they would fill the memory."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._own = self._all = 0

    def read(self, where: str, value: Any) -> np.ndarray:
        """(n, F) numbers of an array, a tensor, or a list of rows; (0, F) or (0, 0) of an empty one.

        Raises:
            UserError: anything else, rows of other lengths.
        """
        found = padded.plain(where, value)
        if isinstance(found, np.ndarray) and found.dtype == object and found.ndim == 1:
            found = found.tolist()
        if isinstance(found, (list, tuple)):
            found = self._rows(where, found)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
            raise UserError(f"{where} must be an array of numbers, got {padded.kind(found)}")
        if not found.size:
            return np.empty((0, found.shape[1] if found.ndim == 2 else 0), np.float32)
        if found.ndim != 2:
            raise UserError(f"{where} must be (n, F), got {found.shape}")
        self._count(where, value, found.nbytes)
        return found

    def _rows(self, where: str, items: Sequence) -> np.ndarray:
        rows: list[np.ndarray] = []
        for i, item in enumerate(items):
            row = _row(f"{where}[{i}]", item)
            if rows and len(row) != len(rows[0]):
                raise UserError(
                    f"{where}[{i}] must have {len(rows[0])} numbers as the first row, got {len(row)}"
                )
            self._count(where, item, row.nbytes)
            rows.append(row)
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def _count(self, where: str, value: Any, size: int) -> None:
        self._all += size
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._own += size
        if self._all > 2 * self._own + padded.REPEATED:
            raise UserError(f"{where} must be an array of its own, got one that stands in many places")


def _row(where: str, item: Any) -> np.ndarray:
    item = padded.plain(where, item)
    if isinstance(item, (list, tuple)) and all(isinstance(x, (int, float, np.number)) for x in item):
        try:
            return np.array([float(x) for x in item])
        except (OverflowError, TypeError):
            raise UserError(f"{where} must be numbers, got one beyond float64") from None
    if not isinstance(item, np.ndarray) or item.dtype.kind not in "biuf" or item.ndim != 1:
        raise UserError(f"{where} must be (F,) numbers, got {padded.kind(item)}")
    return item


def words(where: str, value: Any) -> list[str]:
    """Words of one sample.

    Raises:
        UserError: anything that is no list of strings.
    """
    if not isinstance(value, (list, tuple, np.ndarray)) or getattr(value, "ndim", 1) == 0:
        raise UserError(f"{where} must be a list of words, got {padded.kind(value)}")
    return padded.strings(where, value, len(value), "itself", padded.LONGEST_NAME)


def are_words(value: Any) -> bool:
    """Whether it is a list of text, by its first item."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and (value.dtype.kind in "SU" or bool(value.size and _is_text(value.flat[0])))
    return isinstance(value, (list, tuple)) and bool(value) and _is_text(value[0])


def _is_text(item: Any) -> bool:
    return isinstance(item, (str, bytes))


def present(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Modality -> an array per sample, of those that a sample has; what is zero throughout is missing there."""
    found = {m: None for sample in samples for m, array in sample.items() if len(array)}
    nothing = np.empty((0, 0), np.float32)
    return {m: [_unless_zero(sample.get(m, nothing)) for sample in samples] for m in found}


def _unless_zero(array: np.ndarray) -> np.ndarray:
    return array if (array != 0).any() else array[:0]


def aligned(splits: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> bool:
    """Whether in every sample all modalities that it has are of one length."""
    return all(len(set(lengths) - {0}) <= 1 for values in splits.values() for lengths in _lengths(values))


def _lengths(values: Mapping[str, Sequence[np.ndarray]]) -> Iterator[tuple[int, ...]]:
    return zip(*([len(array) for array in arrays] for arrays in values.values()), strict=True)
