"""Means, spreads and intervals over a few runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from mmfast.checks import numpy_generator
from mmfast.tasks import Task

RESAMPLES = 2000
LEVEL = 0.95
# Runs without which an interval over them says nothing.
FEWEST = 3
# Metrics of which less is better; of all others more is.
LOWER = ("mae",)
# Metric -> how a sentence calls it.
NAMES = {
    "corr": "correlation",
    "mae": "MAE",
    "ua": "UA",
    "accuracy": "accuracy",
    "jaccard": "Jaccard",
    "f1_macro": "macro F1",
}
Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
# All others are shares, such as accuracies and F1.
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
    scale = SCALES.get(metric.partition("_")[0], LOGIT)
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


def ua(predicted: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that are among the truths; classes (runs, N) and (N,)."""
    classes = np.unique(truths)
    return np.mean([(predicted[:, truths == c] == c).mean(-1) for c in classes], axis=0)


def accuracy(predicted: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Share of right samples; classes (runs, N) and (N,)."""
    return (predicted == truths).mean(-1)


def jaccard(predicted: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean of the samples' |true and predicted| / max(1, |true or predicted|); labels (runs, N, K) and (N, K)."""
    known, true = ~np.isnan(truths), truths == 1
    either = ((predicted | true) & known).sum(-1)
    return ((predicted & true).sum(-1) / np.maximum(either, 1)).mean(-1)


def f1_macro(predicted: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean F1 of the labels, 0 for one that is neither true nor predicted; (runs, N, K) and (N, K)."""
    known, true = ~np.isnan(truths), truths == 1
    hits, both = (predicted & true).sum(-2), (predicted & known).sum(-2) + true.sum(-2)
    return (2 * hits / np.maximum(both, 1)).mean(-1)


def of_each(metric: Metric) -> Metric:
    """The mean of a metric over several numbers (runs, N, K), of each over the samples (N, K) where it is known."""

    def mean(predictions: np.ndarray, truths: np.ndarray) -> np.ndarray:
        columns = [(k, ~np.isnan(y)) for k, y in enumerate(truths.T)]
        found = [metric(predictions[:, known, k], truths[known, k]) for k, known in columns if known.any()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # undefined in all
            return np.nanmean(found, axis=0)

    return mean


class Compared(NamedTuple):
    """What methodologies are compared by.

    Attributes:
        metrics: name, as in a task's metrics -> function of decisions (runs, N, ...) and truths (N, ...).
        decided: what those functions take in place of predictions (runs, N, columns).
    """

    metrics: dict[str, Metric]
    decided: Callable[[np.ndarray], np.ndarray]


def compared(task: Task) -> Compared:
    """The metrics of a task that are resampled."""
    if task.name == "classification":
        return Compared({"ua": ua, "accuracy": accuracy}, lambda p: p.argmax(-1))
    if task.name == "multilabel":
        return Compared({"jaccard": jaccard, "f1_macro": f1_macro}, lambda p: p > task.threshold)
    if task.outputs == 1:
        return Compared({"corr": corr, "mae": mae}, lambda p: p[..., 0])
    return Compared({"corr": of_each(corr), "mae": of_each(mae)}, lambda p: p)


def bootstrap(
    predictions: np.ndarray,
    truths: np.ndarray,
    metric: Metric,
    seed: int = 0,
) -> np.ndarray:
    """The metric's mean over runs on ``RESAMPLES`` resamples of the test samples.

    Equal seeds and numbers of samples give equal resamples, so the results of two methodologies on one test set may
    be subtracted (paired bootstrap).

    Args:
        predictions: (runs, N), or (runs, N, K).
        truths: (N,) or (N, K), in the same order.
        metric: (runs, N, ...) and (N, ...) to (runs,).

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
