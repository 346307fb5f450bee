"""Batches larger than memory holds: gradients of a loss that looks at all rows at once, by parts of them.

A loss such as Barlow Twins is not a sum over samples, so adding up its gradients over micro-batches gives those of
another loss. Only the loss itself must see all rows, though, and embeddings are small beside the activations behind
them: embed each micro-batch without a graph, take the loss of all embeddings and its gradient with respect to them,
then embed each micro-batch again with a graph and feed it its slice (GradCache: Gao et al. 2021, arXiv 2101.06983).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmfast.errors import UserError

Batch = TypeVar("Batch")
Embed = Callable[[Batch], "Tensor | Sequence[Tensor]"]


def backward_in_micro_batches(
    loss: Callable[..., Tensor],
    embed: Embed,
    micro_batches: Iterable[Batch],
    *,
    scale: float | Tensor = 1.0,
    model: nn.Module | None = None,
) -> Tensor:
    """``loss(*embed(batch)).backward()`` for the concatenation of ``micro_batches``, at the memory of one of them.

    >>> def embed(batch):
    ...     return model(batch.first), model(batch.second)
    >>> optimiser.zero_grad()
    >>> value = backward_in_micro_batches(BarlowTwinsLoss(), embed, [batch_0, batch_1])
    >>> optimiser.step()

    Gradients equal those of the whole batch up to rounding, and are added to ``.grad`` as ``backward`` adds them.
    The price is a second forward pass of the encoder: about a third more time where backward costs two forwards.

    Dropout and augmentation draw the same in both passes, since the states of torch's default generators (of the
    CPU and of every CUDA device) are put back before the second one; afterwards they are what one pass leaves.
    ``embed`` must take nothing random from elsewhere. Autocast goes on as the caller has it for ``embed`` and
    ``loss``, and is off for the backward passes, as PyTorch advises.

    Layers that look at other samples are not those of the whole batch: batch norm in the encoder or projector
    normalises each micro-batch by itself, as it does under plain accumulation, and its running statistics move
    twice, once in each pass. Layer norm and group norm are exact; so is batch norm in ``eval()``. The
    standardisation inside :class:`~mmfast.BarlowTwinsLoss` is always that of all rows.

    Args:
        loss: of the concatenated views, ``loss(*views)``, to a scalar. Parameters of its own get gradients too.
        embed: makes of a micro-batch the embeddings of its views: tensors of one number of rows, or one tensor.
        micro_batches: of any type and any, also unequal, sizes. An iterator is read to its end first.
        scale: factor of the gradients, not of the result; with a GradScaler ``scaler.scale(torch.ones((),
            device=...))``, which waits for nothing.
        model: the DistributedDataParallel that ``embed`` calls: gradients are then exchanged once, in the last
            micro-batch, instead of in each. All ranks must have as many micro-batches as each other. A loss of all
            processes, as BarlowTwinsLoss is by default, sees the rows of all micro-batches of all of them.

    Returns:
        The loss, a detached scalar, without ``scale``.

    Raises:
        ValueError: no micro-batches; embeddings that are no tensors, have other numbers of rows, of views or other
            trailing shapes, dtypes or devices than those before, or change shape from the first pass to the second;
            embeddings of which none requires a gradient; a loss that is not a scalar.
    """
    micro_batches = list(micro_batches)
    if not micro_batches:
        raise UserError("backward_in_micro_batches: micro_batches must hold at least 1, got 0")
    views, shapes, states = _first_pass(embed, micro_batches)
    with torch.enable_grad():
        value = loss(*views)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"backward_in_micro_batches: loss must return a scalar tensor, got {got}")
        scaled = value * scale
    with _without_autocast():
        scaled.backward()
    value = value.detach()
    gradients = [z.grad for z in views]
    del views
    after_one_pass = _random_states()
    start, last = 0, len(micro_batches) - 1
    try:
        for index, (batch, expected, state) in enumerate(zip(micro_batches, shapes, states, strict=True)):
            rows = slice(start, start := start + expected[0][0])
            parts = [None if g is None else g[rows] for g in gradients]
            _set_random_states(state)
            with contextlib.nullcontext() if index == last else _no_sync(model):
                _second_pass(embed, batch, parts, expected, index)
    finally:
        _set_random_states(after_one_pass)
    return value


def _first_pass(embed: Embed, micro_batches: list) -> tuple[list[Tensor], list[list[torch.Size]], list]:
    """Views of all rows, as leaves; per micro-batch the shapes of its views, and the random states before it."""
    parts, states = [], []
    with torch.no_grad():
        for index, batch in enumerate(micro_batches):
            states.append(_random_states())
            parts.append(_embeddings(embed(batch), index))
            _check_like_the_first(parts, index)
        views = [torch.cat(view).requires_grad_() for view in zip(*parts, strict=True)]
    return views, [[z.shape for z in part] for part in parts], states


def _second_pass(
    embed: Embed, batch: Batch, gradients: list[Tensor | None], expected: list[torch.Size], index: int
) -> None:
    """Backward of one micro-batch. A function, so that nothing of its graph outlives it."""
    with torch.enable_grad():
        embeddings = _embeddings(embed(batch), index)
    shapes = [z.shape for z in embeddings]
    if shapes != expected:
        raise UserError(
            f"backward_in_micro_batches: embed must return in the second pass what it did in the first, "
            f"{_told(expected)}, got {_told(shapes)} for micro-batch {index}"
        )
    pairs = zip(embeddings, gradients, strict=True)
    roots = [(z, g) for z, g in pairs if z.requires_grad and g is not None]
    if not roots:
        raise UserError(
            "backward_in_micro_batches: embeddings must require a gradient that the loss gives them, "
            f"got none in micro-batch {index}"
        )
    with _without_autocast():
        torch.autograd.backward(*zip(*roots, strict=True))


def _embeddings(returned, index: int) -> Sequence[Tensor]:
    """What embed returned, as views (rows, ...)."""
    views = (returned,) if isinstance(returned, Tensor) else returned
    if not isinstance(views, (tuple, list)) or not views:
        got = f"an empty {type(views).__name__}" if isinstance(views, (tuple, list)) else type(views).__name__
        raise TypeError(
            f"backward_in_micro_batches: embed must return a tensor for each view, got {got} for micro-batch {index}"
        )
    for z in views:
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() == 0:
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(
                "backward_in_micro_batches: embed must return floating-point tensors (rows, ...), "
                f"got {got} for micro-batch {index}"
            )
    if len({len(z) for z in views}) > 1:
        raise UserError(
            "backward_in_micro_batches: views must have one number of rows, "
            f"got {_told(z.shape for z in views)} for micro-batch {index}"
        )
    return views


def _check_like_the_first(parts: list[Sequence[Tensor]], index: int) -> None:
    first, views = parts[0], parts[-1]
    if len(views) != len(first):
        raise UserError(
            f"backward_in_micro_batches: each micro-batch must have as many views as the first ({len(first)}), "
            f"got {len(views)} for micro-batch {index}"
        )
    if any(z.shape[1:] != other.shape[1:] for z, other in zip(views, first, strict=True)):
        raise UserError(
            "backward_in_micro_batches: embeddings must differ from those of the first micro-batch "
            f"({_told(z.shape for z in first)}) in their rows only, "
            f"got {_told(z.shape for z in views)} for micro-batch {index}"
        )


def _told(shapes: Iterable[torch.Size]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)


def _no_sync(model: nn.Module | None):
    """DistributedDataParallel's; a model without it has nothing to synchronise."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


@contextlib.contextmanager
def _without_autocast():
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _random_states() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_states(states: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
