"""Several processes of one run: what they know together."""

import pytest
import torch
from ranks import Ranks

from mmfast.training import processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def test_alone_a_process_is_the_main_one_and_sums_are_what_they_were():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    for same in (processes.total(x), processes.rows(x)):
        assert torch.equal(same, x) and not same.requires_grad
    assert processes.agreed(lambda: "x") == "x"


def together(_):
    rank = processes.rank()
    own = torch.arange(3.0, requires_grad=True) + 10 * rank
    before = own.clone()
    sums = processes.total(own)
    rows = processes.rows(torch.full((2 * rank, 3), float(rank), dtype=torch.float64))
    asked = []
    answer = processes.agreed(lambda: asked.append(1) or {"of": processes.rank()})
    assert torch.equal(own, before) and not sums.requires_grad
    return rank, processes.world_size(), processes.is_main(), sums, rows, len(asked), answer


def test_processes_add_up_collect_rows_and_hear_what_the_first_one_says(ranks):
    for rank, got in enumerate(ranks(together)):
        assert got[:3] == (rank, 2, rank == 0)
        assert got[3].tolist() == [10, 12, 14]
        assert got[4].dtype == torch.float64 and got[4].tolist() == [[1, 1, 1]] * 2
        assert got[5:] == (1 if rank == 0 else 0, {"of": 0})
