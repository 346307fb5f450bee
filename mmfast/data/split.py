"""Fewer labels, random splits, and folds for cross-validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mmfast.checks import numpy_generator
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.targets import presence, strata
from mmfast.errors import UserError
from mmfast.shares import are_shares


def label_share(dataset: MultimodalDataset, share: float, seed: int, least: int = 0) -> MultimodalDataset:
    """Keep the labels of round(share * n) of the n labelled samples, of `least` if there are; others become NaN.

    Nested: with one seed, the samples of a smaller share are among those of a larger one. Which ones follows the ids,
    not the order of the samples. Classes keep their shares, and so do sets of labels, give or take a sample; the
    first to be kept are one of each class or with each label, the most frequent ones before others.

    Raises:
        UserError: share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"label_share: share must lie in [0, 1], got {share}")
    by_id = np.argsort(dataset.ids.numpy())
    labelled = by_id[dataset.labelled().numpy()[by_id]]
    kept = max(round(share * len(labelled)), least)
    generator = numpy_generator("label_share", seed)
    order = generator.permutation(labelled)
    if (stratum := strata(dataset)) is not None:
        order = order[_spread(stratum[order], generator)]
        order = order[_one_of_each_first(presence(dataset)[order])]
    mask = torch.zeros(len(dataset), dtype=torch.bool, device="cpu")
    mask[order[:kept]] = True
    return dataset.keep_labels(mask)


def _one_of_each_first(there: np.ndarray) -> np.ndarray:
    """(N,) positions: the first True of each column of (N, C), the fullest columns before others; then the rest."""
    columns = np.argsort(-there.sum(0), kind="stable")
    first = list(dict.fromkeys(int(there[:, c].argmax()) for c in columns if there[:, c].any()))
    return np.concatenate([first, np.delete(np.arange(len(there)), first)]).astype(np.int64)


