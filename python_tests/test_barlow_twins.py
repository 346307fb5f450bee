"""The Barlow Twins loss: definition, gradients, invariances, contracts and refusals."""

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import KERNELS, on, usable
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import backends
from mmfast import functional as F
from mmfast.losses import BarlowTwinsLoss
from mmfast.ops import barlow_twins as ops
from mmfast.ops.barlow_twins_passes import Cpu, Definition, _native, compute_dtype, passes_for
from mmfast.ops.native import call_cuda, dtype_code
from mmfast.ops.products import gram_matrices, matmul, product

# cuBLAS refuses the deterministic mode of `poisoned_memory` without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
WHY_NOT = backends.why_not("cpu", "cpu")
native = pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)
TRITON = [("triton", "cpu")] if usable("triton", "cpu") and find_spec("mmfast.triton") else []
TARGETS = [*KERNELS, ("reference", "cpu")]
# The fixture of that name: everything in the test is made on the device of, and served by, each target.
BACKENDS = pytest.mark.parametrize("backend", TARGETS, ids="-".join, indirect=True)
# What has tests of its own elsewhere takes part where backends meet the op, for Triton's interpreter is slow.
ALL_BACKENDS = pytest.mark.parametrize("backend", [*TARGETS, *TRITON], ids="-".join, indirect=True)
CUDA = pytest.mark.parametrize("backend", [t for t in TARGETS if t[0] == "cuda"], ids="-".join, indirect=True)
needs_gpu = pytest.mark.skipif(("cuda", "cuda") not in TARGETS, reason="no CUDA kernels for a GPU here")
FORMS = pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
CENTER = pytest.mark.parametrize("center", [True, False], ids=["centred", "raw"])
# On both sides of the choice of form.
SHAPES = pytest.mark.parametrize("shape", [(20, 90), (90, 20)], ids=str)
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(request):
    with on(request.param):
        yield request.param


