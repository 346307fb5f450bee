"""The Barlow Twins loss of many views, of rows on many processes, of samples that lack views; and debiased.

The sum over pairs of views (a, b) of weight * L(a, b), in the notation of ``mmfast/ops/barlow_twins/op.py``. What is
shared is computed once: a view is standardised once and has, in Gram form, one Gram matrix, however many pairs it
is in; the gradient of its embeddings takes one product, with the weighted sum of its partners' Gram matrices.

Processes that share a batch (``Ranks``) send each other, in Gram form, the standardised rows, and keep their own
rows of the Gram matrices; in direct form they add up C. For N rows in all and D columns that is 2 N D numbers
against D^2 that are sent twice, and 8 N^2 D operations against 6 N D^2: for 4 N < 3 D the Gram form is cheaper in
both.

All of it is PyTorch around ``mmfast/ops/products.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import (
    OP,
    check_present,
    check_views,
    compute_dtype,
    not_finite,
    too_large,
)
from mmfast.ops.barlow_twins.definition import Request, Setting
from mmfast.ops.barlow_twins.op import gram_is_cheaper
from mmfast.ops.barlow_twins.pairs import Pairs, same
from mmfast.ops.barlow_twins.standardise import Standardise
from mmfast.ops.collectives import Ranks, agree, raise_together

_ALONE = Request()


def barlow_twins_of_pairs(
    views: Mapping[str, Tensor],
    pairs: Sequence[tuple[int, int, float]] = ((0, 1, 1.0),),
    present: Tensor | None = None,
    request: Request = _ALONE,
    corresponding: bool = False,
    gram: bool | None = None,
    op: str = OP,
) -> tuple[Tensor, Tensor]:
    """The loss, and detached components (pairs, 5) of its terms, which are those of two views: see
    ``barlow_twins``.

    views: (B, D_m) on this process, of one D if ``corresponding``. present: None, or bool (B, M): which samples
    have which views; what is not present is not looked at. A view's statistics are those of the rows that have it,
    a pair's C is the mean over the rows that have both; a pair that fewer than two rows have is left out. Views of
    different widths have no diagonal: their term is lambd times the sum of all D_a x D_b squares.

    ``debias``: the off-diagonal part is an estimate without bias of that of the distribution the rows come from:
    with a_b for row b of Â,

        |C|^2 ~ sum_{b != c} (a_b . a_c) (b_b . b_c) / (N (N - 1))

    for known means (``center=False``), and where means were taken out

        |C|^2 ~ (sum_{b != c} (a_b . a_c) (b_b . b_c) - 2 / (N - 2) sum_b |a_b|^2 |b_b|^2
                 + |Â|^2 |B̂|^2 / ((N - 1) (N - 2))) / (N (N - 3)),

    the U-statistic of Song et al., JMLR 13 (2012), eq. 5, for Gram matrices whose rows sum to zero; of either the
    same of c_ii^2 is subtracted for every column.

    ``gram`` forces a form; by default it is the cheaper one. Every process raises the same error, in which views
    have their names and ``op`` is whose they are.
    """
    definition, pooled, debias, sharing = request
    group, problem = sharing.across(), None
    try:
        check_ordinary(views, _ORDINARY)
        sharing.check()
        definition.check()
        check_views(views, 2 if group is None else 0, corresponding, op)
        if present is not None:
            check_present(present, views)
    except (TypeError, ValueError, NotImplementedError) as error:
        problem = error
    if group is not None:
        ranks = _agreed(
            group, views, pairs, present, (definition, pooled, debias, sharing[:2], gram), problem
        )
    elif problem is not None:
        raise problem
    else:
        ranks = Ranks((len(next(iter(views.values()))),))
    _check_rows(ranks, sharing.stats == "local", debias, definition.center)

    matrices = list(views.values())
    z, widths = matrices[0], [z.shape[1] for z in matrices]
    setting = Setting(
        pairs=tuple(pairs),
        definition=definition,
        pooled=pooled,
        debias=debias,
        shared=sharing.stats != "local",
        share=1 / len(ranks.rows) if sharing.grad_convention == "legacy" else 1.0,
        gram=gram_is_cheaper(ranks.total, min(widths)) if gram is None else gram,
        narrow=z.is_cuda and compute_dtype(z) != z.dtype,
    )
    loss, components = _loss(matrices, present, setting, ranks)
    # Asking a GPU would wait for it: there the loss becomes NaN.
    if not (torch.compiler.is_compiling() or loss.is_cuda or loss.detach().isfinite()):
        if present is not None:
            views = {
                name: torch.where(present[:, m, None], z, 0) for m, (name, z) in enumerate(views.items())
            }
        for wrong in (not_finite(views, op), too_large(views, op)):
            raise_together(group, wrong)
    return loss, components


_ORDINARY = (
    "barlow_twins: torch.func transforms, forward-mode and batched derivatives are for two complete views of one "
    "process, without debias and pooled statistics"
)


def check_ordinary(views: Mapping[str, Tensor], sentence: str) -> None:
    """Refuses with ``sentence`` what carries derivatives or maps that no backward pass gives."""
    for z in views.values():
        if not isinstance(z, Tensor) or torch.compiler.is_compiling():
            continue
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(z).tangent is not None
        if dual or torch._C._functorch.is_functorch_wrapped_tensor(z):
            raise NotImplementedError(sentence)


def _agreed(group, views, pairs, present, options, problem: Exception | None) -> Ranks:
    if problem is not None:
        return agree("barlow_twins", group, 0, {}, problem)
    grad = torch.is_grad_enabled()
    facts = {
        "the number of views": len(views),
        "the number of columns": [z.shape[1] for z in views.values()],
        "dtype": next(iter(views.values())).dtype,
        "that a gradient is required": [grad and z.requires_grad for z in views.values()],
        "that present is given": present is not None,
        "the pairs": list(pairs),
        "the options": options,
    }
    return agree("barlow_twins", group, len(next(iter(views.values()))), facts, None)


def _check_rows(ranks: Ranks, local: bool, debias: bool, center: bool) -> None:
    every = "" if ranks.group is None else f" on the {len(ranks.rows)} ranks"
    if ranks.total < 2:
        raise UserError(
            f"barlow_twins: a batch must have at least 2 rows (a correlation over one sample is undefined), "
            f"got {ranks.total}{every}"
        )
    if debias and ranks.total < (least := 4 if center else 2):
        raise UserError(f"barlow_twins: debias must have at least {least} rows, got {ranks.total}{every}")
    if local and min(ranks.rows) < 2:
        raise UserError(
            "barlow_twins: with stats='local' every rank must have at least 2 rows, "
            f"got {', '.join(map(str, ranks.rows))}"
        )


def _loss(
    views: list[Tensor], present: Tensor | None, setting: Setting, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(views[0])
    count = len(views)
    outputs = Standardise.apply(setting, ranks, present, *views)
    hats, shrinkages = outputs[:count], outputs[count:]
    energies, *gaps = Pairs.apply(setting, ranks, present, views[0].dtype, *hats, *shrinkages)
    rows = _rows_of_pairs(present, ranks)

    gaps = iter(gaps)
    sums = []
    for a, b, _ in setting.pairs:
        sums.append({"gap": next(gaps)} if same(hats, a, b) else {})
        if setting.debias:
            sums[-1] |= _lengths(hats[a], hats[b])
    flat = torch.cat(
        [
            # In direct form every process has all of these.
            energies if setting.gram else energies[:0],
            *(x.reshape(-1).double() for one in sums for x in one.values()),
        ]
    )
    flat = Sum.apply(ranks, flat)
    if setting.gram:
        energies, flat = flat.split([len(energies), len(flat) - len(energies)])
    parts = iter(flat.split([x.numel() for one in sums for x in one.values()]))

    loss, components = 0.0, []
    for (a, b, weight), energy, one in zip(setting.pairs, energies.unbind(), sums, strict=True):
        known = {name: next(parts).view(x.shape) for name, x in one.items()}
        n = rows if present is None else rows[a, b]
        term, summary = _term(n, energy, known, views[a], views[b], setting)
        loss = loss + weight * term
        components.append(summary)
    loss = Upstream.apply(ranks, setting.share, loss.to(dtype), _ORDINARY)
    return loss, torch.stack(components).to(dtype)


def _rows_of_pairs(present: Tensor | None, ranks: Ranks) -> float | Tensor:
    """How many rows have both views of a pair: (M, M) in fp64, or the same number for all."""
    if present is None:
        return float(ranks.total)
    has = present.double()
    return ranks.sum((has[:, :, None] * has[:, None, :]).sum(0))


def _lengths(hat_a: Tensor, hat_b: Tensor) -> dict[str, Tensor]:
    """Sums over this process's rows, for :func:`_debiased`."""
    a, b = hat_a.square(), hat_b.square()
    lengths = {"rows": (a.sum(1) * b.sum(1)).sum(), "columns_a": a.sum(0), "columns_b": b.sum(0)}
    if a.shape == b.shape:
        lengths["elements"] = (a * b).sum(0)
    return lengths


