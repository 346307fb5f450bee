"""Other projects' Barlow Twins losses, in their own order of operations, so that time and memory are their own.

A project whose loss is one file that imports only torch is taken from its package where that can be found::

    pip install --no-deps --target build/peers lightly solo-learn monai catalyst
    PYTHONPATH=build/peers pytest benchmarks

The file is loaded on its own, for the packages import much else; ``MMFAST_LIGHTLY`` may name lightly's
``loss/barlow_twins_loss.py`` instead. All others, and these where they are not found, are transcribed here: the
same tensors in the same order, in our words. Each peer names the published definition that it computes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops.barlow_twins import reference

Loss = Callable[[Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """A loss that others use.

    ``variant`` is a key of :data:`mmfast.functional.BARLOW_TWINS_VARIANTS`, ``source`` says where the code is from.
    """

    variant: str
    source: str
    loss: Loss
    compiled: bool = False


def _off_diagonal(c: Tensor) -> Tensor:
    """A copy of the elements off the diagonal, as a vector: in rows of n + 1 the diagonal is the last column."""
    n = len(c)
    return c.flatten()[1:].view(n - 1, n + 1)[:, :-1].flatten()


def _in_place(c: Tensor, lambd: float) -> Tensor:
    """How the official code and its descendants add up: the diagonal is overwritten, the rest copied."""
    on_diagonal = c.diagonal().add_(-1).pow_(2).sum()
    return on_diagonal + lambd * _off_diagonal(c).pow_(2).sum()


@functools.cache
def _batch_norm(columns: int) -> nn.Module:
    return nn.BatchNorm1d(columns, affine=False)


def official(z_a: Tensor, z_b: Tensor) -> Tensor:
    """facebookresearch/barlowtwins: the layer, with its running statistics, belongs to the model."""
    normalise = _batch_norm(z_a.shape[1])
    return _in_place((normalise(z_a).T @ normalise(z_b)).div_(len(z_a)), 5e-3)


def lightly(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    return _in_place((a.T @ b).div_(len(z_a)), 5e-3)


def solo(z_a: Tensor, z_b: Tensor) -> Tensor:
    """solo-learn: a fresh layer every time, and a boolean mask that weighs the elements off the diagonal."""
    normalise = nn.BatchNorm1d(z_a.shape[1], affine=False)
    a, b = normalise(z_a), normalise(z_b)
    c = torch.einsum("bi,bj->ij", a, b) / len(z_a)
    identity = torch.eye(c.shape[0])
    squares = (c - identity).pow(2)
    squares[~identity.bool()] *= 5e-3
    return 0.025 * squares.sum()


class _Pooled(torch.autograd.Function):
    """VISSL's normaliser in one process: E[x^2] - E[x]^2, and a backward pass by hand."""

    @staticmethod
    def forward(ctx, z, eps):
        mean = z.mean(0)
        variance = z.pow(2).mean(0) - mean.pow(2)
        ctx.save_for_backward(z, mean, variance)
        ctx.eps = eps
        return (z - mean) / torch.sqrt(variance + eps)

    @staticmethod
    def backward(ctx, upstream):
        z, mean, variance = ctx.saved_tensors
        projected = (upstream * (z - mean)).mean(0)
        slope = (z - mean) / (variance + ctx.eps) * projected
        return (upstream - upstream.mean(0) - slope) / torch.sqrt(variance + ctx.eps), None


def vissl(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The criterion takes one tensor, so the views are joined first, as there."""
    a, b = _Pooled.apply(torch.cat((z_a, z_b)), 1e-5).split(len(z_a))
    c = torch.mm(a.T, b) / len(z_a)
    on_diagonal = c.diagonal().add(-1).pow(2).sum().mul(0.024)
    return on_diagonal + 0.0051 * _off_diagonal(c).pow(2).sum().mul(0.024)


def monai(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / z.std(0).add(1e-6) for z in (z_a, z_b))
    c = torch.mm(a.t(), b) / len(z_a)
    squares = (c - torch.eye(len(c))).pow_(2)
    squares[~torch.eye(len(c)).bool()] *= torch.as_tensor(5e-3)
    return squares.sum()


def catalyst(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0) + 1e-12).pow(1 / 2) for z in (z_a, z_b))
    c = a.T @ b / len(z_a)
    off_diagonal = c.clone().fill_diagonal_(0)
    return c.diagonal().add_(-1).pow_(2).sum() + 1.0 * off_diagonal.pow_(2).sum()


def stable_pretraining(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (z_a, z_b))
    c = a.T @ b / len(z_a)
    return (c.diagonal() - 1).pow(2).sum() + 5e-3 * _off_diagonal(c).pow(2).sum()


def lightning(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The recipe of Lightning's tutorial."""
    a, b = ((z - z.mean(0)) / z.std(0) for z in (z_a, z_b))
    return _in_place(a.T @ b / len(z_a), 5e-3)


TRANSCRIBED: dict[str, Loss] = {
    "lightly": lightly,
    "solo": solo,
    "monai": monai,
    "catalyst": catalyst,
    "official": official,
    "vissl": vissl,
    "stable-pretraining": stable_pretraining,
    "lightning": lightning,
}
# name -> (distribution, package, file in it, class or function).
PACKAGES = {
    "lightly": ("lightly", "lightly", "loss/barlow_twins_loss.py", "BarlowTwinsLoss"),
    "solo": ("solo-learn", "solo", "losses/barlow.py", "barlow_loss_func"),
    "monai": ("monai", "monai", "losses/barlow_twins.py", "BarlowTwinsLoss"),
    "catalyst": ("catalyst", "catalyst", "contrib/losses/contrastive.py", "BarlowTwinsLoss"),
}


def _from_file(path: Path, attribute: str) -> Loss:
    spec = importlib.util.spec_from_file_location(f"benchmarks_peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, attribute)
    return found() if isinstance(found, type) else found


def _find(name: str) -> Peer:
    distribution, package, file, attribute = PACKAGES.get(name, ("", "", "", ""))
    given = os.environ.get("MMFAST_LIGHTLY") if name == "lightly" else None
    if given:
        return Peer(name, "the file in MMFAST_LIGHTLY", _from_file(Path(given), attribute))
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).exists():
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                version = "of unknown version"
            return Peer(name, f"{distribution} {version}", _from_file(path, attribute))
    return Peer(name, "transcribed", TRANSCRIBED[name])


@functools.cache
def eager_peers() -> dict[str, Peer]:
    plain = Peer("official", "mmfast.ops.barlow_twins.reference", reference)
    return {**{name: _find(name) for name in TRANSCRIBED}, "definition": plain}


def compiled_peers() -> dict[str, Peer]:
    """The plain definition and lightly's loss by ``torch.compile``, for one shape at a time."""
    torch._dynamo.reset()
    return {
        f"compiled {name}": peer._replace(
            source=f"torch.compile of {peer.source}",
            loss=torch.compile(peer.loss, dynamic=False),
            compiled=True,
        )
        for name, peer in eager_peers().items()
        if name in ("definition", "lightly")
    }


def step(loss: Loss, z_a: Tensor, z_b: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gradients are in ``z_a.grad`` and ``z_b.grad``."""

    def run():
        z_a.grad = z_b.grad = None
        value = loss(z_a, z_b)
        value.backward()
        return value.detach()

    return run


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two views (rows, columns) that agree up to noise, and ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    z_a = torch.randn(rows, columns, generator=generator)
    z_b = z_a + 0.5 * torch.randn(rows, columns, generator=generator)
    return z_a.to(dtype).requires_grad_(), z_b.to(dtype).requires_grad_()
