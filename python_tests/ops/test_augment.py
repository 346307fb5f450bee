"""The augment ops: kernels against the reference, gradients, and good behaviour as operators."""

import functools
import itertools

import pytest
import torch
from augment_help import calls, check_exact_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import KERNELS, on

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops import random
from mmfast.ops.augment.op import _check_cuda_limits, augment_apply, augment_draw
from mmfast.ops.augment.plan import (
    MASK_FEATURES,
    MASK_STEPS,
    NOISE,
    RESAMPLE,
    Chains,
    Step,
    chains,
)
from mmfast.ops.native import call_cuda

SENTINEL = 12345

TOLERANCE = {  # two roundings of the dtype; noise itself agrees to a few fp32 ulp
    torch.float32: 2e-6,
    torch.float64: 2e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def reference(function, *args):
    with backends.backend("reference"):
        return function(*args)


@pytest.fixture(autouse=True, scope="module", params=KERNELS, ids="-".join)
def target(request):
    """Every test runs on all kernels there are."""
    with on(request.param):
        yield request.param


on_cpu = pytest.mark.parametrize("target", KERNELS[:1], ids="-".join, indirect=True)


@given(call=calls(), dtype=st.sampled_from(list(TOLERANCE)))
def test_kernels_agree_with_the_reference(native, target, call, dtype):
    batch, shapes, views, lengths, ids, seed, front, generator = call
    table = chains(views)
    xs = [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]
    for isa in native.isas() if target[0] == "cpu" else ["of the GPU"]:
        if target[0] == "cpu":
            native.use_isa(isa)
        plan = augment_draw(seed, ids, lengths, table, batch, shapes)
        assert torch.equal(plan, reference(augment_draw, seed, ids, lengths, table, batch, shapes))
        args = (xs, lengths, seed, ids, plan, table, front)
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(augment_apply(*args), reference(augment_apply, *args), **close)
        grads = [torch.randn(x.shape, generator=generator).to(dtype) for _ in views for x in xs]
        args = (grads, lengths, seed, ids, plan, *table, front)
        adjoint = torch.ops.mmfast.augment_adjoint
        torch.testing.assert_close(adjoint(*args), reference(adjoint, *args), **close)


@settings(max_examples=300)
@given(call=calls())
def test_plans_are_the_same_bits_everywhere(target, call):
    batch, shapes, views, lengths, ids, seed, _, _ = call
    args = (seed, ids, lengths, chains(views), batch, shapes)
    assert torch.equal(augment_draw(*args), reference(augment_draw, *args))


@pytest.mark.parametrize("kind", [MASK_STEPS, MASK_FEATURES, RESAMPLE])
def test_exact_counts_follow_one_rule(kind):
    shares = [i / 20 for i in range(21)] + [1 - 2**-53]
    check_exact_counts(augment_draw, kind, range(12), shares)
    check_exact_counts(functools.partial(reference, augment_draw), kind, range(12), shares)


# Of seed 7, the first ids with two equal words among that many of their first stream of time steps.
@pytest.mark.parametrize("steps, sample", [(250, 113818), (500, 35282), (1000, 6558)])
def test_equal_random_words_go_by_index(target, steps, sample):
    seed, ids = torch.tensor([7]), torch.tensor([sample])
    words = random.words(seed, ids, random.stream_tag(0, 0, 0, random.TIME), steps)
    assert words.unique().numel() < steps
    for kind, share in ((RESAMPLE, 1.0), (MASK_STEPS, 0.5)):
        table = chains([[[Step(kind, 1.0, "sample", share, flags=1)]]])
        args = (seed, ids, [None], table, 1, [(steps, 1)])
        assert torch.equal(augment_draw(*args), reference(augment_draw, *args))


@pytest.mark.parametrize(
    "shapes, steps_per_view",
    [([(3, 2)] * 9, [1] * 17), ([(5, 3), (4, 6)], [30, 40, 25]), ([(300, 70), (2, 1)], [2, 3])],
    ids=["modalities and views", "steps", "elements"],
)
def test_calls_of_more_than_one_launch_or_block(target, shapes, steps_per_view):
    """More modalities, views and steps than the tables of one launch hold; samples cut into several blocks."""
    kinds = [
        Step(RESAMPLE, 0.5, "sample", 0.4, 0.1, gate=0.7),
        Step(MASK_STEPS, 0.5, "sample", 0.1),
        Step(NOISE, 0.5, "sample", 0.1, 0.2),
    ]
    views = [[[kinds[s % 3]] * len(shapes) for s in range(count)] for count in steps_per_view]
    table, batch, seed = chains(views), 3, torch.tensor([5])
    lengths = [torch.tensor([0, length, length - 1]) for length, _ in shapes]
    plan = augment_draw(seed, None, lengths, table, batch, shapes)
    assert torch.equal(plan, reference(augment_draw, seed, None, lengths, table, batch, shapes))
    xs = [torch.randn(batch, *shape) for shape in shapes]
    close = {"rtol": 1e-5, "atol": 1e-5}
    args = (xs, lengths, seed, None, plan, table, False)
    torch.testing.assert_close(augment_apply(*args), reference(augment_apply, *args), **close)
    args = ([torch.randn_like(x) for _ in views for x in xs], lengths, seed, None, plan, *table, False)
    adjoint = torch.ops.mmfast.augment_adjoint
    torch.testing.assert_close(adjoint(*args), reference(adjoint, *args), **close)


def test_the_longest_chain(target):
    def run(count):
        table, seed = chains([[[Step(NOISE, 1.0, "sample", 0.0, 0.1)]] * count]), torch.tensor([5])
        x = torch.zeros(2, 3, 4)
        plan = augment_draw(seed, None, [None], table, 2, [(3, 4)])
        return flat(augment_apply([x], [None], seed, None, plan, table, False))[0]

    assert run(64).std() > 0
    if target[0] == "cuda":
        with pytest.raises(UserError, match="a chain must have at most 64 steps on the cuda backend, got 65"):
            run(65)
    else:
        assert run(65).std() > 0


def example(dtype=torch.float64, noise=True):
    """Two views of two modalities that use every kind of step, with lengths 0, 1 and odd."""
    resample = Step(RESAMPLE, 1.0, "sample", 0.5, 0.1, gate=0.6)
    mask = Step(MASK_STEPS, 0.8, "sample", 0.4, flags=1)
    features = Step(MASK_FEATURES, 1.0, "modality", 0.3)
    noisy = [[Step(NOISE, 1.0, "batch", 0.2, 0.1)] * 2] if noise else []
    table = chains([[[resample] * 2, *noisy, [mask] * 2], [[features] * 2, [resample] * 2]])
    lengths = [torch.tensor([0, 1, 7, 5]), torch.tensor([3, 0, 1, 9])]
    shapes = [(7, 5), (9, 3)]
    seed = torch.tensor([11])
    plan = augment_draw(seed, None, lengths, table, 4, shapes)
    xs = [torch.randn(4, *shape, dtype=dtype) for shape in shapes]
    return xs, lengths, seed, None, plan, table


def flat(views):
    return [out for view in views for out in view]


def test_samples_are_as_large_as_the_cuda_kernels_count():
    """int32 has to hold the end of the last vector, behind the last element, and of the last tile of keys."""
    most = 2**31 - 1 - 4096
    _check_cuda_limits(Chains((), (), ()), [(1, most), (most, 1)])
    for steps, features in ((most + 1, 1), (1, 2**31 - 17), (2**16, 2**15)):
        with pytest.raises(UserError, match=f"modality 1 must have at most {most} elements a sample"):
            _check_cuda_limits(Chains((), (), ()), [(1, 1), (steps, features)])


@pytest.mark.rotation
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_gradients_of_every_order(target, front, backend):
    xs, *rest = example()
    xs = [x.requires_grad_() for x in xs]

    def f(*xs):
        return tuple(flat(augment_apply(xs, *rest, front)))

    with backends.backend(target[0] if backend == "kernel" else backend):
        assert torch.autograd.gradcheck(f, xs)
        assert torch.autograd.gradgradcheck(f, xs)


def test_adjoint_is_the_transpose():
    """<A x, g> = <x, A' g> for the linear part, whatever the upstream gradient."""
    xs, *rest = example(noise=False)
    xs = [x.requires_grad_() for x in xs]
    outs = flat(augment_apply(xs, *rest, False))
    grads = [torch.randn_like(out) * 3 for out in outs]
    pulled = torch.autograd.grad(outs, xs, grads)
    left = sum((out * g).sum() for out, g in zip(outs, grads, strict=True))
    right = sum((x * g).sum() for x, g in zip(xs, pulled, strict=True))
    torch.testing.assert_close(left, right)


def test_masked_elements_have_no_gradient_even_of_infinity():
    table = chains(
        [[[Step(MASK_STEPS, 1.0, "sample", 1.0, flags=1)], [Step(MASK_FEATURES, 1.0, "sample", 1.0)]]]
    )
    x = torch.randn(2, 5, 3, requires_grad=True)
    seed = torch.tensor([0])
    plan = augment_draw(seed, None, [None], table, 2, [(5, 3)])
    (out,) = flat(augment_apply([x], [None], seed, None, plan, table, False))
    out.backward(torch.full_like(out, float("inf")))
    assert (x.grad == 0).all()


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_padding_is_copied_and_takes_no_part(poisoned_memory, front, dtype):
    xs, lengths, *rest = example(dtype)
    clean = flat(augment_apply(xs, lengths, *rest, front))
    dirty = [x.clone() for x in xs]
    real = []
    for x, n in zip(dirty, lengths, strict=True):
        t = torch.arange(x.shape[1])
        inside = t >= x.shape[1] - n[:, None] if front else t < n[:, None]
        x[~inside] = float("nan")
        real.append(inside)
    outs = flat(augment_apply(dirty, lengths, *rest, front))
    for out, good, inside in zip(outs, clean, real * 2, strict=True):
        assert torch.equal(out[inside], good[inside])
        assert out[~inside].isnan().all()


def test_front_and_back_padding_give_the_same_real_steps():
    xs, lengths, *rest = example()
    moved = [
        torch.stack([row.roll(int(row.shape[0] - n), 0) for row, n in zip(x, length, strict=True)])
        for x, length in zip(xs, lengths, strict=True)
    ]
    back, front = (
        flat(augment_apply(xs, lengths, *rest, False)),
        flat(augment_apply(moved, lengths, *rest, True)),
    )
    for a, b, length in zip(back, front, lengths * 2, strict=True):
        for row_a, row_b, n in zip(a, b, length, strict=True):
            assert torch.equal(row_a[:n], row_b[row_b.shape[0] - n :])


def test_slices_of_larger_buffers_and_red_zones(poisoned_memory):
    xs, *rest = example()
    expected = augment_apply(xs, *rest, False)
    sliced, buffers = [], []
    for x in xs:
        b, length, features = x.shape
        buffer = torch.full((2 * b + 1, length + 3, features + 4), float("nan"), dtype=x.dtype)
        buffer[1::2, 2:-1, 1:-3] = x
        buffers.append((buffer, buffer.clone()))
        sliced.append(buffer[1::2, 2:-1, 1:-3])
    torch.testing.assert_close(augment_apply(sliced, *rest, False), expected, rtol=0, atol=0)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs]
    torch.testing.assert_close(augment_apply(transposed, *rest, False), expected, rtol=0, atol=0)
    for buffer, before in buffers:
        assert torch.equal(buffer.view(torch.int64), before.view(torch.int64))


