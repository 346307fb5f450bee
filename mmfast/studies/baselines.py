"""What a network has to beat: ridge regression on time means, and a constant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmfast.data import MultimodalDataset
from mmfast.training.splits import Splits

PENALTIES = np.logspace(0, 5, 16)


def pooled(dataset: MultimodalDataset) -> np.ndarray:
    """Means over real steps, all modalities side by side: (N, sum of F) float64; 0 where a modality is missing."""
    columns = []
    for modality, features in dataset.features.items():
        lengths = dataset.lengths(modality).numpy()
        sums = np.zeros((len(dataset), features))
        np.add.at(sums, np.repeat(np.arange(len(dataset)), lengths), dataset.flat(modality).numpy())
        columns.append(sums / np.maximum(lengths, 1)[:, None])
    return np.concatenate(columns, axis=1)


def ridge(splits: Splits) -> np.ndarray:
    """Predictions (N,) for the test samples by ridge regression on standardised time means.

    Fitted on training and validation samples; the penalty is chosen among ``PENALTIES`` by leave-one-out within them.
    """
    fitted = [splits.train, splits.valid]
    x = np.concatenate([pooled(dataset) for dataset in fitted])
    y = np.concatenate([dataset.labels.numpy() for dataset in fitted])
    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(x, y)
    return model.predict(pooled(splits.test))


def constant(splits: Splits) -> np.ndarray:
    """The median label of training and validation samples, the constant of least MAE, for every test sample."""
    labels = np.concatenate([splits.train.labels.numpy(), splits.valid.labels.numpy()])
    return np.full(len(splits.test), np.median(labels))


BASELINES: dict[str, Callable[[Splits], np.ndarray]] = {"ridge": ridge, "constant": constant}
