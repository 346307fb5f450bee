"""What must stay together when data are divided: samples that share a speaker, a video, or all their contents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

# Groups of which none is ever on two sides, unless another is asked for.
TOGETHER = ("video", "speaker", "group")


def units(dataset: MultimodalDataset, group: str | None = None) -> np.ndarray:
    """(N,) int64 numbers of what is not to be divided.

    Samples are together that share a value of one of the groups `TOGETHER`, or have equal contents, also by way of
    others. With `group` they are those that share its value, and no others. The empty value is nobody's.

    Numbered by the names of the samples, or by their contents where they have no names but their ids, so that they
    depend neither on the order of the samples nor on their file.

    Raises:
        UserError: no such group.
    """
    if group is not None:
        columns = [_codes(values_of(dataset, group))]
    else:
        columns = [_codes(dataset.groups[name]) for name in TOGETHER if name in dataset.groups]
        columns.append(_contents(dataset))
    unit = _connected(columns, len(dataset))
    first = np.full(len(dataset), len(dataset))
    np.minimum.at(first, unit, _ranks(dataset))
    return np.unique(first[unit], return_inverse=True)[1].reshape(-1)


def values_of(dataset: MultimodalDataset, group: str) -> list[str]:
    """The N values of a group.

    Raises:
        UserError: no such group; lists those that there are.
    """
    if group not in dataset.groups:
        known = (
            f"one of the groups {', '.join(dataset.groups)}"
            if dataset.groups
            else "a group, and there are none"
        )
        raise UserError(f"split: {group!r} must be {known} of the data")
    return dataset.groups[group]


def related(
    dataset: MultimodalDataset, others: Iterable[MultimodalDataset], groups: Sequence[str] = TOGETHER
) -> np.ndarray:
    """(N,) bool: which samples are among the others, or share contents or a value of one of the groups with them."""
    found = np.zeros(len(dataset), dtype=bool)
    for other in others:
        found |= (torch.isin(dataset.ids, other.ids) | dataset.among(other.fingerprints())).numpy()
        for name in groups:
            if name in dataset.groups and name in other.groups:
                held = set(other.groups[name]) - {""}
                found |= np.fromiter((value in held for value in dataset.groups[name]), bool, len(dataset))
    return found


def shared(one: MultimodalDataset, other: MultimodalDataset, group: str) -> set[str]:
    """The values of a group that both data sets have."""
    return (set(one.groups.get(group, ())) & set(other.groups.get(group, ()))) - {""}


def _codes(values: Sequence[str]) -> np.ndarray:
    """(N,) int64, equal for equal values, apart from each other and all else where the value is empty."""
    values = np.asarray(values, dtype=str)
    codes = np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)
    nobody = values == ""
    codes[nobody] = codes.max(initial=-1) + 1 + np.arange(nobody.sum())
    return codes


def _contents(dataset: MultimodalDataset) -> np.ndarray:
    """(N,) int64, equal for equal contents; samples without any step have none in common."""
    codes = np.unique(dataset.fingerprints().numpy(), return_inverse=True)[1].reshape(-1).astype(np.int64)
    empty = dataset.without_steps().numpy()
    codes[empty] = codes.max(initial=-1) + 1 + np.arange(empty.sum())
    return codes


def _connected(columns: Sequence[np.ndarray], size: int) -> np.ndarray:
    """(N,) the first row of each row's component, where rows that agree in a column are connected."""
    first = np.arange(size)
    if size == 0:
        return first
    while True:
        before = first
        for codes in columns:
            least = np.full(codes.max() + 1, size)
            np.minimum.at(least, codes, first)
            first = least[codes]
        first = first[first]
        if np.array_equal(first, before):
            return first


def _ranks(dataset: MultimodalDataset) -> np.ndarray:
    """(N,) places of the samples in the order of their names, then of their contents."""
    names, contents = np.asarray(dataset.names, dtype=str), dataset.fingerprints().numpy()
    keys = (contents, names) if (names != dataset.ids.numpy().astype(str)).any() else (contents,)
    ranks = np.empty(len(dataset), dtype=np.int64)
    ranks[np.lexsort(keys)] = np.arange(len(dataset))
    return ranks
