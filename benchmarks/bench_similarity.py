"""Losses of similarities, forward and backward: against plain PyTorch, compiled and not, and other libraries.

Libraries are taken from their packages where these can be imported (``make bench`` puts them into ``build/peers``).
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from peers import embeddings, step
from torch import Tensor

import mmfast
from mmfast import functional
from mmfast.ops.similarity import pkt_reference

SHAPES = [(64, 128), (340, 128), (340, 1000), (1024, 4096), (2048, 128), (4096, 128), (8192, 64)]
# Of tensors B x B there are many below, and of B x B x B pytorch-metric-learning makes some.
CUBES = 400
TOLERANCE = 1e-4


def labels_of(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % max(2, len(z) // 8)


def others(z: Tensor) -> Tensor:
    return torch.eye(len(z), dtype=torch.bool)


def nt_xent(z_a: Tensor, z_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat((z_a, z_b)), dim=1)
    logits = (z @ z.T / 0.5).masked_fill(others(z), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z_a)))


def info_nce(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / 0.07
    return F.cross_entropy(logits, torch.arange(len(z_a)))


def clip(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits, targets = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / 0.07, torch.arange(len(z_a))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T * 10 - 10
    return -F.logsigmoid(logits * (2 * torch.eye(len(z_a)) - 1)).sum() / len(z_a)


def sup_con(z_a: Tensor, z_b: Tensor) -> Tensor:
    """As SupContrast has it."""
    labels, z = labels_of(z_a)[:, None], F.normalize(z_a, dim=1)
    mask = (labels == labels.T).float()
    logits = z @ z.T / 0.1
    logits = logits - logits.max(1, keepdim=True).values.detach()
    rest = 1 - torch.eye(len(z))
    mask = mask * rest
    log_prob = logits - (logits.exp() * rest).sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def batch_hard(z_a: Tensor, z_b: Tensor) -> Tensor:
    labels, distances = labels_of(z_a), torch.cdist(z_a, z_a)
    same = labels[:, None] == labels
    far = distances.masked_fill(~same | others(z_a), -math.inf).max(1).values
    near = distances.masked_fill(same, math.inf).min(1).values
    terms = (far - near + 0.2).clamp(min=0)
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def pkt(z_a: Tensor, z_b: Tensor) -> Tensor:
    return pkt_reference.reference({"a": z_a, "b": z_b})


def vicreg(z_a: Tensor, z_b: Tensor) -> Tensor:
    rows, columns = z_a.shape
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a - z_a.mean(0), z_b - z_b.mean(0)):
        covariance = z.T @ z / (rows - 1)
        off = covariance.flatten()[:-1].view(columns - 1, columns + 1)[:, 1:]
        loss = loss + 12.5 * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() + off.pow(2).sum() / columns
    return loss


def triplets(z_a: Tensor, z_b: Tensor) -> Tensor:
    """All semi-hard triplets, each made."""
    z, labels = F.normalize(z_a, dim=1), labels_of(z_a)
    distances = torch.cdist(z, z)
    same = labels[:, None] == labels
    x = distances[:, :, None] - distances[:, None] + 0.05
    wanted = (same & ~others(z))[:, :, None] & ~same[:, None] & (x > 0) & (x < 0.05)
    return torch.where(wanted, x, 0).sum() / wanted.sum().clamp(min=1)


def _ours(function, **options):
    return lambda z_a, z_b: function(z_a, z_b, **options)


# Name -> ours, plain, operations over B^2 D, whether memory is that of all triplets.
LOSSES = {
    "nt_xent": (_ours(functional.nt_xent), nt_xent, 16, False),
    "info_nce": (_ours(functional.info_nce), info_nce, 6, False),
    "clip": (_ours(functional.clip), clip, 6, False),
    "siglip": (_ours(functional.siglip, reduction="mean"), siglip, 6, False),
    "sup_con": (lambda z, _: functional.sup_con(z, labels_of(z)), sup_con, 4, False),
    "batch_hard": (
        lambda z, _: functional.triplet_margin(z, labels_of(z), mining="batch_hard", score="euclidean"),
        batch_hard, 2, False,
    ),
    "semihard": (
        lambda z, _: functional.triplet_margin(
            z, labels_of(z), 0.05, mining="semihard", score="unit_euclidean"
        ),
        triplets, 6, True,
    ),
    "pkt": (lambda a, b: functional.pkt({"a": a, "b": b}), pkt, 8, False),
    "vicreg": (_ours(functional.vicreg), vicreg, 12, False),
}  # fmt: skip


def libraries(name: str) -> dict:
    """Other projects' own code for a loss, of those that can be imported here."""
    found = {}
    with contextlib.suppress(ImportError):
        from pytorch_metric_learning import losses, miners

        if name == "nt_xent":
            theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(0.5))
            found["pytorch-metric-learning"] = theirs
        elif name == "sup_con":
            theirs = losses.SupConLoss(0.1)
            found["pytorch-metric-learning"] = lambda a, b: theirs(a, labels_of(a))
        elif name == "semihard":
            theirs, miner = losses.TripletMarginLoss(0.05), miners.TripletMarginMiner(0.05, "semihard")
            found["pytorch-metric-learning"] = lambda a, b: theirs(
                a, labels_of(a), miner(a.detach(), labels_of(a))
            )
        elif name == "vicreg":
            theirs = losses.VICRegLoss()
            found["pytorch-metric-learning"] = lambda a, b: theirs(a, ref_emb=b)
    with contextlib.suppress(ImportError):
        from info_nce import InfoNCE

        if name == "info_nce":
            found["info-nce-pytorch"] = InfoNCE(0.07)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(name, shape, race, smoke):
    ours, plain, factor, cubic = LOSSES[name]
    rows, columns = shape
    if smoke and rows > 340:
        pytest.skip("a smoke run takes the small sizes")
    small = rows <= CUBES
    peers = {} if cubic and not small else {"plain": plain}
    if not smoke and small and not cubic:
        peers["compiled"] = torch.compile(plain, dynamic=False)
    if small or name in ("info_nce", "vicreg"):
        peers |= libraries(name)
    z = embeddings(rows, columns)
    found = {}

    def watch(who, call):
        def run():
            found[who] = call()

        return run

    def done(who):
        if who == "plain":
            found["exact"] = float(plain(*(x.detach().double() for x in z)))
        if who != "mmfast" and "exact" in found:
            assert float(found[who]) == pytest.approx(found["exact"], rel=TOLERANCE, abs=1e-6), who
            assert float(found["mmfast"]) == pytest.approx(found["exact"], rel=TOLERANCE, abs=1e-6)

    race(
        watch("mmfast", step(ours, *z)),
        {who: watch(who, step(loss, *z)) for who, loss in peers.items()},
        nbytes=4 * z[0].nbytes,
        flops=factor * rows * columns * min(rows, columns if name == "vicreg" else rows),
        warm=[who for who in peers if who == "compiled"],
        done=done,
        rows=rows,
        columns=columns,
        loss=name,
    )


def test_a_queue_of_candidates(race):
    """MoCo's loss: 256 queries against their keys and 4096 earlier ones."""
    z_a, z_b = embeddings(256, 128)
    loss = mmfast.InfoNCELoss(queue=mmfast.EmbeddingQueue(4096, 128)).eval()
    loss.queue.enqueue(torch.randn(4096, 128))
    memory = loss.queue.rows

    def plain(a, b):
        a = F.normalize(a, dim=1)
        logits = torch.cat((a @ F.normalize(b, dim=1).T, a @ memory.T), 1) / 0.07
        return F.cross_entropy(logits, torch.arange(len(a)))

    race(
        step(loss, z_a, z_b),
        {"plain": step(plain, z_a, z_b)},
        nbytes=2 * z_a.nbytes + 2 * memory.nbytes,
        flops=6 * 256 * 4352 * 128,
    )
