"""The augment ops in plain PyTorch, on any device: the oracle of the tests, and the backend without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.ops import random
from mmfast.ops.augment.plan import (
    APPLY_NAMES,
    EXACT_COUNT,
    MASK_FEATURES,
    MASK_STEPS,
    RESAMPLE,
    SHARED_ORDER,
    layout,
    pack_bits,
    plan_width,
    unpack_bits,
)


def _smallest(keys: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Flags of the ``count`` (B,) smallest keys (B, n) among the valid ones; equal keys by index."""
    order = keys.masked_fill(~valid, random.MASK + 1).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    )
    return rank < count[:, None]


def _count(kind: int, share: Tensor, n: Tensor) -> Tensor:
    """How many of n (B,) a step selects: round(share n), half up. A mask leaves one, unless its share is 1."""
    count = torch.floor(share * n + 0.5).long()
    return count if kind == RESAMPLE else torch.where(share < 1, count.minimum((n - 1).clamp(min=0)), count)


def _select(kind: int, keys: Tensor, valid: Tensor, share: Tensor, exact: bool) -> Tensor:
    """Flags of a share (B,) of the valid entries: an exact count, or each one independently."""
    if exact:
        return _smallest(keys, valid, _count(kind, share, valid.sum(1)))
    thresholds = torch.floor(share * 2.0**32 + 0.5).long()
    return (keys < thresholds[:, None]) & valid


def draw(seed, ids, lengths, chains, batch, shapes) -> Tensor:
    """Words of the plan, int32 (B, width); arguments as for :func:`mmfast.ops.augment.augment_draw`."""
    device = seed.device
    ids = torch.arange(batch, device=device) if ids is None else ids
    everyone = torch.full_like(ids, random.ALL_SAMPLES)
    plan = torch.zeros(
        (batch, plan_width(chains.steps_per_view, chains.rows, shapes)), dtype=torch.int32, device=device
    )
    for i, (view, step, modality, kind, columns) in enumerate(
        layout(chains.steps_per_view, chains.rows, shapes)
    ):
        _, apply, flags, coin, gate = chains.rows[5 * i : 5 * i + 5]
        amount, spread = chains.amounts[2 * i : 2 * i + 2]
        steps, features = shapes[modality]
        n = lengths[modality] if lengths[modality] is not None else torch.full_like(ids, steps)
        real = torch.arange(steps, device=device) < n[:, None]
        every = torch.ones((batch, features), dtype=torch.bool, device=device)
        exact = bool(flags & EXACT_COUNT)

        def draw(purpose, count, who=modality, whose=ids, view=view, step=step):
            return random.words(seed, whose, random.stream_tag(view, who, step, purpose), count)

        who = random.ALL_MODALITIES if APPLY_NAMES[apply] == "batch" else modality
        whose = ids if APPLY_NAMES[apply] == "sample" else everyone
        fired = draw(random.COIN, 1, who, whose)[:, 0] < coin
        share = torch.full((batch,), amount, dtype=torch.float64, device=device)
        plan[:, columns["fired"]] = fired[:, None].int()
        if kind == MASK_STEPS:
            masked = _select(kind, draw(random.TIME, steps), real, share, exact)
            plan[:, columns["masked_steps"]] = pack_bits(masked & fired[:, None])
        elif kind == MASK_FEATURES:
            masked = _select(kind, draw(random.FEATURE, features), every, share, exact)
            plan[:, columns["masked_features"]] = pack_bits(masked & fired[:, None])
        elif kind == RESAMPLE:
            if spread:
                tag = random.stream_tag(view, modality, step, random.SHARE)
                share = (share + spread * random.normals(seed, ids, tag, 1)[:, 0].abs()).clamp(max=1)
            chosen = _select(kind, draw(random.FEATURE, features), every, share, exact)
            shared = random.ALL_MODALITIES if flags & SHARED_ORDER else modality
            keys = draw(random.TIME, steps, shared).masked_fill(~real, random.MASK + 1)
            order = torch.where(
                fired[:, None], keys.argsort(dim=1, stable=True), torch.arange(steps, device=device)
            )
            open_gate = (draw(random.GATE, steps) < gate) & real
            plan[:, columns["features"]] = pack_bits(chosen & fired[:, None])
            plan[:, columns["order"]] = order.int()
            plan[:, columns["gate"]] = pack_bits(open_gate & fired[:, None])
    return plan


