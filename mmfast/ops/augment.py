"""Augmentation of sequences: draw a plan, then apply it to all modalities and views in one pass.

A view is an ordered chain of steps (resample, mask time steps, mask features, Gaussian noise); see
:mod:`mmfast.ops.plan` for how chains and plans are written down and :mod:`mmfast.transforms` for what users
build. Sequences are (B, L, F) per modality with ``lengths`` (B,) real steps, padded in front or at the back;
padding is copied to the output as it is and takes no part in anything.

Draw and apply are pure functions of their arguments: every random word is Philox of (seed, sample id, view,
modality, step of the chain, purpose, coordinate). Apply is affine in x, so its gradient is the transposed map and
every further derivative is exact, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops import random
from mmfast.ops.native import DTYPE_CODES, call_cuda
from mmfast.ops.plan import (
    APPLY_NAMES,
    EXACT_COUNT,
    MASK_FEATURES,
    MASK_STEPS,
    RESAMPLE,
    SHARED_ORDER,
    Chains,
    layout,
    pack_bits,
    plan_width,
    unpack_bits,
)

_library = torch.library.Library("mmfast", "FRAGMENT")
_library.define(
    "augment_draw(Tensor seed, Tensor? ids, Tensor?[] lengths, int[] steps_per_view, int[] rows, "
    "float[] amounts, SymInt batch, SymInt[] shapes) -> Tensor"
)
_library.define(
    "augment_apply(Tensor[] xs, Tensor?[] lengths, Tensor seed, Tensor? ids, Tensor plan, "
    "int[] steps_per_view, int[] rows, float[] amounts, bool front, bool with_noise) -> Tensor[]"
)
_library.define(
    "augment_adjoint(Tensor[] grads, Tensor?[] lengths, Tensor seed, Tensor? ids, Tensor plan, "
    "int[] steps_per_view, int[] rows, float[] amounts, bool front) -> Tensor[]"
)


def augment_draw(
    seed: Tensor,
    ids: Tensor | None,
    lengths: Sequence[Tensor | None],
    chains: Chains,
    batch: int,
    shapes: Sequence[tuple[int, int]],
) -> Tensor:
    """Words of the plan: int32 (batch, width).

    Args:
        seed: int64, one element.
        ids: int64 (batch,) sample ids; None: the position in the batch.
        lengths: per modality int64 (batch,), or None: all steps are real.
        chains: see :func:`mmfast.ops.plan.chains`.
        shapes: (L, F) per modality.
    """
    flat = [size for shape in shapes for size in shape]
    return torch.ops.mmfast.augment_draw(seed, ids, list(lengths), *chains, batch, flat)


def augment_apply(
    xs: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    seed: Tensor,
    ids: Tensor | None,
    plan: Tensor,
    chains: Chains,
    front: bool,
) -> list[list[Tensor]]:
    """``views[view][modality]``, each dense with the shape and dtype of its modality in ``xs`` (B, L, F)."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        outs = _Apply.apply(chains, front, True, plan, seed, ids, len(xs), *lengths, *xs)
    else:
        outs = torch.ops.mmfast.augment_apply(list(xs), list(lengths), seed, ids, plan, *chains, front, True)
    return [list(outs[v * len(xs) : (v + 1) * len(xs)]) for v in range(len(chains.steps_per_view))]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chains, front, with_noise, plan, seed, ids, count, *tensors):
        lengths, xs = tensors[:count], tensors[count:]
        ctx.save_for_backward(plan, seed, ids, *lengths)
        ctx.settings = chains, front
        return tuple(
            torch.ops.mmfast.augment_apply(
                list(xs), list(lengths), seed, ids, plan, *chains, front, with_noise
            )
        )

    @staticmethod
    def backward(ctx, *grads):
        plan, seed, ids, *lengths = ctx.saved_tensors
        pulled = _Adjoint.apply(*ctx.settings, plan, seed, ids, len(lengths), *lengths, *grads)
        return (None,) * (7 + len(lengths)) + pulled


