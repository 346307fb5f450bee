"""The loss of VISSL, ``vissl.losses.barlow_twins_loss.BarlowTwinsCriterion``."""

from __future__ import annotations

from torch import Tensor

from mmfast.checks import check_integer, check_number
from mmfast.errors import UserError
from mmfast.losses.barlow_twins import Options, TwoViewLoss, evaluate_barlow_twins
from mmfast.ops.barlow_twins.checks import check_dense

OP = "vissl.BarlowTwinsCriterion"


class BarlowTwinsCriterion(TwoViewLoss):
    """VISSL's Barlow Twins loss of one tensor: all rows of the first view, then all rows of the second.

    Statistics are those of both views together and of all processes, which is wrong for views of different
    modalities. Gradients are divided by the number of processes. ``last`` are the components of the latest call.

    Raises:
        UserError: an embedding that is not (2 B, ``embedding_dim``).
    """

    def __init__(self, lambda_: float, scale_loss: float, embedding_dim: int):
        super().__init__()
        self.lambda_ = check_number(OP, "lambda_", lambda_, 0)
        self.scale_loss = check_number(OP, "scale_loss", scale_loss, 0)
        self.embedding_dim = check_integer(OP, "embedding_dim", embedding_dim, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """The loss of the embeddings (2 B, D) of both views."""
        check_dense(OP, "embedding", embedding)
        shape = tuple(embedding.shape)
        if len(shape) != 2 or shape[0] % 2 or shape[1] != self.embedding_dim:
            raise UserError(
                f"{OP}: embedding must have an even number of rows and {self.embedding_dim} "
                f"columns, got {shape}"
            )
        rows = shape[0] // 2
        options = Options(self.lambda_, variant="vissl", scale=self.scale_loss, grad_convention="legacy")
        views = embedding[:rows], embedding[rows:]
        names = f"embedding[:{rows}]", f"embedding[{rows}:]"
        return self._kept(*evaluate_barlow_twins(*views, options.request(), op=OP, names=names))
