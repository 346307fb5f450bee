"""Losses as functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops import barlow_twins as _barlow_twins
from mmfast.ops.barlow_twins_passes import compute_dtype
from mmfast.ops.native import dtype_code
from mmfast.ops.products import product


class BarlowTwinsComponents(NamedTuple):
    """What a Barlow Twins loss is made of: detached scalars of the loss's dtype and device.

    ``loss`` is ``on_diagonal + lambd * off_diagonal`` times the variant's scale (B^2 for "thesis", whose c_ij are
    divided by B here, too).
    """

    loss: Tensor
    on_diagonal: Tensor
    """sum of (1 - c_ii)^2; of (1 / B - c_ii)^2 for variant "thesis"."""
    off_diagonal: Tensor
    """sum of c_ij^2 over i != j, not weighted"""
    mean_diagonal: Tensor
    """mean of c_ii: 1 where the views agree"""
    off_diagonal_rms: Tensor
    """root of the mean of c_ij^2 over i != j: 0 where features are decorrelated; 0 for D = 1"""


# What the published losses of this name are, where they differ from the first: one process, C divided by the
# number of rows, and no running statistics. All are written out in docs/migration.md.
BARLOW_TWINS_VARIANTS: dict[str, dict[str, float | bool]] = {
    # Zbontar et al., ICML 2021: BatchNorm1d(affine=False). Their code's lambd is 0.0051.
    "official": {"lambd": 5e-3, "eps": 1e-5, "scale": 1.0},
    # lightly, BarlowTwinsLoss: functional batch norm in training mode.
    "lightly": {},
    # solo-learn, barlow_loss_func: a fresh BatchNorm1d, and scale_loss.
    "solo": {"scale": 0.025},
    # VISSL, BarlowTwinsCriterion and its configurations: one normaliser for the rows of both views.
    "vissl": {"pooled": True, "lambd": 0.0051, "scale": 0.024},
    # MONAI, BarlowTwinsLoss: torch.std, plus 1e-6.
    "monai": {"unbiased": True, "eps_outside": True, "eps": 1e-6},
    # catalyst, BarlowTwinsLoss: torch.var, plus 1e-12 under the root; off-diagonal terms with full weight.
    "catalyst": {"unbiased": True, "eps": 1e-12, "lambd": 1.0},
    # stable-pretraining, BarlowTwinsLoss: torch.std, plus 1e-5.
    "stable-pretraining": {"unbiased": True, "eps_outside": True},
    # The recipe of Lightning's tutorials: torch.std and no eps.
    "lightning": {"unbiased": True, "eps": 0.0},
    # The thesis' code: BatchNorm1d(affine=False), and C = Â'B̂ as it is.
    "thesis": {"divide": False},
}


def barlow_twins_options(variant: str, **given: float | bool | None) -> dict[str, float | bool]:
    """Arguments of the op: those of the variant, where they are not given."""
    chosen = BARLOW_TWINS_VARIANTS.get(variant) if isinstance(variant, str) else None
    if chosen is None:
        names = ", ".join(BARLOW_TWINS_VARIANTS)
        raise UserError(f"barlow_twins: variant must be one of {names}, got {variant!r}")
    given = {name: value for name, value in given.items() if value is not None}
    return {**BARLOW_TWINS_VARIANTS["official"], **chosen, **given}


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float | None = None,
    center: bool = True,
    eps: float | None = None,
    variant: str = "official",
    scale: float | None = None,
) -> Tensor:
    r"""Barlow Twins loss of the embeddings of two views (Zbontar et al., ICML 2021).

    .. math::
        L = \sum_i (1 - c_{ii})^2 + \lambda \sum_{i \neq j} c_{ij}^2, \qquad
        c_{ij} = \frac{1}{B} \sum_b \hat a_{bi} \hat b_{bj}, \qquad
        \hat a_{bi} = \frac{a_{bi} - \bar a_i}{\sqrt{\mathrm{var}(a_i) + \epsilon}}

    with mean and biased variance over the batch, each view on its own (an affine-free batch norm). Exact in
    O(B D min(B, D)) time; for 4 B < 3 D nothing of size D x D is stored. Runs are bit-for-bit repeatable.

    Other libraries compute other functions under this name. ``variant`` picks theirs:

    ====================  ==========================  ======  =====  ===================================
    variant               divisor of a column         lambd   scale  and
    ====================  ==========================  ======  =====  ===================================
    official, lightly     sqrt(var + 1e-5)            0.005   1
    solo                  sqrt(var + 1e-5)            0.005   0.025
    vissl                 sqrt(var + 1e-5)            0.0051  0.024  mean and var over both views pooled
    monai                 std + 1e-6, unbiased        0.005   1
    catalyst              sqrt(var + 1e-12), unbiased 1       1
    stable-pretraining    std + 1e-5, unbiased        0.005   1
    lightning             std, unbiased               0.005   1
    thesis                sqrt(var + 1e-5)            0.005   1      C is not divided by B
    ====================  ==========================  ======  =====  ===================================

    Warning:
        ``thesis`` is there to reproduce a published experiment, not for new ones. Without the division its loss is
        B^2 (sum (1/B - c_ii)^2 + lambd sum c_ij^2): correlations of corresponding features are drawn to 1/B, that
        is nearly to zero, and the size of the loss depends on the batch size. ``vissl`` is wrong for views whose
        scales or means differ, as those of two modalities do: statistics of both together standardise neither.

    Args:
        z_a, z_b: (B, D), B >= 2, on one device and of one dtype: float32, float64, bfloat16 or float16. Half
            types are computed in float32, whatever autocast says; on GPUs the operands of the matrix products are
            rounded to the half type, as tensor cores multiply those, and their results are float32.
        lambd: weight of the off-diagonal term, finite and >= 0; the variant's if None.
        center: False leaves the mean in: c_ij = a_i . b_j / (|a_i| |b_j|) where eps is added to |a_i|^2 / B.
        eps: added to the variance or deviation, finite and >= 0; the variant's if None. A column without variance
            correlates with nothing: c = 0.
        variant: the name of a published definition.
        scale: factor of the whole loss, finite and >= 0; the variant's if None.

    Returns:
        A scalar, float64 for float64 embeddings, else float32. Gradients have the dtype of the embeddings and
        are not differentiable again.

    Raises:
        ValueError: shapes or devices that do not match, B < 2, D < 1, an unknown variant, lambd, eps or scale out
            of range. On the CPU also NaN or infinite embeddings, with the view, their number and the first
            position; on GPUs, which nobody waits for, these make the loss NaN.
        TypeError: unequal or unsupported dtypes.
    """
    options = barlow_twins_options(variant, lambd=lambd, center=center, eps=eps, scale=scale)
    return _barlow_twins.barlow_twins(z_a, z_b, **options)[0]


@torch.no_grad()
def barlow_twins_components(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float | None = None,
    center: bool = True,
    eps: float | None = None,
    variant: str = "official",
    scale: float | None = None,
) -> BarlowTwinsComponents:
    """The parts of :func:`barlow_twins`, for the same arguments and at the cost of its forward pass."""
    options = barlow_twins_options(variant, lambd=lambd, center=center, eps=eps, scale=scale)
    return BarlowTwinsComponents(*_barlow_twins.barlow_twins(z_a, z_b, **options)[1].unbind())


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    r"""How many dimensions embeddings fill: the participation ratio of their centred covariance's eigenvalues.

    .. math::
        r = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2} = \frac{(\mathrm{tr}\, S)^2}{\|S\|_F^2}, \qquad
        S = \frac{1}{B} \sum_b (z_b - \bar z)(z_b - \bar z)'

    It is n where n directions share the variance evenly, and falls towards 1 as embeddings collapse into a line.
    Unlike the loss it depends on the scales of the features.

    With :math:`p_i = \lambda_i / \sum_j \lambda_j` it is :math:`\exp(H_2(p))` for the Rényi entropy of order 2,
    and so never above :math:`\exp(H_1(p))`, Shannon's. The effective rank of Roy & Vetterli (EUSIPCO 2007), which
    RankMe (Garrido et al., ICML 2023) computes of embeddings that are not centred, is the latter with the singular
    values :math:`\sqrt{\lambda_i}` in place of :math:`\lambda_i`, which is never smaller. They need a decomposition;
    order 2 needs traces only, one matrix product of O(B D min(B, D)), and can be paid at every step.

    Args:
        z: (B, D), B >= 2, float32, float64, bfloat16 or float16. Computed in float32 or better, relative to the
            first row: an offset common to all rows costs no precision.

    Returns:
        A detached scalar from 1 to min(B - 1, D), float64 for float64 embeddings, else float32; 0 where all rows
        are the same, NaN where values are not finite. Nothing waits for the device.

    Raises:
        ValueError: a shape other than (B, D), B < 2 or D < 1.
        TypeError: no tensor, or an unsupported dtype.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"effective_rank: z must be a tensor, got {type(z).__name__}")
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise UserError(f"effective_rank: z must have shape (B, D), B >= 2 and D >= 1, got {tuple(z.shape)}")
    dtype_code("effective_rank", "z", z)
    z = z.to(compute_dtype(z))
    z = z - z[0]
    z = z - z.mean(0)
    if z.shape[0] > z.shape[1]:
        z = z.t()
    s = product(z, z)
    trace = s.diagonal().sum()
    # Divided by the trace, squares stay within the range of floating-point numbers whatever the scale of z.
    energy = (s / trace).square().sum()
    return torch.where(trace == 0, 0, 1 / energy)
