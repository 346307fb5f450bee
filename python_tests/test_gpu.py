"""What only a real GPU can show: graphs, streams, no waiting, and agreement of all backends with the CPU."""

import subprocess
import sys

import pytest
import torch
from targets import KERNELS, on

import mmfast
from mmfast import BarlowTwinsLoss, FeatureMask, GaussianNoise, SeqAug, TimeMask, TwoViews
from mmfast.functional import multi_view_barlow_twins
from mmfast.ops.barlow_twins import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_gpu = pytest.mark.parametrize(
    "target", [pair for pair in KERNELS if pair[1] == "cuda"] or [("cuda", "cuda")], ids="-".join
)
HALVES = [torch.bfloat16, torch.float16]
CHAINS = [[SeqAug(0.4, p=0.8, p_t=0.7), TimeMask(p=0.8), FeatureMask(0.2, p=0.5)], [TimeMask(), SeqAug(0.3)]]
NOISY = [[GaussianNoise(0.2, p=0.8), *CHAINS[0]], [*CHAINS[1], GaussianNoise(0.1, p=1)]]


def batch(dtype=torch.float32, rows=37, device="cuda"):
    generator = torch.Generator().manual_seed(3)
    shapes = {"text": (50, 300), "audio": (41, 74), "visual": (50, 35)}
    xs = {k: torch.randn(rows, *shape, generator=generator) for k, shape in shapes.items()}
    lengths = {k: torch.randint(0, s[0] + 1, (rows,), generator=generator) for k, s in shapes.items()}
    return {k: x.to(device, dtype) for k, x in xs.items()}, {k: n.to(device) for k, n in lengths.items()}


def moved(values, device):
    return {k: v.to(device) for k, v in values.items()}


