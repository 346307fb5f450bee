"""Losses of sentence-transformers as functions of embeddings.

There the losses own the encoder; here is what they compute of its output, to be the body of a
``compute_loss_from_embeddings``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.pairs import evaluate_pairs
from mmfast.losses.similarity import nothing
from mmfast.losses.triplet import _Call
from mmfast.ops.similarity.checks import check_integers, check_rows, refuse_not_finite
from mmfast.ops.similarity.rows import joined
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.triplet_passes import Options

PEER = "sentence_transformers."
RANKING = PEER + "multiple_negatives_ranking"


def multiple_negatives_ranking(embeddings: Sequence[Tensor], scale: float = 20.0) -> Tensor:
    """``MultipleNegativesRankingLoss``: cross entropy of scale * cosine of anchors with all positives and negatives.

    embeddings: anchors, positives and any number of hard negatives, each (B, D); row i of the positives belongs to
    anchor i. It is :func:`mmfast.functional.info_nce` with the temperature 1 / ``scale``, of this process alone.
    """
    if isinstance(embeddings, Tensor) or not isinstance(embeddings, Sequence) or len(embeddings) < 2:
        found = len(embeddings) if isinstance(embeddings, (list, tuple)) else type(embeddings).__name__
        raise UserError(f"{RANKING}: embeddings must be a list of anchors, positives, ..., got {found}")
    scale = check_number(RANKING, "scale", scale, 0, ends="(]")
    rows = "embeddings[0]", check_rows(RANKING, "embeddings[0]", embeddings[0])
    for i, x in enumerate(embeddings[1:], 1):
        check_rows(RANKING, f"embeddings[{i}]", x, rows)
    views = {f"embeddings[{i}]": x for i, x in enumerate(embeddings)}
    anchors, positives, *negatives = embeddings
    if len(positives) != len(anchors):
        raise UserError(
            f"{RANKING}: embeddings[1] must have the {len(anchors)} rows of embeddings[0], "
            f"got {tuple(positives.shape)}"
        )
    if len(anchors) == 1 and not negatives:
        refuse_not_finite(RANKING, views)
        return nothing(anchors, positives)
    negatives = joined(*negatives) if negatives else None
    return evaluate_pairs(RANKING, anchors, positives, negatives, temperature=1 / scale, views=views)[0]


def batch_hard_triplet(labels: Tensor, embeddings: Tensor, margin: float = 5) -> Tensor:
    """``BatchHardTripletLoss``: each row's farthest positive and nearest negative, by Euclidean distance.

    embeddings: (B, D), taken as they are. labels: (B,) integers. A row without a positive has its own place for one;
    one without a negative has no term. The mean is over all rows.
    """
    return _triplets("batch_hard_triplet", labels, embeddings, margin, "batch_hard", "all", lone=True)


def batch_hard_soft_margin_triplet(labels: Tensor, embeddings: Tensor) -> Tensor:
    """``BatchHardSoftMarginTripletLoss``: as :func:`batch_hard_triplet`, but log(1 + e^x) for the margin."""
    return _triplets(
        "batch_hard_soft_margin_triplet", labels, embeddings, 0.0, "batch_hard", "all", soft=True, lone=True
    )


def batch_semi_hard_triplet(labels: Tensor, embeddings: Tensor, margin: float = 5) -> Tensor:
    """``BatchSemiHardTripletLoss``: of each pair the nearest negative that is farther, or else the farthest.

    The mean is over the pairs of a row and a positive. See :func:`batch_hard_triplet`.
    """
    return _triplets("batch_semi_hard_triplet", labels, embeddings, margin, "semihard_nearest", "positives")


def batch_all_triplet(labels: Tensor, embeddings: Tensor, margin: float = 5) -> Tensor:
    """``BatchAllTripletLoss``: all triplets, the mean of those above 0. See :func:`batch_hard_triplet`."""
    return _triplets("batch_all_triplet", labels, embeddings, margin, "all", "nonzero")


def _triplets(name, labels, embeddings, margin, kind, over, soft=False, lone=False) -> Tensor:
    op = PEER + name
    z = check_rows(op, "embeddings", embeddings)
    if isinstance(labels, Tensor):
        labels = labels.flatten()
    labels = check_integers(op, "labels", labels, ("embeddings", z))
    options = Options(kind, check_number(op, "margin", margin, 0), False, soft, lone)
    if len(z) < 2:
        refuse_not_finite(op, {"embeddings": z})
        return nothing(z)
    call = _Call(op, options, "euclidean", over, "mean", Sharing(op, None), "embeddings")
    return call(z, labels, None, None, None)[0]
