"""Both views of a modality in one pass over it: each element goes through its chain from the last step backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.ops import random as stream
from mmfast.ops.augment import plan as layouts
from mmfast.triton import augment_chain as chain
from mmfast.triton import divisor, launch
from mmfast.triton.augment_chain import (
    AMOUNT,
    AMOUNT32,
    COLUMNS,
    KIND,
    MASK_FEATURES,
    MASK_STEPS,
    PLACE,
    RESAMPLE,
    SPREAD,
    SPREAD32,
    TAG,
    bit,
    fired_rows,
    float64,
    given,
    has_fired,
    real_steps,
    sample_id,
    tables,
)
from mmfast.triton.random import normals, normals_at

NOISE_PURPOSE = tl.constexpr(stream.NOISE)
APPLY_BYTES = 128 * 16  # of one program: a vector for each of its 128 threads


@triton.jit
def walk(
    own, x, plan, table, first, last, base, cell, t, f, n, start, seed, id, L, F, stride_t,
    WITH_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One view of a block of elements, given their ``own`` values: the chain from its last step backwards.

    A resample step moves the time step that an element is looked for at, a mask ends the search, and noise
    is summed on the way. Time steps are counted from the first real one; padding never moves.
    """
    C: tl.constexpr = tl.float64 if own.dtype == tl.float64 else tl.float32
    real = (t >= 0) & (t < n)
    at = t
    alive = real
    moved = 0
    noisy = real & (t < 0)
    noise = tl.zeros((BLOCK,), C)
    fired = fired_rows(plan, table, first, last)
    for back in range(first, last):
        i = last - 1 - back
        row = table + (first + i) * COLUMNS
        words = plan + tl.load(row + PLACE)
        if has_fired(fired, i, words):
            kind = tl.load(row + KIND)
            words += 1
            if kind == RESAMPLE:
                order = words + (F + 31) // 32
                goes = alive & (bit(words, f, alive) != 0)
                goes = goes & (bit(order + L, at, goes) != 0)
                # A plan that does not belong to these lengths must not lead out of the sample.
                source = tl.load(order + at, mask=goes, other=0)
                source = tl.minimum(tl.maximum(source.to(at.dtype), 0), n - 1)
                at = tl.where(goes, source, at)
                moved += 1
            elif kind == MASK_STEPS:
                alive = alive & (bit(words, at, alive) == 0)
            elif kind == MASK_FEATURES:
                alive = alive & (bit(words, f, alive) == 0)
            elif WITH_NOISE:
                tag = tl.load(row + TAG) | NOISE_PURPOSE
                if own.dtype == tl.float64:
                    mean = float64(tl.load(row + AMOUNT))
                    deviation = float64(tl.load(row + SPREAD))
                else:
                    mean = tl.load(row + AMOUNT32).to(tl.int32).to(tl.float32, bitcast=True)
                    deviation = tl.load(row + SPREAD32).to(tl.int32).to(tl.float32, bitcast=True)
                coordinate = base - start * F
                if (moved == 0) & (coordinate % 4 == 0):
                    # Neighbours share the words and the logarithms of a block.
                    z = normals(seed, id, tag, coordinate // 4, BLOCK // 4)
                else:
                    z = normals_at(seed, id, tag, at * F + f)
                noise += tl.where(alive, mean + deviation * z.to(C), 0.0)
                noisy = noisy | alive
    value = own
    if moved > 0:
        moves = alive & (at != t)
        other = tl.load(x + ((at + start) * stride_t + f), mask=moves, other=0.0)
        value = tl.where(moves, other, own)
    value = tl.where(alive | (real == 0), value, tl.zeros_like(own))
    if WITH_NOISE:
        # What no noise fell on keeps its bits.
        value = tl.where(noisy, (noise + value.to(C)).to(own.dtype), value)
    return value


@triton.jit(
    do_not_specialize=[
        "first_a", "last_a", "first_b", "last_b", "blocks", "L", "F", "stride_b", "stride_t", "width",
    ]
)  # fmt: skip
def apply_kernel(
    x, out_a, out_b, lengths, seed, ids, plan, table, first_a, last_a, first_b, last_b,
    blocks, L, F, stride_b, stride_t, width,
    TWO: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, FRONT: tl.constexpr,
    WITH_NOISE: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of the elements of one sample, in one or two views."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    cells = L.to(tl.int64) * F // VECTOR * VECTOR
    base = (program % blocks * BLOCK).to(INDEX)
    cell = base + tl.arange(0, BLOCK).to(INDEX)
    inside = cell < cells
    length = real_steps(lengths, sample, L, HAS_LENGTHS)
    start = (L - length).to(INDEX) if FRONT else 0
    n = length.to(INDEX)
    width_f = F.to(INDEX)
    stride_t = stride_t.to(INDEX)
    t = cell // width_f
    f = cell - t * width_f
    # Elements beyond the last count as padding.
    t = tl.where(inside, t - start, -1)

    x += sample * (stride_b // VECTOR * VECTOR)
    out_a += sample * cells
    plan += sample * width
    seed = tl.load(seed)
    id = sample_id(ids, sample, HAS_IDS)
    from_x = cell
    if not DENSE:
        from_x = (t + start) * stride_t + f
    own = tl.load(x + from_x, mask=inside)
    value = walk(
        own, x, plan, table, first_a, last_a, base, cell, t, f, n, start, seed, id, L, width_f, stride_t,
        WITH_NOISE, BLOCK,
    )  # fmt: skip
    tl.store(out_a + cell, value, mask=inside)
    if TWO:
        out_b += sample * cells
        value = walk(
            own, x, plan, table, first_b, last_b, base, cell, t, f, n, start, seed, id, L, width_f, stride_t,
            WITH_NOISE, BLOCK,
        )  # fmt: skip
        tl.store(out_b + cell, value, mask=inside)


def apply(xs, lengths, seed, ids, plan, chains, front, with_noise) -> list[Tensor]:
    """:func:`mmfast.ops.augment.augment_apply`, all views and modalities in a flat list."""
    device, views = plan.device, len(chains.steps_per_view)
    shapes = [tuple(x.shape[1:]) for x in xs]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=device) for _ in range(views) for x in xs]
    if views == 0 or all(x.numel() == 0 for x in xs):
        return outs
    plan = plan.contiguous()
    for m, (x, length, table) in enumerate(zip(xs, lengths, tables(chains, shapes, device), strict=True)):
        batch, steps, features = x.shape
        if x.stride(2) != 1 and features > 1:
            x = x.contiguous()
        stride_b, stride_t, _ = x.stride()
        dense = stride_t == features or steps <= 1
        block = APPLY_BYTES // x.element_size()
        wide = steps * max(features, stride_t) > chain.MOST_INT32 - block
        blocks = triton.cdiv(steps * features, block)
        for a in range(0, views, 2):
            b = min(a + 1, views - 1)
            noisy = with_noise and any(
                kind == layouts.NOISE
                for view in (table.views[a], table.views[b])
                for kind in table.kinds[slice(*view)]
            )
            launch(
                apply_kernel, batch * blocks, device,
                x, outs[a * len(xs) + m], outs[b * len(xs) + m], given(length, seed), seed, given(ids, seed),
                plan, table.rows, *table.views[a], *table.views[b],
                blocks, steps, features, stride_b, stride_t, plan.shape[1],
                b > a, ids is not None, length is not None, front, noisy, dense,
                divisor(16 // x.element_size(), steps * features, stride_b),
                tl.int64 if wide else tl.int32, block,
            )  # fmt: skip
    return outs
