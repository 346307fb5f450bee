"""The gradient of apply: what the views pull back to each element of a modality."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.ops.augment import plan as layouts
from mmfast.triton import augment_chain as chain
from mmfast.triton import divisor, launch
from mmfast.triton.augment_chain import (
    COLUMNS,
    KIND,
    MASK_FEATURES,
    MASK_STEPS,
    PLACE,
    RESAMPLE,
    bit,
    fired_rows,
    given,
    has_fired,
    real_steps,
    tables,
)

ADJOINT_BLOCK = 1024
# An adjoint walks 2^n paths through n resample steps: longer chains are cut.
ADJOINT_RESAMPLES = 3


@triton.jit
def inverse(order, to, n, ROWS: tl.constexpr):
    """For each time step the one that takes its values from it, or -1."""
    found = tl.full((ROWS,), -1, to.dtype)
    for first in range(0, n, 32):
        t = first + tl.arange(0, 32)
        source = tl.load(order + t, mask=t < n, other=-1)
        hits = source[None, :] == to[:, None]
        found = tl.maximum(found, tl.max(tl.where(hits, t[None, :], -1).to(to.dtype), axis=1))
    return found


@triton.jit
def pull(
    grad, plan, table, first, last, t, f, n, start, L, F, inside,
    C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What one view's gradient adds to a tile of the gradient of x.

    Going through the chain from the front, an element arrives at up to two time steps behind each resample
    step: where it stood, and where it was moved to. Each path (one bit per resample step) is walked on its
    own, for the tile it started from, so nothing is written by two programs.
    """
    real = (t >= 0) & (t < n)
    fired = fired_rows(plan, table, first, last)
    resamples = 0
    for i in range(0, last - first):
        row = table + (first + i) * COLUMNS
        if tl.load(row + KIND) == RESAMPLE:
            resamples += has_fired(fired, i, plan + tl.load(row + PLACE)).to(tl.int32)
    sum = tl.zeros((ROWS, WIDTH), C)
    for path in range(0, 1 << resamples):
        at = t
        # Padding comes straight through, on the path without moves.
        wanted = real | (path == 0)
        live = inside
        turn = 0
        for i in range(0, last - first):
            row = table + (first + i) * COLUMNS
            words = plan + tl.load(row + PLACE)
            if has_fired(fired, i, words):
                kind = tl.load(row + KIND)
                words += 1
                if kind == MASK_STEPS:
                    wanted = wanted & (bit(words, at, real) == 0)
                elif kind == MASK_FEATURES:
                    live = live & ((bit(words, f, f < F) == 0)[None, :] | (real == 0)[:, None])
                elif kind == RESAMPLE:
                    order = words + (F + 31) // 32
                    chosen = (bit(words, f, f < F) != 0)[None, :]
                    if (path >> turn) & 1 == 1:
                        to = inverse(order, at, n.to(tl.int32), ROWS)
                        at = tl.where(real & (to >= 0), to, at)
                        wanted = wanted & (to >= 0) & (bit(order + L, at, real) != 0)
                        live = live & chosen
                    else:
                        opened = bit(order + L, at, real) != 0
                        live = live & ((chosen & opened[:, None]) == 0)
                    turn += 1
        # Whole rows are loaded, as vectors, and from them what is live.
        cell = (at + start)[:, None] * F + f[None, :]
        value = tl.load(grad + cell, mask=inside & wanted[:, None], other=0.0)
        sum += tl.where(live, value.to(C), 0.0)
    return sum


