"""Barlow Twins loss, forward and backward in fp32, against lightly's, eager and compiled PyTorch.

lightly is found as a package, or by the path of its ``loss/barlow_twins_loss.py`` in ``MMFAST_LIGHTLY``: that
file is loaded on its own, since the package imports torchvision.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from mmfast.functional import barlow_twins
from mmfast.ops.barlow_twins import reference

SHAPES = [
    (170, 1000),
    (32, 1000),
    (128, 8192),
    (256, 8192),
    (512, 1000),
    (1024, 512),
    (2048, 256),
    (4096, 1024),
]


def lightly_loss():
    path = os.environ.get("MMFAST_LIGHTLY")
    if not path:
        package = importlib.util.find_spec("lightly")
        if package is None:
            return None
        path = Path(package.submodule_search_locations[0]) / "loss/barlow_twins_loss.py"
    spec = importlib.util.spec_from_file_location("lightly_barlow_twins_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BarlowTwinsLoss()


def definition(z_a, z_b, lambd=5e-3, block=1024):
    """(loss, gradients) in fp64, a block of columns of C at a time."""
    z_a, z_b = (z.detach().double().requires_grad_() for z in (z_a, z_b))
    total = 0.0
    for start in range(0, z_a.shape[1], block):
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
        c = a.T @ b[:, start : start + block] / len(a)
        d = c.diagonal(-start)
        loss = (1 - d).square().sum() + lambd * (c.square().sum() - d.square().sum())
        loss.backward()
        total += float(loss.detach())
    return total, z_a.grad, z_b.grad


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_forward_and_backward(shape, race, smoke):
    rows, columns = shape
    if smoke and rows * columns > 200_000:
        pytest.skip("a smoke run takes the small sizes")
    torch.manual_seed(0)
    z_a = torch.randn(rows, columns)
    z_b = (z_a + 0.5 * torch.randn(rows, columns)).requires_grad_()
    z_a.requires_grad_()

    losses = {"lightly": lightly_loss(), "eager": reference}
    if losses["lightly"] is None:
        del losses["lightly"]
    if not smoke:
        torch._dynamo.reset()
        losses["compiled"] = torch.compile(reference, fullgraph=True, dynamic=False)

    def step(loss):
        def run():
            z_a.grad = z_b.grad = None
            value = loss(z_a, z_b)
            value.backward()
            return value

        return run

    truth, grad_a, grad_b = definition(z_a, z_b)
    for name, loss in {**losses, "mmfast": barlow_twins}.items():
        assert float(step(loss)().detach()) == pytest.approx(truth, rel=2e-6), name
        for z, grad in ((z_a, grad_a), (z_b, grad_b)):
            assert float((z.grad - grad).norm() / grad.norm()) < 1e-5, name

    race(
        step(barlow_twins),
        {name: step(loss) for name, loss in losses.items()},
        nbytes=4 * 4 * rows * columns,
        flops=6 * rows * columns * min(rows, columns),
    )
