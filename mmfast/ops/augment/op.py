"""Augmentation of sequences: draw a plan, then apply it to all modalities and views in one pass.

A view is an ordered chain of steps (resample, mask time steps, mask features, Gaussian noise); see
:mod:`mmfast.ops.augment.plan` for how chains and plans are written down and :mod:`mmfast.transforms` for what users
build. Sequences are (B, L, F) per modality with ``lengths`` (B,) real steps, padded in front or at the back;
padding is copied to the output as it is and takes no part in anything.

Draw and apply are pure functions of their arguments: every random word is Philox of (seed, sample id, view,
modality, step of the chain, purpose, coordinate). Apply is affine in x: its tangent is apply of the tangent without
the noise, its gradient the transposed map, and every further derivative is exact, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.augment import reference
from mmfast.ops.augment.plan import Chains, plan_width
from mmfast.ops.native import DTYPE_CODES, call_cuda

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
        chains: see :func:`mmfast.ops.augment.plan.chains`.
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
    """``views[view][modality]``, each dense with the shape and dtype of its modality in ``xs`` (B, L, F).

    Derivatives of all orders and both modes, and ``torch.func`` transforms. A compiled graph with forward-mode
    derivatives or transforms inside is made of the reference: the compiler has no other way to see through an op.
    """
    if (transformed := _transformed()) and torch.compiler.is_compiling():
        outs = reference.apply(xs, lengths, seed, ids, plan, chains, front, True)
    elif transformed or (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
        outs = _call_function(
            _ApplyWithTangents if transformed else _Apply,
            *(chains, front, True, plan, seed, ids, len(xs), *lengths, *xs),
        )
    else:
        outs = torch.ops.mmfast.augment_apply(list(xs), list(lengths), seed, ids, plan, *chains, front, True)
    return [list(outs[v * len(xs) : (v + 1) * len(xs)]) for v in range(len(chains.steps_per_view))]


def _transformed() -> bool:
    """Whether transforms of ``torch.func`` or dual numbers are about, for which gradients are not all there is."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _call_function(function, *arguments):
    """``function.apply``; without them it need not look up its signature, as long as a small call takes."""
    if torch.compiler.is_compiling() or _transformed():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


