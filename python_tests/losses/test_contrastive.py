"""Contrastive losses and losses of pairs: gradients against the definition, edge cases, precision, refusals."""

import copy
import math

import pytest
import torch
from similarity_rows import Q, Y

import mmfast
from mmfast import functional as F
from mmfast.losses.contrastive import NT_XENT_VARIANTS, SUP_CON_VARIANTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DOUBLE = {"dtype": torch.float64}


SATURATED = [[1, 0], [-0.9, math.sqrt(0.19)], [0.9, math.sqrt(0.19)], [0, -1]]


@pytest.mark.parametrize(
    "temperature, expected, norm",
    [(0.07, 16.207626, 13.896780), (0.02, 56.602803, 52.011852), (0.01, 113.205505, 104.033691)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_no_temperature_is_too_small(temperature, expected, norm, dtype):
    z = torch.tensor(SATURATED, dtype=dtype)
    labels = torch.tensor([0, 0, 1, 2])
    exact = z.double().clone().requires_grad_()
    F.nt_xent(exact, None, temperature, labels=labels, variant="ser").backward()
    z.requires_grad_()
    loss = F.nt_xent(z, None, temperature, labels=labels, variant="ser")
    loss.backward()
    reached = F.nt_xent(exact, None, temperature, labels=labels, variant="ser")
    assert loss.item() == pytest.approx(reached.item(), rel=2e-6)
    assert z.grad.isfinite().all()
    if dtype == torch.float64:
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert float(exact.grad.norm()) == pytest.approx(norm, abs=1e-5)


def test_a_loss_near_zero_is_as_exact_as_a_large_one():
    """log-sum-exp less the logit would be off by percents here."""
    base = torch.eye(8)[:, :8]
    z_a, z_b = base + 0.01 * torch.randn(8, 8), base + 0.01 * torch.randn(8, 8)
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b = (z.detach().to(dtype).requires_grad_() for z in (z_a, z_b))
        loss = F.nt_xent(a, b, 0.07)
        loss.backward()
        found.append((loss, a.grad))
    (loss, grad), (exact, exact_grad) = found
    assert exact.item() < 1e-4
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
    assert (grad - exact_grad).norm() < 2e-5 * exact_grad.norm()


@pytest.mark.parametrize("rows", [2, 3, 17, 63, 65])
@pytest.mark.parametrize("columns", [1, 3, 127, 300])
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_single_precision(rows, columns, temperature):
    labels = torch.arange(rows) // 2
    z = torch.randn(rows, columns)
    for variant in ("out", "in"):
        single, double = z.clone().requires_grad_(), z.double().requires_grad_()
        loss, exact = (F.sup_con(x, labels, temperature, variant=variant) for x in (single, double))
        (3 * loss).backward()
        (3 * exact).backward()
        tolerance = 4e-6 * max(1, 0.1 / temperature)
        assert loss.item() == pytest.approx(exact.item(), rel=tolerance, abs=1e-6)
        if columns > 1:  # directions of one column have no derivative
            assert (single.grad - double.grad).norm() <= 10 * tolerance * double.grad.norm() + 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)], ids=str)
def test_half_embeddings_are_computed_in_single_precision(dtype, tolerance):
    half = torch.randn(20, 64).to(dtype)
    exact = half.double().requires_grad_()
    half.requires_grad_()
    labels = torch.arange(20) // 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.sup_con(half, labels)
    loss.backward()
    expected = F.sup_con(exact, labels)
    expected.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (half.grad.double() - exact.grad).norm() < tolerance * exact.grad.norm()


def test_with_one_positive_all_definitions_are_one():
    z = torch.randn(12, 5, **DOUBLE)
    labels = torch.arange(6).repeat(2)
    values = [F.sup_con(z, labels, 0.2, variant=v) for v in ("out", "in", "solo")]
    values += [F.nt_xent(z, None, 0.2, labels=labels, variant=v) for v in NT_XENT_VARIANTS if v != "dcl"]
    values.append(F.nt_xent(z[:6], z[6:], 0.2))
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)
    more = torch.randint(3, (12,))
    assert F.sup_con(z, more, variant="in") <= F.sup_con(z, more)


