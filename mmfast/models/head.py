"""The supervised heads."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.checks import check_dropout, check_integer
from mmfast.models.projector import check_vectors


class LinearHead(nn.Module):
    """One linear layer, fused vector to what a task asks for; no activation (M3 and the thesis).

    Args:
        in_features: size of the fused vector.
        outputs: numbers, classes or labels.
        dropout: probability of dropout before the layer.

    Call: (B, in_features) -> (B, outputs).
    """

    def __init__(self, in_features: int, outputs: int = 1, *, dropout: float = 0.0):
        super().__init__()
        op = type(self).__name__
        in_features = check_integer(op, "in_features", in_features, 1)
        self.dropout = nn.Dropout(check_dropout(op, dropout))
        self.linear = nn.Linear(in_features, check_integer(op, "outputs", outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        check_vectors(type(self).__name__, x, self.linear.in_features)
        return self.linear(self.dropout(x))


class RegressionHead(LinearHead):
    """A :class:`LinearHead` of one number.

    Args:
        in_features: size of the fused vector.
        dropout: probability of dropout before the layer.

    Call: (B, in_features) -> (B,).
    """

    def __init__(self, in_features: int, *, dropout: float = 0.0):
        super().__init__(in_features, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)
