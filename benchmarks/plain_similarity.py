"""Losses of similarities in plain PyTorch, as one would write them, beside ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import functional
from mmfast.ops.similarity import pkt_reference


def labels_of(z: Tensor) -> Tensor:
    return torch.arange(len(z), device=z.device) % max(2, len(z) // 8)


def others(z: Tensor) -> Tensor:
    return torch.eye(len(z), dtype=torch.bool, device=z.device)


def nt_xent(z_a: Tensor, z_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat((z_a, z_b)), dim=1)
    logits = (z @ z.T / 0.5).masked_fill(others(z), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))


def info_nce(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / 0.07
    return F.cross_entropy(logits, torch.arange(len(z_a), device=z_a.device))


def clip(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits, targets = (
        F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / 0.07,
        torch.arange(len(z_a), device=z_a.device),
    )
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T * 10 - 10
    return -F.logsigmoid(logits * (2 * torch.eye(len(z_a), device=z_a.device) - 1)).sum() / len(z_a)


def sup_con(z_a: Tensor, z_b: Tensor) -> Tensor:
    """As SupContrast has it."""
    labels, z = labels_of(z_a)[:, None], F.normalize(z_a, dim=1)
    mask = (labels == labels.T).float()
    logits = z @ z.T / 0.1
    logits = logits - logits.max(1, keepdim=True).values.detach()
    rest = 1 - torch.eye(len(z), device=z.device)
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
