"""Batch normalisation over processes is that of one process with all rows."""

import copy

import pytest
import torch
from ranks import Ranks
from torch import nn

from mmfast.models import Projector
from mmfast.models.layers.batch_norm import SharedBatchNorm, share_batch_norm, unshare_batch_norm


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def layer(momentum=0.1, affine=True, track=True):
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(4, momentum=momentum, affine=affine, track_running_stats=track).double()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def rows(n, *more):
    generator = torch.Generator().manual_seed(n)
    # Far from 0 beside its spread, where E[x^2] - E[x]^2 would cancel.
    return torch.randn(n, 4, *more, dtype=torch.float64, generator=generator) + 1e4


def stepped(norm, x, weights):
    """Two training steps and one in evaluation mode: outputs, gradients, statistics."""
    outs = []
    for scale in (1.0, 2.0):
        own = (scale * x).requires_grad_()
        y = norm(own)
        (y.sin() * weights).sum().backward()
        outs += [y.detach(), own.grad]
    gradients = [p.grad for p in norm.parameters()]
    buffers = {name: value.clone() for name, value in norm.named_buffers()}
    return outs, gradients, buffers, norm.eval()(x).detach()


def shared_step(_, options, sizes, more):
    rank = torch.distributed.get_rank()
    x = rows(sum(sizes), *more).split(sizes)[rank]
    norm = share_batch_norm(nn.Sequential(layer(**options)))[0]
    assert type(norm) is SharedBatchNorm
    return stepped(norm, x, x.cos())


@pytest.mark.parametrize(
    ("options", "sizes", "more"),
    [
        ({}, (5, 1, 3), ()),
        ({"momentum": None}, (0, 4, 1), ()),
        ({"affine": False}, (2, 2, 2), ()),
        ({"track": False}, (3, 0, 4), (5,)),
    ],
)
def test_outputs_gradients_and_statistics_are_those_of_one_process(ranks, options, sizes, more):
    x = rows(sum(sizes), *more)
    outs, gradients, buffers, evaluated = stepped(layer(**options), x, x.cos())
    parts = ranks(shared_step, options, sizes, more)
    for i, whole in enumerate(outs):
        torch.testing.assert_close(torch.cat([part[0][i] for part in parts]), whole)
    for i, whole in enumerate(gradients):
        torch.testing.assert_close(sum(part[1][i] for part in parts), whole)
    for part in parts:
        torch.testing.assert_close(part[2], buffers)
    if options.get("track", True):
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), evaluated)


def gradcheck(_):
    """Of the sum over processes, each moving its own rows in turn."""
    rank = torch.distributed.get_rank()
    norm = share_batch_norm(nn.Sequential(layer()))[0]
    x = rows(6).split((3, 1, 2))[rank] - 1e4

    def loss(x):
        y = norm(x)
        total = (y.sin() * torch.arange(1.0, 5, dtype=torch.float64)).sum().detach()
        torch.distributed.all_reduce(total)
        return y, float(total)

    own = x.clone().requires_grad_()
    y, _ = loss(own)
    (y.sin() * torch.arange(1.0, 5, dtype=torch.float64)).sum().backward()
    worst = 0.0
    for mover, count in enumerate((3, 1, 2)):
        for i in range(4 * count):
            ends = []
            for step in (1e-6, -1e-6):
                moved = x.clone()
                if rank == mover:
                    moved.view(-1)[i] += step
                ends.append(loss(moved)[1])
            if rank == mover:
                worst = max(worst, abs((ends[0] - ends[1]) / 2e-6 - own.grad.view(-1)[i].item()))
    return worst


def test_the_gradient_is_that_of_finite_differences_through_all_processes(ranks):
    assert max(ranks(gradcheck)) < 1e-7


def too_few(_):
    norm = share_batch_norm(nn.Sequential(layer()))[0]
    with pytest.raises(ValueError, match="more than 1 row in all processes"):
        norm(rows(1)[torch.distributed.get_rank() :])
    return True


def one_row_each(_):
    projector = share_batch_norm(Projector(4, (3, 2)).double())
    return projector(rows(3)[torch.distributed.get_rank()][None]).shape == (1, 2)


def test_one_row_in_a_process_is_enough_one_in_all_is_not(ranks):
    assert all(ranks(one_row_each))
    # The others, without rows, wait for nobody: they are told by their own sum.
    assert all(ranks(too_few))


def test_sharing_keeps_parameters_and_state_and_is_undone():
    projector = Projector(4, (3, 3, 2))
    before, parameters = copy.deepcopy(projector.state_dict()), list(projector.parameters())
    shared = share_batch_norm(projector)
    assert sum(isinstance(layer, SharedBatchNorm) for layer in shared) == 2
    assert all(a is b for a, b in zip(parameters, shared.parameters(), strict=True))
    assert list(shared.state_dict()) == list(before)
    x = torch.randn(5, 4)
    alone = copy.deepcopy(projector)
    assert [type(layer) for layer in unshare_batch_norm(alone)][1] is nn.BatchNorm1d
    assert torch.equal(alone(x), shared(x))
