"""Losses of pairs of labelled rows, as pytorch-metric-learning takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.adapters.pytorch_metric_learning.distances import check_similarity
from mmfast.adapters.pytorch_metric_learning.miners import Mined
from mmfast.adapters.pytorch_metric_learning.pairs import (
    all_pairs,
    check_indices,
    nt_xent_pairs,
    scores,
    sup_con_rows,
)
from mmfast.adapters.pytorch_metric_learning.reducers import check_reducer, reduced
from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.similarity import SimilarityLoss, nothing
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.checks import check_integers, check_rows, refuse_not_finite
from mmfast.ops.similarity.op import similarity
from mmfast.ops.similarity.own import own_first
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared


class PairLoss(SimilarityLoss):
    """What both losses share: pairs of equal labels are positive, others negative.

    Without a tuple of indices no scores of all pairs are kept; with one (real ones, of pairs or triplets) the loss is
    computed in plain PyTorch, with all scores in memory.
    """

    _op: str
    _kind: str
    _default_reducer: str

    def __init__(
        self, temperature: float, *, distance: Any = None, reducer: Any = None, embedding_regularizer=None
    ):
        super().__init__()
        if embedding_regularizer is not None:
            raise UserError(f"{self._op}: embedding_regularizer must be None, got a regularizer")
        temperature = check_number(self._op, "temperature", temperature, 0, ends="(]")
        self._take(temperature=temperature)
        self.distance, self.reducer = distance, reducer
        check_similarity(self._op, distance)
        check_reducer(self._op, reducer, self._default_reducer)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """The loss of embeddings (B, D) with labels (B,), against ref_emb (C, D) with ref_labels (C,) if given.

        If ``ref_labels`` is the very object ``labels``, row i of ``ref_emb`` is row i itself, and no positive.
        """
        op = self._op
        rows = "embeddings", check_rows(op, "embeddings", embeddings)
        if labels is None and indices_tuple is None:
            raise UserError(f"{op}: labels must be given without indices_tuple, got None")
        itself = ref_emb is None or ref_labels is None or ref_labels is labels
        others = rows if ref_emb is None else ("ref_emb", check_rows(op, "ref_emb", ref_emb, rows))
        labels = None if labels is None else check_labels(op, "labels", labels, rows)
        if ref_emb is None:
            ref_labels = labels
        elif labels is not None and indices_tuple is None:
            ref_labels = labels if ref_labels is None else ref_labels
            ref_labels = check_labels(op, "ref_labels", ref_labels, others)
        if isinstance(indices_tuple, Mined):
            indices_tuple = indices_tuple.triplets()
        if indices_tuple is not None:
            return self._of_indices(check_indices(op, indices_tuple, embeddings.device), embeddings, ref_emb)
        if self._name() == "DoNothingReducer" and self._kind == "negatives":
            return self._of_indices(all_pairs(labels, ref_labels, itself), embeddings, ref_emb)
        others = None if ref_emb is None else others[1]
        own = torch.arange(len(embeddings), device=embeddings.device) if itself else None
        return self._of_labels(embeddings, others, (labels, ref_labels), own, None)

    def _name(self) -> str:
        return check_reducer(self._op, self.reducer, self._default_reducer)

    def _of_labels(self, q, k, labels, own, valid) -> Any:
        """k: None for q itself; own: rows of k that are those of q; valid: which rows of k there are, or None."""
        dtype = compute_dtype(q)
        if k is None and len(q) < 2:
            refuse_not_finite(self._op, {"embeddings": q})
            facts = torch.zeros(3, dtype=dtype, device=q.device)
            return self._kept((nothing(q), facts, Compared(q, None, labels, None, None, "cosine")))
        cosine = check_similarity(self._op, self.distance)
        scale = torch.full((), 1 / self.temperature, dtype=dtype, device=q.device)
        there = None
        if valid is not None:
            there = torch.ones(len(q), dtype=torch.bool, device=q.device), valid
        views = {"embeddings": q} | ({} if k is None else {"ref_emb": k})
        some = _any_negative(*labels, valid)
        itself, pairs = own is not None, (labels, None, there)
        if k is not None and itself:
            k, *pairs = own_first(q, k, own, *pairs)
        values, counts = Sharing(self._op, None).named(
            views, None, lambda: similarity(q, k, *pairs, scale, None, self._kind, cosine, itself)
        )
        compared = Compared(q, k, *pairs, "cosine" if cosine else "dot", itself)
        # Without any negative both losses are 0.
        values = torch.where(some, values, 0)
        with torch.no_grad():
            facts = (counts > 0).to(dtype).sum(), counts.sum()
        if self._name() == "DoNothingReducer":
            rows = torch.arange(len(q), device=q.device)
            self._kept((values, torch.stack((values.detach().sum(), *facts)), compared))
            return dictionary(values, rows, "element")
        of_pairs = self._kind == "negatives"
        loss = reduced(self._name(), values, counts if of_pairs else torch.ones_like(values))
        return self._kept((loss, torch.stack((loss.detach(), *facts)), compared))

    def _of_indices(self, indices: tuple[Tensor, ...], q: Tensor, k: Tensor | None) -> Any:
        refuse_not_finite(self._op, {"embeddings": q} | ({} if k is None else {"ref_emb": k}))
        cosine = check_similarity(self._op, self.distance)
        score = "cosine" if cosine else "dot"
        logits = scores(q, q if k is None else k, score) / self.temperature
        if not len(indices[0]) or not len(indices[2]):
            losses = (logits.sum() * 0)[None]
            indices = tuple(x[:0] for x in indices)
        else:
            losses = (nt_xent_pairs if self._kind == "negatives" else sup_con_rows)(logits, indices)
        with torch.no_grad():
            facts = logits.new_tensor([len(indices[0].unique()), len(indices[0])])
        if self._name() == "DoNothingReducer":
            self._kept((losses, torch.cat((losses.detach().sum()[None], facts)), None))
            if not len(indices[0]):
                return {"loss": {"losses": 0, "indices": None, "reduction_type": "already_reduced"}}
            if self._kind == "negatives":
                return dictionary(losses, indices[:2], "pos_pair")
            return dictionary(losses, torch.arange(len(q), device=q.device), "element")
        loss = reduced(self._name(), losses, torch.ones_like(losses))
        return self._kept((loss, torch.cat((loss.detach()[None], facts)), None))


def dictionary(losses: Tensor, indices: Any, kind: str) -> dict[str, dict[str, Any]]:
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}


def check_labels(op: str, name: str, labels: Any, rows: tuple[str, Tensor]) -> Tensor:
    if isinstance(labels, Tensor):
        labels = labels.to(rows[1].device)
        labels = labels.long() if labels.dtype == torch.bool else labels
    return check_integers(op, name, labels, rows)


def _any_negative(labels: Tensor, others: Tensor, valid: Tensor | None) -> Tensor:
    first = labels[:1]
    several, apart = labels != first, others != first
    if valid is not None:
        several, apart = several & valid.any(), apart & valid
    elif not len(others):
        several = several & False
    return several.any() | apart.any()
