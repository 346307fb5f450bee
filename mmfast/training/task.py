"""The task of a run: that of its data, with the settings of its configuration."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor

from mmfast.data import MultimodalData
from mmfast.tasks import Task, make_task
from mmfast.training.config import TaskConfig
from mmfast.training.splits import Splits


def task_of_run(config: TaskConfig, splits: Splits) -> Task:
    """What a head learns from ``splits.train``.

    Raises:
        UserError: settings of another task, a class or label without training samples.
    """
    labels = splits.train.labels
    task = _make(config, splits, labels)
    task.check_trained(labels)
    return task


def task_of_data(config: TaskConfig, data: MultimodalData | Splits) -> Task:
    """The same to measure by, where no training labels give weights."""
    return _make(replace(config, class_weights=None, positive_weights=None), data, None)


def _make(config: TaskConfig, data: MultimodalData | Splits, labels: Tensor | None) -> Task:
    return make_task(data.task, data.targets, data.label_range, **asdict(config), labels=labels)
