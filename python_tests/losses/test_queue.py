"""Queues of embeddings: golden values, what is a candidate, state, order, processes."""

import copy

import pytest
import torch
from ranks import Ranks
from similarity_rows import DOUBLE, Q, Y, Z, gradients, rows, same

from mmfast import backward_in_micro_batches
from mmfast import functional as F
from mmfast.errors import UserError
from mmfast.losses import InfoNCELoss, NTXentLoss, SupConLoss
from mmfast.losses.queue import EmbeddingQueue
from mmfast.ops.similarity import reference
from mmfast.ops.similarity.own import similarity_without_own

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NOBODY = torch.iinfo(torch.int64).min


def filled(size, *given, **names):
    queue = EmbeddingQueue(size, given[0].shape[1]).double()
    queue.enqueue(*given, **names)
    return queue


def test_golden_values():
    loss = SupConLoss(queue=filled(4, Q[4:], labels=Y[4:])).eval()
    value, grad = gradients(lambda q: loss(q, Y[:4]), Q[:4], upstream=1.0)
    assert float(value) == pytest.approx(3.241533, abs=1.1e-6)
    assert float(grad.norm()) == pytest.approx(1.156843, abs=1.1e-6)


LABELS, IDS = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([3, 4, 5, 6, 3])
OLD_LABELS, OLD_IDS = torch.tensor([1, 0, 2, 7]), torch.tensor([4, 9, 3, 8])
VALID = torch.tensor([True, True, False, True, True])


@pytest.mark.parametrize("size", [2, 4, 9])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "valid"])
def test_candidates_are_the_batch_and_the_queue(size, ids, valid):
    """By removing from a larger batch what is not there, and the queue's rows as anchors."""
    old = rows(4, 6, seed=2)
    kept = min(size, 4)
    queue = filled(size, old, labels=OLD_LABELS, ids=OLD_IDS)
    together = torch.cat((LABELS, OLD_LABELS[-kept:]))
    every_id = torch.cat((IDS, OLD_IDS[-kept:])) if ids else None
    there = torch.ones(5, dtype=torch.bool) if valid is None else valid
    whole = torch.cat((there, torch.ones(kept, dtype=torch.bool)))
    weights = torch.cat((torch.ones(5, **DOUBLE), torch.zeros(kept, **DOUBLE)))

    def ours(z, t):
        loss = NTXentLoss(t, variant="ser", queue=queue).eval()
        return loss(z, labels=LABELS, ids=IDS if ids else None, valid=valid)

    def truth(z, t):
        z = torch.cat((z, old[-kept:]))
        given = {"labels": together, "ids": every_id, "valid": whole, "weights": weights}
        return F.nt_xent(z, None, t, variant="ser", **given)

    same(ours, truth, rows(5, 6), torch.tensor(0.3, **DOUBLE))


@pytest.mark.parametrize("kind", ["out", "in", "negatives"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_row_is_none_of_its_candidates_wherever_it_stands(kind, with_ids):
    """Also on the diagonal, and next to it."""
    z, others = rows(4, 3), rows(3, 3, seed=2)
    own, rest = torch.tensor([1, 0, 6, 3]), torch.tensor([2, 4, 5])
    labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])
    ids = torch.tensor([5, 5, 6, 7]), torch.tensor([6, 8, 5])

    def placed(x, y):
        return torch.cat((x, y))[torch.cat((own, rest)).argsort()]

    def ours(z):
        pairs = [(x, placed(x, y)) for x, y in (labels, ids)]
        return similarity_without_own(
            z, placed(z, others), own, pairs[0], pairs[1] if with_ids else None, None, scale, kind, True
        )[0].sum()

    def truth(z):
        u, v = reference.unit_rows(z), reference.unit_rows(torch.cat((z, others)))
        equal = labels[0][:, None] == torch.cat(labels)
        apart = torch.eye(4, 7, dtype=torch.bool)
        if with_ids:
            apart = apart | (ids[0][:, None] == torch.cat(ids))
        return reference.values(kind, u @ v.T * scale, equal & ~apart, ~equal & ~apart).sum()

    scale = torch.tensor(3.0, **DOUBLE)
    same(ours, truth, z)


