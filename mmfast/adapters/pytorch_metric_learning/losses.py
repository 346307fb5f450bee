"""Losses by pytorch-metric-learning's names and call signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapters.pytorch_metric_learning.base import PairLoss, check_labels
from mmfast.adapters.pytorch_metric_learning.distances import PEER
from mmfast.adapters.pytorch_metric_learning.n_pairs import NPairsLoss as NPairsLoss
from mmfast.adapters.pytorch_metric_learning.triplets import TripletMarginLoss as TripletMarginLoss
from mmfast.adapters.pytorch_metric_learning.vicreg import VICRegLoss as VICRegLoss
from mmfast.checks import check_bool, check_integer
from mmfast.errors import UserError
from mmfast.losses.queue import EmbeddingQueue
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.checks import check_rows, check_valid, refuse_not_finite
from mmfast.ops.similarity.rows import joined
from mmfast.ops.similarity.shared import Sharing


class NTXentLoss(PairLoss):
    """pytorch-metric-learning's NT-Xent: positive pairs against the negatives of their anchors, mean of the pairs.

    It is ``mmfast.NTXentLoss(temperature, variant="pml")`` of labelled rows, but 0 where a batch has no negatives.

    Raises:
        UserError: distances other than CosineSimilarity and DotProductSimilarity with p = 2 and power = 1, reducers
            other than AvgNonZero, Mean, Sum and DoNothing, a regularizer.
    """

    _op, _kind, _default_reducer = PEER + "NTXentLoss", "negatives", "MeanReducer"

    def __init__(self, temperature: float = 0.07, **options: Any):
        super().__init__(temperature, **options)


class SupConLoss(PairLoss):
    """pytorch-metric-learning's SupCon: the mean of the rows with a loss above 0; 0 without any negative.

    Raises:
        UserError: as :class:`NTXentLoss`.
    """

    _op, _kind, _default_reducer = PEER + "SupConLoss", "out", "AvgNonZeroReducer"

    def __init__(self, temperature: float = 0.1, **options: Any):
        super().__init__(temperature, **options)


def _check_loss(op: str, loss: Any, kinds: tuple[type, ...]) -> nn.Module:
    if not isinstance(loss, kinds):
        names = (
            "NTXentLoss, SupConLoss or TripletMarginLoss" if len(kinds) > 1 else "NTXentLoss or SupConLoss"
        )
        raise TypeError(f"{op}: loss must be {names} of here, got {type(loss).__name__}")
    return loss


class SelfSupervisedLoss(nn.Module):
    """A loss of embeddings and ``ref_emb`` (B, D), whose row i is another view of row i.

    ``symmetric``: both are anchors and candidates; else embeddings are anchors and ``ref_emb`` the candidates.
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True):
        super().__init__()
        op = PEER + "SelfSupervisedLoss"
        self.loss = _check_loss(op, loss, (PairLoss, TripletMarginLoss))
        self.symmetric = check_bool(op, "symmetric", symmetric)

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Any:
        op = PEER + "SelfSupervisedLoss"
        rows = "embeddings", check_rows(op, "embeddings", embeddings)
        if len(check_rows(op, "ref_emb", ref_emb, rows)) != len(embeddings):
            raise UserError(
                f"{op}: ref_emb must have the {len(embeddings)} rows of embeddings, got {tuple(ref_emb.shape)}"
            )
        labels = torch.arange(len(embeddings), device=embeddings.device)

        def call():
            if self.symmetric:
                return self.loss(joined(embeddings, ref_emb), torch.cat((labels, labels)))
            return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())

        return Sharing(op, None).named({"embeddings": embeddings, "ref_emb": ref_emb}, None, call)


class CrossBatchMemory(nn.Module):
    """A loss of a batch against the latest ``memory_size`` rows, those of the batch among them, detached.

    Rows enter the queue before the loss; a row's own copy is none of its positives. With ``enqueue_mask`` (B,) the
    rows that it names enter, and the others are the anchors. All of the queue is in ``state_dict()``.

    Raises:
        UserError: a miner, a tuple of indices, or more rows than ``memory_size``.
    """

    def __init__(self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: Any = None):
        super().__init__()
        self._op = PEER + "CrossBatchMemory"
        self.loss = _check_loss(self._op, loss, (PairLoss,))
        if miner is not None:
            raise UserError(f"{self._op}: miner must be None, got {type(miner).__name__}")
        self.embedding_size = check_integer(self._op, "embedding_size", embedding_size, 1)
        self.memory_size = check_integer(self._op, "memory_size", memory_size, 1)
        self.queue = EmbeddingQueue(memory_size, embedding_size)

    def reset_queue(self) -> None:
        """Empties the queue."""
        self.queue.reset()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        """The loss of embeddings (B, D) with labels (B,)."""
        op, queue = self._op, self.queue
        rows = "embeddings", check_rows(op, "embeddings", embeddings)
        queue.check(op, *rows)
        labels = check_labels(op, "labels", labels, rows)
        # Before they are in the queue.
        refuse_not_finite(op, {"embeddings": embeddings})
        if indices_tuple is not None:
            raise UserError(f"{op}: indices_tuple must be None, got {type(indices_tuple).__name__}")
        if self.loss._name() == "DoNothingReducer" and self.loss._kind == "negatives":
            raise UserError(f"{op}: loss must have another reducer than DoNothingReducer")
        own = None
        if enqueue_mask is None:
            if len(embeddings) > self.memory_size:
                raise UserError(
                    f"{op}: embeddings must have memory_size rows at most ({self.memory_size}), "
                    f"got {tuple(embeddings.shape)}"
                )
            own = (queue.head + torch.arange(len(embeddings), device=embeddings.device)) % self.memory_size
            entering = embeddings, labels
        else:
            enqueue_mask = check_valid(op, "enqueue_mask", enqueue_mask, rows)
            entering = embeddings[enqueue_mask], labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        queue.enqueue(entering[0].detach(), labels=entering[1], normalise=False)
        q = embeddings.to(compute_dtype(embeddings))
        # Later steps write into the buffers.
        pairs = labels, queue.labels.clone()
        return self.loss._of_labels(q, queue.rows.to(q.dtype, copy=True), pairs, own, queue.valid)
