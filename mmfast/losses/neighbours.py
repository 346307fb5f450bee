"""The soft nearest neighbour loss: how far from each other rows of one label are, among all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.checks import check_bool
from mmfast.errors import UserError
from mmfast.losses.similarity import Call, SimilarityLoss
from mmfast.ops.similarity.checks import check_rows, refuse_not_finite
from mmfast.ops.similarity.rows import unit_rows
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared

OP = "soft_nearest_neighbour"


def _neighbours(z, labels, temperature, valid, weights, normalise, reduction, over, sharing):
    sharing = Sharing(OP, *sharing)

    def checked():
        call = Call(OP, reduction, over, sharing)
        check_bool(OP, "normalise", normalise)
        check_rows(OP, "z", z)
        if labels is None:
            raise UserError(f"{OP}: labels must be given, got None")
        vectors = call.of({"z": z}, valid).vectors(("z", z), labels, None, valid, weights)
        # Before there are other columns.
        refuse_not_finite(OP, {"z": z if valid is None else torch.where(valid[:, None], z, 0)})
        return call, vectors, call.scale(temperature, ("z", z))

    call, vectors, scale = sharing.checked(checked)
    facts = {"normalise": normalise, "reduction": reduction, "over": over}
    (rows,), (labels, _, valid, weights) = sharing.gather([z], vectors, facts)
    call.refuse_one_row(rows)
    if valid is not None:
        rows = rows.where(valid[:, None], torch.zeros((), dtype=rows.dtype, device=rows.device))
    x = unit = unit_rows(rows, normalise)
    # Distances are those of rows relative to any point, and lose least near the middle.
    count = len(x) if valid is None else valid.sum().clamp(min=1)
    x = x - (x.detach().sum(0) / count)
    if valid is not None:
        x = x.where(valid[:, None], torch.zeros((), dtype=x.dtype, device=x.device))
    squares = x.square().sum(1, keepdim=True)
    # -|x - y|^2 but for |x|^2, which a difference of logarithms of sums over y does not have.
    query, key = torch.cat((2 * x, -torch.ones_like(squares)), 1), torch.cat((x, squares), 1)
    pairs = (labels, labels), None, None if valid is None else (valid, valid)
    loss, components, _ = call.evaluated(query, key, *pairs, weights, scale, None, "sum", False, itself=True)
    return loss, components, Compared(unit, None, *pairs, "sqeuclidean")


def soft_nearest_neighbour(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = False,
    reduction: str = "mean",
    over: str = "anchors",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Soft nearest neighbour loss (Frosst, Papernot and Hinton, ICML 2019, eq. 1), by squared distances.

    .. math::
        \ell_i = \log \sum_{j \neq i} e^{-|z_i - z_j|^2 / \tau} - \log \sum_{p \in P_i} e^{-|z_i - z_p|^2 / \tau}

    with the rows P_i of the label of i. By cosines it is :func:`sup_con` of variant "solo".

    Args:
        z: (B, D). labels: (B,) integers.
        normalise: whether rows are divided by their lengths first.
        temperature, valid, weights, reduction, over, stats, grad_convention, group: see :func:`nt_xent`.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _neighbours(z, labels, temperature, valid, weights, normalise, reduction, over, sharing)[0]


class SoftNearestNeighbourLoss(SimilarityLoss):
    """Soft nearest neighbour loss, defined in :func:`mmfast.functional.soft_nearest_neighbour`.

    >>> loss = SoftNearestNeighbourLoss()
    >>> loss(z, labels).backward()

    A ``torch.nn.Parameter`` for the temperature is learnt.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        normalise: bool = False,
        reduction: str = "mean",
        over: str = "anchors",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        self._take(temperature=temperature, normalise=normalise, reduction=reduction, over=over)
        self._take_sharing(OP, reduction, over, stats, grad_convention, group)

    def forward(
        self, z: Tensor, labels: Tensor, *, valid: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        options = self.normalise, self.reduction, self.over, self._sharing()
        return self._kept(_neighbours(z, labels, self.temperature, valid, weights, *options))
