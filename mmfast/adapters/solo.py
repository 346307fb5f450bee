"""``from solo.losses import barlow_loss_func`` becomes ``from mmfast.adapters.solo import barlow_loss_func``."""

from __future__ import annotations

from torch import Tensor

from mmfast.checks import check_number
from mmfast.losses.barlow_twins import Options, evaluate_barlow_twins

OP = "solo.barlow_loss_func"


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """solo-learn's Barlow Twins loss of two views' embeddings (B, D).

    With several processes C is the mean over all, each with the statistics of its own rows, and gradients are divided
    by the number of processes.
    """
    lambd, scale = check_number(OP, "lamb", lamb, 0), check_number(OP, "scale_loss", scale_loss, 0)
    options = Options(lambd, variant="solo", scale=scale, stats="local", grad_convention="legacy")
    return evaluate_barlow_twins(z1, z2, options.request(), op=OP, names=("z1", "z2"))[0]
