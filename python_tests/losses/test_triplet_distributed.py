"""Triplet losses of the rows of several processes: other data on each, ragged, one of them without rows."""

import pytest
import torch
from ranks import Ranks

from mmfast.losses.triplet import MININGS, smooth_triplet, triplet_margin

ROWS = [5, 2, 0, 6]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def data(processes):
    generator = torch.Generator().manual_seed(3)
    rows = sum(ROWS[:processes])
    z = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(2, (rows,), generator=generator)
    weights = torch.rand(rows, dtype=torch.float64, generator=generator)
    return z, labels, weights, torch.arange(rows) % 4 != 3


CALLS = {m: (lambda *args, m=m, **o: triplet_margin(*args, 0.5, mining=m, **o)) for m in MININGS}
CALLS["smooth"] = lambda *args, **o: smooth_triplet(*args, **o)


def losses(inputs, start, stop, convention, group=None):
    """Of each call its value and the gradient by the rows of this process."""
    sharing = {"stats": None} if group is None else {"group": group, "grad_convention": convention}
    found = {}
    for name, call in CALLS.items():
        for score in ("cosine", "euclidean"):
            z, labels, weights, valid = (x[start:stop].clone() for x in inputs)
            z.requires_grad_()
            loss = call(z, labels, weights=weights, valid=valid, score=score, **sharing)
            (3 * loss).backward()
            found[name, score] = (loss.detach(), z.grad)
    return found


def on_rank(group, convention):
    processes, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    start = sum(ROWS[:rank])
    return losses(data(processes), start, start + ROWS[rank], convention, group)


@pytest.mark.parametrize("convention", ["true", "legacy"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_have_the_loss_and_gradient_of_all_rows(ranks, processes, convention):
    expected = losses(data(processes), 0, sum(ROWS[:processes]), convention)
    found = ranks(on_rank, convention, size=processes)
    # What DistributedDataParallel, which averages, makes of it.
    factor = processes if convention == "true" else 1
    for name, (loss, grad) in expected.items():
        for values in found:
            torch.testing.assert_close(values[name][0], loss)
        together = torch.cat([values[name][1] for values in found])
        torch.testing.assert_close(together, grad * factor, rtol=1e-9, atol=1e-12)


def refused(group):
    rank = torch.distributed.get_rank(group)
    try:
        triplet_margin(torch.ones(3, 4), torch.zeros(3).long(), 0.1 + rank, group=group)
    except ValueError as error:
        return str(error)


def test_what_must_be_equal_is_named(ranks):
    for sentence in ranks(refused, size=2):
        assert "triplet_margin: margin must be the same on every rank, got 0.1, 1.1" in sentence
