"""Derivatives of augmentation beyond one backward pass: forward mode, mixed orders, vmap, compiled or not."""

import functools

import pytest
import torch
from targets import BACKENDS
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from mmfast import Chain, FeatureMask, GaussianNoise, SeqAug, TimeMask, TwoViews

STEPS = [
    GaussianNoise(0.3, p=1, mu=0.2),
    SeqAug(0.6, p=1, p_t=0.7),
    TimeMask(0.4, p=1),
    FeatureMask(0.3, p=1),
]
CHAIN = Chain(STEPS)


def leaves(views):
    """All tensors of a result, in order."""
    if isinstance(views, torch.Tensor):
        return (views,)
    parts = views.values() if isinstance(views, dict) else views
    return tuple(tensor for part in parts for tensor in leaves(part))


def values(dtype=torch.float64):
    return [torch.randn(2, 4, 3, dtype=dtype), torch.randn(2, 5, 2, dtype=dtype)]


def chain_of_one(x, y):
    return CHAIN(x, torch.tensor([4, 3]), seed=1, padding="front")


def two_views(x, y):
    return leaves(
        TwoViews(STEPS, STEPS[::-1])({"text": x, "audio": y}, {"text": torch.tensor([2, 4])}, seed=1)
    )


def replayed(x, y):
    return leaves(TwoViews(CHAIN, []).draw({"text": x, "audio": y}, seed=1).apply({"text": x, "audio": y}))


CALLS = [*(lambda x, y, step=step: step(x, seed=1) for step in STEPS), chain_of_one, two_views, replayed]
every_call = pytest.mark.parametrize(
    "call", CALLS, ids=[type(s).__name__ for s in STEPS] + ["chain", "views", "plan"]
)


@BACKENDS
@every_call
def test_tangents_are_those_of_the_linear_part(backend, call):
    """They were zeros from ``torch.func.jvp``, and None from dual numbers."""
    xs, ts = values(), values()
    outs = leaves(call(*xs))
    moved = leaves(call(*(x + t for x, t in zip(xs, ts, strict=True))))
    results, tangents = jvp(call, tuple(xs), tuple(ts))
    assert all(torch.equal(a, b) for a, b in zip(leaves(results), outs, strict=True))
    with forward_ad.dual_level():
        duals = leaves(call(*map(forward_ad.make_dual, xs, ts)))
        unpacked = [forward_ad.unpack_dual(dual).tangent for dual in duals]
    for out, other, tangent, again in zip(outs, moved, leaves(tangents), unpacked, strict=True):
        torch.testing.assert_close(tangent, other - out)
        assert torch.equal(tangent, again) and tangent.any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tangent_of_one_modality_reaches_no_other(backend, dtype):
    x, y = values(dtype)
    t = torch.randn_like(x)
    _, (a, b, *_) = jvp(lambda x: two_views(x, y), (x,), (t,))
    assert a.dtype == dtype and a.any() and not b.any()


@BACKENDS
@every_call
def test_derivatives_of_mixed_modes_agree(backend, call):
    xs = values()

    def cubes(x):
        return sum((out**3).sum() for out in leaves(call(x, xs[1])))

    x = xs[0]
    torch.testing.assert_close(grad(cubes)(x), torch.autograd.functional.jacobian(cubes, x))
    torch.testing.assert_close(jacfwd(cubes)(x), grad(cubes)(x))
    expected = torch.autograd.functional.hessian(cubes, x)
    assert expected.any()
    for mixed in (hessian(cubes), jacrev(jacrev(cubes)), jacrev(jacfwd(cubes)), jacfwd(jacfwd(cubes))):
        torch.testing.assert_close(mixed(x), expected)


@BACKENDS
def test_jacobians_by_batches_of_vectors(backend):
    x = values()[0]
    expected = torch.autograd.functional.jacobian(lambda x: chain_of_one(x, None), x)
    for strategy in ("reverse-mode", "forward-mode"):
        batched = torch.autograd.functional.jacobian(
            lambda x: chain_of_one(x, None), x, vectorize=True, strategy=strategy
        )
        torch.testing.assert_close(batched, expected)


@BACKENDS
def test_vmap_is_a_loop(backend):
    """Values, lengths, seeds and ids may be mapped over; under one seed all entries are augmented alike."""
    x = torch.randn(3, 2, 4, 3)
    lengths, ids = torch.tensor([[1, 2], [4, 0], [3, 3]]), torch.tensor([[5, 6], [7, 8], [5, 6]])
    seeds = torch.tensor([[1], [2], [3]])

    def call(x, lengths, ids, seed):
        return TwoViews(STEPS)(x, lengths, ids=ids, seed=seed)

    given = (x, lengths, ids, seeds)
    for dims in ((0, 0, 0, 0), (0, None, None, None), (None, None, None, 0), (0, None, 0, None)):
        arguments = [a if d == 0 else a[0] for a, d in zip(given, dims, strict=True)]
        mapped = vmap(call, in_dims=dims)(*arguments)
        for i in range(3):
            expected = call(*(a[i] if d == 0 else a for a, d in zip(arguments, dims, strict=True)))
            for a, b in zip(mapped, expected, strict=True):
                assert torch.equal(a[i], b)
    per_sample = vmap(grad(lambda x, n: (call(x, n, None, seeds[0])[0] ** 2).sum()))(x, lengths)
    leaf = x.clone().requires_grad_()
    sum((call(a, n, None, seeds[0])[0] ** 2).sum() for a, n in zip(leaf, lengths, strict=True)).backward()
    torch.testing.assert_close(per_sample, leaf.grad)


def test_views_of_mapped_calls_differ_where_randomness_does():
    x = torch.randn(3, 2, 9, 30)
    different = vmap(lambda x: SeqAug(0.5, p=1)(x), randomness="different")(x[:1].expand_as(x))
    assert not torch.equal(different[0], different[1])
    same = vmap(lambda x: SeqAug(0.5, p=1)(x), randomness="same")(x[:1].expand_as(x))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_view_again(reentrant):
    """Under a seed or the default generator; a generator of one's own they do not wind back."""
    x = torch.randn(2, 4, 3, requires_grad=True)
    for seed in (3, None):
        gradients = []
        for run in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=reentrant)):
            torch.manual_seed(0)
            out = run(lambda x, seed=seed: CHAIN(x, seed=seed).square().sum(), x)
            x.grad = None
            out.backward()
            gradients.append(x.grad)
        assert torch.equal(*gradients)


def test_compiled_tangents():
    """Transforms inside of a compiled function, and dual numbers from outside as far as the compiler keeps them."""
    x, t = torch.randn(2, 4, 3), torch.randn(2, 4, 3)

    def call(x):
        return Chain([SeqAug(0.6, p=1, p_t=0.7), TimeMask(0.4, p=1)])(x, seed=1)

    expected = jvp(call, (x,), (t,))[1]
    inside = torch.compile(lambda x, t: jvp(call, (x,), (t,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(x, t), expected)
    outside = torch.compile(call, fullgraph=True, backend="aot_eager")
    outside(x)  # A graph that was made for no tangents does not serve those with.
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(outside(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, expected)
