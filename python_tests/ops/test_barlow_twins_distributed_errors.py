"""Processes that share a batch raise the same error, and those that do not leave each other alone."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import mmfast
from mmfast.functional import barlow_twins, multi_view_barlow_twins


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def failing(group, kind):
    """The message of the error on this rank, where rank 1 does something wrong; and that the group still works."""
    rank = dist.get_rank(group)
    wrong = rank == 1
    z_a, z_b = torch.randn(2, 6, 8, dtype=torch.float64).unbind()
    z_a.requires_grad_()
    options = {"group": group}
    if wrong and kind == "NaN":
        z_a.data[2, 3] = float("nan")
    elif wrong and kind == "shape":
        z_b = z_b[:5]
    elif wrong and kind == "no tensor":
        z_a = None
    elif wrong and kind == "columns":
        z_a, z_b = z_a[:, :7], z_b[:, :7]
    elif wrong and kind == "dtype":
        z_a, z_b = z_a.float(), z_b.float()
    elif wrong and kind == "gradient":
        z_a = z_a.detach()
    elif kind == "lambd":
        options["lambd"] = (0.1, 0.2, 0.1)[rank]
    elif wrong and kind == "stats":
        options["stats"] = "no"
    elif kind == "few":
        z_a, z_b = (z[: int(rank == 2)] for z in (z_a, z_b))
    elif wrong and kind == "infinite":
        z_b[4, 0] = float("inf")
        options["stats"] = "local"
    elif kind == "one row":
        z_a, z_b = (z[: 1 if wrong else 6] for z in (z_a, z_b))
        options["stats"] = "local"
    elif kind == "debias":
        z_a, z_b = (z[:1] for z in (z_a, z_b))
        options["debias"] = True
    if kind == "infinite":
        options["stats"] = "local"
    words = {"a word for a number": ("lambd", "0.1"), "a word for a switch": ("debias", "no"),
             "no such variant": ("variant", "best")}  # fmt: skip
    if wrong and kind in words:
        name, value = words[kind]
        options[name] = value
    message = None
    try:
        if kind == "weights":
            multi_view_barlow_twins([z_a, z_b], weights={(0, 2 if wrong else 1): 1.0}, group=group)
        barlow_twins(z_a, z_b, **options)
    except (ValueError, TypeError) as error:
        message = f"{type(error).__name__}: {error}"
    works = barlow_twins(*torch.randn(2, 6, 8).unbind(), group=group)
    return message, float(works)


FAILURES = {
    "NaN": "UserError: {}z_a must be finite, got 1 NaN or infinite values of 48, the first (nan) in row 2, "
    "column 3{}",
    "infinite": "UserError: {}z_b must be finite, got 1 NaN or infinite values of 48, the first (inf) in row 4, "
    "column 0{}",
    "shape": "UserError: {}z_b must have the shape of z_a (6, 8), got (5, 8){}",
    "no tensor": "TypeError: {}z_a must be a tensor, got None{}",
    "columns": "UserError: {}the number of columns must be the same on every rank, got [8, 8], [7, 7], [8, 8]",
    "dtype": "UserError: {}dtype must be the same on every rank, got torch.float64, torch.float32, torch.float64",
    "gradient": "UserError: {}that a gradient is required must be the same on every rank, got [True, False], "
    "[False, False], [True, False]",
    "lambd": "UserError: {}the options must be the same on every rank, got ",
    "stats": "UserError: {}stats must be one of 'global', 'local', None, got 'no'{}",
    "a word for a number": "TypeError: {}lambd must be a number, got '0.1'{}",
    "a word for a switch": "TypeError: {}debias must be True or False, got 'no'{}",
    "no such variant": "UserError: {}variant must be one of ",
    "weights": "UserError: multi_view_{}weights must name each pair of different views once (0, 1), got (0, 2){}",
    "few": "UserError: {}a batch must have at least 2 rows (a correlation over one sample is undefined), got 1 on "
    "the 3 ranks",
    "one row": "UserError: {}with stats='local' every rank must have at least 2 rows, got 6, 1, 6",
    "debias": "UserError: {}debias must have at least 4 rows, got 3 on the 3 ranks",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_every_rank_raises_the_same_error(ranks, kind):
    results = ranks(failing, kind, size=3)
    messages = [message for message, _ in results]
    assert len(set(messages)) == 1
    assert messages[0].startswith(FAILURES[kind].format("barlow_twins: ", " (on rank 1 of 3)")), messages[0]
    assert len({works for _, works in results}) == 1


def outside(group):
    """Of a group that not every rank is in, and of none."""
    inner = dist.new_group([0, 1])
    try:
        barlow_twins(torch.randn(6, 8), torch.randn(6, 8), group=inner)
    except mmfast.UserError as error:
        return str(error)
    with contextlib.suppress(mmfast.UserError):
        barlow_twins(torch.randn(6, 8), torch.randn(6, 8), group="world")
        return "not refused"


def test_groups_of_others_are_refused(ranks):
    message = (
        "barlow_twins: group must be a process group of this process, got a group that this process is not in"
    )
    assert ranks(outside) == [None, None, message, message]


def test_without_a_process_group():
    z_a, z_b = torch.randn(2, 6, 8).unbind()
    assert torch.equal(barlow_twins(z_a, z_b), barlow_twins(z_a, z_b, stats=None))
    with pytest.raises(
        mmfast.UserError, match=r"group must be None where no process group is initialised .* got object"
    ):
        barlow_twins(z_a, z_b, group=object())


def no_communication(group):
    """stats=None: what one rank computes does not need the others."""
    if dist.get_rank(group) == 0:
        return float(barlow_twins(*torch.randn(2, 6, 8).unbind(), stats=None))


def test_a_rank_for_itself(ranks):
    assert isinstance(ranks(no_communication)[0], float)