def test_self_supervised_rows_of_earlier_steps_are_negatives():
    """Positions in the batch, which say who belongs together, say nothing of the next one."""
    loss = NTXentLoss(0.2, queue=EmbeddingQueue(6, 5).double())
    first, second = [(rows(3, 5, seed=i), rows(3, 5, seed=i + 9)) for i in range(2)]
    assert loss(*first) == F.nt_xent(*first, 0.2) and loss.last.positive_pairs == 6
    found = loss(*second)
    labels = torch.cat((torch.arange(3).repeat(2), torch.arange(10, 16)))
    weights = (labels < 9).double()
    truth = F.nt_xent(torch.cat((*second, *first)), None, 0.2, labels=labels, weights=weights)
    assert float(found) == pytest.approx(float(truth), rel=1e-12)
    assert (loss.queue.labels == NOBODY).all()


def test_info_nce_with_a_queue_is_that_with_negatives():
    old = rows(3, 5, seed=3)
    loss = InfoNCELoss(0.1, queue=filled(7, old, ids=torch.tensor([1, 9, 2]))).eval()
    q, k, n = rows(4, 5), rows(4, 5, seed=1), rows(2, 5, seed=2)
    same(lambda q, k: loss(q, k), lambda q, k: F.info_nce(q, k, old, 0.1), q, k)
    same(loss, lambda q, k, n: F.info_nce(q, k, torch.cat((n, old)), 0.1), q, k, n)
    ids, targets = torch.tensor([1, 2, 3, 3]), torch.arange(4)

    def truth(q, k):
        logits = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(torch.cat((k, old))).T / 0.1
        void = ids[:, None] == torch.cat((ids, torch.tensor([1, 9, 2])))
        void = void & ~torch.eye(4, 7, dtype=torch.bool)
        return torch.nn.functional.cross_entropy(logits.masked_fill(void, -torch.inf), targets)

    same(lambda q, k: loss(q, k, ids=ids), truth, q, k)


def test_rows_are_enqueued_after_the_loss_detached_and_of_length_one():
    loss = InfoNCELoss(queue=EmbeddingQueue(4, 5).double())
    q, k = rows(3, 5).requires_grad_(), 7 * rows(3, 5, seed=1)
    # The first step compares nobody with itself.
    assert loss(q, k.requires_grad_()) == F.info_nce(q, k)
    queue = loss.queue
    assert not queue.rows.requires_grad and int(queue.filled) == int(queue.head) == 3
    torch.testing.assert_close(queue.rows[:3].norm(dim=1), torch.ones(3, **DOUBLE))
    torch.testing.assert_close(queue.rows[:3], torch.nn.functional.normalize(k.detach()))
    loss.eval()(q, k)
    assert int(queue.filled) == 3
    raw = InfoNCELoss(normalise=False, queue=EmbeddingQueue(4, 5).double())
    raw(q, k)
    assert torch.equal(raw.queue.rows[:3], k.detach())


