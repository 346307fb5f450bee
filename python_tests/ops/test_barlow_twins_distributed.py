"""Barlow Twins over processes with different data and numbers of rows, against one process that has all rows."""

import warnings

import pytest
import torch
import torch.distributed as dist
from barlow_twins_formulas import relative_error
from barlow_twins_help import request_of, settings_of
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmfast
from mmfast.adapters import lightly, official, solo, vissl
from mmfast.functional import barlow_twins, multi_view_barlow_twins
from mmfast.losses.barlow_twins import Options, evaluate_barlow_twins
from mmfast.ops.barlow_twins import op as ops
from mmfast.ops.barlow_twins.multi_view import barlow_twins_of_pairs

# Rows of each rank, by number of processes.
ROWS = {1: (13,), 2: (12, 5), 3: (9, 1, 11), 4: (7, 9, 0, 6)}
EVEN = {1: (16,), 2: (8, 8), 3: (7, 7, 7), 4: (6, 6, 6, 6)}
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def batch(rows, columns, dtype=torch.float64, views=2):
    """Views of all rows: correlated, with features of different sizes, means and correlations."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    shape = (rows, columns)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    sizes = 10 ** torch.linspace(-1, 1, columns, dtype=torch.float64)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(views)]
    return [((base + 0.5 * e + base @ mix) * sizes + 3 * m).to(dtype) for m, e in enumerate(noise)]


def mine(group, views, rows):
    """This rank's rows of the views, as leaves."""
    rank = dist.get_rank(group)
    start = sum(rows[:rank])
    return [z[start : start + rows[rank]].clone().requires_grad_() for z in views]


def run(group, rows, views, options, upstream):
    """The loss and this rank's gradients."""
    leaves = mine(group, views, rows)
    gram = options.pop("gram", None)
    loss, _ = evaluate_barlow_twins(*leaves, Options(group=group, **options).request(), gram)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype))
    return loss.detach(), [z.grad for z in leaves]


def truth(views, variant, upstream, debias=False, gram=None):
    leaves = [z.double().requires_grad_() for z in views]
    options = settings_of(variant)
    if debias:
        loss, _ = evaluate_barlow_twins(*leaves, request_of(options, debias=debias), gram)
    else:
        loss = ops.reference(*leaves, **options)
    loss.backward(torch.tensor(upstream, dtype=torch.float64))
    return loss.detach(), [z.grad for z in leaves]


@pytest.mark.rotation
@SIZES
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
@pytest.mark.parametrize("variant", ["official", "monai", "vissl", "thesis", "lightning"])
def test_loss_and_gradient_of_the_whole_batch(ranks, size, dtype, gram, variant):
    rows, columns = ROWS[size], 30 if gram else 7
    views = batch(sum(rows), columns, dtype)
    results = ranks(run, rows, views, {"variant": variant, "gram": gram}, -2.5, size=size)
    loss, grads = truth(views, variant, -2.5)
    for found, _ in results:
        assert torch.equal(found, results[0][0])
        assert float(found) == pytest.approx(float(loss), rel=TOLERANCES[dtype])
    for i, grad in enumerate(grads):
        # What DDP makes of gradients is their mean over ranks, of a sum over the rows of each.
        found = torch.cat([result[1][i] for result in results]) / size
        assert relative_error(found, grad) < TOLERANCES[dtype]


@SIZES
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "direct"])
def test_debiased(ranks, size, gram):
    rows, columns = ROWS[size], 30 if gram else 7
    views = batch(sum(rows), columns)
    results = ranks(run, rows, views, {"gram": gram, "debias": True}, 0.7, size=size)
    loss, grads = truth(views, "official", 0.7, debias=True, gram=gram)
    for found, _ in results:
        assert float(found) == pytest.approx(float(loss), rel=1e-11)
    for i, grad in enumerate(grads):
        assert relative_error(torch.cat([result[1][i] for result in results]) / size, grad) < 1e-11


