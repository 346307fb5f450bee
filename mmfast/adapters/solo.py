"""``from solo.losses import barlow_loss_func`` becomes ``from mmfast.adapters.solo import barlow_loss_func``."""

from __future__ import annotations

from torch import Tensor

from mmfast.adapters._world import one_process
from mmfast.functional import barlow_twins


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """solo-learn's Barlow Twins loss of two views' embeddings (B, D).

    Raises:
        UserError: in a process group of more than one process.
    """
    one_process("solo.barlow_loss_func")
    return barlow_twins(z1, z2, lamb, variant="solo", scale=scale_loss)
