"""Metrics of classes, of which a sample has one, and of sets of labels, which may be empty.

Predictions are probabilities, truths are classes or 0 and 1, of all samples of the test set at once. Results are
Python floats, NaN where a metric is undefined. Counting is torchmetrics' where it has the metric, which needs
mmfast[train].

Sources: the evaluation code of TAILOR and CDaT (label sets), CMU's Multimodal SDK (weighted accuracy of MOSEI's
emotions), and the usage of speech emotion recognition (UA, WA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmfast.errors import UserError


def classification_metrics(probabilities, truths, names: Sequence[str] | None = None) -> dict[str, float]:
    """Metrics of classes.

    ================  ==============================================================================================
    ``accuracy``      share of right samples: the field's WA (each class weighs by its size), and the same number as
                      the micro average of precision, recall and F1
    ``ua``            mean of the classes' recalls (unweighted accuracy, UAR, macro recall); a class without samples
                      has no recall and is left out, as in scikit-learn's balanced accuracy
    ``f1_macro``      mean of the classes' F1; a class that is neither true nor predicted is left out
    ``f1_weighted``   the same mean, weighted by true counts
    ``recall_NAME``   of each class, NaN if it has no samples
    ================  ==============================================================================================

    Args:
        probabilities: (N, C), or other scores; the greatest is the prediction, the first of equals.
        truths: (N,) indices of classes.
        names: of the classes; default 0, 1, ...

    Raises:
        UserError: shapes that do not belong together, classes that are none, scores that are not finite.
    """
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_recall

    op = "classification_metrics"
    scores, y = _tensors(op, probabilities, truths)
    classes = scores.shape[1]
    if y.shape != scores.shape[:1]:
        raise UserError(f"{op}: truths must be ({len(scores)},) as probabilities, got {tuple(y.shape)}")
    wrong = (y != y.round()) | (y < 0) | (y >= classes) | y.isnan()
    if wrong.any():
        raise UserError(f"{op}: truths must be classes in [0, {classes - 1}], got {float(y[wrong][0]):g}")
    y, predicted = y.long(), scores.argmax(1)
    names = _names(op, names, classes)
    if classes == 1:
        return {"accuracy": 1.0, "ua": 1.0, "f1_macro": 1.0, "f1_weighted": 1.0, f"recall_{names[0]}": 1.0}
    recalls = multiclass_recall(predicted, y, classes, average=None)
    there = torch.bincount(y, minlength=classes) > 0
    return {
        "accuracy": float((predicted == y).double().mean()),
        "ua": float(recalls[there].mean()),
        **{f"f1_{k}": float(multiclass_f1_score(predicted, y, classes, k)) for k in ("macro", "weighted")},
        **{
            f"recall_{name}": float(recall) if known else math.nan
            for name, recall, known in zip(names, recalls, there, strict=True)
        },
    }


def multilabel_metrics(
    probabilities, truths, names: Sequence[str] | None = None, threshold: float = 0.5
) -> dict[str, float]:
    """Metrics of sets of labels.

    =====================  =========================================================================================
    ``jaccard``            mean over samples of |true and predicted| / max(1, |true or predicted|): the "accuracy" of
                           TAILOR and CDaT; a sample on which both sets are empty counts 0
    ``jaccard_empty1``     the same, where both sets are empty counts 1
    ``exact_match``        share of samples whose sets are equal
    ``f1_micro``           F1 of all cells together, ``precision_micro`` and ``recall_micro`` alike
    ``f1_macro``           mean of the labels' F1; 0 for a label that is neither true nor predicted
    ``f1_weighted``        the same mean, weighted by true counts
    ``auc``                mean area under the ROC curve, over the labels that some samples have and others lack
    ``f1_NAME``            of each label
    ``wa_NAME``            weighted accuracy of MOSEI: mean of the recalls of presence and absence, NaN without both
    ``auc_NAME``           NaN without both
    =====================  =========================================================================================

    0 / 0 is 0 in precision, recall and F1, as in scikit-learn.

    Args:
        probabilities: (N, K); a label is predicted where its probability is above ``threshold``.
        truths: (N, K) of 0 and 1, NaN for cells that are not known, which take no part.
        names: of the labels; default 0, 1, ...

    Raises:
        UserError: shapes that do not belong together, truths that are neither 0 nor 1 nor NaN, probabilities that are
            none.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_f1_score,
        binary_precision,
        binary_recall,
    )

    op = "multilabel_metrics"
    p, y = _tensors(op, probabilities, truths)
    if y.shape != p.shape:
        raise UserError(f"{op}: truths must be {tuple(p.shape)} as probabilities, got {tuple(y.shape)}")
    if ((p < 0) | (p > 1)).any():
        raise UserError(f"{op}: probabilities must lie in [0, 1]")
    known = ~y.isnan()
    wrong = known & (y != 0) & (y != 1)
    if wrong.any():
        raise UserError(f"{op}: truths must be 0 or 1, or NaN for unknown, got {float(y[wrong][0]):g}")
    labels = p.shape[1]
    names = _names(op, names, labels)
    predicted, true = (p > threshold) & known, (y == 1) & known
    # All cells together are one binary problem, as each label is.
    cells = predicted[known].long(), true[known].long()
    positive, negative = true.sum(0), (known & ~true).sum(0)
    both = (positive > 0) & (negative > 0)
    like = {"dtype": p.dtype, "device": "cpu"}
    f1, auc = torch.zeros(labels, **like), torch.full((labels,), math.nan, **like)
    for k, here in enumerate(known.T):
        if here.any():
            f1[k] = binary_f1_score(predicted[here, k].long(), true[here, k].long())
        if both[k]:
            auc[k] = binary_auroc(p[here, k], true[here, k].long())
    hits, misses = (predicted & true).sum(0), (predicted & ~true).sum(0)
    accuracy = (hits / positive + (negative - misses) / negative) / 2
    common, either = (predicted & true).sum(1).double(), (predicted | true).sum(1)
    jaccard = common / either.clamp_min(1)
    return {
        "jaccard": float(jaccard.mean()),
        "jaccard_empty1": float(torch.where(either == 0, 1.0, jaccard).mean()),
        "exact_match": float((predicted == true).all(1).double().mean()),
        "f1_micro": float(binary_f1_score(*cells)),
        "f1_macro": float(f1.mean()),
        "f1_weighted": float((f1 * positive).sum() / positive.sum().clamp_min(1)),
        "precision_micro": float(binary_precision(*cells)),
        "recall_micro": float(binary_recall(*cells)),
        "auc": float(auc[both].mean()),
        **{
            f"{metric}_{name}": float(value)
            for metric, values in (("f1", f1), ("wa", accuracy), ("auc", auc))
            for name, value in zip(names, values, strict=True)
        },
    }


def _tensors(op: str, probabilities, truths) -> tuple[Tensor, Tensor]:
    p, y = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (probabilities, truths))
    if p.ndim != 2 or 0 in p.shape:
        raise UserError(f"{op}: probabilities must be (N, columns), N > 0, got {tuple(p.shape)}")
    if not p.isfinite().all():
        raise UserError(f"{op}: probabilities must be finite, got {int((~p.isfinite()).sum())} that are not")
    return p, y


def _names(op: str, names: Sequence[str] | None, size: int) -> Sequence[str]:
    names = [str(i) for i in range(size)] if names is None else names
    if len(names) != size:
        raise UserError(f"{op}: names must be {size}, one a column of probabilities, got {len(names)}")
    return names