@SIZES
@pytest.mark.parametrize("rows", [20, 40])
def test_the_form_goes_by_all_rows(ranks, size, rows):
    """The same numbers come out whatever the form, so the form is read off what is saved."""
    views = batch(rows, 41)
    shares = [rows // size + (rank < rows % size) for rank in range(size)]
    saved = ranks(saved_shapes, shares, views, size=size)
    for rank, shapes in enumerate(saved):
        assert ((shares[rank], rows) in shapes) == (rows == 20)
        assert ((41, 41) in shapes) == (rows == 40)


def saved_shapes(group, rows, views):
    shapes = []
    leaves = mine(group, views, rows)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        barlow_twins_of_pairs({"z_a": leaves[0], "z_b": leaves[1]}, request=Options(group=group).request())
    return shapes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_legacy_gradients_are_smaller_by_the_number_of_processes(ranks, size):
    views = batch(sum(ROWS[size]), 30)
    true, legacy = (
        ranks(run, ROWS[size], views, {"grad_convention": name}, 1.5, size=size)
        for name in ("true", "legacy")
    )
    for (loss, grads), (other, smaller) in zip(true, legacy, strict=True):
        assert torch.equal(loss, other)
        for x, y in zip(grads, smaller, strict=True):
            torch.testing.assert_close(y * size, x)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("columns", [30, 5], ids=["gram", "direct"])
@pytest.mark.parametrize("rows", [ROWS, EVEN], ids=["ragged", "even"])
def test_local_statistics(ranks, size, columns, rows):
    """C is the mean over all rows of what each rank standardised by itself."""
    rows = [max(2, n) for n in rows[size]]
    views = batch(sum(rows), columns)
    results = ranks(run, rows, views, {"stats": "local"}, -1.5, size=size)
    leaves = [z.clone().requires_grad_() for z in views]
    hats = [
        torch.cat([nn.functional.batch_norm(part, None, None, training=True) for part in z.split(rows)])
        for z in leaves
    ]
    c = hats[0].T @ hats[1] / sum(rows)
    off = c - c.diagonal().diag()
    loss = (1 - c.diagonal()).square().sum() + 5e-3 * off.square().sum()
    loss.backward(torch.tensor(-1.5))
    for found, _ in results:
        assert float(found) == pytest.approx(float(loss.detach()), rel=1e-11)
    for i, z in enumerate(leaves):
        found = torch.cat([result[1][i] for result in results]) / size
        assert relative_error(found, z.grad) < 1e-11


def test_upstream_gradients_of_all_ranks_add_up(ranks):
    views = batch(17, 30)
    results = ranks(different_upstreams, ROWS[2], views, size=2)
    _, grads = truth(views, "official", 1 + 4)
    for i, grad in enumerate(grads):
        assert relative_error(torch.cat([result[i] for result in results]), grad) < 1e-11


def different_upstreams(group, rows, views):
    leaves = mine(group, views, rows)
    loss = barlow_twins(*leaves, group=group)
    (loss * (1.0, 4.0)[dist.get_rank(group)]).backward()
    return [z.grad for z in leaves]


@SIZES
@pytest.mark.parametrize("columns", [40, 6], ids=["gram", "direct"])
def test_a_model_under_ddp_learns_as_in_one_process(ranks, size, columns):
    """Parameters after two steps of DDP, each rank with its own and another number of rows."""
    rows = [max(1, n) for n in ROWS[size]]
    inputs = [x.float() for x in batch(sum(rows), 9)]
    results = ranks(train, rows, inputs, columns, size=size)
    expected = steps(network(columns), inputs, mmfast.BarlowTwinsLoss(stats=None))
    for found in results:
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, y) for found in results for x, y in zip(found, results[0], strict=True))


def network(columns):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, columns))


def steps(model, inputs, loss):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        # One forward pass: DDP would take the second for the start of another step.
        loss(*model(torch.cat(inputs)).chunk(2)).backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


def train(group, rows, inputs, columns):
    own = [x.detach() for x in mine(group, inputs, rows)]
    model = DistributedDataParallel(network(columns), process_group=group)
    return steps(model, own, mmfast.BarlowTwinsLoss(group=group))


