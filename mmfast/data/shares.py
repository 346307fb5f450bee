"""Fewer labels, and random parts by shares."""

from __future__ import annotations

import numpy as np
import torch

from mmfast.checks import numpy_generator
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.targets import presence, strata
from mmfast.data.units import units
from mmfast.errors import UserError

TRAIN, VALID, TEST = range(3)


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


def by_shares(
    dataset: MultimodalDataset, valid: float, test: float, seed: int = 0, group: str | None = None
) -> np.ndarray:
    """(N,) the part of each sample, TRAIN, VALID or TEST, at random.

    Of n labelled samples floor(share * n), and at least one unless the share is 0, are VALID and TEST, the others
    TRAIN. What belongs together (see `units`) stays so; parts are then as near to these sizes as the units in random
    order come. Samples without a label are TRAIN unless what they belong to is not.

    Stratified where the labels are classes or sets of labels: parts have them in their shares, give or take one.

    Raises:
        UserError: too few samples or units, or no such group.
    """
    labelled = dataset.labelled().numpy()
    n = int(labelled.sum())
    # A share such as 0.29 of 100 is 28.999... in binary.
    sizes = {
        part: max(int(share * n + 1e-6), 1) if share else 0 for part, share in ((TEST, test), (VALID, valid))
    }
    if sum(sizes.values()) >= n:
        raise UserError(
            f"split: {n} labelled samples are too few for shares of {1 - valid - test:g}, {valid:g} and {test:g}"
        )
    unit = units(dataset, group)
    count = int(unit.max()) + 1
    stratum = strata(dataset)
    table = _table(
        unit[labelled], np.zeros(n, dtype=np.int64) if stratum is None else stratum[labelled], count
    )
    generator = numpy_generator("split", seed)
    free = generator.permutation(np.flatnonzero(np.bincount(unit[labelled], minlength=count)))
    needed = sum(size > 0 for size in sizes.values()) + 1
    if len(free) < needed:
        raise UserError(
            f"split: the {n} labelled samples are of only {len(free)} {_kind(group)} that must stay together, too "
            f"few for {needed} parts"
        )
    part = np.full(count, TRAIN)
    for wanted in (TEST, VALID):
        if sizes[wanted]:
            needed -= 1
            taken = _take(table, free, sizes[wanted], generator, spare=needed)
            part[free[taken]] = wanted
            free = free[~taken]
    return part[unit]


def _kind(group: str | None) -> str:
    return "groups" if group is None else f"values of {group}"


def _table(unit: np.ndarray, stratum: np.ndarray, count: int) -> list[list[tuple[int, int]]]:
    """Of each unit its strata with the number of its samples in each."""
    pairs, counts = np.unique(np.stack([unit, stratum]), axis=1, return_counts=True)
    table: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for u, s, c in zip(*pairs.tolist(), counts.tolist(), strict=True):
        table[u].append((s, c))
    return table


def _take(
    table: list[list[tuple[int, int]]],
    free: np.ndarray,
    size: int,
    generator: np.random.Generator,
    spare: int,
) -> np.ndarray:
    """(units,) bool: which of the free units make up a part of so many samples; `spare` of them at least are left.

    A unit is taken where it brings the numbers of samples of the strata nearer to their shares of the part.
    """
    rows = [table[u] for u in free.tolist()]
    lacking = _quotas(rows, size, generator)
    taken = np.zeros(len(rows), dtype=bool)
    room = len(rows) - spare
    costs = []
    for i, row in enumerate(rows):
        cost = sum(abs(lacking[s] - c) - abs(lacking[s]) for s, c in row)
        costs.append(cost)
        if cost < 0 and room:
            taken[i], room = True, room - 1
            for s, c in row:
                lacking[s] -= c
    if not taken.any():
        taken[int(np.argmin(costs))] = True
    return taken


def _quotas(rows: list[list[tuple[int, int]]], size: int, generator: np.random.Generator) -> dict[int, int]:
    """Stratum -> how many of a part's samples are of it: the share of the free samples, rounded up or down at random.

    Rounded up with the probability of the fraction, so that rare strata have their chance, and such that all add up
    to the size.
    """
    there: dict[int, int] = {}
    for row in rows:
        for s, c in row:
            there[s] = there.get(s, 0) + c
    counts = np.array([there[s] for s in sorted(there)])
    ends = np.floor(size * np.cumsum(counts) / counts.sum() + generator.random()).astype(np.int64)
    ends[-1] = size
    return dict(zip(sorted(there), np.diff(ends, prepend=0).tolist(), strict=True))
