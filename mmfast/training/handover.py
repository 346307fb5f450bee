"""Weights from one phase to the next, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.training.objectives import PARTS


class Handover(NamedTuple):
    """How much was loaded: numbers of tensors and of parameters in them."""

    tensors: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors ({self.parameters:,} parameters)"


def load_part(module: nn.Module, state: Mapping[str, Tensor], part: str, source: str) -> Handover:
    """Copy the tensors ``<part>.*`` of a state dict into ``module``; every one must be there and fit.

    Nothing is loaded unless everything fits. Parts of other names are dropped when a network can have them (see
    :data:`~mmfast.training.objectives.PARTS`) and refused when it cannot.

    Args:
        module: takes the weights, such as the encoder.
        state: a checkpoint's ``state_dict``.
        part: name of the part in the checkpoint, such as ``encoder``.
        source: the checkpoint's name, for the error.

    Returns:
        Numbers of tensors and parameters loaded.

    Raises:
        UserError: names the first tensor that is missing, left over or of another shape.
    """
    for name in state:
        if name.partition(".")[0] not in PARTS:
            raise UserError(f"{source}: tensor {name} belongs to none of {', '.join(PARTS)}")
    prefix = f"{part}."
    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    for name in [*wanted, *(name for name in given if name not in wanted)]:
        there = _shape(given.get(name))
        here = _shape(wanted.get(name))
        if there != here:
            raise UserError(
                f"{source}: its {part} is of another architecture, {prefix}{name} is {there} there and {here} here"
            )
    module.load_state_dict(given, strict=True)
    return Handover(len(given), sum(tensor.numel() for tensor in given.values()))


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