class _Adjoint(torch.autograd.Function):
    """The transposed map; its own transpose is apply without the noise."""

    @staticmethod
    def forward(ctx, chains, front, plan, seed, ids, count, *tensors):
        lengths, grads = tensors[:count], tensors[count:]
        ctx.save_for_backward(plan, seed, ids, *lengths)
        ctx.settings = chains, front
        grads = [grad.contiguous() for grad in grads]
        return tuple(torch.ops.mmfast.augment_adjoint(grads, list(lengths), seed, ids, plan, *chains, front))

    @staticmethod
    def backward(ctx, *grads):
        plan, seed, ids, *lengths = ctx.saved_tensors
        outs = _Apply.apply(
            ctx.settings[0], ctx.settings[1], False, plan, seed, ids, len(lengths), *lengths, *grads
        )
        return (None,) * (6 + len(lengths)) + outs


@torch.library.register_fake("mmfast::augment_draw", lib=_library)
def _(seed, ids, lengths, steps_per_view, rows, amounts, batch, shapes):
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    return seed.new_empty((batch, plan_width(steps_per_view, rows, pairs)), dtype=torch.int32)


@torch.library.register_fake("mmfast::augment_apply", lib=_library)
def _(xs, lengths, seed, ids, plan, steps_per_view, rows, amounts, front, with_noise):
    return [x.new_empty(x.shape) for _ in steps_per_view for x in xs]


@torch.library.register_fake("mmfast::augment_adjoint", lib=_library)
def _(grads, lengths, seed, ids, plan, steps_per_view, rows, amounts, front):
    return [grad.new_empty(grad.shape) for grad in grads[: len(lengths)]]


# Of csrc/cuda/kernels.h: kLongestChain, kMostCells.
_LONGEST_CHAIN, _MOST_CELLS = 64, 2**31 - 1 - 4096


def _triton():
    """The Triton kernels: imported when they are first used, for the import of triton takes its time."""
    from mmfast.triton import augment

    return augment


def _check_lengths(lengths, batch, shapes):
    """Lengths decide what memory is touched: they are checked where the data are, not where they are traced."""
    for modality, (length, (steps, _)) in enumerate(zip(lengths, shapes, strict=True)):
        if length is None or batch == 0:
            continue
        if length.shape != (batch,) or length.dtype != torch.int64:
            raise ValueError(
                f"augment: lengths of modality {modality} must be int64 of shape ({batch},), "
                f"got {str(length.dtype).removeprefix('torch.')} of shape {tuple(length.shape)}"
            )
        if length.device.type == "cpu":
            low, high = int(length.min()), int(length.max())
            if low < 0 or high > steps:
                raise ValueError(
                    f"augment: lengths of modality {modality} must be in [0, {steps}], "
                    f"got {low if low < 0 else high}"
                )


def _arguments(batch, lengths, chains, shapes, front, seed, ids, width):
    """The call as ``mmfast._C`` takes it, and tensors that have to live as long: it holds addresses only."""
    rows = []
    keep = [None if tensor is None else tensor.contiguous() for tensor in (ids, *lengths)]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in keep]
    for (steps, features), length in zip(shapes, addresses[1:], strict=True):
        rows += [steps, features, int(front), length]
    arguments = backends._C.AugmentArguments(batch, *chains, rows, seed.data_ptr(), addresses[0], width)
    return arguments, keep


def _call(backend, kernel, device, *arguments):
    """A kernel of ``mmfast._C``, on the CPU or on a CUDA device."""
    if backend == "cuda":
        call_cuda(f"augment_{kernel}", getattr(backends._C, f"cuda_augment_{kernel}"), device, *arguments)
    else:
        getattr(backends._C, f"augment_{kernel}")(*arguments, torch.get_num_threads())


def _check_cuda_limits(chains, shapes):
    if (longest := max(chains.steps_per_view, default=0)) > _LONGEST_CHAIN:
        raise UserError(
            f"augment: a chain must have at most {_LONGEST_CHAIN} steps on the cuda backend, got {longest}"
        )
    for modality, (steps, features) in enumerate(shapes):
        if steps * features > _MOST_CELLS:
            raise UserError(
                f"augment: modality {modality} must have at most {_MOST_CELLS} elements a sample on the cuda "
                f"backend, got {steps} x {features}"
            )


