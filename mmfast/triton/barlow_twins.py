"""The passes of the Barlow Twins loss in Triton; csrc/barlow_twins.h has the notation and the formulas.

Each program works on one block of columns and one chunk of rows. Sums over rows are partial sums of chunks, which
whoever needs the sum adds up in order, so results are the same from run to run.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import divisor, launch

ROWS, WIDTH = 16, 64  # of a tile
MERGE = 16  # chunks merged at a time
SQUARE_ROWS, SQUARE_WIDTH = 16, 128  # of a tile of a square matrix
FLAT = 2048  # elements of a pair of matrices at a time
PROGRAMS = 1024  # enough to keep any GPU busy


@triton.jit
def root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def number(high, low, C: tl.constexpr):
    """A number of the host that was cut into two of fp32."""
    return tl.full((), high, C) + tl.full((), low, C)


@triton.jit
def inverse_deviation(v, count, eps, OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr):
    """r: 0 for a column without variance if eps is 0, NaN where the variance is not finite."""
    if UNBIASED:
        v = divide(v, 1 - divide(tl.full(count.shape, 1, count.dtype), count))
    if NORMALISE:
        w = root(v) + eps if OUTSIDE else v + eps
        r = divide(tl.full(w.shape, 1, w.dtype), w if OUTSIDE else root(w))
        r = tl.where(w - w != 0, w - w, tl.where(w > 0, r, 0.0))
    else:
        r = v - v + 1
    return r


@triton.jit
def shrinkage(r, count, eps, OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr):
    """1 - mean(â^2): the length that eps and the unbiased variance take from a column."""
    lost = tl.where(r == 0, 1.0, eps * r * (2 - eps * r) if OUTSIDE else eps * r * r)
    if UNBIASED:
        excess = divide(tl.full(count.shape, 1, count.dtype), count)
        lost = excess + (1 - excess) * lost
    return lost


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
def tile_of(program, columns, chunk_rows, rows, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of the program's block, which of them exist, its first row and the one behind its last, its chunk."""
    columns = columns // VECTOR * VECTOR
    blocks = (columns + WIDTH - 1) // WIDTH
    chunk = program // blocks
    cols = program % blocks * WIDTH + tl.arange(0, WIDTH)
    first = chunk * chunk_rows
    return cols, cols < columns, first, tl.minimum(first + chunk_rows, rows.to(tl.int64)), chunk


