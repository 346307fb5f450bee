"""The gradients of the embeddings, from the products of the backward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from mmfast.triton import launch
from mmfast.triton.arithmetic import divide
from mmfast.triton.barlow_twins_columns import (
    MERGE,
    ROWS,
    WIDTH,
    Grid,
    merged_sum,
    number,
    objective,
    parts_of,
    scaling_of,
    tile_of,
    vector_of,
    with_unit_stride,
)


@triton.jit
def projection(r, count, eps, OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr):
    """dL/dz = r (dL/dâ - projection â mean(â dL/dâ))."""
    one = tl.full(r.shape, 1, r.dtype)
    factor = one if NORMALISE else one * 0
    if OUTSIDE:
        kept = one - eps * r
        factor = tl.where(kept > 0, divide(factor, tl.where(kept > 0, kept, 1.0)), 0.0)
    if UNBIASED:
        factor = divide(factor, one - divide(one, count))
    return factor


@triton.jit
def standardised(view, row, cols, stride, mask, mean, r, NARROW: tl.constexpr, C: tl.constexpr):
    """A tile of a standardised view, which is stored as such unless NARROW."""
    x = tl.load(view + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(C)
    if NARROW:
        x = (x - mean[None, :]) * r[None, :]
    return x


@triton.jit
def product_of(product, gram, own, row, cols, stride, mask, last, rows, power, WITH_GRAM: tl.constexpr):
    """A tile of m, completed by what the diagonal of the Gram matrix adds."""
    m = tl.load(product + row[:, None] * stride + cols[None, :], mask=mask, other=0.0) * power
    if WITH_GRAM:
        m += tl.load(gram + row * (rows.to(tl.int64) + 1), mask=row < last, other=0.0)[:, None] * own
    return m


@triton.jit(do_not_specialize=["rows", "columns", "stride_a", "stride_b", "chunk_rows", "chunks", "power"])
def projection_kernel(
    m_a, m_b, view_a, view_b, gram_a, gram_b, statistics, partial,
    rows, columns, stride_a, stride_b, chunk_rows, chunks, power,
    GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, NARROW: tl.constexpr, WITH_GRAM: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial (2, chunks, columns): sums over the chunk of m â and of m b̂. gram_a belongs to m_a."""
    C: tl.constexpr = statistics.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    cols, wanted, first, last, chunk = tile_of(program, columns, chunk_rows, rows, WIDTH, VECTOR)
    size = columns.to(tl.int64)
    stride = size // VECTOR * VECTOR
    statistics += cols
    r_a = tl.load(statistics, mask=wanted, other=0.0)
    r_b = tl.load(statistics + size, mask=wanted, other=0.0)
    mean_a = tl.load(statistics + 3 * size, mask=wanted, other=0.0)
    mean_b = tl.load(statistics + 4 * size, mask=wanted, other=0.0)
    stride_a = stride_a.to(tl.int64) // VECTOR * VECTOR
    stride_b = stride_b.to(tl.int64) // VECTOR * VECTOR
    sum_a = tl.zeros((ROWS, WIDTH), C)
    sum_b = tl.zeros((ROWS, WIDTH), C)
    for i in range(first, last, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & wanted[None, :]
        if GRAD_A:
            own = standardised(view_a, row, cols, stride_a, mask, mean_a, r_a, NARROW, C)
            m = product_of(m_a, gram_a, own, row, cols, stride, mask, last, rows, power, WITH_GRAM)
            sum_a += tl.where(mask, m * own, 0.0)
        if GRAD_B:
            own = standardised(view_b, row, cols, stride_b, mask, mean_b, r_b, NARROW, C)
            m = product_of(m_b, gram_b, own, row, cols, stride, mask, last, rows, power, WITH_GRAM)
            sum_b += tl.where(mask, m * own, 0.0)
    at = partial + chunk * columns + cols
    if GRAD_A:
        tl.store(at, tl.sum(sum_a, axis=0), mask=wanted)
    if GRAD_B:
        tl.store(at + chunks * size, tl.sum(sum_b, axis=0), mask=wanted)


@triton.jit
def column_gradient(
    partial, chunks, rows, columns, cols, wanted, r, gap, alpha, beta, diagonal, target, eps,
    OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr,
    MERGE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Weight of the partner and of the own column in the gradient of one column."""
    sum = merged_sum(partial, chunks, columns, cols, wanted, MERGE, WIDTH)
    count = tl.zeros((WIDTH,), sum.dtype) + rows.to(sum.dtype)
    c = target - gap
    weight = beta * (gap + diagonal * c)
    factor = projection(r, count, eps, OUTSIDE, UNBIASED, NORMALISE)
    return weight, factor * (alpha * divide(sum, count) - weight * c)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "stride_a", "stride_b", "chunk_rows", "chunks", "power", "lambd", "lambd_low",
        "scale", "scale_low", "target", "target_low", "eps", "eps_low",
    ]
)  # fmt: skip
def gradient_kernel(
    m_a, m_b, view_a, view_b, gram_a, gram_b, statistics, partial, upstream, grad_a, grad_b,
    rows, columns, stride_a, stride_b, chunk_rows, chunks, power,
    lambd, lambd_low, scale, scale_low, target, target_low, eps, eps_low,
    OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr,
    GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, NARROW: tl.constexpr, WITH_GRAM: tl.constexpr,
    GRAM: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The gradients. Each may be written over its own product, of which it is a function element by element."""
    C: tl.constexpr = statistics.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    cols, wanted, first, last, _ = tile_of(program, columns, chunk_rows, rows, WIDTH, VECTOR)
    size = columns.to(tl.int64)
    stride = size // VECTOR * VECTOR
    lambd = number(lambd, lambd_low, C)
    target = number(target, target_low, C)
    eps = number(eps, eps_low, C)
    count = rows.to(C)
    beta = divide(2 * number(scale, scale_low, C) * tl.load(upstream).to(C), count)
    alpha = divide(lambd * beta, count)
    diagonal = lambd if GRAM else 0.0
    statistics += cols
    r_a = tl.load(statistics, mask=wanted, other=0.0)
    r_b = tl.load(statistics + size, mask=wanted, other=0.0)
    gap = tl.load(statistics + 2 * size, mask=wanted, other=0.0)
    mean_a = tl.load(statistics + 3 * size, mask=wanted, other=0.0)
    mean_b = tl.load(statistics + 4 * size, mask=wanted, other=0.0)
    stride_a = stride_a.to(tl.int64) // VECTOR * VECTOR
    stride_b = stride_b.to(tl.int64) // VECTOR * VECTOR
    weight_a, own_a = column_gradient(
        partial, chunks if GRAD_A else 0, rows, columns, cols, wanted, r_a, gap, alpha, beta, diagonal,
        target, eps, OUTSIDE, UNBIASED, NORMALISE, MERGE, WIDTH,
    )  # fmt: skip
    weight_b, own_b = column_gradient(
        partial + chunks * size, chunks if GRAD_B else 0, rows, columns, cols, wanted, r_b, gap, alpha,
        beta, diagonal, target, eps, OUTSIDE, UNBIASED, NORMALISE, MERGE, WIDTH,
    )  # fmt: skip
    for i in range(first, last, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & wanted[None, :]
        a = standardised(view_a, row, cols, stride_a, mask, mean_a, r_a, NARROW, C)
        b = standardised(view_b, row, cols, stride_b, mask, mean_b, r_b, NARROW, C)
        at = row[:, None] * stride + cols[None, :]
        if GRAD_A:
            m = product_of(m_a, gram_a, a, row, cols, stride, mask, last, rows, power, WITH_GRAM)
            g = r_a[None, :] * (alpha * m - weight_a[None, :] * b - own_a[None, :] * a)
            tl.store(grad_a + at, g.to(grad_a.dtype.element_ty), mask=mask)
        if GRAD_B:
            m = product_of(m_b, gram_b, b, row, cols, stride, mask, last, rows, power, WITH_GRAM)
            g = r_b[None, :] * (alpha * m - weight_b[None, :] * a - own_b[None, :] * b)
            tl.store(grad_b + at, g.to(grad_b.dtype.element_ty), mask=mask)


def gradient(products, views, statistics, upstream, definition, gram, exponent, grams, grads) -> None:
    """Fill ``grads`` from the products m (see csrc/barlow_twins.h), which still want a factor of 2^exponent."""
    a, b = (with_unit_stride(view) for view in views)
    rows, columns = a.shape
    device = statistics.device
    wanted = [grad is not None for grad in grads]
    narrow = a.dtype != statistics.dtype
    # What is not wanted or not there is not read: any address will do.
    products = [statistics if m is None else m for m in products]
    matrices = [statistics, statistics] if grams is None else list(grams)
    grads = [statistics if grad is None else grad for grad in grads]
    grid = Grid(rows, columns)
    partial = statistics.new_empty(2, grid.chunks, columns)
    vector = vector_of(columns, a, b)
    sizes = rows, columns, a.stride(0), b.stride(0), grid.rows, grid.chunks, 2.0**exponent
    flags = *wanted, narrow, grams is not None
    launch(
        projection_kernel, grid.programs, device,
        *products, a, b, *matrices, statistics, partial, *sizes, *flags, vector, ROWS, WIDTH,
    )  # fmt: skip
    launch(
        gradient_kernel, grid.programs, device,
        *products, a, b, *matrices, statistics, partial, upstream, *grads, *sizes,
        *objective(definition, rows), *parts_of(definition.eps), *scaling_of(definition), *flags, gram,
        vector, ROWS, WIDTH, MERGE,
    )  # fmt: skip