class _Apply(torch.autograd.Function):
    """As the compiler takes it: without a ``jvp``."""

    @staticmethod
    def forward(chains, front, with_noise, plan, seed, ids, count, *tensors):
        lengths, xs = list(tensors[:count]), list(tensors[count:])
        return tuple(torch.ops.mmfast.augment_apply(xs, lengths, seed, ids, plan, *chains, front, with_noise))

    @staticmethod
    def setup_context(ctx, inputs, output):
        chains, front, _, plan, seed, ids, count, *tensors = inputs
        ctx.settings = chains, front
        ctx.save_for_backward(plan, seed, ids, *tensors[:count])
        ctx.save_for_forward(plan, seed, ids, *tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        plan, seed, ids, *lengths = ctx.saved_tensors
        pulled = _transposed(*ctx.settings, plan, seed, ids, len(lengths), *lengths, *grads)
        return (None,) * (7 + len(lengths)) + pulled


class _ApplyWithTangents(_Apply):
    @staticmethod
    def jvp(ctx, *tangents):
        plan, seed, ids, *lengths = ctx.saved_tensors
        return _linear(*ctx.settings, plan, seed, ids, len(lengths), *lengths, *tangents[7 + len(lengths) :])


class _Adjoint(torch.autograd.Function):
    """The transposed map; its own transpose is apply without the noise."""

    @staticmethod
    def forward(chains, front, plan, seed, ids, count, *tensors):
        lengths, grads = list(tensors[:count]), [grad.contiguous() for grad in tensors[count:]]
        return tuple(torch.ops.mmfast.augment_adjoint(grads, lengths, seed, ids, plan, *chains, front))

    @staticmethod
    def setup_context(ctx, inputs, output):
        chains, front, plan, seed, ids, count, *tensors = inputs
        ctx.settings = chains, front
        ctx.save_for_backward(plan, seed, ids, *tensors[:count])
        ctx.save_for_forward(plan, seed, ids, *tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        plan, seed, ids, *lengths = ctx.saved_tensors
        outs = _linear(*ctx.settings, plan, seed, ids, len(lengths), *lengths, *grads)
        return (None,) * (6 + len(lengths)) + outs

    @staticmethod
    def jvp(ctx, *tangents):
        plan, seed, ids, *lengths = ctx.saved_tensors
        return _transposed(
            *ctx.settings, plan, seed, ids, len(lengths), *lengths, *tangents[6 + len(lengths) :]
        )


def _linear(chains, front, *rest):
    """Apply without the noise."""
    return _ApplyWithTangents.apply(chains, front, False, *rest)


def _transposed(*arguments):
    # What is compiled has no second derivative, and the compiler would pass a context to this forward.
    return (
        _Adjoint.forward(*arguments)
        if torch.compiler.is_compiling()
        else _call_function(_Adjoint, *arguments)
    )


def _over_batch(function):
    """A rule for ``torch.vmap``: the function of one entry of the mapped dimension after the other."""

    def entry(argument, dim, i):
        if all(d is None for d in tree_leaves(dim)):
            return argument
        if isinstance(dim, int):
            return argument.select(dim, i)
        return [entry(*each, i) for each in zip(argument, dim, strict=True)]

    def rule(info, in_dims, *arguments):
        results = [function(*entry(arguments, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        kind, count = type(results[0]), len(results[0])
        return kind(torch.stack(parts) for parts in zip(*results, strict=True)), kind([0] * count)

    return rule


for _function in (_ApplyWithTangents, _Adjoint):
    _function.vmap = staticmethod(_over_batch(_function.apply))
for _name in ("augment_draw", "augment_apply", "augment_adjoint"):
    torch.library.register_vmap(
        f"mmfast::{_name}", _over_batch(getattr(torch.ops.mmfast, _name).default), lib=_library
    )
# What ``is_grads_batched`` and ``vectorize`` map over knows no such rules, only PyTorch's own operations.
_library.impl(
    "augment_apply",
    lambda xs, lengths, seed, ids, plan, steps_per_view, rows, amounts, front, with_noise: reference.apply(
        xs, lengths, seed, ids, plan, Chains(steps_per_view, rows, amounts), front, with_noise
    ),
    "Batched",
)
_library.impl(
    "augment_adjoint",
    lambda grads, lengths, seed, ids, plan, steps_per_view, rows, amounts, front: reference.adjoint(
        grads, lengths, plan, Chains(steps_per_view, rows, amounts), front
    ),
    "Batched",
)


@torch.library.register_fake("mmfast::augment_draw", lib=_library)
def _(seed, ids, lengths, steps_per_view, rows, amounts, batch, shapes):
    _check_devices("augment_draw", "seed", seed.device, ids, lengths)
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    return seed.new_empty((batch, plan_width(steps_per_view, rows, pairs)), dtype=torch.int32)


@torch.library.register_fake("mmfast::augment_apply", lib=_library)
def _(xs, lengths, seed, ids, plan, steps_per_view, rows, amounts, front, with_noise):
    _check_devices("augment_apply", "values", xs[0].device, ids, lengths, seed, plan, xs)
    return [x.new_empty(x.shape) for _ in steps_per_view for x in xs]


@torch.library.register_fake("mmfast::augment_adjoint", lib=_library)
def _(grads, lengths, seed, ids, plan, steps_per_view, rows, amounts, front):
    _check_devices("augment_adjoint", "gradients", grads[0].device, ids, lengths, seed, plan, grads)
    return [grad.new_empty(grad.shape) for grad in grads[: len(lengths)]]


# Of csrc/cuda/kernels.h: kLongestChain, kMostCells.
_LONGEST_CHAIN, _MOST_CELLS = 64, 2**31 - 1 - 4096


def _triton():
    """The Triton kernels: imported when they are first used, for the import of triton takes its time."""
    from mmfast.triton import augment

    return augment


def _check_devices(op, source, device, ids, lengths, seed=None, plan=None, values=()):
    """Kernels take addresses: one that belongs to another device must not reach them."""
    for i, tensor in enumerate((ids, seed, plan, *lengths, *values)):
        if tensor is not None and tensor.device != device:
            names = ["ids", "seed", "plan", *(f"lengths of modality {m}" for m in range(len(lengths)))]
            names += [f"{source} of modality {m}" for m in range(len(values))]
            raise UserError(f"{op}: {names[i]} must be on {device} like {source}, got {tensor.device}")


class LengthsError(UserError):
    """Lengths out of range; ops know their modalities by number, callers may know a name."""

    def __init__(self, op: str, modality: int, steps: int, got: int, name: str | None = None):
        super().__init__(
            f"{op}: {name or f'lengths of modality {modality}'} must be in [0, {steps}], got {got}"
        )
        self.modality, self.steps, self.got = modality, steps, got


def _check_lengths(op, lengths, batch, shapes):
    """Lengths decide what memory is touched: they are checked where the data are, not where they are traced."""
    for modality, (length, (steps, _)) in enumerate(zip(lengths, shapes, strict=True)):
        if length is None or batch == 0:
            continue
        if length.shape != (batch,) or length.dtype != torch.int64:
            raise ValueError(
                f"{op}: lengths of modality {modality} must be int64 of shape ({batch},), "
                f"got {str(length.dtype).removeprefix('torch.')} of shape {tuple(length.shape)}"
            )
        if length.device.type == "cpu":
            low, high = map(int, length.aminmax())
            if low < 0 or high > steps:
                raise LengthsError(op, modality, steps, low if low < 0 else high)


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
    _check_devices("augment_draw", "seed", seed.device, ids, lengths)
    _check_lengths("augment_draw", lengths, batch, shapes)
    backend = backends.choose("augment_draw", seed.device)
    if backend == "reference":
        return reference.draw(seed, ids, lengths, chains, batch, shapes)
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
    _check_devices("augment_apply", "values", device, ids, lengths, seed, plan, xs)
    _check_lengths("augment_apply", lengths, batch, shapes)
    backend = backends.choose("augment_apply", device)
    if backend == "reference":
        return reference.apply(xs, lengths, seed, ids, plan, chains, front, with_noise)
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
    _check_devices("augment_adjoint", "gradients", device, ids, lengths, seed, plan, grads)
    _check_lengths("augment_adjoint", lengths, batch, shapes)
    backend = backends.choose("augment_apply", device)
    if backend == "reference":
        return reference.adjoint(grads, lengths, plan, chains, front)
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
