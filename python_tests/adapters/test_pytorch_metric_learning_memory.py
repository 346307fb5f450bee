"""CrossBatchMemory by pytorch-metric-learning's signature."""

import pytest
import torch
from metric_learning import Formula, ours_of, theirs_of
from other_libraries import metric_learning
from similarity_rows import Q, Y, golden, gradients, rows, same
from torch.nn.functional import normalize

from mmfast.adapters.pytorch_metric_learning import losses

every_loss = pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])


def memories(name, size, columns=5):
    ours, theirs = ours_of(name), theirs_of(name)
    memory = metric_learning("losses.CrossBatchMemory")(theirs, columns, size)
    return losses.CrossBatchMemory(ours, columns, size).double(), memory


@every_loss
@pytest.mark.parametrize("size", [8, 16, 64])
def test_memory(name, size):
    """Growing, full, and wrapped around at the end of a batch."""
    ours, theirs = memories(name, size)
    for step in range(5):
        labels = torch.randint(3, (8,), generator=torch.Generator().manual_seed(step))
        same(lambda z, y=labels: ours(z, y), lambda z, y=labels: theirs(z, y), rows(8, 5, seed=step))


@every_loss
def test_memory_with_a_mask(name):
    ours, theirs = memories(name, 24)
    mask = torch.arange(12) % 3 > 0
    for step in range(5):
        labels = torch.randint(3, (12,), generator=torch.Generator().manual_seed(step))
        same(
            lambda z, y=labels: ours(z, y, enqueue_mask=mask),
            lambda z, y=labels: theirs(z, y, enqueue_mask=mask),
            rows(12, 5, seed=step),
        )


@every_loss
@pytest.mark.parametrize("size", [8, 20])
def test_a_memory_is_what_it_holds(name, size):
    """Also where it wraps around, or pytorch-metric-learning is not installed."""
    memory, formula = losses.CrossBatchMemory(ours_of(name), 5, size).double(), Formula(name)
    held, held_labels = torch.zeros(0, 5).double(), Y[:0]
    for step in range(5):
        labels = torch.randint(3, (8,), generator=torch.Generator().manual_seed(step))
        z = rows(8, 5, seed=step)
        held, held_labels = torch.cat((held, z))[-size:], torch.cat((held_labels, labels))[-size:]
        first = len(held) - 8

        def truth(z, y=labels, first=first, held=held, held_labels=held_labels):
            a1, p, a2, n = Formula.pairs(y, held_labels, False)
            other = p != a1 + first
            return formula(z, None, (a1[other], p[other], a2, n), held)

        same(lambda z, y=labels: memory(z, y), truth, z)


def test_golden_gradient_of_a_memory():
    """Candidates of the batch are detached."""
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 2, 8).double()
    memory.queue.enqueue(Q[4:], labels=Y[4:], normalise=False)
    golden(lambda q: memory(q, Y[:4]), 3.241533, (0.761701,), Q[:4])


def test_a_memory_is_saved_whole():
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 8)
    memory(rows(6, 5).float(), Y[:6])
    again = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 8)
    again.load_state_dict(memory.state_dict())
    z = rows(6, 5, seed=3).float()
    assert memory(z, Y[2:]) == again(z, Y[2:])
    memory.reset_queue()
    assert not memory.queue.valid.any()


def test_where_a_row_goes_over_the_end_of_the_memory_it_is_still_itself():
    """pytorch-metric-learning compares some of them with themselves there."""
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 5, 7).double()
    memory(rows(5, 5), Y[:5])
    z, labels = rows(5, 5, seed=2), torch.tensor([0, 0, 1, 1, 2])
    found = gradients(lambda z: memory(z, labels), z)
    # Of the first five rows the last two stay.
    before = normalize(rows(5, 5)[3:5])
    u = normalize(z)
    logits = u @ torch.cat((u, before)).T / 0.1
    itself = torch.eye(5, 7, dtype=torch.bool)
    positive = (labels[:, None] == torch.cat((labels, Y[3:5]))) & ~itself
    of_all = logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.where(positive, of_all - logits, 0).sum(1) / positive.sum(1).clamp(min=1)
    assert float(found[0]) == pytest.approx(float(each[each > 0].mean()), rel=1e-10)
