"""Networks as a configuration describes them."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.tasks import Task
from mmfast.training.config import Config
from mmfast.training.encoder import make_encoder
from mmfast.training.module import StageModule
from mmfast.training.objectives import OBJECTIVES
from mmfast.training.seeds import derive
from mmfast.training.stages import Stage


def make_module(
    config: Config,
    features: dict[str, int],
    stage: Stage,
    record: dict[str, Any] | None = None,
    task: Task | None = None,
) -> StageModule:
    """Encoder and objectives of a stage; weights are a function of ``config.run.seed`` and the parts' names.

    ``task`` is what a stage with labels learns.

    Raises:
        UserError: settings that a part refuses, or a monitor that the objectives do not log.
    """
    seed = config.run.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights of the encoder"))
        encoder = make_encoder(config.model, features)
        objectives = {}
        for name in stage.objectives:
            kind = OBJECTIVES[name]
            if kind.parts:
                torch.manual_seed(derive(seed, f"weights of the {kind.parts[0]}"))
            objectives[name] = kind.load().of(config, stage, encoder, task)
    return StageModule(encoder, objectives, stage, seed, record)
