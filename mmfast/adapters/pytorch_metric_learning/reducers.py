"""What is made of the losses of pairs or rows. Objects of pytorch-metric-learning itself do as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.errors import UserError


class AvgNonZeroReducer:
    """The mean of those above 0."""


class MeanReducer:
    """The mean."""


class SumReducer:
    """The sum."""


class DoNothingReducer:
    """All losses, in pytorch-metric-learning's dictionary: losses, indices, reduction_type."""


NAMES = tuple(x.__name__ for x in (AvgNonZeroReducer, MeanReducer, SumReducer, DoNothingReducer))


def check_reducer(op: str, reducer: Any, default: str) -> str:
    """The name of the reducer."""
    name = default if reducer is None else type(reducer).__name__
    if name not in NAMES:
        raise UserError(f"{op}: reducer must be one of {', '.join(NAMES)}, got {name}")
    return name


def reduced(name: str, losses: Tensor, count: Tensor) -> Tensor:
    """Of losses that stand for ``count`` equal ones each; 0 of none."""
    if name == "AvgNonZeroReducer":
        count = count * (losses > 0)
    total = (losses * count).sum()
    if name == "SumReducer":
        return total
    number = count.sum()
    return total / torch.where(number > 0, number, 1)
