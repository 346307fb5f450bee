"""What can be read of the scores of the latest call: against the definition in fp64, of all losses."""

import copy
import math
import pickle

import pytest
import torch
from similarity_losses import LOSSES
from similarity_rows import rows

import mmfast
from mmfast.adapters import lightly, open_clip, solo, supcontrast
from mmfast.adapters import pytorch_metric_learning as pml
from mmfast.losses import EmbeddingQueue
from mmfast.ops.similarity import op, reference, triplet_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("mean_positive", "mean_negative", "accuracy", "zero_rows")
LABELS, VALID, IDS = torch.arange(17) % 5, torch.arange(17) % 6 != 2, torch.arange(17) // 2 % 7
A, B = rows(17, 4), rows(17, 4, seed=2)
A[3] = B[5] = 0


def definition(scores, positive, negative):
    """Sums and numbers of pairs, rows that are right and rows with positives."""
    right = has = 0
    for s, p, n in zip(scores, positive, negative, strict=True):
        if p.any():
            has += 1
            right += not n.any() or bool(s[p].max() > s[n].max())
    return (scores[positive].sum(), positive.sum()), (scores[negative].sum(), negative.sum()), (right, has)


def expected(scores, labels, ids=None, valid=None, itself=True, both=False):
    def pair(x):
        return None if x is None else x if isinstance(x, tuple) else (x, x)

    masks = reference.masks(scores.shape[1], pair(labels), pair(ids), pair(valid), itself)
    parts = [definition(scores, *masks)]
    if both:
        parts.append(definition(scores.T, *(m.T for m in masks)))
    return [
        sum(float(p[i][0]) for p in parts) / max(1e-300, sum(float(p[i][1]) for p in parts)) for i in range(3)
    ]


def read(loss):
    assert loss.last._fields == (*loss.last._asdict(),)
    found = [getattr(loss.last, name) for name in NAMES]
    assert all(not x.requires_grad and x.dim() == 0 for x in found)
    return [float(x) for x in found]


def cosines(a, b=None):
    return reference.unit_rows(a) @ reference.unit_rows(a if b is None else b).T


def views():
    return torch.cat((A, B)), torch.arange(17).repeat(2)


def sup_con(valid=None, ids=None):
    loss = mmfast.SupConLoss()
    loss(A, LABELS, valid=valid, ids=ids)
    return loss, expected(cosines(A), LABELS, ids, valid), 1


def nt_xent(**options):
    loss = mmfast.NTXentLoss(**options)
    loss(A, B)
    z, ids = views()
    return loss, expected(cosines(z), ids), 2


def of_views():
    loss = mmfast.SupConLoss()
    loss(torch.stack((A, B), 1), LABELS)
    z = torch.stack((A, B), 1).flatten(0, 1)
    return loss, expected(cosines(z), LABELS.repeat_interleave(2)), 2


def pairs(loss, cosine=True, both=False, ids=None, **given):
    loss.double()(A, B, ids=ids, **given)
    s = cosines(A, B) if cosine else A @ B.T
    place = torch.arange(17)
    masks = {"ids": None if ids is None else (ids, ids)}
    return loss, expected(s, place, **masks, itself=False, both=both), 2


def negatives():
    loss, more = mmfast.InfoNCELoss(), rows(6, 4, seed=3)
    loss(A[:9], B, more, targets=torch.arange(9) + 4)
    s = cosines(A[:9], torch.cat((B, more)))
    return loss, expected(s, (torch.arange(9) + 4, torch.arange(23)), itself=False), 2


def queue():
    old, their_labels = rows(6, 4, seed=3), torch.arange(6)
    loss = mmfast.SupConLoss(queue=EmbeddingQueue(9, 4).double()).eval()
    loss.queue.enqueue(old, labels=their_labels)
    loss(A, LABELS)
    s = cosines(A, torch.cat((A, old)))
    return loss, expected(s, (LABELS, torch.cat((LABELS, their_labels)))), 1


def triplets(score, valid=None):
    loss = mmfast.TripletMarginLoss(score=score)
    loss(A, LABELS, valid=valid, ids=IDS)
    z = A if valid is None else A.where(valid[:, None], 0)
    return loss, expected(triplet_reference.scores(z, score), LABELS, IDS, valid), 1


def neighbours(normalise):
    loss = mmfast.SoftNearestNeighbourLoss(normalise=normalise)
    loss(A, LABELS, valid=VALID)
    z = reference.unit_rows(A) if normalise else A
    return loss, expected(triplet_reference.scores(z, "sqeuclidean"), LABELS, None, VALID), 1


def alone():
    loss = open_clip.ClipLoss()
    loss(A[:1], B[:1], 1.0)
    return loss, [float(A[0] @ B[0]), math.nan, 1.0], 0


def memory():
    loss = pml.NTXentLoss()
    memory = pml.CrossBatchMemory(loss, 4, 40)
    memory(rows(6, 4, seed=3).float(), torch.arange(6))
    memory(A.float(), LABELS)
    z, y = torch.cat((A, rows(6, 4, seed=3))).float().double(), torch.cat((LABELS, torch.arange(6)))
    return loss, expected(cosines(z[:17], z), (LABELS, y)), 1


