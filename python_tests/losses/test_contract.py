"""What every loss of similarities promises, over a table of them."""

import math

import pytest
import torch
from similarity_losses import LOSSES

import mmfast
from mmfast.errors import UserError

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERY = pytest.mark.parametrize("name", LOSSES)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def data(rows=18, columns=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.to(dtype), (0.5 * a + b).to(dtype), torch.arange(rows) % 5


def results(name, a, b, labels, upstream=1.0, loss=None):
    """The loss, and gradients by the views that it takes and by what it learns, in doubles."""
    row = LOSSES[name]
    loss = row.make() if loss is None else loss
    if a.dtype == torch.float64:
        loss.double()
    a, b = (x.detach().requires_grad_() for x in (a, b))
    value = row.call(loss, a, b, labels)
    learnt = list(loss.parameters())
    grads = torch.autograd.grad(value * upstream, [*(a, b)[: row.views], *learnt])
    return [x.detach().double() for x in (value, *grads)]


def near(found, expected, tolerance, least=0.0):
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + least, (x, y)


@EVERY
@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (17, 5), (24, 64), (65, 130)], ids=str)
def test_single_precision(name, shape):
    a, b, labels = data(*shape)
    if "PKT" in name and shape[1] == 1:
        pytest.skip("opposite rows have similarities of 0, whose logarithm is what fp32 leaves of it")
    if shape[0] < 5:
        labels = labels % 2
    single = results(name, a.float(), b.float(), labels)
    double = results(name, a.float().double(), b.float().double(), labels)
    near(single[:1], double[:1], 4e-6, 1e-7)
    if shape[1] > 1:  # directions of one column have no derivative
        near(single[1:], double[1:], 5e-5, 1e-6)


