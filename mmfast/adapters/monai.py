"""``from monai.losses import BarlowTwinsLoss`` becomes ``from mmfast.adapters.monai import BarlowTwinsLoss``."""

from __future__ import annotations

from torch import Tensor

from mmfast.checks import check_number
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins

OP = "monai.BarlowTwinsLoss"


class BarlowTwinsLoss(TwoViewLoss):
    """MONAI's Barlow Twins loss, of each process for itself; ``last`` are the components of the latest call."""

    def __init__(self, lambd: float = 5e-3):
        super().__init__()
        self.lambd = check_number(OP, "lambd", lambd, 0)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        request = Options(self.lambd, variant="monai", stats=None).request()
        names = ("input", "target")
        return self._kept(*evaluate_barlow_twins(input, target, request, op=OP, names=names))
