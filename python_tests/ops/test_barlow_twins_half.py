"""Half embeddings on the CPU: bf16 products in the Gram form, and fp32 where these would not do."""

import pytest
import torch
from barlow_twins_formulas import relative_error
from barlow_twins_help import native, request_of, settings_of

from mmfast import backends
from mmfast import functional as F
from mmfast.losses.barlow_twins import evaluate_barlow_twins
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.barlow_twins.kernels import NarrowCpu, Plain, _native

pytestmark = [native, pytest.mark.usefixtures("poisoned_memory")]
ISAS = pytest.mark.parametrize("isa", backends._C.isas() if backends._C else [])
BF16 = torch.bfloat16


@pytest.fixture
def isa(request):
    """Everything runs on one instruction set."""
    before = backends._C.use_isa(request.param)
    yield request.param
    backends._C.use_isa(before)


@pytest.fixture
def fast():
    if not backends._C.fast_bf16():
        pytest.skip("this processor has no AVX512-BF16")


def views(kind, rows, columns, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "low rank":
        signal = normal(rows, 2) @ normal(2, columns)
        z = [signal + 0.01 * normal(rows, columns) for _ in range(2)]
    elif kind == "collapsed":
        signal = normal(rows, 1).expand(rows, columns)
        z = [signal, signal + 1e-3 * normal(rows, columns)]
    elif kind == "rectified":
        signal = normal(rows, 32) @ normal(32, columns)
        z = [(signal + 0.3 * normal(rows, columns)).relu() for _ in range(2)]
    else:
        first = normal(rows, columns) + (50 if kind == "offset" else 0)
        noise = {"independent": None, "correlated": 0.5, "nearly equal": 0.01, "offset": 0.5}[kind]
        z = [first, normal(rows, columns) if noise is None else first + noise * normal(rows, columns)]
    return [x.to(dtype) for x in z]


KINDS = ["independent", "correlated", "nearly equal", "low rank", "rectified", "offset", "collapsed"]


def narrow_loss(z_a, z_b, gram=True, narrow=True, **options):
    return ops._BarlowTwins.apply(z_a, z_b, gram, narrow, Definition(**options))[0]


def gradients(loss, z_a, z_b, upstream=1.0, dtype=None, needs=(True, True), **options):
    """(loss, gradients of the views that need them), in fp64."""
    z = [
        x.detach().to(dtype or x.dtype).requires_grad_(need)
        for x, need in zip((z_a, z_b), needs, strict=True)
    ]
    value = loss(*z, **options)
    (upstream * value).backward()
    return value.detach().double(), *(x.grad.double() for x in z if x.requires_grad)


@ISAS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 256), (32, 1600), (64, 512), (128, 1024)], ids=str)
def test_error_is_at_most_twice_that_of_fp32(shape, kind, isa):
    """Of rounded embeddings; both gradients are rounded to bf16."""
    z = views(kind, *shape)
    truth = gradients(ops.reference, *z, -3.0, torch.float64)
    plain = gradients(narrow_loss, *z, -3.0, narrow=False)
    ours = gradients(narrow_loss, *z, -3.0)
    # fp32 is within 3e-7; only where all features are one, the split of operands into 16 bits shows.
    assert relative_error(ours[0], truth[0]) < (3e-6 if kind == "collapsed" else 5e-7)
    for x, y, t in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert relative_error(x, t) <= 2 * relative_error(y, t)


@ISAS
@pytest.mark.parametrize(
    "options",
    [
        {"center": False},
        {"eps": 1e-2, "eps_outside": True, "unbiased": True},
        {"lambd": 0.0},
        {"lambd": 1.0, "scale": 0.025},
        {"divide": False},
    ],
    ids=str,
)
def test_every_definition(options, isa):
    z = views("correlated", 40, 700)
    truth = gradients(ops.reference, *z, 0.5, torch.float64, **options)
    ours = gradients(narrow_loss, *z, 0.5, **options)
    assert relative_error(ours[0], truth[0]) < 5e-7
    for x, t in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(x, t) < 2 * relative_error(t.to(BF16).double(), t)