@triton.jit
def merged_sum(partial, chunks, columns, cols, wanted, MERGE: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of the partial sums (chunks, columns) of all chunks."""
    sum = tl.zeros((MERGE, WIDTH), partial.dtype.element_ty)
    for i in range(0, chunks, MERGE):
        chunk = i + tl.arange(0, MERGE)
        sum += tl.load(
            partial + chunk[:, None].to(tl.int64) * columns + cols[None, :],
            mask=(chunk < chunks)[:, None] & wanted[None, :],
            other=0.0,
        )
    return tl.sum(sum, axis=0)


@triton.jit
def moments_of(
    z, stride, means, squares, first, last, cols, wanted,
    CENTER: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean, relative to the first row of all, and sum of squared deviations from it of one chunk."""
    mean = tl.zeros((WIDTH,), C)
    shift = tl.zeros((WIDTH,), C)
    if CENTER:
        shift = tl.load(z + cols, mask=wanted, other=0.0).to(C)
        sum = tl.zeros((ROWS, WIDTH), C)
        for i in range(first, last, ROWS):
            row = i + tl.arange(0, ROWS)
            mask = (row < last)[:, None] & wanted[None, :]
            x = tl.load(z + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(C)
            sum += tl.where(mask, x - shift[None, :], 0.0)
        mean = divide(tl.sum(sum, axis=0), tl.zeros((WIDTH,), C) + (last - first).to(C))
        tl.store(means + cols, mean, mask=wanted)
    square = tl.zeros((ROWS, WIDTH), C)
    for i in range(first, last, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & wanted[None, :]
        x = tl.load(z + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(C)
        d = tl.where(mask, (x - shift[None, :]) - mean[None, :], 0.0)
        square += d * d
    tl.store(squares + cols, tl.sum(square, axis=0), mask=wanted)


@triton.jit(do_not_specialize=["rows", "columns", "stride_a", "stride_b", "chunk_rows", "chunks"])
def moments_kernel(
    z_a, z_b, partial, rows, columns, stride_a, stride_b, chunk_rows, chunks,
    CENTER: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial (2 views, mean and sum of squares, chunks, columns)."""
    C: tl.constexpr = partial.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    cols, wanted, first, last, chunk = tile_of(program, columns, chunk_rows, rows, WIDTH, VECTOR)
    plane = chunks.to(tl.int64) * columns
    partial += chunk * columns
    moments_of(
        z_a, stride_a.to(tl.int64) // VECTOR * VECTOR, partial, partial + plane, first, last, cols, wanted,
        CENTER, C, ROWS, WIDTH,
    )  # fmt: skip
    moments_of(
        z_b, stride_b.to(tl.int64) // VECTOR * VECTOR, partial + 2 * plane, partial + 3 * plane, first, last,
        cols, wanted, CENTER, C, ROWS, WIDTH,
    )  # fmt: skip


@triton.jit
def column_statistics(
    z, means, squares, chunks, chunk_rows, rows, columns, cols, wanted, eps,
    CENTER: tl.constexpr, OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr,
    C: tl.constexpr, MERGE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Shift (the first row), mean relative to it and r of each column, by Chan's formula."""
    count = tl.zeros((WIDTH,), C) + rows.to(C)
    shift = tl.zeros((WIDTH,), C)
    mean = tl.zeros((WIDTH,), C)
    square = merged_sum(squares, chunks, columns, cols, wanted, MERGE, WIDTH)
    if CENTER:
        shift = tl.load(z + cols, mask=wanted, other=0.0).to(C)
        # The mean of the chunks first, so that their differences are small.
        sum = tl.zeros((MERGE, WIDTH), C)
        for i in range(0, chunks, MERGE):
            chunk = (i + tl.arange(0, MERGE)).to(tl.int64)
            mask = (chunk < chunks)[:, None] & wanted[None, :]
            m = tl.load(means + chunk[:, None] * columns + cols[None, :], mask=mask, other=0.0)
            n = tl.minimum(rows - chunk * chunk_rows, chunk_rows).to(C)[:, None]
            sum += tl.where(mask, n * m, 0.0)
        mean = divide(tl.sum(sum, axis=0), count)
        between = tl.zeros((MERGE, WIDTH), C)
        for i in range(0, chunks, MERGE):
            chunk = (i + tl.arange(0, MERGE)).to(tl.int64)
            mask = (chunk < chunks)[:, None] & wanted[None, :]
            m = tl.load(means + chunk[:, None] * columns + cols[None, :], mask=mask, other=0.0)
            n = tl.minimum(rows - chunk * chunk_rows, chunk_rows).to(C)[:, None]
            d = m - mean[None, :]
            between += tl.where(mask, n * d * d, 0.0)
        square += tl.sum(between, axis=0)
    r = inverse_deviation(divide(square, count), count, eps, OUTSIDE, UNBIASED, NORMALISE)
    return shift, mean, r


@triton.jit(
    do_not_specialize=["rows", "columns", "stride_a", "stride_b", "chunk_rows", "chunks", "eps", "eps_low"]
)
def standardise_kernel(
    z_a, z_b, partial, hat, statistics, terms,
    rows, columns, stride_a, stride_b, chunk_rows, chunks, eps, eps_low,
    CENTER: tl.constexpr, OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NORMALISE: tl.constexpr,
    NEAR: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """hat (2, rows, columns), all statistics but target - c, and partial sums (chunks, columns) of what that is of.

    These are (â - b̂)^2 if NEAR, else â b̂.
    """
    C: tl.constexpr = partial.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    eps = number(eps, eps_low, C)
    cols, wanted, first, last, chunk = tile_of(program, columns, chunk_rows, rows, WIDTH, VECTOR)
    plane = chunks.to(tl.int64) * columns
    shift_a, mean_a, r_a = column_statistics(
        z_a, partial, partial + plane, chunks, chunk_rows, rows, columns, cols, wanted, eps,
        CENTER, OUTSIDE, UNBIASED, NORMALISE, C, MERGE, WIDTH,
    )  # fmt: skip
    shift_b, mean_b, r_b = column_statistics(
        z_b, partial + 2 * plane, partial + 3 * plane, chunks, chunk_rows, rows, columns, cols, wanted, eps,
        CENTER, OUTSIDE, UNBIASED, NORMALISE, C, MERGE, WIDTH,
    )  # fmt: skip
    if chunk == 0:
        to = statistics + cols
        tl.store(to, r_a, mask=wanted)
        tl.store(to + columns, r_b, mask=wanted)
        tl.store(to + 3 * columns.to(tl.int64), shift_a + mean_a, mask=wanted)
        tl.store(to + 4 * columns.to(tl.int64), shift_b + mean_b, mask=wanted)
    stride_a = stride_a.to(tl.int64) // VECTOR * VECTOR
    stride_b = stride_b.to(tl.int64) // VECTOR * VECTOR
    stride = columns.to(tl.int64) // VECTOR * VECTOR
    sum = tl.zeros((ROWS, WIDTH), C)
    for i in range(first, last, ROWS):
        row = i + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & wanted[None, :]
        a = tl.load(z_a + row[:, None] * stride_a + cols[None, :], mask=mask, other=0.0).to(C)
        b = tl.load(z_b + row[:, None] * stride_b + cols[None, :], mask=mask, other=0.0).to(C)
        a = ((a - shift_a[None, :]) - mean_a[None, :]) * r_a[None, :]
        b = ((b - shift_b[None, :]) - mean_b[None, :]) * r_b[None, :]
        at = hat + row[:, None] * stride + cols[None, :]
        tl.store(at, a.to(hat.dtype.element_ty), mask=mask)
        tl.store(at + rows * stride, b.to(hat.dtype.element_ty), mask=mask)
        sum += tl.where(mask, (a - b) * (a - b) if NEAR else a * b, 0.0)
    tl.store(terms + chunk * columns + cols, tl.sum(sum, axis=0), mask=wanted)


@triton.jit(do_not_specialize=["rows", "columns", "chunks", "target", "target_low", "eps", "eps_low"])
def gap_kernel(
    terms, statistics, rows, columns, chunks, target, target_low, eps, eps_low,
    OUTSIDE: tl.constexpr, UNBIASED: tl.constexpr, NEAR: tl.constexpr,
    MERGE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """target - c of every column, as csrc/barlow_twins.h has it."""
    C: tl.constexpr = statistics.dtype.element_ty
    eps = number(eps, eps_low, C)
    cols = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    wanted = cols < columns
    count = tl.zeros((WIDTH,), C) + rows.to(C)
    mean = divide(merged_sum(terms, chunks, columns, cols, wanted, MERGE, WIDTH), count)
    statistics += cols
    r_a = tl.load(statistics, mask=wanted, other=0.0)
    r_b = tl.load(statistics + columns, mask=wanted, other=0.0)
    if NEAR:
        mean += shrinkage(r_a, count, eps, OUTSIDE, UNBIASED) + shrinkage(r_b, count, eps, OUTSIDE, UNBIASED)
    gap = mean * 0.5 if NEAR else number(target, target_low, C) - mean
    tl.store(statistics + 2 * columns.to(tl.int64), gap, mask=wanted)


@triton.jit(do_not_specialize=["size", "share"])
def gram_kernel(grams, partial, size, share, VECTOR: tl.constexpr, FLAT: tl.constexpr):
    """Partial sums of <gram_a, gram_b>, each over ``share`` blocks of their ``size`` elements."""
    program = tl.program_id(0).to(tl.int64)
    size = size.to(tl.int64) // VECTOR * VECTOR
    sum = tl.zeros((FLAT,), partial.dtype.element_ty)
    for i in range(0, share):
        at = (program * share + i) * FLAT + tl.arange(0, FLAT)
        a = tl.load(grams + at, mask=at < size, other=0.0)
        b = tl.load(grams + size + at, mask=at < size, other=0.0)
        sum += a * b
    tl.store(partial + program, tl.sum(sum, axis=0))


@triton.jit(do_not_specialize=["size", "tiles", "share"])
def correlation_kernel(
    p, partial, size, tiles, share, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Partial sums of the squares of p less its diagonal, which becomes zero."""
    program = tl.program_id(0).to(tl.int64)
    size = size.to(tl.int64) // VECTOR * VECTOR
    across = (size + WIDTH - 1) // WIDTH
    sum = tl.zeros((ROWS, WIDTH), partial.dtype.element_ty)
    for tile in range(program * share, tl.minimum((program + 1) * share, tiles.to(tl.int64))):
        top, left = tile // across * ROWS, tile % across * WIDTH
        row = top + tl.arange(0, ROWS)
        col = left + tl.arange(0, WIDTH)
        mask = (row < size)[:, None] & (col < size)[None, :]
        diagonal = row[:, None] == col[None, :]
        at = p + row[:, None] * size + col[None, :]
        x = tl.where(diagonal, 0.0, tl.load(at, mask=mask, other=0.0))
        sum += x * x
        if (left < top + ROWS) & (top < left + WIDTH):
            tl.store(at, tl.zeros_like(x), mask=mask & diagonal)
    tl.store(partial + program, tl.sum(tl.sum(sum, axis=1), axis=0))


@triton.jit(
    do_not_specialize=[
        "count", "rows", "columns", "lambd", "lambd_low", "scale", "scale_low", "target", "target_low",
    ]
)  # fmt: skip
def loss_kernel(
    partial, statistics, loss, components, count, rows, columns,
    lambd, lambd_low, scale, scale_low, target, target_low,
    WITH_DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and its components from the partial sums of the energy and from target - c."""
    C: tl.constexpr = statistics.dtype.element_ty
    at = tl.arange(0, BLOCK)
    sum = tl.zeros((BLOCK,), C)
    for i in range(0, count, BLOCK):
        sum += tl.load(partial + i + at, mask=i + at < count, other=0.0)
    on = tl.zeros((BLOCK,), C)
    trace = tl.zeros((BLOCK,), C)
    diagonal = tl.zeros((BLOCK,), C)
    gaps = statistics + 2 * columns.to(tl.int64)
    target = number(target, target_low, C)
    for i in range(0, columns, BLOCK):
        mask = i + at < columns
        gap = tl.load(gaps + i + at, mask=mask, other=0.0)
        c = tl.where(mask, target - gap, 0.0)
        on += gap * gap
        trace += c
        diagonal += c * c
    b = rows.to(C)
    n = columns.to(C)
    off = divide(divide(tl.sum(sum, axis=0), b), b)
    if WITH_DIAGONAL:
        off -= tl.sum(diagonal, axis=0)
    # Not a maximum, which may lose a NaN.
    off = tl.where(off < 0, 0.0, off)
    on_diagonal = tl.sum(on, axis=0)
    total = number(scale, scale_low, C) * (on_diagonal + number(lambd, lambd_low, C) * off)
    pairs = tl.where(columns > 1, n * (n - 1), 1.0)
    tl.store(loss, total)
    tl.store(components, total)
    tl.store(components + 1, on_diagonal)
    tl.store(components + 2, off)
    tl.store(components + 3, divide(tl.sum(trace, axis=0), n))
    tl.store(components + 4, root(divide(off, pairs)))


@triton.jit(do_not_specialize=["size", "tiles", "scale"])
def narrow_kernel(
    matrices, out, size, tiles, scale, VECTOR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """One tile of one matrix, scaled, rounded, and without the diagonal."""
    program = tl.program_id(0).to(tl.int64)
    size = size.to(tl.int64) // VECTOR * VECTOR
    across = (size + WIDTH - 1) // WIDTH
    tile = program % tiles
    row = tile // across * ROWS + tl.arange(0, ROWS)
    col = tile % across * WIDTH + tl.arange(0, WIDTH)
    mask = (row < size)[:, None] & (col < size)[None, :]
    at = program // tiles * (size * size) + row[:, None] * size + col[None, :]
    x = tl.load(matrices + at, mask=mask, other=0.0) * scale
    x = tl.where(row[:, None] == col[None, :], 0.0, x)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


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


def _parts(value: float) -> tuple[float, float]:
    """A number as the sum of two that fp32 holds: Triton takes floats as fp32."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _objective(definition, rows) -> tuple[float, ...]:
    """lambd, scale and target (csrc/barlow_twins.h), each in two parts."""
    values = definition.lambd, definition.factor(rows), definition.target(rows)
    return tuple(part for value in values for part in _parts(value))


def _scaling(definition) -> tuple[bool, bool, bool]:
    return definition.eps_outside, definition.unbiased, definition.normalise


class _Grid:
    """Blocks of columns times chunks of rows: enough programs, and few chunks beside the rows of each."""

    def __init__(self, rows: int, columns: int):
        self.blocks = triton.cdiv(columns, WIDTH)
        chunks = max(1, min(PROGRAMS // self.blocks, triton.cdiv(rows, ROWS), math.isqrt(rows)))
        self.rows = triton.cdiv(triton.cdiv(rows, chunks), ROWS) * ROWS
        self.chunks = triton.cdiv(rows, self.rows)
        self.programs = self.blocks * self.chunks


def _vector(columns: int, *tensors: Tensor) -> int:
    """How many neighbouring columns may be one vector of 16 bytes, or of more where types differ."""
    size = min(tensor.element_size() for tensor in tensors)
    return divisor(16 // size, columns, *(tensor.stride(-2) for tensor in tensors if tensor.dim() > 1))


def _with_rows(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def standardise(z_a, z_b, definition, narrow) -> tuple[Tensor, Tensor]:
    """hat (2, B, D) and statistics (5, D): r_a, r_b, target - c, mean_a, mean_b."""
    rows, columns = z_a.shape
    compute, device = _compute_dtype(z_a.dtype), z_a.device
    z_a, z_b = _with_rows(z_a), _with_rows(z_b)
    hat = torch.empty(2, rows, columns, dtype=z_a.dtype if narrow else compute, device=device)
    statistics = torch.empty(5, columns, dtype=compute, device=device)
    grid = _Grid(rows, columns)
    partial = torch.empty(5, grid.chunks, columns, dtype=compute, device=device)
    terms = partial[4]
    eps, scaling, near = _parts(definition.eps), _scaling(definition), definition.near
    vector = _vector(columns, z_a, z_b, hat)
    sizes = rows, columns, z_a.stride(0), z_b.stride(0), grid.rows, grid.chunks
    launch(
        moments_kernel,
        grid.programs,
        device,
        z_a,
        z_b,
        partial,
        *sizes,
        definition.center,
        vector,
        ROWS,
        WIDTH,
    )
    launch(
        standardise_kernel, grid.programs, device,
        z_a, z_b, partial, hat, statistics, terms, *sizes, *eps, definition.center, *scaling,
        near, vector, ROWS, WIDTH, MERGE,
    )  # fmt: skip
    launch(
        gap_kernel, grid.blocks, device,
        terms, statistics, rows, columns, grid.chunks, *_parts(definition.target(rows)), *eps, *scaling[:2], near,
        MERGE, WIDTH,
    )  # fmt: skip
    return hat, statistics


def _loss(partial, rows, statistics, definition, with_diagonal) -> tuple[Tensor, Tensor]:
    loss, components = statistics.new_empty(()), statistics.new_empty(5)
    launch(
        loss_kernel, 1, statistics.device,
        partial, statistics, loss, components, len(partial), rows, statistics.shape[1],
        *_objective(definition, rows), with_diagonal, 1024, warps=8,
    )  # fmt: skip
    return loss, components


def gram_loss(grams, statistics, definition) -> tuple[Tensor, Tensor]:
    """Loss and components from the Gram matrices (2, B, B)."""
    rows = grams.shape[1]
    size = rows * rows
    blocks = triton.cdiv(size, FLAT)
    share = triton.cdiv(blocks, PROGRAMS)
    partial = statistics.new_empty(triton.cdiv(blocks, share))
    vector = divisor(16 // grams.element_size(), size)
    launch(gram_kernel, len(partial), grams.device, grams, partial, size, share, vector, FLAT)
    return _loss(partial, rows, statistics, definition, True)


def correlation_loss(p, rows, statistics, definition) -> tuple[Tensor, Tensor]:
    """Loss and components from p = Â'B̂ (D, D), whose diagonal becomes zero."""
    size = len(p)
    tiles = triton.cdiv(size, SQUARE_ROWS) * triton.cdiv(size, SQUARE_WIDTH)
    share = triton.cdiv(tiles, PROGRAMS)
    partial = statistics.new_empty(triton.cdiv(tiles, share))
    launch(
        correlation_kernel, len(partial), p.device,
        p, partial, size, tiles, share, _vector(size, p), SQUARE_ROWS, SQUARE_WIDTH,
    )  # fmt: skip
    return _loss(partial, rows, statistics, definition, False)


def narrowed(matrices, dtype, exponent) -> Tensor:
    """matrices (..., n, n) * 2^-exponent in ``dtype``, without their diagonals."""
    matrices = matrices.contiguous()
    out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    size = matrices.shape[-1]
    tiles = triton.cdiv(size, SQUARE_ROWS) * triton.cdiv(size, SQUARE_WIDTH)
    launch(
        narrow_kernel, matrices[..., 0, 0].numel() * tiles, matrices.device,
        matrices, out, size, tiles, 2.0**-exponent, _vector(size, matrices, out), SQUARE_ROWS, SQUARE_WIDTH,
    )  # fmt: skip
    return out


def gradient(products, views, statistics, upstream, definition, gram, exponent, grams, grads) -> None:
    """Fill ``grads`` from the products m (see csrc/barlow_twins.h), which still want a factor of 2^exponent."""
    a, b = (_with_rows(view) for view in views)
    rows, columns = a.shape
    device = statistics.device
    wanted = [grad is not None for grad in grads]
    narrow = a.dtype != statistics.dtype
    # What is not wanted or not there is not read: any address will do.
    products = [statistics if m is None else m for m in products]
    matrices = [statistics, statistics] if grams is None else list(grams)
    grads = [statistics if grad is None else grad for grad in grads]
    grid = _Grid(rows, columns)
    partial = statistics.new_empty(2, grid.chunks, columns)
    vector = _vector(columns, a, b)
    sizes = rows, columns, a.stride(0), b.stride(0), grid.rows, grid.chunks, 2.0**exponent
    flags = *wanted, narrow, grams is not None
    launch(
        projection_kernel, grid.programs, device,
        *products, a, b, *matrices, statistics, partial, *sizes, *flags, vector, ROWS, WIDTH,
    )  # fmt: skip
    launch(
        gradient_kernel, grid.programs, device,
        *products, a, b, *matrices, statistics, partial, upstream, *grads, *sizes,
        *_objective(definition, rows), *_parts(definition.eps), *_scaling(definition), *flags, gram,
        vector, ROWS, WIDTH, MERGE,
    )  # fmt: skip