def test_kernels_write_nothing_outside_their_outputs(native, target):
    """Outputs inside larger buffers, called below the op: the zones around them stay as they are."""
    xs, lengths, seed, _, plan, table = example(torch.float32)
    expected = flat(augment_apply(xs, lengths, seed, None, plan, table, False))
    zone = 64

    def call(kernel, *arguments):
        if target[0] == "cpu":
            getattr(native, f"augment_{kernel}")(*arguments, 2)
        else:
            call_cuda("augment", getattr(native, f"cuda_augment_{kernel}"), seed.device, *arguments)

    def inner(tensors):
        """Copies in the middle of buffers, and their addresses."""
        buffers = [torch.full((t.numel() + 2 * zone,), SENTINEL).to(t.dtype) for t in tensors]
        for buffer, t in zip(buffers, tensors, strict=True):
            buffer[zone:-zone] = t.flatten()
        return buffers, [buffer.data_ptr() + zone * buffer.element_size() for buffer in buffers]

    rows = [v for x, n in zip(xs, lengths, strict=True) for v in (*x.shape[1:], 0, n.data_ptr())]
    arguments = native.AugmentArguments(4, *table, rows, seed.data_ptr(), 0, plan.shape[1])
    outs, out_starts = inner([torch.zeros_like(x) for _ in range(2) for x in xs])
    ins, in_starts = inner(xs)
    strides = [s for x in xs for s in x.stride()[:2]]
    call("apply", arguments, plan.data_ptr(), 0, in_starts, strides, out_starts, True)
    plans, plan_starts = inner([torch.zeros_like(plan)])
    call("draw", arguments, plan_starts[0])
    grads, grad_starts = inner(xs)
    call("adjoint", arguments, plan.data_ptr(), 0, out_starts, grad_starts)
    assert torch.equal(plans[0][zone:-zone].view_as(plan), plan)
    for buffer, out in zip(outs, expected, strict=True):
        assert torch.equal(buffer[zone:-zone].view_as(out), out)
    for buffer in (*outs, *ins, *plans, *grads):
        assert (buffer[:zone] == SENTINEL).all() and (buffer[-zone:] == SENTINEL).all()


