"""The loss of pytorch-lifestream, ``ptls.frames.coles.losses.BarlowTwinsLoss``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.ops.barlow_twins import barlow_twins


class BarlowTwinsLoss(nn.Module):
    """pytorch-lifestream's Barlow Twins loss of interleaved rows: 0, 2, 4, ... are one view, 1, 3, 5, ... the other.

    Embeddings are taken as they are: to standardise them is the model's task.

    Raises:
        UserError: rows or targets that are not pairs. On GPUs, which nobody waits for, targets are not looked at.
    """

    def __init__(self, lambd: float):
        super().__init__()
        self.lambd = lambd

    def forward(self, model_outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of the embeddings (2 B, D), given whose they are (2 B)."""
        if len(model_outputs) % 2 or len(target) != len(model_outputs):
            raise UserError(
                "lifestream.BarlowTwinsLoss: model_outputs and target must have one even number of rows, "
                f"got {len(model_outputs)} and {len(target)}"
            )
        if not target.is_cuda and not torch.equal(target[::2], target[1::2]):
            row = 2 * int((target[::2] != target[1::2]).nonzero()[0])
            raise UserError(
                "lifestream.BarlowTwinsLoss: target must be the same in rows 2 i and 2 i + 1, "
                f"got {target[row].item()} and {target[row + 1].item()} in rows {row} and {row + 1}"
            )
        options = {"center": False, "normalise": False}
        return barlow_twins(model_outputs[::2], model_outputs[1::2], self.lambd, **options)[0]
