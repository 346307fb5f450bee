"""The projector between encoder and self-supervised loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from mmfast.checks import check_integer, told
from mmfast.errors import UserError
from mmfast.models.layers.batch_norm import SharedBatchNorm


class Projector(nn.Sequential):
    """Linear, BatchNorm, ReLU for every width but the last, then one Linear; no Linear has a bias.

    The projector of Barlow Twins (Zbontar et al. 2021): 2,104,000 parameters for 100-1000-1000-1000.

    Args:
        in_features: size of the fused vector.
        widths: sizes of the layers' outputs, at least one; ``out_features`` is the last.

    Call: (B, in_features) -> (B, out_features); in training mode B must be at least 2 (BatchNorm).
    """

    def __init__(self, in_features: int, widths: Sequence[int] = (1000, 1000, 1000)):
        if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
            raise UserError(
                f"Projector: widths must be a sequence of one integer or more, got {told(widths)}"
            )
        named = {"in_features": in_features} | {f"widths[{i}]": width for i, width in enumerate(widths)}
        sizes = [check_integer("Projector", name, size, 1) for name, size in named.items()]
        layers: list[nn.Module] = []
        for size, width in pairwise(sizes[:-1]):
            layers += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.in_features, self.out_features = in_features, sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        # Of the rows of all processes this one may have none.
        shared = any(isinstance(layer, SharedBatchNorm) for layer in self)
        check_vectors("Projector", x, self.in_features, least=0 if shared else 1)
        if self.training and len(self) > 1 and len(x) == 1 and not shared:
            raise UserError("Projector: a batch must hold at least two samples in training mode, got 1")
        return super().forward(x)


def check_vectors(op: str, x: Tensor, features: int, least: int = 1) -> None:
    """(B, features) with B >= ``least``, 0 or 1."""
    if x.dim() != 2 or x.shape[1] != features:
        raise UserError(f"{op}: the input must have the shape (B, {features}), got {tuple(x.shape)}")
    if len(x) < least:
        raise UserError(f"{op}: the batch is empty; it must hold at least one sample")
