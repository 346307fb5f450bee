"""Draw, apply and its adjoint in Triton: one launch per modality each, for all its samples, steps and views.

Kernels read what a chain does from a table on the device, so that one compiled kernel serves every chain; the
branches on it are the same for a whole program. A modality's rows of the table are in the order of the views
and, within a view, of the steps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.ops import random as stream
from mmfast.ops.augment import plan as layouts
from mmfast.triton import divisor, launch
from mmfast.triton.random import normals, normals_at, philox, uniform, words

# Columns of the table; floating-point ones hold the bits of an fp64 (or fp32: the 32s).
(
    KIND,
    EXACT,
    COIN,
    GATE,
    PLACE,  # of the step's words in the plan of a sample
    TAG,  # of the stream, without a purpose
    COIN_TAG,
    TIME_TAG,
    PER_SAMPLE,  # is the coin of each sample its own?
    AMOUNT,
    SPREAD,
    AMOUNT32,
    SPREAD32,
    COLUMNS,
) = (tl.constexpr(i) for i in range(14))
RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE = (
    tl.constexpr(kind)
    for kind in (layouts.RESAMPLE, layouts.MASK_STEPS, layouts.MASK_FEATURES, layouts.NOISE)
)
SHARE_PURPOSE, FEATURE_PURPOSE, GATE_PURPOSE, NOISE_PURPOSE = (
    tl.constexpr(purpose) for purpose in (stream.SHARE, stream.FEATURE, stream.GATE, stream.NOISE)
)
ALL_SAMPLES = tl.constexpr(stream.ALL_SAMPLES)

DRAW_BLOCK, DRAW_KEYS = 128, 32  # positions of one program, and keys it compares them with at a time
APPLY_BYTES = 128 * 16  # of one program: a vector for each of its 128 threads
ADJOINT_BLOCK = 1024
# An adjoint walks 2^n paths through n resample steps: longer chains are cut.
ADJOINT_RESAMPLES = 3
MOST_INT32 = 2**31 - 1


@triton.jit
def bit(words, i, mask):
    """Bit ``i`` of packed flags as int32; 0 where ``mask`` is not set."""
    return (tl.load(words + (i >> 5), mask=mask, other=0) >> (i & 31).to(tl.int32)) & 1


@triton.jit
def real_steps(lengths, sample, L, HAS_LENGTHS: tl.constexpr):
    """The sample's length, never out of the memory it has."""
    n = L.to(tl.int64)
    if HAS_LENGTHS:
        n = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), n)
    return n


@triton.jit
def sample_id(ids, sample, HAS_IDS: tl.constexpr):
    id = sample
    if HAS_IDS:
        id = tl.load(ids + sample)
    return id


@triton.jit
def float64(bits):
    return bits.to(tl.float64, bitcast=True)


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


@triton.jit
def fired_rows(plan, table, first, last):
    """Bit i: did row ``first`` + i fire? Of up to 32 rows, read at once: one after the other, they would wait."""
    i = tl.arange(0, 32)
    mask = first + i < last
    place = tl.load(table + (first + i) * COLUMNS + PLACE, mask=mask, other=0)
    return tl.sum((tl.load(plan + place, mask=mask, other=0) != 0).to(tl.int32) << i, axis=0)


@triton.jit
def has_fired(fired, i, words):
    on = (fired >> i) & 1 if i < 32 else tl.load(words)
    return on != 0


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


class Table(NamedTuple):
    """The chains of one modality: ``rows`` (rows, COLUMNS) int64 and, per view, its rows and their kinds."""

    rows: Tensor
    views: list[tuple[int, int]]
    kinds: list[int]


def _bits(value: float, dtype: torch.dtype) -> int:
    return int(
        torch.tensor(value, dtype=dtype, device="cpu").view(
            torch.int64 if dtype == torch.float64 else torch.int32
        )
    )


@functools.lru_cache(maxsize=256)
def _amounts(amount: float, spread: float) -> list[int]:
    return [_bits(v, dtype) for dtype in (torch.float64, torch.float32) for v in (amount, spread)]


