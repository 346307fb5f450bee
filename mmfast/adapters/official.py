"""The model of facebookresearch/barlowtwins, which returns its loss."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.checks import check_number
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins

OP = "official.BarlowTwins"


class BarlowTwins(TwoViewLoss):
    """``loss = model(y1, y2)``: both views through backbone and projector, and the loss of the projections.

    The official model builds its ResNet-50 and projector from ``args``; here they are given. Parameters have the
    official names. Two things are not taken over: C is divided by the number of rows there are, not by
    ``args.batch_size``; and there are no running statistics (``bn.*`` in the official checkpoints), so ``eval()``
    does not change the loss.

    With several processes statistics and C are those of all rows (the official BatchNorm is synchronised), and
    gradients are divided by the number of processes, as the official learning rates want it. ``last`` are the
    components of the latest call. In errors z1 and z2 are the projections of y1 and y2.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, lambd: float = 0.0051):
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.lambd = check_number(OP, "lambd", lambd, 0)

    def forward(self, y1: Tensor, y2: Tensor) -> Tensor:
        """The loss of two views of a batch."""
        z1, z2 = (self.projector(self.backbone(y)) for y in (y1, y2))
        request = Options(self.lambd, grad_convention="legacy").request()
        return self._kept(*evaluate_barlow_twins(z1, z2, request, op=OP, names=("z1", "z2")))
