"""What labels are, and all that follows from it: width of the head, loss, probabilities, metrics.

Labels are float32, NaN for none: (B,) numbers or indices of classes, (B, K) numbers or labels that are 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.checks import check_number
from mmfast.class_metrics import classification_metrics, multilabel_metrics
from mmfast.errors import UserError
from mmfast.metrics import ccc, corr, mae, metrics_for

LOSSES = {"mae": ("MAE", F.l1_loss), "mse": ("MSE", F.mse_loss), "huber": ("Huber loss", F.huber_loss)}


@dataclass(frozen=True)
class Task:
    """What the targets of a data set are; one of the three below.

    Attributes:
        targets: names of the columns (regression, multilabel) or of the classes.
    """

    name: ClassVar[str]
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise UserError(f"{self.name}: targets must be names, each once, got {list(self.targets)}")

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return len(self.targets)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the columns of :meth:`predictions` are called."""
        return self.targets

    @property
    def loss_title(self) -> str:
        """What people call the loss."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the loss over what is labelled, and what to divide it by; both 0 where nothing is.

        Sums and divisors of parts of a batch add up to those of the whole. What has no label has no gradient.

        Args:
            outputs: (B, self.outputs) of the head.
            labels: (B,) or (B, K), NaN for none.
        """
        raise NotImplementedError

    def labelled(self, labels: Tensor) -> Tensor:
        """(B,) bool: which samples have a label, or one at least of several."""
        known = ~labels.isnan()
        return known if labels.ndim == 1 else known.any(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """(B, len(columns)) numbers or probabilities from the head's outputs."""
        return outputs

    def metrics(self, predictions, truths) -> dict[str, float]:
        """Name -> value of every metric of the task, NaN where one is undefined.

        Args:
            predictions: (N, len(columns)), as by :meth:`predictions`.
            truths: (N,) or (N, K), NaN for none; samples without any take no part.
        """
        truths = torch.from_numpy(np.asarray(truths))
        known = self.labelled(truths)
        if not known.any():
            raise UserError(f"{self.name}: there is no labelled sample to measure on")
        p = torch.from_numpy(np.asarray(predictions))
        return self._metrics(p.reshape(len(p), -1)[known], truths[known])

    def _metrics(self, predictions: Tensor, truths: Tensor) -> dict[str, float]:
        raise NotImplementedError

    @property
    def main(self) -> tuple[str, ...]:
        """Names of the metrics for a short table, in its order."""
        raise NotImplementedError

    @property
    def note(self) -> str:
        """What a reader of that table must know; may be empty."""
        return ""

    def check_trained(self, labels: Tensor) -> None:
        """Refuse training labels from which the task cannot be learnt.

        Raises:
            UserError: a class or a label that no training sample has.
        """

    def state(self) -> dict[str, Any]:
        """Plain values for :func:`task_of`."""
        return {"name": self.name, **asdict(self), "targets": list(self.targets)}

    def describe(self) -> str:
        """One line for people."""
        return f"{self.name} of {', '.join(self.targets)}, {self.loss_title}"


@dataclass(frozen=True)
class Regression(Task):
    """One number or several.

    Args:
        error: ``mae``, ``mse`` or ``huber`` (delta 1).
        label_range: smallest and largest possible label, which decides the metrics of a single target, see
            :func:`~mmfast.metrics.metrics_for`. Of several targets, ``mae``, ``corr`` and ``ccc`` are the means of
            those of each (``mae_NAME``, ...), left out where undefined.
    """

    name: ClassVar[str] = "regression"
    error: str = "mae"
    label_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error not in LOSSES:
            raise UserError(f"regression: loss must be one of {', '.join(LOSSES)}, got {self.error!r}")
        if self.label_range is not None:
            object.__setattr__(self, "label_range", tuple(self.label_range))

    @property
    def loss_title(self) -> str:
        return LOSSES[self.error][0]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("prediction",) if len(self.targets) == 1 else self.targets

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.reshape(outputs.shape)
        known = ~labels.isnan()
        total = LOSSES[self.error][1](outputs[known], labels[known], reduction="sum")
        return total, known.sum().to(total.dtype)

    def _metrics(self, predictions: Tensor, truths: Tensor) -> dict[str, float]:
        if len(self.targets) == 1:
            return self._set.measure(predictions, truths)
        found = {}
        for metric in (mae, corr, ccc):
            own = {}
            for i, target in enumerate(self.targets):
                known = ~truths[:, i].isnan()
                own[target] = metric(predictions[known, i], truths[known, i]) if known.any() else math.nan
            defined = [value for value in own.values() if not math.isnan(value)]
            found[metric.__name__] = sum(defined) / len(defined) if defined else math.nan
            found |= {f"{metric.__name__}_{target}": value for target, value in own.items()}
        return found

    @property
    def _set(self):
        return metrics_for(self.label_range or (-math.inf, 0.0))

    @property
    def main(self) -> tuple[str, ...]:
        return self._set.main if len(self.targets) == 1 else ("corr", "mae", "ccc")

    @property
    def note(self) -> str:
        return self._set.note if len(self.targets) == 1 else "Corr, MAE and CCC are means over the targets."


@dataclass(frozen=True)
class Classification(Task):
    """One class of several.

    Args:
        weights: of the classes in the cross-entropy, all 1 by default.
    """

    name: ClassVar[str] = "classification"
    label_range: ClassVar[None] = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.targets) < 2:
            raise UserError(f"classification: targets must be two classes at least, got {list(self.targets)}")
        _check_weights(self, "class_weights")

    @property
    def loss_title(self) -> str:
        return "cross-entropy"

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = ~labels.isnan()
        classes = labels[known].long()
        weights = None if self.weights is None else outputs.new_tensor(self.weights)
        total = F.cross_entropy(outputs[known], classes, weights, reduction="sum")
        return total, known.sum().to(total.dtype) if weights is None else weights[classes].sum()

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1)

    def _metrics(self, predictions: Tensor, truths: Tensor) -> dict[str, float]:
        return classification_metrics(predictions, truths, self.targets)

    @property
    def main(self) -> tuple[str, ...]:
        return "ua", "accuracy", "f1_macro", "f1_weighted"

    @property
    def note(self) -> str:
        return "UA is the mean of the classes' recalls; accuracy is WA, and equals micro F1."

    def check_trained(self, labels: Tensor) -> None:
        _check_each(self, "class", [bool((labels == i).any()) for i in range(len(self.targets))])


