"""Augmentation in Triton against the reference: plans and moved elements bit by bit, noise to the last bits."""

import itertools
from types import SimpleNamespace

import pytest
import rotation
import torch
import triton
import triton.language as tl
from augment_help import calls, check_exact_counts
from hypothesis import given
from hypothesis import strategies as st
from triton_help import DEVICE, INTERPRETED, assert_rounded, inside, red_zones, to_device

from mmfast.ops import random
from mmfast.ops.augment.plan import MASK_FEATURES, MASK_STEPS, NOISE, RESAMPLE, Step, chains
from mmfast.ops.augment.reference import adjoint as adjoint_reference
from mmfast.ops.augment.reference import apply as apply_reference
from mmfast.ops.augment.reference import draw as draw_reference
from mmfast.triton import augment as kernels
from mmfast.triton import augment_chain
from mmfast.triton.random import normals, normals_at, words

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@triton.jit
def stream_kernel(seed, id, tag, out, near, far, BLOCKS: tl.constexpr):
    i = tl.arange(0, 4 * BLOCKS)
    seed, id, tag = tl.load(seed), tl.load(id), tl.load(tag)
    tl.store(out + i, words(seed, id, tag, 0, BLOCKS).to(tl.int64))
    tl.store(near + i, normals(seed, id, tag, 0, BLOCKS))
    tl.store(far + i, normals_at(seed, id, tag, i))


