"""``from lightly.loss import BarlowTwinsLoss`` becomes ``from mmfast.adapters.lightly import BarlowTwinsLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.functional import barlow_twins


class BarlowTwinsLoss(nn.Module):
    """lightly's Barlow Twins loss.

    ``gather_distributed`` takes the mean of C over the processes, each with the statistics of its own rows.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False):
        super().__init__()
        self.lambda_param, self.gather_distributed = lambda_param, gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "local" if self.gather_distributed else None
        return barlow_twins(z_a, z_b, self.lambda_param, variant="lightly", stats=stats)
