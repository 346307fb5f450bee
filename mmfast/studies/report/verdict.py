"""What an experiment shows, in one sentence that follows from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mmfast.metrics import shown
from mmfast.studies.statistics import LOWER, NAMES, interval

# The two baselines of a table, whichever they are: a linear model and a constant.
LINEAR = {"ridge": "ridge regression", "logistic": "logistic regression"}
CONSTANT = {"constant": "the median label", "base_rate": "the base rate"}
TITLES = LINEAR | CONSTANT


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
    """One sentence: networks against the linear model, or the constant without it, and what pre-training adds.

    A row beats another if the 95 % interval of their difference leaves out 0 in one of the two metrics, and not the
    other way round in the other.

    Args:
        networks: the rows that are networks; others are baselines.
        means: metric -> row -> mean over seeds; of two metrics.
        resampled: metric -> row -> bootstrap distribution of that mean.
    """
    best = best_of(networks, means)
    parts = []
    rows = next(iter(means.values()))
    linear, constant = (next(filter(rows.__contains__, kind), None) for kind in (LINEAR, CONSTANT))
    if constant and _compare(best, constant, means, resampled)[0] < 1:
        parts.append(
            f"no network is shown to be better than {TITLES[constant]} ({_of(best, constant, means, resampled)})"
        )
    if linear:
        parts.append(_against(linear, best, len(networks) > 1, means, resampled))
    elif not parts and constant:
        parts.append(f"{best} beats {TITLES[constant]} ({_of(best, constant, means, resampled)})")
    if {"SSL", "FS"} <= set(networks):
        sign, mixed = _compare("SSL", "FS", means, resampled)
        word = {1: "helps", -1: "harms", 0: "shows no effect"}[sign]
        numbers = _of("SSL", "FS", means, resampled)
        parts.append(
            f"pre-training {'helps in one metric and harms in the other' if mixed else word} ({numbers})"
        )
    if not parts:
        first = _decisive(means)
        parts = [
            f"{best} has {'an' if first in ('mae', 'accuracy') else 'a'} {NAMES[first]} of {means[first][best]:.3f}"
        ]
    sentence = "; ".join(parts)
    note = "; brackets hold 95 % intervals over test samples" if "[" in sentence else ""
    return f"{sentence[0].upper()}{sentence[1:]}{note}."


def best_of(rows: list[str], means: Means) -> str:
    """The row that is best by MAE, or by the first of other metrics."""
    first = _decisive(means)
    return (min if first in LOWER else max)(rows, key=lambda name: means[first][name])


def _decisive(means: Means) -> str:
    return "mae" if "mae" in means else next(iter(means))


def _against(linear: str, best: str, several: bool, means: Means, resampled: Resampled) -> str:
    sign, mixed = _compare(best, linear, means, resampled)
    numbers = _of(best, linear, means, resampled)
    title, networks = TITLES[linear], "the networks" if several else best
    if mixed:
        return f"{best} and {title} each win in one metric ({numbers})"
    if sign > 0:
        return f"{best} beats {title} ({numbers})"
    if sign < 0:
        return f"{title} beats {networks} ({numbers})"
    return f"{best} and {title} are not told apart ({numbers})"


def _compare(a: str, b: str, means: Means, resampled: Resampled) -> tuple[int, bool]:
    """Whether ``a`` is better (1), worse (-1) or neither (0), and whether the two metrics contradict each other."""
    signs = {difference(metric, a, b, means, resampled).sign for metric in means}
    return (0, True) if {1, -1} <= signs else (sum(signs), False)


def _of(a: str, b: str, means: Means, resampled: Resampled) -> str:
    both = (difference(metric, a, b, means, resampled) for metric in means)
    return f"{a} - {b}: {', '.join(str(d) for d in both if not np.isnan(d.mean) and not np.isnan(d.low))}"