@pytest.mark.parametrize("seed, id", [(0, 0), (-(2**63), 2**63 - 1), (0x123456789ABCDEF0, -1)])
def test_the_stream(seed, id):
    n, tag = 4096, random.stream_tag(255, 3, 2, random.NOISE)
    seed, ids, tags = (torch.tensor([v], device=DEVICE) for v in (seed, id, tag))
    out = torch.empty(n, dtype=torch.int64, device=DEVICE)
    near, far = torch.empty(2, n, device=DEVICE)
    stream_kernel[(1,)](seed, ids, tags, out, near, far, n // 4)
    assert torch.equal(out, random.words(seed, ids, tag, n)[0])
    expected = random.normals(seed, ids, tag, n)[0].float()
    torch.testing.assert_close(near, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(far, near, rtol=2e-7, atol=1e-7)


@pytest.fixture(scope="module")
def large_blocks():
    """The interpreter's time goes with the number of programs; small blocks have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr("mmfast.triton.augment_draw.DRAW_KEYS", 128)
            patch.setattr("mmfast.triton.augment_apply.APPLY_BYTES", 2**14)
            patch.setattr("mmfast.triton.augment_adjoint.ADJOINT_BLOCK", 2**12)
        yield


@rotation.examples(150)
@given(calls())
def test_plans_are_bit_equal(large_blocks, call):
    batch, shapes, views, lengths, ids, seed, _, _ = call
    table = chains(views)
    with red_zones():
        plan = kernels.draw(*to_device([seed, ids, lengths]), table, batch, shapes)
    assert torch.equal(plan.cpu(), draw_reference(seed, ids, lengths, table, batch, shapes))


@pytest.mark.parametrize("kind", [MASK_STEPS, MASK_FEATURES, RESAMPLE])
def test_exact_counts_follow_one_rule(kind):
    check_exact_counts(
        lambda *args: kernels.draw(*to_device(args)).cpu(), kind, [0, 1, 2, 5], [0.3, 0.5, 0.9, 1.0]
    )


@pytest.mark.parametrize("length, features", [(1, 127), (128, 129), (129, 128), (300, 1), (700, 33)])
def test_plans_of_more_than_one_block(length, features):
    exact = Step(RESAMPLE, 1.0, "sample", 0.37, 0.1, gate=0.7, flags=3)
    loose = Step(RESAMPLE, 1.0, "sample", 0.37)
    masks = [Step(kind, 1.0, "sample", 0.3, flags=1) for kind in (MASK_STEPS, MASK_FEATURES)]
    table = chains([[[exact], [loose]], [[mask] for mask in masks]])
    lengths = [torch.tensor([length, length // 2])]
    args = torch.tensor([2]), None, lengths, table, 2, [(length, features)]
    with red_zones():
        plan = kernels.draw(*to_device(args))
    assert torch.equal(plan.cpu(), draw_reference(*args))


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def compare(xs, lengths, seed, ids, table, front, grads=None, plan=None, tensors=to_device):
    """Apply with and without noise, and the adjoint, against the reference."""
    shapes = [tuple(x.shape[1:]) for x in xs]
    if plan is None:
        plan = draw_reference(seed, ids, lengths, table, xs[0].shape[0], shapes)
    there = tensors([xs, lengths, seed, ids, plan])
    for with_noise in (False, True):
        with red_zones():
            outs = kernels.apply(*there, table, front, with_noise)
        expected = apply_reference(xs, lengths, seed, ids, plan, table, front, with_noise)
        assert len(outs) == len(expected)
        for out, good in zip(outs, expected, strict=True):
            assert out.shape == good.shape and out.dtype == good.dtype and out.is_contiguous()
            if with_noise:
                assert_rounded(out.cpu(), good)
            else:
                assert torch.equal(bits(out.cpu()), bits(good))
    if grads is not None:
        with red_zones():
            pulled = kernels.adjoint(tensors(grads), there[1], there[4], table, front)
        for out, good in zip(pulled, adjoint_reference(grads, lengths, plan, table, front), strict=True):
            assert_rounded(out.cpu(), good)


@rotation.examples(30)
@given(calls(), st.sampled_from(DTYPES))
def test_apply_and_adjoint(large_blocks, call, dtype):
    batch, shapes, views, lengths, ids, seed, front, generator = call
    xs = [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]
    grads = [torch.randn(x.shape, generator=generator).to(dtype) * 3 for _ in views for x in xs]
    compare(xs, lengths, seed, ids, chains(views), front, grads)


def example(dtype=torch.float32, noise=True):
    """Two views of two modalities that use every kind of step, with lengths 0, 1 and odd."""
    resample = Step(RESAMPLE, 1.0, "sample", 0.5, 0.1, gate=0.6)
    mask = Step(MASK_STEPS, 0.8, "sample", 0.4, flags=1)
    features = Step(MASK_FEATURES, 1.0, "modality", 0.3)
    noisy = [[Step(NOISE, 1.0, "batch", 0.2, 0.1)] * 2] if noise else []
    table = chains([[[resample] * 2, *noisy, [mask] * 2], [*noisy, [features] * 2, [resample] * 2]])
    lengths = [torch.tensor([0, 1, 40, 5]), torch.tensor([3, 0, 1, 9])]
    xs = [torch.randn(4, 40, 24).to(dtype), torch.randn(4, 9, 3).to(dtype)]
    return xs, lengths, torch.tensor([11]), None, table


@pytest.mark.rotation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("front", [False, True])
def test_every_kind_of_step(front, dtype):
    xs, lengths, seed, ids, table = example(dtype)
    compare(xs, lengths, seed, ids, table, front, [torch.randn_like(x) for _ in range(2) for x in xs])


def test_padding_and_masks_let_nothing_through():
    """NaN of padding and of masked elements stays where it is; infinite gradients of the masked vanish."""
    mask = Step(MASK_STEPS, 1.0, "sample", 0.5, flags=1)
    features = Step(MASK_FEATURES, 1.0, "sample", 0.4, flags=1)
    table = chains([[[mask], [Step(NOISE, 1.0, "sample", 0.0, 1.0)], [features], [mask]]])
    x, lengths, seed = torch.randn(3, 10, 5), torch.tensor([10, 4, 0]), torch.tensor([1])
    plan = draw_reference(seed, None, [lengths], table, 3, [(10, 5)])
    clean = apply_reference([x], [lengths], seed, None, plan, table, False, True)[0]
    killed = apply_reference([torch.ones_like(x)], [lengths], seed, None, plan, table, False, False)[0] == 0
    padding = torch.arange(10)[None, :, None] >= lengths[:, None, None]
    x = x.masked_fill(killed | padding, float("nan"))
    there = to_device([[x], [lengths], seed, None, plan])
    out = kernels.apply(*there, table, False, True)[0].cpu()
    assert out[padding.expand_as(out)].isnan().all()
    torch.testing.assert_close(out[~padding.expand_as(out)], clean[~padding.expand_as(out)])
    grad = torch.full_like(x, float("inf")).to(DEVICE)
    (pulled,) = kernels.adjoint([grad], there[1], there[4], table, False)
    assert torch.equal(pulled.cpu() == 0, killed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_elements_keep_their_bits(dtype):
    """Signalling NaN, negative zeros and subnormal numbers included."""
    table = chains([[[Step(RESAMPLE, 1.0, "sample", 0.5)], [Step(NOISE, 0.0, "sample", 0.0, 1.0)]]] * 2)
    x = torch.zeros(3, 16, 16, dtype=dtype)
    bits(x).random_()
    seed = torch.tensor([4])
    plan = draw_reference(seed, None, [None], table, 3, [(16, 16)])
    outs = kernels.apply(*to_device([[x], [None], seed, None, plan]), table, False, True)
    order = plan[:, 2 : 2 + 16].long()
    chosen = (plan[:, 1:2] >> torch.arange(16) & 1).bool()[:, None, :]
    moved = bits(x).gather(1, order[:, :, None].expand(3, 16, 16))
    assert torch.equal(bits(outs[0].cpu()), torch.where(chosen, moved, bits(x)))


@pytest.mark.parametrize("front", [False, True])
def test_slices_of_larger_buffers(front):
    xs, lengths, seed, _, table = example()

    def sliced(value):
        if isinstance(value, list):
            return [sliced(v) for v in value]
        value = to_device(value)
        return value if value is None or len(value) == 1 else inside(value)

    grads = [torch.randn_like(x) for _ in range(2) for x in xs]
    compare(xs, lengths, seed, torch.tensor([5, -1, 2, 9]), table, front, grads, tensors=sliced)


def test_any_strides():
    xs, lengths, seed, ids, table = example()
    plan = draw_reference(seed, ids, lengths, table, 4, [(40, 24), (9, 3)])
    expected = kernels.apply(*to_device([xs, lengths, seed, ids, plan]), table, False, True)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    ):
        there = to_device([[change(x) for x in xs], lengths, seed, ids, plan])
        for out, good in zip(kernels.apply(*there, table, False, True), expected, strict=True):
            assert torch.equal(out, good)
    same = xs[0][:1].expand(4, -1, -1)
    compare([same, xs[1]], lengths, seed, ids, table, False)


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(augment_chain, "MOST_INT32", 0)
    xs, lengths, seed, ids, table = example()
    for front in (False, True):
        compare(xs, lengths, seed, ids, table, front, [torch.randn_like(x) for _ in range(2) for x in xs])


@pytest.mark.parametrize("views", [1, 3, 4])
def test_any_number_of_views_and_steps(views):
    """Chains with more resample steps than one launch of the adjoint takes, and with more than 32 steps."""
    resample = Step(RESAMPLE, 0.9, "sample", 0.7, 0.0)
    mask = Step(MASK_STEPS, 0.9, "sample", 0.02)
    long = [[resample]] * 5 if views > 1 else [[mask]] * 33 + [[resample]] + [[mask]] * 2
    table = chains([long, [[resample], [mask], [resample]], [], long[:4]][:views])
    x = torch.randn(2, 12, 6)
    lengths = [torch.tensor([12, 7])]
    for dtype in (torch.float32, torch.bfloat16):
        grads = [torch.randn_like(x).to(dtype) for _ in range(views)]
        compare([x.to(dtype)], lengths, torch.tensor([3]), None, table, True, grads)


def test_wrong_lengths_and_plans_stay_inside_memory():
    """On a GPU nobody reads lengths before they are used: they are clamped, and so is where a plan points to."""
    xs, lengths, seed, ids, table = example()
    shapes = [tuple(x.shape[1:]) for x in xs]
    plan = draw_reference(seed, ids, lengths, table, 4, shapes)
    wrong = [torch.tensor([-5, 1000, 2**40, 3]), torch.tensor([9, -(2**62), 10, 9])]
    clamped = [n.clamp(0, length) for n, (length, _) in zip(wrong, shapes, strict=True)]
    assert torch.equal(
        kernels.draw(*to_device([seed, ids, wrong]), table, 4, shapes).cpu(),
        draw_reference(seed, ids, clamped, table, 4, shapes),
    )
    for bad in (plan, torch.full_like(plan, 2**31 - 1), torch.full_like(plan, -1)):
        there = to_device([[inside(x) for x in xs], wrong, seed, ids, bad])
        with red_zones():
            outs = kernels.apply(*there, table, True, True)
            pulled = kernels.adjoint(to_device(xs * 2), there[1], there[4], table, True)
        assert all(out.isfinite().all() for out in [*outs, *pulled])


@pytest.mark.parametrize("batch, length, features", list(itertools.product([0, 2], [0, 1], [0, 1])))
def test_empty_and_tiny_shapes(batch, length, features):
    kinds = [Step(kind, 1.0, "sample", 0.5, 0.1) for kind in (RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE)]
    table = chains([[[k] for k in kinds]])
    x = torch.randn(batch, length, features)
    seed = torch.tensor([1])
    args = seed, None, [None], table, batch, [(length, features)]
    assert torch.equal(kernels.draw(*to_device(args)).cpu(), draw_reference(*args))
    compare([x], [None], seed, None, table, False, [torch.randn_like(x)])


def test_without_steps_views_are_copies():
    x = torch.randn(2, 3, 4, device=DEVICE)
    table = chains([[], []])
    seed = torch.tensor([1], device=DEVICE)
    plan = kernels.draw(seed, None, [None], table, 2, [(3, 4)])
    outs = kernels.apply([x], [None], seed, None, plan, table, False, True)
    assert plan.shape == (2, 0) and all(torch.equal(out, x) and out is not x for out in outs)
    assert torch.equal(kernels.adjoint([x, x], [None], plan, table, False)[0], 2 * x)


def test_tables_are_bounded(monkeypatch):
    tables = augment_chain._Tables()
    tables.most = 3
    mask = chains([[[Step(MASK_STEPS, 1.0, "sample", 0.5)]]])
    first = tables(mask, [(1, 1)], DEVICE)
    for length in range(1, 6):
        assert tables(mask, [(1, 1)], DEVICE) is first
        tables(mask, [(length, 2)], DEVICE)
        assert len(tables.known) <= 3


def test_a_captured_table_is_kept_once_and_serves_all_streams(monkeypatch):
    """Graphs that are captured again and again, with eager calls on other streams between them."""
    tables, copies = augment_chain._Tables(), []
    now = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(tables, "_copy", lambda *_: copies.append(1) or [object()])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    mask = chains([[[Step(MASK_STEPS, 1.0, "sample", 0.5)]]])
    device = torch.device("cuda", 0)
    first = tables(mask, [(1, 1)], device)
    for now.cuda_stream in range(2, 12):
        for now.capturing in (True, False):
            assert tables(mask, [(1, 1)], device) is first
    assert len(copies) == len(tables.captured) == 1
    now.capturing = True
    with pytest.raises(RuntimeError, match="must capture chains and shapes that have run before"):
        tables(mask, [(2, 1)], device)
