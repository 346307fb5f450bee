"""Which steps fire, what they select and in which order: the words of a plan."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.ops import random as stream
from mmfast.ops.augment import plan as layouts
from mmfast.triton import launch
from mmfast.triton.augment_chain import (
    AMOUNT,
    COIN,
    COIN_TAG,
    COLUMNS,
    EXACT,
    GATE,
    KIND,
    MASK_STEPS,
    NOISE,
    PER_SAMPLE,
    PLACE,
    RESAMPLE,
    SPREAD,
    TAG,
    TIME_TAG,
    float64,
    given,
    real_steps,
    sample_id,
    tables,
)
from mmfast.triton.random import philox, uniform, words

SHARE_PURPOSE, FEATURE_PURPOSE, GATE_PURPOSE = (
    tl.constexpr(purpose) for purpose in (stream.SHARE, stream.FEATURE, stream.GATE)
)
ALL_SAMPLES = tl.constexpr(stream.ALL_SAMPLES)
DRAW_BLOCK, DRAW_KEYS = 128, 32  # positions of one program, and keys it compares them with at a time


@triton.jit
def draw_share(row, seed, id):
    """What a step selects: its amount, or SeqAug's alpha of one sample, in fp64 as on every backend."""
    share = float64(tl.load(row + AMOUNT))
    spread = float64(tl.load(row + SPREAD))
    if (tl.load(row + KIND) == RESAMPLE) & (spread != 0):
        w0, w1, _, _ = philox(seed, id, tl.load(row + TAG) | SHARE_PURPOSE, 0)
        radius = tl.sqrt(-2.0 * tl.log(1.0 - uniform(w0).to(tl.float64)))
        normal = radius * tl.cos(uniform(w1).to(tl.float64) * 6.283185307179586)
        share = tl.minimum(share + spread * tl.abs(normal), 1.0)
    return share


@triton.jit
def ranks(keys, place, seed, id, tag, n, KEYS: tl.constexpr):
    """How many of the first n keys of a stream come before each of ``keys``; equal keys go by position."""
    rank = tl.zeros_like(place)
    for first in range(0, n, KEYS):
        other = words(seed, id, tag, first // 4, KEYS // 4)[None, :]
        at = (first + tl.arange(0, KEYS))[None, :]
        before = (other < keys[:, None]) | ((other == keys[:, None]) & (at < place[:, None]))
        rank += tl.sum((before & (at < n)).to(tl.int32), axis=1)
    return rank


@triton.jit
def store_bits(out, chosen, first, size, BLOCK: tl.constexpr):
    """One block of the packed flags of ``size`` positions."""
    packed = tl.sum(tl.reshape(chosen.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :], axis=1)
    word = first // 32 + tl.arange(0, BLOCK // 32)
    tl.store(out + word, packed, mask=word < (size + 31) // 32)


@triton.jit(do_not_specialize=["rows", "blocks", "L", "F", "width"])
def draw_kernel(
    plan, seed, ids, lengths, table, rows, blocks, L, F, width,
    HAS_IDS: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of time steps and of features of one step of one sample."""
    program = tl.program_id(0).to(tl.int64)
    first = (program % blocks).to(tl.int32) * BLOCK
    sample = program // blocks // rows
    row = table + program // blocks % rows * COLUMNS
    seed = tl.load(seed)
    id = sample_id(ids, sample, HAS_IDS)
    n = real_steps(lengths, sample, L, HAS_LENGTHS).to(tl.int32)

    coin_id = tl.where(tl.load(row + PER_SAMPLE) != 0, id, ALL_SAMPLES)
    coin, _, _, _ = philox(seed, coin_id, tl.load(row + COIN_TAG), 0)
    fired = coin.to(tl.int64) < tl.load(row + COIN)
    words_of_step = plan + sample * width + tl.load(row + PLACE)
    if first == 0:
        tl.store(words_of_step, fired.to(tl.int32))

    kind = tl.load(row + KIND)
    tag = tl.load(row + TAG)
    time_tag = tl.load(row + TIME_TAG)
    bits = words_of_step + 1
    place = first + tl.arange(0, BLOCK)
    if kind != NOISE:
        # Masked time steps, masked features, or the features to resample.
        by_step = kind == MASK_STEPS
        size = tl.where(by_step, L, F)
        of = tl.where(by_step, n, F)
        key_tag = tl.where(by_step, time_tag, tag | FEATURE_PURPOSE)
        if first < size:
            chosen = place < 0
            if fired & (first < of):
                share = draw_share(row, seed, id)
                keys = words(seed, id, key_tag, first // 4, BLOCK // 4)
                if tl.load(row + EXACT) != 0:
                    count = tl.floor(share * of.to(tl.float64) + 0.5).to(tl.int32)
                    if (kind != RESAMPLE) & (share < 1.0):
                        count = tl.minimum(count, of - 1)
                    chosen = ranks(keys, place, seed, id, key_tag, of, KEYS) < count
                else:
                    threshold = tl.floor(share * 4294967296.0 + 0.5).to(tl.int64)
                    chosen = keys.to(tl.int64) < threshold
            store_bits(bits, chosen & (place < of), first, size, BLOCK)
    if (kind == RESAMPLE) & (first < L):
        order = bits + (F + 31) // 32
        opened = place < 0
        if fired & (first < n):
            keys = words(seed, id, tag | GATE_PURPOSE, first // 4, BLOCK // 4)
            opened = (keys.to(tl.int64) < tl.load(row + GATE)) & (place < n)
            keys = words(seed, id, time_tag, first // 4, BLOCK // 4)
            rank = ranks(keys, place, seed, id, time_tag, n, KEYS)
            tl.store(order + rank, place, mask=place < n)
        store_bits(order + L, opened, first, L, BLOCK)
        tl.store(order + place, place, mask=(place < L) & (place >= tl.where(fired, n, 0)))


def draw(seed, ids, lengths, chains, batch, shapes) -> Tensor:
    """:func:`mmfast.ops.augment.augment_draw`."""
    device = seed.device
    width = layouts.plan_width(chains.steps_per_view, chains.rows, shapes)
    plan = torch.empty((batch, width), dtype=torch.int32, device=device)
    if plan.numel() == 0:
        return plan
    for (steps, features), length, table in zip(shapes, lengths, tables(chains, shapes, device), strict=True):
        rows = len(table.rows)
        blocks = triton.cdiv(max(steps, features, 1), DRAW_BLOCK)
        launch(
            draw_kernel, batch * rows * blocks, device,
            plan, seed, given(ids, seed), given(length, seed), table.rows, rows, blocks, steps, features, width,
            ids is not None, length is not None, DRAW_BLOCK, DRAW_KEYS,
            # Counts are rounded like those of the other backends.
            fuse=False,
        )  # fmt: skip
    return plan
