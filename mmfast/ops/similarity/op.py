"""Losses of rows by their similarities to candidates, never at the memory of all scores.

Scores are inner products, of unit rows for cosines, a strip of rows at a time. The forward pass keeps four numbers a
row; the backward pass computes the strips again, or keeps the scores where they are no larger than the embeddings.
If rows are their own candidates, both derivatives by a score, as that of its row and of its column, are known from
the numbers of both rows, so that each strip gives its rows' whole gradient by one product.

The losses of the rows are differentiable; what is made of them (means, weights) is PyTorch's business.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast.ops.barlow_twins.checks import compute_dtype, not_finite
from mmfast.ops.products import product
from mmfast.ops.similarity.kernels import backend_of, passes_for
from mmfast.ops.similarity.passes import Rule
from mmfast.ops.similarity.rows import Rows, rows_of, to_rows

# Scores of 4 bytes of a strip: so many stay near the processor.
STRIP = 2**19
DEVICE_STRIP = 2**23


def strips(rows: int, candidates: int, like: Tensor):
    """(start, stop) of strips of about as many scores, on ``like``'s device and of its type."""
    most = STRIP if like.device.type == "cpu" else DEVICE_STRIP
    step = max(1, most * 4 // (like.dtype.itemsize * max(1, candidates)))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def places(unit: Tensor, candidates: int, kept: Tensor | None = None):
    """(start, stop, where the scores are) of strips: in ``kept``, or else one after the other in the same memory."""
    parts = strips(unit.shape[0], candidates, unit)
    if (kept is not None and kept.numel()) or not parts:
        return [(start, stop, kept[start:stop]) for start, stop in parts]
    memory = unit.new_empty(parts[0][1], candidates)
    return [(start, stop, memory[: stop - start]) for start, stop in parts]


def keeps_scores(rows: int, candidates: int, columns: int, itself: bool) -> bool:
    """Whether the scores are no larger than the embeddings, so that they are kept."""
    return 2 * rows * candidates <= (rows if itself else rows + candidates) * columns * (2 if itself else 1)


def rule_of(labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, itself) -> Rule:
    def pair(own, other):
        return None if own is None else (own, own if other is None else other)

    return Rule(pair(labels_q, labels_k), pair(ids_q, ids_k), pair(valid_q, valid_k), itself)


def checked_rows(q, k, valid_q, valid_k, cosine: bool, backend: str) -> tuple[Rows, Rows]:
    """Of the rows and the candidates; on the CPU refuses what is not finite."""
    own = rows_of(q, cosine, valid_q, backend)
    others = own if k is None else rows_of(k, cosine, valid_k, backend)
    if not (own.finite and others.finite):
        q, k = _without(q, valid_q), None if k is None else _without(k, valid_k)
        views = {"query" if k is not None else "z": q} | ({} if k is None else {"key": k})
        raise not_finite(views, "similarity")
    return own, others


def _forward(
    q, k, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias, kind, cosine, itself, keep
):
    rule = rule_of(labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, itself)
    backend = backend_of(q.device)
    own, others = checked_rows(q, k, valid_q, valid_k, cosine, backend)
    unit, other = own.unit, others.unit
    n, candidates = unit.shape[0], other.shape[0]
    values, counts, rows = unit.new_empty(n), unit.new_empty(n), unit.new_empty(4, n)
    kept = unit.new_empty((n, candidates) if keep else (0, 0))
    run = passes_for(kind, backend)(rule, kind, scale, bias)
    for start, stop, place in places(unit, candidates, kept):
        run.forward(product(unit[start:stop], other, out=place), start, values, counts, rows)
    return values, counts, rows, kept


def _without(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.where(valid[:, None], torch.zeros((), dtype=x.dtype, device=x.device))


def _forward_fake(
    q, k, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias, kind, cosine, itself, keep
):
    dtype = compute_dtype(q)
    candidates = len(q) if k is None else len(k)
    return (
        q.new_empty(len(q), dtype=dtype),
        q.new_empty(len(q), dtype=dtype),
        q.new_empty((4, len(q)), dtype=dtype),
        q.new_empty((len(q), candidates) if keep else (0, 0), dtype=dtype),
    )


def _backward(
    weights,
    q,
    k,
    labels_q,
    labels_k,
    ids_q,
    ids_k,
    valid_q,
    valid_k,
    scale,
    bias,
    rows,
    kept,
    kind,
    cosine,
    itself,
    needs,
):
    need_q, need_k, need_scale, need_bias = needs
    rule = rule_of(labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, itself)
    backend, both = backend_of(q.device), k is None
    own = rows_of(q, cosine, valid_q, backend)
    other = own if both else rows_of(k, cosine, valid_k, backend)
    weights = weights.to(own.unit.dtype).contiguous()
    grad_q = torch.empty_like(own.unit) if need_q or need_scale else None
    grad_k = torch.zeros_like(other.unit) if need_k else None
    of_scale, of_bias = own.unit.new_zeros(()), own.unit.new_zeros(())
    run = passes_for(kind, backend)(rule, kind, scale, bias)
    for start, stop, place in places(own.unit, other.unit.shape[0], kept):
        scores = place if kept.numel() else product(own.unit[start:stop], other.unit, out=place)
        columns = (rows, weights) if both else None
        h, sums = run.backward(scores, start, rows, weights, not kept.numel(), columns)
        if need_bias:
            of_bias += sums.sum() / (2 if both else 1)
        if grad_q is not None:
            torch.mm(h, other.unit, out=grad_q[start:stop])
        if need_k:
            torch.addmm(grad_k, h.t(), own.unit[start:stop], out=grad_k)
    result_q, result_k = q.new_empty(0), q.new_empty(0)
    if grad_q is not None:
        result_q, along = to_rows(grad_q, own, scale, q.dtype, backend)
        if need_scale:
            of_scale = along.sum() / (2 if both else 1)
    if need_k:
        result_k, _ = to_rows(grad_k, other, scale, k.dtype, backend)
    return result_q if need_q else q.new_empty(0), result_k, of_scale, of_bias


def _backward_fake(weights, q, k, *rest):
    *_, rows, _kept, _kind, _cosine, _itself, needs = rest
    return (
        q.new_empty(q.shape if needs[0] else 0),
        q.new_empty(k.shape if needs[1] else 0),
        rows.new_empty(()),
        rows.new_empty(()),
    )


_library = torch.library.Library("mmfast", "FRAGMENT")
_inputs = (
    "Tensor q, Tensor? k, Tensor labels_q, Tensor? labels_k, Tensor? ids_q, Tensor? ids_k, Tensor? valid_q, "
    "Tensor? valid_k, Tensor scale, Tensor? bias"
)
_ops = {
    f"similarity_forward({_inputs}, str kind, bool cosine, bool itself, bool keep)"
    " -> (Tensor values, Tensor counts, Tensor rows, Tensor kept)": (_forward, _forward_fake),
    f"similarity_backward(Tensor weights, {_inputs}, Tensor rows, Tensor kept, str kind, bool cosine, "
    "bool itself, bool[] needs)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_scale, Tensor grad_bias)": (_backward, _backward_fake),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)

_forward_op = torch.ops.mmfast.similarity_forward.default
_backward_op = torch.ops.mmfast.similarity_backward.default

DIFFERENTIATED_AGAIN = (
    "similarity: the gradient must not be differentiated again (double backward, forward mode or torch.func); "
    "mmfast.ops.similarity.reference can be"
)


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward_op(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias, kind, cosine, itself
    ):
        inputs = q, k, labels_q, labels_k, ids_q, ids_k, valid_q, valid_k, scale, bias
        ctx.options = kind, cosine, itself
        keep = any(ctx.needs_input_grad) and keeps_scores(
            len(q), len(q) if k is None else len(k), q.shape[1], k is None
        )
        values, counts, rows, kept = _forward_op(*inputs, *ctx.options, keep)
        ctx.save_for_backward(*inputs, rows, kept)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return values, counts

    @staticmethod
    def backward(ctx, weights, _counts):
        if weights is None:
            return (None,) * 13
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 8, 9)]
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else _backward_op
        found = gradient(weights, *ctx.saved_tensors, *ctx.options, needs)
        grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
        return grads[0], grads[1], *(None,) * 6, grads[2], grads[3], *(None,) * 3


def once(*pairs: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, ...]:
    """The tensors of pairs, those that candidates share with rows once: compilers take no tensor twice."""
    return tuple(
        x
        for pair in pairs
        for x in ((None, None) if pair is None else (pair[0], None if pair[1] is pair[0] else pair[1]))
    )


def similarity(
    q: Tensor,
    k: Tensor | None,
    labels: tuple[Tensor, Tensor],
    ids: tuple[Tensor, Tensor] | None,
    valid: tuple[Tensor, Tensor] | None,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    cosine: bool,
    itself: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B,) the losses of the rows of q (B, D), and their numbers of positives, in the compute type.

    k: candidates (C, D), None for q itself. labels, ids, valid: of the rows and of the candidates. scale, bias:
    scalars of the compute type; logits are scale * scores + bias. kind: one of ``passes.KINDS``.
    itself: row i is candidate i, and none of its own; always so without k.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(DIFFERENTIATED_AGAIN)
    pairs = once(labels, ids, valid)
    return _Similarity.apply(q, k, *pairs, scale, bias, kind, cosine, itself or k is None)
