"""True lengths: which steps of a padded batch are data, and the checks that go with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfast.errors import UserError

PADDINGS = ("back", "front")


def real_steps(lengths: Tensor, steps: int) -> Tensor:
    """(B,) lengths -> (B, steps) bool, True at the steps of a back-padded batch that are data."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """``x`` (B, L, F), back-padded, with zeros at padded steps, whatever they held (NaN included)."""
    return x.masked_fill(~real_steps(lengths, x.shape[1])[..., None], 0)


def take_steps(x: Tensor, index: Tensor) -> Tensor:
    """``y[b, t] = x[b, index[b, t]]`` for ``x`` (B, L, F) and ``index`` (B, T).

    Whole rows are copied both ways: several times faster than ``gather`` and its backward.
    """
    row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (row + index).flatten()).view(*index.shape, x.shape[2])


def back_padded(x: Tensor, lengths: Tensor, steps: int, padding: str) -> Tensor:
    """``x`` (B, L, F) with its real steps moved to the front, zeros behind them, and ``steps`` steps in all.

    ``steps`` must be at least the greatest length; it may be more or less than L.
    """
    have = x.shape[1]
    if padding == "front" and have > 0:
        source = torch.arange(min(steps, have), device=x.device) + (have - lengths)[:, None]
        x = take_steps(x, source.clamp(max=have - 1))
    x = x[:, :steps]
    if x.shape[1] < steps:
        x = torch.nn.functional.pad(x, (0, 0, 0, steps - x.shape[1]))
    return zero_padding(x, lengths)


def check_values(
    op: str,
    features: Mapping[str, int],
    values: Mapping[str, Tensor],
    lengths: Mapping[str, Tensor],
    padding: str,
) -> None:
    """Names, ranks, sizes and types; looks at no element, so it costs nothing under ``torch.compile``."""
    for argument, given in (("values", values), ("lengths", lengths)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{op}: {argument} must be a dict modality -> tensor, got {type(given).__name__}")
        if given.keys() != features.keys():
            wanted, got = ", ".join(features), ", ".join(map(str, given)) or "none"
            raise UserError(f"{op}: {argument} must have the modalities {wanted}, got {got}")
        for name, x in given.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{op}: {argument} of {name} must be a tensor, got {type(x).__name__}")
    if padding not in PADDINGS:
        raise UserError(f"{op}: padding must be 'back' or 'front', got {padding!r}")

    first = next(iter(features))
    for name, size in features.items():
        x, n = values[name], lengths[name]
        if x.dim() != 3 or x.shape[2] != size:
            raise UserError(
                f"{op}: values of {name} must have the shape (B, L, {size}), got {tuple(x.shape)}"
            )
        batch, dtype = len(values[first]), values[first].dtype
        if len(x) != batch:
            raise UserError(
                f"{op}: values of {name} must have the batch size of {first}, {batch}, got {len(x)}"
            )
        if x.dtype != dtype:
            raise TypeError(f"{op}: values of {name} must have the dtype of {first}, {dtype}, got {x.dtype}")
        if n.shape != (batch,):
            raise UserError(f"{op}: lengths of {name} must have the shape ({batch},), got {tuple(n.shape)}")
        if n.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: lengths of {name} must be int64 or int32, got {n.dtype}")
    if batch == 0:
        raise UserError(f"{op}: the batch is empty; it must hold at least one sample")


def check_lengths(
    op: str, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor], aligned: bool
) -> dict[str, int]:
    """The rules that need the lengths themselves; returns each modality's greatest length (one device read).

    A length is in [0, L]. Where ``aligned``, the lengths of one sample are equal across the modalities that it has
    (length 0 = it has not that modality), because cross-modal residuals and the concatenation on features need one
    time axis.
    """
    names = list(values)
    n = torch.stack([lengths[name].to(torch.int64) for name in names]).cpu()
    for name, row in zip(names, n, strict=True):
        limit = values[name].shape[1]
        wrong = (row < 0) | (row > limit)
        if wrong.any():
            sample = int(wrong.nonzero()[0])
            got = f"{int(row[sample])} for sample {sample}"
            raise UserError(f"{op}: lengths of {name} must lie in [0, {limit}], got {got}")
    unequal = (n != 0) & (n != n.amax(dim=0))
    if aligned and unequal.any():
        sample = int(unequal.any(dim=0).nonzero()[0])
        got = ", ".join(f"{name} {int(k)}" for name, k in zip(names, n[:, sample], strict=True))
        raise UserError(
            f"{op}: a sample must have one length for all its modalities (0 where one is missing), "
            f"got {got} for sample {sample}; align the modalities first"
        )
    return dict(zip(names, n.amax(dim=1).tolist(), strict=True))
