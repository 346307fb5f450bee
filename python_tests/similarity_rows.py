"""The rows of which the golden values of similarity losses are, and comparisons with other libraries' losses."""

import math

import pytest
import torch

DOUBLE = {"dtype": torch.float64}


def unit(*degrees):
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees], **DOUBLE)


Z, KEYS = unit(0, 12, 41, 20, 95, 130, 203, 250), unit(7, 25, 33, 14, 110, 118, 215, 240)
_SIZES = torch.arange(1, 9, **DOUBLE)[:, None]
# Scaled unit rows: normalisation has to undo it.
Q, K = Z * _SIZES, KEYS / _SIZES
Y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
PAIRS = torch.arange(4).repeat_interleave(2)
IDS = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6])
PAIR_IDS = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
NOT_TWO = torch.arange(8) != 2
WEIGHTS = torch.arange(1, 9, **DOUBLE)
X = torch.tensor(
    [[1, 2, 0], [0.3, 1.1, 1.2], [2.1, 0.7, 0.4], [1.2, -0.5, 3.1], [2.4, 1.9, 1.3], [-0.2, 2.8, 0.9],
     [0.6, 1.4, 1], [3.2, -0.1, 2.2]], **DOUBLE,
)  # fmt: skip


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def gradients(loss, *inputs, upstream=-2.0):
    """(loss, gradient by each input): detached, of copies."""
    copies = [x.clone().requires_grad_() for x in inputs]
    value = loss(*copies)
    grads = torch.autograd.grad(value * upstream, copies, allow_unused=True)
    return value.detach(), *(
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, copies, strict=True)
    )


def same(ours, truth, *inputs, tolerance=1e-10):
    """Values and gradients of two functions of the inputs."""
    found, expected = gradients(ours, *inputs), gradients(truth, *inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=tolerance, atol=tolerance)


def golden(loss, value, norms, *inputs):
    found = gradients(loss, *inputs, upstream=1.0)
    assert float(found[0]) == pytest.approx(value, abs=1.1e-6)
    for grad, norm in zip(found[1:], norms, strict=False):
        if norm is not None:
            assert float(grad.norm()) == pytest.approx(norm, abs=1.1e-6)
