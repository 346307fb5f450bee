"""The Barlow Twins loss (Zbontar et al., ICML 2021), never at more work than min(B, D) asks.

For embeddings of two views (B, D) with standardised columns Â and B̂ and correlation matrix C = Â'B̂ / B::

    L = sum_i (1 - c_ii)^2 + lambd * sum_{i != j} c_ij^2

The direct form computes C, O(B D^2). The Gram form uses that the squares of C sum to <ÂÂ', B̂B̂'> / B^2, and
that the gradient needs (B̂B̂')Â where the direct form has B̂(B̂'Â): O(B^2 D), and nothing of size D x D exists.
Both are exact (the identity is the duality of Garrido et al., ICLR 2023). The Gram form subtracts the
diagonal from that sum, which is safe where the form is cheaper: C has at most rank B, so for B < D its
diagonal cannot make up nearly all of it.

What lies between the matrix products is in ``mmfast/ops/barlow_twins/kernels.py``.

Half embeddings on CUDA devices are ``narrow``: tensor cores multiply the half types, so the products' operands
are rounded to that type; their results, the statistics and everything elementwise stay in fp32. So are bf16
embeddings on CPUs with AVX512-BF16, in the Gram form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from mmfast import backends
from mmfast.ops.barlow_twins.checks import check_views, compute_dtype, unusable
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.barlow_twins.kernels import Cpu, NarrowCpu, passes_for
from mmfast.ops.products import gram_matrices, matmul, product


def reference(z_a: Tensor, z_b: Tensor, *definition: Any, pooled: bool = False, **named: Any) -> Tensor:
    """The definition, by autograd differentiable to any order: what every form and backend must equal.

    Options are the fields of :class:`~mmfast.ops.barlow_twins.definition.Definition`, in their order or by name.
    """
    return composed(z_a, z_b, Definition(*definition, **named), pooled)[0]


def composed(z_a: Tensor, z_b: Tensor, definition: Definition, pooled: bool = False) -> tuple[Tensor, Tensor]:
    """The loss and its detached components by the definition."""
    rows, columns = z_a.shape

    def standardise(z):
        z = z.to(compute_dtype(z))
        d = z - z.mean(0) if definition.center else z
        if not definition.normalise:
            return d
        inner, outer = (0.0, definition.eps) if definition.eps_outside else (definition.eps, 0.0)
        w = d.square().sum(0) / (len(z) - definition.unbiased) + inner
        # A root has no derivative at zero; a constant column correlates with nothing, and gets no gradient.
        deviation = torch.where(w > 0, torch.where(w > 0, w, 1).sqrt(), 0) + outer
        return d / torch.where(deviation > 0, deviation, 1)

    if pooled:
        a, b = standardise(torch.cat((z_a, z_b))).split(rows)
    else:
        a, b = standardise(z_a), standardise(z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        c = a.T @ b / rows
    diagonal = c.diagonal()
    on = (definition.target(rows) - diagonal).square().sum()
    off = (c - torch.diag(diagonal)).square().sum()
    loss = definition.factor(rows) * (on + definition.lambd * off)
    rms = (off / max(1, columns * (columns - 1))).sqrt()
    return loss, torch.stack((loss, on, off, diagonal.mean(), rms)).detach()


def barlow_twins(
    z_a: Tensor, z_b: Tensor, *definition: Any, gram: bool | None = None, **named: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and detached (5,) the loss, its on- and off-diagonal part, the mean of c_ii, the RMS of c_ij.

    Options are the fields of :class:`~mmfast.ops.barlow_twins.definition.Definition`, in their order or by name; they
    are looked at where users give them. ``gram`` forces a form; by default it is the cheaper one.
    """
    definition = Definition(*definition, **named)
    check_views({"z_a": z_a, "z_b": z_b}, corresponding=True)
    if gram is None:
        gram = gram_is_cheaper(*z_a.shape)
    # Without standardisation, half types may not hold the products.
    narrow = definition.normalise and (
        _narrow(z_a.dtype, z_a.device)
        or (gram and _narrow_gram(z_a.dtype, z_a.device) and z_a.shape[0] >= _NARROW_ROWS)
    )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        from mmfast.ops.barlow_twins.torch_func import transformed

        return transformed(z_a, z_b, gram, narrow, definition)
    loss, components, _ = _BarlowTwins.apply(z_a, z_b, gram, narrow, definition)
    return loss, components


