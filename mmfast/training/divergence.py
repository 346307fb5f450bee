"""Training that goes wrong is told in one sentence, with what to look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.errors import UserError


class Progress(NamedTuple):
    """Where training stands, for what is said when it goes wrong.

    Attributes:
        phase: name of the stage.
        step: optimiser steps done.
        setting, lr: name and value of the learning rate.
        other: what beside the data may be too large before any step.
    """

    phase: str
    step: int
    setting: str
    lr: float
    other: str = "the weights it started from"

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
