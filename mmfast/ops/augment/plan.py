"""Chains of augmentation steps as tables of numbers, and the layout of the plan that draw makes of them.

The layout is that of csrc/augment.h: int32 words, sample-major, for every view, step and modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast.ops.random import threshold

RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE = range(4)
KIND_NAMES = ("resample", "mask steps", "mask features", "noise")
APPLY_NAMES = ("modality", "batch", "sample")
EXACT_COUNT, SHARED_ORDER = 1, 2


class Step(NamedTuple):
    """One transform of one modality.

    p: probability that it fires. apply: which draws share a coin, one of ``APPLY_NAMES``.
    amount, spread: alpha and its spread (resample), share (masks), mean and standard deviation (noise).
    gate: probability that a time step takes the resampled values. flags: EXACT_COUNT | SHARED_ORDER.
    """

    kind: int
    p: float
    apply: str
    amount: float
    spread: float = 0.0
    gate: float = 1.0
    flags: int = 0


class Chains(NamedTuple):
    """Chains of all views as flat lists, the form in which the ops take them.

    ``steps_per_view``: (views,). ``rows``: five ints, ``amounts``: two floats for every view, step, modality.
    """

    steps_per_view: list[int]
    rows: list[int]
    amounts: list[float]


def chains(views: Sequence[Sequence[Sequence[Step]]]) -> Chains:
    """Flatten ``views[view][step][modality]``."""
    steps = [step for view in views for row in view for step in row]
    rows, amounts = [], []
    for s in steps:
        apply = APPLY_NAMES.index(s.apply)
        rows += [s.kind, apply, s.flags, threshold(s.p), threshold(s.gate)]
        amounts += [float(s.amount), float(s.spread)]
    return Chains([len(view) for view in views], rows, amounts)


def bit_words(n: int) -> int:
    return (n + 31) // 32


def fields(kind: int, steps: int, features: int) -> list[tuple[str, int]]:
    """Names and sizes of what the plan holds for one step of one modality of one sample."""
    time, feature = ("gate", bit_words(steps)), ("features", bit_words(features))
    extra = {
        RESAMPLE: [feature, ("order", steps), time],
        MASK_STEPS: [("masked_steps", bit_words(steps))],
        MASK_FEATURES: [("masked_features", bit_words(features))],
        NOISE: [],
    }[kind]
    return [("fired", 1), *extra]


class Field(NamedTuple):
    """Where one step of one modality stands in ``plan.words``."""

    view: int
    step: int
    modality: int
    kind: int
    columns: dict[str, slice]


def layout(steps_per_view: list[int], rows: list[int], shapes: Sequence[tuple[int, int]]) -> Iterator[Field]:
    """All fields in order; ``shapes`` are (L, F) per modality."""
    kinds = iter(rows[::5])
    at = 0
    for view, count in enumerate(steps_per_view):
        for step in range(count):
            for modality, (length, features) in enumerate(shapes):
                kind = next(kinds)
                columns = {}
                for name, size in fields(kind, length, features):
                    columns[name] = slice(at, at + size)
                    at += size
                yield Field(view, step, modality, kind, columns)


def plan_width(steps_per_view: list[int], rows: list[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Words per sample."""
    kinds = iter(rows[::5])
    return sum(
        size
        for count in steps_per_view
        for _ in range(count)
        for length, features in shapes
        for _, size in fields(next(kinds), length, features)
    )


def pack_bits(flags: Tensor) -> Tensor:
    """(B, n) bool to (B, ceil(n / 32)) int32, bit i % 32 of word i // 32."""
    padded = torch.nn.functional.pad(flags.long(), (0, -flags.shape[1] % 32)).unflatten(1, (-1, 32))
    return (padded << torch.arange(32, device=flags.device)).sum(-1).int()


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_bits`: (B, n) bool."""
    bits = packed.long()[:, :, None] >> torch.arange(32, device=packed.device) & 1
    return bits.flatten(1)[:, :n].bool()