CASES = {
    "sup_con": sup_con,
    "valid and ids": lambda: sup_con(VALID, IDS),
    "nt_xent": nt_xent,
    "dcl": lambda: nt_xent(variant="dcl", reduction="none"),
    "views": of_views,
    "info_nce": lambda: pairs(mmfast.InfoNCELoss()),
    "ids": lambda: pairs(mmfast.InfoNCELoss(), ids=IDS),
    "negatives": negatives,
    "clip": lambda: pairs(mmfast.ClipLoss(), both=True),
    "siglip": lambda: pairs(mmfast.SigLipLoss()),
    "n_pair": lambda: pairs(mmfast.NPairLoss(), cosine=False),
    "hinge": lambda: pairs(mmfast.PairwiseHingeLoss(hardest=True), both=True, ids=IDS),
    "queue": queue,
    "cosine": lambda: triplets("cosine"),
    "euclidean": lambda: triplets("euclidean", VALID),
    "sqeuclidean": lambda: triplets("sqeuclidean"),
    "neighbours": lambda: neighbours(False),
    "unit neighbours": lambda: neighbours(True),
    "alone": alone,
    "memory": memory,
}


@pytest.mark.parametrize("strip", [2**19, 40])
@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name, strip, monkeypatch):
    monkeypatch.setattr(op, "STRIP", strip)
    loss, means, zero = CASES[name]()
    found = read(loss)
    assert found[:3] == pytest.approx(means, rel=1e-5 if name == "memory" else 1e-9, nan_ok=True)
    assert found[3] == zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype):
    loss = mmfast.SupConLoss()
    with torch.autocast("cpu", torch.bfloat16):
        loss(A.to(dtype), LABELS)
        found = read(loss)
    assert found[:3] == pytest.approx(expected(cosines(A.to(dtype).double()), LABELS), rel=1e-5)
    assert loss.last.accuracy.dtype == torch.float32 and found[3] == 1


def test_what_is_a_mean_of_nothing():
    loss = mmfast.SupConLoss()
    loss(A, torch.arange(17))
    assert math.isnan(loss.last.mean_positive) and math.isnan(loss.last.accuracy)
    loss(A, torch.zeros(17, dtype=torch.long))
    assert math.isnan(loss.last.mean_negative) and loss.last.accuracy == 1
    loss(torch.ones(17, 4), LABELS)  # equal rows are not nearer
    assert loss.last.accuracy < 1


def test_a_sweep_runs_when_it_is_read_and_once(monkeypatch):
    from mmfast.ops.similarity import statistics

    ran = []
    plain = statistics._swept
    monkeypatch.setattr(statistics, "_swept", lambda *given: ran.append(1) or plain(*given))
    loss = mmfast.SupConLoss()
    loss(A, LABELS)
    first = loss.last
    assert first.loss.isfinite() and not ran
    read(loss)
    assert len(ran) == 1
    loss(B, LABELS)
    # Of its own call.
    assert float(first.mean_positive) == pytest.approx(expected(cosines(A), LABELS)[0])
    assert float(loss.last.mean_positive) == pytest.approx(expected(cosines(B), LABELS)[0])


def test_tuples_of_indices_have_none():
    loss = pml.NTXentLoss()
    loss(A, indices_tuple=(torch.tensor([0]), torch.tensor([1]), torch.tensor([2])))
    assert loss.last.loss.isfinite() and not hasattr(loss.last, "accuracy")


@pytest.mark.parametrize("make", [
    lambda: (lightly.NTXentLoss(), lambda loss: loss(A, B)),
    lambda: (lightly.DCLWLoss(), lambda loss: loss(A, B)),
    lambda: (lightly.NTXentLoss(memory_bank_size=(8, 4)), lambda loss: loss(A.float(), B.float())),
    lambda: (open_clip.SigLipLoss(), lambda loss: loss(A, B, 1.0, 0.0)),
    lambda: (supcontrast.SupConLoss(), lambda loss: loss(torch.stack((A, B), 1), LABELS)),
    lambda: (pml.SupConLoss(), lambda loss: loss(A, LABELS, ref_emb=B, ref_labels=LABELS)),
    lambda: (pml.NPairsLoss(), lambda loss: loss(A, LABELS)),
    lambda: (pml.TripletMarginLoss(), lambda loss: loss(A, LABELS)),
    lambda: (pml.TripletMarginLoss(), lambda loss: loss(A[:1], LABELS[:1])),
])  # fmt: skip
def test_of_adapters(make):
    loss, call = make()
    call(loss)
    assert 0 <= float(loss.last.zero_rows) <= 2 and loss.last.accuracy.dim() == 0
    assert solo.simclr_loss_func(A, LABELS).isfinite()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_copied_and_pickled(name):
    if "PKT" in name or name == "VICRegLoss":
        pytest.skip("compares no positives with negatives")
    torch.compiler.reset()
    row, eager = LOSSES[name], LOSSES[name].make()
    row.call(eager, A.float(), B.float(), LABELS)
    loss = row.make()
    compiled = torch.compile(row.call, fullgraph=True, backend="aot_eager")
    z = A.float().requires_grad_()
    compiled(loss, z, B.float(), LABELS).backward()
    assert read(loss) == pytest.approx(read(eager), rel=1e-5)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(eager))):
        assert read(other) == pytest.approx(read(eager), rel=1e-5)
