"""What the definition implies, for every published variant of the Barlow Twins loss.

Values, dtypes, forms and refusals are tested beside the loss and its variants: here is what holds for all of them.
"""

import math

import pytest
import torch
from barlow_twins_formulas import FORMULAS, gradients, relative_error, views
from barlow_twins_help import settings_of
from targets import BACKENDS

from mmfast import functional as F

VARIANTS = pytest.mark.parametrize("variant", list(FORMULAS))
# On both sides of the choice of form.
SHAPES = pytest.mark.parametrize("shape", [(12, 50), (40, 17)], ids=str)
# The root over the variance plus eps, or the deviation plus eps: the power of a scale that eps goes with.
POWER = {name: 1 if name in ("monai", "stable-pretraining") else 2 for name in FORMULAS}
UNBIASED = [name for name in FORMULAS if settings_of(name).get("unbiased")]


def loss_of(variant, **options):
    return lambda a, b: F.barlow_twins(a, b, variant=variant, **options)


def same(ours, truth, tolerance):
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    for x, y in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(x, y) < 10 * tolerance


def double(*shape, **options):
    return tuple(z.double() for z in views(*shape, **options))


# 1. The definition.


def by_hand(z_a, z_b, variant):
    """Loops over Python's floats."""
    options = {"eps_outside": False, "unbiased": False, "divide": True, "pooled": False}
    options |= settings_of(variant)
    rows = len(z_a)
    columns = [z_a.double().T.tolist(), z_b.double().T.tolist()]

    def moments(x):
        mean = math.fsum(x) / len(x)
        variance = math.fsum((y - mean) ** 2 for y in x) / (len(x) - options["unbiased"])
        eps = options["eps"]
        return mean, math.sqrt(variance) + eps if options["eps_outside"] else math.sqrt(variance + eps)

    hats = []
    for view in columns:
        hats.append([])
        for i, x in enumerate(view):
            mean, divisor = moments(columns[0][i] + columns[1][i] if options["pooled"] else x)
            hats[-1].append([(y - mean) / divisor for y in x])
    loss = 0.0
    for i, x in enumerate(hats[0]):
        for j, y in enumerate(hats[1]):
            c = math.fsum(p * q for p, q in zip(x, y, strict=True)) / (rows if options["divide"] else 1)
            loss += (1 - c) ** 2 if i == j else options["lambd"] * c**2
    return options["scale"] * loss


@BACKENDS
@VARIANTS
@pytest.mark.parametrize("shape", [(2, 1), (2, 6), (6, 1), (9, 14), (14, 9)], ids=str)
def test_the_definition_written_out(shape, variant, backend):
    z_a, z_b = views(*shape)
    truth = by_hand(z_a, z_b, variant)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 4e-6)):
        loss = F.barlow_twins(z_a.to(dtype), z_b.to(dtype), variant=variant)
        # Where views agree the loss is what rounding leaves of 1 - c.
        assert float(loss) == pytest.approx(truth, rel=tolerance, abs=tolerance * 1e-2)


# 2. Gradients.


@VARIANTS
@SHAPES
def test_one_view_may_need_no_gradient(shape, variant):
    z_a, z_b = views(*shape)
    truth = gradients(FORMULAS[variant], z_a, z_b)
    for index in range(2):
        z = [x.double().requires_grad_(i == index) for i, x in enumerate((z_a, z_b))]
        F.barlow_twins(*z, variant=variant).backward()
        assert z[1 - index].grad is None
        assert relative_error(z[index].grad, truth[1 + index]) < 1e-11


@VARIANTS
def test_losses_within_one_graph(variant):
    """A vector of upstream gradients, inputs that are used again, and a second backward."""
    z_a, z_b = (z.requires_grad_() for z in double(12, 50))
    _, grad_a, grad_b = gradients(FORMULAS[variant], z_a, z_b)
    first = F.barlow_twins(z_a, z_b, variant=variant)
    losses = torch.stack([first, F.barlow_twins(z_b, z_a, variant=variant), first * 0.5])
    upstream = torch.tensor([2.0, -3.0, 4.0], dtype=torch.float64)
    losses.backward(upstream, retain_graph=True)
    assert relative_error(z_a.grad, grad_a) < 1e-11 and relative_error(z_b.grad, grad_b) < 1e-11
    losses.backward(upstream)
    assert relative_error(z_a.grad, 2 * grad_a) < 1e-11 and relative_error(z_b.grad, 2 * grad_b) < 1e-11


# 3. Metamorphic relations.


@VARIANTS
@SHAPES
def test_affine_maps_of_features(shape, variant):
    z_a, z_b = double(*shape)
    scale = torch.linspace(0.5, 20, shape[1], dtype=torch.float64)
    offset = torch.linspace(-50, 80, shape[1], dtype=torch.float64)
    plain = gradients(loss_of(variant, eps=0.0), z_a, z_b)
    # Pooled statistics undo what is done to both views alike only.
    mapped = z_a * scale + offset, (z_b * scale + offset if variant == "vissl" else z_b * 3 - 1)
    loss, grad_a, grad_b = gradients(loss_of(variant, eps=0.0), *mapped)
    other = scale if variant == "vissl" else 3
    same((loss, grad_a * scale, grad_b * other), plain, 1e-10)


