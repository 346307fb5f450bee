"""Rows among their own candidates: each but itself, wherever in the candidates it stands."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.ops.similarity.op import similarity

NOBODY = torch.iinfo(torch.int64).min


def similarity_without_own(q, k, own, labels, ids, valid, scale, kind, cosine) -> tuple[Tensor, Tensor]:
    """:func:`similarity` of rows q (B, D) and candidates k (C, D), where row ``own[i]`` of k (B,) is that of q[i].

    It is neither positive nor negative of i, nor is any other of its id. labels, ids (or None), valid (or None):
    (of q, of k), with the ids of k at ``own`` those of q.
    """
    count = len(q)
    if ids is None:
        place = torch.arange(count, device=q.device)
        ids = place, torch.full((len(k),), NOBODY, device=q.device).index_copy(0, own, place)
    # Of equal ids only (i, i) is no duplicate to the op: that is a candidate here whom nobody reads.
    valid = (
        [torch.ones(len(x), dtype=torch.bool, device=q.device) for x in (q, k)] if valid is None else valid
    )
    labels, ids, valid = (
        (x[0], torch.cat((torch.full_like(x[0], void), x[1])))
        for x, void in ((labels, NOBODY), (ids, NOBODY), (valid, False))
    )
    k = torch.cat((k.new_zeros((count, k.shape[1])), k))
    return similarity(q, k, labels, ids, valid, scale, None, kind, cosine)
