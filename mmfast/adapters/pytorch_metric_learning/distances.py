"""What rows are compared by. Objects of pytorch-metric-learning itself do as well."""

from __future__ import annotations

from typing import Any

from mmfast.errors import UserError


class DotProductSimilarity:
    """Inner products, of unit rows unless ``normalize_embeddings`` is False."""

    def __init__(self, normalize_embeddings: bool = True, p: int = 2, power: int = 1):
        self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power


class CosineSimilarity(DotProductSimilarity):
    """Cosines."""

    def __init__(self, p: int = 2, power: int = 1):
        super().__init__(True, p, power)


def check_similarity(op: str, distance: Any) -> bool:
    """Whether rows are to be normalised, None for cosines.

    Raises:
        UserError: other distances, norms and powers.
    """
    if distance is None:
        return True
    name = type(distance).__name__
    if name not in ("CosineSimilarity", "DotProductSimilarity"):
        raise UserError(f"{op}: distance must be CosineSimilarity or DotProductSimilarity, got {name}")
    if (distance.p, distance.power) != (2, 1):
        raise UserError(
            f"{op}: distance must have p = 2 and power = 1, got {distance.p} and {distance.power}"
        )
    return bool(distance.normalize_embeddings)
