"""Rows among their own candidates: each but itself, wherever in the candidates it stands."""

from __future__ import annotations

import torch

from mmfast.ops.similarity.op import similarity


def own_first(q, k, own, labels, ids, valid) -> tuple:
    """k, labels, ids, valid where the candidates that are rows, ``own[i]`` of k that of q[i], are the first ones."""
    place = torch.arange(len(q), device=q.device)
    order = torch.arange(len(q), len(q) + len(k), device=q.device).index_copy(0, own, place).argsort()
    labels, ids, valid = (None if x is None else (x[0], x[1][order]) for x in (labels, ids, valid))
    return k[order], labels, ids, valid


def similarity_without_own(
    q, k, own, labels, ids, valid, scale, kind, cosine
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`similarity` of rows q (B, D) and candidates k (C, D), where row ``own[i]`` of k (B,) is that of q[i].

    It is neither positive nor negative of i. labels, ids (or None), valid (or None): (of q, of k).
    """
    candidates = own_first(q, k, own, labels, ids, valid)
    return similarity(q, *candidates, scale, None, kind, cosine, itself=True)
