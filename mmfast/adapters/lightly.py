"""``from lightly.loss import BarlowTwinsLoss`` becomes ``from mmfast.adapters.lightly import BarlowTwinsLoss``."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins

OP = "lightly.BarlowTwinsLoss"


class BarlowTwinsLoss(TwoViewLoss):
    """lightly's Barlow Twins loss; ``last`` are the components of the latest call.

    ``gather_distributed`` takes the mean of C over the processes, each with the statistics of its own rows.

    Raises:
        UserError: ``gather_distributed`` where PyTorch comes without torch.distributed.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False):
        super().__init__()
        self.lambda_param = check_number(OP, "lambda_param", lambda_param, 0)
        self.gather_distributed = check_bool(OP, "gather_distributed", gather_distributed)
        if self.gather_distributed and not dist.is_available():
            raise UserError(f"{OP}: gather_distributed must be False without torch.distributed, got True")

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "local" if self.gather_distributed else None
        options = Options(self.lambda_param, variant="lightly", stats=stats)
        return self._kept(*evaluate_barlow_twins(z_a, z_b, options.request(), op=OP))
