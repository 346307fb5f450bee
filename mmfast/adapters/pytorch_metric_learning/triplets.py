"""Triplet margin loss by pytorch-metric-learning's name and call signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmfast.adapters.pytorch_metric_learning.base import check_labels, dictionary
from mmfast.adapters.pytorch_metric_learning.distances import PEER, check_distance
from mmfast.adapters.pytorch_metric_learning.miners import BatchHardMiner, Mined, all_triplets
from mmfast.adapters.pytorch_metric_learning.pairs import check_indices, scores
from mmfast.adapters.pytorch_metric_learning.reducers import check_reducer, reduced
from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.losses.similarity import nothing
from mmfast.losses.triplet import _Call, _TripletLoss
from mmfast.ops.similarity.checks import check_rows, refuse_not_finite
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared
from mmfast.ops.similarity.triplet_passes import Options

OP = PEER + "TripletMarginLoss"
# Reducer -> what the mean is over, of all triplets and of the hardest ones.
OVER = {
    "AvgNonZeroReducer": ("nonzero", "nonzero"),
    "MeanReducer": ("triplets", "anchors"),
    "SumReducer": ("nonzero", "nonzero"),
}


class TripletMarginLoss(_TripletLoss):
    """pytorch-metric-learning's triplet margin loss: by default of unit rows' distances, the mean of terms above 0.

    Given labels, or what a miner of here found for the same embeddings, no triplets are made. References, tuples of
    indices, ``smooth_loss`` and the rules that are none of ``mmfast.functional.triplet_margin`` (a miner's margin
    below the loss's, its own distance, the mean of all that it found) are computed in plain PyTorch, triplet by
    triplet.

    Raises:
        UserError: ``swap``, ``triplets_per_anchor`` other than "all", distances other than LpDistance, cosines and
            inner products, other reducers, a regularizer.
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: str = "all",
        *,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
    ):
        super().__init__()
        if check_bool(OP, "swap", swap):
            raise UserError(f"{OP}: swap must be False, got True")
        if triplets_per_anchor != "all":
            raise UserError(f"{OP}: triplets_per_anchor must be 'all', got {triplets_per_anchor!r}")
        if embedding_regularizer is not None:
            raise UserError(f"{OP}: embedding_regularizer must be None, got a regularizer")
        check_distance(OP, distance)
        check_reducer(OP, reducer, "AvgNonZeroReducer")
        self._take(margin=check_number(OP, "margin", margin, 0))
        self._take(smooth_loss=check_bool(OP, "smooth_loss", smooth_loss))
        self.distance, self.reducer = distance, reducer

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss of embeddings (B, D) with labels (B,), against ref_emb (C, D) with ref_labels (C,) if given."""
        rows = "embeddings", check_rows(OP, "embeddings", embeddings)
        if labels is None and indices_tuple is None:
            raise UserError(f"{OP}: labels must be given without indices_tuple, got None")
        score = check_distance(OP, self.distance)
        name = check_reducer(OP, self.reducer, "AvgNonZeroReducer")
        if ref_emb is None and name in OVER and not self.smooth_loss:
            kind = self._kind(embeddings, labels, indices_tuple, score, name)
            if kind is not None:
                labels = check_labels(OP, "labels", labels, rows)
                if len(embeddings) < 2:
                    refuse_not_finite(OP, {"embeddings": embeddings})
                    same = labels, labels
                    return self._nothing(
                        nothing(embeddings), Compared(embeddings, None, same, None, None, score)
                    )
                options = Options(kind, self.margin, ties=True)
                over = OVER[name][kind == "batch_hard"]
                reduction = "sum" if name == "SumReducer" else "mean"
                call = _Call(OP, options, score, over, reduction, Sharing(OP, None), "embeddings")
                return self._kept(call(embeddings, labels, None, None, None))
        refs = embeddings if ref_emb is None else check_rows(OP, "ref_emb", ref_emb, rows)
        refuse_not_finite(OP, {"embeddings": embeddings, "ref_emb": refs})
        triplets = self._triplets(embeddings, labels, indices_tuple, ("ref_emb", refs), ref_emb, ref_labels)
        return self._of_triplets(scores(embeddings, refs, score), triplets, name)

    def _kind(self, embeddings, labels, indices, score, name) -> str | None:
        """The engine's name of what is asked for, or None."""
        if indices is None:
            return "all"
        if (
            not isinstance(indices, Mined)
            or indices.embeddings is not embeddings
            or indices.labels is not labels
            or indices.ref_emb is not None
            or indices.miner.score != score
        ):
            return None
        miner = indices.miner
        if isinstance(miner, BatchHardMiner):
            return "batch_hard"
        kind = miner.type_of_triplets
        within = miner.margin >= (0 if kind == "hard" else self.margin)
        return kind if within and kind != "easy" and name != "MeanReducer" else None

    def _triplets(self, embeddings, labels, indices, refs, ref_emb, ref_labels) -> tuple[Tensor, ...]:
        if indices is not None:
            if isinstance(indices, Mined):
                return indices.triplets()
            a1, p, a2, n = check_indices(OP, indices, embeddings.device)
            if len(indices) == 3:
                return a1, p, n
            of_p, of_n = torch.where(a1[:, None] == a2)
            return a1[of_p], p[of_p], n[of_n]
        itself = ref_emb is None or ref_labels is None or ref_labels is labels
        ref_labels = labels if ref_labels is None else ref_labels
        labels = check_labels(OP, "labels", labels, ("embeddings", embeddings))
        same = labels[:, None] == check_labels(OP, "ref_labels", ref_labels, refs)
        return all_triplets(same.clone().fill_diagonal_(False) if itself else same, ~same)

    def _of_triplets(self, s: Tensor, triplets: tuple[Tensor, ...], name: str) -> Any:
        a, p, n = triplets
        x = s[a, n] - s[a, p]
        if not len(a):
            zero = self._nothing(nothing(s))
            if name == "DoNothingReducer":
                return {"loss": {"losses": 0, "indices": None, "reduction_type": "already_reduced"}}
            return zero
        losses = softplus(x + self.margin) if self.smooth_loss else (x + self.margin).relu()
        loss = losses.sum() if name == "DoNothingReducer" else reduced(name, losses, torch.ones_like(losses))
        with torch.no_grad():
            easy, hard = (x + self.margin <= 0).sum(), (x >= 0).sum()
            numbers = torch.stack((easy, len(x) - easy - hard, hard)).to(s.dtype)
            facts = torch.cat((torch.stack((loss, loss.new_tensor(len(a.unique())))), numbers))
        self._kept((loss, facts, None))
        return dictionary(losses, triplets, "triplet") if name == "DoNothingReducer" else loss

    def _nothing(self, zero: Tensor, compared: Compared | None = None) -> Tensor:
        return self._kept((zero, torch.zeros(5, dtype=zero.dtype, device=zero.device), compared))
