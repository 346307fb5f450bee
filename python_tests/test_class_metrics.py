"""Metrics of classes and label sets: scikit-learn's numbers, by hand where conventions differ, and their edges."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from mmfast.class_metrics import classification_metrics, multilabel_metrics
from mmfast.errors import UserError

NAN = math.nan


def one_hot(classes, count):
    return np.eye(count)[np.asarray(classes)]


def test_classes_as_scikit_learn_counts_them():
    rng = np.random.default_rng(0)
    y, scores = rng.choice(5, 300, p=[0.5, 0.2, 0.15, 0.1, 0.05]), rng.random((300, 5))
    scores[np.arange(300), y] += 0.3
    p, found = scores.argmax(1), classification_metrics(scores, y)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, p))
    assert found["accuracy"] == pytest.approx(sk.f1_score(y, p, average="micro"))
    assert found["ua"] == pytest.approx(sk.balanced_accuracy_score(y, p))
    for average in ("macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(sk.f1_score(y, p, average=average))
    for i, recall in enumerate(sk.recall_score(y, p, average=None)):
        assert found[f"recall_{i}"] == pytest.approx(recall)


def test_ua_and_wa_of_the_golden_example():
    truths, predictions = [0, 0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 0, 1, 2, 2, 2, 3, 3]
    found = classification_metrics(one_hot(predictions, 4), truths)
    assert 100 * found["ua"] == pytest.approx(72.9167, abs=1e-4) and 100 * found["accuracy"] == pytest.approx(
        70
    )
    constant = classification_metrics(one_hot([0] * 10, 4), truths)
    assert constant["ua"] == 0.25 and constant["accuracy"] == pytest.approx(0.4)


@pytest.mark.parametrize("predictions", [[0, 1, 1, 0], [0, 1, 2, 0]], ids=["neither", "predicted"])
def test_a_class_absent_from_the_truths(predictions):
    truths = [0, 0, 1, 0]
    found = classification_metrics(one_hot(predictions, 3), truths, ["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["ua"] == pytest.approx(sk.balanced_accuracy_score(truths, predictions))
    # Scikit-learn, too, takes the mean over the classes that are true or predicted.
    assert found["f1_macro"] == pytest.approx(sk.f1_score(truths, predictions, average="macro"))
    assert found["f1_weighted"] == pytest.approx(sk.f1_score(truths, predictions, average="weighted"))
    assert math.isnan(found["recall_c"])


def label_sets():
    """Correlated labels with empty sets, one that nobody has, one never predicted, one that everybody has."""
    rng = np.random.default_rng(1)
    y = (rng.random((200, 6)) < [0.5, 0.25, 0.1, 0, 0.3, 1]).astype(float)
    y[:60, :5] = 0
    p = np.clip(0.6 * rng.random((200, 6)) + 0.3 * y, 0, 1)
    p[:, 4] *= 0.4
    return y, p


@pytest.mark.parametrize("threshold", [0.5, 0.35])
def test_label_sets_as_scikit_learn_counts_them(threshold):
    y, p = label_sets()
    y, p = y[:, :5], p[:, :5]
    predicted = (p > threshold).astype(int)
    empty = (y.sum(1) == 0) & (predicted.sum(1) == 0)
    assert empty.any() and ((y.sum(1) == 0) & ~empty).any()
    found = multilabel_metrics(p, y, threshold=threshold)
    assert found["jaccard"] == pytest.approx(
        sk.jaccard_score(y, predicted, average="samples", zero_division=0)
    )
    assert found["jaccard_empty1"] == pytest.approx(found["jaccard"] + empty.mean())
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(y, predicted))
    for average in ("micro", "macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(
            sk.f1_score(y, predicted, average=average, zero_division=0)
        )
    assert found["precision_micro"] == pytest.approx(sk.precision_score(y, predicted, average="micro"))
    assert found["recall_micro"] == pytest.approx(sk.recall_score(y, predicted, average="micro"))
    for k, f1 in enumerate(sk.f1_score(y, predicted, average=None, zero_division=0)):
        assert found[f"f1_{k}"] == pytest.approx(f1)
    both = [k for k in range(5) if len(set(y[:, k])) == 2]
    areas = {k: sk.roc_auc_score(y[:, k], p[:, k]) for k in both}
    assert both == [0, 1, 2, 4] and found["auc"] == pytest.approx(np.mean(list(areas.values())), abs=1e-6)
    for k in range(5):
        area, accuracy = (
            areas.get(k, NAN),
            sk.balanced_accuracy_score(y[:, k], predicted[:, k]) if k in both else NAN,
        )
        assert found[f"auc_{k}"] == pytest.approx(area, nan_ok=True, abs=1e-6)
        assert found[f"wa_{k}"] == pytest.approx(accuracy, nan_ok=True)


def test_cells_that_are_not_known_take_no_part():
    y, p = label_sets()
    holes = np.random.default_rng(2).random(y.shape) < 0.3
    y[holes] = NAN
    found = multilabel_metrics(p, y)
    other = multilabel_metrics(np.where(holes, 1 - p, p), y)
    assert found == pytest.approx(other, nan_ok=True)
    known = ~holes
    predicted = (p > 0.5) & known
    assert found["f1_micro"] == pytest.approx(sk.f1_score(y[known], predicted[known]))
    k = known[:, 0]
    assert found["auc_0"] == pytest.approx(sk.roc_auc_score(y[k, 0], p[k, 0]), abs=1e-6)
    assert found["f1_0"] == pytest.approx(sk.f1_score(y[k, 0], predicted[k, 0]))


def test_all_sets_empty_on_both_sides():
    found = multilabel_metrics(np.full((3, 2), 0.1), np.zeros((3, 2)), ["x", "y"])
    assert found["jaccard"] == 0 and found["jaccard_empty1"] == 1 and found["exact_match"] == 1
    assert found["f1_micro"] == found["f1_macro"] == 0
    assert math.isnan(found["auc"]) and math.isnan(found["auc_x"]) and math.isnan(found["wa_y"])


def test_one_label_alone():
    assert multilabel_metrics([[0.9], [0.2], [0.7]], [[1], [0], [0]])["f1_macro"] == pytest.approx(2 / 3)


def test_probabilities_of_0_and_1_are_no_logits():
    y = np.array([[1, 0], [0, 1.0]])
    found = multilabel_metrics(y, y)
    assert found["jaccard"] == found["f1_macro"] == found["auc"] == 1


def test_no_warning_reaches_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multilabel_metrics(*label_sets()[::-1])
        classification_metrics(one_hot([0, 1], 3), [0, 0])


@pytest.mark.parametrize(
    ("function", "p", "y", "sentence"),
    [
        (classification_metrics, [[0.1, 0.9]], [2], r"truths must be classes in \[0, 1\], got 2"),
        (classification_metrics, [[0.1, 0.9]], [0.5], "got 0.5"),
        (classification_metrics, [[0.1, 0.9]], [0, 1], r"truths must be \(1,\)"),
        (classification_metrics, [[0.1, NAN]], [0], "must be finite, got 1"),
        (multilabel_metrics, [[0.1, 0.9]], [[0, 2]], "truths must be 0 or 1, or NaN for unknown, got 2"),
        (multilabel_metrics, [[0.1, 1.9]], [[0, 1]], "probabilities must lie"),
        (multilabel_metrics, [[0.1, 0.9]], [0, 1], r"truths must be \(1, 2\)"),
        (multilabel_metrics, np.empty((0, 2)), np.empty((0, 2)), "N > 0"),
    ],
)
def test_refusals(function, p, y, sentence):
    with pytest.raises(UserError, match=sentence):
        function(p, y)
