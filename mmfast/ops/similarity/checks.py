"""What a similarity loss may be given: embeddings, integers that say who belongs to whom, weights, scalars."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmfast.checks import check_number, told
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import check_dense, compute_dtype, not_finite
from mmfast.ops.native import dtype_code


def check_rows(op: str, name: str, x: Any, like: tuple[str, Tensor] | None = None) -> Tensor:
    """Embeddings (B, D), D >= 1; with the columns, dtype and device of ``like``."""
    check_dense(op, name, x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise UserError(f"{op}: {name} must have shape (B, D) with D >= 1, got {tuple(x.shape)}")
    dtype_code(op, name, x)
    if like is not None:
        other, first = like
        if x.shape[1] != first.shape[1]:
            raise UserError(
                f"{op}: {name} must have the {first.shape[1]} columns of {other}, got {tuple(x.shape)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {other} ({first.dtype}), got {x.dtype}")
        _check_device(op, name, x, other, first)
    return x


def refuse_not_finite(op: str, views: Mapping[str, Tensor]) -> None:
    """Raises for NaN and infinity on the CPU; nobody waits for other devices, and compilers look at no values."""
    if all(x.device.type == "cpu" for x in views.values()) and not torch.compiler.is_compiling():
        problem = not_finite(views, op)
        if problem is not None:
            raise problem


def _check_device(op: str, name: str, x: Tensor, other: str, first: Tensor) -> None:
    if x.device != first.device:
        raise UserError(f"{op}: {name} must be on the device of {other} ({first.device}), got {x.device}")


def check_integers(op: str, name: str, x: Any, rows: tuple[str, Tensor]) -> Tensor:
    """(B,) integers as int64, one for each of the rows (their name, and they)."""
    check_dense(op, name, x)
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers, got {x.dtype}")
    return _check_vector(op, name, x, rows).long()


def check_labels(op: str, name: str, x: Any, rows: tuple[str, Tensor]) -> Tensor:
    """The same, of two classes perhaps: bools."""
    return check_integers(op, name, x.long() if isinstance(x, Tensor) and x.dtype == torch.bool else x, rows)


def check_valid(op: str, name: str, x: Any, rows: tuple[str, Tensor]) -> Tensor:
    """(B,) bools, one for each of the rows."""
    check_dense(op, name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be a bool tensor, got {x.dtype}")
    return _check_vector(op, name, x, rows)


def check_weights(op: str, name: str, x: Any, rows: tuple[str, Tensor]) -> Tensor:
    """(B,) numbers in the compute type; on the CPU those that are not finite and at least 0 are refused."""
    check_dense(op, name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating, got {x.dtype}")
    if x.requires_grad:
        raise UserError(f"{op}: {name} must not require a gradient, got one that does; detach it")
    x = _check_vector(op, name, x, rows)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_weights(op, name, x)
    return x.to(compute_dtype(rows[1]))


def refuse_weights(op: str, name: str, x: Tensor) -> None:
    """Raises for weights that are not finite and at least 0; waits for the device."""
    wrong = ~(x.isfinite() & (x >= 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UserError(f"{op}: {name} must be finite and at least 0, got {float(x[row])} in row {row}")


def _check_vector(op: str, name: str, x: Tensor, rows: tuple[str, Tensor]) -> Tensor:
    other, first = rows
    if x.shape != (len(first),):
        raise UserError(
            f"{op}: {name} must have shape ({len(first)},), one for each row of {other}, got {tuple(x.shape)}"
        )
    _check_device(op, name, x, other, first)
    return x


def check_scalar(op: str, name: str, x: Any, rows: tuple[str, Tensor], positive: bool = False) -> Tensor:
    """A number or scalar tensor, such as a learnable temperature, as a tensor () of the compute type."""
    other, first = rows
    dtype = compute_dtype(first)
    limits, ends = ((0,), "(]") if positive else ((), "[]")
    if isinstance(x, Tensor):
        check_dense(op, name, x)
        if x.numel() != 1 or not x.dtype.is_floating_point:
            raise UserError(
                f"{op}: {name} must be a number or a floating scalar tensor, got {x.dtype} {tuple(x.shape)}"
            )
        _check_device(op, name, x, other, first)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_number(op, name, float(x.detach()), *limits, ends=ends)
        return x.reshape(()).to(dtype)
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{op}: {name} must be a number or a scalar tensor, got {told(x)}")
    number = check_number(op, name, x, *limits, ends=ends)
    return torch.full((), number, dtype=dtype, device=first.device)