def _term(rows, energy: Tensor, sums: dict[str, Tensor], z_a: Tensor, z_b: Tensor, setting: Setting):
    """The loss of one pair, and its components (5,), in fp64; zeros for a pair that fewer than two rows have."""
    definition, masked = setting.definition, isinstance(rows, Tensor)
    n = rows.clamp(min=2) if masked else rows
    columns = z_a.shape[1], z_b.shape[1]
    on, mean, pairs = energy.new_zeros(()), energy.new_full((), float("nan")), columns[0] * columns[1]
    off = energy
    if "gap" in sums:
        gap = sums["gap"] / (2 * n)
        if definition.divide:
            c = 1 - gap
        else:
            c, gap = -gap, 1 / n + gap
        on, mean, pairs = gap.square().sum(), c.mean(), pairs - columns[0]
        if setting.gram:
            off = off - (n * c).square().sum()
    if setting.debias:
        off = _debiased(off, n, sums, definition.center)
    else:
        off = off / n**2
        off = off + (off.clamp(min=0) - off).detach()
    factor = definition.scale if definition.divide else definition.scale * n**2
    loss = factor * (on + definition.lambd * off)
    rms = (off.clamp(min=0) / max(1, pairs)).sqrt()
    summary = torch.stack((loss, on, off, mean, rms)).detach()
    if masked:
        loss, summary = (torch.where(rows > 1, x, 0) for x in (loss, summary))
    return loss, summary


