"""VICReg: golden values, the definition in fp64 and its gradient, precision, edge cases, what is refused."""

import itertools

import pytest
import torch
from barlow_twins_formulas import gradients, relative_error
from vicreg_formulas import official, solo, terms

import mmfast
from mmfast.losses.vicreg import VICRegLoss, vicreg
from mmfast.ops.barlow_twins.vicreg import VICRegDefinition
from mmfast.ops.barlow_twins.vicreg import vicreg as op

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DOUBLE = {"dtype": torch.float64}
X = torch.tensor(
    [[1, 2, 0], [0.3, 1.1, 1.2], [2.1, 0.7, 0.4], [1.2, -0.5, 3.1],
     [2.4, 1.9, 1.3], [-0.2, 2.8, 0.9], [0.6, 1.4, 1], [3.2, -0.1, 2.2]],
    **DOUBLE,
)  # fmt: skip
GOLDEN = X / 4, (0.9 * X[:, [1, 2, 0]] + 0.1) / 4
SHAPES = list(itertools.product((2, 3, 17, 65), (1, 3, 127, 300)))


def draw(rows, columns, offset=0.0, seed=0):
    """Of columns with deviations on both sides of 1, some of them correlated."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, rows, columns, generator=generator, **DOUBLE)
    size = torch.linspace(0.3, 1.4, columns, **DOUBLE)
    a, b = a * size, (a + 0.5 * b) * size.flip(0)
    return a + 0.3 * a[:, :1] + offset, b - 0.2 * b[:, -1:] + offset


def test_golden_values():
    a, b = (z.clone().requires_grad_() for z in GOLDEN)
    loss = VICRegLoss()
    value = loss(a, b)
    value.backward()
    found = torch.stack((value.detach(), a.grad.norm(), b.grad.norm(), *loss.last[1:]))
    truth = torch.tensor([22.443616, 2.379631, 2.443733, 0.154528, 0.743019, 0.004942], **DOUBLE)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)
    assert loss.last.loss == value and not loss.last.loss.requires_grad


@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
def test_the_definition(rows, columns):
    z = draw(rows, columns)
    for formula, variant in ((official, "official"), (solo, "solo")):
        truth = gradients(formula, *z, -2.0)
        found = gradients(lambda a, b, v=variant: vicreg(a, b, variant=v), *z, -2.0)
        narrow = gradients(lambda a, b, v=variant: vicreg(a, b, variant=v), *z, -2.0, torch.float32)
        # Truth of what fp32 holds.
        rounded = [x.float().double() for x in z]
        of_rounded = gradients(formula, *rounded, -2.0)
        assert float(found[0]) == pytest.approx(float(truth[0]), rel=1e-10)
        assert all(relative_error(x, y) < 1e-10 for x, y in zip(found[1:], truth[1:], strict=True))
        assert float(narrow[0]) == pytest.approx(float(of_rounded[0]), rel=2e-6)
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(narrow[1:], of_rounded[1:], strict=True))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (17, 4), (17, 127)], ids=str)
def test_each_form_gives_each_term(shape, gram):
    definition = VICRegDefinition(2.0, 3.0, 5.0, 1e-3, 0.5)
    z = dict(zip("ab", draw(*shape), strict=True))
    loss, components = op(z, definition, None, gram=gram)
    truth = torch.stack(terms(*z.values(), eps=1e-3))
    torch.testing.assert_close(components[1:], truth, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(loss, (truth * torch.tensor([2.0, 3.0, 5.0], **DOUBLE)).sum())
    found = gradients(lambda a, b: op({"a": a, "b": b}, definition, None, gram=gram)[0], *z.values(), 1.5)
    expected = gradients(lambda a, b: official(a, b, 2.0, 3.0, 5.0, eps=1e-3), *z.values(), 1.5)
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (25.0, 25.0, 1.0)])
@pytest.mark.parametrize("shape", [(3, 7), (6, 3)], ids=str)
def test_gradcheck(shape, weights):
    z = [x.requires_grad_() for x in draw(*shape)]
    names = ("invariance", "variance", "covariance")
    given = dict(zip(names, weights, strict=True))
    assert torch.autograd.gradcheck(lambda a, b: 3 * vicreg(a, b, **given), z)


def test_one_view_alone_and_a_view_with_itself():
    a, b = draw(9, 20)
    whole = gradients(official, a, b, 1.0)
    for which in (0, 1):
        z = [a.clone(), b.clone()]
        z[which].requires_grad_()
        vicreg(*z).backward()
        torch.testing.assert_close(z[which].grad, whole[1 + which])
        assert z[1 - which].grad is None
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    vicreg(x, x).backward()
    official(y, y).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("shape", [(17, 40), (40, 17)], ids=str)
def test_an_offset_costs_no_precision(shape):
    z = [x.float() for x in draw(*shape, offset=1e3)]
    truth = gradients(official, *(x.double() for x in z), 1.0)
    found = gradients(vicreg, *z, 1.0, torch.float32)
    assert float(found[0]) == pytest.approx(float(truth[0]), rel=2e-6)
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(found[1:], truth[1:], strict=True))


@pytest.mark.parametrize("size", [1e-3, 1e-2, 30.0])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_the_covariance_of_any_size_is_right_in_fp32(shape, size):
    z = [(size * x).float() for x in draw(*shape)]
    only = {"invariance": 0.0, "variance": 0.0}
    truth = gradients(lambda a, b: official(a, b, 0.0, 0.0, 1.0), *(x.double() for x in z), 1.0)
    found = gradients(lambda a, b: vicreg(a, b, **only), *z, 1.0, torch.float32)
    assert float(found[0]) == pytest.approx(float(truth[0]), rel=5e-6)
    assert all(relative_error(x, y) < 2e-5 for x, y in zip(found[1:], truth[1:], strict=True))


@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e3 + 0.1])
def test_a_constant_column_has_no_variance_and_gives_no_gradient(value, eps):
    a, b = (z.float() for z in draw(11, 5))
    a[:, 2] = b[:, 2] = value
    a.requires_grad_(), b.requires_grad_()
    loss = VICRegLoss(eps=eps)
    loss(a, b).backward()
    assert not a.grad[:, 2].any() and not b.grad[:, 2].any() and a.grad.isfinite().all()
    truth = terms(a.detach().double(), b.detach().double(), eps)
    torch.testing.assert_close(torch.stack(loss.last[1:]).double(), torch.stack(truth), rtol=1e-5, atol=1e-7)


def test_rows_of_zeros_and_all_rows_equal():
    a, b = draw(7, 4)
    a[2] = b[2] = b[5] = 0
    truth, found = gradients(official, a, b, 1.0), gradients(vicreg, a, b, 1.0)
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(found, truth, strict=True))
    same = torch.ones(6, 4, requires_grad=True)
    loss = vicreg(same, same.detach())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(25 * 0.99) and not same.grad.any()


@pytest.mark.parametrize("shape", [(17, 40), (40, 17)], ids=str)
def test_slices_with_strides(shape):
    wide = [torch.randn(2 * shape[1], 3 * shape[0], **DOUBLE) for _ in range(2)]
    views = [x.T[::3, ::2] for x in wide]
    found = gradients(vicreg, *views, 1.0)
    truth = gradients(vicreg, *(x.contiguous() for x in views), 1.0)
    assert all(relative_error(x, y) < 1e-14 for x, y in zip(found, truth, strict=True))
    leaf = wide[0].requires_grad_()
    vicreg(leaf.T[::3, ::2], views[1].detach()).backward()
    torch.testing.assert_close(leaf.grad.T[::3, ::2], truth[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_fp32(dtype):
    z = [x.to(dtype) for x in draw(20, 33)]
    truth = gradients(official, *(x.double() for x in z), 1.0)
    a, b = (x.clone().requires_grad_() for x in z)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vicreg(a, b)
    loss.backward()
    assert loss.dtype == torch.float32 and a.grad.dtype == dtype
    assert float(loss.detach()) == pytest.approx(float(truth[0]), rel=2e-6)
    rounding = torch.finfo(dtype).eps
    assert relative_error(a.grad.double(), truth[1]) < rounding


@pytest.mark.parametrize(("rows", "columns"), [(8, 256), (64, 16), (64, 64)])
def test_what_is_saved_for_the_backward_pass(rows, columns):
    a, b = (x.float().requires_grad_() for x in draw(rows, columns))
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = vicreg(a, b)
    own = {x.untyped_storage().data_ptr() for x in (a, b)}
    extra = sum(x.nbytes() for pointer, x in saved.items() if pointer not in own)
    square = min(rows, columns)
    # Deviations of both views, their difference and matrices; of a column a few numbers.
    assert extra <= 4 * (3 * rows * columns + 2 * square**2) + 200 * columns + 400
    loss.backward()


def test_compiled_whole():
    loss = VICRegLoss()
    for shape in ((6, 20), (20, 6)):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        z = draw(*shape)
        truth, found = gradients(official, *z, 2.0), gradients(compiled, *z, 2.0)
        assert all(relative_error(x, y) < 1e-10 for x, y in zip(found, truth, strict=True))
        assert float(loss.last.loss) == pytest.approx(float(truth[0]))


def test_micro_batches():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 12, **DOUBLE)
    batch = torch.randn(11, 5, **DOUBLE), torch.randn(11, 5, **DOUBLE)
    official(model(batch[0]), model(batch[1])).backward()
    truth = model.weight.grad.clone()
    model.zero_grad()
    parts = list(zip(*(x.split((4, 1, 6)) for x in batch), strict=True))
    mmfast.backward_in_micro_batches(VICRegLoss(), lambda pair: tuple(map(model, pair)), parts)
    torch.testing.assert_close(model.weight.grad, truth)


def test_two_calls_before_one_backward_pass_and_equal_results():
    (a, b), (c, d) = draw(6, 9), draw(6, 9, seed=1)
    loss = VICRegLoss()
    x = a.clone().requires_grad_()
    (loss(x, b) + 2 * loss(x, d)).backward()
    y = a.clone().requires_grad_()
    loss(y, b).backward()
    (2 * loss(y, d)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    again = [gradients(vicreg, c, d, 1.0) for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(*again, strict=True))


AGAIN = (
    "vicreg: the gradient must not be differentiated again or batched (double backward, forward mode, "
    "torch.func transforms, is_grads_batched)"
)


def test_second_derivatives_are_refused():
    a, b = (z.requires_grad_() for z in draw(6, 4))
    for only in (1.0, 0.0):
        loss = VICRegLoss(variance=only, covariance=only)
        grad, _ = torch.autograd.grad(loss(a, b), (a, b), create_graph=True)
        torch.testing.assert_close(grad.detach(), gradients(loss, a, b, 1.0)[1])
        with pytest.raises(RuntimeError) as caught:
            grad.square().sum().backward()
        assert str(caught.value) == AGAIN
    for call in (
        lambda: torch.func.grad(lambda x: vicreg(x, b))(a),
        lambda: torch.func.jvp(lambda x: vicreg(x, b), (a,), (a,)),
        lambda: torch.autograd.grad(vicreg(a, b), a, torch.ones(2, **DOUBLE), is_grads_batched=True),
    ):
        with pytest.raises(NotImplementedError) as caught:
            call()
        assert str(caught.value) == AGAIN


Z = torch.arange(24.0).view(4, 6)
INVALID = [
    (lambda: vicreg(Z[:1], Z[:1]),
     "vicreg: z_a must have at least 2 rows (a correlation over one sample is undefined), got (1, 6)"),
    (lambda: vicreg(Z, Z[:, :5]), "vicreg: z_b must have the shape of z_a (4, 6), got (4, 5)"),
    (lambda: vicreg(Z, Z.double()), "vicreg: z_b must have the dtype of z_a (torch.float32), got torch.float64"),
    (lambda: vicreg(Z[0], Z[0]), "vicreg: z_a must have shape (B, D), got (6,)"),
    (lambda: vicreg(Z[:, :0], Z[:, :0]), "vicreg: z_a must have at least 1 column, got (4, 0)"),
    (lambda: vicreg(Z, None), "vicreg: z_b must be a tensor, got None"),
    (lambda: vicreg(Z, Z.to_sparse()),
     "vicreg: z_b must be a dense tensor (torch.strided), got a tensor that is torch.sparse_coo"),
    (lambda: vicreg(Z, Z.log()),
     "vicreg: z_b must be finite, got 1 NaN or infinite values of 24, the first (-inf) in row 0, column 0"),
    (lambda: vicreg(Z * float("nan"), Z), "vicreg: z_a must be finite, got 24 NaN or infinite values of 24, "
     "the first (nan) in row 0, column 0"),
    (lambda: vicreg(Z * 1e20, Z),
     "vicreg: z_a must have variances within the range of torch.float32, got values up to 2.3e+21"),
    (lambda: vicreg(Z, Z, invariance=-1), "vicreg: invariance must be finite and at least 0, got -1"),
    (lambda: vicreg(Z, Z, variance="1"), "vicreg: variance must be a number, got '1'"),
    (lambda: vicreg(Z, Z, covariance=float("inf")), "vicreg: covariance must be finite and at least 0, got inf"),
    (lambda: vicreg(Z, Z, eps=True), "vicreg: eps must be a number, got True"),
    (lambda: vicreg(Z, Z, variant="pml"), "vicreg: variant must be one of official, solo, got 'pml'"),
    (lambda: vicreg(Z, Z, stats="local"), "vicreg: stats must be one of 'global', None, got 'local'"),
    (lambda: VICRegLoss(variant=None), "vicreg: variant must be one of official, solo, got None"),
    (lambda: VICRegLoss(variance=-1.0), "vicreg: variance must be finite and at least 0, got -1.0"),
    (lambda: VICRegLoss(grad_convention="mean"),
     "vicreg: grad_convention must be one of 'true', 'legacy', got 'mean'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_what_is_refused(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message


def test_options_are_attributes():
    a, b = draw(5, 8)
    loss = VICRegLoss(invariance=1.0, variance=2.0, covariance=3.0, eps=1e-3)
    assert loss.last is None
    loss.variance = 4.0
    torch.testing.assert_close(loss(a, b), official(a, b, 1.0, 4.0, 3.0, eps=1e-3))
    assert "invariance=1.0, variance=4.0, covariance=3.0, eps=0.001, variant='official'" in repr(loss)
