"""Losses of queries and keys that rank: the own key before all others, by a margin or by inner products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.checks import check_bool, check_number
from mmfast.losses.pairs import Pairs
from mmfast.losses.similarity import Call, SimilarityLoss
from mmfast.ops.similarity.checks import check_scalar, refuse_not_finite
from mmfast.ops.similarity.rows import rows_of, unit_rows
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared


def _check_margin(op: str, margin: Any) -> float:
    return check_number(op, "margin", margin, 0)


def _pairwise_hinge(query, key, margin, ids, weights, normalise, hardest, reduction, sharing):
    op, sharing = "pairwise_hinge", Sharing("pairwise_hinge", *sharing)

    def checked():
        kind = "top" if check_bool(op, "hardest", hardest) else "relu"
        call = Call(op, reduction, "all", sharing)
        least = _check_margin(op, margin)
        pairs = Pairs.checked(call, query, key, None, None, ids, weights, normalise)
        # Before a column is added.
        refuse_not_finite(op, call.views)
        return pairs, least, kind

    pairs, least, kind = sharing.checked(checked)
    pairs = pairs.gathered()
    one, other = (unit_rows(x, pairs.cosine) for x in (pairs.query, pairs.key))
    # What a score must fall short of the own one by is a column more, which the keys multiply by 1.
    level = least - (one * other).sum(1, keepdim=True)
    ones = torch.ones_like(level)
    scale = ones.new_ones(())
    found = [
        pairs._replace(query=torch.cat((a, level), 1), key=torch.cat((b, ones), 1), cosine=False).loss(
            scale, None, kind
        )
        for a, b in ((one, other), (other, one))
    ]
    compared = found[0][2]
    compared = Compared(
        pairs.query,
        pairs.key,
        compared.labels,
        compared.ids,
        None,
        "cosine" if pairs.cosine else "dot",
        both=True,
    )
    components = torch.cat((found[0][1][:1] + found[1][1][:1], found[0][1][1:]))
    return found[0][0] + found[1][0], components, compared


def pairwise_hinge(
    query: Tensor,
    key: Tensor,
    margin: float = 0.2,
    *,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    hardest: bool = False,
    reduction: str = "sum",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Hinge loss of visual-semantic embeddings (Kiros et al. 2014; ``hardest``: Faghri et al., BMVC 2018, eq. 6).

    .. math::
        \ell_i = \sum_{k \neq i} [m - s_{ii} + s_{ik}]_+ + \sum_{k \neq i} [m - s_{ii} + s_{ki}]_+

    for cosines s; ``hardest`` takes the largest term of each sum for the sum.

    Args:
        query, key: (B, D), row i of one belongs to row i of the other.
        margin: m, finite and >= 0.
        ids, weights, normalise, reduction, stats, grad_convention, group: see :func:`info_nce`.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _pairwise_hinge(query, key, margin, ids, weights, normalise, hardest, reduction, sharing)[0]


def _n_pair(query, key, l2, ids, weights, normalise, reduction, sharing):
    op, sharing = "n_pair", Sharing("n_pair", *sharing)

    def checked():
        call = Call(op, reduction, "all", sharing)
        pairs = Pairs.checked(call, query, key, None, None, ids, weights, normalise)
        return pairs, check_number(op, "l2", l2, 0), check_scalar(op, "scale", 1, ("query", query))

    pairs, l2, scale = sharing.checked(checked)
    pairs = pairs.gathered()
    penalty = None
    if l2:
        query, key = (rows_of(x, False).unit for x in (pairs.query, pairs.key))
        penalty = l2 * (query.square().sum(1) + key.square().sum(1))
    return pairs.loss(scale, added=penalty)


def n_pair(
    query: Tensor,
    key: Tensor,
    *,
    l2: float = 0.0,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = False,
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Multi-class N-pair loss (Sohn, NeurIPS 2016, eq. 6): :func:`info_nce` of inner products at temperature 1.

    .. math::
        \ell_i = \log \sum_j e^{q_i \cdot k_j} - q_i \cdot k_i + l_2 (|q_i|^2 + |k_i|^2)

    Args:
        query, key: (B, D), an anchor and a positive of each class.
        l2: finite and >= 0.
        ids, weights, normalise, reduction, stats, grad_convention, group: see :func:`info_nce`.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _n_pair(query, key, l2, ids, weights, normalise, reduction, sharing)[0]


class PairwiseHingeLoss(SimilarityLoss):
    """Hinge loss of queries and keys, defined in :func:`mmfast.functional.pairwise_hinge`.

    >>> loss = PairwiseHingeLoss(hardest=True)
    >>> loss(images, texts).backward()
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        normalise: bool = True,
        hardest: bool = False,
        reduction: str = "sum",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        _check_margin("pairwise_hinge", margin)
        self._take(margin=margin, normalise=normalise, hardest=hardest, reduction=reduction)
        self._take_sharing("pairwise_hinge", reduction, "all", stats, grad_convention, group)

    def forward(
        self, query: Tensor, key: Tensor, *, ids: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        options = ids, weights, self.normalise, self.hardest, self.reduction, self._sharing()
        return self._kept(_pairwise_hinge(query, key, self.margin, *options))


class NPairLoss(SimilarityLoss):
    """Multi-class N-pair loss, defined in :func:`mmfast.functional.n_pair`.

    >>> loss = NPairLoss(l2=0.02)
    >>> loss(anchors, positives).backward()
    """

    def __init__(
        self,
        *,
        l2: float = 0.0,
        normalise: bool = False,
        reduction: str = "mean",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        check_number("n_pair", "l2", l2, 0)
        self._take(l2=l2, normalise=normalise, reduction=reduction)
        self._take_sharing("n_pair", reduction, "all", stats, grad_convention, group)

    def forward(
        self, query: Tensor, key: Tensor, *, ids: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        options = ids, weights, self.normalise, self.reduction, self._sharing()
        return self._kept(_n_pair(query, key, self.l2, *options))
