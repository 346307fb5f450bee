"""Standardised views, and the statistics of their columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import launch
from mmfast.triton.arithmetic import divide, root
from mmfast.triton.barlow_twins_columns import (
    MERGE,
    ROWS,
    WIDTH,
    Grid,
    merged_sum,
    number,
    parts_of,
    scaling_of,
    tile_of,
    vector_of,
    with_unit_stride,
)


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


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def standardise(z_a, z_b, definition, narrow) -> tuple[Tensor, Tensor]:
    """hat (2, B, D) and statistics (5, D): r_a, r_b, target - c, mean_a, mean_b."""
    rows, columns = z_a.shape
    compute, device = _compute_dtype(z_a.dtype), z_a.device
    z_a, z_b = with_unit_stride(z_a), with_unit_stride(z_b)
    hat = torch.empty(2, rows, columns, dtype=z_a.dtype if narrow else compute, device=device)
    statistics = torch.empty(5, columns, dtype=compute, device=device)
    grid = Grid(rows, columns)
    partial = torch.empty(5, grid.chunks, columns, dtype=compute, device=device)
    terms = partial[4]
    eps, scaling, near = parts_of(definition.eps), scaling_of(definition), definition.near
    vector = vector_of(columns, z_a, z_b, hat)
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
        terms, statistics, rows, columns, grid.chunks, *parts_of(definition.target(rows)), *eps, *scaling[:2], near,
        MERGE, WIDTH,
    )  # fmt: skip
    return hat, statistics
