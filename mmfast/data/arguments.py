"""What data sets are made from, checked and converted: each function returns its argument as it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mmfast.data.ragged import Ragged, Strings, Tokens, Words
from mmfast.errors import UserError


def float32(value, name: str, ndim: int) -> Tensor:
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "fiu":
            raise TypeError(f"MultimodalDataset: {name} must hold numbers, got dtype {value.dtype}")
        with np.errstate(over="ignore", invalid="ignore"):
            value = torch.from_numpy(np.require(value, np.float32, ["C", "W"]))
    if value.ndim != ndim:
        shape = "(n, F)" if ndim == 2 else "(N, L, F)"
        raise UserError(f"MultimodalDataset: {name} must be {shape}, got shape {tuple(value.shape)}")
    # A meta tensor stands for values that are yet to come.
    return value if value.is_meta else value.detach().to("cpu", torch.float32)


def integers(value, name: str, size: int | None) -> Tensor:
    value = np.asarray(value)
    if value.ndim != 1 or (value.size and value.dtype.kind not in "iu") or size not in (None, len(value)):
        wanted = "(N,)" if size is None else f"({size},)"
        raise UserError(
            f"MultimodalDataset: {name} must be {wanted} integers, got {value.dtype} of shape {value.shape}"
        )
    return torch.from_numpy(value.astype(np.int64))


def lengths(lengths, modality: str, size: int | None) -> Tensor:
    if modality not in lengths:
        raise UserError(
            f"MultimodalDataset: lengths must name {modality!r} as values do, got {list(lengths)}"
        )
    count = integers(lengths[modality], f"lengths[{modality!r}]", size)
    if (count < 0).any():
        i = int(count.argmin())
        raise UserError(
            f"MultimodalDataset: lengths[{modality!r}][{i}] must be 0 or more, got {int(count[i])}"
        )
    return count


def named(names: Sequence[str] | None, i: int) -> str:
    return f" of sample {str(names[i])!r}" if names is not None and i < len(names) else ""


def strings(value: Sequence, name: str, size: int) -> Strings:
    if len(value) != size:
        raise UserError(f"MultimodalDataset: {name} must be {size} strings, one per sample, got {len(value)}")
    return value if isinstance(value, Strings) else Strings.of(value)


def groups(value, size: int) -> dict[str, Strings]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {"group": strings(value, "groups", size)}
    for kind in value:
        if not isinstance(kind, str) or not kind:
            raise UserError(f"MultimodalDataset: groups must have kinds with names, got {kind!r}")
    return {kind: strings(names, f"groups[{kind!r}]", size) for kind, names in value.items()}


# What may be said of samples beside their values -> how it is kept.
BESIDE: dict[str, type[Ragged]] = {"words": Words, "transcripts": Strings, "tokens": Tokens}


def beside(value: Mapping, size: int) -> dict[str, Ragged]:
    """What is given of each kind, an item per sample."""
    found = {}
    for kind, items in value.items():
        if kind not in BESIDE:
            raise TypeError(f"MultimodalDataset: unknown argument {kind!r}, known are {list(BESIDE)}")
        if items is None:
            continue
        if len(items) != size:
            raise UserError(
                f"MultimodalDataset: {kind} must be {size} items, one per sample, got {len(items)}"
            )
        found[kind] = items if isinstance(items, BESIDE[kind]) else BESIDE[kind].of(items)
    return found


def ids(ids, size: int | None) -> Tensor:
    ids = torch.arange(size, device="cpu") if ids is None else integers(ids, "ids", size)
    if (twice := repeated(ids)) is not None:
        raise UserError(f"MultimodalDataset: ids must be unique, got {twice} twice")
    return ids


def repeated(ids: Tensor) -> int | None:
    if (ids[1:] > ids[:-1]).all():
        return None
    unique, counts = torch.unique(ids, return_counts=True)
    return None if len(unique) == len(ids) else int(unique[counts.argmax()])
