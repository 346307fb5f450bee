"""Batch normalisation over the rows of all processes, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmfast.ops.collectives import world


class SharedBatchNorm(_BatchNorm):
    """torch's batch normalisation of one process that has the rows of all, whatever the number of rows of each.

    Input (N, C, ...); parameters, buffers and state dict are torch's. Gradients of parameters are of this process's
    rows: their sum over processes is that of one process. Unlike :class:`torch.nn.SyncBatchNorm` it takes tensors
    on the CPU, and float64 without loss. Evaluation mode uses no other process.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch normalisation: the input must be (N, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        group = world(None)
        by_batch = self.training or self.running_mean is None
        if group is None or not by_batch:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            y, count, mean, variance = _Normalise.apply(wide, self.eps, group)
            if self.training and self.running_mean is not None:
                self._follow(count, mean, variance)
            if self.affine:
                y = y * _column(self.weight, y) + _column(self.bias, y)
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, with the unbiased variance as in torch."""
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(running + share * (new - running))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) over all rows of all processes; also their number, mean and variance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = _rows(x)
        own = x.new_tensor([x.numel() / x.shape[1]])
        sums = _sum(torch.cat([own, x.sum(dims)]), group)
        count, mean = sums[0], sums[1:] / sums[0]
        if own <= 1 and count <= 1:
            raise ValueError(
                "batch normalisation: there must be more than 1 row in all processes in training mode"
            )
        centred = x - _column(mean, x)
        # In a second pass over the rows: E[x^2] - E[x]^2 would cancel.
        variance = _sum(centred.square().sum(dims), group) / count
        scale = (variance + eps).rsqrt()
        y = centred * _column(scale, x)
        ctx.save_for_backward(y, scale, count)
        ctx.group = group
        ctx.mark_non_differentiable(count, mean, variance)
        return y, count, mean, variance

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        y, scale, count = ctx.saved_tensors
        dims = _rows(y)
        mean, along = _sum(torch.stack([g.sum(dims), (g * y).sum(dims)]), ctx.group) / count
        return (g - _column(mean, y) - y * _column(along, y)) * _column(scale, y), None, None


def _sum(x: Tensor, group: Any) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _rows(x: Tensor) -> list[int]:
    """All dimensions but that of the columns."""
    return [d for d in range(x.dim()) if d != 1]


def _column(v: Tensor, x: Tensor) -> Tensor:
    """(C,) as it broadcasts against (N, C, ...)."""
    return v.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def share_batch_norm(module: nn.Module) -> nn.Module:
    """``module``, in which every batch normalisation of torch is now one over all processes; parameters stay."""
    for layer in module.modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            layer.alone, layer.__class__ = type(layer), SharedBatchNorm
    return module


def unshare_batch_norm(module: nn.Module) -> nn.Module:
    """Undoes :func:`share_batch_norm`."""
    for layer in module.modules():
        if isinstance(layer, SharedBatchNorm):
            layer.__class__ = layer.__dict__.pop("alone")
    return module
