"""Losses as functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.ops import barlow_twins as _barlow_twins


class BarlowTwinsComponents(NamedTuple):
    """What a Barlow Twins loss is made of: detached scalars of the loss's dtype and device."""

    loss: Tensor
    on_diagonal: Tensor
    """sum of (1 - c_ii)^2"""
    off_diagonal: Tensor
    """sum of c_ij^2 over i != j, not weighted"""
    mean_diagonal: Tensor
    """mean of c_ii: 1 where the views agree"""
    off_diagonal_rms: Tensor
    """root of the mean of c_ij^2 over i != j: 0 where features are decorrelated; 0 for D = 1"""


def barlow_twins(
    z_a: Tensor, z_b: Tensor, lambd: float = 5e-3, center: bool = True, eps: float = 1e-5
) -> Tensor:
    r"""Barlow Twins loss of the embeddings of two views (Zbontar et al., ICML 2021).

    .. math::
        L = \sum_i (1 - c_{ii})^2 + \lambda \sum_{i \neq j} c_{ij}^2, \qquad
        c_{ij} = \frac{1}{B} \sum_b \hat a_{bi} \hat b_{bj}, \qquad
        \hat a_{bi} = \frac{a_{bi} - \bar a_i}{\sqrt{\mathrm{var}(a_i) + \epsilon}}

    with mean and biased variance over the batch, each view on its own (an affine-free batch norm). Exact in
    O(B D min(B, D)) time; for 4 B < 3 D nothing of size D x D is stored. Runs are bit-for-bit repeatable.

    Args:
        z_a, z_b: (B, D), B >= 2, on one device and of one dtype: float32, float64, bfloat16 or float16. Half
            types are computed in float32, whatever autocast says; on GPUs the operands of the matrix products are
            rounded to the half type, as tensor cores multiply those, and their results are float32.
        lambd: weight of the off-diagonal term, finite and >= 0.
        center: False leaves the mean in: c_ij = a_i . b_j / (|a_i| |b_j|) where eps is added to |a_i|^2 / B.
        eps: added to the variance, finite and >= 0. A column without variance correlates with nothing: c = 0.

    Returns:
        A scalar, float64 for float64 embeddings, else float32. Gradients have the dtype of the embeddings and
        are not differentiable again.

    Raises:
        ValueError: shapes or devices that do not match, B < 2, D < 1, lambd or eps out of range. On the CPU
            also NaN or infinite embeddings, with the view, their number and the first position; on GPUs, which
            nobody waits for, these make the loss NaN.
        TypeError: unequal or unsupported dtypes.
    """
    return _barlow_twins.barlow_twins(z_a, z_b, lambd, center, eps)[0]


@torch.no_grad()
def barlow_twins_components(
    z_a: Tensor, z_b: Tensor, lambd: float = 5e-3, center: bool = True, eps: float = 1e-5
) -> BarlowTwinsComponents:
    """The parts of :func:`barlow_twins`, for the same arguments and at the cost of its forward pass."""
    return BarlowTwinsComponents(*_barlow_twins.barlow_twins(z_a, z_b, lambd, center, eps)[1].unbind())