@triton.jit(
    do_not_specialize=["first_a", "last_a", "first_b", "last_b", "tiles_t", "tiles_f", "L", "F", "width"]
)
def adjoint_kernel(
    grad_a, grad_b, out, lengths, plan, table, first_a, last_a, first_b, last_b, tiles_t, tiles_f, L, F, width,
    TWO: tl.constexpr, HAS_LENGTHS: tl.constexpr, FRONT: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of one sample, from one or two views."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles_f // tiles_t
    features = (F // VECTOR * VECTOR).to(INDEX)
    s = (program // tiles_f % tiles_t * ROWS).to(INDEX) + tl.arange(0, ROWS).to(INDEX)
    f = (program % tiles_f * WIDTH).to(INDEX) + tl.arange(0, WIDTH).to(INDEX)
    inside = (s < L)[:, None] & (f < features)[None, :]
    length = real_steps(lengths, sample, L, HAS_LENGTHS)
    start = (L - length).to(INDEX) if FRONT else 0
    n = length.to(INDEX)
    t = s - start
    plan += sample * width
    offset = sample * L * features
    sum = pull(
        grad_a + offset, plan, table, first_a, last_a, t, f, n, start, L, features, inside, C, ROWS, WIDTH
    )
    if TWO:
        sum += pull(
            grad_b + offset, plan, table, first_b, last_b, t, f, n, start, L, features, inside, C, ROWS, WIDTH
        )
    tl.store(out + offset + s[:, None] * features + f[None, :], sum.to(out.dtype.element_ty), mask=inside)


def adjoint(grads, lengths, plan, chains, front) -> list[Tensor]:
    """The gradients of the modalities from those of all views: the transposed map of :func:`apply`."""
    device, count = plan.device, len(lengths)
    shapes = [tuple(grad.shape[1:]) for grad in grads[:count]]
    outs = [torch.empty(grad.shape, dtype=grad.dtype, device=device) for grad in grads[:count]]
    if all(out.numel() == 0 for out in outs):
        return outs
    plan = plan.contiguous()
    for m, (out, length, table) in enumerate(zip(outs, lengths, tables(chains, shapes, device), strict=True)):
        if out.numel() == 0:
            continue

        def pull_back(parts, to, length=length, table=table):
            _pull_back(parts, to, length, plan, table.rows, front)
            return to

        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        parts = []
        for grad, (first, last) in zip(grads[m::count], table.views, strict=True):
            grad = grad.contiguous()
            while (cut := _cut(table.kinds, first, last)) > first:
                grad = pull_back([(grad, (cut, last))], torch.empty_like(grad, dtype=wide))
                last = cut
            parts.append((grad, (first, last)))
        while len(parts) > 2:
            # A view without steps hands its gradient on as it is.
            total = pull_back(parts[:2], torch.empty_like(parts[0][0], dtype=wide))
            parts = [(total, (0, 0)), *parts[2:]]
        pull_back(parts, out)
    return outs


def _cut(kinds, first, last) -> int:
    """The row from which on a chain has few enough resample steps to be pulled back in one launch."""
    resamples = [i for i in range(first, last) if kinds[i] == layouts.RESAMPLE]
    return resamples[-ADJOINT_RESAMPLES] if len(resamples) > ADJOINT_RESAMPLES else first


def _pull_back(parts, out, length, plan, rows, front):
    """Sum of one or two gradients, each pulled back through a range of rows of the table."""
    batch, steps, features = out.shape
    (grad_a, view_a), (grad_b, view_b) = parts[0], parts[-1]
    width = 32 if features <= 32 else 128
    tile = ADJOINT_BLOCK // width
    tiles_t, tiles_f = triton.cdiv(steps, tile), triton.cdiv(features, width)
    launch(
        adjoint_kernel, batch * tiles_t * tiles_f, out.device,
        grad_a, grad_b, out, given(length, plan), plan, rows, *view_a, *view_b,
        tiles_t, tiles_f, steps, features, plan.shape[1],
        len(parts) == 2, length is not None, front,
        tl.float64 if out.dtype == torch.float64 else tl.float32,
        divisor(16 // min(grad_a.element_size(), grad_b.element_size(), out.element_size()), features),
        tl.int64 if (steps + tile) * (features + width) > chain.MOST_INT32 else tl.int32, tile, width,
    )  # fmt: skip
