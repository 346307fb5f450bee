"""Losses of pairs that a tuple of indices names, in plain PyTorch with all scores in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmfast.checks import told
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.rows import SHORTEST


def check_indices(op: str, indices: Any, device: torch.device) -> tuple[Tensor, ...]:
    """(anchors, positives, anchors, negatives) of pairs or (anchor, positive, negative) triplets."""
    if not isinstance(indices, (tuple, list)) or len(indices) not in (3, 4):
        raise UserError(
            f"{op}: indices_tuple must be 3 or 4 tensors (triplets, or pairs and pairs), got {told(indices)}"
        )
    if not all(isinstance(x, Tensor) and x.dim() == 1 for x in indices):
        raise UserError(f"{op}: indices_tuple must hold tensors (n,)")
    indices = [x.to(device=device, dtype=torch.int64) for x in indices]
    if len(indices) == 3:
        indices.insert(2, indices[0])
    if any(len(x) != len(y) for x, y in (indices[:2], indices[2:])):
        raise UserError(
            f"{op}: indices_tuple must have as many others as anchors, got {[len(x) for x in indices]}"
        )
    return tuple(indices)


def all_pairs(labels: Tensor, ref_labels: Tensor, itself: bool) -> tuple[Tensor, ...]:
    same = labels[:, None] == ref_labels
    positive = same.clone().fill_diagonal_(False) if itself else same
    return *torch.where(positive), *torch.where(~same)


def scores(q: Tensor, k: Tensor, score: str) -> Tensor:
    """(B, C) cosines, inner products or negative distances, as ``mmfast.functional.triplet_margin`` names them."""
    dtype = compute_dtype(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k = (_unit(x.to(dtype)) if score in ("cosine", "unit_euclidean") else x.to(dtype) for x in (q, k))
        if score in ("cosine", "dot"):
            return q @ k.T
        distances = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
        return -distances.square() if score == "sqeuclidean" else -distances


def _unit(x: Tensor) -> Tensor:
    known = (x.detach().norm(dim=1, keepdim=True) >= SHORTEST).expand_as(x)
    x = torch.where(known, x, 1)
    return torch.where(known, x / x.norm(dim=1, keepdim=True), 0)


def nt_xent_pairs(logits: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    """Of each positive pair, against the negatives of its anchor, each as often as it is named."""
    a1, p, a2, n = indices
    times = torch.zeros_like(logits).index_put((a2, n), logits.new_ones(()), accumulate=True)
    some = (times > 0).any(1)
    of_negatives = torch.where(times > 0, logits + times.clamp(min=1).log(), -torch.inf)
    of_negatives = torch.where(some[:, None], of_negatives, 0).logsumexp(1)
    losses = -logsigmoid(logits[a1, p] - of_negatives[a1])
    return torch.where(some[a1], losses, 0)


def sup_con_rows(logits: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    """Of each row, 0 of those without positives."""
    a1, p, a2, n = indices
    positive, negative = (torch.zeros_like(logits, dtype=torch.bool) for _ in range(2))
    positive, negative = (
        positive.index_put((a1, p), _true(logits)),
        negative.index_put((a2, n), _true(logits)),
    )
    count = positive.sum(1)
    some = (positive | negative).any(1)
    of_all = logits.masked_fill(~(positive | negative), -torch.inf)
    of_all = torch.where(some[:, None], of_all, 0).logsumexp(1, keepdim=True)
    return torch.where(positive, of_all - logits, 0).sum(1) / count.clamp(min=1)


def _true(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=x.device)