def big_example():
    torch.manual_seed(1)
    rows = [
        [Step(NOISE, 0.9, "sample", 0.0, 0.1)] * 2,
        [Step(RESAMPLE, 0.9, "sample", 0.3, 0.01)] * 2,
        [Step(MASK_STEPS, 0.9, "sample", 0.5, flags=1)] * 2,
    ]
    table = chains([rows, rows[::-1]])
    shapes = [(50, 60), (33, 31)]
    lengths = [torch.randint(0, length + 1, (64,)) for length, _ in shapes]
    xs = [torch.randn(64, *shape) for shape in shapes]
    return xs, lengths, shapes, table, torch.tensor([5])


def run(xs, lengths, shapes, table, seed, ids=None):
    plan = augment_draw(seed, ids, lengths, table, xs[0].shape[0], shapes)
    return plan, flat(augment_apply(xs, lengths, seed, ids, plan, table, False))


@on_cpu
def test_results_do_not_depend_on_threads():
    call = big_example()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(*call))
    finally:
        torch.set_num_threads(threads)
    for plan, outs in results[1:]:
        assert torch.equal(plan, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(outs, results[0][1], strict=True))


def test_with_ids_a_sample_does_not_depend_on_its_batch():
    xs, lengths, shapes, table, seed = big_example()
    # One coin per sample: coins of a whole batch do not depend on the batch either.
    ids = torch.randperm(1000)[:64]
    plan, outs = run(xs, lengths, shapes, table, seed, ids)
    pick = torch.tensor([40, 3, 17])
    part_plan, part = run([x[pick] for x in xs], [n[pick] for n in lengths], shapes, table, seed, ids[pick])
    assert torch.equal(part_plan, plan[pick])
    for a, b in zip(part, outs, strict=True):
        assert torch.equal(a, b[pick])


