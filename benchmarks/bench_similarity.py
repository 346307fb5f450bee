"""Losses of similarities, forward and backward: against plain PyTorch, compiled and not, and other libraries.

Libraries are taken from their packages where these can be imported (``make bench`` puts them into ``build/peers``).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from peers import embeddings, step
from plain_similarity import LOSSES, labels_of

import mmfast

SHAPES = [(64, 128), (340, 128), (340, 1000), (1024, 4096), (2048, 128), (4096, 128), (8192, 64)]
# Of tensors B x B there are many below, and of B x B x B pytorch-metric-learning makes some.
CUBES = 400
TOLERANCE = 1e-4


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
