"""What a Barlow Twins loss may be given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmfast.checks import check_number, told
from mmfast.errors import UserError
from mmfast.ops.native import dtype_code

OP = "barlow_twins"


def check_options(**options: float) -> None:
    for name, value in options.items():
        check_number(OP, name, value, 0)


def check_views(
    views: Mapping[str, Tensor], rows: int = 2, corresponding: bool = False, op: str = OP
) -> None:
    """Refuses what is not (B, D_m) for every view, B >= ``rows``; with one D if columns are ``corresponding``."""
    first = wanted = None
    for name, z in views.items():
        check_dense(op, name, z)
        shape = z.shape
        if len(shape) != 2:
            raise UserError(f"{op}: {name} must have shape (B, D), got {tuple(shape)}")
        if shape[1] < 1:
            raise UserError(f"{op}: {name} must have at least 1 column, got {tuple(shape)}")
        if first is None:
            first, wanted = name, shape
        elif corresponding and shape != wanted:
            raise UserError(
                f"{op}: {name} must have the shape of {first} {tuple(wanted)}, got {tuple(shape)}"
            )
        elif shape[0] != wanted[0]:
            raise UserError(f"{op}: {name} must have the {wanted[0]} rows of {first}, got {tuple(shape)}")
    if wanted[0] < rows:
        raise UserError(
            f"{op}: {first} must have at least {rows} rows (a correlation over one sample is undefined), "
            f"got {tuple(wanted)}"
        )
    z = views[first]
    dtype, device = z.dtype, z.device
    dtype_code(op, first, z)
    for name, other in views.items():
        if other.dtype != dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first} ({dtype}), got {other.dtype}")
        if other.device != device:
            raise UserError(f"{op}: {name} must be on the device of {first} ({device}), got {other.device}")


def check_dense(op: str, name: str, z: Tensor) -> None:
    """Refuses what is no tensor of numbers at strides: sparse, nested and oneDNN's own."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {told(z)}")
    if z.layout is not torch.strided or z.is_nested:
        kind = "nested" if z.is_nested else z.layout
        raise TypeError(f"{op}: {name} must be a dense tensor (torch.strided), got a tensor that is {kind}")


def check_present(present: Tensor, views: Mapping[str, Tensor]) -> None:
    """Refuses what is not a bool (B, M) on the device of the views."""
    _check_present("present", present, next(iter(views.values())), len(views))


def stacked_present(present: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> Tensor:
    """The same of (B,) for each view, in their order, as one (B, M)."""
    z = next(iter(views.values()))
    check_dense(OP, next(iter(views)), z)
    for name, has in present.items():
        _check_present(f"present[{name!r}]", has, z)
    return torch.stack(list(present.values()), dim=1)


def _check_present(name: str, present: Tensor, z: Tensor, views: int | None = None) -> None:
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else told(present)
        raise TypeError(f"{OP}: {name} must be a bool tensor, got {got}")
    check_dense(OP, name, present)
    shape, rule = ((len(z),), "") if views is None else ((len(z), views), ", rows by views")
    if present.shape != shape:
        raise UserError(f"{OP}: {name} must have shape {shape}{rule}, got {tuple(present.shape)}")
    if present.device != z.device:
        raise UserError(f"{OP}: {name} must be on the device of the views ({z.device}), got {present.device}")


def compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def unusable(views: Mapping[str, Tensor], op: str = OP) -> Unusable:
    """Which of the embeddings are not finite, or too large for their variance to be computed."""
    return not_finite(views, op) or too_large(views, op)


class Unusable(UserError):
    """Embeddings hold NaN or infinity, or are too large for what is made of them."""


def not_finite(views: Mapping[str, Tensor], op: str = OP) -> Unusable | None:
    """What to say of the first view that holds NaN or infinity."""
    for name, z in views.items():
        wrong = ~z.isfinite()
        if count := int(wrong.sum()):
            row, column = wrong.nonzero()[0].tolist()
            return Unusable(
                f"{op}: {name} must be finite, got {count} NaN or infinite values of {z.numel()}, "
                f"the first ({float(z[row, column])}) in row {row}, column {column}"
            )
    return None


def too_large(views: Mapping[str, Tensor], op: str = OP, what: str = "variances") -> Unusable:
    """What to say where something made of finite embeddings is not finite: of those with the largest values."""
    largest = {name: float(z.abs().max()) if z.numel() else 0.0 for name, z in views.items()}
    name = max(largest, key=largest.get)
    return Unusable(
        f"{op}: {name} must have {what} within the range of {compute_dtype(views[name])}, "
        f"got values up to {largest[name]:.3g}"
    )
