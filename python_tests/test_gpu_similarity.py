"""Losses of similarities on a real GPU: against the CPU in fp64, without waiting, in graphs and compiled."""

import pytest
import torch
from similarity_losses import LOSSES
from targets import KERNELS, on

import mmfast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TARGETS = [pair for pair in KERNELS if pair[1] == "cuda"] or [("cuda", "cuda")]
on_gpu = pytest.mark.parametrize("target", TARGETS, ids="-".join)
EVERY = pytest.mark.parametrize("name", LOSSES)
# Of which only PyTorch's form serves a GPU.
PLAIN = [name for name in LOSSES if any(word in name for word in ("Triplet", "PKT", "VICReg"))]
ROUNDING = {torch.float32: 3e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def serving(target, name):
    return on(("reference", "cuda") if name in PLAIN else target)


def results(name, a, b, labels):
    row, loss = LOSSES[name], LOSSES[name].make().to(a.device)
    if a.dtype == torch.float64:
        loss.double()
    a, b = (x.detach().requires_grad_() for x in (a, b))
    value = row.call(loss, a, b, labels)
    grads = torch.autograd.grad(2.5 * value, [*(a, b)[: row.views], *loss.parameters()])
    return [x.detach().cpu().double() for x in (value, *grads)]


def data(rows, columns, dtype, device="cuda"):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(2))
    return a.to(device), b.to(device), (torch.arange(rows) % 5).to(device)


@on_gpu
@EVERY
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_loss_and_gradients_against_fp64(target, name, dtype):
    for rows, columns in ((17, 5), (65, 130), (600, 33)):
        given = data(rows, columns, dtype)
        with serving(target, name):
            found = results(name, *given)
        exact = results(name, *(x.cpu().double() if x.is_floating_point() else x.cpu() for x in given))
        for x, y in zip(found, exact, strict=True):
            assert (x - y).norm() <= ROUNDING[dtype] * (y.norm() + 0.1), (rows, columns, x, y)


@on_gpu
@EVERY
def test_repeats_change_no_bit(target, name):
    with serving(target, name):
        first, second = (results(name, *data(300, 64, torch.float32)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@on_gpu
@pytest.mark.parametrize("name", [name for name in LOSSES if "Triplet" not in name])
def test_nothing_waits_and_graphs_replay(target, name):
    row = LOSSES[name]
    a, b, labels = data(128, 64, torch.float32)
    loss, views = row.make().to("cuda"), [x.requires_grad_() for x in (a, b)]

    def step():
        value = row.call(loss, *views, labels)
        return value, *torch.autograd.grad(value, views[: row.views])

    with serving(target, name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = [x.clone() for x in step()]
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for _ in range(2):
            graph.replay()
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@on_gpu
@EVERY
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_loss_and_gradients_nan(target, name, wrong):
    a, b, labels = data(20, 16, torch.float32)
    a[3, 5] = wrong
    with serving(target, name):
        value, grad, *_ = results(name, a, b, labels)
    assert value.isnan() and grad.isnan().any()


@on_gpu
@EVERY
def test_statistics_are_those_of_the_cpu_and_nothing_waits(target, name):
    found = []
    for device in ("cuda", "cpu"):
        row, given = LOSSES[name], data(70, 40, torch.float32, device)
        loss = row.make().to(device)
        with serving(target, name) if device == "cuda" else on(("cpu", "cpu")):
            row.call(loss, *given)
            if not hasattr(getattr(loss, "last", None), "accuracy"):
                return
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                last = loss.last
                read = torch.stack((last.mean_positive, last.mean_negative, last.accuracy, last.zero_rows))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(read.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@on_gpu
def test_losses_without_kernels_say_so(target):
    a, _, labels = data(20, 16, torch.float32)
    with on(target), pytest.raises(mmfast.UserError, match=f"{target[0]} backend was asked for"):
        mmfast.TripletMarginLoss()(a, labels)
