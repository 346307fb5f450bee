"""What an experiment shows, in one sentence that follows from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mmfast.metrics import shown
from mmfast.studies.statistics import LOWER, interval

# Metric -> how a sentence calls it.
NAMES = {"corr": "correlation", "mae": "MAE"}
TITLES = {"ridge": "ridge regression", "constant": "the median label"}


class Difference(NamedTuple):
    """Row ``a`` minus row ``b`` in one metric: of their means over seeds, with its interval over test samples."""

    metric: str
    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 where ``a`` is better, -1 where it is worse, 0 where the interval holds 0 or the metric is undefined."""
        better = -1 if self.metric in LOWER else 1
        return better * ((self.low > 0) - (self.high < 0))

    def __str__(self) -> str:
        return f"{NAMES[self.metric]} {shown(self.mean, 3, sign='+')} [{self.low:.3f}, {self.high:.3f}]"


Resampled = Mapping[str, Mapping[str, np.ndarray]]
Means = Mapping[str, Mapping[str, float]]


def difference(metric: str, a: str, b: str, means: Means, resampled: Resampled) -> Difference:
    """How two rows differ in a metric, by paired bootstrap."""
    low, high = interval(resampled[metric][a] - resampled[metric][b])
    return Difference(metric, means[metric][a] - means[metric][b], low, high)


def verdict(networks: list[str], means: Means, resampled: Resampled) -> str:
    """One sentence: networks against ridge regression, or the constant without it, and what pre-training adds.

    A row beats another if the 95 % interval of their difference leaves out 0 in correlation or MAE, and not the other
    way round in the other.

    Args:
        networks: the rows that are networks; others are baselines.
        means: metric -> row -> mean over seeds.
        resampled: metric -> row -> bootstrap distribution of that mean.
    """
    best = min(networks, key=lambda name: means["mae"][name])
    parts = []
    if "constant" in means["mae"] and _compare(best, "constant", means, resampled)[0] < 1:
        parts.append(
            f"no network is shown to be better than {TITLES['constant']} ({_of(best, 'constant', means, resampled)})"
        )
    if "ridge" in means["mae"]:
        parts.append(_against_ridge(best, len(networks) > 1, means, resampled))
    elif not parts and "constant" in means["mae"]:
        parts.append(f"{best} beats {TITLES['constant']} ({_of(best, 'constant', means, resampled)})")
    if {"SSL", "FS"} <= set(networks):
        sign, mixed = _compare("SSL", "FS", means, resampled)
        word = {1: "helps", -1: "harms", 0: "shows no effect"}[sign]
        numbers = _of("SSL", "FS", means, resampled)
        parts.append(
            f"pre-training {'helps in one metric and harms in the other' if mixed else word} ({numbers})"
        )
    if not parts:
        parts = [f"{best} has an MAE of {means['mae'][best]:.3f}"]
    sentence = "; ".join(parts)
    note = "; brackets hold 95 % intervals over test samples" if "[" in sentence else ""
    return f"{sentence[0].upper()}{sentence[1:]}{note}."


def _against_ridge(best: str, several: bool, means: Means, resampled: Resampled) -> str:
    sign, mixed = _compare(best, "ridge", means, resampled)
    numbers = _of(best, "ridge", means, resampled)
    ridge, networks = TITLES["ridge"], "the networks" if several else best
    if mixed:
        return f"{best} and {ridge} each win in one metric ({numbers})"
    if sign > 0:
        return f"{best} beats {ridge} ({numbers})"
    if sign < 0:
        return f"{ridge} beats {networks} ({numbers})"
    return f"{best} and {ridge} are not told apart ({numbers})"


def _compare(a: str, b: str, means: Means, resampled: Resampled) -> tuple[int, bool]:
    """Whether ``a`` is better (1), worse (-1) or neither (0), and whether the two metrics contradict each other."""
    signs = {difference(metric, a, b, means, resampled).sign for metric in NAMES}
    return (0, True) if {1, -1} <= signs else (sum(signs), False)


def _of(a: str, b: str, means: Means, resampled: Resampled) -> str:
    both = (difference(metric, a, b, means, resampled) for metric in NAMES)
    return f"{a} - {b}: {', '.join(str(d) for d in both if not np.isnan(d.mean) and not np.isnan(d.low))}"
