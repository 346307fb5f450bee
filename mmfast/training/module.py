"""The one network that is trained: an encoder, and whatever parts a stage's objectives own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mmfast.data import MultimodalBatch, MultimodalDataset
from mmfast.errors import UserError
from mmfast.tasks import Task
from mmfast.training.checkpoint import RECORD
from mmfast.training.divergence import Progress
from mmfast.training.objectives.base import Objective, Step
from mmfast.training.optimisers import Average, Schedule, make_optimiser
from mmfast.training.predictions import encode
from mmfast.training.processes import rank
from mmfast.training.seeds import derive
from mmfast.training.stages import Stage
from mmfast.wording import guess

# Entries of a checkpoint to resume from: the schedule's state; weights that are not averaged, beside the average.
SCHEDULE, RAW = "mmfast schedule", "mmfast weights"


class StageModule(pl.LightningModule):
    """A stage's network, its loss and its optimiser.

    Each epoch logs what the objectives log, as means over steps with ``train_`` in front, and ``lr`` unless it is
    constant. The loss is the weighted sum of the objectives', ``train_loss``; of several the terms are logged as
    ``train_<objective>`` beside it.

    Every draw is a function of (seed, step), and of the sample where it can be: nothing random outlives a step, so
    that a run which was interrupted repeats the draws of one that was not.

    Args:
        encoder: (values, lengths, padding) -> (B, out_features).
        objectives: name -> objective, as ``stage.objectives`` names them.
        stage: weights of the objectives, optimiser, schedule, frozen parts.
        seed: of the draws of every step.
        record: what a checkpoint says of itself.

    Raises:
        UserError: a monitor that nothing logs.
    """

    def __init__(
        self,
        encoder: nn.Module,
        objectives: Mapping[str, Objective],
        stage: Stage,
        seed: int = 0,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        for objective in objectives.values():
            for name, part in objective.parts.items():
                setattr(self, name, part)
        self.objectives = dict(objectives)
        self.stage, self.seed, self.record = stage, seed, record or {}
        self.schedule = Schedule(stage.settings, stage.rate[1])
        self._steps = 1
        self.average = Average(stage.settings.ema) if stage.settings.ema else None
        self._rows: dict[int, int] = {}
        self._fused: Tensor | None = None
        self._frozen = self._frozen_in(0)
        for name in self.parts:
            # What thaws is the optimiser's from the beginning; see on_train_epoch_start.
            getattr(self, name).requires_grad_(not stage.always_frozen(name))
        self._check_monitor()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that the network consists of."""
        return self.stage.parts

    @property
    def thaws(self) -> bool:
        """Whether a part learns from a later epoch on: until then its parameters have no gradients."""
        return any(self.stage.frozen(name, 0) and not self.stage.always_frozen(name) for name in self.parts)

    @property
    def task(self) -> Task:
        """What the head's outputs are."""
        return self.objectives["supervised"].task

    @property
    def cached(self) -> bool:
        """Whether each sample need be encoded only once."""
        return self.stage.always_frozen("encoder") and all(o.fused for o in self.objectives.values())

    @property
    def logs(self) -> tuple[str, ...]:
        """Names of all that is logged."""
        return tuple(dict.fromkeys(name for o in self.objectives.values() for name in o.logs()))

    def _check_monitor(self) -> None:
        wanted = self.stage.settings.monitor
        if wanted is not None and wanted not in self.logs:
            raise UserError(
                f"config: {self.stage.where}.monitor must be one of {', '.join(self.logs)}, which this stage logs, "
                f"got {wanted!r}{guess(wanted, self.logs)}"
            )

    def _frozen_in(self, epoch: int) -> frozenset[str]:
        return frozenset(name for name in self.parts if self.stage.frozen(name, epoch))

    def train(self, mode: bool = True) -> StageModule:
        super().train(mode)
        for name in self._frozen:
            getattr(self, name).eval()
        return self

    def forward(self, batch: MultimodalBatch) -> Tensor:
        """The head's outputs."""
        return self.head(self._step(batch).fused)

    def _step(self, batch: MultimodalBatch) -> Step:
        step = self.global_step

        def seed(purpose: str) -> int:
            return derive(self.seed, self.stage.purpose(purpose), step)

        return Step(self.encoder, batch, self._progress(), seed, self._known(batch))

    def _known(self, batch: MultimodalBatch) -> Tensor | None:
        if self._fused is None:
            return None
        rows = [self._rows[i] for i in batch.ids.tolist()]
        return self._fused[rows].to(batch.ids.device)

    def _progress(self, objective: Objective | None = None) -> Progress:
        progress = Progress(self.stage.name, self.global_step, *self.stage.rate)
        return progress if objective is None else progress._replace(other=objective.suspect)

    @contextlib.contextmanager
    def encoded(self, *datasets: MultimodalDataset) -> Iterator[None]:
        """Within the context, samples of these data sets are encoded once, now, and not again in every epoch.

        Does nothing unless all that is learnt is behind a frozen encoder.
        """
        if self.cached:
            vectors = [encode(self.encoder, dataset) for dataset in datasets]
            ids = torch.cat([dataset.ids for dataset in datasets]).tolist()
            self._rows, self._fused = {i: row for row, i in enumerate(ids)}, torch.cat(vectors)
        try:
            yield
        finally:
            self._rows, self._fused = {}, None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learn = [p for p in self.parameters() if p.requires_grad]
        scaled = self._trainer is not None and self._trainer.precision == "16-mixed"
        return make_optimiser(self.stage.settings, learn, self.stage.rate[1], scaled)

    def configure_gradient_clipping(self, optimizer, *_: Any, **__: Any) -> None:
        if (clip := self.stage.settings.clip) is not None:
            self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")

    def on_train_start(self) -> None:
        self._steps = int(self.trainer.estimated_stepping_batches)

    def on_train_epoch_start(self) -> None:
        for objective in self.objectives.values():
            objective.begins(self.current_epoch + 1, self.stage.settings.epochs)
        self._frozen = self._frozen_in(self.current_epoch)
        for name in self.parts:
            part = getattr(self, name)
            part.requires_grad_(name not in self._frozen)
            part.train(name not in self._frozen)
        if self.stage.settings.schedule != "constant" or self.stage.settings.warmup_steps:
            self.log("lr", self._set_rate())

    def _set_rate(self) -> float:
        rate = self.schedule.rate(self.global_step, self._steps)
        for group in self.optimizers().param_groups:
            group["lr"] = rate
        return rate

    def on_train_batch_start(self, batch: MultimodalBatch, batch_idx: int) -> None:
        self._set_rate()
        # Dropout draws from the global state: tied to the step, it does not remember where a run was interrupted.
        # Processes have other samples in the same rows, so that each draws for itself.
        process = [rank()] if rank() else []
        torch.manual_seed(derive(self.seed, f"{self.stage.name} step", self.global_step, *process))

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor | None:
        step = self._step(batch)
        found = {}
        for name, objective in self.objectives.items():
            step.progress = self._progress(objective)
            if (terms := objective(step)) is not None:
                found[name] = terms
        if not found:
            return None
        shares = {name: self.stage.objectives[name] for name in found}
        whole = sum(terms.logged["loss"] * shares[name] for name, terms in found.items())
        self._log({"train_loss": whole}, next(iter(found.values())).weight)
        for name, terms in found.items():
            logged = {f"train_{key}": value for key, value in terms.logged.items() if key != "loss"}
            if len(self.objectives) > 1:
                logged[f"train_{name}"] = terms.logged["loss"]
            self._log(logged, terms.weight)
        return sum(terms.loss * shares[name] for name, terms in found.items())

    def _log(self, quantities: Mapping[str, Tensor], weight: float) -> None:
        self.log_dict(dict(quantities), on_step=False, on_epoch=True, batch_size=weight)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.average is not None:
            self.average.update(self, self.global_step - 1)

    def on_validation_start(self) -> None:
        if self.average is not None:
            self.average.exchange(self)

    def on_validation_end(self) -> None:
        if self.average is not None:
            self.average.exchange(self)

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        step = self._step(batch)
        for objective in self.objectives.values():
            step.progress = self._progress(objective)
            if (terms := objective.validate(step)) is not None:
                self._log({f"valid_{key}": value for key, value in terms.logged.items()}, terms.weight)

    def on_validation_epoch_end(self) -> None:
        for objective in self.objectives.values():
            for key, value in objective.validated(self._progress(objective)).items():
                self.log(f"valid_{key}", value)

    def on_train_epoch_end(self) -> None:
        """Before the epoch's checkpoint is written, so that it holds the schedule's state."""
        monitor = self.stage.settings.monitor
        value = None if monitor is None else self.trainer.callback_metrics[monitor].item()
        self.schedule.epoch_ends(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self.record
        resumable = "optimizer_states" in checkpoint
        if resumable:
            checkpoint[SCHEDULE] = self.schedule.state_dict()
        if self.average is not None:
            if resumable:
                checkpoint[RAW] = checkpoint["state_dict"]
            checkpoint["state_dict"] = self.average.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.schedule.load_state_dict(checkpoint[SCHEDULE])
        if self.average is not None:
            self.average.state = {
                name: tensor.to(self.device).clone() for name, tensor in checkpoint["state_dict"].items()
            }
            checkpoint["state_dict"] = checkpoint.pop(RAW)
