"""The splits that belong together, and what their labels are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.data import arguments, fingerprint, targets
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError
from mmfast.split_spec import Protocol

SPLITS = ("train", "valid", "test", "unlabelled")


@dataclass
class MultimodalData:
    """The splits of one corpus. A split that is not given is an empty data set, so all can be iterated.

    Attributes:
        train, valid, test: the usual splits.
        unlabelled: a pool for self-supervised training beside train (or train itself), or None. Its samples
            may carry labels and lack modalities.
        cross_validation: the samples to evaluate by k-fold cross-validation where the splits are no fair test
            (see `folds`), or None where they are.
        name: of the corpus.
        label_range: smallest and largest possible label of a regression, which decide the metrics (see
            `mmfast.metrics.metrics_for`). Where it is not given, the first of [-1, 1] and [-3, 3] that holds all
            labels, else from the smallest label to the largest. None for other tasks.
        task: what the labels are: "regression", numbers; "classification", one class of several; "multilabel", labels
            that are there or not. Where it is not given, names of classes are classification and (N,) numbers
            regression; (N, K) numbers may be two things, so of those it must be given.
        targets: names of the classes in the order of their indices, or of the K columns. Where they are not given,
            classes that came as names are sorted; others are called 0, 1, ..., columns label0, label1, ..., and a
            single one label.
        protocol: how those of cross_validation are divided into folds, by `divide`; None where the number of folds is
            left to whoever evaluates.
        warnings: sentences about what a reader met in the files and kept, left out or took for something.
        padding: what the files had as padding, in words.
        layout: of the files, in words; "" where the data come from no file.
        sample_rate: of sound, in Hz, or None.

    Raises:
        UserError: no split, splits that do not fit together, a sample in two of them, a range that is none, labels
            that do not fit the task or the targets.
    """

    train: MultimodalDataset | None = None
    valid: MultimodalDataset | None = None
    test: MultimodalDataset | None = None
    unlabelled: MultimodalDataset | None = None
    cross_validation: MultimodalDataset | None = None
    name: str = "data"
    label_range: tuple[float, float] | None = None
    task: str | None = None
    targets: Sequence[str] | None = None
    warnings: Sequence[str] = ()
    padding: str = "none"
    layout: str = ""
    sample_rate: int | None = None
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        own = [d for d in (self.train, self.valid, self.test, self.unlabelled) if d is not None]
        given = own if self.cross_validation is None else [*own, self.cross_validation]
        self.warnings = tuple(self.warnings)
        if not given:
            raise UserError("MultimodalData: at least one split must be given, got none")
        if self.protocol is not None and self.cross_validation is None:
            raise UserError("MultimodalData: a protocol needs samples to cross-validate, got none")
        for other in given[1:]:
            if other.features != given[0].features:
                raise UserError(
                    f"MultimodalData: every split must have the features {given[0].features}, "
                    f"got {other.features}"
                )
        ids = torch.cat([given[0].ids[:0], *(d.ids for d in {id(d): d for d in own}.values())])
        if (twice := arguments.repeated(ids)) is not None:
            raise UserError(
                "MultimodalData: ids must be unique over the splits, lest a sample be trained and tested on "
                f"(give ids= to MultimodalDataset), got {twice} twice"
            )
        for split in ("train", "valid", "test"):
            if getattr(self, split) is None:
                setattr(self, split, MultimodalDataset.empty(given[0].features))
        self._settle_targets(given)
        if self.task != targets.REGRESSION and self.label_range is not None:
            raise UserError(f"MultimodalData: label_range is for regression, the task is {self.task}")
        if self.task == targets.REGRESSION:
            self.label_range = _range_of(given) if self.label_range is None else _range(self.label_range)

    def _settle_targets(self, given: Sequence[MultimodalDataset]) -> None:
        """What the labels are, in every split."""
        op, names = "MultimodalData", self.targets
        if self.task is None or names is None:
            task, known = targets.common(op, given)
            columns = {d.labels.shape[1] for d in given if d.labels.ndim == 2}
            if self.task is None and task is None and columns:
                raise UserError(
                    f"MultimodalData: task must be regression or multilabel, as labels (N, {columns.pop()}) may be "
                    "either, got none"
                )
            several = names is not None and len(names) > 1 and not columns
            self.task = self.task or (targets.CLASSIFICATION if several else task)
            # Columns keep their names when a task is overridden, classes are none of a number's.
            kept = known is not None and (
                self.task == task or (columns and self.task != targets.CLASSIFICATION)
            )
            names = names or (known if kept else targets.default(given, self.task))
        if self.task not in targets.TASKS:
            raise UserError(
                f"MultimodalData: task must be one of {', '.join(targets.TASKS)}, got {self.task!r}"
            )
        self.targets = tuple(map(str, [names] if isinstance(names, str) else names))
        if not self.targets or len(set(self.targets)) < len(self.targets) or "" in self.targets:
            raise UserError(f"MultimodalData: targets must be names, each once, got {list(self.targets)}")
        self.__dict__.update(self._each(lambda dataset: dataset.as_task(self.task, self.targets)))

    def each(self, function: Callable[[MultimodalDataset], MultimodalDataset]) -> MultimodalData:
        """The same corpus with ``function(split)`` in place of every split; splits that are the same stay so."""
        return replace(self, **self._each(function))

    def _each(self, function) -> dict[str, MultimodalDataset | None]:
        fields = {name: getattr(self, name) for name in (*SPLITS, "cross_validation")}
        done = {id(d): function(d) for d in {id(d): d for d in fields.values() if d is not None}.values()}
        return {name: None if d is None else done[id(d)] for name, d in fields.items()}

    def as_task(self, task: str, names: Sequence[str] | None = None) -> MultimodalData:
        """The same data with labels taken for those of a task: classes as numbers, whole numbers as classes, ...

        Raises:
            UserError: labels that do not fit.
        """
        if task == self.task and names in (None, self.targets):
            return self
        same = task == targets.REGRESSION == self.task
        names = self.targets if names is None and task == self.task else names
        return replace(self, task=task, targets=names, label_range=self.label_range if same else None)

    @property
    def features(self) -> dict[str, int]:
        """Modality -> feature size F."""
        return self.train.features

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.train.modalities

    def pretraining(self, train: MultimodalDataset | None = None) -> MultimodalDataset:
        """What self-supervised training sees: `train` (default the split) and the pool, each sample once."""
        train = self.train if train is None else train
        if self.unlabelled is None:
            return train
        new = ~torch.isin(self.unlabelled.ids, train.ids)
        return MultimodalDataset.concatenate([train, self.unlabelled.subset(new)]) if new.any() else train

    def fingerprint(self) -> str:
        """32 hexadecimal digits for the content: samples with labels, split by split, and the range of labels.

        Also the task and the targets. Whatever the name of the corpus, the path and format of its file, ids, names
        and the order in a split.
        """
        named = {name: getattr(self, name) for name in (*SPLITS, "cross_validation")}
        parts = [(name, d.fingerprint()) for name, d in named.items() if d is not None and len(d)]
        if self.protocol is not None:
            parts.append(("protocol", self.protocol.words()))
        if (self.task, self.targets) == (targets.REGRESSION, targets.UNNAMED):
            return fingerprint.of_parts(self.label_range, parts)
        return fingerprint.of_parts(self.label_range, self.task, self.targets, parts)

    def count(self, which: Callable[[MultimodalDataset], Tensor]) -> int:
        """Of how many samples ``which(split)`` (N,) is true; one that stands in several splits counts once."""
        ids = [d.ids[which(d)] for d in self.datasets().values()]
        return len(torch.unique(torch.cat(ids))) if ids else 0

    def datasets(self) -> dict[str, MultimodalDataset]:
        """`splits`, and the samples to be cross-validated if there are any."""
        crossed = self.cross_validation
        return self.splits() | ({"cross_validation": crossed} if crossed is not None and len(crossed) else {})

    def splits(self) -> dict[str, MultimodalDataset]:
        """Name -> data set of the splits that hold samples."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in named.items() if split is not None and len(split)}


def _range(value) -> tuple[float, float]:
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UserError(f"MultimodalData: label_range must be two increasing numbers, got {value}")
    return low, high


def _range_of(datasets: Sequence[MultimodalDataset]) -> tuple[float, float]:
    labels = torch.cat([d.labels[~d.labels.isnan()] for d in datasets])
    largest = float(labels.abs().max()) if len(labels) else 3.0
    for limit in (1.0, 3.0):
        if largest <= limit:
            return -limit, limit
    low, high = float(labels.min()), float(labels.max())
    return (low, high) if low < high else (low - 1, high + 1)
