"""The self-supervised phase: encoder and projector under Barlow Twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mmfast.data import MultimodalBatch
from mmfast.errors import UserError
from mmfast.training.checkpoint import RECORD
from mmfast.training.seeds import derive


class Pretraining(pl.LightningModule):
    """Two augmented views of a batch through one encoder and projector; Barlow Twins between the embeddings.

    Each epoch logs means over steps of ``train_loss``, ``train_on_diagonal``, ``train_off_diagonal`` (before the
    weight lambda), ``train_mean_diagonal`` (mean c_ii, 1 is perfect invariance) and ``train_off_diagonal_rms``.

    There is no validation loss. Augmentation is off in validation, so both views are the same, c_ii is 1 and
    nothing of invariance is left to measure; augmented validation views would measure the luck of a draw as well.
    What the clean embeddings of the validation split can tell is redundancy, over the whole split at once:
    ``valid_off_diagonal_rms`` of the embeddings, and ``valid_effective_rank`` of the fused vectors. Nothing is
    selected by them: all epochs are run and the last weights count.

    Args:
        encoder: (values, lengths, padding) -> (B, out_features).
        projector: (B, out_features) -> (B, D).
        views: :class:`~mmfast.transforms.TwoViews`.
        loss: :class:`~mmfast.losses.BarlowTwinsLoss`.
        lr: learning rate of Adam.
        seed: of the draws of every step, together with the step's number.
        record: what a checkpoint says of itself.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        views: nn.Module,
        loss: nn.Module,
        lr: float,
        seed: int,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.views, self.loss = encoder, projector, views, loss
        self.lr, self.seed, self.record = lr, seed, record or {}
        self._clean: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def on_train_batch_start(self, batch: MultimodalBatch, batch_idx: int) -> None:
        # Dropout draws from the global state: tied to the step, it does not remember where a run was interrupted.
        torch.manual_seed(derive(self.seed, "pretraining step", self.global_step))

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        seed = derive(self.seed, "views", self.global_step)
        views = self.views(batch.values, batch.lengths, ids=batch.ids, seed=seed, padding=batch.padding)
        z_a, z_b = (self.projector(self.encoder(view, batch.lengths, batch.padding)) for view in views)
        loss = self._evaluated(self.loss, z_a, z_b)
        check_finite(loss, "loss", self._progress())
        parts = {f"train_{name}": value for name, value in self.loss.last._asdict().items()}
        self.log_dict(parts, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def _progress(self) -> Progress:
        return Progress("pretraining", self.global_step, "pretraining.lr", self.lr, "loss.lambd")

    def _evaluated(self, function: Callable, z_a: Tensor, z_b: Tensor) -> Any:
        try:
            return function(z_a, z_b)
        except UserError as error:
            # Sizes are right by construction, so that it can only be about the values.
            for z in (z_a, z_b):
                check_finite(z, "embeddings", self._progress())
            raise UserError(
                f"{self._progress().diverged('embeddings became too large')} ({error})"
            ) from error

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        fused = self.encoder(batch.values, batch.lengths, batch.padding)
        self._clean.append((fused, self.projector(fused)))

    def on_validation_epoch_end(self) -> None:
        fused, z = (torch.cat(parts) for parts in zip(*self._clean, strict=True))
        self._clean.clear()
        if len(z) > 1:
            check_finite(fused, "fused vectors", self._progress())
            components = self._evaluated(self.loss.components, z, z)
            self.log("valid_off_diagonal_rms", components.off_diagonal_rms)
            self.log("valid_effective_rank", effective_rank(fused))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self.record


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred ``x`` (N, D): 1 to min(N - 1, D).

    Roy & Vetterli 2007; as a label-free measure of representations, RankMe (Garrido et al. 2023). Once an epoch it
    may decompose: :func:`mmfast.functional.effective_rank`, of another order and never above it, is for every step.
    """
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.special.entr(p).sum().exp().float()


class Progress(NamedTuple):
    """Where training stands, for what is said when it goes wrong.

    Attributes:
        phase: ``pretraining`` or ``supervised``.
        step: optimiser steps done.
        setting, lr: name and value of the learning rate.
        other: what beside the data may be too large before any step.
    """

    phase: str
    step: int
    setting: str
    lr: float
    other: str

    def diverged(self, what: str) -> str:
        """The sentence, with what to look at: before the first step it cannot be the learning rate."""
        causes = f"huge values in the data or {self.other}" if not self.step else "huge values in the data"
        lower = f"lower {self.setting}, {self.lr:g} now, or " if self.step else ""
        return f"{self.phase}: the {what} at step {self.step}; {lower}look for {causes}"


def check_finite(value: Tensor, what: str, progress: Progress) -> None:
    """One sentence instead of weights full of NaN."""
    wrong = ~torch.isfinite(value)
    if wrong.any():
        raise UserError(progress.diverged(f"{what} became {value[wrong][0].item()}"))