def _debiased(off: Tensor, n: float, sums: dict[str, Tensor], center: bool) -> Tensor:
    """The sum of squares of C less its diagonal, without bias: from that of N C and lengths of rows and columns."""
    lengths, product = sums["rows"], sums["columns_a"].sum() * sums["columns_b"].sum()
    if "elements" in sums:
        lengths = lengths - sums["elements"].sum()
        product = product - (sums["columns_a"] * sums["columns_b"]).sum()
    if not center:
        return (off - lengths) / (n * (n - 1))
    return (off - lengths * n / (n - 2) + product / ((n - 1) * (n - 2))) / (n * (n - 3))


class Upstream(Function):
    """The loss that every process has; its gradient is that of the sum over processes, or a share of it.

    ``unbatched``: the sentence that refuses a batch of gradients from above.
    """

    @staticmethod
    def forward(ctx, ranks, share, loss, unbatched):
        ctx.ranks, ctx.share, ctx.unbatched = ranks, share, unbatched
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream):
            raise NotImplementedError(ctx.unbatched)
        return None, None, ctx.ranks.sum(upstream) * ctx.share, None


class Sum(Function):
    """Sums over the processes, of what contributes to a loss that every process has alike."""

    @staticmethod
    def forward(ctx, ranks, x):
        return ranks.sum(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return None, upstream