@ISAS
@pytest.mark.parametrize(
    "shape", [(2, 1), (2, 3), (3, 2), (5, 63), (7, 65), (13, 1025), (25, 2111), (65, 129), (530, 70)], ids=str
)
def test_sizes_that_leave_remainders(shape, isa):
    z = views("correlated", *shape)
    truth = gradients(ops.reference, *z, dtype=torch.float64, eps=0.1)
    plain = gradients(narrow_loss, *z, narrow=False, eps=0.1)
    ours = gradients(narrow_loss, *z, eps=0.1)
    assert relative_error(ours[0], truth[0]) < 2e-5
    for x, y, t in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert relative_error(x, t) <= 2 * relative_error(y, t) + 1e-4


def test_few_directions_need_both_parts_of_the_gram_matrix():
    """With one part, which the definition of narrow passes has, the error is many times that of rounding."""
    z = views("collapsed", 64, 1024)
    truth = gradients(ops.reference, *z, dtype=torch.float64)
    ours = gradients(narrow_loss, *z)
    with backends.backend("reference"):
        one_part = gradients(narrow_loss, *z)
    assert relative_error(ours[1], truth[1]) < 4e-3 < 0.1 < relative_error(one_part[1], truth[1])


def test_against_the_definition_of_narrow_passes():
    z = views("correlated", 48, 640)
    ours = gradients(narrow_loss, *z, 2.0)
    with backends.backend("reference"):
        plain = gradients(narrow_loss, *z, 2.0)
    assert relative_error(ours[0], plain[0]) < 1e-4
    for x, y in zip(ours[1:], plain[1:], strict=True):
        assert relative_error(x, y) < 6e-3


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1e4, 1e15])
def test_large_and_small_numbers(size):
    z = views("correlated", 32, 600, torch.float64)
    z = [(size * x).to(BF16) for x in z]
    truth = gradients(ops.reference, *z, dtype=torch.float64, eps=0.0)
    ours = gradients(narrow_loss, *z, eps=0.0)
    assert relative_error(ours[0], truth[0]) < 5e-7
    for x, t in zip(ours[1:], truth[1:], strict=True):
        assert relative_error(x, t) < 4e-3


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_columns(eps):
    z_a, z_b = views("correlated", 20, 300)
    z_a[:, 3] = 1234.5
    z_b[:, 299] = 0
    truth = gradients(ops.reference, z_a, z_b, dtype=torch.float64, eps=1e-5)
    ours = gradients(narrow_loss, z_a, z_b, eps=eps)
    assert relative_error(ours[0], truth[0]) < 1e-5
    assert all(x.isfinite().all() for x in ours)


def with_constant_columns(kind, rows, columns):
    z_a, z_b = views("correlated", rows, columns)
    dead = slice(0, 5)
    if kind == "mean 100":
        z_a, z_b = z_a + 100, z_b + 100
    value = {"mean 100": 101.0, "large": 1e15, "small": 1e-20}.get(kind, 3.3)
    if kind in ("all", "all, of their own"):
        z_a, z_b = z_a[:1].expand(rows, columns).clone(), z_b[:1].expand(rows, columns).clone()
        if kind == "all":
            z_a[:], z_b[:] = value, -value
    else:
        z_a[:, dead] = value
        if kind != "in one view":
            z_b[:, dead] = value
    if kind == "nearly":
        z_a[0, dead], z_b[1, dead] = 3.328125, 3.328125
    if kind == "but for an outlier":
        z_a[0, dead], z_b[1, dead] = 0.1234, 0.1234
    return z_a, z_b


CONSTANT = ["in both views", "mean 100", "in one view", "all", "all, of their own", "nearly", "but for an outlier",
            "large", "small"]  # fmt: skip


@ISAS
@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.parametrize(
    "variant", ["official", "monai", "catalyst", "stable-pretraining", "lightning", "thesis"]
)
def test_constant_columns_get_no_gradient(variant, kind, isa):
    """However much 1 / eps magnifies the rounding of sums; and the others get theirs."""
    options = settings_of(variant)
    z = with_constant_columns(kind, 52, 200)
    truth = gradients(ops.reference, *z, dtype=torch.float64, **options)
    plain = gradients(narrow_loss, *z, narrow=False, **options)
    ours = gradients(narrow_loss, *z, **options)
    # Columns of which one row alone differs are all one feature: see above.
    assert relative_error(ours[0], truth[0]) < (3e-6 if kind == "nearly" else 1e-6)
    dead = [z[0].std(0) == 0, z[1].std(0) == 0]
    for x, y, t in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert not x[:, dead[0] & dead[1]].any()
        assert (x - t).norm() <= 1.5 * (y - t).norm()


