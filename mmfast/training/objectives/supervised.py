"""The task's loss between a head's outputs and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mmfast.models import LinearHead
from mmfast.training.config import Config
from mmfast.training.divergence import check_finite
from mmfast.training.objectives.base import Objective, Step, Terms
from mmfast.training.processes import total, world_size

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.stages import Stage


class Supervised(Objective):
    """Means over the labelled targets of a batch, by all processes together; ``valid_loss`` over the whole split.

    Args:
        head: (B, out_features) -> (B, task.outputs).
        task: what the labels are, and its loss.
    """

    fused = True

    def __init__(self, head: nn.Module, task: Task) -> None:
        self.head, self.task = head, task
        self.parts = {"head": head}

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task) -> Supervised:
        head = LinearHead(encoder.out_features, task.outputs, dropout=stage.settings.head_dropout)
        return cls(head, task)

    def __call__(self, step: Step) -> Terms | None:
        return self._terms(step, "loss")

    def validate(self, step: Step) -> Terms | None:
        return self._terms(step, "validation loss")

    def _terms(self, step: Step, what: str) -> Terms | None:
        own, weight = self.task.loss(self.head(step.fused), step.batch.labels)
        whole, weight = total(torch.stack([own, weight])).unbind()
        if not weight:
            # The same on all processes, none of which then steps.
            return None
        mean = whole / weight
        check_finite(mean, what, step.progress)
        return Terms(own / weight * world_size(), {"loss": mean}, weight.item())

    def logs(self) -> tuple[str, ...]:
        return "train_loss", "valid_loss"
