"""Contrastive adapters on two processes: gradients after DistributedDataParallel's mean are those of the peers."""

import os

import pytest
import torch
import torch.distributed as dist
from other_libraries import folder_of, lightly_nt_xent, theirs
from ranks import Ranks
from similarity_rows import DOUBLE, gradients, rows

from mmfast.adapters import lightly, open_clip, solo

A, B, IDS = rows(8, 5), rows(8, 5, seed=2), torch.tensor([0, 1, 2, 3, 1, 0, 3, 2])
SCALE, BIAS = torch.tensor(4.0, **DOUBLE), torch.tensor(-2.0, **DOUBLE)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def own(x):
    return x.chunk(2)[dist.get_rank()]


def mean(x):
    """What DistributedDataParallel makes of gradients that each process has: here of parameters."""
    x = x.clone()
    dist.all_reduce(x)
    return x / 2


def clip_of(group, module, options):
    options |= {"rank": dist.get_rank(), "world_size": 2}
    code = open_clip if module == "ours" else theirs("open_clip.loss")
    name = "ClipLoss" if "local_loss" in options else "SigLipLoss"
    loss = getattr(code, name)(**options)
    value, a, b, scale, bias = gradients(loss, own(A), own(B), SCALE, BIAS, upstream=1.0)
    return mean(value), a / 2, b / 2, mean(scale), mean(bias)


def with_path(group, path, function, *arguments):
    os.environ["MMFAST_PEERS"] = path
    return function(group, *arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"local_loss": False, "gather_with_grad": False},
        {"local_loss": False, "gather_with_grad": True},
        {"local_loss": True, "gather_with_grad": True},
        {},
        {"dist_impl": "gather"},
    ],
    ids=str,
)
def test_open_clip(ranks, options):
    path = str(folder_of("open_clip").parent)
    found = ranks(with_path, path, clip_of, "ours", options)
    expected = ranks(with_path, path, clip_of, "theirs", options)
    for ours, truth in zip(found, expected, strict=True):
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def clip_gradients(group, options):
    return clip_of(group, "ours", options)


def test_open_clip_against_one_process(ranks):
    """Also where open_clip is not installed."""
    whole = gradients(open_clip.ClipLoss(), A, B, SCALE, upstream=1.0)
    for gather, factor in ((True, 1), (False, 2)):
        found = ranks(clip_gradients, {"local_loss": False, "gather_with_grad": gather})
        for index in (1, 2):
            together = torch.cat([x[index] for x in found])
            torch.testing.assert_close(together * factor, whole[index], rtol=1e-9, atol=1e-12)
        for x in found:
            torch.testing.assert_close((x[0], x[3]), (whole[0], whole[3]))


def lightly_of(group, module, gather):
    code = lightly.NTXentLoss if module == "ours" else lightly_nt_xent()
    value, a, b = gradients(code(gather_distributed=gather), own(A), own(B), upstream=1.0)
    return mean(value), a / 2, b / 2


@pytest.mark.parametrize("gather", [True, False])
def test_lightly(ranks, gather):
    path = str(folder_of("lightly").parent)
    found = ranks(with_path, path, lightly_of, "ours", gather)
    expected = ranks(with_path, path, lightly_of, "theirs", gather)
    for ours, truth in zip(found, expected, strict=True):
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def bank_of(group, module):
    code = lightly.NTXentLoss if module == "ours" else lightly_nt_xent()
    loss = code(0.2, (16, 5), gather_distributed=True).double()
    bank = loss.bank.rows if module == "ours" else loss.memory_bank.bank
    bank.copy_(torch.nn.functional.normalize(rows(16, 5, seed=7)))
    found = [gradients(loss, own(A) + step, own(B) - step) for step in range(3)]
    return *(x for one in found for x in one), loss.bank.rows if module == "ours" else loss.memory_bank.bank


def test_lightly_with_a_memory_bank(ranks):
    path = str(folder_of("lightly").parent)
    found = ranks(with_path, path, bank_of, "ours")
    for ours, truth in zip(found, ranks(with_path, path, bank_of, "theirs"), strict=True):
        for x, y in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def simclr_of(group):
    return gradients(lambda z: solo.simclr_loss_func(z, own(IDS)), own(A), upstream=1.0)


def test_solo_learn_gathers(ranks):
    whole = gradients(lambda z: solo.simclr_loss_func(z, IDS), A, upstream=1.0)
    found = ranks(simclr_of)
    torch.testing.assert_close(torch.cat([x[1] for x in found]) / 2, whole[1], rtol=1e-9, atol=1e-12)
    assert all(torch.equal(x[0], found[0][0]) and torch.allclose(x[0], whole[0]) for x in found)
