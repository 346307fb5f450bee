"""Spans of time and the rows that were measured in them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Seconds: what overlaps by less only touches.
TOUCH = 1e-5
# Pairs of a span and a row that are looked at together, and in all.
TOGETHER, MOST = 2_000_000, 200_000_000


def last(intervals: np.ndarray) -> np.ndarray:
    """(n,) bool: which intervals (n, 2) of start and end in seconds last at all."""
    return intervals[:, 1] - intervals[:, 0] > TOUCH


def overlapping(spans: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many rows overlap each span by more than `TOUCH`, and which, span after span in order of their start.

    Args:
        spans: (m, 2) start and end.
        rows: (n, 2), sorted by start.

    Returns:
        (m,) counts, and (sum of the counts,) indices of rows.

    Raises:
        ValueError: so many rows lie over one another that to compare them would take minutes.
    """
    found = list(_blocks(spans, rows, TOGETHER))
    counts = np.concatenate([np.zeros(0, np.int64), *(count for count, _ in found)])
    return counts, np.concatenate([np.zeros(0, np.int64), *(index for _, index in found)])


def averages(spans: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(m, F) float32: the unweighted mean of the rows that overlap each span, NaN where none does.

    Args:
        spans: (m, 2) start and end.
        rows: (n, 2), sorted by start.
        values: (n, F) of the rows.
    """
    out = np.full((len(spans), values.shape[1]), np.nan, np.float32)
    done = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for counts, index in _blocks(spans, rows, max(1, TOGETHER // max(values.shape[1], 1))):
            filled = np.flatnonzero(counts)
            if len(filled):
                starts = (np.cumsum(counts) - counts)[filled]
                sums = np.add.reduceat(values[index].astype(np.float64), starts, axis=0)
                out[done + filled] = sums / counts[filled, None]
            done += len(counts)
    return out


def _blocks(spans: np.ndarray, rows: np.ndarray, together: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`overlapping`, for some spans after another."""
    # Ends need not be in order; the latest so far are.
    latest = np.maximum.accumulate(rows[:, 1]) if len(rows) else rows[:, 1]
    low = np.searchsorted(latest, spans[:, 0] + TOUCH, "right")
    high = np.searchsorted(rows[:, 0], spans[:, 1] - TOUCH, "left")
    width = np.maximum(high - low, 0)
    end = np.cumsum(width)
    if len(end) and end[-1] > MOST:
        raise ValueError("too many intervals lie over one another")
    first = 0
    while first < len(spans):
        until = int(np.searchsorted(end, (end[first - 1] if first else 0) + together, "right"))
        until = max(until, first + 1)
        block = slice(first, until)
        span = np.repeat(np.arange(until - first), width[block])
        row = np.arange(len(span)) - np.repeat(
            np.cumsum(width[block]) - width[block] - low[block], width[block]
        )
        shared = np.minimum(spans[block, 1][span], rows[row, 1]) - np.maximum(
            spans[block, 0][span], rows[row, 0]
        )
        kept = shared > TOUCH
        yield np.bincount(span[kept], minlength=until - first), row[kept]
        first = until