def test_order_names_scales_and_rotations_change_nothing():
    z, labels = torch.randn(15, 4, **DOUBLE), torch.randint(4, (15,))
    expected = F.sup_con(z, labels)
    order = torch.randperm(15)
    rotation = torch.linalg.qr(torch.randn(4, 4, **DOUBLE))[0]
    for other, names in (
        (z[order], labels[order]),
        (z, labels * -(2**40) + 7),
        (z @ rotation, labels),
        (z * torch.rand(15, 1, **DOUBLE).exp(), labels.to(torch.uint8)),
        (z * 1e-9, labels),
        (z * 1e200, labels),
    ):
        torch.testing.assert_close(F.sup_con(other, names), expected, rtol=1e-12, atol=0)


def test_large_and_small_rows_do_not_overflow():
    z, labels = torch.randn(9, 6), torch.arange(9) // 3
    sizes = torch.tensor([1e-11, 1, 1e30] * 3)[:, None]
    expected = F.sup_con(z, labels)
    scaled = (z * sizes).requires_grad_()
    loss = F.sup_con(scaled, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    exact = z.double().requires_grad_()
    F.sup_con(exact, labels).backward()
    torch.testing.assert_close((scaled.grad.double() * sizes.double()), exact.grad, rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_valid_might_as_well_not_be_there():
    z, labels = torch.randn(12, 5, **DOUBLE), torch.randint(3, (12,))
    valid = torch.arange(12) % 4 != 1
    holed = torch.where(valid[:, None], z, math.nan).requires_grad_()
    loss = F.sup_con(holed, labels, valid=valid)
    loss.backward()
    kept = z[valid].requires_grad_()
    expected = F.sup_con(kept, labels[valid])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(holed.grad[valid], kept.grad, rtol=1e-10, atol=1e-13)
    assert not holed.grad[~valid].any()


def test_a_row_without_direction_gets_no_gradient():
    z = Q.clone()
    z[2] = 0
    z.requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True, **DOUBLE)
    loss = F.sup_con(z, Y, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(5.084044, abs=1.1e-6) and not z.grad[2].any()
    assert float(z.grad.norm()) == pytest.approx(1.570808, abs=1.1e-6)
    assert float(temperature.grad) == pytest.approx(-44.902314, abs=1.1e-5)


WITH_TEMPERATURES = {
    "nt_xent": lambda z, t, **o: F.nt_xent(z, None, t, ids=torch.arange(8) // 2, **o),
    "dcl": lambda z, t, **o: F.nt_xent(z, None, t, labels=Y, variant="dcl", **o),
    "ser": lambda z, t, **o: F.nt_xent(z, None, t, labels=Y, variant="ser", **o),
    "out": lambda z, t, **o: F.sup_con(z, Y, t, **o),
    "in": lambda z, t, **o: F.sup_con(z, Y, t, variant="in", **o),
    "hobbit": lambda z, t, **o: F.sup_con(z, Y, t, variant="hobbit", **o),
    "neighbours": lambda z, t, **o: F.soft_nearest_neighbour(z, Y, t, **o),
}


@pytest.mark.parametrize("name", WITH_TEMPERATURES)
def test_a_learnt_temperature_has_its_derivative_whatever_is_masked(name):
    """Of rows that are not there, without direction or without positives: never NaN."""
    call, z = WITH_TEMPERATURES[name], Q.clone() / Q.norm(dim=1, keepdim=True)
    z[3] = 0
    nobody, holed = torch.zeros(8, dtype=torch.bool), z.clone()
    holed[1] = math.nan
    for rows, valid in ((z, None), (holed, torch.arange(8) != 1), (holed, nobody), (z * 0, None)):
        t = torch.tensor(0.3, requires_grad=True, **DOUBLE)
        (slope,) = torch.autograd.grad(call(rows, t, valid=valid), t)
        with torch.no_grad():
            above, below = (call(rows, t + step, valid=valid) for step in (1e-6, -1e-6))
        assert float(slope) == pytest.approx(float(above - below) / 2e-6, rel=1e-6, abs=1e-8)
        assert valid is not nobody or slope == 0


def test_nothing_counts():
    z = torch.randn(5, 3, requires_grad=True)
    loss = mmfast.SupConLoss()
    value = loss(z, torch.arange(5))
    value.backward()
    assert value == 0 and not z.grad.any() and loss.last.anchors == 0
    one = mmfast.NTXentLoss(variant="ser")
    z.grad = None
    value = one(z, labels=torch.zeros(5, dtype=torch.long))
    value.backward()
    assert value == 0 and not z.grad.any() and one.last.anchors == 5


def test_equal_rows():
    z = torch.ones(8, 3, **DOUBLE)
    assert float(F.sup_con(z, Y, reduction="sum")) == pytest.approx(7 * math.log(7))
    assert float(F.nt_xent(z, None, 0.1, labels=Y, variant="ser")) == pytest.approx(1.879846, abs=1e-6)


def test_what_stays_of_a_call():
    loss = mmfast.SupConLoss()
    assert loss.last is None
    value = loss(Q, Y)
    assert loss.last.loss == value and not loss.last.loss.requires_grad
    assert loss.last.anchors == 7 and loss.last.positive_pairs == 6 + 2 + 2


def test_losses_of_rows_add_up():
    z = torch.randn(9, 4, **DOUBLE)
    labels = torch.randint(3, (9,))
    rows = F.sup_con(z, labels, reduction="none")
    assert rows.shape == (9,)
    torch.testing.assert_close(rows.sum(), F.sup_con(z, labels, reduction="sum"))
    torch.testing.assert_close(rows.mean(), F.sup_con(z, labels, over="all"))


def test_weights_are_repeated_rows_of_the_mean_only():
    z, labels = torch.randn(8, 4, **DOUBLE), torch.arange(8) // 2
    rows = F.sup_con(z, labels, reduction="none")
    weights = torch.tensor([0.0, 1, 2, 3, 0, 1, 1, 1], **DOUBLE)
    expected = (rows * weights).sum() / weights.sum()
    torch.testing.assert_close(F.sup_con(z, labels, weights=weights), expected)


@pytest.mark.parametrize("wanted", ["query", "key", "scale"])
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    query, key = torch.randn(6, 4, **DOUBLE), torch.randn(6, 4, **DOUBLE)
    inputs = {"query": query, "key": key, "scale": torch.tensor(0.3, **DOUBLE)}
    every = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    F.info_nce(every["query"], every["key"], None, every["scale"]).backward()
    inputs[wanted].requires_grad_()
    F.info_nce(inputs["query"], inputs["key"], None, inputs["scale"]).backward()
    assert torch.equal(inputs[wanted].grad, every[wanted].grad)


def test_slices_of_larger_buffers_and_repeated_runs():
    large = torch.full((40, 33), math.nan)
    large[3:23, 5:21] = torch.randn(20, 16)
    labels = torch.arange(20) // 2
    results = []
    for z in (large[3:23, 5:21], large[3:23, 5:21].clone(), large.t().contiguous().t()[3:23, 5:21]):
        z = z.detach().requires_grad_()
        loss = F.sup_con(z, labels)
        loss.backward()
        results.append((loss, z.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def saved_bytes(loss, *given):
    """Of what autograd keeps, without what is given."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(*given)
    own = {x.untyped_storage().data_ptr() for x in given}
    return sum(size for pointer, size in saved.items() if pointer not in own)


@pytest.mark.parametrize(("rows", "columns"), [(24, 8), (8, 24)], ids=["again", "kept"])
def test_what_is_saved_for_the_backward_pass(rows, columns):
    z, labels = torch.randn(rows, columns, requires_grad=True), torch.arange(rows) // 2
    scores = rows * rows * 4 if rows <= columns else 0
    # The four numbers of a row.
    assert saved_bytes(lambda *x: F.sup_con(*x, reduction="none"), z, labels) <= 16 * rows + scores + 64
    # The gradient; scalars.
    assert saved_bytes(F.sup_con, z, labels) <= z.nbytes + 64


def test_two_calls_before_one_backward_pass():
    z, labels = torch.randn(6, 4, **DOUBLE), torch.arange(6) // 2
    single, both = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = mmfast.SupConLoss()
    (loss(both, labels) + 2 * loss(both, labels.flip(0))).backward()
    loss(single, labels).backward()
    (2 * loss(single, labels.flip(0))).backward()
    torch.testing.assert_close(both.grad, single.grad)


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    model = torch.nn.Linear(7, 5, dtype=torch.float64)
    x, labels = torch.randn(16, 7, **DOUBLE), torch.randint(4, (16,))
    loss = mmfast.SupConLoss(torch.nn.Parameter(torch.tensor(0.2, **DOUBLE)))
    loss(model(x), labels).backward()
    whole = [p.grad.clone() for p in (*model.parameters(), *loss.parameters())]
    for p in (*model.parameters(), *loss.parameters()):
        p.grad = None
    mmfast.backward_in_micro_batches(lambda z: loss(z, labels), model, x.split([5, 2, 9]))
    for p, want in zip((*model.parameters(), *loss.parameters()), whole, strict=True):
        torch.testing.assert_close(p.grad, want)


LOSSES = {
    "NTXentLoss": (mmfast.NTXentLoss(), lambda loss, a, b: loss(a, b)),
    "ser": (mmfast.NTXentLoss(variant="ser"), lambda loss, a, b: loss(a, labels=Y)),
    "SupConLoss": (mmfast.SupConLoss(), lambda loss, a, b: loss(a, Y)),
    "InfoNCELoss": (mmfast.InfoNCELoss(), lambda loss, a, b: loss(a, b)),
    "ClipLoss": (mmfast.ClipLoss(learnable=True), lambda loss, a, b: loss(a, b)),
    "SigLipLoss": (mmfast.SigLipLoss(), lambda loss, a, b: loss(a, b)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole(name):
    loss, call = LOSSES[name]
    loss = copy.deepcopy(loss)
    a, b = torch.randn(8, 5), torch.randn(8, 5)
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        z = a.clone().requires_grad_()
        loss.zero_grad()
        value = function(loss, z, b)
        value.backward()
        results.append([value.detach(), z.grad, *(p.grad.clone() for p in loss.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("name", LOSSES)
def test_learning_lowers_the_loss(name):
    loss, call = LOSSES[name]
    loss = copy.deepcopy(loss)
    a, b = torch.randn(8, 5).requires_grad_(), torch.randn(8, 5).requires_grad_()
    optimiser = torch.optim.SGD([a, b, *loss.parameters()], 0.05)
    first = call(loss, a, b).detach()
    for _ in range(30):
        optimiser.zero_grad()
        call(loss, a, b).backward()
        optimiser.step()
    assert call(loss, a, b) < first


def test_derivatives_that_are_not_there_say_so():
    z = torch.randn(6, 3, requires_grad=True)
    labels = torch.arange(6) // 2
    (grad,) = torch.autograd.grad(F.sup_con(z, labels), z, create_graph=True)
    with pytest.raises(RuntimeError, match="similarity: the gradient must not be differentiated again"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"similarity: .* torch.func"):
        torch.func.grad(lambda x: F.sup_con(x, labels))(z.detach())
    with pytest.raises(RuntimeError, match="similarity: "):
        torch.func.jvp(lambda x: F.sup_con(x, labels), (z.detach(),), (z.detach(),))


def test_variants_are_documented():
    for function, variants in ((F.nt_xent, NT_XENT_VARIANTS), (F.sup_con, SUP_CON_VARIANTS)):
        assert all(f"    {name} " in function.__doc__ for name in variants)
