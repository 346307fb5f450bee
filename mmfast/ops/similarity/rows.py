"""Embeddings as the products of the similarity losses take them, and the gradient back to embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.native import DTYPE_CODES, call_cuda

# A shorter row has no direction: its scores and its gradient are zero.
SHORTEST = 1e-12


class Rows(NamedTuple):
    """What is known of embeddings (n, D): their directions u in the compute type, and 1 / length, 0 for none."""

    unit: Tensor
    scale: Tensor | None
    """(n, 1); None: unit are the embeddings themselves."""
    finite: bool
    """Whether what is valid is; always True on devices, where nobody waits for it."""


def rows_of(x: Tensor, cosine: bool, valid: Tensor | None = None, backend: str = "reference") -> Rows:
    """Of embeddings (n, D); those that are not ``valid`` (n,) are not read, NaN or not, and are zero.

    backend: see ``kernels.backend_of``.
    """
    if backend != "reference":
        return _rows_by_kernel(x, cosine, valid, backend)
    if valid is not None:
        x = x.where(valid[:, None], torch.zeros((), dtype=x.dtype, device=x.device))
    x = x.to(compute_dtype(x)).contiguous()
    finite = x.device.type != "cpu" or bool(x.isfinite().all())
    if not cosine:
        return Rows(x, None, finite)
    # By a power of two, which rounds nothing: squares neither overflow nor vanish.
    largest = x.abs().amax(1, keepdim=True)
    exponent = torch.where(largest > 0, torch.frexp(largest)[1], 0)
    # In two steps, as 2^-exponent may be no number.
    half = exponent // 2
    scaled = torch.ldexp(torch.ldexp(x, -half), half - exponent)
    length = scaled.square().sum(1, keepdim=True).sqrt()
    # Compared where it cannot overflow; NaN stays.
    void = (torch.ldexp(length, exponent.clamp(max=0)) < SHORTEST) & (exponent <= 0) | (largest == 0)
    inverse = torch.where(void, 0, 1 / length)
    return Rows(scaled * inverse, torch.ldexp(torch.ldexp(inverse, -half), half - exponent), finite)


def _rows_by_kernel(x: Tensor, cosine: bool, valid: Tensor | None, backend: str) -> Rows:
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    valid = None if valid is None else valid.contiguous()
    unit = torch.empty(x.shape, dtype=compute_dtype(x), device=x.device)
    inverse = unit.new_empty(x.shape[0], 1)
    if backend == "triton":
        from mmfast.triton import similarity

        inverse = inverse if cosine else None
        similarity.units(x, valid, unit, inverse)
        return Rows(unit, inverse, True)
    arguments = (
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        *x.shape,
        0 if valid is None else valid.data_ptr(),
        cosine,
        unit.data_ptr(),
        inverse.data_ptr(),
    )
    finite = True
    if backend == "cuda":
        call_cuda("similarity", backends._C.cuda_similarity_units, x.device, *arguments)
    else:
        finite = backends._C.similarity_units(*arguments, torch.get_num_threads())
    return Rows(unit, inverse if cosine else None, finite)


def joined(*parts: Tensor) -> Tensor:
    """Rows of one after those of another, in their own type: autocast to another half type refuses to join."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts)


def unit_rows(x: Tensor, cosine: bool) -> Tensor:
    """The ``unit`` of :func:`rows_of`, as a function of x that autograd differentiates."""
    if not cosine:
        return x.to(compute_dtype(x)).contiguous()
    y = x.to(compute_dtype(x)).contiguous() * rows_of(x.detach(), cosine).scale
    # Of length 1 or 0. So the value is y, and the derivative leaves out what is along y.
    return y * (1.5 - 0.5 * y.square().sum(1, keepdim=True))


def to_rows(
    grad: Tensor, rows: Rows, scale: Tensor, dtype: torch.dtype, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The gradient by the embeddings, of that by u that lacks the factor ``scale``, and (n,) grad . u.

    ``grad`` may be overwritten.
    """
    if backend != "reference":
        return _back_by_kernel(grad, rows, scale, dtype, backend)
    along = (grad * rows.unit).sum(1, keepdim=True)
    result = grad * scale
    if rows.scale is not None:
        result = (result - rows.unit * (along * scale)) * rows.scale
    return result.to(dtype), along[:, 0]


def _back_by_kernel(
    grad: Tensor, rows: Rows, scale: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    out = grad if dtype == grad.dtype else torch.empty_like(grad, dtype=dtype)
    dots = grad.new_empty(grad.shape[0])
    if backend == "triton":
        from mmfast.triton import similarity

        similarity.row_gradients(grad, rows.unit, rows.scale, scale, out, dots)
        return out, dots
    arguments = (
        DTYPE_CODES[dtype],
        grad.data_ptr(),
        rows.unit.data_ptr(),
        0 if rows.scale is None else rows.scale.data_ptr(),
        scale.data_ptr(),
        *grad.shape,
        rows.scale is not None,
        out.data_ptr(),
        dots.data_ptr(),
    )
    if backend == "cuda":
        call_cuda("similarity", backends._C.cuda_similarity_row_gradients, grad.device, *arguments)
    else:
        backends._C.similarity_row_gradients(*arguments, torch.get_num_threads())
    return out, dots
