"""The Barlow Twins loss: definition, gradients, invariances, components and refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from barlow_twins_formulas import relative_error
from barlow_twins_help import (
    CENTER,
    DTYPES,
    FORMS,
    SHAPES,
    gradients,
    is_narrow,
    passes,
    skip_where_bfloat16_is_not_rounded,
    views,
)
from targets import ALL_BACKENDS, BACKENDS
from torch import nn

import mmfast
from mmfast import functional as F
from mmfast.losses import BarlowTwinsLoss, MultiViewBarlowTwinsLoss
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.products import gram_matrices, product

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def brute_force(z_a, z_b, lambd=5e-3, center=True, eps=1e-5):
    a, b = z_a.double().T.tolist(), z_b.double().T.tolist()

    def standardise(column):
        mean = math.fsum(column) / len(column) if center else 0.0
        variance = math.fsum((x - mean) ** 2 for x in column) / len(column)
        return [(x - mean) / math.sqrt(variance + eps) for x in column]

    a, b = [standardise(x) for x in a], [standardise(x) for x in b]
    loss = 0.0
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            c = math.fsum(p * q for p, q in zip(x, y, strict=True)) / len(x)
            loss += (1 - c) ** 2 if i == j else lambd * c**2
    return loss


@BACKENDS
@FORMS
@CENTER
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (7, 5), (19, 70), (70, 19), (33, 64)], ids=str)
def test_value_is_the_definition(shape, center, gram, backend):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        z_a, z_b = views(*shape, dtype)
        loss, _ = ops.barlow_twins(z_a, z_b, 0.02, center, 1e-3, gram=gram)
        assert loss.dtype == dtype and loss.shape == ()
        assert float(loss) == pytest.approx(brute_force(z_a, z_b, 0.02, center, 1e-3), rel=tolerance)


@CENTER
def test_the_reference_is_the_definition(center):
    z_a, z_b = views(9, 6)
    loss = ops.reference(z_a, z_b, 0.02, center, 1e-3)
    assert float(loss) == pytest.approx(brute_force(z_a, z_b, 0.02, center, 1e-3), rel=1e-13)


@BACKENDS
@FORMS
@CENTER
def test_gradcheck(center, gram, backend):
    z_a, z_b = (z.requires_grad_() for z in views(6, 5))
    assert torch.autograd.gradcheck(
        lambda a, b: ops.barlow_twins(a, b, 0.3, center, 1e-2, gram=gram)[0], (z_a, z_b)
    )


@pytest.mark.rotation
@ALL_BACKENDS
@FORMS
@CENTER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_error_is_that_of_plain_pytorch(dtype, center, gram, backend):
    skip_where_bfloat16_is_not_rounded(backend, dtype)
    for shape in ((24, 100), (100, 24)):
        z_a, z_b = views(*shape, dtype)
        truth = gradients(ops.reference, z_a, z_b, -3.0, torch.float64, center=center)
        plain = gradients(ops.reference, z_a, z_b, -3.0, center=center)
        ours = gradients(ops.barlow_twins, z_a, z_b, -3.0, center=center, gram=gram)
        if is_narrow(dtype):
            assert relative_error(ours[0], truth[0]) < 0.2 * torch.finfo(dtype).eps
            ours, plain, truth = ours[1:], plain[1:], truth[1:]
        for x, y, z in zip(ours, plain, truth, strict=True):
            # Plus a few units in the last place of fp32, in which all of these are computed.
            assert relative_error(x, z) <= 2 * relative_error(y, z) + 1e-6


@pytest.mark.parametrize("shape", [(170, 1000), (30, 2500), (600, 810), (600, 130)], ids=str)
def test_sizes_at_which_products_are_cut_up(shape):
    z_a, z_b = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    z_b += z_a
    truth = gradients(ops.reference, z_a, z_b, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        ours = gradients(F.barlow_twins, z_a, z_b, dtype=dtype)
        assert all(relative_error(x, y) < tolerance for x, y in zip(ours, truth, strict=True))


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_the_gradients_that_are_needed(dtype, gram, backend):
    z_a, z_b = views(10, 12, dtype)
    _, grad_a, grad_b = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    a, b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    ops.barlow_twins(a, z_b, gram=gram)[0].backward()
    ops.barlow_twins(z_a, b, gram=gram)[0].backward()
    assert torch.equal(a.grad.double(), grad_a) and torch.equal(b.grad.double(), grad_b)


@BACKENDS
@FORMS
def test_inputs_can_be_used_again(gram, backend):
    z_a, z_b = views(10, 12, torch.float32)
    _, once, _ = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    a, b = z_a.clone().requires_grad_(), z_b.clone().requires_grad_()
    loss = ops.barlow_twins(a, b, gram=gram)[0]
    loss.backward(retain_graph=True)
    loss.backward()
    ops.barlow_twins(a, b, gram=gram)[0].backward()
    torch.testing.assert_close(a.grad.double(), 3 * once, rtol=1e-6, atol=1e-8)
    assert torch.equal(a.detach(), z_a) and torch.equal(b.detach(), z_b)


@BACKENDS
def test_one_tensor_as_both_views(backend):
    z, _ = views(8, 30)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    F.barlow_twins(x, x, eps=1e-2).backward()
    ops.reference(y, y, eps=1e-2).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)


# What the definition implies.


@SHAPES
def test_affine_maps_of_columns_change_nothing(shape):
    z_a, z_b = views(*shape)
    scale, offset = torch.linspace(0.5, 20, shape[1]), torch.linspace(-50, 80, shape[1])
    mapped = F.barlow_twins(z_a * scale + offset, z_b * 3 - 1, eps=0)
    assert float(mapped) == pytest.approx(float(F.barlow_twins(z_a, z_b, eps=0)), rel=1e-9)
    scaled = F.barlow_twins(z_a * scale, z_b / 7, eps=0, center=False)
    assert float(scaled) == pytest.approx(float(F.barlow_twins(z_a, z_b, eps=0, center=False)), rel=1e-11)


@SHAPES
def test_permutations_and_exchange_of_views_permute_the_gradient(shape):
    z_a, z_b = views(*shape)
    loss, grad_a, grad_b = gradients(F.barlow_twins, z_a, z_b)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    permuted = gradients(F.barlow_twins, z_a[rows][:, columns], z_b[rows][:, columns])
    torch.testing.assert_close(permuted, (loss, grad_a[rows][:, columns], grad_b[rows][:, columns]))
    torch.testing.assert_close(gradients(F.barlow_twins, z_b, z_a), (loss, grad_b, grad_a))


@SHAPES
def test_repeating_the_batch_keeps_the_loss(shape):
    z_a, z_b = views(*shape)
    twice = F.barlow_twins(z_a.repeat(2, 1), z_b.repeat(2, 1))
    assert float(twice) == pytest.approx(float(F.barlow_twins(z_a, z_b)), rel=1e-12)


@BACKENDS
@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scale_and_offset_cost_no_precision(shape, scale, offset, backend):
    z_a, z_b = (z * scale + offset for z in views(*shape, torch.float32))
    truth = gradients(ops.reference, z_a, z_b, dtype=torch.float64)
    ours = gradients(F.barlow_twins, z_a, z_b)
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=2e-6)
    for x, y in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(x, y) < 2e-5


@BACKENDS
@SHAPES
def test_an_outlier_in_the_first_row_costs_no_precision(shape, backend):
    z_a, z_b = views(*shape, torch.float32)
    z_a[0] += 1e4
    loss = float(F.barlow_twins(z_a, z_b))
    assert loss == pytest.approx(brute_force(z_a, z_b), rel=2e-6)


@BACKENDS
@SHAPES
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_constant_column_correlates_with_nothing(shape, eps, backend):
    z_a, z_b = views(*shape, torch.float32)
    z_a[:, 3] = 1234.567
    z_b[:, 5] = 0
    kept = [j for j in range(shape[1]) if j not in (3, 5)]
    parts = F.barlow_twins_components(z_a, z_b, eps=eps)
    fewer = F.barlow_twins_components(z_a[:, kept], z_b[:, kept], eps=eps)
    _, grad_a, grad_b = gradients(F.barlow_twins, z_a, z_b, eps=eps)
    assert float(parts.on_diagonal - fewer.on_diagonal) == pytest.approx(2, abs=1e-5)
    assert grad_a.isfinite().all() and grad_b.isfinite().all()
    if eps == 0:
        assert not grad_a[:, 3].any() and not grad_b[:, 5].any()


@BACKENDS
def test_zero_embeddings_have_correlation_zero(backend):
    z = torch.zeros(4, 6)
    assert float(F.barlow_twins(z, z)) == pytest.approx(6, rel=1e-6)


@ALL_BACKENDS
@pytest.mark.parametrize("shape", [(2, 1), (2, 9), (9, 1)], ids=str)
def test_smallest_sizes(shape, backend):
    z_a, z_b = views(*shape, noise=3.0)
    truth = gradients(ops.reference, z_a, z_b, eps=0.1)
    torch.testing.assert_close(gradients(F.barlow_twins, z_a, z_b, eps=0.1), truth, rtol=1e-9, atol=1e-12)


@BACKENDS
def test_nearly_equal_views_have_no_cancellation(backend):
    z_a, _ = views(90, 20, torch.float32)
    z_b = z_a * (1 + 1e-3 * torch.randn_like(z_a))
    truth = gradients(ops.reference, z_a, z_b, lambd=0.0, eps=0.0, dtype=torch.float64)
    ours = gradients(F.barlow_twins, z_a, z_b, lambd=0.0, eps=0.0)
    # 1 - c is 1e-6 here: subtracted in fp32 it would have three correct bits.
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=1e-4)
    assert relative_error(ours[1], truth[1]) < 1e-3


@BACKENDS
def test_nearly_decorrelated_features_have_no_cancellation(backend):
    z, _ = views(2048, 16)
    z = (torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(2048)).float()
    z[:, 1] += 1e-3 * z[:, 0]
    truth = float(ops.reference(z.double(), z.double(), lambd=1.0, eps=0.0))
    parts = F.barlow_twins_components(z, z, eps=0)
    # 2e-6, which the difference of two sums of 16 would not have in fp32.
    assert float(parts.off_diagonal) == pytest.approx(truth, rel=1e-3)


# Components and the module.


@ALL_BACKENDS
@SHAPES
def test_components(shape, backend):
    z_a, z_b = views(*shape)
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    c = a.T @ b / shape[0]
    off = c[~torch.eye(shape[1], dtype=torch.bool)]
    parts = F.barlow_twins_components(z_a.requires_grad_(), z_b, lambd=0.1)
    loss = F.barlow_twins(z_a, z_b, lambd=0.1)
    expected = (
        loss.detach(),
        (1 - c.diagonal()).square().sum(),
        off.square().sum(),
        c.diagonal().mean(),
        off.square().mean().sqrt(),
    )
    for x, y in zip(parts, expected, strict=True):
        assert not x.requires_grad and x.shape == ()
        assert float(x) == pytest.approx(float(y), rel=1e-9)


def test_one_feature_has_no_off_diagonal():
    parts = F.barlow_twins_components(*views(6, 1))
    assert float(parts.off_diagonal) == 0 and float(parts.off_diagonal_rms) == 0


def test_module():
    z_a, z_b = views(8, 30)
    loss = BarlowTwinsLoss(lambd=0.02, center=False, eps=1e-3)
    assert mmfast.BarlowTwinsLoss is BarlowTwinsLoss
    assert loss.last is None
    value = loss(z_a.requires_grad_(), z_b)
    assert torch.equal(value, F.barlow_twins(z_a, z_b, 0.02, center=False, eps=1e-3))
    assert loss.last == loss.components(z_a, z_b) and torch.equal(loss.last.loss, value.detach())
    assert not loss.last.on_diagonal.requires_grad
    assert not loss.state_dict() and not list(loss.parameters())
    options = "lambd=0.02, center=False, eps=0.001, variant='official', scale=1.0, "
    options += "debias=False, stats='global', grad_convention='true'"
    assert repr(loss) == f"BarlowTwinsLoss({options})"


# Refusals.

A = torch.arange(24.0).view(4, 6)
ROWS = "z_a must have at least 2 rows (a correlation over one sample is undefined), got "
TYPES = "z_a must be one of float32, float64, bfloat16, float16, got "
DENSE = "{} must be a dense tensor (torch.strided), got a tensor that is {}"
INVALID = [
    (TypeError, ([[1.0]], A), {}, "z_a must be a tensor, got list"),
    (TypeError, (A, None), {}, "z_b must be a tensor, got None"),
    (ValueError, (A[0], A), {}, "z_a must have shape (B, D), got (6,)"),
    (ValueError, (A[None], A[None]), {}, "z_a must have shape (B, D), got (1, 4, 6)"),
    (ValueError, (A, A[:, :5]), {}, "z_b must have the shape of z_a (4, 6), got (4, 5)"),
    (ValueError, (torch.zeros(1, 1000), torch.zeros(1, 1000)), {}, ROWS + "(1, 1000)"),
    (ValueError, (A[:0], A[:0]), {}, ROWS + "(0, 6)"),
    (ValueError, (A[:, :0], A[:, :0]), {}, "z_a must have at least 1 column, got (4, 0)"),
    (TypeError, (A, A.half()), {}, "z_b must have the dtype of z_a (torch.float32), got torch.float16"),
    (TypeError, (A.long(), A.long()), {}, TYPES + "int64"),
    (TypeError, (A.cfloat(), A.cfloat()), {}, TYPES + "complex64"),
    (ValueError, (A, A.to("meta")), {}, "z_b must be on the device of z_a (cpu), got meta"),
    (ValueError, (A, A), {"lambd": -1}, "lambd must be finite and at least 0, got -1"),
    (ValueError, (A, A), {"lambd": math.nan}, "lambd must be finite and at least 0, got nan"),
    (ValueError, (A, A), {"eps": -1e-5}, "eps must be finite and at least 0, got -1e-05"),
    (ValueError, (A, A), {"eps": math.inf}, "eps must be finite and at least 0, got inf"),
    (TypeError, (A, A), {"lambd": "0.1"}, "lambd must be a number, got '0.1'"),
    (TypeError, (A, A), {"lambd": nn.Parameter(torch.ones(()))}, "lambd must be a number, got Parameter"),
    (TypeError, (A, A), {"lambd": torch.tensor(0.1)}, "lambd must be a number, got Tensor"),
    (TypeError, (A, A), {"lambd": True}, "lambd must be a number, got True"),
    (TypeError, (A, A), {"eps": "1e-5"}, "eps must be a number, got '1e-5'"),
    (TypeError, (A, A), {"scale": "1"}, "scale must be a number, got '1'"),
    (TypeError, (A, A), {"center": "no"}, "center must be True or False, got 'no'"),
    (TypeError, (A, A), {"center": 0.025}, "center must be True or False, got 0.025"),
    (TypeError, (A, A), {"debias": "no"}, "debias must be True or False, got 'no'"),
    (TypeError, (A, A), {"debias": 0}, "debias must be True or False, got 0"),
    (TypeError, (A.to_sparse(), A), {}, DENSE.format("z_a", "torch.sparse_coo")),
    (TypeError, (A.to_mkldnn(), A), {}, DENSE.format("z_a", "torch._mkldnn")),
    (
        TypeError,
        (A, torch.nested.nested_tensor([*A], layout=torch.jagged)),
        {},
        DENSE.format("z_b", "nested"),
    ),
]


@pytest.mark.parametrize(("error", "arguments", "options", "message"), INVALID, ids=[x[3] for x in INVALID])
def test_invalid_arguments(error, arguments, options, message):
    with pytest.raises(error) as caught:
        F.barlow_twins(*arguments, **options)
    assert str(caught.value) == f"barlow_twins: {message}"


OPTIONS = [
    ({"lambd": math.nan}, "lambd must be finite and at least 0, got nan"),
    ({"lambd": "0.1"}, "lambd must be a number, got '0.1'"),
    ({"debias": "no"}, "debias must be True or False, got 'no'"),
    ({"center": "no"}, "center must be True or False, got 'no'"),
]


@pytest.mark.parametrize("module", [BarlowTwinsLoss, MultiViewBarlowTwinsLoss])
@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[x[1] for x in OPTIONS])
def test_invalid_options_of_the_modules(module, options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        module(**options)
    assert str(caught.value) == f"barlow_twins: {message}"


def test_numbers_of_any_kind_are_options():
    z_a, z_b = views(6, 9)
    ours = F.barlow_twins(z_a, z_b, np.float32(0.5), eps=Fraction(1, 4), scale=np.int64(2))
    assert torch.equal(ours, F.barlow_twins(z_a, z_b, 0.5, eps=0.25, scale=2.0))
    assert BarlowTwinsLoss(np.float64(0.5)).lambd == 0.5 and BarlowTwinsLoss(center=np.False_).center is False


def test_an_option_that_is_set_later_is_looked_at():
    loss = BarlowTwinsLoss()
    loss.lambd = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(TypeError, match="barlow_twins: lambd must be a number, got Parameter"):
        loss(*views(6, 9))


@pytest.mark.rotation
@ALL_BACKENDS
@SHAPES
@CENTER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_are_named(bad, dtype, center, shape, backend):
    z_a, z_b = views(*shape, dtype)
    z_b[2, 7] = z_b[5, 3] = bad
    message = rf"^barlow_twins: z_b must be finite, got 2 .* \({bad}\) in row 2, column 7$"
    if z_b.is_cuda:
        assert F.barlow_twins(z_a, z_b, center=center).isnan()
        return
    with pytest.raises(mmfast.UserError, match=message):
        F.barlow_twins(z_a, z_b, center=center)


@BACKENDS
@CENTER
def test_a_variance_out_of_range_is_named(center, backend):
    z_a, z_b = views(6, 4, torch.float32)
    z_b[1:, 2] = 3e25
    if z_b.is_cuda:
        assert F.barlow_twins(z_a, z_b, center=center).isnan()
        return
    with pytest.raises(mmfast.UserError, match=r"z_b must .* up to 3e\+25$"):
        F.barlow_twins(z_a, z_b, center=center)


@BACKENDS
@FORMS
@pytest.mark.parametrize("rows", [6, 600], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e25])
def test_the_loss_shows_what_nobody_waits_to_look_at(bad, rows, gram, backend):
    """Kernels report nothing: on a GPU, columns that are not finite make the loss NaN."""
    if backend[0] == "cpu":
        pytest.skip("these kernels do report it")
    z_a, z_b = views(rows, 5, torch.float32)
    z_b[1:, 2] = bad
    definition = Definition(lambd=0.01)
    hat, statistics = passes().standardise(z_a, z_b, definition, False)
    assert statistics[[1, 2], 2].isnan().all() and statistics[:, [0, 1, 3, 4]].isfinite().all()
    if gram:
        loss, _ = passes().gram_loss(gram_matrices(hat), statistics, definition)
    else:
        loss, _ = passes().correlation_loss(product(hat[0].T, hat[1].T), rows, statistics, definition)
    assert loss.isnan()


# Learning.


def test_training_follows_the_reference():
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 20, generator=generator)
    noise = torch.randn(30, 2, 64, 20, generator=generator) * 0.3

    def curve(loss):
        torch.manual_seed(2)
        model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 120))
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for step in noise:
            value = loss(model(data + step[0]), model(data + step[1]))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(value.item())
        return losses

    ours, reference = curve(F.barlow_twins), curve(ops.reference)
    assert ours[-1] < 0.7 * ours[0]
    # Adam magnifies rounding differences a little from step to step.
    assert ours == pytest.approx(reference, rel=1e-3)
    assert ours[:3] == pytest.approx(reference[:3], rel=1e-5)
