"""Standardised views of samples that may be on many processes or lack views, and the gradient through that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.collectives import Ranks


class Standardise(Function):
    """Standardised views in the compute type, and (D,) in fp64 what eps takes from the length of each column."""

    @staticmethod
    def forward(ctx, *arguments):
        # A Setting of barlow_twins_of_pairs, Ranks, None or bool (B, M), and views; of one name as in Pairs.
        setting, ranks, present, *views = arguments
        definition, dtype = setting.definition, compute_dtype(views[0])
        columns = [None if present is None else present[:, m, None] for m in range(len(views))]
        flat, hats = [], []
        for z, has in zip(views, columns, strict=True):
            moments, deviations = _moments(z.to(dtype), has, definition.center)
            flat.append(moments)
            hats.append(deviations)
        shared = ranks if setting.shared else Ranks(ranks.rows[ranks.rank :][:1])
        parts = shared.stack(torch.cat(flat)).split([len(x) for x in flat], dim=1)
        if setting.pooled:
            parts = [torch.cat(parts)] * len(views)
        statistics = [_merged(part, definition) for part in parts]
        if len(parts[0]) > 1:
            # Means of all rows, in two parts that take no precision from what they are subtracted from.
            for m, (z, one) in enumerate(zip(views, statistics, strict=True)):
                high = one.mean.to(dtype)
                hats[m] = (z.to(dtype) - high).sub_((one.mean - high).to(dtype))
        for m, (has, one) in enumerate(zip(columns, statistics, strict=True)):
            hats[m] = hats[m] * one.r.to(dtype)
            if has is not None:
                hats[m] = torch.where(has, hats[m], 0)
        ctx.setting, ctx.ranks, ctx.dtype = setting, ranks, views[0].dtype
        r, projections = ([getattr(x, name).to(dtype) for x in statistics] for name in ("r", "projection"))
        ctx.save_for_backward(present, torch.stack([x.count for x in statistics]), *r, *projections, *hats)
        shrinkages = [x.shrinkage for x in statistics]
        # Shared statistics carry the gradient of every view to each.
        fixed = [hat for m, hat in enumerate(hats) if not (setting.pooled or ctx.needs_input_grad[3 + m])]
        ctx.mark_non_differentiable(*shrinkages, *fixed)
        ctx.set_materialize_grads(False)
        return *hats, *shrinkages

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        setting, views = ctx.setting, len(grads) // 2
        present, counts, *saved = ctx.saved_tensors
        rs, projections, hats = saved[:views], saved[views : 2 * views], saved[2 * views :]
        grads = list(grads[:views])
        wanted = [m for m, g in enumerate(grads) if g is not None]
        # The partners' columns have mean zero, and so has what they give; but not these, and not those of several
        # processes if means are large against deviations.
        centred = present is None and ctx.ranks.group is None and not (setting.pooled or setting.debias)
        remove_mean = setting.definition.center and not centred
        sums = {}
        for m in wanted:
            if present is not None:
                grads[m] = torch.where(present[:, m, None], grads[m], 0)
            sums[m] = [(hats[m] * grads[m]).sum(0)]
            if remove_mean:
                sums[m].append(grads[m].sum(0))
        if setting.shared and ctx.ranks.group is not None:
            flat = [x.double() for m in wanted for x in sums[m]]
            parts = iter(ctx.ranks.sum(torch.cat(flat)).split([len(x) for x in flat]))
            sums = {m: [next(parts) for _ in sums[m]] for m in wanted}
        if setting.pooled:
            together = [sum(one) for one in zip(*sums.values(), strict=True)]
            sums = {m: together for m in wanted}
        for m in wanted:
            hat = hats[m]
            own, *means = ((x / counts[m].clamp(min=1)).to(hat.dtype) for x in sums[m])
            g = torch.addcmul(grads[m], hat, projections[m] * own, value=-1)
            for mean in means:
                g -= mean
            if present is not None:
                g = torch.where(present[:, m, None], g, 0)
            grads[m] = g.mul_(rs[m]).to(ctx.dtype)
        return None, None, None, *grads


class _Statistics(NamedTuple):
    """Of one view's columns (D,), in fp64."""

    count: Tensor
    """() rows that they are of"""
    mean: Tensor
    r: Tensor
    """hat = (z - mean) r"""
    shrinkage: Tensor
    """1 - mean(hat^2)"""
    projection: Tensor
    """dL/dz = r (dL/dhat - mean(dL/dhat) - projection hat mean(hat dL/dhat))"""


def _moments(z: Tensor, has: Tensor | None, center: bool) -> tuple[Tensor, Tensor]:
    """(1 + 2 D) in fp64: the number of rows, means, sums of squared deviations from those; and these (n, D).

    has: None, or bool (n, 1). Without ``center`` the means are 0.
    """
    if has is None:
        count = torch.full((1,), len(z), dtype=torch.float64, device=z.device)
    else:
        count = has.sum(dtype=torch.float64)[None]
    mean = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    if center and len(z):
        # Relative to a row, an offset costs no precision.
        shift = z[0] if has is None else z.index_select(0, has.to(torch.int8).argmax()[None])[0]
        z = z - shift
        if has is not None:
            z, shift = torch.where(has, z, 0), torch.where(count > 0, shift, 0)
        mean = z.sum(0).double() / count.clamp(min=1)
        z = z.sub_(mean.to(z.dtype))
        mean = mean + shift
    if has is not None:
        z = torch.where(has, z, 0)
    return torch.cat((count, mean, z.square().sum(0).double())), z


def _merged(parts: Tensor, definition: Definition) -> _Statistics:
    """Statistics of the rows of all parts, each as :func:`_moments` gives them."""
    columns = parts.shape[1] // 2
    counts, means, squares = parts.split([1, columns, columns], dim=1)
    count = counts.sum()
    # Relative to the mean of a part that has rows, a column that is constant in all of them has exactly its value.
    start = means.index_select(0, (counts[:, 0] > 0).to(torch.int8).argmax()[None])[0]
    mean = start + (counts * (means - start)).sum(0) / count.clamp(min=1)
    square = (squares + counts * (means - mean).square()).sum(0)
    if not definition.normalise:
        return _Statistics(
            count, mean, torch.ones_like(mean), 1 - square / count.clamp(min=1), torch.zeros_like(mean)
        )
    v = square / (count - int(definition.unbiased)).clamp(min=1)
    inner, outer = (0.0, definition.eps) if definition.eps_outside else (definition.eps, 0.0)
    deviation = (v + inner).sqrt() + outer
    # A column without variance correlates with nothing if eps is 0, too; one that is not finite shows.
    r = torch.where(deviation > 0, 1 / deviation, 0) + (deviation - deviation)
    lost = torch.where(r == 0, 1, inner * r * r + outer * r * (2 - outer * r))
    excess = 1 / count.clamp(min=1) if definition.unbiased else torch.zeros_like(count)
    kept = 1 - outer * r
    projection = torch.where(kept > 0, 1 / (kept * (1 - excess)), 0)
    return _Statistics(count, mean, r, excess + (1 - excess) * lost, projection)