@dataclass(frozen=True)
class MultiLabel(Task):
    """A set of labels, which may be empty.

    Args:
        weights: of a present label in the binary cross-entropy, an absent one weighing 1; all 1 by default.
        threshold: probability above which a label is predicted.
    """

    name: ClassVar[str] = "multilabel"
    label_range: ClassVar[None] = None
    weights: tuple[float, ...] | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self, "positive_weights")
        check_number(self.name, "threshold", self.threshold, 0, 1, ends="()")

    @property
    def loss_title(self) -> str:
        return "binary cross-entropy"

    def loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = ~labels.isnan()
        weights = None
        if self.weights is not None:
            weights = outputs.new_tensor(self.weights).expand_as(outputs)[known]
        total = F.binary_cross_entropy_with_logits(
            outputs[known], labels[known].to(outputs.dtype), pos_weight=weights, reduction="sum"
        )
        return total, known.sum().to(total.dtype)

    def predictions(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def _metrics(self, predictions: Tensor, truths: Tensor) -> dict[str, float]:
        return multilabel_metrics(predictions, truths, self.targets, self.threshold)

    @property
    def main(self) -> tuple[str, ...]:
        return "jaccard", "f1_micro", "f1_macro", "f1_weighted", "auc"

    @property
    def note(self) -> str:
        return (
            f"Labels are predicted above a probability of {self.threshold:g}; Jaccard counts 0 where both sets are "
            "empty; AUC is the mean over labels that some samples have and others lack."
        )

    def check_trained(self, labels: Tensor) -> None:
        _check_each(self, "label", (labels == 1).any(0).tolist())


TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Regression, Classification, MultiLabel)}


