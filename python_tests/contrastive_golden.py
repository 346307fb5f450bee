"""The rows whose losses are known from elsewhere: directions in the plane, scaled so that they need normalisation."""

import math

import torch

DOUBLE = {"dtype": torch.float64}


def unit(*degrees):
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees], **DOUBLE)


# Scaled unit rows: normalisation has to undo it.
_SIZES = torch.arange(1, 9, **DOUBLE)[:, None]
Q = unit(0, 12, 41, 20, 95, 130, 203, 250) * _SIZES
K = unit(7, 25, 33, 14, 110, 118, 215, 240) / _SIZES
Y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
PAIRS = torch.arange(4).repeat_interleave(2)
IDS = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6])
PAIR_IDS = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
NOT_TWO = torch.arange(8) != 2
WEIGHTS = torch.arange(1, 9, **DOUBLE)
