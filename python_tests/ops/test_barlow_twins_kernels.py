"""The kernels of the Barlow Twins op: memory, instruction sets, threads, narrow products, GPUs."""

import math

import pytest
import torch
from barlow_twins_formulas import relative_error
from barlow_twins_help import (
    CENTER,
    DTYPES,
    FORMS,
    HALF,
    SHAPES,
    gradients,
    native,
    passes,
    skip_where_bfloat16_is_not_rounded,
    views,
)
from targets import ALL_BACKENDS, BACKENDS, INTERPRETED, TARGETS

from mmfast import backends
from mmfast import functional as F
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.barlow_twins.kernels import Cpu, _native, compute_dtype
from mmfast.ops.native import call_cuda, dtype_code
from mmfast.ops.products import gram_matrices, matmul, product

CUDA = pytest.mark.parametrize("backend", [t for t in TARGETS if t[0] == "cuda"], ids="-".join, indirect=True)
needs_gpu = pytest.mark.skipif(("cuda", "cuda") not in TARGETS, reason="no CUDA kernels for a GPU here")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# Memory.


@pytest.mark.rotation
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

NARROW = [("reference", "cpu"), *INTERPRETED, *(x for x in TARGETS if x[0] in ("cuda", "triton"))]
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


@pytest.mark.rotation
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


@pytest.mark.rotation
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


@pytest.mark.skipif(not hasattr(backends._C, "cuda_error_string"), reason="no CUDA kernels were built")
@pytest.mark.parametrize(
    "code, late", [(9, False), (35, False), (209, False), (214, True), (700, True), (701, False), (719, True)]
)
def test_cuda_errors_are_told(code, late):
    """Those of kernels come up at whatever is called next, so they may be somebody else's."""
    with pytest.raises(RuntimeError, match=rf"^test: CUDA error {code}: \S") as caught:
        call_cuda("test", lambda *_: code, torch.device("cpu"))
    assert ("or an earlier kernel: CUDA_LAUNCH_BLOCKING=1" in str(caught.value)) == late


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