def task_of(state: Mapping[str, Any]) -> Task:
    """The task from what :meth:`Task.state` returned.

    Raises:
        UserError: no task of that name, or values that it does not take.
    """
    values = dict(state)
    kind = TASKS.get(name := values.pop("name", None))
    if kind is None:
        raise UserError(f"task_of: the task must be one of {', '.join(TASKS)}, got {name!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"task_of: {error}") from None


def make_task(
    name: str,
    targets: tuple[str, ...],
    label_range: tuple[float, float] | None = None,
    *,
    loss: str | None = None,
    class_weights: str | list[float] | None = None,
    positive_weights: str | list[float] | None = None,
    threshold: float | None = None,
    labels: Tensor | None = None,
) -> Task:
    """The task of a data set, with the settings that it takes; None leaves one at its default.

    Args:
        name: ``regression``, ``classification`` or ``multilabel``.
        targets: names of columns or classes.
        label_range: of the labels of a regression.
        loss: ``mae`` (default), ``mse`` or ``huber``: regression alone.
        class_weights: ``none``, ``balanced`` (N / (classes * N_c), whose mean over training samples is 1) or one
            number a class: classification alone.
        positive_weights: ``none``, ``balanced`` (absent over present) or one number a label: multilabel alone.
        threshold: in (0, 1), default 0.5: multilabel alone.
        labels: of the training samples, from which balanced weights follow.

    Raises:
        UserError: no such task, a setting that it does not take, a value out of range.
    """
    given = {
        "loss": loss,
        "class_weights": class_weights,
        "positive_weights": positive_weights,
        "threshold": threshold,
    }
    takes = {
        "regression": "loss",
        "classification": "class_weights",
        "multilabel": "positive_weights threshold",
    }
    for setting, value in given.items():
        if value is not None and setting not in takes.get(name, setting).split():
            owner = next(task for task, settings in takes.items() if setting in settings.split())
            raise UserError(f"task: {setting} is for {owner}, and the data's task is {name}")
    if name == "regression":
        return Regression(targets, loss or "mae", label_range)
    if name == "classification":
        return Classification(targets, _weights(class_weights, labels, balanced_classes, len(targets)))
    if name == "multilabel":
        weights = _weights(positive_weights, labels, balanced_labels, len(targets))
        return MultiLabel(targets, weights, 0.5 if threshold is None else threshold)
    raise UserError(f"task: the task must be one of {', '.join(TASKS)}, got {name!r}")


def balanced_classes(labels: Tensor, classes: int) -> tuple[float, ...]:
    """N / (classes * N_c) of each class, scikit-learn's ``balanced``; 1 where a class has no samples."""
    counts = torch.bincount(labels[~labels.isnan()].long(), minlength=classes).double()
    return tuple(torch.where(counts > 0, counts.sum() / (classes * counts), 1.0).tolist())


def balanced_labels(labels: Tensor, count: int) -> tuple[float, ...]:
    """Number of samples without each label over that with it; 1 where either is 0."""
    with_it, without = (labels == 1).sum(0).double(), (labels == 0).sum(0).double()
    return tuple(torch.where((with_it > 0) & (without > 0), without / with_it, 1.0).tolist())


def _weights(given, labels, balanced, size: int) -> tuple[float, ...] | None:
    if given is None or given == "none":
        return None
    if given == "balanced":
        if labels is None:
            raise UserError("task: balanced weights need the training labels")
        return balanced(labels, size)
    return tuple(given)


def _check_weights(task: Task, setting: str) -> None:
    if task.weights is None:
        return
    weights = tuple(
        check_number(task.name, f"{setting}[{i}]", weight, 0, ends="(]")
        for i, weight in enumerate(task.weights)
    )
    if len(weights) != len(task.targets):
        raise UserError(
            f"{task.name}: {setting} must be {len(task.targets)} numbers, one for each of {', '.join(task.targets)}, "
            f"got {len(weights)}"
        )
    object.__setattr__(task, "weights", weights)


def _check_each(task: Task, what: str, there: list[bool]) -> None:
    lacking = [name for name, found in zip(task.targets, there, strict=True) if not found]
    if lacking:
        raise UserError(
            f"data: every {what} must have a labelled training sample, the train split has none of "
            f"{', '.join(map(repr, lacking))}"
        )
