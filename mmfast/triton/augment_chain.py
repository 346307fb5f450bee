"""Chains as kernels read them: a table on the device, so that one compiled kernel serves every chain.

Branches on the table are the same for a whole program. A modality's rows of it are in the order of the views and,
within a view, of the steps.
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


tables = _Tables()


def given(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """A kernel wants some address even of what it does not read."""
    return otherwise if tensor is None else tensor.contiguous()