def test_constant_columns_with_an_eps_that_is_next_to_nothing():
    """1 / eps squared is infinite."""
    z = with_constant_columns("in both views", 52, 200)
    ours = gradients(narrow_loss, *z, eps=1e-30, eps_outside=True)
    assert all(x.isfinite().all() for x in ours) and not ours[1][:, :5].any()


def test_a_layer_with_dead_units_gets_the_gradient_of_fp32(fast):
    """Through the public function, with fp32 where the narrow kernel is not."""
    torch.manual_seed(0)
    x, grads = torch.randn(64, 16), []
    for half in (True, False):
        torch.manual_seed(1)
        layer = torch.nn.Linear(16, 128)
        torch.nn.init.zeros_(layer.weight[:9])
        torch.nn.init.constant_(layer.bias, 3.0)
        y_a, y_b = (layer(x + 0.1 * i * torch.randn(64, 16)).to(BF16) for i in (1, 2))
        z = (y_a, y_b) if half else (y_a.float(), y_b.float())
        F.barlow_twins(*z, variant="catalyst").backward()
        grads.append(layer.weight.grad)
    assert relative_error(grads[0], grads[1]) < 1e-2


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_more_than_65536_rows(dtype):
    """The direct form, whose products would overflow fp16 and whose sums stop growing in it."""
    z = views("correlated", 70_000, 6, dtype)
    truth = gradients(ops.reference, *z, dtype=torch.float64)
    ours = gradients(F.barlow_twins, *z)
    assert relative_error(ours[0], truth[0]) < 2e-6
    for x, t in zip(ours[1:], truth[1:], strict=True):
        # Gradients of so many rows are subnormal in fp16.
        rounded = relative_error(t.to(dtype).double(), t)
        assert x.isfinite().all() and relative_error(x, t) <= 2 * rounded


def test_which_calls_are_narrow(fast, monkeypatch):
    """bf16 in the Gram form of normalised embeddings with rows enough; one instruction set has the products."""
    calls = []
    forward = NarrowCpu.gram_forward
    monkeypatch.setattr(NarrowCpu, "gram_forward", lambda *a: calls.append(len(a[0])) or forward(*a))

    def narrow(rows, columns, dtype=BF16, **options):
        calls.clear()
        evaluate_barlow_twins(*views("correlated", rows, columns, dtype), request_of(options))
        return bool(calls)

    assert narrow(64, 500)
    assert not narrow(64, 500, torch.float16) and not narrow(64, 500, torch.float32)
    assert not narrow(64, 500, normalise=False) and not narrow(64, 500, pooled=True)
    assert not narrow(64, 60) and not narrow(ops._NARROW_ROWS - 1, 500)
    before = backends._C.use_isa("avx2")
    try:
        assert not backends._C.fast_bf16() and not narrow(64, 500)
    finally:
        backends._C.use_isa(before)


@ISAS
def test_without_the_instruction_bf16_is_computed_in_fp32(isa):
    if backends._C.fast_bf16():
        pytest.skip("this one has the instruction")
    z = views("correlated", 64, 500)
    ours, plain = gradients(F.barlow_twins, *z), gradients(narrow_loss, *z, narrow=False)
    assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_one_view_needs_a_gradient(needs):
    z = views("low rank", 24, 700)
    both = gradients(narrow_loss, *z)
    loss, one = gradients(narrow_loss, *z, needs=needs)
    assert torch.equal(loss, both[0]) and torch.equal(one, both[1 + needs.index(True)])
    assert torch.equal(narrow_loss(*z).double(), loss)


def test_rows_apart_and_columns_apart():
    z_a, z_b = views("correlated", 30, 200)
    expected = gradients(narrow_loss, z_a, z_b)
    wide, tall = torch.full((90, 333), torch.nan, dtype=BF16), torch.full((200, 31), torch.nan, dtype=BF16)
    a = wide[:60:2, 7:207].copy_(z_a)
    b = tall[:, 1:].T.copy_(z_b)
    assert a.stride() == (666, 1) and b.stride() == (1, 31)
    leaves = [x.detach().requires_grad_() for x in (a, b)]
    loss = narrow_loss(*leaves)
    loss.backward()
    assert torch.equal(loss.double(), expected[0])
    assert all(torch.equal(x.grad.double(), y) for x, y in zip(leaves, expected[1:], strict=True))


