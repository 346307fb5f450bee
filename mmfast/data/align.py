"""One time axis for all modalities of a sample, where nothing says when a step was."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

STRICT = "strict"
# Frames are gathered for so many cells at a time: 32 MiB of float64.
CELLS = 1 << 22
# A billionth of the duration is no overlap.
BILLION = 10**9


def align(data: MultimodalData, reference: str) -> MultimodalData:
    """The data with as many steps in every modality as a sample has in the ``reference``.

    An approximation for features without times: both are taken to span the whole sample evenly. Step t of n takes
    the frames i of m for which [i/m, (i+1)/m) and [t/n, (t+1)/n) overlap by more than 1e-9, and is their unweighted
    mean, computed in float64. A frame may so count in two steps, and where the reference is the longer one frames are
    repeated. NaN and infinity follow arithmetic: a step that takes one such cell is NaN or infinite there, and its
    neighbours are not.

    A sample that lacks the reference keeps its other modalities as they are, and is counted in the warnings; a
    modality that a sample lacks stays missing.

    Args:
        data: of any lengths.
        reference: a modality, or ``strict``: nothing is changed, and modalities of different lengths are refused.

    Raises:
        UserError: no such modality; ``strict`` and a sample of different lengths.
    """
    if reference == STRICT:
        for split, dataset in data.datasets().items():
            _refuse_unaligned(split, dataset)
        return data
    if reference not in data.modalities:
        raise UserError(
            f"align: the reference must be one of {', '.join(data.modalities)} or {STRICT}, got {reference!r}"
        )
    off = data.count(MultimodalDataset.unaligned)
    if not off:
        return data
    lacking = data.count(lambda dataset: dataset.unaligned() & (dataset.lengths(reference) == 0))
    counts = {
        f"samples aligned to {reference} by position, for want of times (an approximation)": off - lacking,
        f"samples left unaligned, for they lack {reference}": lacking,
    }
    said = [f"{what}: {count}" for what, count in counts.items() if count]
    out = data.each(lambda dataset: _aligned(dataset, reference))
    if any(d.words is not None for d in data.datasets().values()) and all(
        d.words is None for d in out.datasets().values()
    ):
        said.append(f"words are left out: text has the steps of {reference} now")
    return replace(out, warnings=(*data.warnings, *said))


def overlapping(frames: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of steps,) first and last frame that each step takes, for (N,) numbers of ``frames`` and ``steps`` >= 1.

    In whole numbers of 1 / (frames * steps), so that no rounding decides what overlaps.
    """
    n, m = (torch.repeat_interleave(count, steps) for count in (steps, frames))
    t = torch.arange(len(n), device="cpu") - torch.repeat_interleave(steps.cumsum(0) - steps, steps)
    least = n * m // BILLION
    return (t * m + least) // n, ((t + 1) * m - least - 1) // n


def _aligned(dataset: MultimodalDataset, reference: str) -> MultimodalDataset:
    wanted = dataset.lengths(reference)
    values, lengths = {}, {}
    for modality in dataset.modalities:
        own = dataset.lengths(modality)
        values[modality] = dataset.flat(modality)
        lengths[modality] = torch.where((own > 0) & (wanted > 0), wanted, own)
        if not torch.equal(lengths[modality], own):
            values[modality] = _means(values[modality], own, lengths[modality])
    return dataset.with_values(values, lengths)


def _means(flat: Tensor, frames: Tensor, steps: Tensor) -> Tensor:
    """(sum of steps, F) means of (sum of frames, F); samples without either have neither."""
    begins = (frames.cumsum(0) - frames)[frames > 0]
    frames, steps = frames[frames > 0], steps[frames > 0]
    first, last = overlapping(frames, steps)
    begin = torch.repeat_interleave(begins, steps)
    out = torch.empty(len(first), flat.shape[1], dtype=flat.dtype, device="cpu")
    taken = last - first + 1
    # Whole steps of so many frames that a block stays small.
    block = taken.cumsum(0) * max(flat.shape[1], 1) // CELLS
    start = 0
    for count in torch.unique_consecutive(block, return_counts=True)[1].tolist():
        rows = slice(start, start + count)
        start += count
        several = taken[rows]
        step = torch.repeat_interleave(torch.arange(count, device="cpu"), several)
        frame = torch.arange(len(step), device="cpu") - torch.repeat_interleave(
            several.cumsum(0) - several, several
        )
        source = (begin[rows] + first[rows])[step] + frame
        total = torch.zeros(count, flat.shape[1], dtype=torch.float64, device="cpu")
        total.index_add_(0, step, flat[source].double())
        out[rows] = total / several[:, None]
    return out


def _refuse_unaligned(split: str, dataset: MultimodalDataset) -> None:
    off = dataset.unaligned()
    if not off.any():
        return
    i = int(off.nonzero()[0])
    first, *others = (m for m in dataset.modalities if dataset.lengths(m)[i])
    wanted = int(dataset.lengths(first)[i])
    other = next(m for m in others if int(dataset.lengths(m)[i]) != wanted)
    raise UserError(
        f"align: {split}[{i}].{other} must have as many steps as {first} ({wanted}), got "
        f"{int(dataset.lengths(other)[i])} ({dataset.names[i]!r}); --align {first} takes means"
    )
