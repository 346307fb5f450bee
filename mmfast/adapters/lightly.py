"""``from lightly.loss import BarlowTwinsLoss, NTXentLoss``: the same from ``mmfast.adapters.lightly``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.checks import check_bool, check_number, told
from mmfast.errors import UserError
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins
from mmfast.losses.contrastive import _positions
from mmfast.losses.similarity import Call, SimilarityLoss, Variant
from mmfast.ops.similarity.checks import check_rows

OP = "lightly.BarlowTwinsLoss"
NT_XENT = "lightly.NTXentLoss"


def _check_gathering(op: str, gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise UserError(f"{op}: gather_distributed must be False without torch.distributed, got True")


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
        _check_gathering(OP, self.gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        stats = "local" if self.gather_distributed else None
        options = Options(self.lambda_param, variant="lightly", stats=stats)
        return self._kept(*evaluate_barlow_twins(z_a, z_b, options.request(), op=OP))


def _check_bank(size: int | Sequence[int]) -> None:
    if isinstance(size, str) or not isinstance(size, (int, Sequence)):
        raise TypeError(f"{NT_XENT}: memory_bank_size must be 0, got {told(size)}")
    if size if isinstance(size, int) else any(size):
        raise UserError(
            f"{NT_XENT}: memory_bank_size must be 0 (mmfast.InfoNCELoss takes a queue), got {size}"
        )


class NTXentLoss(SimilarityLoss):
    """lightly's NT-Xent loss of two views; ``last`` are the components of the latest call.

    ``gather_distributed``: the loss is that of the rows of all processes, on each process.

    Raises:
        UserError: a temperature that is not above 0; a memory bank (``mmfast.InfoNCELoss`` takes a queue);
            ``gather_distributed`` where PyTorch comes without torch.distributed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        temperature = check_number(NT_XENT, "temperature", temperature, 0, ends="(]")
        _check_bank(memory_bank_size)
        gather_distributed = check_bool(NT_XENT, "gather_distributed", gather_distributed)
        _check_gathering(NT_XENT, gather_distributed)
        self._take(temperature=temperature, gather_distributed=gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        rows = "out0", check_rows(NT_XENT, "out0", out0)
        if len(check_rows(NT_XENT, "out1", out1, rows)) != len(out0):
            raise UserError(
                f"{NT_XENT}: out1 must have the {len(out0)} rows of out0, got {tuple(out1.shape)}"
            )
        sharing = "global" if self.gather_distributed else None, "true", None
        call = Call(NT_XENT, "mean", "anchors", sharing)
        place = _positions(call.sharing, len(out0), out0.device)
        vectors = [None, torch.cat((place, place)), None, None]
        z = torch.cat((out0, out1))
        return self._kept(call.against_themselves(z, vectors, self.temperature, Variant("out"), True))
