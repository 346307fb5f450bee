"""The loss and its components, from Gram matrices or from the correlations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import divisor, launch
from mmfast.triton.arithmetic import divide, root
from mmfast.triton.barlow_twins_columns import (
    PROGRAMS,
    number,
    objective,
    vector_of,
)

SQUARE_ROWS, SQUARE_WIDTH = 16, 128  # of a tile of a square matrix
FLAT = 2048  # elements of a pair of matrices at a time


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


def _loss(partial, rows, statistics, definition, with_diagonal) -> tuple[Tensor, Tensor]:
    loss, components = statistics.new_empty(()), statistics.new_empty(5)
    launch(
        loss_kernel, 1, statistics.device,
        partial, statistics, loss, components, len(partial), rows, statistics.shape[1],
        *objective(definition, rows), with_diagonal, 1024, warps=8,
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
        p, partial, size, tiles, share, vector_of(size, p), SQUARE_ROWS, SQUARE_WIDTH,
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
        matrices, out, size, tiles, 2.0**-exponent, vector_of(size, matrices, out), SQUARE_ROWS, SQUARE_WIDTH,
    )  # fmt: skip
    return out
