"""Blocks of columns and chunks of rows, which the passes of Barlow Twins share.

csrc/barlow_twins.h has the notation and the formulas. Each program works on one block of columns and one chunk of
rows. Sums over rows are partial sums of chunks, which whoever needs the sum adds up in order, so results are the same
from run to run.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl
from torch import Tensor

from mmfast.triton import divisor

ROWS, WIDTH = 16, 64  # of a tile
MERGE = 16  # chunks merged at a time
PROGRAMS = 1024  # enough to keep any GPU busy


@triton.jit
def number(high, low, C: tl.constexpr):
    """A number of the host that was cut into two of fp32."""
    return tl.full((), high, C) + tl.full((), low, C)


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


def parts_of(value: float) -> tuple[float, float]:
    """A number as the sum of two that fp32 holds: Triton takes floats as fp32."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def objective(definition, rows) -> tuple[float, ...]:
    """lambd, scale and target (csrc/barlow_twins.h), each in two parts."""
    values = definition.lambd, definition.factor(rows), definition.target(rows)
    return tuple(part for value in values for part in parts_of(value))


def scaling_of(definition) -> tuple[bool, bool, bool]:
    return definition.eps_outside, definition.unbiased, definition.normalise


class Grid:
    """Blocks of columns times chunks of rows: enough programs, and few chunks beside the rows of each."""

    def __init__(self, rows: int, columns: int):
        self.blocks = triton.cdiv(columns, WIDTH)
        chunks = max(1, min(PROGRAMS // self.blocks, triton.cdiv(rows, ROWS), math.isqrt(rows)))
        self.rows = triton.cdiv(triton.cdiv(rows, chunks), ROWS) * ROWS
        self.chunks = triton.cdiv(rows, self.rows)
        self.programs = self.blocks * self.chunks


def vector_of(columns: int, *tensors: Tensor) -> int:
    """How many neighbouring columns may be one vector of 16 bytes, or of more where types differ."""
    size = min(tensor.element_size() for tensor in tensors)
    return divisor(16 // size, columns, *(tensor.stride(-2) for tensor in tensors if tensor.dim() > 1))


def with_unit_stride(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()
