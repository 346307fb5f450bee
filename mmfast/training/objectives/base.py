"""What all objectives have in common: a batch in one step goes in, terms of the loss come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.data import MultimodalBatch
from mmfast.training.divergence import Progress
from mmfast.training.processes import total, world_size

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.config import Config
    from mmfast.training.stages import Stage


class Step:
    """One batch in one step of training or validation; what several objectives need of it is computed once.

    Args:
        encoder: the encoder.
        batch: samples.
        progress: where training stands.
        seed: purpose -> seed of this step's draws for it.
        fused: fused vectors (B, H) that are known already, since the encoder is frozen.
    """

    def __init__(
        self,
        encoder: nn.Module,
        batch: MultimodalBatch,
        progress: Progress,
        seed: Callable[[str], int],
        fused: Tensor | None = None,
    ) -> None:
        self.encoder, self.batch, self.progress, self.seed = encoder, batch, progress, seed
        if fused is not None:
            self.fused = fused

    @cached_property
    def samples(self) -> int:
        """How many samples the batches of all processes have."""
        if world_size() == 1:
            return self.batch.samples
        return int(total(torch.tensor(self.batch.samples, device=self.batch.ids.device)))

    @cached_property
    def representations(self) -> Any:
        """Of each modality, by the encoder's ``encode``."""
        return self.encoder.encode(self.batch.values, self.batch.lengths, self.batch.padding)

    @cached_property
    def fused(self) -> Tensor:
        """Fused vectors (B, H) of the batch as it is."""
        if "representations" in vars(self):
            return self.encoder.fuse(self.representations)
        return self.encoder(self.batch.values, self.batch.lengths, self.batch.padding)


class Terms(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        loss: 0-d. In several processes it is such that the mean over them of its gradients is the whole batch's.
        logged: quantity -> 0-d tensor, of the batch of all processes; ``loss`` among them. Its epoch's mean is logged
            under this name with ``train_`` in front.
        weight: of this batch in that mean.
    """

    loss: Tensor
    logged: Mapping[str, Tensor]
    weight: float


class Objective:
    """One term of what a stage minimises. It owns parts of the network beside the encoder.

    It is no module itself: its parts stand in the network and its checkpoints under names that do not depend on the
    objective, such as ``projector``.

    Attributes:
        views: how many times a step encodes each sample.
        fused: it sees nothing of a batch but its fused vectors, so that a frozen encoder need not run twice.
        suspect: what beside the data may make its first loss infinite.
        parts: those that its row in :data:`~mmfast.training.objectives.OBJECTIVES` names.
    """

    views: ClassVar[int] = 1
    fused: ClassVar[bool] = False
    suspect: ClassVar[str] = "the weights it started from"
    parts: Mapping[str, nn.Module] = {}

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task | None = None) -> Objective:
        """The objective as settings describe it; weights are drawn from torch's random state.

        ``task`` is that of the labels, where the stage has them.

        Raises:
            UserError: settings that do not fit, or an encoder that lacks what the objective needs.
        """
        raise NotImplementedError

    def __call__(self, step: Step) -> Terms | None:
        """The loss of a batch, or None where it holds nothing to learn from."""
        raise NotImplementedError

    def begins(self, epoch: int, epochs: int) -> None:
        """Hears that an epoch of training, from 1 to ``epochs``, begins."""

    def validate(self, step: Step) -> Terms | None:
        """As calling it, for a validation batch; None where nothing is to be logged batch by batch."""
        return None

    def validated(self, progress: Progress) -> Mapping[str, Tensor]:
        """Quantities of the whole validation split, after all of its batches."""
        return {}

    def logs(self) -> tuple[str, ...]:
        """Names of what it logs, ``train_`` or ``valid_`` in front."""
        return ("train_loss",)