@pytest.mark.parametrize("masked", [False, True])
def test_slots_are_overwritten_in_order_and_more_rows_leave_the_last(masked):
    def enqueue(queue, *numbers):
        x = torch.tensor(numbers)
        rows = x[:, None].float()
        if masked:
            # Every other row is left out.
            x, rows = x.repeat_interleave(2), rows.repeat_interleave(2, 0)
            x[1::2], rows[1::2] = -5, torch.inf
        mask = torch.arange(len(x)) % 2 == 0 if masked else None
        queue.enqueue(rows, labels=x, ids=2 * x, mask=mask, normalise=False)

    queue = EmbeddingQueue(5, 1)
    seen = []
    for numbers in ((1, 2, 3), (4, 5, 6, 7), (8,), (9, 10, 11, 12, 13, 14, 15)):
        enqueue(queue, *numbers)
        seen.append((queue.labels.tolist(), int(queue.head), int(queue.filled)))
        assert queue.rows[queue.valid, 0].long().equal(queue.labels[queue.valid])
        assert queue.ids[queue.valid].equal(2 * queue.labels[queue.valid])
    assert seen == [
        ([1, 2, 3, NOBODY, NOBODY], 3, 3),
        ([6, 7, 3, 4, 5], 2, 5),
        ([6, 7, 8, 4, 5], 3, 5),
        ([11, 12, 13, 14, 15], 0, 5),
    ]
    queue.reset()
    assert not queue.valid.any() and not queue.rows.any() and (queue.labels == NOBODY).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_queue_that_is_saved_goes_on_as_it_would_have(steps):
    """At 3 of 8 rows, and wrapped around."""
    loss = SupConLoss(queue=EmbeddingQueue(8, 5))
    for step in range(steps):
        loss(rows(3, 5, seed=step).float(), LABELS[:3])
    state = copy.deepcopy(loss.state_dict())
    assert set(state) == {f"queue.{x}" for x in ("rows", "labels", "ids", "head", "filled")}
    again = SupConLoss(queue=EmbeddingQueue(8, 5))
    again.load_state_dict(state)
    for step in range(3):
        z = rows(3, 5, seed=9 + step).float()
        assert torch.equal(loss(z, LABELS[:3]), again(z, LABELS[:3]))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in loss.state_dict().items())


def test_masks_and_rows_that_are_not_valid():
    mask = torch.tensor([True, True, True, False, False])
    loss = NTXentLoss(queue=EmbeddingQueue(16, 6).double())
    z = rows(5, 6)
    z[2] = torch.nan
    loss(z, labels=LABELS, valid=VALID, enqueue_mask=mask)
    assert loss.queue.labels[:3].tolist() == [0, 1, NOBODY] and int(loss.queue.filled) == 2
    loss.queue.reset()
    loss(rows(5, 6), rows(5, 6, seed=1), ids=IDS, enqueue_mask=mask)
    assert loss.queue.labels[:7].tolist() == [3, 4, 5, 3, 4, 5, NOBODY]
    views = SupConLoss(queue=EmbeddingQueue(16, 6).double())
    views(rows(5, 2, 6), LABELS, enqueue_mask=mask)
    assert views.queue.labels[:7].tolist() == [0, 0, 1, 1, 1, 1, NOBODY]


def test_rows_that_are_not_finite_are_not_taken():
    queue, mask = EmbeddingQueue(4, 3), torch.tensor([True, False])
    wrong = torch.tensor([[1.0, 2, 3], [4, torch.nan, 5]])
    with pytest.raises(UserError, match=r"^EmbeddingQueue.enqueue: rows must be finite, .* row 1, column 1"):
        queue.enqueue(wrong)
    assert not queue.filled
    queue.enqueue(wrong, mask=mask)
    assert queue.filled == 1 and queue.rows.isfinite().all()


def test_half_types_and_float32_queues():
    loss = SupConLoss(queue=EmbeddingQueue(8, 6))
    z = rows(5, 6).to(torch.bfloat16).requires_grad_()
    for _ in range(2):
        value = loss(z, LABELS)
    value.backward()
    assert value.dtype == torch.float32 and z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all()
    assert loss.queue.rows.dtype == torch.float32


def test_micro_batches_feed_it_once():
    net = torch.nn.Linear(5, 4).double()
    x, old = rows(6, 5), rows(3, 4)
    losses = [InfoNCELoss(queue=filled(16, old)) for _ in "ab"]
    losses[0](net(x), net(x.square())).backward()
    expected = net.weight.grad.clone()
    net.zero_grad()
    backward_in_micro_batches(losses[1], lambda part: (net(part), net(part.square())), [x[:4], x[4:]])
    torch.testing.assert_close(net.weight.grad, expected)
    assert int(losses[1].queue.filled) == 9
    torch.testing.assert_close(losses[1].queue.rows, losses[0].queue.rows)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_whole(masked):
    def step(loss, z, labels, mask):
        return loss(z, labels, enqueue_mask=mask)

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = SupConLoss(queue=EmbeddingQueue(8, 6).double())
        for seed in range(3):
            z = rows(5, 6, seed=seed).requires_grad_()
            value = run(loss, z, LABELS, VALID if masked else None)
            value.backward()
            found.append((value.detach(), z.grad, loss.queue.rows.clone()))
    for ours, compiled in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(compiled, ours)


