"""Labels as other repositories keep them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmfast.data.targets import CLASSIFICATION, MULTILABEL, REGRESSION
from mmfast.errors import UserError

# CMU-MOSEI's columns.
SENTIMENT, EMOTIONS = "sentiment", ("happy", "sad", "anger", "surprise", "disgust", "fear")
MOST_COLUMNS = 1_000


class Labels(NamedTuple):
    """(N,) numbers or indices of classes, or (N, K) numbers; and what they are."""

    values: np.ndarray
    task: str


def read_labels(where: str, value: Any, samples: int) -> Labels:
    """Numbers of N samples: (N,), (N, 1), (N, 1, 1), a list of numbers or of (1, 1) arrays, or (N, K).

    Rows of 0 and 1 that add up to 1 are one-hot classes. NaN is none.

    Args:
        where: file and key, for errors.

    Raises:
        UserError: no numbers, another number of samples, more axes.
    """
    if isinstance(value, (list, tuple)):
        value = of_list(where, value[: samples + 1])
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where} must be numbers, got {array.dtype}")
    if array.ndim == 0 or len(array) != samples:
        got = len(value) if hasattr(value, "__len__") and array.ndim else "one number"
        raise UserError(f"{where} must have {samples} rows, one per sample, got {got}")
    array = array.astype(np.float64)
    while array.ndim > 1 and array.shape[-1] == 1:
        array = array[..., 0]
    while array.ndim > 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim > 2 or 0 in array.shape[1:]:
        raise UserError(f"{where} must be (N,), (N, 1), (N, 1, 1) or (N, K), got {np.shape(value)}")
    if array.ndim == 2 and samples and is_one_hot(array):
        return Labels(array.argmax(1).astype(np.float64), CLASSIFICATION)
    return Labels(array, REGRESSION)


def of_list(where: str, items) -> np.ndarray:
    """(N, K) from N numbers, or N arrays or lists of K."""
    rows = []
    for i, item in enumerate(items):
        # Lists in lists may be few in the file and have no end in memory.
        cells = item if isinstance(item, (list, tuple)) else [item]
        flat = np.concatenate(
            [_cells(f"{where}[{i}]", cell) for cell in cells[:MOST_COLUMNS] or [np.empty(0)]]
        )
        if not flat.size or flat.size > MOST_COLUMNS or (rows and flat.size != rows[0].size):
            raise UserError(f"{where}[{i}] must be a number, or as many as in all others, got {flat.size}")
        rows.append(flat)
    return np.stack(rows) if rows else np.empty(0)


def _cells(where: str, value: Any) -> np.ndarray:
    if value is None or isinstance(value, (bool, int, float, np.number, np.bool_)):
        try:
            return np.array([np.nan if value is None else float(value)])
        except OverflowError:
            return np.array([np.inf])
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size <= MOST_COLUMNS:
        return value.reshape(-1)
    raise UserError(f"{where} must be numbers, got {type(value).__name__}")


def is_one_hot(rows: np.ndarray) -> bool:
    """Whether each row of (N, K), K of 2 or more, is 0 but for one 1."""
    return rows.shape[1] >= 2 and bool(np.isin(rows, (0, 1)).all() and (rows.sum(1) == 1).all())


def two_classes(where: str, labels: np.ndarray) -> np.ndarray:
    """(N,) of 0 and 1, or of -1 and 1, as classes 0 and 1; NaN stays.

    Args:
        where: file and key, for errors.

    Raises:
        UserError: other numbers, or several a sample.
    """
    if labels.ndim > 1:
        raise UserError(f"{where} must be one a sample for --labels classification, got several")
    known = labels[~np.isnan(labels)]
    if not np.isin(known, (0, 1)).all() and not np.isin(known, (-1, 1)).all():
        other = next(float(x) for x in known if x not in (0, 1))
        raise UserError(f"{where} must be 0 and 1, or -1 and 1, for --labels classification, got {other:g}")
    return np.where(np.isnan(labels), np.nan, labels > 0)


def range_of(labels: np.ndarray) -> tuple[float, float]:
    """(-3, 3) if it holds all labels, else the smallest whole numbers that do."""
    known = labels[np.isfinite(labels)]
    if not known.size or np.abs(known).max() <= 3:
        return -3.0, 3.0
    low, high = math.floor(known.min()), math.ceil(known.max())
    return float(low), float(high if high > low else low + 1)


def outside(labels: np.ndarray, label_range: tuple[float, float]) -> list[str]:
    """A warning if labels lie outside of the layout's range; they are kept."""
    low, high = label_range
    wrong = labels[(labels < low) | (labels > high)]
    if not wrong.size:
        return []
    return [
        f"{wrong.size} labels lie outside [{low:g}, {high:g}], such as {wrong.flat[0]:g}; kept as they are"
    ]


def columns(
    where: str, labels: np.ndarray, names: Sequence[str] | None, chosen: str | None
) -> dict[str, Any]:
    """Which of K numbers a sample are its labels: `labels`, `task`, `targets` and, of a regression, `label_range`.

    Args:
        where: file and key, for errors.
        labels: (N, K).
        names: of the K columns; seven without are CMU-MOSEI's.
        chosen: "all"; "emotions", which are there if their number is above 0, and "sentiment", of seven columns; or
            the name or position of one column. Of seven the sentiment is the default, else all.

    Raises:
        UserError: no such choice.
    """
    count = labels.shape[1]
    mosei = count == 1 + len(EMOTIONS)
    if not names or len(names) != count or len(set(names)) < count or not all(names):
        names = (SENTIMENT, *EMOTIONS) if mosei else [f"label{k}" for k in range(count)]
    if mosei and chosen == "emotions":
        there = np.where(np.isnan(labels[:, 1:]), np.nan, labels[:, 1:] > 0)
        return {"labels": there, "task": MULTILABEL, "targets": EMOTIONS}
    kept = list(range(count))
    known = {name: k for k, name in enumerate(names)} | {str(k): k for k in kept}
    if mosei and chosen in (None, SENTIMENT):
        kept = [0]
    elif chosen in known:
        kept = [known[chosen]]
    elif chosen not in (None, "all"):
        choices = ["all", *(["emotions", SENTIMENT] if mosei else []), *names]
        raise UserError(f"{where} must be one of {', '.join(dict.fromkeys(choices))}, got {chosen!r}")
    values = labels[:, kept[0]] if len(kept) == 1 else labels
    targets = None if count == 1 and names[0] == "label0" else [names[k] for k in kept]
    return {"labels": values, "task": REGRESSION, "targets": targets, "label_range": range_of(values)}
