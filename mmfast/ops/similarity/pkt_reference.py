"""Probabilistic knowledge transfer as it is defined, by autograd: what every other form must equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import permutations

import torch
from torch import Tensor

from mmfast.ops.barlow_twins.checks import compute_dtype

# A row with a smaller norm has no direction: its scores are 0, and it gets no gradient.
SMALLEST_NORM = 1e-12


def reference(
    views: Mapping[str, Tensor],
    weights: Mapping[tuple[str, str], Tensor] | None = None,
    *,
    pairs: Iterable[tuple[str, str]] | None = None,
    scale: str = "entry_mean",
    exclude_self: bool = False,
    eps: float = 1e-8,
    teacher_grad: bool = True,
) -> Tensor:
    """The arguments are those of :func:`mmfast.losses.transfer.pkt`; nothing is checked."""
    neighbours = {name: conditional(h, exclude_self, eps) for name, h in views.items()}
    loss = 0
    for teacher, student in permutations(views, 2) if pairs is None else pairs:
        p, q = neighbours[teacher], neighbours[student]
        if not teacher_grad:
            p = p.detach()
        rows = (p * ((p + eps) / (q + eps)).log()).sum(1)
        if weights is not None:
            rows = rows * weights[teacher, student].to(rows.dtype)
        loss = loss + rows.sum() / len(rows) ** (2 if scale == "entry_mean" else 1)
    return loss


def conditional(h: Tensor, exclude_self: bool = False, eps: float = 1e-8) -> Tensor:
    """P (B, B) of rows h (B, D): the similarities (cos + 1) / 2 of a row, divided by their sum."""
    h = h.to(compute_dtype(h))
    known = h.detach().norm(dim=1, keepdim=True) >= SMALLEST_NORM
    h = torch.where(known, h, 1)
    u = torch.where(known, h / (h.norm(dim=1, keepdim=True) + eps), 0)
    with torch.autocast(h.device.type, enabled=False):
        k = (u @ u.T + 1) / 2
    if exclude_self:
        k = k - torch.diag(k.diagonal())
    return k / k.sum(1, keepdim=True)
