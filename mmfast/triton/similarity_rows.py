"""Embeddings to directions and lengths, and the gradient by directions back: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import divisor, launch
from mmfast.triton.arithmetic import divide, root
from mmfast.triton.similarity_rule import row_shape

# A shorter row has no direction: its scores and its gradient are zero.
SHORTEST = tl.constexpr(1e-12)


@triton.jit
def power_of_two(n):
    """2^n of a normal number: fp64 of an int64, else fp32."""
    if n.dtype == tl.int64:
        return ((n + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """The bits of |x|, which are in the order of |x|, NaN above all."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["columns", "stride"])
def units_kernel(
    x, valid, unit, inverse, columns, stride,
    HAS_VALID: tl.constexpr, COSINE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """unit: x as it is, or divided by its length; 0 where it has no direction or is not valid. inverse: 1 / length,
    0 for none. NaN shows."""
    C: tl.constexpr = unit.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = columns // VECTOR * VECTOR
    x += row * (stride.to(tl.int64) // VECTOR * VECTOR)
    unit += row * columns
    seen = columns
    if HAS_VALID:
        seen = tl.where(tl.load(valid + row), columns, 0)
    if COSINE:
        largest = magnitude(tl.zeros((BLOCK,), C))
        for first in range(0, seen, BLOCK):
            j = first + tl.arange(0, BLOCK)
            bits = magnitude(tl.load(x + j, mask=j < seen, other=0.0).to(C))
            largest = tl.maximum(largest, bits)
        largest = tl.max(largest, axis=0)
        # By a power of two, which rounds nothing: squares neither overflow nor vanish. In two steps, as it may be
        # no number itself. Of what is not finite it makes NaN.
        exponent = (largest >> 52) - 1022 if largest.dtype == tl.int64 else (largest >> 23) - 126
        half = exponent >> 1
        one = power_of_two(-half)
        other = power_of_two(half - exponent)
        sum = tl.zeros((BLOCK,), C)
        for first in range(0, seen, BLOCK):
            j = first + tl.arange(0, BLOCK)
            scaled = tl.load(x + j, mask=j < seen, other=0.0).to(C) * one * other
            sum += scaled * scaled
        total = tl.sum(sum, axis=0)
        length = root(total)
        # length 2^exponent, where it cannot overflow.
        back = length * power_of_two(half) * power_of_two(exponent - half)
        none = (largest == 0) | ((exponent <= 0) & (back < tl.full((), SHORTEST, C)))
        factor = tl.where(none, 0.0, divide(tl.full((), 1, C), tl.where(none, 1.0, length)))
        spoilt = total - total
        tl.store(inverse + row, tl.where(spoilt == 0, factor * one * other, spoilt))
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        value = tl.load(x + j, mask=j < seen, other=0.0).to(C)
        if COSINE:
            value = tl.where(spoilt == 0, value * one * other * factor, spoilt)
        tl.store(unit + j, value, mask=j < columns)


@triton.jit(do_not_specialize=["columns"])
def row_gradients_kernel(
    grad, unit, inverse, scale, out, dots, columns,
    COSINE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, which may be written over ``grad``."""
    C: tl.constexpr = grad.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = columns // VECTOR * VECTOR
    grad += row * columns
    unit += row * columns
    out += row * columns
    sum = tl.zeros((BLOCK,), C)
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = j < columns
        sum += tl.load(grad + j, mask=mask, other=0.0) * tl.load(unit + j, mask=mask, other=0.0)
    along = tl.sum(sum, axis=0)
    tl.store(dots + row, along)
    scale = tl.load(scale)
    for first in range(0, columns, BLOCK):
        j = first + tl.arange(0, BLOCK)
        mask = j < columns
        value = tl.load(grad + j, mask=mask, other=0.0) * scale
        if COSINE:
            own = tl.load(unit + j, mask=mask, other=0.0) * (along * scale)
            value = (value - own) * tl.load(inverse + row)
        tl.store(out + j, value.to(out.dtype.element_ty), mask=mask)


def units(x: Tensor, valid: Tensor | None, unit: Tensor, inverse: Tensor | None) -> None:
    """Fills ``unit`` with x (n, D), of unit column stride: with its directions if there is ``inverse`` (n, 1)."""
    rows, columns = x.shape
    warps, block, vector = row_shape(columns, x, unit)
    launch(
        units_kernel, rows, x.device,
        x, unit if valid is None else valid, unit, unit if inverse is None else inverse, columns, x.stride(0),
        valid is not None, inverse is not None, divisor(vector, columns, x.stride(0)), block, warps=warps,
    )  # fmt: skip


def row_gradients(grad, unit, inverse, scale, out, dots) -> None:
    """Fills ``out``, which may be ``grad`` (n, D), with the gradient by rows of which ``unit`` are the directions,
    or, without ``inverse``, they themselves; and ``dots`` (n,) with grad . unit."""
    rows, columns = grad.shape
    warps, block, vector = row_shape(columns, grad, out)
    launch(
        row_gradients_kernel, rows, grad.device,
        grad, unit, unit if inverse is None else inverse, scale, out, dots, columns,
        inverse is not None, vector, block, warps=warps,
    )  # fmt: skip
