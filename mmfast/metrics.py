"""Metrics of multimodal sentiment and emotion analysis, each in the variants that papers report.

Predictions and truths are arrays, tensors or lists of one number per sample, all samples of the test set at
once (a mean of per-batch values is another number). Results are Python floats, fractions in [0, 1]; tables
multiply by 100. Sizes that differ, no sample at all, and NaN or infinite values are errors.

Rounding is half to even, as in numpy: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2.

Binarisations, for the accuracy ``acc2*`` and the F1 ``f1*``:

=========  =====================================  ============================================
suffix     rule, on predictions and truths alike  known as
=========  =====================================  ============================================
(none)     x > 0, samples with truth 0 left out   the thesis's, M3's and MulT's; MMSA's "Non0"
``_has0``  x >= 0                                 M3's ``bin_acc_pos``; MMSA's "Has0"
``_gt0``   x > 0                                  M3's ``bin_acc_neg``
=========  =====================================  ============================================

:func:`metrics_for` says which of all these apply to the labels of a data set.

Sources: the evaluation code of M3, MulT and MMSA, and the README of the CMU Multimodal SDK.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from mmfast.checks import check_integer, check_number, numpy_generator
from mmfast.errors import UserError

EMOTIONS = ("neutral", "happy", "sad", "angry")


def mae(predictions, truths) -> float:
    """Mean absolute error, neither clipped nor rounded; unit of the labels."""
    p, y = _checked("mae", predictions, truths)
    return float(np.abs(p - y).mean())


def corr(predictions, truths) -> float:
    """Pearson correlation in [-1, 1]; NaN where predictions or truths are constant (one sample included)."""
    p, y = _checked("corr", predictions, truths)
    if p.min() == p.max() or y.min() == y.max():
        return math.nan
    return float(np.clip(_standardised(p) @ _standardised(y), -1, 1))


def ccc(predictions, truths) -> float:
    """Concordance correlation (Lin 1989) in [-1, 1]: 2 cov / (var_p + var_y + (mean_p - mean_y)^2).

    The measure of dimensional emotion (valence, arousal, dominance) on any scale. Variances are biased, as in the
    AVEC challenges. NaN where all predictions and truths are one number.
    """
    p, y = _checked("ccc", predictions, truths)
    # Shifted and scaled alike, which changes nothing, lest squares overflow or small differences get lost.
    p, y = p - y[0], y - y[0]
    largest = max(np.abs(p).max(), np.abs(y).max())
    if largest == 0:
        return math.nan
    p, y = p / largest, y / largest
    distance = p.var() + y.var() + (p.mean() - y.mean()) ** 2
    return float(2 * np.mean((p - p.mean()) * (y - y.mean())) / distance)


def acc7(predictions, truths) -> float:
    """Share of equal classes after clipping both to [-3, 3] and rounding (M3, MulT, MMSA, the thesis)."""
    return _rounded_accuracy(*_checked("acc7", predictions, truths), limit=3)


def acc5(predictions, truths) -> float:
    """Share of equal classes after clipping both to [-2, 2] and rounding (M3, MulT, MMSA, the thesis)."""
    return _rounded_accuracy(*_checked("acc5", predictions, truths), limit=2)


def acc7_cmu(predictions, truths) -> float:
    """Seven classes by the rule of CMU's MOSEI release, which rounds away from zero.

    0 only if exactly 0; (0, 1] -> 1, (1, 2] -> 2, above 2 -> 3; negative numbers alike. A regressor hardly
    ever predicts an exact 0, so this is lower than :func:`acc7`, which everybody else reports.
    """
    p, y = _checked("acc7_cmu", predictions, truths)
    return float(np.mean(_away_from_zero(p) == _away_from_zero(y)))


def acc2(predictions, truths) -> float:
    """Negative/positive accuracy, samples with truth 0 left out: the Acc2 of the thesis, M3 and MulT.

    NaN if every truth is 0, as nothing is left to be right or wrong about.
    """
    return _agreement(*_without_zeros(*_checked("acc2", predictions, truths)))


def acc2_has0(predictions, truths) -> float:
    """Negative/non-negative accuracy: x >= 0 on both sides, all samples."""
    return _agreement(*_non_negative(*_checked("acc2_has0", predictions, truths)))


def acc2_gt0(predictions, truths) -> float:
    """Positive/non-positive accuracy: x > 0 on both sides, all samples."""
    return _agreement(*_positive(*_checked("acc2_gt0", predictions, truths)))


def f1(predictions, truths) -> float:
    """F1 of the binarisation of :func:`acc2`: mean over both classes, weighted by their **true** counts.

    Equal to scikit-learn's ``f1_score(truths, predictions, average="weighted")``. A class that is neither
    true nor predicted has F1 0 and weight 0. NaN if every truth is 0.
    """
    return _weighted_f1(*_without_zeros(*_checked("f1", predictions, truths)))


def f1_has0(predictions, truths) -> float:
    """As :func:`f1` on the binarisation of :func:`acc2_has0`."""
    return _weighted_f1(*_non_negative(*_checked("f1_has0", predictions, truths)))


def f1_gt0(predictions, truths) -> float:
    """As :func:`f1` on the binarisation of :func:`acc2_gt0`."""
    return _weighted_f1(*_positive(*_checked("f1_gt0", predictions, truths)))


def f1_as_published(predictions, truths) -> float:
    """:func:`f1` with the arguments swapped, as M3, MulT and the thesis computed it.

    Each class's F1 is symmetric, but its weight here is the number of times that it was **predicted**. Only
    for comparison with published tables.
    """
    predicted, true = _without_zeros(*_checked("f1_as_published", predictions, truths))
    return _weighted_f1(true, predicted)


ERRORS = mae, corr
SIGNS = acc2, f1, f1_as_published, acc2_has0, f1_has0, acc2_gt0, f1_gt0
SEVEN = acc5, acc7, acc7_cmu


def regression_metrics(predictions, truths) -> dict[str, float]:
    """The CMU-MOSI and MOSEI set for labels in [-3, 3]: errors, signs and classes, each by its name."""
    return _measure("regression_metrics", (*ERRORS, *SIGNS, *SEVEN), predictions, truths)


def sims_metrics(predictions, truths) -> dict[str, float]:
    """The CH-SIMS set for labels in [-1, 1], as in MMSA: ``mae, corr, acc2, f1, acc3, acc5``.

    Classes are intervals open on the left and closed on the right, cut at 0 (two classes: 0 is negative), at
    -0.1 and 0.1 (three), at -0.7, -0.1, 0.1 and 0.7 (five); values beyond [-1, 1] are clipped. F1 is that of
    the two classes, weighted by true counts. Cuts are made in float32, the labels' own type, so that a label
    of 0.1 falls on its cut whatever type it arrives in.
    """
    p, y = _checked("sims_metrics", predictions, truths)
    two = _between(p, [0]), _between(y, [0])
    three = [-0.1, 0.1]
    five = [-0.7, -0.1, 0.1, 0.7]
    return {
        "mae": mae(p, y),
        "corr": corr(p, y),
        "acc2": _agreement(*two),
        "f1": _weighted_f1(*two),
        "acc3": _agreement(_between(p, three), _between(y, three)),
        "acc5": _agreement(_between(p, five), _between(y, five)),
    }


def iemocap_metrics(logits, truths) -> dict[str, float]:
    """IEMOCAP as in MulT: accuracy and weighted F1 of each emotion, which is present or absent on its own.

    Args:
        logits: (N, 4, 2) or (N, 8), for neutral, happy, sad and angry the scores of absent and present; the
            greater one decides.
        truths: (N, 4), 1 where the emotion is present, else 0.

    Returns:
        ``acc_neutral``, ``f1_neutral``, ``acc_happy`` and so on; F1 weighted by true counts.
    """
    op, count = "iemocap_metrics", len(EMOTIONS)
    scores, labels = _numbers(op, "logits", logits), _numbers(op, "truths", truths)
    if scores.shape[1:] not in ((2 * count,), (count, 2)) or len(scores) == 0:
        raise UserError(f"{op}: logits must have the shape (N, 4, 2) or (N, 8), N > 0, got {scores.shape}")
    if labels.shape != (len(scores), count):
        raise UserError(f"{op}: truths must have the shape ({len(scores)}, 4), got {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"{op}: truths must be 0 or 1, got {labels[~np.isin(labels, (0, 1))][0]:g}")
    predicted = scores.reshape(-1, count, 2).argmax(axis=2)
    result = {}
    for i, emotion in enumerate(EMOTIONS):
        result[f"acc_{emotion}"] = _agreement(predicted[:, i], labels[:, i])
        result[f"f1_{emotion}"] = _weighted_f1(predicted[:, i], labels[:, i])
    return result


class MetricSet(NamedTuple):
    """The metrics that apply to one kind of labels.

    Attributes:
        measure: (predictions, truths) -> name -> value; NaN where a metric is undefined.
        main: the names for a short table, in its order.
        note: what a reader of that table must know; may be empty.
    """

    measure: Callable[..., dict[str, float]]
    main: tuple[str, ...]
    note: str = ""


def _set(main: str, *metrics: Callable[..., float], note: str = "") -> MetricSet:
    return MetricSet(lambda p, y: _measure("metrics_for", metrics, p, y), tuple(main.split()), note)


_SIGN_NOTE = "Acc2 and F1 leave out samples with truth 0."
_SIMS_NOTE = "Acc2 and F1 take a truth of 0 as negative, as CH-SIMS does."
_BY_RANGE = {
    (-3.0, 3.0): MetricSet(regression_metrics, ("corr", "mae", "acc2", "f1", "acc5", "acc7"), _SIGN_NOTE),
    (-2.0, 2.0): _set("corr mae acc2 f1 acc5", *ERRORS, *SIGNS, acc5, note=_SIGN_NOTE),
    (-1.0, 1.0): MetricSet(sims_metrics, ("corr", "mae", "acc2", "f1", "acc3", "acc5"), _SIMS_NOTE),
}
_SYMMETRIC = _set("corr mae acc2 f1", *ERRORS, *SIGNS, note=_SIGN_NOTE)
_ANY = _set("corr mae ccc", *ERRORS, ccc)
_EMOTIONS = MetricSet(iemocap_metrics, tuple(f"{kind}_{e}" for e in EMOTIONS for kind in ("acc", "f1")))


def metrics_for(label_range: tuple[float, float] | None, task: str = "regression") -> MetricSet:
    """The metrics whose conventions hold for these labels, and no other.

    ===============  =====================================================================================
    labels           metrics
    ===============  =====================================================================================
    [-3, 3]          :func:`regression_metrics`: CMU-MOSI, CMU-MOSEI
    [-2, 2]          the same but for the seven classes, of which two cannot occur: ICT-MMMO
    [-1, 1]          :func:`sims_metrics`: CH-SIMS
    other [-a, a]    ``mae``, ``corr``, and what only needs the sign
    any other range  ``mae``, ``corr``, ``ccc``: no value is neutral and no classes are agreed upon
    ===============  =====================================================================================

    Args:
        label_range: smallest and largest possible label.
        task: ``regression``: one number per sample; ``emotions``: :func:`iemocap_metrics`, whatever the range.

    Raises:
        UserError: another task.
    """
    if task == "emotions":
        return _EMOTIONS
    if task != "regression":
        raise UserError(f"metrics_for: task must be 'regression' or 'emotions', got {task!r}")
    low, high = map(float, label_range)
    return _BY_RANGE.get((low, high)) or (_SYMMETRIC if low == -high else _ANY)


def shown(value: float | None, decimals: int, factor: float = 1.0, *, sign: str = "-") -> str:
    """A value for people, ``-`` where a metric is undefined (NaN, or None as JSON keeps it)."""
    return "-" if value is None or math.isnan(value) else f"{factor * value:{sign}.{decimals}f}"


def weighted_accuracy(predictions, truths) -> float:
    """Weighted accuracy of one MOSEI emotion: (TP * N / P + TN) / (2 N), the mean of both classes' recalls.

    The emotion is present where a value is above 0, in predictions and truths; P and N are the numbers of
    samples with and without it. NaN if either is 0, as one recall is then undefined.
    """
    p, y = _positive(*_checked("weighted_accuracy", predictions, truths))
    if y.all() or not y.any():
        return math.nan
    return float((p[y].mean() + (~p[~y]).mean()) / 2)


def bootstrap_interval(
    metric: Callable[..., float],
    predictions,
    truths,
    *,
    n: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``metric(predictions, truths)``: its lower and upper end.

    Samples are resampled with replacement as independent ones; where several come from one speaker or video,
    the true interval is wider. Resamples in which the metric is NaN are left out; both ends are NaN if it is
    NaN in all of them.

    Args:
        metric: any function of this module that returns one number, or one like them.
        n: number of resamples.
        seed: of the resampling; equal seeds give equal intervals, also for different predictions of one test
            set, which are then resampled alike.
        confidence: coverage, in (0, 1).
    """
    p, y = _checked("bootstrap_interval", predictions, truths)
    n = check_integer("bootstrap_interval", "n", n, 1)
    confidence = check_number("bootstrap_interval", "confidence", confidence, 0, 1, ends="()")
    generator = numpy_generator("bootstrap_interval", seed)
    values = np.empty(n)
    for i in range(n):
        rows = generator.integers(len(p), size=len(p))
        values[i] = metric(p[rows], y[rows])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _measure(op: str, metrics, predictions, truths) -> dict[str, float]:
    p, y = _checked(op, predictions, truths)
    return {metric.__name__: metric(p, y) for metric in metrics}


