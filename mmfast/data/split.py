"""Fewer labels, and folds for cross-validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError


def label_share(dataset: MultimodalDataset, share: float, seed: int) -> MultimodalDataset:
    """Keep the labels of round(share * n) of the n labelled samples; the others become NaN.

    Nested: with one seed, the samples of a smaller share are among those of a larger one.

    Raises:
        UserError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"label_share: share must lie in [0, 1], got {share}")
    labelled = torch.nonzero(~torch.isnan(dataset.labels)).flatten().numpy()
    chosen = np.random.default_rng(seed).permutation(labelled)[: round(share * len(labelled))]
    labels = torch.full_like(dataset.labels, float("nan"))
    labels[chosen] = dataset.labels[chosen]
    return dataset.with_labels(labels)


class Fold(NamedTuple):
    train: MultimodalDataset
    valid: MultimodalDataset
    test: MultimodalDataset


def folds(
    dataset: MultimodalDataset, n_folds: int = 5, seed: int = 0, valid_share: float = 0.2
) -> Iterator[Fold]:
    """k-fold cross-validation, stratified by the quantile of the label.

    Every sample is tested in exactly one fold. `valid` is `valid_share` of what remains (at least one), for
    early stopping and the choice of settings. Test and valid sets follow the label distribution: of every
    `n_folds` neighbours in the order of labels each fold tests one, and valid samples are spread evenly over
    that order.

    Raises:
        UserError: samples without a label, or too few samples for n_folds folds with three parts.
    """
    n = len(dataset)
    missing = int(torch.isnan(dataset.labels).sum())
    if missing:
        raise UserError(f"folds: every sample must have a label, {missing} of {n} have none")
    if not 2 <= n_folds <= n or n - -(-n // n_folds) < 2:
        raise UserError(
            f"folds: n_folds must lie in [2, samples = {n}] and leave two for train and valid, got {n_folds}"
        )
    if not 0 < valid_share < 1:
        raise UserError(f"folds: valid_share must lie in (0, 1), got {valid_share}")
    return _folds(dataset, n_folds, np.random.default_rng(seed), valid_share)


def _folds(dataset, n_folds, rng, valid_share) -> Iterator[Fold]:
    n, labels = len(dataset), dataset.labels.numpy()
    # Equal labels in random order.
    by_label = np.lexsort((rng.random(n), labels))
    fold = np.empty(n, dtype=np.int64)
    for start in range(0, n, n_folds):
        neighbours = by_label[start : start + n_folds]
        fold[neighbours] = rng.permutation(n_folds)[: len(neighbours)]
    for k in range(n_folds):
        rest = by_label[fold[by_label] != k]
        count = min(max(round(valid_share * len(rest)), 1), len(rest) - 1)
        chosen = ((np.arange(count) + rng.random()) * len(rest) / count).astype(np.int64)
        valid = np.zeros(n, dtype=bool)
        valid[rest[chosen]] = True
        test = fold == k
        yield Fold(*(dataset.subset(np.flatnonzero(part)) for part in (~valid & ~test, valid, test)))