class _Positions:
    """Where the real steps of one modality stand: index 0 is the first real step of each sample."""

    def __init__(self, lengths, batch, steps, front, device):
        t = torch.arange(steps, device=device).expand(batch, steps)
        n = torch.full((batch,), steps, device=device) if lengths is None else lengths
        start = (steps - n if front else torch.zeros_like(n))[:, None]
        self.start = start
        self.real = (t >= start) & (t < start + n[:, None])
        self.index = torch.where(self.real, t - start, 0)
        self.position = t

    def place(self, by_step: Tensor) -> Tensor:
        """(B, L, ...) counted from the first real step, moved to where that step stands."""
        index = self.index.reshape(self.index.shape + (1,) * (by_step.dim() - 2)).expand_as(by_step)
        return by_step.gather(1, index)


def _decisions(plan, columns, kind, at, steps, features):
    """Flags (B, L or 1, F or 1) of what a step zeroes or moves, and (B, L) where each position takes from."""
    if kind == MASK_STEPS:
        masked = at.place(unpack_bits(plan[:, columns["masked_steps"]], steps)) & at.real
        return masked[:, :, None], None
    if kind == MASK_FEATURES:
        masked = unpack_bits(plan[:, columns["masked_features"]], features)
        return masked[:, None, :] & at.real[:, :, None], None
    order = at.place(plan[:, columns["order"]].long()) + at.start
    moves = at.place(unpack_bits(plan[:, columns["gate"]], steps)) & at.real
    chosen = unpack_bits(plan[:, columns["features"]], features)
    return chosen[:, None, :], torch.where(moves, order, at.position)


def apply(xs, lengths, seed, ids, plan, chains, front, with_noise) -> list[Tensor]:
    """All views and modalities in a flat list: one step after the other, in fp32 or better, rounded once."""
    batch = xs[0].shape[0]
    shapes = [tuple(x.shape[1:]) for x in xs]
    ids = torch.arange(batch, device=plan.device) if ids is None else ids
    places = [_Positions(n, batch, x.shape[1], front, x.device) for n, x in zip(lengths, xs, strict=True)]
    wide = [x.double() if x.dtype == torch.float64 else x.float() for x in xs]
    outs = [[x.clone(memory_format=torch.contiguous_format) for x in wide] for _ in chains.steps_per_view]
    for i, (view, step, modality, kind, columns) in enumerate(
        layout(chains.steps_per_view, chains.rows, shapes)
    ):
        x, at, (steps, features) = outs[view][modality], places[modality], shapes[modality]
        fired = plan[:, columns["fired"]].bool()[:, :, None]
        mean, deviation = chains.amounts[2 * i : 2 * i + 2]
        if kind in (MASK_STEPS, MASK_FEATURES):
            masked, _ = _decisions(plan, columns, kind, at, steps, features)
            new = x.masked_fill(masked, 0)
        elif kind == RESAMPLE:
            chosen, source = _decisions(plan, columns, kind, at, steps, features)
            new = torch.where(chosen, x.gather(1, source[:, :, None].expand_as(x)), x)
        elif with_noise:
            tag = random.stream_tag(view, modality, step, random.NOISE)
            z = random.normals(seed, ids, tag, steps * features).unflatten(1, (steps, features))
            noisy = x + (mean + deviation * at.place(z).float().to(x.dtype))
            new = torch.where(at.real[:, :, None], noisy, x)
        else:
            continue
        outs[view][modality] = torch.where(fired, new, x)
    return [out.to(xs[m].dtype) for view in outs for m, out in enumerate(view)]


def adjoint(grads, lengths, plan, chains, front) -> list[Tensor]:
    """The transposed map of :func:`apply` without its noise, summed over the views."""
    count = len(lengths)
    batch = grads[0].shape[0]
    shapes = [tuple(grad.shape[1:]) for grad in grads[:count]]
    places = [
        _Positions(n, batch, shape[0], front, plan.device) for n, shape in zip(lengths, shapes, strict=True)
    ]
    wide = [grad.double() if grad.dtype == torch.float64 else grad.float() for grad in grads]
    for view, _, modality, kind, columns in reversed(
        list(layout(chains.steps_per_view, chains.rows, shapes))
    ):
        at, (steps, features) = places[modality], shapes[modality]
        grad = wide[view * count + modality]
        fired = plan[:, columns["fired"]].bool()[:, :, None]
        if kind in (MASK_STEPS, MASK_FEATURES):
            masked, _ = _decisions(plan, columns, kind, at, steps, features)
            new = grad.masked_fill(masked, 0)
        elif kind == RESAMPLE:
            chosen, source = _decisions(plan, columns, kind, at, steps, features)
            stay = grad.masked_fill(chosen, 0)
            new = stay.scatter_add(1, source[:, :, None].expand_as(grad), grad.masked_fill(~chosen, 0))
        else:
            continue
        wide[view * count + modality] = torch.where(fired, new, grad)
    views = len(chains.steps_per_view)
    sums = [sum(wide[v * count + m] for v in range(views)) for m in range(count)]
    return [total.to(grads[0].dtype) for total in sums]