ROWS = [3, 1, 2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(3, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def three_steps(group):
    losses = NTXentLoss(0.3, group=group, queue=EmbeddingQueue(16, 4).double())
    pairs = InfoNCELoss(0.3, group=group, queue=EmbeddingQueue(7, 4).double())
    first = 0 if group is None else sum(ROWS[: torch.distributed.get_rank(group)])
    last = sum(ROWS) if group is None else first + ROWS[torch.distributed.get_rank(group)]
    labels = torch.tensor([0, 1, 0, 1, 2, 2])[first:last]
    found = []
    for step in range(3):
        a, b = (rows(6, 4, seed=step + 5 * i)[first:last] for i in range(2))
        mask = labels != 2 if step == 1 else None
        found.append(gradients(lambda a, m=mask: losses(a, labels=labels, enqueue_mask=m), a))
        found.append(gradients(lambda a, b: pairs(a, b, ids=labels), a, b))
    return found, losses.queue.state_dict(), pairs.queue.state_dict()


def test_queues_are_equal_on_all_processes_and_those_of_one(ranks):
    whole, *queues = three_steps(None)
    results = ranks(three_steps)
    for _, *theirs in results:
        for ours, one in zip(theirs, queues, strict=True):
            for name, x in ours.items():
                torch.testing.assert_close(x, one[name])
    for step, expected in enumerate(whole):
        for index in range(1, len(expected)):
            together = torch.cat([found[step][index] for found, *_ in results])
            torch.testing.assert_close(together / 3, expected[index], rtol=1e-9, atol=1e-12)
        assert all(torch.allclose(found[step][0], expected[0]) for found, *_ in results)


A = torch.ones(3, 4)
INVALID = [
    (lambda: EmbeddingQueue(0, 3), "EmbeddingQueue: size must be at least 1, got 0"),
    (lambda: EmbeddingQueue(3, 2.0), "EmbeddingQueue: columns must be an integer, got 2.0"),
    (lambda: NTXentLoss(queue=5), "nt_xent: queue must be an EmbeddingQueue or None, got 5"),
    (lambda: NTXentLoss(queue=EmbeddingQueue(2, 3))(A, A),
     "nt_xent: z_a must have the 3 columns of the queue, got (3, 4)"),
    (lambda: InfoNCELoss(queue=EmbeddingQueue(2, 3))(A, A),
     "info_nce: key must have the 3 columns of the queue, got (3, 4)"),
    (lambda: SupConLoss()(A, Y[:3], enqueue_mask=Y[:3] > 0),
     "sup_con: enqueue_mask must be None without a queue, got Tensor"),
    (lambda: SupConLoss(queue=EmbeddingQueue(2, 4))(A, Y[:3], enqueue_mask=Y[:3]),
     "sup_con: enqueue_mask must be a bool tensor, got torch.int64"),
    (lambda: EmbeddingQueue(2, 4).enqueue(A, labels=Y),
     "EmbeddingQueue.enqueue: labels must have shape (3,), one for each row of rows, got (8,)"),
    (lambda: EmbeddingQueue(2, 4).enqueue(A.to("meta")),
     "EmbeddingQueue.enqueue: rows must be on the device of the queue (cpu), got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[x[1] for x in INVALID])
def test_refusals(call, message):
    with pytest.raises((UserError, TypeError)) as caught:
        call()
    assert str(caught.value) == message


def test_one_row_has_the_queue_to_be_contrasted_with():
    loss = SupConLoss(queue=filled(4, Z[:4], labels=Y[:4]))
    assert loss(Z[4:5], Y[4:5]).isfinite() and loss.last.anchors == 1
