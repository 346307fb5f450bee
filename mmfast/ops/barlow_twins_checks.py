"""What a Barlow Twins loss may be given."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops.native import dtype_code


def check_options(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"barlow_twins: {name} must be finite and at least 0, got {value}")


def check_embeddings(z_a: Tensor, z_b: Tensor) -> None:
    """Refuses what is not (B, D) for two views, B >= 2."""
    views = {"z_a": z_a, "z_b": z_b}
    _check_tensors(views)
    _check_matrix("z_a", z_a)
    if z_b.shape != z_a.shape:
        raise ValueError(
            f"barlow_twins: z_b must have the shape of z_a {tuple(z_a.shape)}, got {tuple(z_b.shape)}"
        )
    check_rows("z_a", z_a)
    _check_kind(views)


def check_views(views: Mapping[str, Tensor], rows: int, corresponding: bool = False) -> None:
    """Refuses what is not (B, D_m) for every view, B >= ``rows``; with one D if columns are ``corresponding``."""
    _check_tensors(views)
    first, z = next(iter(views.items()))
    for name, other in views.items():
        _check_matrix(name, other)
        if corresponding and other.shape != z.shape:
            raise ValueError(
                f"barlow_twins: {name} must have the shape of {first} {tuple(z.shape)}, got {tuple(other.shape)}"
            )
        if other.shape[0] != z.shape[0]:
            raise ValueError(
                f"barlow_twins: {name} must have the {z.shape[0]} rows of {first}, got {tuple(other.shape)}"
            )
    check_rows(first, z, rows)
    _check_kind(views)


def check_rows(name: str, z: Tensor, rows: int = 2) -> None:
    if z.shape[0] < rows:
        raise ValueError(
            f"barlow_twins: {name} must have at least 2 rows (a correlation over one sample is undefined), "
            f"got {tuple(z.shape)}"
        )


def check_present(present: Tensor, views: Mapping[str, Tensor]) -> None:
    """Refuses what is not a bool (B, M) on the device of the views."""
    z = next(iter(views.values()))
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"barlow_twins: present must be a bool tensor, got {got}")
    if present.shape != (len(z), len(views)):
        raise ValueError(
            f"barlow_twins: present must have shape {(len(z), len(views))}, rows by views, "
            f"got {tuple(present.shape)}"
        )
    if present.device != z.device:
        raise ValueError(
            f"barlow_twins: present must be on the device of the views ({z.device}), got {present.device}"
        )


def _check_tensors(views: Mapping[str, Tensor]) -> None:
    for name, z in views.items():
        if not isinstance(z, Tensor):
            raise TypeError(f"barlow_twins: {name} must be a tensor, got {type(z).__name__}")


def _check_matrix(name: str, z: Tensor) -> None:
    if z.dim() != 2:
        raise ValueError(f"barlow_twins: {name} must have shape (B, D), got {tuple(z.shape)}")
    if z.shape[1] < 1:
        raise ValueError(f"barlow_twins: {name} must have at least 1 column, got {tuple(z.shape)}")


def _check_kind(views: Mapping[str, Tensor]) -> None:
    first, z = next(iter(views.items()))
    dtype_code("barlow_twins", first, z)
    for name, other in views.items():
        if other.dtype != z.dtype:
            raise TypeError(
                f"barlow_twins: {name} must have the dtype of {first} ({z.dtype}), got {other.dtype}"
            )
        if other.device != z.device:
            raise ValueError(
                f"barlow_twins: {name} must be on the device of {first} ({z.device}), got {other.device}"
            )


def compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def refuse(**views: Tensor) -> None:
    """Says which of the embeddings are not finite, or too large for their variance to be computed."""
    raise not_finite(views) or too_large(views)


def not_finite(views: Mapping[str, Tensor]) -> UserError | None:
    """What to say of the first view that holds NaN or infinity."""
    for name, z in views.items():
        wrong = ~z.isfinite()
        if count := int(wrong.sum()):
            row, column = wrong.nonzero()[0].tolist()
            return UserError(
                f"barlow_twins: {name} must be finite, got {count} NaN or infinite values of {z.numel()}, "
                f"the first ({float(z[row, column])}) in row {row}, column {column}"
            )
    return None


def too_large(views: Mapping[str, Tensor]) -> UserError:
    largest = {name: float(z.abs().max()) if z.numel() else 0.0 for name, z in views.items()}
    name = max(largest, key=largest.get)
    return UserError(
        f"barlow_twins: {name} must have variances within the range of {compute_dtype(views[name])}, "
        f"got values up to {largest[name]:.3g}"
    )
