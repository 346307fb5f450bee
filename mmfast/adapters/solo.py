"""``from solo.losses import barlow_loss_func`` becomes ``from mmfast.adapters.solo import barlow_loss_func``."""

from __future__ import annotations

from torch import Tensor

from mmfast.functional import barlow_twins


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """solo-learn's Barlow Twins loss of two views' embeddings (B, D).

    With several processes C is the mean over all, each with the statistics of its own rows, and gradients are divided
    by the number of processes.
    """
    options = {"variant": "solo", "stats": "local", "grad_convention": "legacy"}
    return barlow_twins(z1, z2, lamb, scale=scale_loss, **options)
