"""The terms that an encoder adds by itself to whatever it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mmfast.errors import UserError
from mmfast.models.encoders.base import Encoder
from mmfast.training.config import Config
from mmfast.training.divergence import check_finite
from mmfast.training.objectives.base import Objective, Step, Terms
from mmfast.training.processes import total, world_size

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.stages import Stage


class Auxiliary(Objective):
    """Their sum; each, a mean over samples, is logged as ``train_auxiliary_<name>``."""

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task | None = None) -> Auxiliary:
        if type(encoder).auxiliary is Encoder.auxiliary:
            name = type(encoder).__name__
            raise UserError(
                f"config: {stage.where}.objectives must fit the encoder, {name} has no auxiliary terms"
            )
        return cls()

    def __call__(self, step: Step) -> Terms | None:
        terms = step.encoder.auxiliary(step.representations)
        if not terms:
            return None
        means = torch.stack(list(terms.values()))
        # Each process has means over its own samples.
        share = step.batch.samples / step.samples
        whole = total(means * share)
        loss = means.sum()
        check_finite(loss, "auxiliary loss", step.progress)
        logged = {f"auxiliary_{name}": value for name, value in zip(terms, whole.unbind(), strict=True)}
        return Terms(loss * share * world_size(), {"loss": whole.sum(), **logged}, step.samples)