def test_writes_only_its_outputs():
    rows, columns, zone = 27, 83, 64
    z = views("correlated", rows, columns)
    buffers = []

    def guarded(*shape, dtype=torch.float32):
        buffers.append(torch.full((torch.Size(shape).numel() + 2 * zone,), 7.5, dtype=dtype))
        return buffers[-1][zone:-zone].view(shape)

    kept, statistics = guarded(2, rows, rows), guarded(5, columns)
    loss, components = guarded(), guarded(5)
    grads = [guarded(rows, columns, dtype=BF16) for _ in range(2)]
    sizes = rows, columns, _native(Definition())
    z_of = z[0].data_ptr(), columns, z[1].data_ptr(), columns
    outputs = [x.data_ptr() for x in (kept, statistics, loss, components)]
    assert backends._C.barlow_twins_narrow_forward(*z_of, *sizes, True, True, *outputs, 2) == 0
    hat, exact = Plain.standardise(*z, Definition(), False)
    torch.testing.assert_close(kept, hat @ hat.mT, rtol=1e-4, atol=1e-3)
    assert torch.equal(kept, kept.mT)
    torch.testing.assert_close(statistics, exact, rtol=1e-4, atol=1e-6)
    matrices = [x.data_ptr() for x in (kept[1], kept[0], statistics, loss)]
    assert backends._C.barlow_twins_narrow_backward(
        *z_of, *matrices, *sizes, *(g.data_ptr() for g in grads), 2
    )
    for buffer in buffers:
        assert (buffer[:zone] == 7.5).all() and (buffer[-zone:] == 7.5).all() and buffer.isfinite().all()


@pytest.mark.parametrize("kind", ["correlated", "collapsed"])
def test_bits_depend_neither_on_threads_nor_on_chance(kind):
    z = views(kind, 70, 2500)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(narrow_loss, *z))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_told(value):
    z_a, z_b = views("correlated", 20, 300)
    z_b[4, 5] = value
    with pytest.raises(ValueError, match=r"z_b must be finite, got 1 .* in row 4, column 5"):
        narrow_loss(z_a, z_b)


def test_saved_are_embeddings_statistics_and_gram_matrices():
    z = [x.requires_grad_() for x in views("correlated", 24, 500)]
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        narrow_loss(*z)
    assert sum(sizes.values()) == 2 * z[0].nbytes + 4 * (2 * 24**2 + 5 * 500)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)], ids=str)
def test_opcheck(needs):
    z = views("correlated", 6, 90)
    options = (True, True, *needs, *Definition(lambd=0.01))
    torch.library.opcheck(torch.ops.mmfast.barlow_twins_forward, (*z, *options))
    if any(needs):
        loss, _, _, *saved = torch.ops.mmfast.barlow_twins_forward(*z, *options)
        torch.library.opcheck(
            torch.ops.mmfast.barlow_twins_backward, (torch.ones_like(loss), z, *saved, *options)
        )


def test_compile_and_autocast_change_nothing(fast):
    torch.compiler.reset()
    compiled = torch.compile(F.barlow_twins, fullgraph=True, backend="aot_eager")
    for shape in ((64, 200), (50, 333), (20, 200)):
        z = views("correlated", *shape)
        expected = gradients(F.barlow_twins, *z)
        assert all(torch.equal(x, y) for x, y in zip(gradients(compiled, *z), expected, strict=True))
        with torch.autocast("cpu", dtype=torch.float16):
            inside = gradients(F.barlow_twins, *z)
        assert all(torch.equal(x, y) for x, y in zip(inside, expected, strict=True))


def test_double_backward_is_refused():
    z_a, z_b = (x.requires_grad_() for x in views("correlated", 6, 90))
    (recorded,) = torch.autograd.grad(narrow_loss(z_a, z_b), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"barlow_twins: .*double backward"):
        recorded.sum().backward()
