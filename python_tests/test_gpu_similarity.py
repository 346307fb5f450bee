"""Losses of similarities on a real GPU: those of the CPU, without waiting, and NaN where the CPU refuses."""

import math

import pytest
import torch
from similarity_losses import LOSSES

import mmfast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
EVERY = pytest.mark.parametrize("name", LOSSES)


def data(device, dtype=torch.float32, rows=70, columns=40):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return a.to(device, dtype), (0.5 * a + b).to(device, dtype), (torch.arange(rows) % 5).to(device)


def results(name, a, b, labels):
    row = LOSSES[name]
    loss = row.make().to(a.device)
    views = [x.detach().requires_grad_() for x in (a, b)]
    value = row.call(loss, *views, labels)
    value.backward()
    return loss, [value.detach(), *(x.grad for x in (*views[: row.views], *loss.parameters()))]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_that_of_the_cpu(name, dtype):
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    exact = results(name, *data("cpu", dtype))[1]
    for found, want in zip(results(name, *data("cuda", dtype))[1], exact, strict=True):
        assert (found.cpu().double() - want.double()).norm() <= tolerance * want.double().norm() + 1e-6


@EVERY
def test_nobody_waits_and_runs_are_equal(name):
    given = data("cuda")
    loss, first = results(name, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = results(name, *given)[1]
        if hasattr(loss.last if hasattr(loss, "last") else None, "accuracy"):
            read = loss.last.mean_positive, loss.last.mean_negative, loss.last.accuracy, loss.last.zero_rows
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if hasattr(loss.last if hasattr(loss, "last") else None, "accuracy"):
        other = results(name, *data("cpu"))[0].last
        want = other.mean_positive, other.mean_negative, other.accuracy, other.zero_rows
        torch.testing.assert_close(torch.stack(read).cpu(), torch.stack(want), rtol=1e-3, atol=1e-3)


@EVERY
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_makes_loss_and_gradients_nan(name, wrong):
    a, b, labels = data("cuda")
    a[2, 1] = wrong
    _, (value, grad, *_) = results(name, a, b, labels)
    assert value.isnan() and grad.isnan().any()


def test_backends_that_have_no_kernels_say_so():
    z, _, labels = data("cuda")
    for name in ("cuda", "triton"):
        with mmfast.backend(name), pytest.raises(mmfast.UserError, match=f"{name} backend was asked for"):
            mmfast.SupConLoss()(z, labels)
