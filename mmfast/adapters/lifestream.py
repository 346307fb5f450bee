"""The loss of pytorch-lifestream, ``ptls.frames.coles.losses.BarlowTwinsLoss``."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.barlow_twins import TwoViewLoss, evaluate_barlow_twins
from mmfast.ops.barlow_twins.checks import check_dense
from mmfast.ops.barlow_twins.definition import Definition, Request

OP = "lifestream.BarlowTwinsLoss"
NAMES = ("model_outputs[::2]", "model_outputs[1::2]")


class BarlowTwinsLoss(TwoViewLoss):
    """pytorch-lifestream's Barlow Twins loss of interleaved rows: 0, 2, 4, ... are one view, 1, 3, 5, ... the other.

    Embeddings are taken as they are: to standardise them is the model's task. ``last`` are the components of the
    latest call.

    Raises:
        UserError: rows or targets that are not pairs. On GPUs, which nobody waits for, targets are not looked at.
    """

    def __init__(self, lambd: float):
        super().__init__()
        self.lambd = check_number(OP, "lambd", lambd, 0)

    def forward(self, model_outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of the embeddings (2 B, D), given whose they are (2 B)."""
        check_dense(OP, "model_outputs", model_outputs)
        check_dense(OP, "target", target)
        for name, x in (("model_outputs", model_outputs), ("target", target)):
            if x.dim() < 1:
                raise UserError(f"{OP}: {name} must have rows, got the shape ()")
        if len(model_outputs) % 2 or len(target) != len(model_outputs):
            raise UserError(
                f"{OP}: model_outputs and target must have one even number of rows, "
                f"got {len(model_outputs)} and {len(target)}"
            )
        if not target.is_cuda and not torch.equal(target[::2], target[1::2]):
            row = 2 * int((target[::2] != target[1::2]).nonzero()[0])
            raise UserError(
                f"{OP}: target must be the same in rows 2 i and 2 i + 1, "
                f"got {target[row].item()} and {target[row + 1].item()} in rows {row} and {row + 1}"
            )
        request = Request(Definition(self.lambd, center=False, normalise=False))
        a, b = model_outputs[::2], model_outputs[1::2]
        return self._kept(*evaluate_barlow_twins(a, b, request, op=OP, names=NAMES))
