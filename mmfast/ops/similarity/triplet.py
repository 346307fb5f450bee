"""Losses of triplets (anchor, positive, negative) of labelled rows, at the memory of a strip of scores.

The sums of the terms of each anchor are differentiable, and their counts are given; what is made of them is
PyTorch's business. The backward pass computes the strips again; of the hardest pairs, it has their places.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import backends
from mmfast.ops.barlow_twins.checks import compute_dtype, not_finite, too_large
from mmfast.ops.similarity import triplet_passes as passes
from mmfast.ops.similarity.op import _without, strips
from mmfast.ops.similarity.passes import Rule
from mmfast.ops.similarity.triplet_kernels import Cpu
from mmfast.ops.similarity.triplet_passes import Options
from mmfast.ops.similarity.triplet_scores import OF_ITSELF, Scored

OP = "triplets"


def _options(kind, margin, ties, soft, lone, score) -> Options:
    return Options(kind, margin, ties, soft, lone, OF_ITSELF.get(score, 0.0))


def _rule(labels, ids, valid) -> Rule:
    pairs = (None if x is None else (x, x) for x in (labels, ids, valid))
    return Rule(*pairs, True)


def _engine(rule: Rule, kind: str) -> passes.Plain:
    # Exponentials are PyTorch's.
    native = backends.choose(OP, rule.labels[0].device) == "cpu" and kind != "smooth"
    return (Cpu if native else passes.Plain)(rule)


def _forward(z, labels, ids, valid, kind, margin, ties, soft, lone, score):
    options, rule = _options(kind, margin, ties, soft, lone, score), _rule(labels, ids, valid)
    scored = Scored.of(z, valid, score)
    rows = len(z)
    if z.device.type == "cpu" and not scored.finite():
        z = {"z": _without(z, valid)}
        raise not_finite(z, OP) or too_large(z, OP, "lengths")
    pairs = kind == "batch_hard"
    values, slopes = scored.x.new_empty(rows), scored.x.new_empty((2, rows if pairs else 0))
    counts = torch.empty((6, rows), dtype=torch.long, device=z.device)
    places = torch.empty((2, rows if pairs else 0), dtype=torch.int32, device=z.device)
    engine = _engine(rule, kind)
    for start, stop in strips(rows, rows, values):
        scores, part = scored.scores(start, stop), slice(start, stop)
        if pairs:
            found = engine.extremes(scores, start)
            places[:, part] = found.places
            own = None if valid is None else valid[part]
            values[part], counts[:, part], slopes[:, part] = passes.hardest(found, own, options)
        else:
            values[part], counts[:, part] = engine.strip(scores, start, options)
    if z.device.type != "cpu":
        # Comparisons hide NaN.
        values += 0 * scored.x.sum()
    return values, counts, places, slopes


def _forward_fake(z, labels, ids, valid, kind, margin, ties, soft, lone, score):
    rows, pairs, dtype = len(z), len(z) if kind == "batch_hard" else 0, compute_dtype(z)
    return (
        z.new_empty(rows, dtype=dtype),
        z.new_empty((6, rows), dtype=torch.long),
        z.new_empty((2, pairs), dtype=torch.int32),
        z.new_empty((2, pairs), dtype=dtype),
    )


def _backward(weights, z, labels, ids, valid, places, slopes, kind, margin, ties, soft, lone, score):
    options, rule = _options(kind, margin, ties, soft, lone, score), _rule(labels, ids, valid)
    scored = Scored.of(z, valid, score)
    weights = weights.to(scored.x.dtype)
    grad = torch.zeros_like(scored.x)
    if kind == "batch_hard":
        for place, slope in zip(places.long(), slopes, strict=True):
            scored.pull_pairs(grad, place, slope * weights)
    else:
        engine = _engine(rule, kind)
        for start, stop in strips(len(z), len(z), grad):
            scores = scored.scores(start, stop)
            scored.pull(grad, engine.slopes(scores, start, options, weights[start:stop]), start)
    if z.device.type != "cpu":
        grad += 0 * scored.x.sum()
    grad = scored.to_rows(grad, z.dtype)
    return grad if valid is None else grad.masked_fill_(~valid[:, None], 0)


def _backward_fake(weights, z, *_):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


_library = torch.library.Library("mmfast", "FRAGMENT")
_inputs = "Tensor z, Tensor labels, Tensor? ids, Tensor? valid"
_settings = "str kind, float margin, bool ties, bool soft, bool lone, str score"
_ops = {
    f"triplets_forward({_inputs}, {_settings})"
    " -> (Tensor values, Tensor counts, Tensor places, Tensor slopes)": (_forward, _forward_fake),
    f"triplets_backward(Tensor weights, {_inputs}, Tensor places, Tensor slopes, {_settings}) -> Tensor": (
        _backward,
        _backward_fake,
    ),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)

_forward_op = torch.ops.mmfast.triplets_forward.default
_backward_op = torch.ops.mmfast.triplets_backward.default

DIFFERENTIATED_AGAIN = (
    "triplets: the gradient must not be differentiated again (double backward, forward mode or torch.func); "
    "mmfast.ops.similarity.triplet_reference can be"
)


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward_op(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _Triplets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, labels, ids, valid, *settings):
        values, counts, places, slopes = _forward_op(z, labels, ids, valid, *settings)
        ctx.settings = settings
        ctx.save_for_backward(z, labels, ids, valid, places, slopes)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return values, counts

    @staticmethod
    def backward(ctx, weights, _counts):
        if weights is None:
            return (None,) * 10
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else _backward_op
        return gradient(weights, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


def triplets(
    z: Tensor, labels: Tensor, ids: Tensor | None, valid: Tensor | None, score: str, options: Options
) -> tuple[Tensor, Tensor]:
    """(B,) sums of the terms of rows z (B, D) as anchors, in the compute type, and int64 (6, B) counts.

    labels, ids: (B,) int64; valid: (B,) bool; score: one of ``triplet_scores.SCORES``. The counts are those of the
    terms above 0, of easy, semi-hard and hard triplets, of positives and of negatives.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(DIFFERENTIATED_AGAIN)
    return _Triplets.apply(z, labels, ids, valid, *options[:-1], score)