def _host_tables(chains: layouts.Chains, shapes) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Rows and views of every modality."""
    rows = [[] for _ in shapes]
    views = [[[0, 0] for _ in chains.steps_per_view] for _ in shapes]
    for i, (view, step, modality, kind, columns) in enumerate(
        layouts.layout(chains.steps_per_view, chains.rows, shapes)
    ):
        _, apply, flags, coin, gate = chains.rows[5 * i : 5 * i + 5]
        apply = layouts.APPLY_NAMES[apply]
        coin_who = stream.ALL_MODALITIES if apply == "batch" else modality
        time_who = (
            stream.ALL_MODALITIES if flags & layouts.SHARED_ORDER and kind == layouts.RESAMPLE else modality
        )
        if views[modality][view] == [0, 0]:
            views[modality][view] = [len(rows[modality])] * 2
        views[modality][view][1] += 1
        rows[modality].append(
            [
                kind,
                flags & layouts.EXACT_COUNT,
                coin,
                gate,
                columns["fired"].start,
                stream.stream_tag(view, modality, step, 0),
                stream.stream_tag(view, coin_who, step, stream.COIN),
                stream.stream_tag(view, time_who, step, stream.TIME),
                int(apply == "sample"),
                *_amounts(*chains.amounts[2 * i : 2 * i + 2]),
            ]
        )
    return rows, [[tuple(view) for view in modality] for modality in views]


class _Tables:
    """Tables on their devices, the most recently used ones.

    A table is copied there on the current stream without waiting, so it serves that stream only; a CUDA graph
    may use what any stream left behind, for a capture begins when the device has finished. From then on the table
    is kept, for the graph may be replayed, and serves all streams.
    """

    most = 512

    def __init__(self):
        self.known: dict = {}
        self.captured: dict = {}

    def __call__(self, chains: layouts.Chains, shapes, device: torch.device) -> list[Table]:
        key = tuple(chains.steps_per_view), tuple(chains.rows), tuple(chains.amounts), tuple(shapes), device
        if key in self.captured:
            return self.captured[key]
        cuda = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
        capturing = cuda and torch.cuda.is_current_stream_capturing()
        entry = self.known.pop(key, None)
        if capturing:
            if entry is None:
                raise RuntimeError(
                    "augment: a CUDA graph must capture chains and shapes that have run before, "
                    f"got new ones for shapes {shapes}"
                )
            self.captured[key] = entry[1]
            return entry[1]
        if entry is None or entry[0] != stream:
            entry = stream, self._copy(chains, shapes, device)
        self.known[key] = entry
        if len(self.known) > self.most:
            del self.known[next(iter(self.known))]
        return entry[1]

    @staticmethod
    def _copy(chains, shapes, device):
        rows, views = _host_tables(chains, shapes)
        flat = torch.tensor([row for modality in rows for row in modality], dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.reshape(-1, COLUMNS.value).split([len(modality) for modality in rows])
        kinds = [[row[0] for row in modality] for modality in rows]
        return [Table(*each) for each in zip(parts, views, kinds, strict=True)]


_tables = _Tables()


def _dense(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """A kernel wants some address even of what it does not read."""
    return otherwise if tensor is None else tensor.contiguous()


def draw(seed, ids, lengths, chains, batch, shapes) -> Tensor:
    """:func:`mmfast.ops.augment.augment_draw`."""
    device = seed.device
    width = layouts.plan_width(chains.steps_per_view, chains.rows, shapes)
    plan = torch.empty((batch, width), dtype=torch.int32, device=device)
    if plan.numel() == 0:
        return plan
    for (steps, features), length, table in zip(
        shapes, lengths, _tables(chains, shapes, device), strict=True
    ):
        rows = len(table.rows)
        blocks = triton.cdiv(max(steps, features, 1), DRAW_BLOCK)
        launch(
            draw_kernel, batch * rows * blocks, device,
            plan, seed, _dense(ids, seed), _dense(length, seed), table.rows, rows, blocks, steps, features, width,
            ids is not None, length is not None, DRAW_BLOCK, DRAW_KEYS,
            # Counts are rounded like those of the other backends.
            fuse=False,
        )  # fmt: skip
    return plan


def apply(xs, lengths, seed, ids, plan, chains, front, with_noise) -> list[Tensor]:
    """:func:`mmfast.ops.augment.augment_apply`, all views and modalities in a flat list."""
    device, views = plan.device, len(chains.steps_per_view)
    shapes = [tuple(x.shape[1:]) for x in xs]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=device) for _ in range(views) for x in xs]
    if views == 0 or all(x.numel() == 0 for x in xs):
        return outs
    plan = plan.contiguous()
    for m, (x, length, table) in enumerate(zip(xs, lengths, _tables(chains, shapes, device), strict=True)):
        batch, steps, features = x.shape
        if x.stride(2) != 1 and features > 1:
            x = x.contiguous()
        stride_b, stride_t, _ = x.stride()
        dense = stride_t == features or steps <= 1
        block = APPLY_BYTES // x.element_size()
        wide = steps * max(features, stride_t) > MOST_INT32 - block
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
                x, outs[a * len(xs) + m], outs[b * len(xs) + m], _dense(length, seed), seed, _dense(ids, seed),
                plan, table.rows, *table.views[a], *table.views[b],
                blocks, steps, features, stride_b, stride_t, plan.shape[1],
                b > a, ids is not None, length is not None, front, noisy, dense,
                divisor(16 // x.element_size(), steps * features, stride_b),
                tl.int64 if wide else tl.int32, block,
            )  # fmt: skip
    return outs


def adjoint(grads, lengths, plan, chains, front) -> list[Tensor]:
    """The gradients of the modalities from those of all views: the transposed map of :func:`apply`."""
    device, count = plan.device, len(lengths)
    shapes = [tuple(grad.shape[1:]) for grad in grads[:count]]
    outs = [torch.empty(grad.shape, dtype=grad.dtype, device=device) for grad in grads[:count]]
    if all(out.numel() == 0 for out in outs):
        return outs
    plan = plan.contiguous()
    for m, (out, length, table) in enumerate(
        zip(outs, lengths, _tables(chains, shapes, device), strict=True)
    ):
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
        grad_a, grad_b, out, _dense(length, plan), plan, rows, *view_a, *view_b,
        tiles_t, tiles_f, steps, features, plan.shape[1],
        len(parts) == 2, length is not None, front,
        tl.float64 if out.dtype == torch.float64 else tl.float32,
        divisor(16 // min(grad_a.element_size(), grad_b.element_size(), out.element_size()), features),
        tl.int64 if (steps + tile) * (features + width) > MOST_INT32 else tl.int32, tile, width,
    )  # fmt: skip
