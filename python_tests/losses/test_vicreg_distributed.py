"""VICReg of the rows of several processes: other data on each, ragged, one of them without rows."""

import pytest
import torch
from ranks import Ranks

from mmfast.losses.vicreg import VICRegLoss, vicreg

ROWS = [5, 2, 0, 4]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def data(processes, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            offset
            + torch.randn(sum(ROWS[:processes]), columns, dtype=torch.float64, generator=generator) * 0.7
        ).to(dtype)
        for offset in (0.0, 0.2)
    ]


def losses(z, start, stop, sharing):
    """Of both variants the components and gradients of this process's rows."""
    found = []
    for variant in ("official", "solo"):
        a, b = (x[start:stop].clone().requires_grad_() for x in z)
        loss = VICRegLoss(variant=variant, **sharing)
        (3 * loss(a, b)).backward()
        found.append((torch.stack(loss.last), a.grad, b.grad))
    return found


def on_rank(group, columns, convention, dtype):
    processes, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    start = sum(ROWS[:rank])
    sharing = {"group": group, "grad_convention": convention}
    return losses(data(processes, columns, dtype), start, start + ROWS[rank], sharing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("convention", ["true", "legacy"])
@pytest.mark.parametrize("columns", [3, 30])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_have_the_loss_and_gradient_of_all_rows(ranks, processes, columns, convention, dtype):
    inputs = [z.double() for z in data(processes, columns, dtype)]
    expected = losses(inputs, 0, sum(ROWS[:processes]), {"stats": None})
    found = ranks(on_rank, columns, convention, dtype, size=processes)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    # What DistributedDataParallel, which averages, makes of it.
    factor = processes if convention == "true" else 1
    for variant, (components, *grads) in enumerate(expected):
        for values in found:
            torch.testing.assert_close(
                values[variant][0].double(), components, rtol=2 * tolerance, atol=tolerance
            )
        for index, grad in enumerate(grads):
            together = torch.cat([values[variant][1 + index] for values in found]).double()
            torch.testing.assert_close(
                together, grad * factor, rtol=0, atol=tolerance * float(factor * grad.norm())
            )


def alone(group):
    rank = torch.distributed.get_rank(group)
    a, b = data(2, 6)
    rows = slice(0, 5) if rank == 0 else slice(5, 7)
    return vicreg(a[rows], b[rows], stats=None), vicreg(a[rows], b[rows], group=group)


def test_without_stats_processes_have_nothing_to_do_with_each_other(ranks):
    a, b = data(2, 6)
    whole = vicreg(a, b)
    for rows, (own, shared) in zip((slice(0, 5), slice(5, 7)), ranks(alone, size=2), strict=True):
        torch.testing.assert_close(own, vicreg(a[rows], b[rows]))
        torch.testing.assert_close(shared, whole)


def refused(group):
    rank = torch.distributed.get_rank(group)
    z = torch.ones(3, 4)
    sentences = []
    for a, given in (
        (torch.ones(3, 4 + rank), {}),
        (z, {"covariance": 1.0 + rank}),
        (z, {"variant": "solo" if rank else "official"}),
        (z.double() if rank else z, {}),
        (z / (rank - 1), {}),
        (z * float("nan") if rank else z, {}),
        (z[0] if rank else z, {}),
        (z[: 1 - rank], {}),
        (z.clone().requires_grad_(rank == 0), {}),
    ):
        try:
            vicreg(a, a, group=group, **given)
            sentences.append("")
        except (TypeError, ValueError) as error:
            sentences.append(str(error))
    return sentences


def test_errors_are_raised_together(ranks):
    first, second = ranks(refused, size=2)
    assert first == second
    options = "vicreg: the options must be the same on every rank, got "
    assert first[0] == "vicreg: the number of columns must be the same on every rank, got 4, 5"
    assert first[1].startswith(options) and first[2].startswith(options)
    assert first[3] == "vicreg: dtype must be the same on every rank, got torch.float32, torch.float64"
    assert first[4] == (
        "vicreg: z_a must be finite, got 12 NaN or infinite values of 12, the first (inf) in row 0, column 0 "
        "(on rank 1 of 2)"
    )
    assert first[5].startswith("vicreg: z_a must be finite, got 12") and first[5].endswith("(on rank 1 of 2)")
    assert first[6] == "vicreg: z_a must have shape (B, D), got (4,) (on rank 1 of 2)"
    assert first[7] == (
        "vicreg: a batch must have at least 2 rows (a variance of one sample is undefined), got 1 on the 2 ranks"
    )
    assert first[8] == (
        "vicreg: that a gradient is required must be the same on every rank, got [True, True], [False, False]"
    )
