"""What the labels of data sets are: one number, a class, several numbers, or labels that are there or not.

Kept are float32, NaN for none: (N,) numbers or indices of classes, (N, K) numbers or labels of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmfast.data import arguments
from mmfast.errors import UserError

REGRESSION, CLASSIFICATION, MULTILABEL = TASKS = ("regression", "classification", "multilabel")
# What one number is called that nobody has named.
UNNAMED = ("label",)
# In files of classes and of labels, where numbers have no NaN.
NONE = -1


def read(labels, size: int, names: Sequence[str] | None) -> tuple[Tensor, str | None, tuple[str, ...] | None]:
    """Labels as they are kept, with what they are until more is said: task and targets, None for (N, K)."""
    if labels is None:
        return nothing(size), REGRESSION, UNNAMED
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
    given, labels = labels, np.asarray(labels)
    if labels.dtype.kind == "U" and not isinstance(given, np.ndarray):
        labels = np.array(list(given), dtype=object)  # lest numbers among names become names
    if labels.dtype.kind == "S":
        labels = labels.astype(str)
    if labels.dtype.kind in "UO" and any(isinstance(item, str) for item in labels.flat):
        return _names_of_classes(labels, size, names)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            labels = torch.from_numpy(labels.astype(np.float32))  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise UserError(f"MultimodalDataset: labels must be numbers, or names of classes ({error})") from None
    if labels.shape[:1] != (size,) or labels.ndim > 2 or 0 in labels.shape[1:]:
        raise UserError(
            f"MultimodalDataset: labels must be ({size},) or ({size}, K), got shape {tuple(labels.shape)}"
        )
    _check_each("MultimodalDataset", labels, ~torch.isinf(labels), "finite, or NaN for none", names)
    return (labels, REGRESSION, UNNAMED) if labels.ndim == 1 else (labels, None, None)


def nothing(size: int, columns: int | None = None) -> Tensor:
    """No labels."""
    return torch.full((size,) if columns is None else (size, columns), float("nan"), device="cpu")


def _names_of_classes(labels: np.ndarray, size: int, names) -> tuple[Tensor, str, tuple[str, ...]]:
    if labels.shape != (size,):
        raise UserError(f"MultimodalDataset: names of classes must be ({size},), got shape {labels.shape}")
    known = np.array([isinstance(item, str) and item != "" for item in labels], dtype=bool)
    for i in np.flatnonzero(~known):
        item = labels[i]
        if not (item is None or item == "" or item != item):
            raise UserError(
                "MultimodalDataset: labels must be names of classes throughout, or None for none, "
                f"got {item!r} in labels[{i}]{arguments.named(names, i)}"
            )
    classes, index = np.unique(labels[known].astype(str), return_inverse=True)
    found = nothing(size)
    found[torch.from_numpy(known)] = torch.from_numpy(index.astype(np.float32))
    return found, CLASSIFICATION, tuple(classes.tolist())


def common(op: str, datasets: Sequence) -> tuple[str | None, tuple[str, ...] | None]:
    """Task and targets that hold for the labels of several data sets; None where they have not been told.

    Data sets without any label fit all others. Names of classes are put together.
    """
    told = [d for d in datasets if bool(d.labelled().any())] or list(datasets)
    # What (N, K) numbers are may have been said of some and not of others.
    told = [d for d in told if d.task is not None] + [d for d in told if d.task is None]
    named = {(d.task, None if d.task == CLASSIFICATION else d.targets) for d in told if d.task is not None}
    if len(named) > 1 or len({d.labels.shape[1:] for d in told}) > 1:
        kinds = " and ".join(sorted(_kind(d) for d in told)[:: len(told) - 1 or 1])
        raise UserError(f"{op}: labels must be of one kind in all data sets, got {kinds}")
    first = told[0]
    if first.task != CLASSIFICATION or all(d.targets == first.targets for d in told):
        return first.task, first.targets
    return first.task, tuple(sorted({name for d in told for name in d.targets}))


def _kind(dataset) -> str:
    names = "" if dataset.targets is None else f" of {', '.join(dataset.targets)}"
    return f"{dataset.task or 'numbers'}{names} {('N', *dataset.labels.shape[1:])}".replace("'", "")


def default(datasets: Sequence, task: str) -> tuple[str, ...]:
    """Names of targets that nobody has named."""
    columns = max((d.labels.shape[1] for d in datasets if d.labels.ndim == 2), default=1)
    if task == CLASSIFICATION:
        largest = max(float(d.labels.nan_to_num().max()) for d in datasets if len(d))
        return tuple(str(i) for i in range(int(max(largest, 0)) + 1))
    return UNNAMED if columns == 1 else tuple(f"label{i}" for i in range(columns))


def fitted(op: str, dataset, task: str, targets: tuple[str, ...]) -> Tensor:
    """The labels of a data set as a task and its targets have them.

    Raises:
        UserError: labels that do not fit; names the sample.
    """
    labels, names, columns = dataset.labels, dataset.names, len(targets)
    wide = task == MULTILABEL or (task == REGRESSION and columns > 1)
    if labels.isnan().all():
        return nothing(len(labels), columns if wide else None)
    own = dataset.targets if dataset.task == task and dataset.targets != UNNAMED else None
    if task == CLASSIFICATION and labels.ndim != 1:
        raise UserError(f"{op}: labels of classes must be (N,), got {tuple(labels.shape)}")
    if task != CLASSIFICATION and labels[0].numel() != columns:
        raise UserError(
            f"{op}: labels must be {columns} a sample, {', '.join(targets)}, got the shape {tuple(labels.shape)}"
        )
    if own is not None and own != targets:
        foreign = [name for name in own if name not in targets]
        if foreign or (task != CLASSIFICATION and len(own) != columns):
            raise UserError(
                f"{op}: targets must be among {', '.join(targets)}, got {', '.join(foreign or own)}"
            )
        if task == CLASSIFICATION:
            index = torch.tensor([targets.index(name) for name in own], dtype=labels.dtype, device="cpu")
            return torch.where(labels.isnan(), torch.nan, index[labels.nan_to_num().long()])
        labels = labels[:, [own.index(name) for name in targets]] if labels.ndim == 2 else labels
    if task == REGRESSION:
        return labels if wide else labels.flatten()
    labels = torch.where(labels == NONE, torch.nan, labels)
    if task == CLASSIFICATION:
        fit = (labels == labels.round()) & (labels >= 0) & (labels < columns)
        rule = f"classes, whole numbers from 0 to {columns - 1}, or -1 or NaN for none"
    else:
        labels = labels.reshape(-1, columns)
        fit, rule = (labels == 0) | (labels == 1), "0 or 1, or -1 or NaN for none"
    _check_each(op, labels, fit | labels.isnan(), rule, names)
    return labels


def _check_each(op: str, labels: Tensor, fit: Tensor, rule: str, names: Sequence[str] | None) -> None:
    if not fit.all():
        i = torch.nonzero(~fit)[0].tolist()
        raise UserError(
            f"{op}: labels must be {rule}, got {float(labels[tuple(i)]):g} in labels"
            f"{''.join(f'[{k}]' for k in i)}{arguments.named(names, i[0])}"
        )


def presence(dataset) -> np.ndarray:
    """(N, targets) bool: which samples are of which class, or have which label."""
    labels = dataset.labels.numpy()
    return labels == 1 if dataset.task == MULTILABEL else labels[:, None] == np.arange(len(dataset.targets))


def strata(dataset) -> np.ndarray | None:
    """(N,) int64 numbers of the classes or sets of labels, -1 without; None where there are none, but numbers.

    Sets are numbered in the order of their columns, so that neighbours have labels in common.
    """
    if dataset.task not in (CLASSIFICATION, MULTILABEL):
        return None
    rows = dataset.labels.nan_to_num(nan=NONE).numpy()
    rows = rows if rows.ndim == 2 else rows[:, None]
    found = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return np.where(dataset.labelled().numpy(), found, NONE)
