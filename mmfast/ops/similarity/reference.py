"""The definitions of the losses, one row of scores at a time, by autograd differentiable to any order: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def masks(candidates: int, labels, ids, valid, itself: bool) -> tuple[Tensor, Tensor]:
    """Positives and negatives, bool (B, C), of integers given as (of the rows, of the candidates)."""
    labels_q, labels_k = labels
    place_q, place_k = (torch.arange(n, device=labels_q.device) for n in (len(labels_q), candidates))
    same_place = place_q[:, None] == place_k
    neither = same_place if itself else torch.zeros_like(same_place)
    if ids is not None:
        neither = neither | ((ids[0][:, None] == ids[1]) & ~same_place)
    if valid is not None:
        neither = neither | ~(valid[0][:, None] & valid[1])
    same = labels_q[:, None] == labels_k
    return same & ~neither, ~same & ~neither


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their lengths; those shorter than 1e-12 are zero."""
    length = torch.where((x * x).sum(1, keepdim=True) < 1e-24, 1, (x * x).sum(1, keepdim=True)).sqrt()
    return torch.where((x * x).sum(1, keepdim=True) < 1e-24, 0, x / length)


def values(kind: str, logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(B,) the loss of each row; 0 for rows without positives, which do not count."""
    found = []
    for row, p, n in zip(logits, positive, negative, strict=True):
        both, p, n = row[p | n], row[p], row[n]
        if kind == "sigmoid":
            found.append(-logsigmoid(p).sum() - logsigmoid(-n).sum())
        elif kind == "relu":
            found.append(n.clamp(min=0).sum() + row.sum() * 0)
        elif kind == "top":
            found.append(n.max().clamp(min=0) if len(n) else row.sum() * 0)
        elif not len(p) or (kind == "decoupled" and not len(n)):
            found.append(row.sum() * 0)
        elif kind == "decoupled":
            found.append(n.logsumexp(0) - p.mean())
        elif kind == "out":
            found.append(both.logsumexp(0) - p.mean())
        elif kind == "in":
            found.append(both.logsumexp(0) - (p.exp().mean()).log())
        elif kind == "sum":
            found.append(both.logsumexp(0) - p.logsumexp(0))
        elif kind == "negatives":
            found.append(
                torch.stack([-logsigmoid(x - n.logsumexp(0)) for x in p]).mean() if len(n) else p.sum() * 0
            )
    return torch.stack(found)


def similarity(q, k, labels, ids, valid, scale, bias, kind, cosine, itself=False) -> Tensor:
    """What :func:`mmfast.ops.similarity.op.similarity` gives for the same arguments; ``k``: None for q itself."""
    itself = itself or k is None
    k = q if k is None else k
    if cosine:
        q, k = unit_rows(q), unit_rows(k)
    logits = q @ k.T * scale + (0 if bias is None else bias)
    return values(kind, logits, *masks(len(k), labels, ids, valid, itself))
