"""A weighted sum of the losses of rows, with its gradient in the same sweep of the scores.

Where the weights of the rows are known beforehand, up to what the sum is multiplied by later, each strip of scores
gives the losses of its rows, and then at once their derivatives: three products, where losses that any derivative may
come back to take four. Of rows among themselves that all fit in one strip, the derivatives as rows and as columns are
known together, and two products do. So they are where the candidates are rows of losses, too: three products in one
strip, else five. In the place of the embeddings their gradients are kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.products import product
from mmfast.ops.similarity.kernels import backend_of, passes_for
from mmfast.ops.similarity.op import DIFFERENTIATED_AGAIN, checked_rows, once, places, rule_of
from mmfast.ops.similarity.rows import to_rows


def _total(
    q,
    k,
    weights,
    labels_q,
    labels_k,
    ids_q,
    ids_k,
    valid_q,
    valid_k,
    scale,
    bias,
    kind,
    cosine,
    itself,
    sides,
    needs,
):
    need_q, need_k, need_scale, need_bias = needs
    rule = rule_of(labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, itself)
    backend = backend_of(q.device)
    own, other = checked_rows(q, k, valid_q, valid_k, cosine, backend)
    unit, n, dtype = own.unit, own.unit.shape[0], own.unit.dtype
    weights = weights.to(dtype).contiguous()
    values, counts, rows = (unit.new_empty(shape) for shape in ((n,), (n,), (4, n)))
    among, parts = k is None, places(unit, other.unit.shape[0])
    at_once = len(parts) == 1
    # One strip fills them, several add to them.
    room = torch.empty_like if at_once else torch.zeros_like
    grad_q = room(unit) if need_q or need_scale else None
    grad_k = room(other.unit) if need_k else None
    if among:
        grad_k = None if at_once else grad_q
    of_scale, of_bias = unit.new_zeros(()), unit.new_zeros(())
    passes = passes_for(kind, backend)
    run, columns = passes(rule, kind, scale, bias), None
    if among and at_once:
        columns = rows, weights
    elif sides:
        turned = passes(rule.turned(), kind, scale, bias)
        column_values, column_counts, column_rows = (torch.empty_like(x) for x in (values, counts, rows))
        columns = column_rows, weights
        if not at_once:
            for start, stop, place in places(other.unit, n):
                scores = product(other.unit[start:stop], unit, out=place)
                turned.forward(scores, start, column_values, column_counts, column_rows)
    for start, stop, place in parts:
        scores = product(unit if at_once else unit[start:stop], other.unit, out=place)
        run.forward(scores, start, values, counts, rows)
        if sides and at_once:
            turned.forward(scores.t().contiguous(), 0, column_values, column_counts, column_rows)
        if not any(needs):
            continue
        h, sums = run.backward(scores, start, rows, weights, True, columns)
        if need_bias:
            of_bias += sums.sum() / (2 if among and at_once else 1)
        if at_once:
            if grad_q is not None:
                torch.mm(h, other.unit, out=grad_q)
            if grad_k is not None:
                torch.mm(h.t(), unit, out=grad_k)
            continue
        if grad_q is not None:
            torch.addmm(grad_q[start:stop], h, other.unit, out=grad_q[start:stop])
        if grad_k is not None:
            torch.addmm(grad_k, h.t(), unit[start:stop], out=grad_k)
    if grad_q is not None:
        grad_q, along = to_rows(grad_q, own, scale, dtype, backend)
        of_scale = along.sum() / (2 if among else 1) if need_scale else of_scale
    if need_k:
        grad_k, _ = to_rows(grad_k, other, scale, dtype, backend)
    total = values + column_values if sides else values
    return (
        (total * weights).sum(),
        counts,
        grad_q if need_q else unit.new_empty(0),
        grad_k if need_k else unit.new_empty(0),
        of_scale,
        of_bias,
    )


def _total_fake(q, k, weights, *rest):
    dtype, needs = compute_dtype(q), rest[-1]
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty(len(q), dtype=dtype),
        q.new_empty(q.shape if needs[0] else 0, dtype=dtype),
        q.new_empty(k.shape if needs[1] else 0, dtype=dtype),
        q.new_empty((), dtype=dtype),
        q.new_empty((), dtype=dtype),
    )


_library = torch.library.Library("mmfast", "FRAGMENT")
_name = _library.define(
    "similarity_total(Tensor q, Tensor? k, Tensor weights, Tensor labels_q, Tensor? labels_k, Tensor? ids_q, "
    "Tensor? ids_k, Tensor? valid_q, Tensor? valid_k, Tensor scale, Tensor? bias, str kind, bool cosine, "
    "bool itself, bool sides, bool[] needs)"
    " -> (Tensor total, Tensor counts, Tensor grad_q, Tensor grad_k, Tensor grad_scale, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl(_name, _total, _key)
torch.library.register_fake(f"mmfast::{_name}", _total_fake, lib=_library)
_total_op = torch.ops.mmfast.similarity_total.default


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, upstream, total, *grads):
        return tuple(upstream * grad for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, weights, pairs, scale, bias, *options):
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
        total, counts, *grads = _total_op(q, k, weights, *pairs, scale, bias, *options, needs)
        ctx.dtypes = q.dtype, q.dtype, scale.dtype, scale.dtype
        # A gradient that is recorded depends on the embeddings as the sum does.
        ctx.save_for_backward(total, *grads)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return total, counts

    @staticmethod
    def backward(ctx, upstream, _counts):
        if upstream is None:
            return (None,) * 10
        total, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _FinalGradient.apply(upstream, total, *grads)
        else:
            grads = [upstream * grad if grad.numel() else grad for grad in grads]
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4, 5)]
        q, k, scale, bias = (
            grad.to(dtype) if need else None
            for grad, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)
        )
        return q, k, None, None, scale, bias, None, None, None, None


def similarity_total(
    q: Tensor,
    k: Tensor | None,
    weights: Tensor,
    labels: tuple[Tensor, Tensor],
    ids: tuple[Tensor, Tensor] | None,
    valid: tuple[Tensor, Tensor] | None,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    cosine: bool,
    itself: bool = False,
    sides: bool = False,
) -> tuple[Tensor, Tensor]:
    """() the sum of the losses of the rows of q times ``weights`` (B,), and (B,) their numbers of positives.

    sides: plus that of the losses of k (B, D) as rows, whose candidates are q, with the same weights. The other
    arguments are those of :func:`mmfast.ops.similarity.op.similarity`.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(DIFFERENTIATED_AGAIN)
    pairs = once(labels, ids, valid)
    itself = itself or k is None
    return _Total.apply(q, k, weights.detach(), pairs, scale, bias, kind, cosine, itself, sides)
