"""Probabilistic knowledge transfer between modalities (Passalis & Tefas, ECCV 2018), in strips of rows.

For rows u = h / (|h| + eps) of each modality, K = (u u' + 1) / 2 and P = K / rowsum(K), a directed pair of a teacher
T and a student S with weights g >= 0 of rows adds

    1 / B^2 sum_i g_i sum_j P^T_ij log((P^T_ij + eps) / (P^S_ij + eps))

Rows of P sum to 1, so P^T - P^S may be taken off each term: what is summed is then a Bregman divergence, and nearly
equal modalities do not cancel. So may 1 be off P^T / (P^S + eps) and P^T / (P^T + eps) in the derivatives by P, from
which their mean over the row is taken anyway.

K is symmetric: where the backward pass has a strip of it, the rows' sums, centres and weights of all rows give the
same entries in their second role, as columns of the rows of others. No B x B matrix exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import backends
from mmfast.ops.barlow_twins.checks import compute_dtype, not_finite
from mmfast.ops.products import matmul, product
from mmfast.ops.similarity.checks import refuse_weights
from mmfast.ops.similarity.pkt_reference import SMALLEST_NORM

# Elements of one modality's strip.
STRIP = 2**18

# Squares of much larger values overflow: such rows are scaled by a power of two.
_LARGE = 2.0**400


class Settings(NamedTuple):
    """Pairs as indices of modalities, and the options of the loss; ``needs``: which modalities need a gradient."""

    teachers: tuple[int, ...]
    students: tuple[int, ...]
    eps: float
    row_sum: bool
    exclude_self: bool
    teacher_grad: bool
    needs: tuple[bool, ...]

    @property
    def taught(self) -> tuple[bool, ...]:
        """Modalities of which a gradient is needed and, if the teachers' is left out, is not zero."""
        moved = {*self.students, *(self.teachers if self.teacher_grad else ())}
        return tuple(need and m in moved for m, need in enumerate(self.needs))

    def factor(self, rows: int) -> float:
        return 1 / rows if self.row_sum else 1 / rows**2

    def meetings(self) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
        """Two modalities -> the pairs of them: teacher, student, number, and the sign of first minus second."""
        found = {}
        for number, (teacher, student) in enumerate(zip(self.teachers, self.students, strict=True)):
            two = min(teacher, student), max(teacher, student)
            sign = 1 if teacher < student else -1
            found.setdefault(two, []).append((teacher, student, number, sign))
        return found


class _Units(NamedTuple):
    """Rows without direction have zeros in all three."""

    u: Tensor
    """(B, D) in the dtype computed in"""
    inverse: Tensor
    """(B,) 1 / (|h| + eps)"""
    inverse_norm: Tensor
    """(B,) 1 / |h|"""

    @classmethod
    def of(cls, h: Tensor, eps: float) -> _Units:
        # In fp64, so that u is as near to the unit sphere as it can be: nearly opposite rows have scores of nearly 0.
        compute, h = compute_dtype(h), h.double().contiguous()
        largest = h.abs().amax(1)
        exponent = torch.frexp(largest).exponent.clamp(0, 1022)
        factor = torch.where(largest > _LARGE, torch.ldexp(torch.ones_like(largest), -exponent), 1)
        h = h * factor[:, None]
        norm = torch.linalg.vector_norm(h, dim=1)
        no_direction = norm < SMALLEST_NORM
        inverse = torch.where(no_direction, 0, 1 / (norm + eps * factor))
        inverse_norm = torch.where(no_direction, 0, factor / norm)
        u = h.mul_(inverse[:, None]).to(compute)
        return cls(u, (inverse * factor).to(compute), inverse_norm.to(compute))

    def scores(self, start: int, stop: int, exclude_self: bool) -> Tensor:
        """Rows of K."""
        k = product(self.u[start:stop], self.u).add_(1).mul_(0.5).clamp_(min=0)
        if exclude_self:
            k.diagonal(start).zero_()
        return k

    def pull(self, grad: Tensor) -> Tensor:
        """The gradient of h for that of u."""
        along = (self.u * grad).sum(1) * self.inverse_norm
        return grad * self.inverse[:, None] - self.u * along[:, None]


