"""The supervised head."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.models.projector import check_vectors


class RegressionHead(nn.Module):
    """One linear layer, fused vector to one number; no activation (M3 and the thesis).

    Args:
        in_features: size of the fused vector.
        dropout: probability of dropout before the layer.

    Call: (B, in_features) -> (B,).
    """

    def __init__(self, in_features: int, dropout: float = 0.0):
        super().__init__()
        if in_features < 1:
            raise UserError(f"RegressionHead: in_features must be at least 1, got {in_features}")
        if not 0 <= dropout < 1:
            raise UserError(f"RegressionHead: dropout must lie in [0, 1), got {dropout}")
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_vectors("RegressionHead", x, self.linear.in_features)
        return self.linear(self.dropout(x)).squeeze(1)
