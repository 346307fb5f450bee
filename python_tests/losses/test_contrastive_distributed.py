"""Contrastive losses of the rows of several processes: other data on each, ragged, one of them without rows."""

import pytest
import torch
from ranks import Ranks

from mmfast import functional as F
from mmfast.losses.contrastive import SupConLoss
from mmfast.losses.transfer import directed_pkt, pkt

ROWS = [5, 2, 0, 4]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def data(processes):
    generator = torch.Generator().manual_seed(3)
    rows = sum(ROWS[:processes])
    a, b = (torch.randn(rows, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.randint(3, (rows,), generator=generator)
    weights = torch.rand(rows, dtype=torch.float64, generator=generator)
    return a, b, labels, weights


CALLS = {
    "two views": lambda a, b, labels, weights, t, **o: F.nt_xent(a, b, t, weights=weights, **o),
    "labels": lambda a, b, labels, weights, t, **o: F.nt_xent(a, None, t, labels=labels, variant="ser", **o),
    "sup_con": lambda a, b, labels, weights, t, **o: F.sup_con(
        torch.stack((a, b), 1), labels, t, valid=labels != 1, **o
    ),
    "clip": lambda a, b, labels, weights, t, **o: F.clip(a, b, t, ids=labels, weights=weights, **o),
    "targets": lambda a, b, labels, weights, t, **o: F.info_nce(
        a, torch.cat((b, a)), b.flip(0), t, targets=torch.arange(len(a)), weights=weights, **o
    ),
    "pkt": lambda a, b, labels, weights, t, **o: pkt(
        {"t": a, "v": b[:, :4]}, {("t", "v"): weights}, pairs=[("t", "v")], scale="row_sum", **o
    ),
    "directed_pkt": lambda a, b, labels, weights, t, **o: directed_pkt(
        {"t": a, "v": b}, {"t": weights, "v": torch.full_like(weights, 0.5)}, preset="released", **o
    ),
    "hinge": lambda a, b, labels, weights, t, **o: F.pairwise_hinge(a, b, weights=weights, **o),
    "hardest": lambda a, b, labels, weights, t, **o: F.pairwise_hinge(a, b, hardest=True, ids=labels, **o),
    "neighbours": lambda a, b, labels, weights, t, **o: F.soft_nearest_neighbour(
        a, labels, t, weights=weights, valid=weights > 0.2, **o
    ),
    "in": lambda a, b, labels, weights, t, **o: F.sup_con(a, labels, t, variant="in", over="pairs", **o),
    "n_pair": lambda a, b, labels, weights, t, **o: F.n_pair(a, b, l2=0.1, **o),
    "dcl": lambda a, b, labels, weights, t, **o: F.nt_xent(a, b, t, variant="dcl", **o),
    "siglip": lambda a, b, labels, weights, t, **o: F.siglip(a, b, t, bias=-t, **o),
}


def losses(inputs, start, stop, convention, group=None):
    """Of each call its value and gradients by a, b and the temperature; those of this process."""
    sharing = {"stats": None} if group is None else {"group": group, "grad_convention": convention}
    found = {}
    for name, call in CALLS.items():
        a, b, labels, weights = (x[start:stop].clone() for x in inputs)
        a.requires_grad_(), b.requires_grad_()
        t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        loss = call(a, b, labels, weights, t, **sharing)
        (3 * loss).backward()
        found[name] = (loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in (a, b, t)))
    return found


def on_rank(group, convention):
    processes, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    start = sum(ROWS[:rank])
    return losses(data(processes), start, start + ROWS[rank], convention, group)


@pytest.mark.parametrize("convention", ["true", "legacy"])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_have_the_loss_and_gradient_of_all_rows(ranks, processes, convention):
    expected = losses(data(processes), 0, sum(ROWS[:processes]), convention)
    found = ranks(on_rank, convention, size=processes)
    # What DistributedDataParallel, which averages, makes of it.
    factor = processes if convention == "true" else 1
    whole = 1 if convention == "true" else processes
    for name, (loss, grad_a, grad_b, of_t) in expected.items():
        for values in found:
            torch.testing.assert_close(values[name][0], loss)
            torch.testing.assert_close(values[name][3] * whole, of_t)
        for grad, index in ((grad_a, 1), (grad_b, 2)):
            together = torch.cat([values[name][index] for values in found])
            torch.testing.assert_close(together, grad * factor, rtol=1e-9, atol=1e-12)


def refused(group):
    rank = torch.distributed.get_rank(group)
    sentences = []
    for call in (
        lambda: F.nt_xent(torch.ones(3, 4 + rank), torch.ones(3, 4 + rank), group=group),
        lambda: F.nt_xent(
            torch.ones(3, 4), torch.ones(3, 4), reduction="mean" if rank else "sum", group=group
        ),
        lambda: F.clip(torch.ones(3, 4), torch.ones(3 + rank, 4), group=group),
    ):
        try:
            call()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def not_finite(group):
    """Of the second process's rows."""
    rank = torch.distributed.get_rank(group)
    z, other, labels = torch.ones(3 - rank, 4), torch.ones(3 - rank, 4), torch.arange(3 - rank) % 2
    if rank == 1:
        other[1, 2] = torch.nan
    sentences = []
    for call in (
        lambda: F.nt_xent(z, other, group=group),
        lambda: F.clip(z, other, group=group),
        lambda: F.pairwise_hinge(z, other, group=group),
        lambda: F.soft_nearest_neighbour(other, labels, group=group),
        lambda: F.triplet_margin(other, labels, group=group),
        lambda: pkt({"a": z, "b": other}, group=group),
        lambda: F.n_pair(z * 1e30, z * 1e30, group=group),
    ):
        try:
            call()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def test_what_is_not_finite_is_named_as_its_process_knows_it(ranks):
    words = " must be finite, got 1 NaN or infinite values of 8, the first (nan) in row 1, column 2 (on rank 1 of 2)"
    names = (
        "nt_xent: z_b",
        "clip: key",
        "pairwise_hinge: key",
        "soft_nearest_neighbour: z",
        "triplet_margin: z",
        "pkt: b",
    )
    for sentences in ranks(not_finite, size=2):
        assert sentences[:-1] == [name + words for name in names]
        assert sentences[-1].startswith("n_pair: query must have lengths within the range of torch.float32")


def statistics(group):
    start = 0 if group is None else sum(ROWS[: torch.distributed.get_rank(group)])
    stop = None if group is None else start + ROWS[torch.distributed.get_rank(group)]
    loss = SupConLoss(group=group)
    a, _, labels, _ = (x[start:stop] for x in data(2))
    loss(a, labels)
    if start:
        return None
    return [float(x) for x in (loss.last.mean_positive, loss.last.mean_negative, loss.last.accuracy)]


def test_scores_are_those_of_all_rows_and_read_by_one_process_alone(ranks):
    assert ranks(statistics, size=2)[0] == pytest.approx(statistics(None))


def test_what_must_be_equal_is_named(ranks):
    for sentences in ranks(refused, size=2):
        assert len(sentences) == 3
        assert "nt_xent: columns must be the same on every rank, got 4, 5" in sentences[0]
        assert "nt_xent: reduction must be the same on every rank, got sum, mean" in sentences[1]
        assert "clip: key must have the 3 rows of query" in sentences[2]