def _narrow(dtype: torch.dtype, device: torch.device) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return half and backends.choose("barlow_twins", device) in ("cuda", "triton")


# Below, the products of the Gram form are too small a part of bf16 embeddings on the CPU.
_NARROW_ROWS = 48


def _narrow_gram(dtype: torch.dtype, device: torch.device) -> bool:
    cpu = dtype == torch.bfloat16 and backends.choose("barlow_twins", device) == "cpu"
    return cpu and backends._C.fast_bf16()


# What torch.compiler.assume_constant_result sets; that itself would import the compiler along with mmfast.
_narrow._dynamo_marked_constant = True
_narrow_gram._dynamo_marked_constant = True


def _passes(z: Tensor, gram: bool, narrow: bool):
    return passes_for(z.device, narrow, gram and z.dtype == torch.bfloat16)


def gram_is_cheaper(rows: int, columns: int) -> bool:
    # 8 B^2 D operations against 6 B D^2. With symmetric Gram matrices it is even at B = 0.9 D, but there the
    # subtraction of the diagonal may magnify rounding by 1 / (1 - B / D) = 10, here by 4 at most.
    return 4 * rows < 3 * columns


def _unit_stride(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def _check_narrow(narrow: bool, z: Tensor) -> None:
    if narrow and z.dtype == compute_dtype(z):
        raise ValueError(f"barlow_twins: narrow must be False for {z.dtype} embeddings, got True")


def _forward(z_a, z_b, gram, narrow, grad_a, grad_b, *definition):
    definition = Definition(*definition)
    check_views({"z_a": z_a, "z_b": z_b}, corresponding=True)
    definition.check()
    _check_narrow(narrow, z_a)
    return _evaluate(z_a, z_b, gram, narrow, grad_a, grad_b, definition)


def _evaluate(z_a, z_b, gram, narrow, grad_a, grad_b, definition):
    passes = _passes(z_a, gram, narrow)
    views = _unit_stride(z_a), _unit_stride(z_b)
    if gram and passes in (Cpu, NarrowCpu):
        return passes.gram_forward(*views, definition, grad_a, grad_b)
    hat, statistics = passes.standardise(*views, definition, narrow)
    # Asking any other device would wait for it: there the loss becomes NaN.
    if passes is not Cpu and not z_a.is_cuda and not statistics.isfinite().all():
        raise unusable({"z_a": z_a, "z_b": z_b})
    if not gram:
        hat_a, hat_b = hat.unbind()
        matrices = product(hat_a.t(), hat_b.t())
        loss, components = passes.correlation_loss(matrices, len(z_a), statistics, definition)
    else:
        matrices = gram_matrices(hat)
        loss, components = passes.gram_loss(matrices, statistics, definition)
        if not (grad_a and grad_b):
            # A copy, so that what is not needed can be freed.
            matrices = matrices[1 - grad_b : 1 + grad_a].clone()
    return loss, components, hat, statistics, matrices


def _forward_fake(z_a, z_b, gram, narrow, grad_a, grad_b, *definition):
    check_views({"z_a": z_a, "z_b": z_b}, corresponding=True)
    Definition(*definition).check()
    _check_narrow(narrow, z_a)
    rows, columns = z_a.shape
    compute = compute_dtype(z_a)
    matrices = (grad_a + grad_b, rows, rows) if gram else (columns, columns)
    hats = 0 if _passes(z_a, gram, narrow) is NarrowCpu else 2
    return (
        z_a.new_empty((), dtype=compute),
        z_a.new_empty(5, dtype=compute),
        z_a.new_empty((hats, rows, columns), dtype=z_a.dtype if narrow else compute),
        z_a.new_empty((5, columns), dtype=compute),
        z_a.new_empty(matrices, dtype=compute),
    )


def _backward(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, *definition):
    return _pull(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, Definition(*definition))


def _pull(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, definition):
    passes = _passes(views[-1], gram, narrow)
    dtype, compute = views[-1].dtype, statistics.dtype
    z = [_unit_stride(z) for z in views[-2:]] if len(views) > 1 else None
    if passes is NarrowCpu:
        wanted = zip(z, (grad_a, grad_b), strict=True)
        grads = [x.new_empty(x.shape) if needed else None for x, needed in wanted]
        passes.gram_backward(matrices, z, statistics, upstream, definition, grads)
        return tuple(z[0].new_empty(0) if grad is None else grad for grad in grads)
    hat = passes.standardise(*z, definition, narrow)[0] if len(views) == 2 else views[0]
    hats = hat_a, hat_b = hat.unbind()
    if gram and passes is Cpu:
        shape = hat_a.shape
        grads = [hat.new_empty(shape, dtype=dtype) if wanted else None for wanted in (grad_a, grad_b)]
        Cpu.gram_backward(matrices, hats, statistics, upstream, definition, grads)
    else:
        exponent, operands = 0, matrices
        if narrow:
            # Gram matrices hold sums of D, p those of B products of about 1: this keeps them within fp16.
            exponent = (hat.shape[2] if gram else hat.shape[1]).bit_length()
            operands = passes.narrowed(matrices, dtype, exponent)
        if gram:
            m_a = matmul(operands[-1], hat_a) if grad_a else None
            m_b = matmul(operands[0], hat_b) if grad_b else None
        else:
            m_a = product(hat_b, operands) if grad_a else None
            m_b = product(hat_a, operands.t()) if grad_b else None
        products = (m_a, m_b)
        if dtype == compute:
            grads = products
        else:
            grads = [None if m is None else torch.empty_like(m, dtype=dtype) for m in products]
        elementwise = z if narrow else hats
        grams = (matrices[-1], matrices[0]) if gram and narrow else None
        passes.gradient(products, elementwise, statistics, upstream, definition, gram, exponent, grams, grads)
    return tuple(hat.new_empty(0, dtype=dtype) if grad is None else grad for grad in grads)


def _backward_fake(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, *definition):
    z = views[-1]
    return tuple(z.new_empty(z.shape[-2:] if wanted else 0) for wanted in (grad_a, grad_b))


def _one_by_one(op, size: int, in_dims, arguments):
    """What vmap asks of an op: its results for each element of a batch, stacked."""

    def element(x, dim, i):
        if isinstance(x, (list, tuple)):
            return [element(y, d, i) for y, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    every = [
        op(*(element(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True))) for i in range(size)
    ]
    results = tuple(torch.stack(one) for one in zip(*every, strict=True))
    return results, (0,) * len(results)


def _forward_batched(info, in_dims, *arguments):
    return _one_by_one(_forward_op, info.batch_size, in_dims, arguments)


def _backward_batched(info, in_dims, upstream, *rest):
    if any(dim is not None for dim in tree_leaves(in_dims[1:])):
        return _one_by_one(_backward_op, info.batch_size, in_dims, (upstream, *rest))
    return tuple(
        torch.stack([u * g for u in upstream.unbind(in_dims[0])]) for g in _of_one(upstream, *rest)
    ), (0, 0)


def _backward_mapped(upstream, views, statistics, matrices, *options):
    """The same for ``is_grads_batched``, whose maps know no such rules, only PyTorch's own operations."""
    if any(torch._C._functorch.is_legacy_batchedtensor(x) for x in (*views, statistics, matrices)):
        raise RuntimeError("barlow_twins: batched gradients must be batched by what comes from above alone")
    return tuple(upstream * g for g in _of_one(statistics, views, statistics, matrices, *options))


def _of_one(like: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """The gradient of the loss itself, of which every other is a multiple."""
    return _backward_op(torch.ones((), dtype=like.dtype, device=like.device), *rest)


_library = torch.library.Library("mmfast", "FRAGMENT")
# hat (2, B, D), or (0, B, D) where the backward pass does without, and statistics (5, D): see Plain.standardise;
# views: hat, or z_a and z_b to standardise again, or, narrow, all three; matrices: in Gram form (n, B, B), ÂÂ' if
# grad_b and B̂B̂' if grad_a, else Â'B̂ less its diagonal.
_options = (
    "bool gram, bool narrow, bool grad_a, bool grad_b, float lambd, bool center, float eps, bool eps_outside, "
    "bool unbiased, bool divide, float scale, bool normalise"
)
_ops = {
    f"barlow_twins_forward(Tensor z_a, Tensor z_b, {_options})"
    " -> (Tensor loss, Tensor components, Tensor hat, Tensor statistics, Tensor matrices)": (
        _forward,
        _forward_fake,
    ),
    f"barlow_twins_backward(Tensor upstream, Tensor[] views, Tensor statistics, Tensor matrices, {_options})"
    " -> (Tensor grad_a, Tensor grad_b)": (_backward, _backward_fake),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)
torch.library.register_vmap("mmfast::barlow_twins_forward", _forward_batched, lib=_library)
torch.library.register_vmap("mmfast::barlow_twins_backward", _backward_batched, lib=_library)
_library.impl("barlow_twins_backward", _backward_mapped, "Batched")


# Overloads: calls through the packet would look for them every time.
_forward_op = torch.ops.mmfast.barlow_twins_forward.default
_backward_op = torch.ops.mmfast.barlow_twins_backward.default


# Of dense CPU tensors that are what they seem: no wrappers, and no negation or zeros that are still to be written.
_PLAIN = torch._C._dispatch_keys(torch.empty(0, device="cpu"))
_TYPES = (Tensor, torch.nn.Parameter)


def _observed(*tensors: Tensor) -> bool:
    """Whether anything but autograd has a say in operations on these, so that the dispatcher must know of them.

    It takes a tenth of the time of 32 x 1000 embeddings on the CPU, forward and backward.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
        or not all(type(x) in _TYPES and torch._C._dispatch_keys(x) == _PLAIN for x in tensors)
    )


def results(z_a, z_b, *options):
    *flags, definition = options
    if _observed(z_a, z_b):
        return _forward_op(z_a, z_b, *flags, *definition)
    return _evaluate(z_a, z_b, *options)


def gradient_of(options, upstream, statistics, matrices, *views):
    *flags, definition = options
    if _observed(upstream, statistics, *views):
        return _backward_op(upstream, views, statistics, matrices, *flags, *definition)
    return _pull(upstream, views, statistics, matrices, *options)


def refuse_tangents(*tensors: Tensor) -> None:
    """Kernels would leave tangents out, and nobody would see that a derivative is missing."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return gradient_of(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


DIFFERENTIATED_AGAIN = (
    "barlow_twins: the gradient must not be differentiated again (double backward, or forward over backward); "
    "mmfast.ops.barlow_twins.reference can be"
)


def views_to_keep(z_a: Tensor, z_b: Tensor, hat: Tensor, narrow: bool) -> tuple[Tensor, ...]:
    """What the backward pass needs of the embeddings."""
    # Half embeddings are smaller than their fp32 hats: keep those, and standardise again.
    views = (hat,) if hat.dtype == z_a.dtype and len(hat) else (z_a, z_b)
    return (*views, z_a, z_b) if narrow and len(hat) else views


class _BarlowTwins(torch.autograd.Function):
    """Returns the loss, its components, and the standardised embeddings.

    The last are outputs so that, saved for backward, they tie a recorded gradient to this node: a second
    differentiation then meets :class:`_FinalGradient` and cannot pass it by unnoticed.
    """

    @staticmethod
    def forward(ctx, z_a, z_b, gram, narrow, definition):
        grad_a, grad_b = ctx.needs_input_grad[:2]
        loss, components, hat, statistics, matrices = results(
            z_a, z_b, gram, narrow, grad_a, grad_b, definition
        )
        ctx.options = gram, narrow, grad_a, grad_b, definition
        ctx.save_for_backward(statistics, matrices, *views_to_keep(z_a, z_b, hat, narrow))
        ctx.mark_non_differentiable(components)
        ctx.set_materialize_grads(False)
        return loss, components, hat

    @staticmethod
    def backward(ctx, upstream, _components, _hat):
        if upstream is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        if forward_ad._current_level >= 0:
            refuse_tangents(upstream, *saved)
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else gradient_of
        grad_a, grad_b = gradient(ctx.options, upstream, *saved)
        _, _, needs_a, needs_b, _ = ctx.options
        return grad_a if needs_a else None, grad_b if needs_b else None, None, None, None
