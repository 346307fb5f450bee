"""The loss of two views under ``torch.func`` transforms and in forward mode.

A node of its own, for these ask more of one than the compiler takes, and than others should pay for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.barlow_twins.op import (
    DIFFERENTIATED_AGAIN,
    composed,
    gradient_of,
    results,
    views_to_keep,
)

_FIELDS = len(Definition._fields)
_NO_OPTIONS = (None,) * (2 + _FIELDS)


def transformed(
    z_a: Tensor, z_b: Tensor, gram: bool, narrow: bool, definition: Definition
) -> tuple[Tensor, Tensor]:
    """The loss and its components, with first derivatives in both modes, batched or not.

    Compiled, it is the definition in PyTorch's operations: the compiler does not see through an op from inside a
    transform.
    """
    if torch.compiler.is_compiling():
        return composed(z_a, z_b, definition)
    loss, components, *_ = _Loss.apply(z_a, z_b, gram, narrow, *definition)
    return loss, components


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z_a, z_b, gram, narrow, *definition):
        return results(z_a, z_b, gram, narrow, True, True, Definition(*definition))

    @staticmethod
    def setup_context(ctx, inputs, output):
        z_a, z_b, gram, narrow, *definition = inputs
        _loss, components, hat, statistics, matrices = output
        ctx.options = gram, narrow, True, True, *definition
        saved = statistics, matrices, *views_to_keep(z_a, z_b, hat, narrow)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.mark_non_differentiable(components, statistics, matrices)
        ctx.hat = hat.shape, hat.dtype

    @staticmethod
    def backward(ctx, upstream, *_):
        grads = _Gradient.apply(*ctx.options, upstream, *ctx.saved_tensors)
        wanted = zip(grads, ctx.needs_input_grad[:2], strict=True)
        return *(g if needed else None for g, needed in wanted), *_NO_OPTIONS

    @staticmethod
    def jvp(ctx, *tangents):
        statistics, *rest = ctx.saved_tensors
        one = statistics.new_ones(())
        grads = _Gradient.apply(*ctx.options, one, statistics, *rest)
        parts = [
            (g.to(one.dtype) * t.to(one.dtype)).sum()
            for g, t in zip(grads, tangents[:2], strict=True)
            if t is not None
        ]
        shape, dtype = ctx.hat
        # Nobody sees that of the embeddings, which are there to be kept.
        return sum(parts[1:], parts[0]), None, one.new_zeros(shape, dtype=dtype), None, None


class _Gradient(torch.autograd.Function):
    """Right, but without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram, narrow, grad_a, grad_b, *rest):
        definition, tensors = Definition(*rest[:_FIELDS]), rest[_FIELDS:]
        return gradient_of((gram, narrow, grad_a, grad_b, definition), *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)
