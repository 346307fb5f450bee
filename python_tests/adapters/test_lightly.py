"""NTXentLoss by lightly's signature: its own code where it is, else what it computes."""

import pytest
import torch
from other_libraries import lightly_nt_xent, theirs
from similarity_rows import K, Q, golden, rows, same
from torch.nn.functional import cross_entropy, normalize

from mmfast.adapters.lightly import DCLLoss, DCLWLoss, NTXentLoss
from mmfast.errors import UserError


def nt_xent(a, b, temperature=0.5):
    z = normalize(torch.cat((a, b)))
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


@pytest.mark.parametrize("size", [(1, 3), (2, 3), (9, 5), (33, 4)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_values_and_gradients(size, temperature):
    inputs = rows(*size), rows(*size, seed=2)
    same(NTXentLoss(temperature), lambda a, b: nt_xent(a, b, temperature), *inputs)


def test_lightly_itself():
    peer = lightly_nt_xent()
    inputs = rows(9, 5), rows(9, 5, seed=2)
    for options in ({}, {"temperature": 0.07}, {"memory_bank_size": 0}):
        same(NTXentLoss(**options), peer(**options), *inputs)


def moco(a, b, bank, temperature):
    a, b = normalize(a), normalize(b)
    logits = torch.cat(((a * b).sum(1, keepdim=True), a @ bank.T), 1) / temperature
    return cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64))


def test_a_memory_bank():
    loss = NTXentLoss(0.2, (6, 5)).double()
    torch.testing.assert_close(loss.bank.rows.float().norm(dim=1), torch.ones(6))
    bank = normalize(loss.bank.rows)
    for step in range(4):
        a, b = rows(3, 5, seed=step), rows(3, 5, seed=step + 9)
        with torch.no_grad():
            loss(a, b)  # looks, and takes nothing
        before = bank.clone()
        same(loss, lambda a, b, k=before: moco(a, b, k, 0.2), a, b, tolerance=1e-6)
        bank[3 * (step % 2) :][:3] = normalize(b)
        torch.testing.assert_close(loss.bank.rows, bank, rtol=0, atol=1e-6)
    assert set(loss.state_dict()) == {f"bank.{x}" for x in ("rows", "labels", "ids", "head", "filled")}


def test_lightly_itself_with_a_memory_bank():
    ours, peer = NTXentLoss(0.2, (12, 5)).double(), lightly_nt_xent()(0.2, (12, 5)).double()
    peer.memory_bank.bank.copy_(normalize(peer.memory_bank.bank))
    ours.bank.rows.copy_(peer.memory_bank.bank)
    for step in range(7):
        same(ours, peer, rows(4, 5, seed=step), rows(4, 5, seed=step + 9))
    torch.testing.assert_close(ours.bank.rows, peer.memory_bank.bank)


def test_golden_values():
    golden(NTXentLoss(), 1.624015, (0.052028, 1.082413), Q, K)
    golden(NTXentLoss(0.07), 1.024737, (0.213097, 5.423254), Q, K)


def test_a_zero_row_has_no_gradient():
    """lightly divides it by 1e-12."""
    a, b = rows(4, 3), rows(4, 3, seed=2)
    a[1] = 0
    a.requires_grad_()
    NTXentLoss()(a, b).backward()
    assert not a.grad[1].any() and a.grad[0].any() and float(a.grad.abs().max()) < 10


EXAMPLE = """
# initialize loss function without memory bank
loss_fn = NTXentLoss(memory_bank_size=0)

# generate two random transforms of images
t0 = transforms(images)
t1 = transforms(images)

# feed through SimCLR or MoCo model
out0, out1 = model(t0), model(t1)

# calculate loss
loss = loss_fn(out0, out1)
loss.backward()
"""


def test_one_import_line():
    model = torch.nn.Linear(5, 4)
    given = {"images": torch.randn(6, 5), "transforms": lambda x: x + torch.randn_like(x), "model": model}
    exec("from mmfast.adapters.lightly import NTXentLoss" + EXAMPLE, given)
    assert model.weight.grad.any()


