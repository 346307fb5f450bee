"""Each modality of a sample is a view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.losses import MultiViewBarlowTwinsLoss
from mmfast.training.config import Config
from mmfast.training.divergence import check_finite
from mmfast.training.encoder import vector_sizes
from mmfast.training.objectives.base import Objective, Step, Terms
from mmfast.training.objectives.two_views import evaluated, make_projector
from mmfast.training.processes import total

if TYPE_CHECKING:
    from mmfast.tasks import Task
    from mmfast.training.stages import Stage


class ManyViews(Objective):
    """Barlow Twins of all pairs of modalities, on their vectors before fusion, through one projector a width.

    A sample counts for the pairs of modalities that it has both of. Beside the loss each epoch logs
    ``train_mean_diagonal_<a>_<b>`` of every pair. What fuses the modalities gets no gradient from it.

    Args:
        projectors: width of a modality's vector -> (B, width) -> (B, D).
        loss: :class:`~mmfast.losses.MultiViewBarlowTwinsLoss`.
        modalities: in the order of their pairs.
    """

    suspect = "loss.lambd"

    def __init__(self, projectors: nn.ModuleDict, loss: nn.Module, modalities: tuple[str, ...]) -> None:
        self.projectors, self.loss, self.modalities = projectors, loss, modalities
        self.parts = {"view_projectors": projectors}

    @classmethod
    def of(cls, config: Config, stage: Stage, encoder: nn.Module, task: Task | None = None) -> ManyViews:
        names = tuple(encoder.features)
        if len(names) < 2:
            raise UserError(
                f"config: {stage.where}.objectives must fit the data, many_views needs 2 modalities, got {names[0]}"
            )
        widths = dict.fromkeys(vector_sizes(encoder).values())
        projectors = nn.ModuleDict({str(width): make_projector(config, width) for width in widths})
        options = config.loss.options if config.loss.name == "barlow_twins" else {}
        try:
            loss = MultiViewBarlowTwinsLoss(
                **{"lambd": config.loss.lambd, "center": config.loss.center, **options}
            )
        except TypeError as error:
            raise UserError(f"config: loss.options must fit the loss barlow_twins: {error}") from error
        return cls(projectors, loss, names)

    def __call__(self, step: Step) -> Terms:
        vectors = step.encoder.vectors(step.representations)
        present = {name: step.batch.lengths[name].to(vectors[name].device) > 0 for name in self.modalities}
        views = {name: self._projected(vectors[name], present[name]) for name in self.modalities}
        loss = evaluated(lambda: self.loss(views, present), tuple(views.values()), step.progress)
        check_finite(loss, "loss", step.progress)
        pairs = {
            f"mean_diagonal_{a}_{b}": parts.mean_diagonal
            for (a, b), parts in self.loss.last.items()
            if parts.mean_diagonal.isfinite()
        }
        return Terms(loss, {"loss": loss.detach(), **pairs}, step.samples)

    def _projected(self, vectors: Tensor, present: Tensor) -> Tensor:
        """(B, D); batch norm sees the samples that have the modality, and there are zeros for the others."""
        projector = self.projectors[str(vectors.shape[1])]
        out = vectors.new_zeros(len(vectors), projector.out_features)
        # Of all processes, for batch norm is over all of them and needs each.
        if int(total(present.sum())) < 2:
            return out
        if present.all():
            return projector(vectors)
        z = projector(vectors[present])
        return out.to(z.dtype).masked_scatter(present[:, None], z)
