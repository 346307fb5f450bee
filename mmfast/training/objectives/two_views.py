"""Two augmented views of a batch, encoded and projected, and a loss between their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.losses import BarlowTwinsLoss
from mmfast.models import Projector
from mmfast.training.augmentation import make_views
from mmfast.training.config import Config, LossConfig
from mmfast.training.divergence import Progress, check_finite
from mmfast.training.memory import check_weights
from mmfast.training.objectives.base import Objective, Step, Terms
from mmfast.training.processes import rows
from mmfast.wording import guess, one_of

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.stages import Stage

# loss.name -> the loss (z_a, z_b) -> 0-d. Where it has `last` or `components`, as Barlow Twins does, their fields are
# logged; where it has parameters, they learn and are saved.
LOSSES: dict[str, Callable[[LossConfig], nn.Module]] = {
    "barlow_twins": lambda config: BarlowTwinsLoss(
        **{"lambd": config.lambd, "center": config.center, **config.options}
    ),
}


class TwoViews(Objective):
    """Both views go through one encoder and one projector.

    Each epoch logs the mean over steps of the loss and, of Barlow Twins, ``train_on_diagonal``,
    ``train_off_diagonal`` (before the weight lambda), ``train_mean_diagonal`` (mean c_ii, 1 is perfect invariance)
    and ``train_off_diagonal_rms``.

    There is no validation loss. Augmentation is off in validation, so both views are the same, c_ii is 1 and
    nothing of invariance is left to measure; augmented validation views would measure the luck of a draw as well.
    What the clean embeddings of the validation split can tell is redundancy, over the whole split at once:
    ``valid_off_diagonal_rms`` of the embeddings, and ``valid_effective_rank`` of the fused vectors.

    Args:
        augment: :class:`~mmfast.transforms.TwoViews`.
        projector: (B, out_features) -> (B, D).
        loss: one of :data:`LOSSES`.
    """

    views = 2
    suspect = "loss.lambd"

    def __init__(self, augment: nn.Module, projector: nn.Module, loss: nn.Module) -> None:
        self.augment, self.projector, self.loss = augment, projector, loss
        self.parts = {"projector": projector, "loss": loss}
        self._clean: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task | None = None) -> TwoViews:
        augment = make_views(config.augmentation, tuple(encoder.features))
        return cls(augment, make_projector(config, encoder.out_features), make_loss(config.loss))

    def __call__(self, step: Step) -> Terms:
        batch, progress = step.batch, step.progress
        views = self.augment(
            batch.values, batch.lengths, ids=batch.ids, seed=step.seed("views"), padding=batch.padding
        )
        z_a, z_b = (self.projector(step.encoder(view, batch.lengths, batch.padding)) for view in views)
        loss = evaluated(lambda: self.loss(z_a, z_b), (z_a, z_b), progress)
        check_finite(loss, "loss", progress)
        parts = getattr(self.loss, "last", None)
        logged = {"loss": loss.detach()} if parts is None else parts._asdict()
        return Terms(loss, logged, step.samples)

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
        parts = ("on_diagonal", "off_diagonal", "mean_diagonal", "off_diagonal_rms") if known else ()
        return (
            "train_loss",
            *(f"train_{name}" for name in parts),
            *(["valid_off_diagonal_rms"] if known else []),
            "valid_effective_rank",
        )


def make_loss(config: LossConfig) -> nn.Module:
    """The loss between two views.

    Raises:
        UserError: none of that name, or arguments that it does not take.
    """
    if config.name not in LOSSES:
        raise UserError(
            f"config: loss.name must be {one_of(LOSSES)}, got {config.name!r}{guess(config.name, LOSSES)}"
        )
    try:
        return LOSSES[config.name](config)
    except TypeError as error:
        raise UserError(f"config: loss.options must fit the loss {config.name}: {error}") from error


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


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred ``x`` (N, D): 1 to min(N - 1, D).

    Roy & Vetterli 2007; as a label-free measure of representations, RankMe (Garrido et al. 2023). Once an epoch it
    may decompose: :func:`mmfast.functional.effective_rank`, of another order and never above it, is for every step.
    """
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(p).sum().exp().float()
