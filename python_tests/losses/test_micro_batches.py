"""Gradients of micro-batches in two passes are those of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn

import mmfast
from mmfast import BarlowTwinsLoss, backward_in_micro_batches
from mmfast.functional import barlow_twins

# The third is ragged.
SIZES = [(8, 8, 5), (21,), (1, 2, 18)]
PARTS = pytest.mark.parametrize("sizes", SIZES, ids=str)


def encoder(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(3)
    layers = nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 10)
    return nn.Sequential(*layers).to(dtype)


def data(sizes, dtype=torch.float64, seed=4):
    """Per micro-batch the inputs of two views (rows, 6)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    other = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype).split(sizes), other.to(dtype).split(sizes), strict=True))


def two_views(model):
    return lambda batch: tuple(model(x) for x in batch)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def whole(loss, embed, micro_batches):
    """The loss of all rows with the graphs of all micro-batches, which draw as they do one by one."""
    parts = [embed(batch) for batch in micro_batches]
    return loss(*(torch.cat(view) for view in zip(*parts, strict=True)))


def same(ours, truth, tolerance):
    # All as one vector, for the bias before a standardisation has a gradient of nothing but roundings.
    x, y = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, truth))
    assert float(y.norm()) > 0 and float((x - y).norm()) <= tolerance * float(y.norm())


@PARTS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_gradients_are_those_of_the_whole_batch(sizes, dtype, tolerance):
    model, loss, batches = encoder(dtype=dtype), BarlowTwinsLoss(), data(sizes, dtype)
    value = backward_in_micro_batches(loss, two_views(model), batches)
    ours = gradients(model)
    model.zero_grad()
    truth = loss(*(model(torch.cat(view)) for view in zip(*batches, strict=True)))
    truth.backward()
    assert value.shape == () and not value.requires_grad
    assert float(value) == pytest.approx(float(truth.detach()), rel=tolerance)
    same(ours, gradients(model), tolerance)


def test_plain_accumulation_gives_others():
    model, loss, batches = encoder(), BarlowTwinsLoss(), data((8, 8, 8))
    for batch in batches:
        (loss(*two_views(model)(batch)) / 3).backward()
    accumulated = gradients(model)
    model.zero_grad()
    backward_in_micro_batches(loss, two_views(model), batches)
    x, y = (torch.cat([g.flatten() for g in each]) for each in (accumulated, gradients(model)))
    assert float((x - y).norm() / y.norm()) > 0.1


