"""Shares of train, valid and test; apart from the data, so that a flag can be refused without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real


def are_shares(shares) -> bool:
    """Whether these are three shares of train, valid and test: train above 0, not all in train, 1 in all."""
    numbers = isinstance(shares, Sequence) and len(shares) == 3 and all(isinstance(s, Real) for s in shares)
    return numbers and min(shares) >= 0 < shares[0] < 1 and abs(sum(shares) - 1) < 1e-6
