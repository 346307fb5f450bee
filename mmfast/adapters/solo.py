"""Losses of solo-learn: ``from solo.losses import ...`` becomes ``from mmfast.adapters.solo import ...``."""

from __future__ import annotations

from torch import Tensor

from mmfast.checks import check_number
from mmfast.losses import vicreg
from mmfast.losses.barlow_twins import Options, evaluate_barlow_twins
from mmfast.losses.similarity import Call, Variant, among_themselves
from mmfast.ops.similarity.checks import check_integers, check_rows
from mmfast.ops.similarity.shared import Sharing

OP = "solo.barlow_loss_func"
SIMCLR = "solo.simclr_loss_func"
VICREG = "solo.vicreg_loss_func"


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """solo-learn's Barlow Twins loss of two views' embeddings (B, D).

    With several processes C is the mean over all, each with the statistics of its own rows, and gradients are divided
    by the number of processes.
    """
    lambd, scale = check_number(OP, "lamb", lamb, 0), check_number(OP, "scale_loss", scale_loss, 0)
    options = Options(lambd, variant="solo", scale=scale, stats="local", grad_convention="legacy")
    return evaluate_barlow_twins(z1, z2, options.request(), op=OP, names=("z1", "z2"))[0]


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """solo-learn's SimCLR loss: log of all but the row itself over its positives, mean over the rows.

    z: (V B, D), rows of all views. indexes: (V B,) integers, equal for views of one sample (or for one label).
    Rows without a positive, which make solo-learn's loss infinite, have no loss; no temperature is too small.
    With several processes the loss is that of all rows, and its gradient the true one.
    """
    check_rows(SIMCLR, "z", z)
    indexes = check_integers(SIMCLR, "indexes", indexes, ("z", z))
    call = Call(SIMCLR, "mean", "anchors", Sharing(SIMCLR, "global")).of({"z": z})
    scale = call.scale(temperature, ("z", z))
    return among_themselves(call, z, [indexes, None, None, None], scale, Variant("sum"), True)[0]


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """solo-learn's VICReg loss of two views' embeddings (B, D), as its release 1.0.2: each process has its own rows.

    Later code gathers rows and divides the gradients of two of its three terms by the number of processes; the loss
    of all rows with its gradient is ``mmfast.functional.vicreg(z1, z2, variant="solo")``.
    """
    given = {
        "sim_loss_weight": sim_loss_weight,
        "var_loss_weight": var_loss_weight,
        "cov_loss_weight": cov_loss_weight,
    }
    weights = [check_number(VICREG, name, value, 0) for name, value in given.items()]
    options = vicreg.Options(*weights, variant="solo", stats=None)
    return vicreg.evaluate_vicreg(z1, z2, options, op=VICREG, names=("z1", "z2"))[0]
