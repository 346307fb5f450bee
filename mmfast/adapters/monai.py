"""``from monai.losses import BarlowTwinsLoss`` becomes ``from mmfast.adapters.monai import BarlowTwinsLoss``."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.functional import barlow_twins


class BarlowTwinsLoss(nn.Module):
    """MONAI's Barlow Twins loss, of each process for itself."""

    def __init__(self, lambd: float = 5e-3):
        super().__init__()
        self.lambd = lambd

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        return barlow_twins(input, target, self.lambd, variant="monai", stats=None)
