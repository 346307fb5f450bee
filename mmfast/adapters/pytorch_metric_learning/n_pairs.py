"""N-pair loss by pytorch-metric-learning's name and call signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.pytorch_metric_learning.base import check_labels, dictionary
from mmfast.adapters.pytorch_metric_learning.distances import PEER, check_similarity
from mmfast.adapters.pytorch_metric_learning.miners import Mined
from mmfast.adapters.pytorch_metric_learning.pairs import check_indices
from mmfast.adapters.pytorch_metric_learning.reducers import check_reducer, reduced
from mmfast.errors import UserError
from mmfast.losses.similarity import SimilarityLoss
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.checks import check_rows
from mmfast.ops.similarity.op import similarity
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared

OP = PEER + "NPairsLoss"


class NPairsLoss(SimilarityLoss):
    """N-pair loss (Sohn, NeurIPS 2016): the first row of each class against the second rows of all.

    Scores are inner products, of unit rows unless ``distance=DotProductSimilarity(normalize_embeddings=False)``.
    Without a tuple of indices and with a reducer no device is waited for.

    Raises:
        UserError: references, other distances and reducers, a regularizer.
    """

    def __init__(self, *, distance: Any = None, reducer: Any = None, embedding_regularizer: Any = None):
        super().__init__()
        if embedding_regularizer is not None:
            raise UserError(f"{OP}: embedding_regularizer must be None, got a regularizer")
        check_similarity(OP, distance)
        check_reducer(OP, reducer, "MeanReducer")
        self._take(distance=distance, reducer=reducer)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        ref_emb: None = None,
        ref_labels: None = None,
    ) -> Any:
        """The loss of embeddings (B, D) with labels (B,)."""
        rows = "embeddings", check_rows(OP, "embeddings", embeddings)
        if ref_emb is not None or ref_labels is not None:
            raise UserError(f"{OP}: ref_emb and ref_labels must be None, got references")
        labels = check_labels(OP, "labels", labels, rows)
        name = check_reducer(OP, self.reducer, "MeanReducer")
        cosine = check_similarity(OP, self.distance)
        if isinstance(indices_tuple, Mined):
            indices_tuple = indices_tuple.triplets()
        if indices_tuple is None:
            anchors, positives, there = _first_pairs(labels)
        else:
            anchors, positives = check_indices(OP, indices_tuple, labels.device)[:2]
            there = _first_of(labels[anchors])
        if name == "DoNothingReducer":
            order = labels[anchors[there]].argsort()
            anchors, positives = anchors[there][order], positives[there][order]
            there = torch.ones_like(anchors, dtype=torch.bool)
        place = torch.arange(len(anchors), device=labels.device)
        scale = torch.ones((), dtype=compute_dtype(embeddings), device=labels.device)
        q, k = embeddings[anchors], embeddings[positives]
        pairs = (place, place), None, (there, there)
        values, counts = Sharing(OP, None).named(
            {"embeddings": embeddings}, None, lambda: similarity(q, k, *pairs, scale, None, "out", cosine)
        )
        compared = Compared(q, k, *pairs, "cosine" if cosine else "dot")
        facts = counts.sum().detach()
        if name == "DoNothingReducer":
            self._kept((values, torch.stack((values.detach().sum(), facts, facts)), compared))
            return dictionary(values, anchors, "element")
        loss = reduced(name, values, counts)
        return self._kept((loss, torch.stack((loss.detach(), facts, facts)), compared))


def _first_of(labels: Tensor) -> Tensor:
    """(n,) bool: the first of each label."""
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    new = torch.ones_like(labels, dtype=torch.bool)
    new[1:] = sorted_labels[1:] != sorted_labels[:-1]
    return torch.empty_like(new).index_copy_(0, order, new)


def _first_pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, for each the one of its label that is next, and whether it is the first and there is one."""
    order = labels.argsort(stable=True)
    following = order.roll(-1)
    paired = torch.empty_like(labels).index_copy_(0, order, following)
    there = _first_of(labels) & (labels[paired] == labels)
    rows = torch.arange(len(labels), device=labels.device)
    return rows, paired, there & (paired != rows)