def _strips(rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, STRIP // rows)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _log_ratio(difference: Tensor, inverse_p: Tensor, inverse_q: Tensor) -> Tensor:
    """log((p + eps) / (q + eps)), relative to the smaller of the two: the argument of log1p is never near -1."""
    return (difference.abs() * torch.maximum(inverse_p, inverse_q)).log1p_().copysign_(difference)


def _row_weights(weights: Sequence[Tensor], like: Tensor, pairs: int) -> list[Tensor]:
    if not weights:
        return [like.new_ones(like.shape[0])] * pairs
    return [w.to(like.dtype) for w in weights]


def _forward(views, weights, *settings_and_names):
    # Plain PyTorch: another backend that is forced is refused.
    backends.choose("pkt", views[0].device)
    *settings, names = settings_and_names
    settings = Settings(*settings)
    eps, taught, rows = settings.eps, settings.taught, views[0].shape[0]
    units = [_Units.of(h, eps) for h in views]
    u = units[0].u
    # Asking any other device would wait for it: there the loss becomes NaN.
    if not u.is_cuda:
        _check_finite(views, weights, units, names)
    weights = _row_weights(weights, u, len(settings.teachers))
    scalars = u.new_zeros((2, len(views), rows))
    sums, centres = scalars.unbind()
    if not settings.exclude_self:
        for m, unit in enumerate(units):
            sums[m] = _row_sums(unit.u)
    values = u.new_zeros(rows)
    for start, stop in _strips(rows):
        here = slice(start, stop)
        p, inverse = [], []
        for m, unit in enumerate(units):
            k = unit.scores(start, stop, settings.exclude_self)
            if settings.exclude_self:
                # A row opposite to all others has no neighbours.
                total = k.sum(1)
                sums[m, here] = torch.where(total == 0, 1, total)
            p.append(k.div_(sums[m, here, None]))
            inverse.append((k + eps).reciprocal_())
        for (m, n), pairs in settings.meetings().items():
            difference = p[m] - p[n]
            log = _log_ratio(difference, inverse[m], inverse[n])
            for teacher, student, number, sign in pairs:
                g = weights[number][here]
                d, r = (difference, log) if sign > 0 else (-difference, -log)
                value = ((p[teacher] + eps).mul_(r).sub_(d)).sum(1) - eps * r.sum(1)
                values[here] += g * value
                if taught[student]:
                    centres[student, here] -= g * ((d - eps).mul_(inverse[student]).mul_(p[student])).sum(1)
                if taught[teacher] and settings.teacher_grad:
                    centres[teacher, here] += g * ((r - eps * inverse[teacher]).mul_(p[teacher])).sum(1)
    factor = settings.factor(rows)
    centres *= factor
    return values.sum() * factor, scalars


def _row_sums(u: Tensor) -> Tensor:
    """Of all columns of K, from the sum of all rows alone."""
    return (u * u.sum(0)).sum(1).add_(u.shape[0]).mul_(0.5)


def _backward(upstream, views, weights, scalars, *settings):
    settings = Settings(*settings)
    eps, taught, rows = settings.eps, settings.taught, views[0].shape[0]
    units = [_Units.of(h, eps) for h in views]
    u = units[0].u
    upstream = upstream.to(u.dtype)
    by = upstream * settings.factor(rows)
    weights = [w * by for w in _row_weights(weights, u, len(settings.teachers))]
    sums, centres = scalars[0], scalars[1] * upstream
    grads = [torch.zeros_like(unit.u) if need else None for unit, need in zip(units, taught, strict=True)]
    meetings = {two: pairs for two, pairs in settings.meetings().items() if any(taught[m] for m in two)}
    met = sorted({m for two in meetings for m in two})
    for start, stop in _strips(rows):
        k = {m: units[m].scores(start, stop, settings.exclude_self) for m in met}
        whole = {m: torch.zeros_like(k[m]) for m in met if taught[m]}
        # As rows, then as columns of all rows.
        for index in ((slice(start, stop), None), (None, slice(None))):
            p = {m: k[m] / sums[m][index] for m in met}
            inverse = {m: (p[m] + eps).reciprocal_() for m in met}
            part = {m: (-centres[m][index]).repeat(_times(index, start, stop, rows)) for m in whole}
            for (m, n), pairs in meetings.items():
                difference = p[m] - p[n]
                log = _log_ratio(difference, inverse[m], inverse[n])
                for teacher, student, number, sign in pairs:
                    g = weights[number][index]
                    if taught[student]:
                        q = (sign * difference - eps).mul_(inverse[student])
                        part[student].sub_(q.mul_(g))
                    if taught[teacher] and settings.teacher_grad:
                        q = (sign * log).sub_(inverse[teacher], alpha=eps)
                        part[teacher].add_(q.mul_(g))
            for m in whole:
                whole[m] += part[m].div_(sums[m][index])
        for m, w in whole.items():
            if settings.exclude_self:
                w.diagonal(start).zero_()
            grads[m][start:stop] = matmul(w, units[m].u).mul_(0.5)
    return [
        (h.new_empty(0) if not need else torch.zeros_like(h, memory_format=torch.contiguous_format))
        if grad is None
        else unit.pull(grad).to(h.dtype)
        for h, unit, grad, need in zip(views, units, grads, settings.needs, strict=True)
    ]


def _times(index, start: int, stop: int, rows: int) -> tuple[int, int]:
    return (1, rows) if index[0] is not None else (stop - start, 1)


def _check_finite(views, weights, units, names) -> None:
    op, *names = names
    if not all(bool(unit.u.isfinite().all()) for unit in units):
        raise not_finite(dict(zip(names, views, strict=False)), op)
    for name, w in zip(names[len(views) :], weights, strict=True):
        refuse_weights(op, name, w)


def _forward_fake(views, weights, *settings):
    compute = compute_dtype(views[0])
    return (
        views[0].new_empty((), dtype=compute),
        views[0].new_empty((2, len(views), views[0].shape[0]), dtype=compute),
    )


def _backward_fake(upstream, views, weights, scalars, *settings):
    needs = Settings(*settings).needs
    return [h.new_empty(h.shape if need else 0) for h, need in zip(views, needs, strict=True)]


_library = torch.library.Library("mmfast", "FRAGMENT")
# scalars (2, M, B): row sums of K, and centres. names: of the op, the views and the weights, for errors.
_settings = (
    "int[] teachers, int[] students, float eps, bool row_sum, bool exclude_self, bool teacher_grad, "
    "bool[] needs"
)
_ops = {
    f"pkt_forward(Tensor[] views, Tensor[] weights, {_settings}, str[] names) -> (Tensor loss, Tensor scalars)": (
        _forward,
        _forward_fake,
    ),
    f"pkt_backward(Tensor upstream, Tensor[] views, Tensor[] weights, Tensor scalars, {_settings}) -> Tensor[]": (
        _backward,
        _backward_fake,
    ),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)

_forward_op = torch.ops.mmfast.pkt_forward.default
_backward_op = torch.ops.mmfast.pkt_backward.default

DIFFERENTIATED_AGAIN = (
    "pkt: the gradient must not be differentiated again (double backward, or forward over backward); "
    "mmfast.ops.similarity.pkt_reference can be"
)
TRANSFORMED = (
    "pkt: torch.func transforms and forward mode must not be used; "
    "mmfast.ops.similarity.pkt_reference takes them"
)


def pkt(views: Sequence[Tensor], weights: Sequence[Tensor], names: Sequence[str], *settings) -> Tensor:
    """The loss of checked arguments: the fields of :class:`Settings` but ``needs``.

    ``weights`` are of pairs, or empty for 1; ``names`` are those of the op, of the views and of the weights.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(TRANSFORMED)
    return _Pkt.apply(tuple(settings), tuple(names), len(views), *views, *weights)[0]


def _gradients(settings, count, upstream, scalars, *tensors):
    views, weights = tensors[:count], tensors[count:]
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(upstream):
        # Of ``is_grads_batched``, which maps PyTorch's own operations alone: all are multiples of one gradient.
        grads = _backward_op(scalars.new_ones(()), views, weights, scalars, *settings)
        return tuple((upstream * grad).to(grad.dtype) for grad in grads)
    return tuple(_backward_op(upstream, views, weights, scalars, *settings))


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _Pkt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, names, count, *tensors):
        settings = (*settings, tuple(ctx.needs_input_grad[3 : 3 + count]))
        loss, scalars = _forward_op(tensors[:count], tensors[count:], *settings, names)
        ctx.settings, ctx.count, ctx.inputs = settings, count, len(tensors)
        ctx.save_for_backward(scalars, *tensors)
        ctx.mark_non_differentiable(scalars)
        ctx.set_materialize_grads(False)
        return loss, scalars

    @staticmethod
    def backward(ctx, upstream, _scalars):
        if upstream is None:
            return (None,) * (3 + ctx.inputs)
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else _gradients
        grads = gradient(ctx.settings, ctx.count, upstream, *ctx.saved_tensors)
        needs = ctx.settings[-1]
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (None, None, None, *grads, *[None] * (ctx.inputs - ctx.count))
