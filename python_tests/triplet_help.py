"""Rows and labels of the golden values of triplet losses."""

import math

import torch

DOUBLE = {"dtype": torch.float64}
Z = torch.tensor(
    [[f(math.radians(a)) for f in (math.cos, math.sin)] for a in (0, 12, 41, 20, 95, 130, 203, 250)], **DOUBLE
)
X = torch.tensor(
    [
        [1, 2, 0], [0.3, 1.1, 1.2], [2.1, 0.7, 0.4], [1.2, -0.5, 3.1],
        [2.4, 1.9, 1.3], [-0.2, 2.8, 0.9], [0.6, 1.4, 1], [3.2, -0.1, 2.2],
    ],
    **DOUBLE,
)  # fmt: skip
Y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
