"""Optimisers, learning rates and averages of weights, as a stage's settings describe them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.training.config import StageSettings

OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# A monitor is better by more than this share of it; the rate is not lowered by less than that.
THRESHOLD, LEAST_CHANGE = 1e-4, 1e-8


def make_optimiser(
    settings: StageSettings, parameters: Iterable[nn.Parameter], lr: float, scaled: bool = False
) -> torch.optim.Optimizer:
    """Adam or AdamW for the parameters that learn at any time of the stage.

    ``scaled``: a scaler of gradients is at work, with which a fused step cannot be clipped. On a CPU the default is
    the loop over weights, whose bits are those of earlier versions.
    """
    parameters = list(parameters)
    fused = settings.fused
    if fused is None:
        fused = not scaled and all(p.device.type == "cuda" for p in parameters)
    kind = OPTIMISERS[settings.optimiser]
    return kind(parameters, lr=lr, weight_decay=settings.weight_decay, fused=fused or None)


class Schedule:
    """The learning rate of each step: a warm-up times a shape; only a plateau remembers anything.

    Args:
        settings: of the stage.
        lr: highest rate.
    """

    def __init__(self, settings: StageSettings, lr: float) -> None:
        self.settings, self.lr = settings, lr
        self._best: float | None = None
        self._waited = 0

    def rate(self, step: int, steps: int) -> float:
        """Of a step, from 0, of so many of the whole stage."""
        warm = self.settings.warmup_steps
        lr = self.lr
        if step < warm:
            lr *= (step + 1) / warm
        elif self.settings.schedule == "cosine":
            lr *= (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2
        return lr

    def epoch_ends(self, value: float | None) -> None:
        """After each epoch, with the value of the monitor; counts as PyTorch's ReduceLROnPlateau does."""
        settings = self.settings
        if settings.schedule != "plateau":
            return
        if self._best is None or self._better(value):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if self._waited > settings.plateau_patience:
            lower = self.lr * settings.plateau_factor
            self.lr, self._waited = (lower if self.lr - lower > LEAST_CHANGE else self.lr), 0

    def _better(self, value: float) -> bool:
        if self.settings.better == "lower":
            return value < self._best * (1 - THRESHOLD)
        return value > self._best * (1 + THRESHOLD)

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.lr, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lr, self._best, self._waited = state["lr"], state["best"], state["waited"]


class Average:
    """Exponential moving average of a network's weights; buffers and integers are those of the latest step.

    Args:
        decay: per step; step t, from 0, takes no more than (1 + t) / (10 + t), so that the first weights are soon
            forgotten.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        learnt = {name for name, _ in module.named_parameters()}
        for name, tensor in module.state_dict().items():
            if name in learnt and name in self.state:
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name] = tensor.clone()

    def exchange(self, module: nn.Module) -> None:
        """Put the average into the network and its weights here; a second call takes it back."""
        own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if self.state:
            module.load_state_dict(self.state)
            self.state = own
