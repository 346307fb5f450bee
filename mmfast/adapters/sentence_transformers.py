"""Losses of sentence-transformers as functions of embeddings.

There the losses own the encoder; here is what they compute of its output, to be the body of a
``compute_loss_from_embeddings``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.paired import _info_nce
from mmfast.ops.similarity.checks import check_rows

RANKING = "sentence_transformers.multiple_negatives_ranking"


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
    anchors, positives, *negatives = embeddings
    if len(positives) != len(anchors):
        raise UserError(
            f"{RANKING}: embeddings[1] must have the {len(anchors)} rows of embeddings[0], "
            f"got {tuple(positives.shape)}"
        )
    if len(anchors) == 1 and not negatives:
        return (anchors * positives).sum() * 0
    negatives = torch.cat(negatives) if negatives else None
    sharing = None, "true", None
    return _info_nce(
        RANKING, anchors, positives, negatives, 1 / scale, None, None, None, None, None, True, "mean", sharing
    )[0]