@BACKENDS
@VARIANTS
@SHAPES
def test_permutations_of_rows_and_features(shape, variant, backend):
    z_a, z_b = double(*shape)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a, z_b)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    permuted = gradients(loss_of(variant), z_a[rows][:, columns], z_b[rows][:, columns])
    same(permuted, (loss, grad_a[rows][:, columns], grad_b[rows][:, columns]), 1e-11)


@BACKENDS
@VARIANTS
@SHAPES
def test_views_may_be_exchanged(shape, variant, backend):
    z_a, z_b = double(*shape)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a, z_b)
    same(gradients(loss_of(variant), z_b, z_a), (loss, grad_b, grad_a), 1e-11)


@VARIANTS
@SHAPES
def test_repeated_rows(shape, variant):
    """They leave C as it is, but for the rows that unbiased variances are told of."""
    z_a, z_b = double(*shape)
    once, twice = (
        F.barlow_twins_components(z_a.repeat(n, 1), z_b.repeat(n, 1), variant=variant, eps=0.0)
        for n in (1, 2)
    )
    rows = shape[0]
    factor = (2 * rows - 1) / (2 * rows - 2) if variant in UNBIASED else 1
    assert float(twice.mean_diagonal) == pytest.approx(factor * float(once.mean_diagonal), rel=1e-11)
    assert float(twice.off_diagonal) == pytest.approx(factor**2 * float(once.off_diagonal), rel=1e-10)
    if variant == "thesis":
        # The one whose loss knows B: of the same C it is another.
        assert float(twice.loss) > 3 * float(once.loss)
    elif factor == 1:
        assert float(twice.loss) == pytest.approx(float(once.loss), rel=1e-11)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_scale_is_another_eps(shape, scale, variant, backend):
    """L(s z; eps) is L(z; eps / s) of deviations, L(z; eps / s^2) of variances, and s times the gradient its."""
    z_a, z_b = double(*shape)
    eps = settings_of(variant)["eps"]
    truth = gradients(loss_of(variant, eps=eps / scale ** POWER[variant]), z_a, z_b)
    loss, grad_a, grad_b = gradients(loss_of(variant), z_a * scale, z_b * scale)
    same((loss, grad_a * scale, grad_b * scale), truth, 1e-10)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scale_and_offset_cost_single_precision_nothing(shape, scale, offset, variant, backend):
    z_a, z_b = (z * scale + offset for z in views(*shape))
    truth = gradients(FORMULAS[variant], z_a, z_b)
    ours = gradients(loss_of(variant), z_a, z_b, dtype=torch.float32)
    if variant == "lightning" and (scale, offset) == (1e-3, 1e4):
        # At 1e4 fp32 has steps of 1e-3: features are a few of these, or constant, where the formula is 0 / 0.
        assert all(x.isfinite().all() for x in ours)
        return
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=4e-6)
    assert all(relative_error(x, y) < 4e-5 for x, y in zip(ours[1:], truth[1:], strict=True))


@BACKENDS
@VARIANTS
@SHAPES
def test_a_row_of_zeros_is_a_row(shape, variant, backend):
    z_a, z_b = (z + 3 for z in views(*shape))
    z_a[4] = 0
    same(
        gradients(loss_of(variant), z_a, z_b, dtype=torch.float32),
        gradients(FORMULAS[variant], z_a, z_b),
        4e-6,
    )


@BACKENDS
@VARIANTS
def test_embeddings_of_zeros(variant, backend):
    z = torch.zeros(4, 6)
    loss, *grads = gradients(loss_of(variant), z, z, dtype=torch.float32)
    # On the diagonal 1 - 0, times B^2 (1 / B)^2 where C is not divided.
    assert float(loss) == pytest.approx(6 * settings_of(variant)["scale"], rel=1e-6)
    assert not any(g.any() for g in grads)


@BACKENDS
@VARIANTS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_alignment_do_not_matter(shape, dtype, variant, backend):
    z = [x.to(dtype) for x in views(*shape)]
    rows, columns = shape
    plain = gradients(loss_of(variant), *z, dtype=dtype)

    def inside(x, row_step, column_step):
        """x as a slice of a buffer that is NaN everywhere else, at an odd address."""
        buffer = torch.full((rows * row_step + 5, columns * column_step + 7), math.nan, dtype=dtype)
        return buffer[3:, 5:][: rows * row_step : row_step, : columns * column_step : column_step].copy_(x)

    for a, b in (
        (inside(z[0], 1, 1), inside(z[1], 3, 1)),
        (inside(z[0], 2, 2), z[1].T.contiguous().T),
    ):
        a, b = a.requires_grad_(), b.requires_grad_()
        loss = F.barlow_twins(a, b, variant=variant)
        loss.backward()
        ours = [x.double() for x in (loss.detach(), a.grad, b.grad)]
        if variant == "vissl":
            # Statistics of both views together are PyTorch's sums, whose order goes by the strides.
            same(ours, plain, torch.finfo(dtype).eps)
        else:
            assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))
