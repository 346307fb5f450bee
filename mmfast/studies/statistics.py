"""Means, spreads and intervals over a few runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from mmfast.checks import numpy_generator

RESAMPLES = 2000
LEVEL = 0.95
# Runs without which an interval over them says nothing.
FEWEST = 3
# Metrics of which less is better; of all others more is.
LOWER = ("mae",)


class Scale(NamedTuple):
    """Where a bounded metric has no bounds: its ends, y = f(x) between them, the derivative, and the way back."""

    ends: tuple[float, ...]
    to: Callable[[float], float]
    slope: Callable[[float], float]
    back: Callable[[float], float]


FISHER = Scale((-1, 1), math.atanh, lambda r: 1 / (1 - r * r), math.tanh)
LOGIT = Scale(
    (0, 1),
    lambda p: math.log(p / (1 - p)),
    lambda p: 1 / (p * (1 - p)),
    lambda y: float(special.expit(y)),
)
LOG = Scale((0,), math.log, lambda x: 1 / x, math.exp)
# All others are accuracies and F1.
SCALES = {"corr": FISHER, "ccc": FISHER, "mae": LOG}


@dataclass(frozen=True)
class Summary:
    """One metric over the n runs of a methodology.

    Attributes:
        mean, std: ``std`` is the sample standard deviation (n - 1), NaN for one run.
        low, high: 95 % interval of the mean, which leaves the metric's range as little as the mean does: Student's t
            on Fisher's z for correlations, on the logit for accuracies and F1, on the logarithm for errors. NaN for
            fewer than three runs. It covers the luck of the seed, not that of the test samples.
    """

    mean: float
    std: float
    n: int
    low: float
    high: float


def summarise(metric: str, values: Sequence[float]) -> Summary:
    """The summary of one metric's values over runs."""
    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    std = float(x.std(ddof=1)) if n > 1 else math.nan
    low = high = math.nan
    scale = SCALES.get(metric, LOGIT)
    if n >= FEWEST and (std == 0 or mean in scale.ends):  # all values are the same, or as good as
        low = high = mean
    elif n >= FEWEST and not math.isnan(mean):
        reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n) * scale.slope(mean)
        low, high = (scale.back(scale.to(mean) + side * reach) for side in (-1, 1))
    return Summary(mean, std, n, low, high)


def mae(predictions: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean absolute error along the last axis."""
    return np.abs(predictions - truths).mean(-1)


def corr(predictions: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis, NaN where it is undefined."""
    p = predictions - predictions.mean(-1, keepdims=True)
    y = truths - truths.mean(-1, keepdims=True)
    norm = np.sqrt((p * p).sum(-1) * (y * y).sum(-1))
    # Asked of the numbers themselves: a constant minus its mean is not always exactly 0.
    varies = (np.ptp(predictions, -1) > 0) & (np.ptp(truths, -1) > 0) & (norm > 0)
    return np.divide((p * y).sum(-1), norm, out=np.full_like(norm, np.nan), where=varies)


def bootstrap(
    predictions: np.ndarray,
    truths: np.ndarray,
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int = 0,
) -> np.ndarray:
    """The metric's mean over runs on ``RESAMPLES`` resamples of the test samples.

    Equal seeds and numbers of samples give equal resamples, so the results of two methodologies on one test set may
    be subtracted (paired bootstrap).

    Args:
        predictions: (runs, N).
        truths: (N,), in the same order.
        metric: reduces the last axis.

    Returns:
        (RESAMPLES,).
    """
    generator = numpy_generator("bootstrap", seed)
    n = len(truths)
    rows = (generator.integers(n, size=n) for _ in range(RESAMPLES))
    return np.array([np.mean(metric(predictions[:, row], truths[row])) for row in rows])


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the resamples in which the metric is defined, NaN if it is in none."""
    defined = resampled[~np.isnan(resampled)]
    if len(defined) == 0:
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
