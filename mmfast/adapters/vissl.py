"""The loss of VISSL, ``vissl.losses.barlow_twins_loss.BarlowTwinsCriterion``."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.functional import barlow_twins


class BarlowTwinsCriterion(nn.Module):
    """VISSL's Barlow Twins loss of one tensor: all rows of the first view, then all rows of the second.

    Statistics are those of both views together and of all processes, which is wrong for views of different
    modalities. Gradients are divided by the number of processes.

    Raises:
        UserError: an embedding that is not (2 B, ``embedding_dim``).
    """

    def __init__(self, lambda_: float, scale_loss: float, embedding_dim: int):
        super().__init__()
        self.lambda_, self.scale_loss, self.embedding_dim = lambda_, scale_loss, embedding_dim

    def forward(self, embedding: Tensor) -> Tensor:
        """The loss of the embeddings (2 B, D) of both views."""
        shape = tuple(embedding.shape)
        if len(shape) != 2 or shape[0] % 2 or shape[1] != self.embedding_dim:
            raise UserError(
                f"vissl.BarlowTwinsCriterion: embedding must have an even number of rows and {self.embedding_dim} "
                f"columns, got {shape}"
            )
        z_a, z_b = embedding.chunk(2)
        options = {"variant": "vissl", "grad_convention": "legacy"}
        return barlow_twins(z_a, z_b, self.lambda_, scale=self.scale_loss, **options)
