"""What to watch beside a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import check_dense, compute_dtype
from mmfast.ops.native import dtype_code
from mmfast.ops.products import product


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
    check_dense("effective_rank", "z", z)
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
