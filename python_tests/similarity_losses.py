"""The losses of similarities, a row each, and what their contract needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import mmfast


class Row(NamedTuple):
    make: Callable[[], Any]
    call: Callable[..., Any] = lambda loss, a, b, labels: loss(a, b)
    """of the loss, two views and labels"""
    op: str = "similarity"
    """who says that there is no second derivative"""
    views: int = 2
    smooth: bool = True
    """has a derivative everywhere"""
    saved: int = 0
    """matrices of the size of the embeddings that are kept beside them, at most"""
    whole: bool = True
    """is a function of rows alone, not of their places in the batch, and its gradient is its derivative"""

    @property
    def says(self) -> str:
        """The loss and its first argument, as errors name them."""
        name = type(self.make()).__name__
        if name == "SupConLoss" and self.views == 2:
            return r"sup_con: z\[:, 0\]"
        return SAYS[name]


def by_labels(loss, a, b, labels):
    return loss(a, labels)


def of_views(loss, a, b, labels):
    with torch.autocast("cpu", enabled=False):
        z = torch.stack((a, b), 1)
    return loss(z, labels)


def of_modalities(loss, a, b, labels):
    return loss({"a": a, "b": b})


def by_confidence(loss, a, b, labels):
    dtype = a.dtype if a.dtype.itemsize > 2 else torch.float32
    w = torch.linspace(0, 1, len(a), dtype=dtype, device=a.device)
    return loss({"a": a, "b": b}, {"a": w, "b": w.flip(0)})


SAYS = {
    "NTXentLoss": "nt_xent: z_a",
    "SupConLoss": "sup_con: z",
    "SoftNearestNeighbourLoss": "soft_nearest_neighbour: z",
    "InfoNCELoss": "info_nce: query",
    "ClipLoss": "clip: query",
    "SigLipLoss": "siglip: query",
    "PairwiseHingeLoss": "pairwise_hinge: query",
    "NPairLoss": "n_pair: query",
    "TripletMarginLoss": "triplet_margin: z",
    "SmoothTripletLoss": "smooth_triplet: z",
    "PKTLoss": "pkt: a",
    "DirectedPKTLoss": "directed_pkt: a",
    "VICRegLoss": "vicreg: z_a",
}

LOSSES = {
    "NTXentLoss": Row(mmfast.NTXentLoss),
    "NTXentLoss dcl": Row(lambda: mmfast.NTXentLoss(variant="dcl")),
    "NTXentLoss ser": Row(
        lambda: mmfast.NTXentLoss(0.2, variant="ser"), lambda loss, a, b, y: loss(a, labels=y), views=1
    ),
    "NTXentLoss pml": Row(
        lambda: mmfast.NTXentLoss(0.2, variant="pml"), lambda loss, a, b, y: loss(a, labels=y), views=1
    ),
    "SupConLoss": Row(mmfast.SupConLoss, by_labels, views=1),
    "SupConLoss in": Row(lambda: mmfast.SupConLoss(variant="in"), by_labels, views=1),
    "SupConLoss views": Row(mmfast.SupConLoss, of_views),
    "SoftNearestNeighbourLoss": Row(
        lambda: mmfast.SoftNearestNeighbourLoss(5.0), by_labels, views=1, saved=3
    ),
    "InfoNCELoss": Row(mmfast.InfoNCELoss),
    "ClipLoss": Row(lambda: mmfast.ClipLoss(learnable=True)),
    "SigLipLoss": Row(mmfast.SigLipLoss),
    "PairwiseHingeLoss": Row(mmfast.PairwiseHingeLoss, smooth=False, saved=8),
    "NPairLoss": Row(lambda: mmfast.NPairLoss(l2=0.1)),
    "TripletMarginLoss": Row(mmfast.TripletMarginLoss, by_labels, "triplets", 1, smooth=False),
    "TripletMarginLoss batch-hard": Row(
        lambda: mmfast.TripletMarginLoss(mining="batch_hard", score="euclidean"),
        by_labels,
        "triplets",
        1,
        smooth=False,
    ),
    "SmoothTripletLoss": Row(mmfast.SmoothTripletLoss, by_labels, "triplets", 1),
    "PKTLoss": Row(mmfast.PKTLoss, of_modalities, "pkt"),
    "DirectedPKTLoss": Row(mmfast.DirectedPKTLoss, by_confidence, "pkt", whole=False),
    "VICRegLoss": Row(mmfast.VICRegLoss, op="vicreg", smooth=False, saved=3),
}
