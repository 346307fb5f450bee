"""VICReg by pytorch-metric-learning's name and call signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmfast.adapters.pytorch_metric_learning.distances import PEER
from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.vicreg import KeepsVICReg, Options, evaluate_vicreg

OP = PEER + "VICRegLoss"


class VICRegLoss(KeepsVICReg):
    """pytorch-metric-learning's VICReg loss of embeddings and ``ref_emb`` (B, D); ``last`` are its components.

    Raises:
        UserError: labels, a tuple of indices, a reducer; no references, or fewer than 2 rows.
    """

    def __init__(
        self,
        invariance_lambda: float = 25,
        variance_mu: float = 25,
        covariance_v: float = 1,
        eps: float = 1e-4,
        *,
        reducer: Any = None,
    ):
        super().__init__()
        if reducer is not None:
            raise UserError(f"{OP}: reducer must be None, got {type(reducer).__name__}")
        self.invariance_lambda = check_number(OP, "invariance_lambda", invariance_lambda, 0)
        self.variance_mu = check_number(OP, "variance_mu", variance_mu, 0)
        self.covariance_v = check_number(OP, "covariance_v", covariance_v, 0)
        self.eps = check_number(OP, "eps", eps, 0)

    def forward(
        self,
        embeddings: Tensor,
        labels: None = None,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: None = None,
    ) -> Tensor:
        """The loss of two views' embeddings (B, D)."""
        given = {"labels": labels, "indices_tuple": indices_tuple, "ref_labels": ref_labels}
        for name, x in given.items():
            if x is not None:
                raise UserError(f"{OP}: {name} must be None, got {type(x).__name__}")
        numbers = self.invariance_lambda, self.variance_mu, self.covariance_v, self.eps
        options = Options(*numbers, stats=None)
        return self._kept(evaluate_vicreg(embeddings, ref_emb, options, OP, ("embeddings", "ref_emb")))
