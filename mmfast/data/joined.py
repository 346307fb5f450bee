"""What several data sets hold, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.data import arguments
from mmfast.data.flat import Flat
from mmfast.data.ragged import Ragged, Strings


def values(datasets: Sequence, modality: str) -> tuple[Flat, Tensor]:
    """The steps of several data sets, and where each sample starts in them; what is in a file stays there."""
    flats = [d._values[modality] for d in datasets]
    if all(flat.memory is not None for flat in flats):
        lengths = torch.cat([d.lengths(modality) for d in datasets])
        return Flat.of(torch.cat([d.flat(modality) for d in datasets])), lengths.cumsum(0) - lengths
    ends = torch.tensor([len(flat) for flat in flats], device="cpu").cumsum(0)
    starts = [d._starts[modality] + end - len(f) for d, f, end in zip(datasets, flats, ends, strict=True)]
    return Flat.concatenate(flats), torch.cat(starts)


def groups(datasets: Sequence) -> dict[str, Strings]:
    """Groups of all; where only some have a kind of them, each sample of the others is its own."""
    kinds = dict.fromkeys(kind for d in datasets for kind in d._groups)
    return {
        kind: Strings.concatenate(
            [
                d._groups[kind] if kind in d._groups else Strings.of(f"sample {i}" for i in d.ids.tolist())
                for d in datasets
            ]
        )
        for kind in kinds
    }


def beside(datasets: Sequence) -> dict[str, Ragged]:
    """Words, transcripts and tokens of all; those that only some have are empty in others."""
    kinds = dict.fromkeys(kind for d in datasets for kind in d._beside)
    return {
        kind: arguments.BESIDE[kind].concatenate(
            [d._beside[kind] if kind in d._beside else arguments.BESIDE[kind].none(len(d)) for d in datasets]
        )
        for kind in kinds
    }
