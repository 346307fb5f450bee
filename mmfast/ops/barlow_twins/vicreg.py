"""VICReg (Bardes, Ponce and LeCun, ICLR 2022) by the passes of Barlow Twins: a view's covariance is C with itself.

With centred columns c of a view and v_i = |c_i|^2 / (N - 1)::

    covariance = sum_{i != j} (c_i . c_j)^2 / (D (N - 1)^2)

:class:`~mmfast.ops.barlow_twins.pairs.Pairs` gives the sum of all squares of c'c, in Gram or in direct form, and the
|c_i|^2 that both the diagonal and the variances are; all that follows is a function of these few numbers, in fp64.
The Gram form subtracts the diagonal, as the correlations do; the direct form never has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import check_views, compute_dtype, not_finite, too_large
from mmfast.ops.barlow_twins.definition import Definition, Setting
from mmfast.ops.barlow_twins.multi_view import Sum, Upstream, check_ordinary
from mmfast.ops.barlow_twins.op import gram_is_cheaper
from mmfast.ops.barlow_twins.pairs import Pairs
from mmfast.ops.barlow_twins.standardise import Standardise
from mmfast.ops.collectives import Ranks, agree, raise_together


class VICRegDefinition(NamedTuple):
    """Weights of the three terms, what is added to variances, and what hinges of both views are multiplied by."""

    invariance: float
    variance: float
    covariance: float
    eps: float
    hinge: float


_COLUMNS = Definition(normalise=False, divide=False)


def vicreg(
    views: Mapping[str, Tensor],
    definition: VICRegDefinition,
    group,
    share: float | None = None,
    gram: bool | None = None,
    op: str = "vicreg",
) -> tuple[Tensor, Tensor]:
    """The loss of two views of one shape, and detached (4,) it and its terms, without their weights.

    ``group``: the processes whose rows these are together, or None. ``share``: of the true gradient what is returned;
    None: 1 / the number of processes. ``gram`` forces a form; by default it is the cheaper one. ``op``: who asks, in
    errors, which every process raises.
    """
    problem = None
    try:
        check_ordinary(views, _again(op))
        check_views(views, 2 if group is None else 0, corresponding=True, op=op)
        if not torch.compiler.is_compiling():
            # Plain PyTorch: another backend that is forced is refused.
            backends.choose("vicreg", next(iter(views.values())).device)
    except (TypeError, ValueError, NotImplementedError) as error:
        problem = error
    if group is None and problem is not None:
        raise problem
    z_a, z_b = views.values()
    ranks = _ranks(op, group, views, (definition, share, gram), problem)
    if ranks.total < 2:
        raise UserError(
            f"{op}: a batch must have at least 2 rows (a variance of one sample is undefined), "
            f"got {ranks.total} on the {len(ranks.rows)} ranks"
        )
    setting = Setting(
        pairs=((0, 0, 1.0), (1, 1, 1.0)),
        definition=_COLUMNS,
        share=1 / len(ranks.rows) if share is None else share,
        gram=gram_is_cheaper(ranks.total, z_a.shape[1]) if gram is None else gram,
    )
    with torch.autocast(z_a.device.type, enabled=False):
        loss, components = _loss(_Once.apply(z_a, op), _Once.apply(z_b, op), definition, setting, ranks, op)
    # Asking a GPU would wait for it: there the loss becomes NaN.
    if not (torch.compiler.is_compiling() or loss.is_cuda or loss.detach().isfinite()):
        for wrong in (not_finite(views, op), too_large(views, op)):
            raise_together(group, wrong)
    return loss, components


def _ranks(op: str, group, views: Mapping[str, Tensor], options, problem: Exception | None) -> Ranks:
    if problem is not None:
        return agree(op, group, 0, {}, problem)
    z, *_ = views.values()
    if group is None:
        return Ranks((len(z),))
    grad = torch.is_grad_enabled()
    facts = {
        "the number of columns": z.shape[1],
        "dtype": z.dtype,
        "that a gradient is required": [grad and x.requires_grad for x in views.values()],
        "the options": options,
    }
    return agree(op, group, len(z), facts, None)


def _loss(
    z_a: Tensor, z_b: Tensor, definition: VICRegDefinition, setting: Setting, ranks: Ranks, op: str
) -> tuple[Tensor, Tensor]:
    rows, columns = ranks.total, z_a.shape[1]
    standardised = Standardise.apply(setting, ranks, None, z_a, z_b)
    energies, *gaps = Pairs.apply(setting, ranks, None, z_a.dtype, *standardised)
    apart = (z_a - z_b).square().sum(0).double().sum()
    # In direct form every process has all of the energies.
    flat = torch.cat((energies if setting.gram else energies[:0], apart[None], *gaps))
    flat = Sum.apply(ranks, flat)
    if setting.gram:
        energies, flat = flat[:2], flat[2:]
    squares = flat[1:].view(2, columns) / -2
    if setting.gram:
        energies = energies - squares.square().sum(1)
        energies = energies + (energies.clamp(min=0) - energies).detach()

    invariance = flat[0] / (rows * columns)
    w = squares / (rows - 1) + definition.eps
    # A root has no derivative at zero; a constant column has none either.
    deviation = torch.where(w == 0, 0, torch.where(w == 0, 1, w).sqrt())
    variance = definition.hinge * (1 - deviation).relu().mean(1).sum()
    covariance = (energies / (columns * (rows - 1) ** 2)).sum()
    loss = definition.invariance * invariance
    loss = loss + definition.variance * variance + definition.covariance * covariance
    components = torch.stack((loss, invariance, variance, covariance)).detach().to(z_a.dtype)
    return Upstream.apply(ranks, setting.share, loss.to(z_a.dtype), _again(op)), components


class _Once(Function):
    """Embeddings in the compute type, whose gradient is not differentiated again."""

    @staticmethod
    def forward(ctx, z, op):
        ctx.op = op
        ctx.save_for_backward(z)
        compute = compute_dtype(z)
        z = z.contiguous()
        return z.view_as(z) if z.dtype == compute else z.to(compute)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        grad = grad.to(z.dtype)
        # z ties a recorded gradient to this node.
        return _Final.apply(grad, z, ctx.op) if torch.is_grad_enabled() else grad, None


class _Final(Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, grad, z, op):
        ctx.op = op
        return grad.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(_again(ctx.op))


def _again(op: str) -> str:
    return (
        f"{op}: the gradient must not be differentiated again or batched (double backward, forward mode, "
        "torch.func transforms, is_grads_batched)"
    )