@PARTS
def test_both_passes_draw_the_same_and_leave_what_one_leaves(sizes):
    model, loss, batches = encoder(dropout=0.5), BarlowTwinsLoss(), data(sizes)
    torch.manual_seed(7)
    truth = whole(loss, two_views(model), batches)
    truth.backward()
    expected, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(7)
    value = backward_in_micro_batches(loss, two_views(model), batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(value) == pytest.approx(float(truth.detach()), rel=1e-12)
    same(gradients(model), expected, 1e-12)


def test_a_loss_may_draw_too():
    model, batches = encoder(dropout=0.5), data((8, 5))

    def noisy(z_a, z_b):
        return barlow_twins(z_a + torch.randn_like(z_a), z_b)

    torch.manual_seed(7)
    whole(noisy, two_views(model), batches).backward()
    expected, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(7)
    backward_in_micro_batches(noisy, two_views(model), batches)
    assert torch.equal(torch.get_rng_state(), state)
    same(gradients(model), expected, 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_of_cuda_devices():
    model, loss = encoder(dropout=0.5).cuda(), BarlowTwinsLoss()
    batches = [tuple(x.cuda() for x in batch) for batch in data((8, 8, 5))]
    torch.manual_seed(7)
    whole(loss, two_views(model), batches).backward()
    expected, state = gradients(model), torch.cuda.get_rng_state()
    model.zero_grad()
    torch.manual_seed(7)
    backward_in_micro_batches(loss, two_views(model), batches)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    same(gradients(model), expected, 1e-12)


def test_augmentation_draws_the_same_in_both_passes():
    torch.manual_seed(0)
    model = nn.Linear(6, 10).double()
    augment = mmfast.TwoViews([mmfast.GaussianNoise(0.5, p=1.0)], [mmfast.TimeMask(0.5, p=1.0)])
    values = [{"x": x[:, None].repeat(1, 4, 1)} for x, _ in data((8, 5))]

    def embed(batch):
        return tuple(
            model(view["x"].sum(1)) for view in augment(batch, {"x": torch.full((len(batch["x"]),), 4)})
        )

    torch.manual_seed(7)
    whole(BarlowTwinsLoss(), embed, values).backward()
    expected = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    backward_in_micro_batches(BarlowTwinsLoss(), embed, values)
    same(gradients(model), expected, 1e-12)


def test_gradients_are_added_and_scaled():
    model, loss, batches = encoder(), BarlowTwinsLoss(), data((8, 8, 5))
    value = backward_in_micro_batches(loss, two_views(model), batches)
    once = gradients(model)
    for scale in (4.0, torch.tensor(4.0)):
        again = backward_in_micro_batches(loss, two_views(model), batches, scale=scale)
        assert torch.equal(again, value)
    same(gradients(model), [9 * g for g in once], 1e-12)


def test_with_a_grad_scaler():
    results = []
    for scaled in (False, True):
        model, batches = encoder(dtype=torch.float32), data((8, 5), torch.float32)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        scale = scaler.scale(torch.ones(()))
        backward_in_micro_batches(BarlowTwinsLoss(), two_views(model), batches, scale=scale)
        scaler.step(optimiser)
        scaler.update()
        results.append([p.detach() for p in model.parameters()])
    same(results[1], results[0], 1e-6)


class Half(nn.Module):
    """Half of it keeps out of autocast, as careful modules do."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.inner(x).float()
        with torch.autocast("cpu", enabled=False):
            return self.outer(x)


def test_autocast_is_that_of_the_caller():
    torch.manual_seed(0)
    model, batches = Half(), data((8, 8, 5), torch.float32)
    dtypes = []
    model.inner.register_forward_hook(lambda *arguments: dtypes.append(arguments[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        truth = whole(barlow_twins, two_views(model), batches)
    truth.backward()
    expected = gradients(model)
    model.zero_grad()
    dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = backward_in_micro_batches(BarlowTwinsLoss(), two_views(model), batches)
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == [torch.bfloat16] * 12
    assert torch.equal(value, truth.detach())
    # Gradients of bfloat16 weights are rounded once per micro-batch there, once per use here.
    same(gradients(model)[:2], expected[:2], 1e-2)
    same(gradients(model)[2:], expected[2:], 1e-5)


def test_only_one_graph_is_alive():
    model, loss, batches = encoder(dropout=0.5), BarlowTwinsLoss(), data((7, 7, 7))
    alive, peak = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.numel()
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.numel()

    def embed(batch):
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return two_views(model)(batch)

    def measure(function, *arguments):
        nonlocal peak
        peak = 0
        result = function(*arguments)
        del result
        assert alive == 0
        return peak

    one = measure(embed, batches[0])
    assert measure(whole, loss, embed, batches) > 2 * one
    assert measure(backward_in_micro_batches, loss, embed, batches) == one


def test_any_number_of_views():
    model, batches = encoder(), data((8, 8, 5))

    def three(batch):
        return [model(batch[0]), model(batch[1]), model(batch[0] - batch[1])]

    def loss(a, b, c):
        return barlow_twins(a, b) + barlow_twins(a, c) + barlow_twins(b, c)

    backward_in_micro_batches(loss, three, batches)
    ours = gradients(model)
    model.zero_grad()
    whole(loss, three, batches).backward()
    same(ours, gradients(model), 1e-12)
    model.zero_grad()
    backward_in_micro_batches(lambda z: z.square().mean(), model, [x for x, _ in batches])
    ours = gradients(model)
    model.zero_grad()
    model(torch.cat([x for x, _ in batches])).square().mean().backward()
    same(ours, gradients(model), 1e-12)


def test_views_without_a_gradient_and_one_tensor_as_two_views():
    model, teacher, batches = encoder(), encoder().requires_grad_(False), data((8, 8, 5))

    def taught(batch):
        return model(batch[0]), teacher(batch[1])

    def twins(batch):
        return (model(batch[0]),) * 2

    for embed, loss in (
        (taught, BarlowTwinsLoss()),
        (two_views(model), lambda a, b: barlow_twins(a, b.detach())),
        (twins, BarlowTwinsLoss()),
    ):
        model.zero_grad()
        backward_in_micro_batches(loss, embed, batches)
        ours = gradients(model)
        model.zero_grad()
        whole(loss, embed, batches).backward()
        # Of equal views only lambd is left of the loss, and most of its gradient cancels.
        same(ours, gradients(model), 1e-11)


def test_parameters_of_the_loss():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, dtype=torch.float64))

        def forward(self, a, b):
            return ((a - b.mean(0)) * self.weight).square().mean()

    model, loss, batches = encoder(), Weighted(), data((8, 8, 5))
    backward_in_micro_batches(loss, two_views(model), batches, scale=2.0)
    ours = loss.weight.grad.clone()
    loss.zero_grad()
    (2 * whole(loss, two_views(model), batches)).backward()
    same([ours], [loss.weight.grad], 1e-12)


def test_without_gradients_around_and_from_an_iterator():
    model, batches = encoder(), data((8, 5))
    backward_in_micro_batches(BarlowTwinsLoss(), two_views(model), batches)
    expected = gradients(model)
    model.zero_grad()
    with torch.no_grad():
        backward_in_micro_batches(BarlowTwinsLoss(), two_views(model), iter(batches))
    assert all(torch.equal(x, y) for x, y in zip(gradients(model), expected, strict=True))


# Several processes.

RANKS = 2


def of_rank(rank):
    return data((8, 8, 5), seed=rank)


def on_rank(group):
    """Losses, gradients and numbers exchanged: without the model, with it, and with everybody's statistics."""
    rank, results = dist.get_rank(group), []
    for stats, given in ((None, True), (None, False), ("global", True)):
        model = nn.parallel.DistributedDataParallel(encoder(dropout=0.5), process_group=group)
        exchanges = []

        def average(state, bucket, exchanges=exchanges):
            exchanges.append(bucket.buffer().numel())
            future = dist.all_reduce(bucket.buffer().div_(RANKS), group=group, async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        model.register_comm_hook(None, average)
        torch.manual_seed(100 + rank)
        loss, parts = BarlowTwinsLoss(stats=stats, group=group), of_rank(rank)
        value = backward_in_micro_batches(loss, two_views(model), parts, model=model if given else None)
        grads = [g.numpy() for g in gradients(model.module)]
        results.append((float(value), grads, sum(exchanges)))
    return results


def test_processes_exchange_gradients_once(tmp_path):
    """Each with rows of its own, against one process that has them all."""
    model, loss, all_views = encoder(dropout=0.5), BarlowTwinsLoss(), []

    def keep(*views):
        all_views.append(views)
        return loss(*views)

    values = []
    for rank in range(RANKS):
        torch.manual_seed(100 + rank)
        values.append(whole(keep, two_views(model), of_rank(rank)))
    torch.stack(values).mean().backward(retain_graph=True)
    of_each = gradients(model)
    model.zero_grad()
    of_all = loss(*(torch.cat(view) for view in zip(*all_views, strict=True)))
    of_all.backward()
    size = sum(p.numel() for p in model.parameters())

    ranks = Ranks(RANKS, tmp_path)
    of_ranks = ranks(on_rank)
    ranks.close()
    for rank, results in enumerate(of_ranks):
        expected = (values[rank], of_each, 1), (values[rank], of_each, 3), (of_all, gradients(model), 1)
        for (value, ours, exchanged), (truth, grads, times) in zip(results, expected, strict=True):
            assert value == pytest.approx(float(truth.detach()), rel=1e-12)
            same([torch.from_numpy(g) for g in ours], grads, 1e-11)
            assert exchanged == times * size


# Refusals.


def returning(*results):
    """An embed that returns these in turn."""
    results = iter(results)
    return lambda batch: next(results)


def rows(n, columns=3):
    return torch.randn(n, columns, requires_grad=True)


PAIR = rows(4), rows(4)
INVALID = [
    (ValueError, [], None, "micro_batches must hold at least 1, got 0"),
    (TypeError, [1], returning(None), "a tensor for each view, got NoneType for micro-batch 0"),
    (TypeError, [1], returning(()), "a tensor for each view, got an empty tuple for micro-batch 0"),
    (
        TypeError,
        [1],
        returning((PAIR[0], 3)),
        "floating-point tensors (rows, ...), got int for micro-batch 0",
    ),
    (TypeError, [1], returning((torch.tensor(1.0),)), "got torch.float32 () for micro-batch 0"),
    (TypeError, [1], returning((torch.arange(3),)), "got torch.int64 (3,) for micro-batch 0"),
    (ValueError, [1, 2], returning(PAIR, (rows(4), rows(3))), "got (4, 3) and (3, 3) for micro-batch 1"),
    (ValueError, [1, 2], returning(PAIR, PAIR[:1]), "as the first (2), got 1 for micro-batch 1"),
    (
        ValueError,
        [1, 2],
        returning(PAIR, (rows(2), rows(2, 5))),
        "in their rows only, got (2, 3) and (2, 5) for micro-batch 1",
    ),
    (
        ValueError,
        [1],
        returning(PAIR, (rows(3), rows(3))),
        "(4, 3) and (4, 3), got (3, 3) and (3, 3) for micro-batch 0",
    ),
    (ValueError, [1], returning(PAIR, PAIR[:1]), "(4, 3) and (4, 3), got (4, 3) for micro-batch 0"),
    (ValueError, [1], returning(PAIR, [z.detach() for z in PAIR]), "got none in micro-batch 0"),
]


@pytest.mark.parametrize(("error", "batches", "embed", "message"), INVALID, ids=[x[3] for x in INVALID])
def test_invalid_arguments(error, batches, embed, message):
    with pytest.raises(error) as caught:
        backward_in_micro_batches(BarlowTwinsLoss(), embed, batches)
    assert str(caught.value).startswith("backward_in_micro_batches: ")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(("result", "got"), [(torch.ones(3), "(3,)"), (1.0, "float"), ((1, 2), "tuple")])
def test_a_loss_that_is_no_scalar(result, got):
    with pytest.raises(ValueError) as caught:
        backward_in_micro_batches(lambda *z: result, returning(PAIR), [1])
    assert str(caught.value) == f"backward_in_micro_batches: loss must return a scalar tensor, got {got}"


def test_random_states_are_put_right_after_an_error():
    model, batches = encoder(dropout=0.5), data((8, 5))
    torch.manual_seed(7)
    whole(BarlowTwinsLoss(), two_views(model), batches)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    calls = 0

    def embed(batch):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return two_views(model)(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        backward_in_micro_batches(BarlowTwinsLoss(), embed, batches)
    assert torch.equal(torch.get_rng_state(), state)