CASES = {
    "a large offset": lambda z: z + 1e4,
    "a small scale": lambda z: z * 1e-3,
    "a constant column": lambda z: torch.cat((torch.ones_like(z[:, :1]), z[:, 1:]), 1),
    "a column that is constant on the first rank only": lambda z: torch.cat(
        (z[:, :1] * (torch.arange(len(z)) > 8)[:, None], z[:, 1:]), 1
    ),
    "a row of zeros": lambda z: z * (torch.arange(len(z)) != 3)[:, None],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_awkward_embeddings(ranks, case, dtype):
    views = [CASES[case](z).to(dtype) for z in batch(21, 30)]
    results = ranks(run, ROWS[3], views, {}, 1.0, size=3)
    loss, grads = truth(views, "official", 1.0)
    # Embeddings of 1e4 have lost digits before the loss sees them, not in it.
    tolerance = TOLERANCES[dtype]
    assert all(float(found) == pytest.approx(float(loss), rel=tolerance) for found, _ in results)
    for i, grad in enumerate(grads):
        assert relative_error(torch.cat([result[1][i] for result in results]) / 3, grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_fp32(ranks, dtype):
    views = batch(21, 30, dtype)
    results = ranks(run, ROWS[3], views, {}, 1.0, size=3)
    loss, grads = truth(views, "official", 1.0)
    assert all(found.dtype == torch.float32 for found, _ in results)
    assert all(float(found) == pytest.approx(float(loss), rel=1e-5) for found, _ in results)
    for i, grad in enumerate(grads):
        found = torch.cat([result[1][i] for result in results])
        # No more than rounding.
        assert found.dtype == dtype
        assert relative_error(found / 3, grad) < 2 * torch.finfo(dtype).eps


def test_runs_are_bit_equal(ranks):
    views = batch(22, 30, torch.float32)
    first, second = (ranks(run, ROWS[4], views, {}, 1.0, size=4) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x[0], y[0]) and all(map(torch.equal, x[1], y[1]))


def many(group, rows, views, present):
    leaves = mine(group, views, rows)
    start = sum(rows[: dist.get_rank(group)])
    present = None if present is None else present[start : start + len(leaves[0])]
    loss = multi_view_barlow_twins(leaves, present, weights={(0, 1): 1.0, (1, 2): 0.3}, group=group)
    loss.backward()
    return loss.detach(), [z.grad for z in leaves]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [30, 5], ids=["gram", "direct"])
def test_many_views(ranks, masked, columns):
    views = batch(21, columns, views=3)
    present = torch.rand(21, 3, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    results = ranks(many, ROWS[3], views, present, size=3)
    leaves = [z.clone().requires_grad_() for z in views]
    loss = multi_view_barlow_twins(leaves, present, weights={(0, 1): 1.0, (1, 2): 0.3}, stats=None)
    loss.backward()
    for found, _ in results:
        assert float(found) == pytest.approx(float(loss.detach()), rel=1e-11)
    for i, z in enumerate(leaves):
        assert relative_error(torch.cat([grads[i] for _, grads in results]) / 3, z.grad) < 1e-11


def adapters(group, views):
    """What the adapters give in the default group, per rank: loss and gradient of the first view."""
    found = {}
    for name, call in {
        "lightly": lightly.BarlowTwinsLoss(gather_distributed=True),
        "lightly alone": lightly.BarlowTwinsLoss(),
        "solo": solo.barlow_loss_func,
        "vissl": lambda a, b: vissl.BarlowTwinsCriterion(0.0051, 0.024, a.shape[1])(torch.cat((a, b))),
        "official": official.BarlowTwins(nn.Identity(), nn.Identity(), 5e-3),
    }.items():
        leaves = mine(group, views, EVEN[4])
        loss = call(*leaves)
        loss.backward()
        found[name] = loss.detach(), leaves[0].grad
    return found


def test_adapters_share_as_their_projects_do(ranks):
    views = batch(24, 30)
    results = ranks(adapters, views)
    expected = {
        "lightly": ({"stats": "local"}, 1),
        "solo": ({"stats": "local", "variant": "solo"}, 4),
        "vissl": ({"variant": "vissl"}, 4),
        "official": ({}, 4),
    }
    for name, (options, smaller) in expected.items():
        other = ranks(run, EVEN[4], views, options, 1.0)
        for found, (loss, grads) in zip(results, other, strict=True):
            torch.testing.assert_close(found[name][0], loss)
            torch.testing.assert_close(found[name][1] * smaller, grads[0])
    for rank, found in enumerate(results):
        own = [z[6 * rank : 6 * rank + 6] for z in views]
        torch.testing.assert_close(found["lightly alone"][0], barlow_twins(*own))


def without_deprecated_collectives(group, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for gram in (True, False):
            z_a, z_b = mine(group, batch(sum(ROWS[size]), 20), ROWS[size])
            evaluate_barlow_twins(z_a, z_b, Options(group=group).request(), gram)[0].backward()
        with pytest.raises(ValueError, match="must be the same on every rank"):
            barlow_twins(z_a, z_b, 0.1 * dist.get_rank(group), group=group)


def test_no_collective_is_deprecated(ranks):
    ranks(without_deprecated_collectives, 2, size=2)


def constant_columns(group, size, variant):
    """Their gradient on this rank, also where their number is nothing to divide by a count of rows."""
    views = batch(sum(ROWS[size]), 20)
    for z in views:
        z[:, :3] = torch.tensor([0.1, 1 / 3, 1e5 / 7])
    leaves = mine(group, views, ROWS[size])
    barlow_twins(*leaves, variant=variant, group=group).backward()
    return [z.grad for z in leaves]


@pytest.mark.parametrize("variant", ["catalyst", "monai", "vissl"])
def test_columns_constant_on_all_ranks_get_no_gradient(ranks, variant):
    for grads in ranks(constant_columns, 3, variant, size=3):
        assert all(not g[:, :3].any() and g.isfinite().all() and g[:, 3:].any() for g in grads)
