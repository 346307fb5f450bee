"""Stages in folders of their own, alone or by all processes of a gloo group."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.models.encoders.base import Encoder
from mmfast.training import processes, runs
from mmfast.training.folder import claim
from mmfast.training.module import StageModule
from mmfast.training.parsing import config_of
from mmfast.training.splits import load_data, make_splits
from mmfast.training.stages import Stage

SETTINGS = {
    "data": {
        "synthetic": {
            "samples": 80,
            "labelled": 0.5,
            "max_length": 6,
            "missing": 0.3,
            "features": {"text": 8, "audio": 6, "visual": 4},
        }
    },
    "model": {"hidden": 8, "projector": [16, 16], "dropout": 0.0},
    "pretraining": {"batch_size": 17, "epochs": 3},
    # 29 labelled samples: the last step of an epoch has one of them.
    "supervised": {"batch_size": 7, "epochs": 4, "lr": 0.01, "plateau_patience": 0},
    "run": {
        "accelerator": "cpu",
        "threads": 1,
        "tensorboard": False,
        "checkpoint_seconds": 0,
        "progress": "off",
    },
}


class Outcome(NamedTuple):
    """What a stage came to: the loss of each step, and the result file's content."""

    losses: list[float]
    result: dict[str, Any]


def run(
    folder: Path,
    objectives: dict[str, float],
    settings: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
    source: Path | None = None,
    precision: str = "64-true",
    stop: int | None = None,
) -> Outcome:
    """A stage of :data:`SETTINGS`, in all processes of the group if there is one.

    Args:
        settings: of the stage, beside the defaults of its section.
        sections: of the configuration, in the place of those here.
        stop: raise :class:`Stopped` in this step.
    """
    torch.set_num_threads(1)
    section = "supervised" if "supervised" in objectives else "pretraining"
    config = config_of({**SETTINGS, **(sections or {})})
    run = replace(config.run, folder=str(folder), devices=processes.world_size(), precision=precision)
    config = replace(config, run=run)
    stage = Stage(section, objectives, replace(getattr(config, section), **(settings or {})), section)
    splits = make_splits(load_data(config.data), config.data, config.run.seed)
    place = claim(folder, asdict(config), None, {"data.path": splits.identity})
    losses, log, step = [], StageModule._log, StageModule.training_step

    def recorded(self, quantities, weight):
        if "train_loss" in quantities:
            losses.append(quantities["train_loss"].item())
        log(self, quantities, weight)

    def stopping(self, *arguments):
        if self.global_step == stop:
            raise Stopped
        return step(self, *arguments)

    def fitted(module, *arguments, **options):
        history = fit(module, *arguments, **options)
        module.float()  # test samples are
        return history

    fit = runs.fit
    StageModule._log, StageModule.training_step, runs.fit = recorded, stopping, fitted
    try:
        return Outcome(losses, runs.run_stage(config, stage, splits, place, source))
    finally:
        StageModule._log, StageModule.training_step, runs.fit = log, step, fit


def together(_, *arguments: Any) -> Outcome | None:
    """:func:`run` in a process of a group; None where it was stopped."""
    # As if it had been launched, so that Lightning launches nothing.
    os.environ["LOCAL_RANK"] = str(processes.rank())
    os.environ.setdefault("MASTER_PORT", "0")
    try:
        return run(*arguments)
    except Stopped:
        return None


class Stopped(BaseException):
    """Stands for a kill where a whole process for each would be too slow."""


class Pooled(Encoder):
    """Means over time, batch normalised, with a term of its own; a modality that no sample has is not encoded."""

    def __init__(self, features: dict[str, int], hidden: int = 8):
        super().__init__(features)
        self.layers = nn.ModuleDict({name: nn.Linear(size, hidden) for name, size in features.items()})
        self.norm = nn.BatchNorm1d(hidden)
        self.out_features = hidden

    def encode(self, values, lengths, padding="back") -> dict[str, Tensor | None]:
        steps = self.steps(values, lengths, padding)
        return {
            name: self.layers[name](x.values.sum(1) / x.lengths.clamp_min(1)[:, None])
            * (x.lengths > 0)[:, None]
            if (x.lengths > 0).any()
            else None
            for name, x in steps.items()
        }

    def fuse(self, representations, without=()) -> Tensor:
        return self.norm(sum(x for x in representations.values() if x is not None))

    def auxiliary(self, representations) -> dict[str, Tensor]:
        return {"size": sum(x.square().mean() for x in representations.values() if x is not None)}
