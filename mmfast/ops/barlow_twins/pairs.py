"""Pairs of standardised views: the squares of their correlations, the diagonals, and the gradient of both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmfast.ops.products import product


class Pairs(Function):
    """Of all pairs, in fp64, the sum of the squares of N C; for pairs with a diagonal (D,) what :func:`_gap` gives.

    The latter, and in Gram form the former, are this process's part of a sum over all; in direct form the former is
    that of all, less the diagonal where there is one.
    """

    @staticmethod
    def forward(ctx, *arguments):
        # Dynamo (torch 2.13) takes the context for an argument if there are as many as names in the signature.
        setting, ranks, present, dtype, *rest = arguments
        count = len(rest) // 2
        hats, shrinkages = rest[:count], rest[count:]
        operands = [hat.to(dtype) if setting.narrow else hat for hat in hats]
        pairs = [pair[:2] for pair in setting.pairs]
        if setting.gram:
            finish = [ranks.start_gather(x) for x in operands]
        else:
            # The sums of one pair travel while the next one's are computed.
            finish = [ranks.start_sum(product(operands[a].t(), operands[b].t())) for a, b in pairs]
        divide = setting.definition.divide
        gaps = [_gap(hats, shrinkages, a, b, present, divide) for a, b in pairs if same(hats, a, b)]
        if setting.gram:
            every, matrices = [], []
            for x, hat, gathered in zip(operands, hats, finish, strict=True):
                every.append(gathered())
                matrices.append(product(x, every[-1]))
                if setting.narrow:
                    # The diagonal is most of the energy: rounded rows would tell in the loss.
                    matrices[-1].diagonal(ranks.first).copy_(hat.square().sum(1))
            energies = [(matrices[a] * matrices[b]).sum(dtype=torch.float64) for a, b in pairs]
        else:
            every, matrices = operands, [p() for p in finish]
            for p, (a, b) in zip(matrices, pairs, strict=True):
                if same(hats, a, b):
                    p.fill_diagonal_(0)
            energies = [p.square().sum(dtype=torch.float64) for p in matrices]
        ctx.setting, ctx.first = setting, ranks.first
        ctx.save_for_backward(*hats, *every, *matrices)
        return torch.stack(energies), *gaps

    @staticmethod
    @once_differentiable
    def backward(ctx, of_energies, *of_gaps):
        setting, count = ctx.setting, (len(ctx.needs_input_grad) - 4) // 2
        saved = ctx.saved_tensors
        hats, every, matrices = saved[:count], saved[count : 2 * count], saved[2 * count :]
        of_gaps = iter(of_gaps)
        weights = []
        for i, (a, b, _) in enumerate(setting.pairs):
            # A view that is its own partner is on both sides.
            factor = 4 if a == b else 2
            weights.append((factor * of_energies[i], -factor * next(of_gaps) if same(hats, a, b) else None))
        grads = []
        for m, hat in enumerate(hats):
            partners = [
                (a + b - m, i, *weights[i]) for i, (a, b, _) in enumerate(setting.pairs) if m in (a, b)
            ]
            if not (ctx.needs_input_grad[4 + m] and partners):
                grads.append(None)
                continue
            total = None
            for other, i, weight, _ in partners:
                if setting.gram:
                    part = matrices[other] * weight.to(hat.dtype)
                else:
                    p = matrices[i] if m == setting.pairs[i][0] else matrices[i].t()
                    part = _product(every[other], p).mul_(weight.to(hat.dtype))
                total = part if total is None else total.add_(part)
            if setting.gram:
                total = _gram_product(total, every[m], hat, ctx.first)
            for other, _, _, weight in partners:
                if weight is not None:
                    total.addcmul_(hats[other], weight.to(hat.dtype))
            grads.append(total)
        return None, None, None, None, *grads, *([None] * count)


def _gap(hats, shrinkages, a: int, b: int, present: Tensor | None, divide: bool) -> Tensor:
    """(D,) sums over the rows that have both views, in fp64: of 2 (1 - â b̂), or if not ``divide`` of -2 â b̂."""
    if not divide:
        return -2 * (hats[a] * hats[b]).sum(0).double()
    if present is None:
        # Without cancellation where the views nearly agree, for the lengths of columns are known.
        lost = shrinkages[a] + shrinkages[b]
        return (hats[a] - hats[b]).square_().sum(0).double() + len(hats[a]) * lost
    both = present[:, a] & present[:, b]
    return 2 * (both.sum() - (hats[a] * hats[b]).sum(0).double())


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T; where one of them is of a half type, the other is rounded to it."""
    if x.dtype == y.dtype:
        return product(x, y)
    wide, half = (x, y.dtype) if x.dtype.itemsize > y.dtype.itemsize else (y, x.dtype)
    # Within the range of fp16, whatever its elements are.
    size = wide.abs().amax().clamp(min=torch.finfo(wide.dtype).tiny)
    x, y = (z if z.dtype == half else (z / size).to(half) for z in (x, y))
    return product(x, y) * size


def _gram_product(x: Tensor, rows: Tensor, own: Tensor, first: int) -> Tensor:
    """x @ rows, for weighted Gram matrices x (n, N), of which the large diagonal is not rounded."""
    if x.dtype == rows.dtype:
        return product(x, rows.t())
    diagonal = x.diagonal(first).clone()
    x.diagonal(first).zero_()
    return _product(x, rows.t()).addcmul_(diagonal[:, None], own)


def same(views, a: int, b: int) -> bool:
    """Whether the columns of two views correspond."""
    return views[a].shape[1] == views[b].shape[1]
