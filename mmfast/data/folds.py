"""Folds for cross-validation: k of them, or one for each speaker, session or other group that is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmfast.checks import numpy_generator
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.shares import TEST, TRAIN, VALID
from mmfast.data.targets import strata
from mmfast.data.units import TOGETHER, units, values_of
from mmfast.errors import UserError
from mmfast.split_spec import KFold, LeaveOut, Protocol

# Whose other member validates where one is left out, and in what they must be: the two of a dialogue.
WITHIN = {"speaker": "session"}


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
    if any(name in dataset.groups for name in TOGETHER):
        kind, unit = "groups", units(dataset)
    else:
        kind, unit = "samples", np.unique(dataset.ids.numpy(), return_inverse=True)[1].reshape(-1)
    parts = _folds("folds", dataset, unit, kind, n_folds, seed, valid_share)
    return (Fold(*(dataset.subset(part == i) for i in (TRAIN, VALID, TEST))) for part in parts)


def _folds(
    op: str,
    dataset: MultimodalDataset,
    unit: np.ndarray,
    kind: str,
    n_folds: int,
    seed: int,
    valid_share: float,
) -> Iterator[np.ndarray]:
    """Of each fold the part (N,) of each sample; `unit` (N,) numbers what is not to be divided."""
    n = int(unit.max(initial=-1)) + 1
    if not 2 <= n_folds <= n or n - -(-n // n_folds) < 2:
        raise UserError(
            f"{op}: n_folds must lie in [2, {kind} = {n}] and leave two for train and valid, got {n_folds}"
        )
    if not 0 < valid_share < 1:
        raise UserError(f"{op}: valid_share must lie in (0, 1), got {valid_share}")
    return _drawn(_order(dataset, unit), unit, n_folds, numpy_generator(op, seed), valid_share)


def _drawn(
    labels: np.ndarray, unit: np.ndarray, n_folds: int, rng: np.random.Generator, valid_share: float
) -> Iterator[np.ndarray]:
    n = len(labels)
    by_label = np.lexsort((rng.random(n), labels))
    fold = np.empty(n, dtype=np.int64)
    for start in range(0, n, n_folds):
        neighbours = by_label[start : start + n_folds]
        fold[neighbours] = rng.permutation(n_folds)[: len(neighbours)]
    for k in range(n_folds):
        rest = by_label[fold[by_label] != k]
        count = min(max(round(valid_share * len(rest)), 1), len(rest) - 1)
        chosen = ((np.arange(count) + rng.random()) * len(rest) / count).astype(np.int64)
        part = np.where(fold == k, TEST, TRAIN)
        part[rest[chosen]] = VALID
        yield part[unit]


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


def _most_frequent(stratum: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(units,) the stratum that most labelled samples of each unit have, -1 without such."""
    table = np.zeros((unit.max() + 1, max(stratum.max(), 0) + 1), dtype=np.int64)
    np.add.at(table, (unit[stratum >= 0], stratum[stratum >= 0]), 1)
    return np.where(table.any(1), table.argmax(1), -1)


def of_protocol(dataset: MultimodalDataset, protocol: Protocol) -> list[KFold | LeaveOut]:
    """The folds of a protocol on these samples, in order: k, or one for each value of the group.

    Raises:
        UserError: no such group, or samples that cannot be divided so.
    """
    spec = protocol.spec
    if isinstance(spec, KFold):
        return [KFold(spec.folds, fold) for fold in range(spec.folds)]
    values = values_of(dataset, spec.group)
    known = dataset.labelled().tolist()
    tested = {value for value, labelled in zip(values, known, strict=True) if labelled and value}
    return [LeaveOut(spec.group, value) for value in in_order(tested)]


def part_of_fold(
    dataset: MultimodalDataset, spec: KFold | LeaveOut, seed: int = 0, group: str | None = None
) -> np.ndarray:
    """(N,) the part of each sample, TRAIN, VALID or TEST, in one fold.

    Samples without a label are TRAIN unless what they belong to is not.

    Raises:
        UserError: no such group or value, or too few samples, units or values.
    """
    if isinstance(spec, LeaveOut):
        return _left_out(dataset, spec)
    unit = units(dataset, group)
    labelled = dataset.labelled().numpy()
    if not labelled.any():
        raise UserError("split: there must be labelled samples, by which folds are tested, got none")
    number = np.unique(unit[labelled], return_inverse=True)[1]
    known = dataset.subset(labelled)
    parts = _folds("split", known, number.reshape(-1), "samples or groups", spec.folds, seed, valid_share=0.2)
    drawn = next(part for fold, part in enumerate(parts) if fold == spec.fold)
    of_unit = np.full(int(unit.max()) + 1, TRAIN)
    of_unit[unit[labelled]] = drawn
    return of_unit[unit]


def _left_out(dataset: MultimodalDataset, spec: LeaveOut) -> np.ndarray:
    values = np.asarray(values_of(dataset, spec.group), dtype=str)
    there = in_order(set(values.tolist()) - {""})
    if spec.value not in there:
        raise UserError(f"split: {spec.group} must be one of {_few(there)}, got {spec.value!r}")
    test = values == spec.value
    if (partners := _partners(dataset, spec.group)) is not None:
        sessions = np.asarray(partners, dtype=str)
        valid = (sessions == sessions[test][0]) & ~test
    elif len(there) < 3:
        raise UserError(
            f"split: to leave one {spec.group} out for testing and the next for validation there must be three at "
            f"least, got {_few(there)}"
        )
    else:
        valid = values == there[(there.index(spec.value) + 1) % len(there)]
    return np.where(test, TEST, np.where(valid, VALID, TRAIN))


def described(dataset: MultimodalDataset, protocol: Protocol) -> str:
    """The protocol in words: how many folds, what is tested and what validates."""
    count, spec = len(of_protocol(dataset, protocol)), protocol.spec
    if isinstance(spec, KFold):
        return f"{count}-fold cross-validation"
    if _partners(dataset, spec.group) is None:
        return f"{count} folds, leave one {spec.group} out, the next one validates"
    within = WITHIN[spec.group]
    return (
        f"{count} folds, leave one {spec.group} out, the others of its {within} validate; folds of one {within} have "
        "the same training samples"
    )


def _partners(dataset: MultimodalDataset, group: str) -> Sequence[str] | None:
    """The N sessions, if each speaker is in one of them, with another speaker, and there are other sessions."""
    whole = WITHIN.get(group)
    if whole not in dataset.groups:
        return None
    sessions = dataset.groups[whole]
    pairs = {pair for pair in zip(sessions, values_of(dataset, group), strict=True)}
    if any("" in pair for pair in pairs) or len({speaker for _, speaker in pairs}) < len(pairs):
        return None
    speakers = [session for session, _ in pairs]
    found = set(speakers)
    return sessions if len(found) > 1 and all(speakers.count(s) > 1 for s in found) else None


def held_together(group: str) -> tuple[str, ...]:
    """The groups that a fold which leaves one of `group` out keeps on one side."""
    return (group, WITHIN[group]) if group in WITHIN else (group,)


def in_order(values) -> list[str]:
    """Sorted, numbers in names by their size."""
    return sorted(
        values, key=lambda value: [int(p) if p.isdecimal() else p for p in re.split("([0-9]+)", value)]
    )


def _few(values: Sequence[str], limit: int = 12) -> str:
    return ", ".join(values[:limit]) + (", ..." if len(values) > limit else "")
