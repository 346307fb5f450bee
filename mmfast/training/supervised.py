"""The supervised phase: encoder and linear head under MAE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mmfast.data import MultimodalBatch, MultimodalDataset
from mmfast.training.checkpoint import RECORD
from mmfast.training.config import SupervisedConfig
from mmfast.training.predictions import encode
from mmfast.training.pretraining import Progress, check_finite
from mmfast.training.seeds import derive


class Supervised(pl.LightningModule):
    """Regression with mean absolute error over the labelled samples of a batch.

    Each epoch logs ``train_loss``, ``valid_loss`` (MAE over the whole split) and ``lr``.

    Args:
        encoder: (values, lengths, padding) -> (B, out_features).
        head: (B, out_features) -> (B,).
        settings: learning rate and plateau schedule.
        freeze: linear evaluation: only the head learns, and the encoder stays in evaluation mode (no dropout).
        seed: of dropout, together with the step's number.
        record: what a checkpoint says of itself.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        settings: SupervisedConfig,
        freeze: bool = False,
        seed: int = 0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.settings, self.freeze_encoder, self.seed, self.record = settings, freeze, seed, record or {}
        encoder.requires_grad_(not freeze)
        self._rows: dict[int, int] = {}
        self._fused: Tensor | None = None

    def train(self, mode: bool = True) -> Supervised:
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """Predictions (B,)."""
        return self.head(self._encode(batch))

    def _encode(self, batch: MultimodalBatch) -> Tensor:
        if self._fused is None:
            return self.encoder(batch.values, batch.lengths, batch.padding)
        rows = [self._rows[i] for i in batch.ids.tolist()]
        return self._fused[rows].to(batch.ids.device)

    @contextlib.contextmanager
    def encoded(self, *datasets: MultimodalDataset) -> Iterator[None]:
        """Within the context, samples of these data sets are encoded once, now, and not again in every epoch.

        Does nothing unless the encoder is frozen.
        """
        if self.freeze_encoder:
            vectors = [encode(self.encoder, dataset) for dataset in datasets]
            ids = torch.cat([dataset.ids for dataset in datasets]).tolist()
            self._rows, self._fused = {i: row for row, i in enumerate(ids)}, torch.cat(vectors)
        try:
            yield
        finally:
            self._rows, self._fused = {}, None

    def _lr(self) -> tuple[str, float]:
        """Name and value of the setting."""
        linear = self.freeze_encoder and self.settings.linear_lr is not None
        name = "linear_lr" if linear else "lr"
        return f"supervised.{name}", getattr(self.settings, name)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self._lr()[1])
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=self.settings.plateau_factor, patience=self.settings.plateau_patience
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "valid_loss"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Nothing: Lightning calls this after the epoch's checkpoint, which would lose the step on resuming."""

    def on_train_epoch_end(self) -> None:
        """Before the epoch's checkpoint is written, so that it holds the schedule's state."""
        self.lr_schedulers().step(self.trainer.callback_metrics["valid_loss"])

    def on_train_epoch_start(self) -> None:
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def on_train_batch_start(self, batch: MultimodalBatch, batch_idx: int) -> None:
        torch.manual_seed(derive(self.seed, "supervised step", self.global_step))

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor | None:
        loss, count = self._mae(batch)
        if not count:
            return None
        check_finite(loss, "loss", self._progress())
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=count)
        return loss

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        loss, count = self._mae(batch)
        if count:
            check_finite(loss, "validation loss", self._progress())
            self.log("valid_loss", loss, batch_size=count)

    def _progress(self) -> Progress:
        return Progress("supervised", self.global_step, *self._lr(), "the weights it started from")

    def _mae(self, batch: MultimodalBatch) -> tuple[Tensor, int]:
        labelled = ~batch.labels.isnan()
        errors = (self(batch)[labelled] - batch.labels[labelled]).abs()
        return errors.mean(), int(labelled.sum())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self.record