def _spread(stratum: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(N,) positions such that each stretch has the strata in their shares, give or take one."""
    _, number, counts = np.unique(stratum, return_inverse=True, return_counts=True)
    rank = np.empty(len(stratum), dtype=np.int64)
    order = np.argsort(number, kind="stable")
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = generator.random(len(counts))
    return np.argsort((rank + offset[number]) / counts[number], kind="stable")


def random_split(data: MultimodalData, shares: Sequence[float], seed: int = 0) -> MultimodalData:
    """Divide the samples of one split into train, valid and test at random.

    Divided are the labelled samples of train (of test where train is empty, as `save` writes a lone data set);
    samples without a label belong to train. A share of 0 leaves its split as it is: (0.9, 0.1, 0)
    takes validation samples from train and keeps the test split. Every other part gets round(share * n) of n
    labelled samples and at least one.

    Samples of one group stay together, and so do samples of equal contents in data without groups: parts are then
    as large as the last group makes them, and unlabelled samples go where their group goes. Which samples go where
    is a function of `seed` and of the names of the groups or the contents, not of order, ids or file.

    Stratified where the labels are classes or sets of labels: every part gets them (of a group the most frequent) in
    their shares, as far as they are frequent enough.

    Args:
        shares: of train, valid and test, adding up to 1.

    Raises:
        UserError: bad shares, a split that holds samples already, too few labelled samples, or data that are
            to be cross-validated.
    """
    if not are_shares(shares):
        raise UserError(
            "random_split: shares must be three numbers for train, valid and test that add up to 1, the first "
            f"above 0 and below 1, got {shares}"
        )
    if data.cross_validation is not None:
        raise UserError(f"random_split: data {data.name} ask for cross-validation, which splits them already")
    source = "train" if len(data.train) else "test"
    for name, share in zip(("train", "valid", "test"), shares, strict=True):
        if share and name not in ("train", source) and len(getattr(data, name)):
            raise UserError(
                f"random_split: data {data.name} have a {name} split of {len(getattr(data, name))} samples "
                f"already; its share must be 0, got {share:g}"
            )
    whole: MultimodalDataset = getattr(data, source)
    labelled = whole.labelled().numpy()
    n = int(labelled.sum())
    valid, test = (max(round(share * n), 1) if share else 0 for share in shares[1:])
    if valid + test >= n:
        raise UserError(
            f"random_split: {n} labelled samples are too few for a train, valid and test split by shares {shares}"
        )
    units, unit = np.unique(_keys(whole), return_inverse=True)
    sizes = np.bincount(unit[labelled], minlength=len(units))
    # Parts are filled one after another by units in random order: test, valid, and what is left is train.
    generator = numpy_generator("random_split", seed)
    order = generator.permutation(len(units))
    if (stratum := strata(whole)) is not None:
        order = order[_spread(_most_frequent(stratum, unit)[order], generator)]
    part = np.empty(len(units), dtype=np.int64)
    part[order] = np.searchsorted([test, test + valid], np.cumsum(sizes[order]) - sizes[order], side="right")
    part[sizes == 0] = 2
    new = {
        name: whole.subset(part[unit] == i)
        for i, (name, share) in enumerate(zip(("test", "valid", "train"), shares[::-1], strict=True))
        if share or name == source
    }
    for name, share in zip(("train", "valid", "test"), shares, strict=True):
        if share and len(new[name]) == 0:
            raise UserError(
                f"random_split: the {n} labelled samples are of only {np.count_nonzero(sizes)} "
                f"{'groups' if whole.groups else 'contents'}, nothing is left for {name}"
            )
    if data.unlabelled is not None:
        # As far as the pool was train, it is what is left of train.
        pool = data.unlabelled
        held_out = torch.isin(pool.ids, whole.ids[part[unit] < 2]).numpy()
        if bool(pool.groups) == bool(whole.groups):
            held_out |= np.isin(_keys(pool), units[part < 2])
        new["unlabelled"] = new["train"] if pool is data.train else pool.subset(~held_out)
    return replace(data, **new)


def _most_frequent(stratum: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(units,) the stratum that most labelled samples of each unit have, -1 without such."""
    table = np.zeros((unit.max() + 1, max(stratum.max(), 0) + 1), dtype=np.int64)
    np.add.at(table, (unit[stratum >= 0], stratum[stratum >= 0]), 1)
    return np.where(table.any(1), table.argmax(1), -1)


def _keys(dataset: MultimodalDataset) -> np.ndarray:
    """(N,) what samples that must stay together have in common."""
    return np.array(_names_of_groups(dataset)) if dataset.groups else dataset.fingerprints().numpy()


def _names_of_groups(dataset: MultimodalDataset) -> list[str]:
    """(N,) names of the groups of the first kind."""
    return next(iter(dataset.groups.values()))


def _order(dataset: MultimodalDataset, unit: np.ndarray) -> np.ndarray:
    """(units,) numbers by which neighbours are alike in their labels."""
    if (stratum := strata(dataset)) is not None:
        return _most_frequent(stratum, unit)
    labels = dataset.labels.numpy()
    if labels.ndim == 2:
        known = labels[~np.isnan(labels).any(1)]
        spread = known.std(0) if len(known) else np.ones(labels.shape[1])
        labels = np.nansum((labels - np.nanmean(labels, 0)) / np.where(spread > 0, spread, 1), 1)
    return np.bincount(unit, labels) / np.bincount(unit)


class Fold(NamedTuple):
    train: MultimodalDataset
    valid: MultimodalDataset
    test: MultimodalDataset


def folds(
    dataset: MultimodalDataset, n_folds: int = 5, seed: int = 0, valid_share: float = 0.2
) -> Iterator[Fold]:
    """k-fold cross-validation, stratified by the quantile of the label, by the class, or by the set of labels.

    Where the data have groups, read "group" for "sample" and its mean label (its most frequent class or set) for the
    label: no group is divided. Several numbers are stratified by the sum of their standardised values.
    Every sample is tested in exactly one fold. `valid` is `valid_share` of what remains (at least one), for
    early stopping and the choice of settings. Test and valid sets follow the label distribution: of every
    `n_folds` neighbours in the order of labels each fold tests one, and valid samples are spread evenly over
    that order. Equal labels are ordered at random by ids, so that the folds do not follow the order of the samples.

    Raises:
        UserError: samples without a label, or too few samples for n_folds folds with three parts.
    """
    missing = int((~dataset.labelled()).sum())
    if missing:
        raise UserError(f"folds: every sample must have a label, {missing} of {len(dataset)} have none")
    kind, keys = ("groups", _names_of_groups(dataset)) if dataset.groups else ("samples", dataset.ids)
    units, unit = np.unique(np.asarray(keys), return_inverse=True)
    n = len(units)
    if not 2 <= n_folds <= n or n - -(-n // n_folds) < 2:
        raise UserError(
            f"folds: n_folds must lie in [2, {kind} = {n}] and leave two for train and valid, got {n_folds}"
        )
    if not 0 < valid_share < 1:
        raise UserError(f"folds: valid_share must lie in (0, 1), got {valid_share}")
    return _folds(dataset, unit, n_folds, numpy_generator("folds", seed), valid_share)


def _folds(dataset, unit, n_folds, rng, valid_share) -> Iterator[Fold]:
    """`unit` (N,) numbers what is not to be divided, groups or samples, by names or ids."""
    sizes = np.bincount(unit)
    n, labels = len(sizes), _order(dataset, unit)
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
        yield Fold(*(dataset.subset(part[unit]) for part in (~valid & ~test, valid, test)))