@EVERY
@HALF
def test_half_types_are_computed_in_single_precision(name, dtype):
    a, b, labels = data(20, 33, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = results(name, a, b, labels)
    exact = results(name, a.double(), b.double(), labels)
    near(half[:1], exact[:1], 2e-5)
    near(half[1:], exact[1:], 6e-3 if dtype == torch.bfloat16 else 8e-4, 1e-6)


@EVERY
def test_gradient_is_the_derivative(name):
    row, (a, b, labels) = LOSSES[name], data(9, 3)
    if not row.whole:
        pytest.skip("leaves out the teachers' part by definition")
    if not row.smooth:
        # Between its kinks.
        a, b = a + 0.01 * a.sin(), b + 0.01 * b.cos()
    loss = row.make()
    views = [x.requires_grad_() for x in (a, b)[: row.views]]
    assert torch.autograd.gradcheck(lambda *z: row.call(loss, *z, *(a, b)[len(z) :], labels), views)


@EVERY
def test_upstream_and_two_calls_before_one_backward_pass(name):
    row, (a, b, labels) = LOSSES[name], data()
    one = results(name, a, b, labels)
    near(results(name, a, b, labels, -2.5)[1:], [-2.5 * x for x in one[1:]], 1e-12)
    loss, other = row.make().double(), labels.flip(0)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    (row.call(loss, x, y, labels) + 2 * row.call(loss, x, y, other)).backward()
    two = results(name, a, b, other)
    near([x.grad], [one[1] + 2 * two[1]], 1e-12)


@EVERY
def test_scaled_parts_add_up_to_the_gradient(name):
    row, (a, b, labels) = LOSSES[name], data(12, 5, torch.float32)
    loss, x = row.make(), a.clone().requires_grad_()
    (whole,) = torch.autograd.grad(row.call(loss, x, b, labels), x)
    for _ in range(8):
        (row.call(loss, x, b, labels) / 8).backward()
    near([x.grad], [whole], 1e-6)


LABELS = {
    "int8": lambda y: y.to(torch.int8),
    "strided": lambda y: torch.stack((y.int(), y.int()), 1)[:, 1],
    "unsigned": lambda y: y.to(torch.uint16),
    "large": lambda y: torch.tensor([-(2**63) + 1, 2**63 - 1, 0, 2**32, 2**40])[y],
    "bools": lambda y: y > 1,
}


@EVERY
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_integers(name, kind):
    a, b, labels = data(12, 4)
    plain = LABELS[kind](labels).long() if kind == "bools" else labels
    for found, want in zip(
        results(name, a, b, LABELS[kind](labels)), results(name, a, b, plain), strict=True
    ):
        assert torch.equal(found, want)


def test_every_public_loss_is_in_the_table():
    others = {"BarlowTwinsLoss", "MultiViewBarlowTwinsLoss"}
    public = {name for name in mmfast.__all__ if name.endswith("Loss")}
    assert public - others == {name.split()[0] for name in LOSSES}


@EVERY
def test_layouts_and_repeats_change_no_bit(name):
    a, b, labels = data(20, 16, torch.float32)
    expected = results(name, a, b, labels)
    large = torch.full((50, 40), math.nan)
    large[3:23, 5:21], large[25:45, 7:23] = a, b
    for one, other in (
        (large[3:23, 5:21], large[25:45, 7:23]),
        (a.t().contiguous().t(), b.t().contiguous().t()),
        (a, b),
    ):
        assert all(
            torch.equal(x, y) for x, y in zip(results(name, one, other, labels), expected, strict=True)
        )


@EVERY
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_whole(name):
    row, (a, b, labels) = LOSSES[name], data(12, 6, torch.float32)
    eager = results(name, a, b, labels)
    compiled = torch.compile(row.call, fullgraph=True, backend="aot_eager")
    loss = row.make()
    a, b = (x.requires_grad_() for x in (a, b))
    value = compiled(loss, a, b, labels)
    value.backward()
    found = [value.detach(), *(x.grad for x in (a, b)[: row.views]), *(p.grad for p in loss.parameters())]
    near([x.double() for x in found], eager, 1e-5, 1e-7)


@EVERY
def test_parts_of_a_batch_give_the_gradient_of_the_whole(name):
    row, (x, y, labels) = LOSSES[name], data(16, 7)
    if not row.whole:
        pytest.skip("weights of samples are those of their places in the batch")
    model = torch.nn.Linear(7, 6, dtype=torch.float64)
    loss = row.make().double()
    row.call(loss, model(x), model(y), labels).backward()
    parameters = [*model.parameters(), *loss.parameters()]
    whole = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    if row.views == 1:
        mmfast.backward_in_micro_batches(lambda z: row.call(loss, z, None, labels), model, x.split([5, 2, 9]))
    else:
        batches = zip(x.split([5, 2, 9]), y.split([5, 2, 9]), strict=True)
        mmfast.backward_in_micro_batches(
            lambda a, b: row.call(loss, a, b, labels), lambda pair: tuple(map(model, pair)), batches
        )
    near([p.grad for p in parameters], whole, 1e-10, 1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_zeros_get_no_gradient(name, dtype):
    a, b, labels = data(12, 4, dtype)
    a[3] = 0
    value, grad, *_ = results(name, a, b, labels)
    assert value.isfinite() and grad.isfinite().all()
    # A product with another row has a derivative there, a direction none.
    if name not in ("NPairLoss", "VICRegLoss", "SoftNearestNeighbourLoss", "TripletMarginLoss batch-hard"):
        assert not grad[3].any()


@EVERY
def test_all_rows_equal(name):
    rows = torch.ones(10, 4)
    assert all(x.isfinite().all() for x in results(name, rows, rows.clone(), torch.arange(10) % 5))


@EVERY
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(name, wrong):
    row, (a, b, labels) = LOSSES[name], data(8, 4, torch.float32)
    a[2, 1] = wrong
    with pytest.raises(
        UserError, match=rf"^{row.says} must be finite, got 1 NaN or infinite .* row 2, column 1"
    ):
        row.call(row.make(), a, b, labels)


@EVERY
@pytest.mark.parametrize("rows", [0, 1])
def test_a_contrast_needs_two_rows(name, rows):
    row, (a, b, labels) = LOSSES[name], data(rows, 4, torch.float32)
    if name in ("NTXentLoss", "NTXentLoss dcl", "SupConLoss views") and rows == 1:
        assert row.call(row.make(), a, b, labels).isfinite()  # two views are two rows
    else:
        with pytest.raises(UserError, match=r"at least 2 rows"):
            row.call(row.make(), a, b, labels)


@EVERY
def test_gradients_are_final(name):
    row, (a, b, labels) = LOSSES[name], data(8, 4)
    a.requires_grad_()
    (grad,) = torch.autograd.grad(row.call(row.make(), a, b, labels), a, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{row.op}: the gradient must not be differentiated again"):
        grad.sum().backward()


@EVERY
def test_batched_gradients_are_multiples_or_refused_by_name(name):
    row, (a, b, labels) = LOSSES[name], data(8, 4)
    a.requires_grad_()
    loss = row.call(row.make().double(), a, b, labels)
    above = torch.tensor([1.0, -2.5], dtype=torch.float64)

    def batched():
        return torch.autograd.grad(loss, a, above, is_grads_batched=True, retain_graph=True)[0]

    if name == "VICRegLoss":
        with pytest.raises(NotImplementedError, match=r"^vicreg: .* is_grads_batched"):
            batched()
    else:
        (grad,) = torch.autograd.grad(loss, a, retain_graph=True)
        near(batched().unbind(), [grad, -2.5 * grad], 1e-12)


@EVERY
@pytest.mark.parametrize("rows, columns", [(200, 8), (8, 200)], ids=["many rows", "many columns"])
def test_what_is_saved(name, rows, columns):
    row, (a, b, labels) = LOSSES[name], data(rows, columns, torch.float32)
    a, b = (x.requires_grad_() for x in (a, b))
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    loss = row.make()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        row.call(loss, a, b, labels)
    inputs = rows * columns * 4 * row.views
    scores = 2 * (row.views * rows) ** 2 * 4 if row.views * rows <= columns else 0
    # Of a row four numbers a side, its label, id and weight.
    assert sum(saved.values()) <= (2 + row.saved) * inputs + row.views * rows * 100 + scores + 2000
    assert sum(saved.values()) < 3 * rows * rows or rows < columns


@EVERY
def test_learning_lowers_the_loss(name):
    row, (a, b, labels) = LOSSES[name], data(16, 5, torch.float32)
    loss = row.make()
    views = [x.clone().requires_grad_() for x in (a, b)]
    optimiser = torch.optim.SGD([*views, *loss.parameters()], 0.02)
    first = row.call(loss, *views, labels).item()
    for _ in range(25):
        optimiser.zero_grad()
        row.call(loss, *views, labels).backward()
        optimiser.step()
    assert row.call(loss, *views, labels).item() < first
