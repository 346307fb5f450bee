"""The loss under ``torch.func`` transforms, in forward mode, and with batched gradients: right, or one sentence."""

import pytest
import torch
from barlow_twins_formulas import relative_error
from barlow_twins_help import DTYPES, FORMS, HALF, views
from targets import BACKENDS, BACKENDS_IN_TURN
from torch.autograd import forward_ad

from mmfast import functional as F
from mmfast.ops.barlow_twins import op as ops

AGAIN = r"^barlow_twins: the gradient must not be differentiated again"
ORDINARY = (
    r"^barlow_twins: torch.func transforms, forward-mode and batched derivatives are for two complete views"
)


def loss_of(gram):
    return lambda a, b: ops.barlow_twins(a, b, 0.02, gram=gram)[0]


def plain(loss, z_a, z_b):
    z_a, z_b = (z.detach().clone().requires_grad_() for z in (z_a, z_b))
    return torch.autograd.grad(loss(z_a, z_b), (z_a, z_b))


@BACKENDS_IN_TURN
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_and_vjp_are_those_of_autograd(dtype, gram, backend):
    loss, z = loss_of(gram), views(9, 14, dtype)
    expected = plain(loss, *z)
    assert all(map(torch.equal, torch.func.grad(loss, (0, 1))(*z), expected))
    assert torch.equal(torch.func.grad(loss)(*z), expected[0])
    value, pull = torch.func.vjp(loss, *z)
    # Small numbers of half types are subnormal.
    tolerance = 1e-3 if dtype in HALF else 1e-6
    for x, y in zip(pull(-2 * torch.ones_like(value)), expected, strict=True):
        assert relative_error(x, -2 * y) < tolerance


@BACKENDS
@FORMS
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1)], ids=str)
def test_vmap_is_a_loop(in_dims, gram, backend):
    loss, (z_a, z_b) = loss_of(gram), views(9, 14, torch.float32)
    batches = torch.stack([z_a, z_b, z_a * 2 + 0.1]), torch.stack([z_b, z_a, z_b])
    z = [
        x if dim is None else batch.movedim(0, dim)
        for x, batch, dim in zip((z_a, z_b), batches, in_dims, strict=True)
    ]
    pairs = [
        [x if dim is None else x.select(dim, i) for x, dim in zip(z, in_dims, strict=True)] for i in range(3)
    ]
    assert torch.equal(torch.vmap(loss, in_dims)(*z), torch.stack([loss(*pair) for pair in pairs]))
    grads = torch.vmap(torch.func.grad(loss, (0, 1)), in_dims)(*z)
    for m in range(2):
        assert torch.equal(grads[m], torch.stack([plain(loss, *pair)[m] for pair in pairs]))


def test_the_gradient_of_a_mapped_sum():
    z_a, z_b = views(9, 14)
    batch = torch.stack([z_a, z_b, 2 * z_a])
    total = torch.func.grad(lambda x: torch.vmap(F.barlow_twins, (0, None))(x, z_b).sum())(batch)
    assert torch.equal(total, torch.stack([plain(F.barlow_twins, x, z_b)[0] for x in batch]))


@BACKENDS_IN_TURN
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_mode_is_the_product_with_the_gradient(dtype, gram, backend):
    loss, z = loss_of(gram), views(9, 14, dtype)
    tangents = views(9, 14, dtype, seed=1)
    truth = [(g.double() * t.double()).sum() for g, t in zip(plain(loss, *z), tangents, strict=True)]
    value, tangent = torch.func.jvp(loss, z, tangents)
    assert torch.equal(value, loss(*z)) and value.dtype == tangent.dtype
    assert float(tangent) == pytest.approx(float(sum(truth)), rel=1e-5)
    with forward_ad.dual_level():
        one = forward_ad.unpack_dual(loss(z[0], forward_ad.make_dual(z[1], tangents[1]))).tangent
    assert float(one) == pytest.approx(float(truth[1]), rel=1e-5)


def test_jacobians_of_first_order():
    z_a, z_b = views(5, 4)
    expected = plain(F.barlow_twins, z_a, z_b)[0]
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(F.barlow_twins)(z_a, z_b), expected, rtol=1e-10, atol=1e-12)


@BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batched_gradients(dtype, gram, backend):
    loss, z = loss_of(gram), [x.requires_grad_() for x in views(9, 14, dtype)]
    value = loss(*z)
    weights = torch.tensor([1.0, 2.0, -3.0], dtype=value.dtype, device=value.device)
    (one,) = torch.autograd.grad(value, z[1], weights, is_grads_batched=True, retain_graph=True)
    both = torch.autograd.grad(value, z, weights, is_grads_batched=True)
    assert torch.equal(one, both[1])
    for batch, g in zip(both, plain(loss, *z), strict=True):
        torch.testing.assert_close(batch, torch.stack([w * g for w in weights]).to(batch.dtype))


Z, T = views(5, 8), views(5, 8, seed=1)
LOSS = F.barlow_twins


def forward_over_backward():
    z = Z[0].clone().requires_grad_()
    with forward_ad.dual_level():
        return torch.autograd.grad(LOSS(forward_ad.make_dual(z, T[0]), Z[1]), z)


def of_a_dual_upstream():
    z = Z[0].clone().requires_grad_()
    value = LOSS(z, Z[1])
    with forward_ad.dual_level():
        return torch.autograd.grad(
            value, z, forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        )


def backward_over_forward():
    z = Z[0].clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(LOSS(forward_ad.make_dual(z, T[0]), Z[1])).tangent
        return torch.autograd.grad(tangent, z, allow_unused=True)


SECOND = {
    "hessian": lambda: torch.func.hessian(LOSS)(*Z),
    "backward over backward": lambda: torch.func.jacrev(torch.func.jacrev(LOSS))(*Z),
    "forward over forward": lambda: torch.func.jacfwd(torch.func.jacfwd(LOSS))(*Z),
    "grad of jvp": lambda: torch.func.grad(lambda x: torch.func.jvp(lambda y: LOSS(y, Z[1]), (x,), (T[0],))[1])(Z[0]),
    "jvp of grad": lambda: torch.func.jvp(torch.func.grad(lambda y: LOSS(y, Z[1])), (Z[0],), (T[0],)),
    "dual, forward over backward": forward_over_backward,
    "dual upstream": of_a_dual_upstream,
    "dual, backward over forward": backward_over_forward,
}  # fmt: skip


@pytest.mark.parametrize("kind", SECOND)
def test_second_derivatives_are_refused_and_never_zero(kind):
    with pytest.raises(RuntimeError, match=AGAIN):
        SECOND[kind]()


COMPOSED = {
    "debias": lambda a, b: F.barlow_twins(a, b, debias=True),
    "vissl": lambda a, b: F.barlow_twins(a, b, variant="vissl"),
    "present": lambda a, b: F.multi_view_barlow_twins([a, b], torch.ones(5, 2, dtype=torch.bool)),
    "widths": lambda a, b: F.multi_view_barlow_twins([a, b[:, :3]]),
}


def batched(loss):
    z = Z[0].clone().requires_grad_()
    return torch.autograd.grad(loss(z, Z[1]), z, torch.ones(3, dtype=z.dtype), is_grads_batched=True)


def dual(loss):
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(Z[0], T[0]), Z[1])


@pytest.mark.parametrize("kind", COMPOSED)
def test_what_is_composed_refuses_transforms_in_one_sentence(kind):
    loss = COMPOSED[kind]
    calls = (
        lambda: torch.func.grad(loss)(*Z),
        lambda: torch.vmap(loss)(torch.stack([*Z]), torch.stack([*Z])),
        lambda: torch.func.jvp(loss, Z, T),
        lambda: dual(loss),
        lambda: batched(loss),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=ORDINARY):
            call()


def test_many_views_that_go_pair_by_pair_are_transformed():
    def loss(a):
        return F.multi_view_barlow_twins([a, Z[1], T[0]])

    z = Z[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.func.grad(loss)(Z[0]), expected, rtol=1e-12, atol=1e-14)


def test_transforms_within_a_compiled_graph():
    torch.compiler.reset()
    grad = torch.func.grad(LOSS)
    compiled = torch.compile(lambda a, b: grad(a, b), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*Z), plain(LOSS, *Z)[0], rtol=1e-10, atol=1e-12)


def test_refusals_inside_transforms_are_the_usual_ones():
    with pytest.raises(
        ValueError, match=r"barlow_twins: z_b must have the shape of z_a \(5, 8\), got \(5, 7\)"
    ):
        torch.func.grad(LOSS)(Z[0], Z[1][:, :7])
    with pytest.raises(ValueError, match=r"barlow_twins: z_a must be finite, got 40 NaN"):
        torch.func.grad(LOSS)(Z[0] * float("nan"), Z[1])
