"""What rows are compared by. Objects of pytorch-metric-learning itself do as well."""

from __future__ import annotations

from typing import Any

from mmfast.errors import UserError

PEER = "pytorch_metric_learning."


class DotProductSimilarity:
    """Inner products, of unit rows unless ``normalize_embeddings`` is False."""

    def __init__(self, normalize_embeddings: bool = True, p: int = 2, power: int = 1):
        self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power


class CosineSimilarity(DotProductSimilarity):
    """Cosines."""

    def __init__(self, p: int = 2, power: int = 1):
        super().__init__(True, p, power)


class LpDistance:
    """Euclidean distances, of unit rows unless ``normalize_embeddings`` is False; ``power`` 2: squared."""

    def __init__(self, normalize_embeddings: bool = True, p: int = 2, power: int = 1):
        self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power


def check_distance(op: str, distance: Any) -> str:
    """The score of triplets, None for distances of unit rows.

    Raises:
        UserError: other distances, norms and powers.
    """
    name = "LpDistance" if distance is None else type(distance).__name__
    if name in ("CosineSimilarity", "DotProductSimilarity"):
        return "cosine" if check_similarity(op, distance) else "dot"
    if name != "LpDistance":
        raise UserError(
            f"{op}: distance must be LpDistance, CosineSimilarity or DotProductSimilarity, got {name}"
        )
    found = (True, 2, 1) if distance is None else (distance.normalize_embeddings, distance.p, distance.power)
    names = {(True, 2, 1): "unit_euclidean", (False, 2, 1): "euclidean", (False, 2, 2): "sqeuclidean"}
    if found not in names:
        raise UserError(
            f"{op}: distance must have p = 2, and power = 1 (or 2 of rows as they are), "
            f"got {found[1]} and {found[2]}"
        )
    return names[found]


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