def test_longer_padding_changes_nothing():
    xs, lengths, shapes, table, seed = big_example()
    _, outs = run(xs, lengths, shapes, table, seed)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 9)) for x in xs]
    _, longer = run(padded, lengths, [(length + 9, f) for length, f in shapes], table, seed)
    for a, b, x, n in zip(outs, longer, xs * 2, lengths * 2, strict=True):
        real = torch.arange(x.shape[1]) < n[:, None]
        assert torch.equal(a[real], b[:, :-9][real])


@pytest.mark.parametrize("batch, length, features", list(itertools.product([0, 1, 3], [0, 1, 5], [0, 1, 4])))
def test_empty_and_tiny_shapes(batch, length, features):
    kinds = [Step(kind, 1.0, "sample", 0.5, 0.1) for kind in (RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE)]
    table = chains([[[k] for k in kinds]])
    x = torch.randn(batch, length, features, requires_grad=True)
    seed = torch.tensor([1])
    plan = augment_draw(seed, None, [None], table, batch, [(length, features)])
    (out,) = flat(augment_apply([x], [None], seed, None, plan, table, False))
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_sequences_longer_than_the_short_sort(native):
    # Above 256 steps the kernel sorts with another algorithm.
    table = chains([[[Step(RESAMPLE, 1.0, "sample", 0.5)], [Step(MASK_STEPS, 1.0, "sample", 0.3, flags=1)]]])
    for length in (255, 256, 257, 700):
        args = (torch.tensor([2]), None, [torch.tensor([length, length - 1])], table, 2, [(length, 3)])
        assert torch.equal(augment_draw(*args), reference(augment_draw, *args))


def test_opcheck():
    xs, lengths, seed, _, plan, table = example(torch.float32)
    ops = torch.ops.mmfast
    shapes = [v for x in xs for v in x.shape[1:]]
    torch.library.opcheck(ops.augment_draw, (seed, None, lengths, *table, 4, shapes))
    torch.library.opcheck(ops.augment_apply, (xs, lengths, seed, None, plan, *table, False, True))
    torch.library.opcheck(ops.augment_adjoint, (xs * 2, lengths, seed, None, plan, *table, False))


@on_cpu
def test_cpu_kernels_raise_before_they_touch_memory():
    xs, lengths, seed, _, plan, table = example(torch.float32)
    for wrong, text in [
        (torch.tensor([0, 1, 8, 5]), r"lengths of modality 0 must be in \[0, 7\], got 8"),
        (torch.tensor([0, -1, 7, 5]), r"lengths of modality 0 must be in \[0, 7\], got -1"),
        (torch.tensor([0, 1]), r"must be int64 of shape \(4,\), got int64 of shape \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            augment_apply(xs, [wrong, lengths[1]], seed, None, plan, table, False)
        with pytest.raises(ValueError, match=text):
            augment_draw(seed, None, [wrong, lengths[1]], table, 4, [(7, 5), (9, 3)])


@on_cpu
def test_reference_is_used_without_kernels(monkeypatch):
    call = big_example()
    _, expected = run(*call)
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_forced", ())
    assert backends.choose("augment_apply", torch.device("cpu")) == "reference"
    _, outs = run(*call)
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