def _draw(seed, ids, lengths, steps_per_view, rows, amounts, batch, shapes):
    chains = Chains(steps_per_view, rows, amounts)
    shapes = list(zip(shapes[::2], shapes[1::2], strict=True))
    _check_lengths(lengths, batch, shapes)
    backend = backends.choose("augment_draw", seed.device)
    if backend == "reference":
        return draw_reference(seed, ids, lengths, chains, batch, shapes)
    if backend == "triton":
        return _triton().draw(seed, ids, lengths, chains, batch, shapes)
    if backend == "cuda":
        _check_cuda_limits(chains, shapes)
    width = plan_width(steps_per_view, rows, shapes)
    plan = torch.empty((batch, width), dtype=torch.int32, device=seed.device)
    arguments, _alive = _arguments(batch, lengths, chains, shapes, False, seed, ids, width)
    _call(backend, "draw", seed.device, arguments, plan.data_ptr())
    return plan


def _apply(xs, lengths, seed, ids, plan, steps_per_view, rows, amounts, front, with_noise):
    chains = Chains(steps_per_view, rows, amounts)
    batch, device, shapes = xs[0].shape[0], xs[0].device, [tuple(x.shape[1:]) for x in xs]
    _check_lengths(lengths, batch, shapes)
    backend = backends.choose("augment_apply", device)
    if backend == "reference":
        return apply_reference(xs, lengths, seed, ids, plan, chains, front, with_noise)
    if backend == "triton":
        return _triton().apply(xs, lengths, seed, ids, plan, chains, front, with_noise)
    if backend == "cuda":
        _check_cuda_limits(chains, shapes)
    xs = [x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in xs]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=device) for _ in steps_per_view for x in xs]
    plan = plan.contiguous()
    arguments, _alive = _arguments(batch, lengths, chains, shapes, front, seed, ids, plan.shape[1])
    _call(
        backend,
        "apply",
        device,
        arguments,
        plan.data_ptr(),
        DTYPE_CODES[xs[0].dtype],
        [x.data_ptr() for x in xs],
        [stride for x in xs for stride in x.stride()[:2]],
        [out.data_ptr() for out in outs],
        with_noise,
    )
    return outs


def _adjoint(grads, lengths, seed, ids, plan, steps_per_view, rows, amounts, front):
    chains = Chains(steps_per_view, rows, amounts)
    count = len(lengths)
    batch, device, dtype = grads[0].shape[0], grads[0].device, grads[0].dtype
    shapes = [tuple(grad.shape[1:]) for grad in grads[:count]]
    _check_lengths(lengths, batch, shapes)
    backend = backends.choose("augment_apply", device)
    if backend == "reference":
        return adjoint_reference(grads, lengths, plan, chains, front)
    if backend == "triton":
        return _triton().adjoint(grads, lengths, plan, chains, front)
    wide = dtype
    if backend == "cuda":
        _check_cuda_limits(chains, shapes)
        # Sums are kept in memory, and not in a half type.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.empty(grad.shape, dtype=wide, device=device) for grad in grads[:count]]
    plan = plan.contiguous()
    arguments, _alive = _arguments(batch, lengths, chains, shapes, front, seed, None, plan.shape[1])
    _call(
        backend,
        "adjoint",
        device,
        arguments,
        plan.data_ptr(),
        DTYPE_CODES[dtype],
        [grad.data_ptr() for grad in grads],
        [out.data_ptr() for out in outs],
    )
    return [out.to(dtype) for out in outs]


for _device in ("CPU", "CUDA"):
    _library.impl("augment_draw", _draw, _device)
    _library.impl("augment_apply", _apply, _device)
    _library.impl("augment_adjoint", _adjoint, _device)


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


def draw_reference(seed, ids, lengths, chains, batch, shapes) -> Tensor:
    """:func:`augment_draw` in plain PyTorch, on any device."""
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


def apply_reference(xs, lengths, seed, ids, plan, chains, front, with_noise) -> list[Tensor]:
    """:func:`augment_apply` in plain PyTorch: one step after the other, in fp32 or better, rounded once."""
    batch = xs[0].shape[0]
    shapes = [tuple(x.shape[1:]) for x in xs]
    ids = torch.arange(batch, device=plan.device) if ids is None else ids
    places = [_Positions(n, batch, x.shape[1], front, x.device) for n, x in zip(lengths, xs, strict=True)]
    wide = [x.double() if x.dtype == torch.float64 else x.float() for x in xs]
    outs = [[x.clone() for x in wide] for _ in chains.steps_per_view]
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


def adjoint_reference(grads, lengths, plan, chains, front) -> list[Tensor]:
    """The transposed map of :func:`apply_reference` without its noise, summed over the views."""
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
