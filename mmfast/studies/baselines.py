"""What a network has to beat: linear models on time means, and constants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mmfast.data import MultimodalDataset
from mmfast.training.splits import Splits

PENALTIES = np.logspace(0, 5, 16)
# Inverse penalties of logistic regression.
STRENGTHS = np.logspace(-4, 0, 5)


def pooled(dataset: MultimodalDataset) -> np.ndarray:
    """Means over real steps, all modalities side by side: (N, sum of F) float64; 0 where a modality is missing."""
    columns = []
    for modality, features in dataset.features.items():
        lengths = dataset.lengths(modality).numpy()
        sums = np.zeros((len(dataset), features))
        for sample, steps in dataset.blocks(modality):
            np.add.at(sums, sample.numpy(), steps.numpy())
        columns.append(sums / np.maximum(lengths, 1)[:, None])
    return np.concatenate(columns, axis=1)


def ridge(splits: Splits) -> np.ndarray:
    """Predictions (N, targets) for the test samples by ridge regression on standardised time means.

    Fitted on training and validation samples; the penalty is chosen among ``PENALTIES`` by leave-one-out within them.
    """
    x, labels = _fitted(splits)
    test, columns = pooled(splits.test), []
    for y in labels.T:
        known = ~np.isnan(y)
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(x[known], y[known])
        columns.append(model.predict(test))
    return np.stack(columns, axis=1)


def constant(splits: Splits) -> np.ndarray:
    """The median label of training and validation samples, the constant of least MAE, for every test sample."""
    _, labels = _fitted(splits)
    return np.tile(np.nanmedian(labels, axis=0), (len(splits.test), 1))


def logistic(splits: Splits) -> np.ndarray:
    """Probabilities (N, classes or labels) for the test samples by logistic regression on standardised time means.

    One for all classes, or one for each label. Of ``STRENGTHS`` the one of least validation loss is taken; fitted are
    then training and validation samples. What has but one value there is predicted as such.
    """
    parts = [pooled(part) for part in (splits.train, splits.valid, splits.test)]
    labels = [_columns(part) for part in (splits.train, splits.valid)]
    columns = []
    for k in range(labels[0].shape[1]):
        train, valid = (y[:, k] for y in labels)
        p = _probabilities(*parts, train, valid)
        columns.append(p if splits.task == "classification" else p[:, [1]])
    return np.concatenate(columns, axis=1)[:, : len(splits.targets)]


def _probabilities(x_train, x_valid, x_test, train, valid) -> np.ndarray:
    """(N, largest class + 1)."""
    known, told = ~np.isnan(train), ~np.isnan(valid)
    x, y = x_train[known], train[known].astype(int)
    x_held, y_held = x_valid[told], valid[told].astype(int)
    classes = max(int(max(y.max(initial=0), y_held.max(initial=0))) + 1, 2)
    if len(np.unique(y)) < 2:
        return np.eye(classes)[np.full(len(x_test), y[0] if len(y) else 0)]

    def model(strength: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))

    def predict(fitted: Pipeline, inputs: np.ndarray) -> np.ndarray:
        p = np.zeros((len(inputs), classes))
        p[:, fitted[-1].classes_] = fitted.predict_proba(inputs)
        return p

    def loss(strength: float) -> float:
        return log_loss(y_held, predict(model(strength).fit(x, y), x_held), labels=range(classes))

    best = min(STRENGTHS, key=loss) if len(y_held) else STRENGTHS[len(STRENGTHS) // 2]
    return predict(model(best).fit(np.concatenate([x, x_held]), np.concatenate([y, y_held])), x_test)


def base_rate(splits: Splits) -> np.ndarray:
    """The share of each class or label among training and validation samples, for every test sample."""
    _, labels = _fitted(splits)
    if splits.task == "classification":
        rates = np.bincount(labels[:, 0].astype(int), minlength=len(splits.targets)) / len(labels)
    else:
        rates = np.nanmean(labels, axis=0)
    return np.tile(rates, (len(splits.test), 1))


def _columns(dataset: MultimodalDataset) -> np.ndarray:
    return dataset.labels.numpy().reshape(len(dataset), -1)


def _fitted(splits: Splits) -> tuple[np.ndarray, np.ndarray]:
    parts = splits.train, splits.valid
    return np.concatenate([pooled(part) for part in parts]), np.concatenate(
        [_columns(part) for part in parts]
    )


Baseline = Callable[[Splits], np.ndarray]
_OF_CLASSES: dict[str, Baseline] = {"logistic": logistic, "base_rate": base_rate}
# task -> row of the table -> its predictions
BASELINES: dict[str, dict[str, Baseline]] = {
    "regression": {"ridge": ridge, "constant": constant},
    "classification": _OF_CLASSES,
    "multilabel": _OF_CLASSES,
}