def test_gathering_needs_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(UserError, match="NTXentLoss: gather_distributed must be False without"):
        NTXentLoss(gather_distributed=True)


A = torch.ones(3, 4)
INVALID = [
    (lambda: DCLLoss(weight_fn=lambda a, b: a)(torch.ones(3, 4), torch.ones(3, 4)),
     "lightly.DCLLoss: weight_fn must give a tensor (3,), got (3, 4)"),
    (lambda: DCLLoss(weight_fn=lambda a, b: 1.0)(torch.ones(3, 4), torch.ones(3, 4)),
     "lightly.DCLLoss: weight_fn must give a tensor (3,), got 1.0"),
    (lambda: NTXentLoss(0.0), "lightly.NTXentLoss: temperature must be finite and above 0, got 0.0"),
    (lambda: NTXentLoss(-0.5), "lightly.NTXentLoss: temperature must be finite and above 0, got -0.5"),
    (lambda: NTXentLoss(memory_bank_size=64),
     "lightly.NTXentLoss: memory_bank_size must be 0 or (rows, columns), got 64"),
    (lambda: NTXentLoss(memory_bank_size="0"),
     "lightly.NTXentLoss: memory_bank_size must be 0 or (rows, columns), got '0'"),
    (lambda: NTXentLoss(memory_bank_size=(64, 0)),
     "lightly.NTXentLoss: memory_bank_size[1] must be at least 1, got 0"),
    (lambda: NTXentLoss(memory_bank_size=(64, 3))(A, A),
     "lightly.NTXentLoss: key must have the 3 columns of the queue, got (3, 4)"),
    (lambda: NTXentLoss()(A, A[:2]), "lightly.NTXentLoss: out1 must have the 3 rows of out0, got (2, 4)"),
    (lambda: NTXentLoss()(A, A[:, :3]), "lightly.NTXentLoss: out1 must have the 4 columns of out0, got (3, 3)"),
    (lambda: NTXentLoss()(None, A), "lightly.NTXentLoss: out0 must be a tensor, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message


def dcl(a, b, temperature, weights=None):
    a, b = normalize(a), normalize(b)
    found, own = [], torch.eye(len(a), dtype=torch.bool)
    for x, y in ((a, b), (b, a)):
        w = 1 if weights is None else weights(x, y).detach()
        negatives = torch.cat([(x @ z.T / temperature).masked_fill(own, -torch.inf) for z in (x, y)], 1)
        found.append((negatives.logsumexp(1) - w * (x * y).sum(1) / temperature).mean())
    return (found[0] + found[1]) / 2


def weights(sigma):
    return lambda a, b: 2 - len(a) * ((a * b).sum(1) / sigma).softmax(0)


@pytest.mark.parametrize("size", [(2, 3), (9, 5), (33, 4)], ids=str)
def test_decoupled(size):
    inputs = rows(*size), rows(*size, seed=2)
    same(DCLLoss(), lambda a, b: dcl(a, b, 0.1), *inputs)
    same(DCLLoss(0.3, lambda a, b: (a - b).square().sum(1)),
         lambda a, b: dcl(a, b, 0.3, lambda a, b: (a - b).square().sum(1)), *inputs)  # fmt: skip
    loss = DCLWLoss(0.2, 0.4)
    same(loss, lambda a, b: dcl(a, b, 0.2, weights(0.4)), *inputs)
    assert loss.last.anchors == 2 * size[0] and "sigma=0.4" in repr(loss)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_decoupled_by_lightly_itself():
    peer = theirs("lightly.loss.dcl_loss")
    inputs = rows(9, 5), rows(9, 5, seed=2)
    same(DCLLoss(0.2), peer.DCLLoss(0.2), *inputs)
    same(DCLWLoss(0.2, 0.4), peer.DCLWLoss(0.2, 0.4), *inputs)


def test_decoupled_refusals():
    with pytest.raises(UserError, match="DCLWLoss: gather_distributed must be False with weights of pairs"):
        DCLWLoss(gather_distributed=True)
    with pytest.raises(UserError, match="DCLLoss: temperature must be"):
        DCLLoss(0)
