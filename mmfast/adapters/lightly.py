"""``from lightly.loss import BarlowTwinsLoss`` becomes ``from mmfast.adapters.lightly import BarlowTwinsLoss``.

So does ``VICRegLoss``.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.losses import vicreg
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins

OP = "lightly.BarlowTwinsLoss"
VICREG = "lightly.VICRegLoss"


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


class VICRegLoss(vicreg.KeepsVICReg):
    """lightly's VICReg loss; ``last`` are the components of the latest call.

    ``gather_distributed`` takes the loss of the rows of all processes. Its gradients are lightly's; its value has the
    invariance of all rows, where lightly's has that of the process's own.

    Raises:
        UserError: ``gather_distributed`` where PyTorch comes without torch.distributed; embeddings that
            are not (B, D).
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ):
        super().__init__()
        self.lambda_param = check_number(VICREG, "lambda_param", lambda_param, 0)
        self.mu_param = check_number(VICREG, "mu_param", mu_param, 0)
        self.nu_param = check_number(VICREG, "nu_param", nu_param, 0)
        self.eps = check_number(VICREG, "eps", eps, 0)
        self.gather_distributed = check_bool(VICREG, "gather_distributed", gather_distributed)
        if self.gather_distributed and not dist.is_available():
            raise UserError(f"{VICREG}: gather_distributed must be False without torch.distributed, got True")

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "global" if self.gather_distributed else None
        options = vicreg.Options(self.lambda_param, self.mu_param, self.nu_param, self.eps, stats=stats)
        return self._kept(vicreg.evaluate_vicreg(z_a, z_b, options, op=VICREG))
