"""The supervised head."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.checks import check_integer
from mmfast.models.layers.attention import check_dropout
from mmfast.models.projector import check_vectors


class RegressionHead(nn.Module):
    """One linear layer, fused vector to one number; no activation (M3 and the thesis).

    Args:
        in_features: size of the fused vector.
        dropout: probability of dropout before the layer.

    Call: (B, in_features) -> (B,).
    """

    def __init__(self, in_features: int, *, dropout: float = 0.0):
        super().__init__()
        in_features = check_integer("RegressionHead", "in_features", in_features, 1)
        self.dropout = nn.Dropout(check_dropout("RegressionHead", dropout))
        self.linear = nn.Linear(in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_vectors("RegressionHead", x, self.linear.in_features)
        return self.linear(self.dropout(x)).squeeze(1)
