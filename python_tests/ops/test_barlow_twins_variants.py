"""The published variants of the Barlow Twins loss against their formulas in fp64, and against their projects."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from barlow_twins_formulas import FORMULAS, gradients, relative_error, views
from barlow_twins_help import FORMS, request_of, settings_of
from targets import ALL_BACKENDS, BACKENDS, BACKENDS_IN_TURN

import mmfast
from mmfast import functional as F
from mmfast.losses import BarlowTwinsLoss
from mmfast.losses.barlow_twins import evaluate_barlow_twins
from mmfast.ops.barlow_twins import op as ops

VARIANTS = pytest.mark.parametrize("variant", list(FORMULAS))
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}


def op(variant, gram=None, **given):
    options = settings_of(variant, **given)
    return lambda a, b: evaluate_barlow_twins(a, b, request_of(options), gram=gram)[0]


def test_every_formula_has_a_name():
    assert list(FORMULAS) == list(F.BARLOW_TWINS_VARIANTS)


@pytest.mark.rotation
@ALL_BACKENDS
@FORMS
@VARIANTS
def test_values_and_gradients(variant, gram, backend):
    for shape in ((2, 5), (12, 50), (40, 17)):
        z_a, z_b = views(*shape)
        truth = gradients(FORMULAS[variant], z_a, z_b, -2.5)
        for dtype, tolerance in TOLERANCES.items():
            ours = gradients(op(variant, gram), z_a, z_b, -2.5, dtype)
            assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
            if shape[0] == 2:
                # With two rows â is a sign whatever z is, up to eps: gradients are what is left of large terms.
                size = sum(float(z.abs().max()) for z in (z_a, z_b)) + float(truth[0])
                assert all((x - y).norm() < tolerance * 100 * size for x, y in zip(ours, truth, strict=True))
            else:
                errors = [relative_error(x, y) for x, y in zip(ours[1:], truth[1:], strict=True)]
                assert max(errors) < 2 * tolerance, errors


@VARIANTS
def test_the_reference(variant):
    options = settings_of(variant)
    for shape in ((12, 50), (40, 17)):
        z = views(*shape)
        truth = gradients(FORMULAS[variant], *z)
        ours = gradients(lambda a, b: ops.reference(a, b, **options), *z)
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.rotation
@BACKENDS
@FORMS
@VARIANTS
def test_gradcheck(variant, gram, backend):
    z_a, z_b = (z.double().requires_grad_() for z in views(6, 5))
    assert torch.autograd.gradcheck(op(variant, gram, lambd=0.3), (z_a, z_b))


@BACKENDS_IN_TURN
@VARIANTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_embeddings(dtype, variant, backend):
    if backend == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")
    z_a, z_b = (z.to(dtype) for z in views(24, 60))
    truth = gradients(FORMULAS[variant], z_a, z_b)
    ours = gradients(op(variant), z_a, z_b, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert all(relative_error(x, y) < eps for x, y in zip(ours, truth, strict=True))


@BACKENDS
@VARIANTS
def test_more_rows_than_one_block(variant, backend):
    z_a, z_b = views(600, 20)
    truth = gradients(FORMULAS[variant], z_a, z_b)
    ours = gradients(op(variant), z_a, z_b, dtype=torch.float32)
    assert all(relative_error(x, y) < 4e-6 for x, y in zip(ours, truth, strict=True))


@BACKENDS_IN_TURN
@FORMS
@VARIANTS
def test_constant_columns_correlate_with_nothing(variant, gram, backend):
    z_a, z_b = views(20, 12)
    z_a[:, 3] = 1234.5
    z_b[:, 5] = 0
    if variant == "vissl":
        # Pooled, it is constant only if it is so in both views.
        z_b[:, 3], z_a[:, 5] = 1234.5, 0
    ours = gradients(op(variant, gram), z_a, z_b, dtype=torch.float32)
    assert all(x.isfinite().all() for x in ours)
    if variant == "lightning":
        # 0 / 0 in the formula; here what it is with an eps that is next to nothing.
        truth = FORMULAS["catalyst"](z_a.double(), z_b.double(), 5e-3)
        assert float(ours[0]) == pytest.approx(float(truth), rel=2e-6)
        assert not ours[1][:, 3].any() and not ours[2][:, 5].any()
        return
    truth = FORMULAS[variant](z_a.double(), z_b.double())
    assert float(ours[0]) == pytest.approx(float(truth), rel=2e-6)
    if variant in ("monai", "stable-pretraining"):
        # torch.std has no derivative at zero; the gradient of the other columns is the formula's.
        z_a, z_b = (z + 1e-9 * torch.randn_like(z.double()) for z in (z_a, z_b))
    truth = gradients(FORMULAS[variant], z_a, z_b)
    assert all(relative_error(x, y) < 2e-2 for x, y in zip(ours[1:], truth[1:], strict=True))


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dead", ["some", "all"])
def test_thesis_is_exact_where_its_target_is_met(dead, gram, backend):
    """1 / B, which is nearly nothing: c = 0 of constant columns must not come out of a difference of ones."""
    rows = 200 if backend == ("triton", "cpu") else 600
    z_a, z_b = views(rows, 8)
    z_a[:, 3], z_b[:, 5] = 1234.5, 0
    if dead == "all":
        z_a, z_b = z_a[:1].expand(rows, 8), z_b[:1].expand(rows, 8)
    truth = gradients(FORMULAS["thesis"], z_a, z_b)
    ours = gradients(op("thesis", gram), z_a, z_b, dtype=torch.float32)
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=2e-6)
    if dead == "all":
        assert not ours[1].any() and not ours[2].any()
    else:
        assert all(relative_error(x, y) < 4e-6 for x, y in zip(ours[1:], truth[1:], strict=True))


@pytest.mark.parametrize("present", [False, True], ids=["complete", "present"])
def test_thesis_is_exact_where_its_target_is_met_by_many_views(present):
    z = [torch.ones(600, 8), torch.ones(600, 8), torch.zeros(600, 8)]
    has = torch.ones(600, 3, dtype=torch.bool) if present else None
    assert float(F.multi_view_barlow_twins(z, has, variant="thesis")) == pytest.approx(3 * 8, rel=1e-7)
    assert float(F.barlow_twins(*z[:2], variant="thesis", debias=True)) == pytest.approx(8, rel=1e-7)


def changed(name, z_a, z_b):
    if name == "shifted":
        return z_a, z_b + 5
    if name == "scaled":
        return z_a, z_b * 10
    if name == "small":
        return z_a * 1e-3, z_b * 1e-3
    if name == "far":
        return z_a + 1e4, z_b + 1e4
    z_b = z_b.clone()
    z_b[:, 7] = 1.0
    return z_a, z_b


@VARIANTS
@pytest.mark.parametrize("case", ["shifted", "scaled", "small", "far", "constant"])
def test_what_each_variant_makes_of_other_inputs(variant, case):
    """Each is what its formula is, also where that is no good; and which are invariant to what."""
    z_a, z_b = (z.double() for z in views(64, 128, noise=0.3))
    plain = float(F.barlow_twins(z_a, z_b, variant=variant))
    z_a, z_b = changed(case, z_a, z_b)
    loss = float(F.barlow_twins(z_a, z_b, variant=variant))
    if not (case == "constant" and variant == "lightning"):
        assert loss == pytest.approx(float(FORMULAS[variant](z_a, z_b)), rel=1e-6 if case == "far" else 1e-10)
    single = float(F.barlow_twins(z_a.float(), z_b.float(), variant=variant))
    assert single == pytest.approx(loss, rel=1e-2 if case == "far" else 1e-5)
    if case in ("shifted", "scaled"):
        if variant == "vissl":
            assert loss > 10 * plain
        else:
            assert loss == pytest.approx(plain, rel=1e-3)
    elif case == "small":
        # eps = 1e-5 under the root is more than the variance; beside the deviation it is little.
        under_the_root = variant in ("official", "lightly", "solo", "vissl")
        assert (loss > 10 * plain) == under_the_root
        assert variant == "thesis" or under_the_root or loss == pytest.approx(plain, rel=0.3)
    elif case == "far":
        assert loss == pytest.approx(plain, rel=1e-6)
    elif variant != "vissl":
        parts = F.barlow_twins_components(z_a, z_b, variant=variant)
        assert float(parts.mean_diagonal) < 127 / 128


@VARIANTS
def test_identical_views(variant):
    """With unbiased variances c_ii = 1 - 1 / B, and the loss knows it to all digits of fp32."""
    z, _ = views(4000, 3)
    parts = F.barlow_twins_components(z, z, variant=variant, lambd=0.0, eps=0.0)
    options = settings_of(variant)
    if options.get("unbiased"):
        assert float(parts.on_diagonal) == pytest.approx(3 / 4000**2, rel=1e-5)
    elif variant == "thesis":
        assert float(parts.loss) == pytest.approx(3 * 3999**2, rel=1e-6)
    else:
        assert float(parts.on_diagonal) < 1e-12


@pytest.mark.parametrize("variant", ["monai", "stable-pretraining"])
def test_nearly_equal_views_have_no_cancellation(variant):
    z_a, _ = views(90, 20)
    z_b = z_a * (1 + 1e-3 * torch.randn_like(z_a))
    ours = gradients(op(variant, lambd=0.0), z_a, z_b, dtype=torch.float32)
    truth = gradients(lambda a, b: FORMULAS[variant](a, b, 0.0), z_a, z_b)
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=1e-5)
    assert relative_error(ours[1], truth[1]) < 1e-3


@VARIANTS
def test_components_and_module(variant):
    z_a, z_b = (z.double() for z in views(10, 30))
    loss = BarlowTwinsLoss(variant=variant)
    value = loss(z_a.requires_grad_(), z_b).detach()
    assert torch.equal(value, F.barlow_twins(z_a.detach(), z_b, variant=variant))
    parts = loss.components(z_a, z_b)
    assert loss.last == parts and torch.equal(parts.loss, value)
    scale = loss.scale * (100 if variant == "thesis" else 1)
    combined = scale * (parts.on_diagonal + loss.lambd * parts.off_diagonal)
    assert float(combined) == pytest.approx(float(value), rel=1e-12)
    if variant == "thesis":
        official = F.barlow_twins_components(z_a, z_b)
        torch.testing.assert_close(parts[2:], official[2:], rtol=1e-12, atol=0)
    assert f"variant='{variant}'" in repr(loss)


@VARIANTS
def test_what_is_given_goes_before_the_variant(variant):
    z_a, z_b = views(9, 20)
    scale = settings_of(variant)["scale"]
    truth = float(FORMULAS[variant](z_a.double(), z_b.double(), 0.7)) / scale * 3
    assert float(F.barlow_twins(z_a, z_b, lambd=0.7, variant=variant, scale=3)) == pytest.approx(
        truth, rel=3e-6
    )
    loss = BarlowTwinsLoss(variant=variant, lambd=0.1)
    loss.lambd, loss.scale = 0.7, 3
    assert float(loss(z_a, z_b)) == pytest.approx(truth, rel=3e-6)
    assert float(F.barlow_twins(z_a, z_b, eps=1.0, variant=variant)) != pytest.approx(
        float(F.barlow_twins(z_a, z_b, variant=variant)), rel=1e-3
    )


@pytest.mark.rotation
@pytest.mark.parametrize("variant", ["vissl", "monai", "thesis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph_gives_the_same_bits(dtype, variant):
    torch.compiler.reset()
    loss = BarlowTwinsLoss(variant=variant)
    compiled = torch.compile(lambda a, b: 2 * loss(a, b), fullgraph=True, backend="aot_eager")
    for shape in ((10, 40), (40, 10)):
        z_a, z_b = views(*shape)
        expected = gradients(lambda a, b: 2 * loss(a, b), z_a, z_b, dtype=dtype)
        ours = gradients(compiled, z_a, z_b, dtype=dtype)
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    if variant == "vissl":
        # Of PyTorch's operations, which do not look.
        assert compiled(z_a * math.nan, z_b).isnan()
        return
    with pytest.raises(mmfast.UserError, match="must be finite"):
        compiled(z_a * math.nan, z_b)


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
def test_embeddings_that_are_not_standardised(center, gram, backend):
    z_a, z_b = views(12, 30)
    options = {"lambd": 0.2, "center": center, "normalise": False}
    truth = gradients(lambda a, b: ops.reference(a, b, **options), z_a, z_b, -1.5)
    for dtype, tolerance in TOLERANCES.items():
        ours = gradients(
            lambda a, b: evaluate_barlow_twins(a, b, request_of(options), gram=gram)[0], z_a, z_b, -1.5, dtype
        )
        assert all(relative_error(x, y) < 2 * tolerance for x, y in zip(ours, truth, strict=True))


@pytest.mark.parametrize("eps_outside", [True, False], ids=["outside", "inside"])
@pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])
@pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("normalise", [True, False], ids=["standardised", "as it is"])
def test_pooled_statistics_of_any_kind(normalise, center, unbiased, eps_outside):
    options = {"eps": 0.1, "center": center, "unbiased": unbiased, "eps_outside": eps_outside}
    options |= {"normalise": normalise, "pooled": True}
    z_a, z_b = views(12, 7)
    truth = gradients(lambda a, b: ops.reference(a, b, **options), z_a, z_b)
    ours = gradients(lambda a, b: evaluate_barlow_twins(a, b, request_of(options))[0], z_a, z_b)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_pooled_constant_columns(eps):
    z_a, z_b = (z.double() for z in views(12, 7))
    z_a[:, 2] = z_b[:, 2] = 1e3
    loss, grad_a, _ = gradients(op("vissl", eps=eps, scale=1), z_a, z_b)
    kept = [0, 1, 3, 4, 5, 6]
    fewer = F.barlow_twins(z_a[:, kept], z_b[:, kept], variant="vissl", eps=eps, scale=1)
    assert float(loss) == pytest.approx(1 + float(fewer), rel=1e-12)
    assert grad_a.isfinite().all() and (eps > 0 or not grad_a[:, 2].any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e25])
def test_pooled_embeddings_that_are_not_finite_are_named(bad):
    z_a, z_b = views(6, 4)
    z_b[1:, 2] = bad
    with pytest.raises(mmfast.UserError, match=r"^barlow_twins: z_b must"):
        F.barlow_twins(z_a, z_b, variant="vissl")


@pytest.mark.parametrize("variant", ["Official", None, 3, ["solo"]])
def test_an_unknown_variant_is_told_the_choices(variant):
    message = (
        "barlow_twins: variant must be one of official, lightly, solo, vissl, monai, catalyst, "
        f"stable-pretraining, lightning, thesis, got {variant!r}"
    )
    for call in (
        lambda: BarlowTwinsLoss(variant=variant),
        lambda: F.barlow_twins(*views(3, 4), variant=variant),
        lambda: F.barlow_twins_components(*views(3, 4), variant=variant),
    ):
        with pytest.raises(mmfast.UserError) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_a_scale_out_of_range(scale):
    with pytest.raises(ValueError, match=r"^barlow_twins: scale must be finite and at least 0, got "):
        BarlowTwinsLoss(scale=scale)
    with pytest.raises(ValueError, match=r"^barlow_twins: scale must be finite and at least 0, got "):
        F.barlow_twins(*views(3, 4), scale=scale)


# Peers where they are installed (lightly: test_adapters.py). Their files are loaded alone: packages import much.

# Package: file, its loss, and what it can be compared in: monai's lambd is float32, solo's statistics are.
PEERS = {
    "monai": ("losses/barlow_twins.py", lambda m: m.BarlowTwinsLoss(), torch.float64, 1e-7),
    "solo": ("losses/barlow.py", lambda m: m.barlow_loss_func, torch.float32, 4e-6),
    "catalyst": ("contrib/losses/contrastive.py", lambda m: m.BarlowTwinsLoss(), torch.float64, 1e-11),
}


@pytest.mark.parametrize("shape", [(12, 50), (40, 17)], ids=str)
@pytest.mark.parametrize("variant", PEERS)
def test_peers_themselves(shape, variant):
    package = importlib.util.find_spec(variant)
    if package is None:
        pytest.skip(f"{variant} is not installed")
    file, loss, dtype, tolerance = PEERS[variant]
    path = Path(package.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{variant}_barlow_twins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    z = views(*shape)
    truth = gradients(loss(module), *z, -2.0, dtype)
    ours = gradients(op(variant), *z, -2.0, dtype)
    assert float(ours[0]) == pytest.approx(float(truth[0]), rel=tolerance)
    assert all(relative_error(x, y) < 10 * tolerance for x, y in zip(ours[1:], truth[1:], strict=True))