def views(rows, columns, dtype=torch.float64, seed=0, noise=0.5):
    """Two embeddings that agree up to noise, and whose features are correlated."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    mix = normal(columns, columns)
    z = normal(rows, columns) @ mix
    other = z + noise * mix.norm(dim=0) * normal(rows, columns)
    return tuple(x.to(torch.get_default_device(), dtype) for x in (z, other))


def is_narrow(dtype):
    return ops._narrow(dtype, torch.get_default_device())


def skip_where_bfloat16_is_not_rounded(backend, dtype):
    if backend == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off")


def passes():
    return passes_for(torch.get_default_device(), narrow=False)


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


def gradients(function, z_a, z_b, upstream=1.0, dtype=None, **options):
    """(loss, gradients of both views), in float64."""
    z_a, z_b = (z.detach().to(dtype or z.dtype).requires_grad_() for z in (z_a, z_b))
    result = function(z_a, z_b, **options)
    loss = result[0] if isinstance(result, tuple) else result
    (upstream * loss).backward()
    return loss.detach().double(), z_a.grad.double(), z_b.grad.double()


def relative_error(x, truth):
    return float((x.double() - truth.double()).norm() / truth.double().norm())


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


# Memory.


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHAPES
def test_layout_does_not_matter_and_nothing_else_is_read(shape, dtype, backend):
    z_a, z_b = views(*shape, dtype)
    rows, columns = shape

    def inside(z, row_step, column_step):
        """z as a slice of a buffer that is NaN everywhere else."""
        buffer = torch.full((rows * row_step + 5, columns * column_step + 7), math.nan, dtype=dtype)
        place = buffer[3 : 3 + rows * row_step : row_step, 5 : 5 + columns * column_step : column_step]
        return place.copy_(z)

    plain = gradients(F.barlow_twins, z_a, z_b)
    for a, b in (
        (inside(z_a, 1, 1), inside(z_b, 3, 1)),
        (inside(z_a, 2, 2), z_b.T.contiguous().T),
    ):
        a, b = (z.detach().requires_grad_() for z in (a, b))
        loss = F.barlow_twins(a, b)
        loss.backward()
        assert torch.equal(loss.double(), plain[0])
        assert torch.equal(a.grad.double(), plain[1]) and torch.equal(b.grad.double(), plain[2])


@BACKENDS
def test_a_broadcast_row_is_constant_columns(backend):
    z = torch.randn(1, 12).expand(5, 12)
    assert float(F.barlow_twins(z, torch.randn(5, 12))) == pytest.approx(12, rel=1e-6)


@native
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_write_only_their_outputs(dtype, gram):
    """Every output lies between red zones of a sentinel value."""
    rows, columns, zone = 27, 83, 64
    buffers = []

    def guarded(*shape, dtype=torch.float32):
        buffers.append(torch.full((math.prod(shape) + 2 * zone,), 7.5, dtype=dtype))
        return buffers[-1][zone:-zone].view(shape)

    definition = _native(Definition(lambd=0.01))

    def call(name, *arguments):
        addresses = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        return getattr(backends._C, name)(*addresses, 2)

    z_a, z_b = views(rows, columns, dtype)
    code = dtype_code("test", "z_a", z_a)
    hat, statistics = guarded(2, rows, columns), guarded(5, columns)
    sizes = (rows, columns)
    embeddings = (code, z_a, columns, z_b, columns, *sizes, definition)
    assert call("barlow_twins_standardise", *embeddings, hat, statistics) == 0
    loss, components = guarded(), guarded(5)
    if gram:
        kept = guarded(2, rows, rows)
        again = [x.clone() for x in (hat, statistics)]
        hat.zero_(), statistics.zero_()
        results = (hat, kept, statistics, loss, components)
        assert call("barlow_twins_gram_forward", *embeddings, True, True, *results) == 0
        assert all(map(torch.equal, (hat, statistics), again))
        torch.testing.assert_close(kept, hat @ hat.mT)
        assert torch.equal(kept, kept.mT)
        matrices = kept[1], kept[0]
    else:
        p = guarded(columns, columns).copy_(hat[0].T @ hat[1])
        call("barlow_twins_correlation_energy", False, p, statistics, *sizes, definition, loss, components)
        assert not p.diagonal().any()
        matrices = [hat[1] @ p.T, hat[0] @ p]
    assert float(loss) == pytest.approx(float(ops.reference(z_a, z_b, 0.01)), rel=1e-5)
    grads = [guarded(rows, columns, dtype=dtype) for _ in range(2)]
    call("barlow_twins_backward", code, gram, *matrices, hat, statistics, loss, *sizes, definition, *grads)
    for buffer in buffers:
        assert (buffer[:zone] == 7.5).all() and (buffer[-zone:] == 7.5).all()


# Repeatability.


@native
@pytest.mark.parametrize("isa", backends._C.isas() if backends._C else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    previous = backends._C.use_isa(isa)
    try:
        for shape in ((5, 77), (70, 9), (3, 33), (2, 1)):
            z_a, z_b = views(*shape, dtype, noise=2.0)
            truth = gradients(ops.reference, z_a, z_b, dtype=torch.float64, eps=1e-2)
            plain = gradients(ops.reference, z_a, z_b, eps=1e-2)
            ours = gradients(F.barlow_twins, z_a, z_b, eps=1e-2)
            slack = 1e-11 if dtype == torch.float64 else 2e-6
            for x, y, z in zip(ours, plain, truth, strict=True):
                assert relative_error(x, z) <= 2 * relative_error(y, z) + slack
    finally:
        backends._C.use_isa(previous)


@native
@pytest.mark.parametrize("shape", [(32, 1000), (200, 300), (300, 64)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_chance(shape):
    z_a, z_b = views(*shape, torch.float32)
    fixed = torch.randn(shape[1], shape[1])
    definition = Definition(lambd=0.01)

    def passes():
        loss, components, hat, statistics, kept = Cpu.gram_forward(z_a, z_b, definition, True, True)
        direct = Cpu.correlation_loss(fixed.clone(), shape[0], statistics, definition)
        grads = torch.empty(2, *hat.shape)
        Cpu.gram_backward(kept, hat, statistics, loss, definition, grads[0])
        Cpu.gradient(hat, hat, statistics, loss, definition, False, 0, None, grads[1])
        return hat, statistics, loss, components, kept, *direct, grads

    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(passes())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    first, second = (gradients(F.barlow_twins, z_a, z_b) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# Narrow products: operands of a half type, fp32 results.

NARROW = [("reference", "cpu"), *TRITON, *(x for x in TARGETS if x[0] in ("cuda", "triton"))]
NARROW = pytest.mark.parametrize("backend", NARROW, ids="-".join, indirect=True)


def narrow_loss(z_a, z_b, lambd=5e-3, center=True, gram=True):
    return ops._BarlowTwins.apply(z_a, z_b, gram, True, Definition(lambd, center))[0]


def gradient_bound(z_a, z_b, truth, lambd, center=True):
    """Twice the error of rounding the exact gradient of z_a, and what one rounding of the products may do.

    That is the unit roundoff times the gradient of the off-diagonal part, to which products lead.
    """
    unit = torch.finfo(z_a.dtype).eps / 2
    plain = gradients(ops.reference, z_a, z_b, lambd=lambd, center=center, dtype=torch.float64)
    on = gradients(ops.reference, z_a, z_b, lambd=0.0, center=center, dtype=torch.float64)
    rounding = (truth.to(z_a.dtype).double() - truth).norm()
    return 2 * rounding + unit * (plain[1] - on[1]).norm()


@NARROW
@FORMS
@CENTER
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("lambd", [5e-3, 1.0])
def test_narrow_products(lambd, dtype, center, gram, backend):
    skip_where_bfloat16_is_not_rounded(backend, dtype)
    for shape in ((24, 100), (100, 24)):
        z_a, z_b = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        z_a, z_b = z_a.to(dtype), (z_a + 0.1 * z_b).to(dtype)
        truth = gradients(ops.reference, z_a, z_b, lambd=lambd, center=center, dtype=torch.float64)
        ours = gradients(narrow_loss, z_a, z_b, lambd=lambd, center=center, gram=gram)
        assert relative_error(ours[0], truth[0]) < 0.3 * torch.finfo(dtype).eps
        assert (ours[1] - truth[1]).norm() < gradient_bound(z_a, z_b, truth[1], lambd, center)


@NARROW
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_diagonal_of_gram_matrices_is_not_rounded(dtype, backend, monkeypatch):
    """It outweighs all else where B << D, and most of what it contributes cancels."""
    skip_where_bfloat16_is_not_rounded(backend, dtype)
    z_a, z_b = (torch.randn(16, 500, dtype=torch.float64) for _ in range(2))
    z_a, z_b = z_a.to(dtype), (z_a + 0.1 * z_b).to(dtype)
    truth = gradients(ops.reference, z_a, z_b, lambd=1.0, dtype=torch.float64)[1]
    bound = gradient_bound(z_a, z_b, truth, 1.0)
    assert (gradients(narrow_loss, z_a, z_b, lambd=1.0)[1] - truth).norm() < bound

    kernels = passes()
    gradient = kernels.gradient

    def narrowed(matrices, dtype, exponent):
        return (matrices * 2.0**-exponent).to(dtype)

    def without_grams(*arguments):
        gradient(*arguments[:-2], None, arguments[-1])

    make = staticmethod if isinstance(kernels, type) else lambda function: function
    monkeypatch.setattr(kernels, "narrowed", make(narrowed))
    monkeypatch.setattr(kernels, "gradient", make(without_grams))
    assert (gradients(narrow_loss, z_a, z_b, lambd=1.0)[1] - truth).norm() > 1.5 * bound


@NARROW
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 64, 130])
def test_narrowed(n, dtype, backend):
    skip_where_bfloat16_is_not_rounded(backend, dtype)
    matrices = torch.randn(2, n, n) * 1e5
    exponent = n.bit_length() + 10
    expected = (matrices * 2.0**-exponent * (1 - torch.eye(n))).to(dtype)
    assert torch.equal(passes().narrowed(matrices, dtype, exponent), expected)
    assert torch.equal(passes().narrowed(matrices[0], dtype, exponent), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_only_half_types_are_narrow(dtype):
    with pytest.raises(ValueError, match=r"barlow_twins: narrow must be False for torch.float"):
        torch.ops.mmfast.barlow_twins_forward(*views(4, 6, dtype), *[True] * 4, *Definition())


# GPU kernels.


@BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [130, 300, 600], ids=str)
def test_rows_of_more_than_one_block(rows, dtype, gram, backend):
    """Up to 512 rows are held by one block of up to 32 warps (256 of fp64), more are cut up."""
    z_a, z_b = views(rows, 35, dtype)
    z_a, z_b = z_a + 100 * z_a[:1], z_b + 7
    for center in (True, False):
        truth = gradients(ops.reference, z_a, z_b, center=center, dtype=torch.float64)
        plain = gradients(ops.reference, z_a, z_b, center=center)
        ours = gradients(ops.barlow_twins, z_a, z_b, center=center, gram=gram)
        for x, y, z in zip(ours[1:], plain[1:], truth[1:], strict=True):
            assert relative_error(x, z) <= 1.2 * relative_error(y, z) + (
                1e-6 if dtype != torch.float64 else 1e-12
            )
        again = gradients(ops.barlow_twins, z_a, z_b, center=center, gram=gram)
        assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


@BACKENDS
def test_very_many_rows(backend):
    z_a, z_b = views(9000, 3, torch.float32)
    truth = gradients(ops.reference, z_a, z_b, dtype=torch.float64)
    for x, y in zip(gradients(F.barlow_twins, z_a, z_b), truth, strict=True):
        assert relative_error(x, y) < 2e-6


@BACKENDS
@FORMS
def test_matrices_of_more_than_one_block(gram, backend):
    shape = (190, 40) if gram else (40, 270)
    z_a, z_b = views(*shape, torch.float32)
    truth = gradients(ops.reference, z_a, z_b, lambd=1.0, dtype=torch.float64)
    ours = gradients(ops.barlow_twins, z_a, z_b, lambd=1.0, gram=gram)
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(ours, truth, strict=True))


@CUDA
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(27, 83), (48, 64), (530, 37)], ids=str)
def test_cuda_kernels_write_only_their_outputs(shape, dtype, gram, backend):
    """Everything lies between red zones of NaN, which show where they are read, and where they are written."""
    rows, columns = shape
    compute, half = compute_dtype(torch.empty(0, dtype=dtype)), dtype in HALF
    code, wide = dtype_code("test", "z", torch.empty(0, dtype=dtype)), compute == torch.float64
    device = torch.get_default_device()
    definition = _native(Definition(lambd=0.01))
    for zone, narrow in ((64, half), (63, False), (61, half)):
        buffers = []

        def guarded(*shape, dtype=compute, zone=zone, buffers=buffers):
            buffers.append(torch.full((math.prod(shape) + 2 * zone,), math.nan, dtype=dtype))
            return buffers[-1][zone:-zone].view(shape)

        def call(name, *arguments):
            addresses = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
            kernel = getattr(backends._C, f"cuda_barlow_twins_{name}")
            call_cuda("test", kernel, device, *addresses)

        def scratch(name, *arguments):
            return guarded(getattr(backends._C, f"barlow_twins_{name}_scratch")(*arguments))

        z = [guarded(rows, columns, dtype=dtype).copy_(x) for x in views(rows, columns, dtype)]
        hat = guarded(2, rows, columns, dtype=dtype if narrow else compute)
        statistics, loss, components, upstream = (
            guarded(5, columns),
            guarded(),
            guarded(5),
            guarded().fill_(1),
        )
        call(
            *("standardise", code, narrow, z[0], columns, z[1], columns, rows, columns, definition),
            *(hat, statistics, scratch("standardise", wide, rows, columns)),
        )
        n = rows if gram else columns
        matrices = guarded(2, n, n) if gram else guarded(n, n)
        matrices.copy_(gram_matrices(hat) if gram else product(hat[0].T, hat[1].T))
        call(
            *("loss", wide, gram, matrices, statistics, rows, columns, definition, loss, components),
            scratch("loss", wide, gram, rows, columns),
        )
        assert gram or not matrices.diagonal().any()
        truth = gradients(ops.reference, *z, lambd=0.01, dtype=torch.float64)
        assert float(loss) == pytest.approx(float(truth[0]), rel=torch.finfo(dtype).eps if narrow else 1e-5)
        assert torch.equal(components[0], loss)
        exponent, operands = 0, matrices
        if narrow:
            exponent, operands = n.bit_length(), guarded(*matrices.shape, dtype=dtype)
            call("narrowed", code, matrices, matrices.numel() // n**2, n, exponent, operands)
        if gram:
            products = [matmul(operands[1 - i], hat[i]) for i in range(2)]
        else:
            products = [product(hat[1], operands), product(hat[0], operands.T)]
        products = [guarded(rows, columns).copy_(x) for x in products]
        grads = [guarded(rows, columns, dtype=dtype) for _ in range(2)] if half else products
        view_code = code if narrow or not half else 0
        own = z if narrow else hat
        grams = (matrices[1], matrices[0]) if narrow and gram else (0, 0)
        call(
            *("gradient", view_code, code, *products, own[0], columns, own[1], columns, statistics, upstream),
            *(
                rows,
                columns,
                definition,
                gram,
                exponent,
                *grams,
                *grads,
                scratch("gradient", wide, rows, columns),
            ),
        )
        for x, y in zip(grads, truth[1:], strict=True):
            assert relative_error(x, y) < (torch.finfo(dtype).eps if half else 1e-5)
        for buffer in buffers:
            assert buffer[:zone].isnan().all() and buffer[-zone:].isnan().all()


@CUDA
def test_cuda_errors_are_told(backend, monkeypatch):
    monkeypatch.setattr(backends._C, "cuda_barlow_twins_loss", lambda *_: 700)
    with pytest.raises(RuntimeError, match=r"^barlow_twins: CUDA error 700: \S"):
        F.barlow_twins(*views(4, 6))


@needs_gpu
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [200, 700], ids=str)
def test_launches_and_no_waiting(rows, dtype, gram):
    z_a, z_b = (z.cuda().requires_grad_() for z in views(rows, 600, dtype))

    def train():
        ops.barlow_twins(z_a, z_b, gram=gram)[0].backward()

    torch.use_deterministic_algorithms(False)
    train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if "mmfast" in event.name]
    assert 0 < len(kernels) <= (5 if rows <= 512 else 8)


@needs_gpu
@FORMS
def test_graph_capture(gram):
    z_a, z_b = (z.cuda().requires_grad_() for z in views(64, 96, torch.float32))
    expected = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(ops.barlow_twins(z_a, z_b, gram=gram)[0], (z_a, z_b))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ops.barlow_twins(z_a, z_b, gram=gram)[0]
        results = loss, *torch.autograd.grad(loss, (z_a, z_b))
    for result in results:
        result.detach().zero_()
    graph.replay()
    assert all(torch.equal(x.double(), y) for x, y in zip(results, expected, strict=True))


# Behaving like a built-in.


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, gram, backend):
    z_a, z_b = views(6, 9, dtype)
    narrow = is_narrow(dtype)
    for needs in ((True, True), (False, True), (False, False)):
        options = (gram, narrow, *needs, *Definition(lambd=0.01))
        arguments = (z_a, z_b, *options)
        torch.library.opcheck(torch.ops.mmfast.barlow_twins_forward, arguments)
        if any(needs):
            loss, _, hat, *saved = torch.ops.mmfast.barlow_twins_forward(*arguments)
            kept = [hat, z_a, z_b] if narrow else [hat] if dtype == hat.dtype else [z_a, z_b]
            torch.library.opcheck(
                torch.ops.mmfast.barlow_twins_backward,
                (torch.ones_like(loss), kept, *saved, *options),
            )


OPS = ["mmfast::barlow_twins_forward", "mmfast::barlow_twins_backward"]


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.heard.append(op.name())
        return op(*args, **(kwargs or {}))


def test_whoever_observes_operations_sees_the_ops():
    """Nobody else pays for the dispatcher, and gets the same bits."""
    z_a, z_b = views(6, 40, torch.float32)
    expected = gradients(F.barlow_twins, z_a, z_b)
    with Listener() as listener:
        heard = gradients(F.barlow_twins, z_a, z_b)
    with torch.profiler.profile() as profile:
        seen = gradients(F.barlow_twins, z_a, z_b)
    names = [event.key for event in profile.key_averages()]
    assert all(name in listener.heard and name in names for name in OPS)
    for results in (heard, seen):
        assert all(map(torch.equal, results, expected))


def test_fake_tensors_are_not_computed_with():
    with FakeTensorMode() as mode:
        inside = torch.empty(6, 40, requires_grad=True)
        assert isinstance(F.barlow_twins(inside, inside), FakeTensor)
    fake = mode.from_tensor(torch.randn(6, 40).requires_grad_())
    loss = F.barlow_twins(fake, fake)
    loss.backward()
    assert isinstance(loss, FakeTensor) and isinstance(fake.grad, FakeTensor)
    meta = torch.empty(6, 40, device="meta", requires_grad=True)
    F.barlow_twins(meta, meta).backward()
    assert meta.grad.shape == meta.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_computes():
    first, second = (views(6, 40, torch.float32, seed) for seed in range(2))
    traced = torch.jit.trace(lambda x, y: F.barlow_twins(x, y), first, check_trace=False)
    assert all(map(torch.equal, gradients(traced, *second), gradients(F.barlow_twins, *second)))


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile_fullgraph_gives_the_same_bits(dtype, backend):
    torch.compiler.reset()
    loss = BarlowTwinsLoss(lambd=0.02)

    def train(z_a, z_b):
        return 2 * loss(z_a * 1.0, z_b)

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for shape in ((10, 40), (40, 10)):
        z_a, z_b = views(*shape, dtype)
        expected = gradients(train, z_a, z_b)
        parts = loss.last
        assert all(torch.equal(x, y) for x, y in zip(gradients(compiled, z_a, z_b), expected, strict=True))
        assert loss.last == parts
    if z_a.is_cuda:
        assert compiled(z_a * math.nan, z_b).isnan()
    else:
        with pytest.raises(mmfast.UserError, match="z_a must be finite"):
            compiled(z_a * math.nan, z_b)


def test_compile_with_inductor():
    z_a, z_b = views(10, 40, torch.float32)
    expected = gradients(F.barlow_twins, z_a, z_b)
    compiled = torch.compile(F.barlow_twins, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, z_a, z_b), expected)


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_cannot_demote(dtype, gram, backend):
    z_a, z_b = views(48, 40, dtype)
    expected = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    with torch.autocast(z_a.device.type, dtype=torch.bfloat16):
        inside = gradients(ops.barlow_twins, z_a, z_b, gram=gram)
    assert all(torch.equal(x, y) for x, y in zip(inside, expected, strict=True))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@ALL_BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_for_backward(dtype, needs, backend):
    rows, columns = 24, 500
    z_a, z_b = (z.requires_grad_(need) for z, need in zip(views(rows, columns, dtype), needs, strict=True))
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.barlow_twins(z_a, z_b)
    inputs = (z_a.nbytes + z_b.nbytes) * (1 + is_narrow(dtype))
    small = (sum(needs) * rows**2 + 5 * columns) * loss.element_size()
    assert 0 < sum(storages.values()) <= inputs + small


def test_no_graph_without_need():
    z_a, z_b = views(8, 20)
    assert not F.barlow_twins(z_a, z_b).requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not F.barlow_twins(z_a.clone().requires_grad_(), z_b).requires_grad


@ALL_BACKENDS
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_double_backward_is_refused(dtype, gram, backend):
    z_a, z_b = (z.requires_grad_() for z in views(6, 9, dtype))
    loss = ops.barlow_twins(z_a, z_b, gram=gram)[0]
    expected = torch.autograd.grad(loss, z_a, retain_graph=True)[0]
    (recorded,) = torch.autograd.grad(loss, z_a, create_graph=True)
    assert torch.equal(recorded, expected)
    # Also where the rest of the graph has an answer, and where autograd may skip what is unused.
    for penalty in (recorded.sum(), recorded.square().sum() + z_b.square().sum()):
        with pytest.raises(RuntimeError, match=r"barlow_twins: .*double backward"):
            torch.autograd.grad(penalty, z_b, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=r"barlow_twins: .*double backward"):
            penalty.backward(retain_graph=True)


@BACKENDS
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(2, 70),
    columns=st.integers(1, 140),
    lambd=st.floats(0, 2),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
    center=st.booleans(),
    gram=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, columns, lambd, eps, center, gram, seed, backend):
    z_a, z_b = views(rows, columns, seed=seed, noise=1.0)
    truth = gradients(ops.reference, z_a, z_b, lambd=lambd, center=center, eps=eps)
    ours = gradients(ops.barlow_twins, z_a, z_b, lambd=lambd, center=center, eps=eps, gram=gram)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11 * (1 + float(y.abs().max())))


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
    assert torch.equal(value, F.barlow_twins(z_a, z_b, 0.02, False, 1e-3))
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
INVALID = [
    (TypeError, ([[1.0]], A), {}, "z_a must be a tensor, got list"),
    (TypeError, (A, None), {}, "z_b must be a tensor, got NoneType"),
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
]


@pytest.mark.parametrize(("error", "arguments", "options", "message"), INVALID, ids=[x[3] for x in INVALID])
def test_invalid_arguments(error, arguments, options, message):
    with pytest.raises(error) as caught:
        F.barlow_twins(*arguments, **options)
    assert str(caught.value) == f"barlow_twins: {message}"


def test_invalid_options_of_the_module():
    with pytest.raises(ValueError, match="barlow_twins: lambd must be finite and at least 0, got nan"):
        BarlowTwinsLoss(lambd=math.nan)


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
