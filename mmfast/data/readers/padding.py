"""Padded arrays in which zeros are the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass
class Cut:
    """Samples of which steps were cut in front and at the back, and how many there are."""

    front: int = 0
    back: int = 0
    samples: int = 0

    def __add__(self, other: Cut) -> Cut:
        return Cut(self.front + other.front, self.back + other.back, self.samples + other.samples)

    def __str__(self) -> str:
        if not self.front and not self.back:
            return "none found"
        return (
            f"in front of {self.front} and at the back of {self.back} of {self.samples} samples, zeros; "
            "cut when read"
        )


def unpad(
    arrays: Mapping[str, np.ndarray], aligned: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Cut]:
    """The real steps (steps, F) of all samples, (N,) lengths, and what was cut.

    Real are the steps from the first to the last that is not zero: aligned, in any modality; else in the modality
    itself. Zeros inside stay (a face not found, a pause). A modality that is zero at every step of a sample is
    missing there and has length 0. NaN and inf are not zero.

    Args:
        arrays: modality -> (N, L, F); one L for all if ``aligned``.
    """
    filled = {m: (a != 0).any(-1) for m, a in arrays.items()}
    if aligned and arrays:
        anywhere = np.logical_or.reduce(list(filled.values()))
        spans = dict.fromkeys(arrays, span(anywhere))
        spans_cut = [span(anywhere)]
    else:
        spans = {m: span(f) for m, f in filled.items()}
        spans_cut = list(spans.values())
    values, lengths = {}, {}
    for modality, array in arrays.items():
        real = spans[modality] & filled[modality].any(1, keepdims=True)
        values[modality], lengths[modality] = array[real], real.sum(1)
    return values, lengths, cut(spans_cut)


def span(filled: np.ndarray) -> np.ndarray:
    """(N, L) bool: from the first to the last True of each row."""
    after_first = np.logical_or.accumulate(filled, axis=1)
    before_last = np.logical_or.accumulate(filled[:, ::-1], axis=1)[:, ::-1]
    return after_first & before_last


def cut(spans: list[np.ndarray]) -> Cut:
    """What is cut of samples by (N, L) bool of their real steps, one for each modality or for all."""
    spans = [s for s in spans if s.size]
    if not spans:
        return Cut()
    # A sample without any real step has no side.
    front = np.any([~s[:, 0] & s.any(1) for s in spans], axis=0)
    back = np.any([~s[:, -1] & s.any(1) for s in spans], axis=0)
    return Cut(int(front.sum()), int(back.sum()), len(front))
