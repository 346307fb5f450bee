"""``from lightly.loss import BarlowTwinsLoss`` becomes ``from mmfast.adapters.lightly import BarlowTwinsLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.adapters._world import one_process
from mmfast.functional import barlow_twins


class BarlowTwinsLoss(nn.Module):
    """lightly's Barlow Twins loss.

    Raises:
        UserError: ``gather_distributed`` in a process group of more than one process.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False):
        super().__init__()
        self.lambda_param, self.gather_distributed = lambda_param, gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        if self.gather_distributed:
            one_process("lightly.BarlowTwinsLoss")
        return barlow_twins(z_a, z_b, self.lambda_param, variant="lightly")