@on_gpu
@pytest.mark.parametrize("padding", ["front", "back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_views_are_those_of_the_cpu(target, dtype, padding):
    """Plans and moved elements bit for bit; noise within roundings."""
    xs, lengths = batch(dtype)
    for chains, exact in ((CHAINS, True), (NOISY, False)):
        views = TwoViews(*chains)
        arguments = {"seed": 5, "padding": padding}
        expected = views(moved(xs, "cpu"), moved(lengths, "cpu"), **arguments)
        expected_plan = views.draw(moved(xs, "cpu"), moved(lengths, "cpu"), **arguments)
        with on(target):
            plan, got = views.draw(xs, lengths, **arguments), views(xs, lengths, **arguments)
        assert torch.equal(plan.words.cpu(), expected_plan.words)
        for view, truth in zip(got, expected, strict=True):
            for name in xs:
                if exact:
                    assert torch.equal(view[name].cpu(), truth[name])
                else:
                    # One rounding of the dtype where the fp32 values before it differ in their last bits.
                    eps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
                    torch.testing.assert_close(view[name].cpu(), truth[name], rtol=eps, atol=eps)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_of_views_are_those_of_the_cpu(target, dtype):
    xs, lengths = batch(dtype)
    results = []
    for where in ("cpu", "cuda"):
        leaves = {k: x.to(where).requires_grad_() for k, x in xs.items()}
        with on(target if where == "cuda" else ("cpu", "cpu")):
            a, b = TwoViews(*CHAINS)(leaves, moved(lengths, where), seed=7)
        sum((2 * a[k].float()).sum() - b[k].float().square().sum() for k in xs).backward()
        results.append({k: leaf.grad.cpu() for k, leaf in leaves.items()})
    tolerance = 4 * torch.finfo(dtype).eps
    for k in xs:
        torch.testing.assert_close(results[1][k], results[0][k], rtol=tolerance, atol=tolerance)


SHAPES = [(5, 3), (33, 1000), (170, 1000), (600, 130), (64, 4096), (1024, 128)]


@on_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_loss_and_gradients_against_fp64(target, shape, dtype):
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64)
    b = a + 0.5 * torch.randn(shape, dtype=torch.float64)
    rounded = [z.to(dtype) for z in (a, b)]

    def run(views, loss):
        views = [z.detach().clone().requires_grad_() for z in views]
        value = loss(*views)
        (3 * value).backward()
        return float(value.detach()), [z.grad.double().cpu() for z in views]

    truth, truth_grads = run([z.double() for z in rounded], reference)
    with on(target):
        value, grads = run([z.cuda() for z in rounded], BarlowTwinsLoss())
        again, grads_again = run([z.cuda() for z in rounded], BarlowTwinsLoss())
    assert value == again and all(torch.equal(g, h) for g, h in zip(grads, grads_again, strict=True))
    half = dtype in HALVES
    assert value == pytest.approx(truth, rel={torch.float64: 1e-12}.get(dtype, 1e-3 if half else 5e-6))
    for grad, expected in zip(grads, truth_grads, strict=True):
        error = (grad - expected).norm() / expected.norm()
        assert error < {torch.float64: 1e-11}.get(dtype, 8 * torch.finfo(dtype).eps if half else 2e-5), error


@on_gpu
def test_nothing_waits_for_the_gpu(target):
    """Forward and backward of augmentation and loss enqueue their work and go on."""
    xs, lengths = batch()
    views, loss = TwoViews(*NOISY), BarlowTwinsLoss()
    z = [torch.randn(64, 512, device="cuda", requires_grad=True) for _ in range(2)]

    def step():
        a, _ = views(xs, lengths)
        loss(*z).backward()
        return a

    with on(target):
        step()  # compiles, allocates, fills caches
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_captured_graph_draws_fresh_masks_at_every_replay(target):
    xs, lengths = batch()
    views, loss = TwoViews(*NOISY), BarlowTwinsLoss()
    leaf = torch.randn(64, 300, device="cuda", requires_grad=True)

    def step():
        a, b = views(xs, lengths)
        # The loss of something random, so that its gradient shows whether the graph is alive.
        z = leaf + a["text"][:, 0].repeat(2, 1)[:64] * 0.1
        value = loss(leaf, z)
        (grad,) = torch.autograd.grad(value, leaf)
        return a["text"], b["audio"], value, grad

    with on(target):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        results = []
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            results.append([out.clone() for out in outputs])
    for first, second in ((0, 1), (1, 2)):
        for x, y in zip(results[first], results[second], strict=True):
            assert not torch.equal(x, y)
    # Replays go on with the generator's stream: they are what eager calls give from the same state.
    torch.manual_seed(11)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [out.clone() for out in outputs]
    torch.manual_seed(11)
    with on(target):
        eager = step()
    for x, y in zip(replayed, eager, strict=True):
        torch.testing.assert_close(x, y)


@on_gpu
def test_work_goes_to_the_current_stream(target):
    xs, lengths = batch(rows=512)
    views = TwoViews(*CHAINS)
    with on(target):
        expected = views(xs, lengths, seed=3)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Data that arrive late on this stream: a kernel on any other stream would read what was there before.
            late = {k: torch.full_like(x, float("nan")) for k, x in xs.items()}
            torch.cuda._sleep(50_000_000)
            for k, x in xs.items():
                late[k].copy_(x)
            got = views(late, lengths, seed=3)
        stream.synchronize()
    for view, truth in zip(got, expected, strict=True):
        assert all(torch.equal(view[k], truth[k]) for k in xs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@on_gpu
def test_tensors_of_another_device_than_the_current(target):
    xs, lengths = batch()
    expected = TwoViews(*CHAINS)(xs, lengths, seed=3)
    other = moved(xs, "cuda:1"), moved(lengths, "cuda:1")
    with on(target):
        got = TwoViews(*CHAINS)(*other, seed=3)
    assert torch.cuda.current_device() == 0
    for view, truth in zip(got, expected, strict=True):
        assert all(view[k].device.index == 1 and torch.equal(view[k].cpu(), truth[k].cpu()) for k in xs)


@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_full_graph_compilation(target, mode):
    xs, lengths = batch()
    views, loss = TwoViews(*CHAINS), BarlowTwinsLoss()
    projector = torch.nn.Linear(300, 128, device="cuda")
    seed = torch.tensor([9], device="cuda")

    def step(xs, lengths, seed):
        a, b = views(xs, lengths, seed=seed)
        return loss(projector(a["text"].mean(1)), projector(b["text"].mean(1)))

    with on(target):
        expected = step(xs, lengths, seed)
        (expected_grad,) = torch.autograd.grad(expected, projector.weight)
        compiled = torch.compile(step, fullgraph=True, mode=mode)
        for _ in range(3):
            value = compiled(xs, lengths, seed)
            (grad,) = torch.autograd.grad(value, projector.weight)
            value, grad = value.clone(), grad.clone()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)


@on_gpu
def test_more_than_2_31_elements(target):
    """A batch whose last samples lie beyond 32-bit offsets."""
    rows, steps, features = 2**31 // (64 * 256) + 3, 64, 256
    if torch.cuda.mem_get_info()[0] < 8 * rows * steps * features:
        pytest.skip("not enough memory on the device")
    x = torch.empty(rows, steps, features, device="cuda", dtype=torch.bfloat16)
    x.normal_()
    views = TwoViews([SeqAug(0.5, p=1), TimeMask(p=1)], [])
    ids = torch.arange(rows, device="cuda")
    with on(target):
        a, b = views(x, seed=4, ids=ids)
        last, _ = views(x[-5:], seed=4, ids=ids[-5:])
    assert torch.equal(a[-5:], last) and torch.equal(b[-5:], x[-5:])


@on_gpu
def test_lengths_out_of_range_touch_no_foreign_memory(target):
    """Nobody waits to look at lengths on the device; they are clamped there."""
    xs, lengths = batch()
    wrong = {k: n + 1000 for k, n in lengths.items()}
    with on(target):
        got = TwoViews(*CHAINS)(xs, wrong, seed=3)
        expected = TwoViews(*CHAINS)(
            xs, {k: torch.full_like(n, xs[k].shape[1]) for k, n in lengths.items()}, seed=3
        )
        TwoViews(*CHAINS)(xs, {k: n - 1000 for k, n in lengths.items()}, seed=3)
    torch.cuda.synchronize()
    for view, truth in zip(got, expected, strict=True):
        assert all(torch.equal(view[k], truth[k]) for k in xs)


@on_gpu
def test_embeddings_that_are_not_finite_give_nan(target):
    z = torch.randn(8, 16, device="cuda")
    bad = z.clone()
    bad[3, 5] = float("inf")
    with on(target):
        assert BarlowTwinsLoss()(z, bad).isnan()


def test_the_fastest_backend_is_taken_without_asking():
    facts = mmfast.info()
    built = facts["cuda"]["built"]
    for op in ("augment_draw", "augment_apply", "barlow_twins"):
        assert facts["ops"][f"{op} (cuda)"]["uses"] == ("cuda" if built else "triton")


def test_a_process_that_asked_for_information_can_be_forked():
    code = (
        "import os, mmfast, torch; mmfast.info(); assert not torch.cuda.is_initialized(); pid = os.fork(); "
        "pid or os._exit(int(torch.ones(2, device='cuda').sum()) - 2); "
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_seed_is_drawn_by_the_generator_of_the_device():
    x = torch.randn(4, 5, 6, device="cuda")
    draws = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        draws.append(SeqAug(0.5, p=1)(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(48, 512), (512, 48)], ids=["gram", "direct"])
def test_many_views_are_those_of_the_cpu(shape, dtype):
    """With missing ones, and debiased; nothing waits for the GPU."""
    torch.manual_seed(0)
    base = torch.randn(shape, dtype=torch.float64)
    views = [(base + 0.7 * torch.randn_like(base)).to(dtype) for _ in range(3)]
    present = torch.rand(shape[0], 3) < 0.8
    for mask, debias in ((None, False), (present, False), (None, True)):
        results = []
        for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
            z = [x.to(device, kind, copy=True).requires_grad_() for x in views]
            arguments = {
                "present": None if mask is None else mask.to(device),
                "debias": debias,
                "stats": None,
            }
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                loss = multi_view_barlow_twins(z, **arguments)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append((loss.detach(), [x.grad for x in z]))
        (truth, expected), (found, grads) = results
        tolerance = 10 * torch.finfo(dtype).eps
        assert float(found) == pytest.approx(float(truth), rel=max(tolerance, 1e-5))
        for x, y in zip(grads, expected, strict=True):
            assert float((x.cpu().double() - y).norm() / y.norm()) < tolerance