def _numbers(op: str, argument: str, values) -> np.ndarray:
    """A finite float64 array of any shape."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {argument} must be numbers, got {type(values).__name__}") from None
    wrong = np.size(x) - np.count_nonzero(np.isfinite(x))
    if wrong:
        raise UserError(f"{op}: {argument} must be finite, got {wrong} NaN or infinite of {x.size}")
    return x


def _checked(op: str, predictions, truths) -> tuple[np.ndarray, np.ndarray]:
    """Both flattened, finite, of one size, with one sample at least."""
    p, y = _numbers(op, "predictions", predictions), _numbers(op, "truths", truths)
    for argument, x in (("predictions", p), ("truths", y)):
        if x.size != max(x.shape, default=1):
            raise UserError(f"{op}: {argument} must be one number per sample, got the shape {x.shape}")
    if p.size != y.size:
        raise UserError(f"{op}: predictions and truths must be equally many, got {p.size} and {y.size}")
    if p.size == 0:
        raise UserError(f"{op}: there is no sample to measure on")
    return p.ravel(), y.ravel()


def _standardised(x: np.ndarray) -> np.ndarray:
    """Centred and of norm 1, for ``x`` that is not constant."""
    # Scaled by a power of two, which is exact, lest squares over- or underflow; then shifted before the mean
    # is taken, lest nearly equal numbers lose their differences.
    x = np.ldexp(x, -np.frexp(np.abs(x).max())[1])
    x = x - x[0]
    x = x - x.mean()
    x = x / np.abs(x).max()
    return x / np.linalg.norm(x)


def _rounded_accuracy(p: np.ndarray, y: np.ndarray, limit: int) -> float:
    return _agreement(np.round(np.clip(p, -limit, limit)), np.round(np.clip(y, -limit, limit)))


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.minimum(np.ceil(np.abs(x)), 3)


def _between(x: np.ndarray, cuts: list[float]) -> np.ndarray:
    """Index of the interval of [-1, 1], open on the left and closed on the right."""
    return np.digitize(np.clip(x, -1, 1).astype(np.float32), np.float32(cuts), right=True)


def _without_zeros(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return p[y != 0] > 0, y[y != 0] > 0


def _non_negative(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return p >= 0, y >= 0


def _positive(p: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return p > 0, y > 0


def _agreement(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean(predicted == true)) if len(true) else math.nan


def _weighted_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """sum_c n_c F1_c / n over the true classes c, F1_c = 2 TP / (true count + predicted count)."""
    if len(true) == 0:
        return math.nan
    total = 0.0
    for c, count in zip(*np.unique(true, return_counts=True), strict=True):
        hits = np.sum((predicted == c) & (true == c))
        total += count * 2 * hits / (count + np.sum(predicted == c))
    return float(total / len(true))
