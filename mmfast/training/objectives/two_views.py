"""Two augmented views of a batch, encoded and projected, and a loss between their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmfast.errors import UserError
from mmfast.models import Projector
from mmfast.training.augmentation import make_views
from mmfast.training.config import Config
from mmfast.training.divergence import Progress, check_finite
from mmfast.training.memory import check_weights
from mmfast.training.objectives.base import Objective, Step, Terms
from mmfast.training.objectives.losses import Loss, make_loss, row_of, takes_labels
from mmfast.training.processes import rows, total

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.stages import Stage

# Quantities to log that no loss leaves in its `last`.
READINGS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "mean_cosine": lambda last, z_a, z_b: _mean_cosine(z_a, z_b),
    "positives": lambda last, z_a, z_b: last.positive_pairs / last.anchors.clamp_min(1),
}


class TwoViews(Objective):
    """Both views go through one encoder and one projector.

    Each epoch logs the mean over steps of the loss and of what its row reads. Of Barlow Twins ``train_on_diagonal``,
    ``train_off_diagonal`` (before the weight lambda), ``train_mean_diagonal`` (mean c_ii, 1 is perfect invariance)
    and ``train_off_diagonal_rms``; of VICReg its terms without their weights; of losses of similarities
    ``train_mean_cosine`` (of the two views of a sample, 1 is perfect invariance), where there may be several
    ``train_positives`` (of a row that has one), and how many triplets of a step are ``train_easy``,
    ``train_semihard`` and ``train_hard``.

    There is no validation loss. Augmentation is off in validation, so both views are the same, c_ii is 1 and
    nothing of invariance is left to measure; augmented validation views would measure the luck of a draw as well.
    What the clean embeddings of the validation split can tell is redundancy, over the whole split at once:
    ``valid_off_diagonal_rms`` of the embeddings, and ``valid_effective_rank`` of the fused vectors.

    Args:
        augment: :class:`~mmfast.transforms.TwoViews`.
        projector: (B, out_features) -> (B, D).
        loss: one of :data:`~mmfast.training.objectives.losses.LOSSES`; where it has parameters, they learn and are
            saved.
        row: its row there.
        labels: whether it takes the classes of the samples.
    """

    views = 2

    def __init__(
        self, augment: nn.Module, projector: nn.Module, loss: nn.Module, row: Loss, labels: bool = False
    ) -> None:
        self.augment, self.projector, self.loss = augment, projector, loss
        self.row, self.labels = row, labels
        self.suspect = "loss.lambd" if "lambd" in row.own else "loss.options"
        self.parts = {"projector": projector, "loss": loss}
        self._clean: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task | None = None) -> TwoViews:
        augment = make_views(config.augmentation, tuple(encoder.features))
        projector = make_projector(config, encoder.out_features)
        # The settings of Barlow Twins are those of many views, too.
        loss = make_loss(config.loss, others="many_views" in stage.objectives)
        return cls(augment, projector, loss, row_of(config.loss), takes_labels(config.loss))

    def __call__(self, step: Step) -> Terms:
        batch, progress = step.batch, step.progress
        views = self.augment(
            batch.values, batch.lengths, ids=batch.ids, seed=step.seed("views"), padding=batch.padding
        )
        z_a, z_b = (self.projector(step.encoder(view, batch.lengths, batch.padding)) for view in views)
        loss = evaluated(lambda: self._loss(z_a, z_b, batch.labels), (z_a, z_b), progress)
        check_finite(loss, "loss", progress)
        logged = {name: self._read(name, z_a.detach(), z_b.detach()) for name in self.row.reads}
        return Terms(loss, {"loss": loss.detach(), **logged}, step.samples)

    def _loss(self, z_a: Tensor, z_b: Tensor, labels: Tensor | None) -> Tensor:
        if self.row.joined:
            return self.loss(torch.cat((z_a, z_b)), labels=torch.cat((labels, labels)).long())
        return self.loss(z_a, z_b, labels=labels.long()) if self.labels else self.loss(z_a, z_b)

    def _read(self, name: str, z_a: Tensor, z_b: Tensor) -> Tensor:
        last = self.loss.last
        return READINGS[name](last, z_a, z_b) if name in READINGS else getattr(last, name)

    def begins(self, epoch: int, epochs: int) -> None:
        if hasattr(self.loss, "set_progress"):
            self.loss.set_progress(epoch, epochs)

    def validate(self, step: Step) -> None:
        real = slice(step.batch.samples)
        self._clean.append((step.fused[real], self.projector(step.fused)[real]))

    def validated(self, progress: Progress) -> Mapping[str, Tensor]:
        fused, z = (torch.cat(parts) for parts in zip(*self._clean, strict=True))
        self._clean.clear()
        fused = rows(fused)
        if len(fused) < 2:
            return {}
        check_finite(fused, "fused vectors", progress)
        quantities = {}
        if components := getattr(self.loss, "components", None):
            found = evaluated(lambda: components(z, z), (z,), progress)
            quantities["off_diagonal_rms"] = found.off_diagonal_rms
        return {**quantities, "effective_rank": effective_rank(fused)}

    def logs(self) -> tuple[str, ...]:
        known = hasattr(self.loss, "components")
        return (
            "train_loss",
            *(f"train_{name}" for name in self.row.reads),
            *(["valid_off_diagonal_rms"] if known else []),
            "valid_effective_rank",
        )


def make_projector(config: Config, width: int) -> Projector:
    """The projector of ``model.projector`` for vectors of a width."""
    widths = config.model.projector
    check_weights("model.projector", widths, lambda: Projector(width, widths))
    return Projector(width, widths)


def evaluated(function: Callable[[], Any], embeddings: tuple[Tensor, ...], progress: Progress) -> Any:
    """What a loss makes of embeddings, whose sizes are right: what it refuses is about their values."""
    try:
        return function()
    except UserError as error:
        for z in embeddings:
            check_finite(z, "embeddings", progress)
        raise UserError(f"{progress.diverged('embeddings became too large')} ({error})") from error


def _mean_cosine(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Of corresponding rows of all processes."""
    cosines = cosine_similarity(z_a.float(), z_b.float())
    whole, count = total(torch.stack((cosines.sum(), cosines.new_tensor(len(cosines))))).unbind()
    return whole / count


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred ``x`` (N, D): 1 to min(N - 1, D).

    Roy & Vetterli 2007; as a label-free measure of representations, RankMe (Garrido et al. 2023). Once an epoch it
    may decompose: :func:`mmfast.functional.effective_rank`, of another order and never above it, is for every step.
    """
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(p).sum().exp().float()
