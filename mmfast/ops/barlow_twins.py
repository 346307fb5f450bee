"""The Barlow Twins loss (Zbontar et al., ICML 2021), never at more work than min(B, D) asks.

For embeddings of two views (B, D) with standardised columns Â and B̂ and correlation matrix C = Â'B̂ / B::

    L = sum_i (1 - c_ii)^2 + lambd * sum_{i != j} c_ij^2

The direct form computes C, O(B D^2). The Gram form uses that the squares of C sum to <ÂÂ', B̂B̂'> / B^2, and
that the gradient needs (B̂B̂')Â where the direct form has B̂(B̂'Â): O(B^2 D), and nothing of size D x D exists.
Both are exact (the identity is the duality of Garrido et al., ICLR 2023). The Gram form subtracts the
diagonal from that sum, which is safe where the form is cheaper: C has at most rank B, so for B < D its
diagonal cannot make up nearly all of it.

What lies between the matrix products are five passes: PyTorch (:class:`_Plain`), CUDA (:class:`_Cuda`) and
Triton (``mmfast/triton/barlow_twins.py``) have the same ones, C++ (:class:`_Cpu`) puts the products of the
Gram form into its own.

Half embeddings on CUDA devices are ``narrow``: tensor cores multiply the half types, so the products' operands
are rounded to that type; their results, the statistics and everything elementwise stay in fp32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.native import DTYPE_CODES, call_cuda, dtype_code
from mmfast.ops.products import gram_matrices, matmul, product


class Definition(NamedTuple):
    """What published losses of this name disagree on; :func:`barlow_twins` explains the fields."""

    lambd: float = 5e-3
    center: bool = True
    eps: float = 1e-5
    eps_outside: bool = False
    unbiased: bool = False
    divide: bool = True
    scale: float = 1.0
    normalise: bool = True

    def check(self) -> None:
        check_options(lambd=self.lambd, eps=self.eps, scale=self.scale)

    # For B rows; csrc/barlow_twins.h has the same names.

    def excess(self, rows: int) -> float:
        """1 - biased variance / the variance that is used."""
        return 1 / rows if self.unbiased else 0.0

    def lack(self, rows: int) -> float:
        """1 - what c_ii is drawn to."""
        return 0.0 if self.divide else 1 - 1 / rows

    def factor(self, rows: int) -> float:
        """Of the loss of correlations that are divided by B."""
        return self.scale if self.divide else self.scale * rows**2


def reference(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float = 5e-3,
    center: bool = True,
    eps: float = 1e-5,
    eps_outside: bool = False,
    unbiased: bool = False,
    divide: bool = True,
    scale: float = 1.0,
    normalise: bool = True,
    pooled: bool = False,
) -> Tensor:
    """The definition, by autograd differentiable to any order: what every form and backend must equal."""

    def standardise(z):
        z = z.to(_compute_dtype(z))
        d = z - z.mean(0) if center else z
        if not normalise:
            return d
        v = d.square().sum(0) / (len(z) - unbiased)
        return d / (v.sqrt() + eps if eps_outside else (v + eps).sqrt())

    rows = len(z_a)
    if pooled:
        a, b = standardise(torch.cat((z_a, z_b))).split(rows)
    else:
        a, b = standardise(z_a), standardise(z_b)
    c = a.T @ b / (rows if divide else 1)
    off_diagonal = c - torch.diag(c.diagonal())
    return scale * ((1 - c.diagonal()).square().sum() + lambd * off_diagonal.square().sum())


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float = 5e-3,
    center: bool = True,
    eps: float = 1e-5,
    eps_outside: bool = False,
    unbiased: bool = False,
    divide: bool = True,
    scale: float = 1.0,
    normalise: bool = True,
    pooled: bool = False,
    gram: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and detached (5,) the loss, its on- and off-diagonal part, the mean of c_ii, the RMS of c_ij.

    Embeddings are divided by sqrt(v + eps), or with ``eps_outside`` by sqrt(v) + eps, for the mean square v of
    their columns (less the column means if ``center``), or with ``unbiased`` the sum of squares over B - 1.
    ``pooled``: means and v are those of both views together. ``normalise=False``: by nothing.
    ``divide=False``: C = Â'B̂. Components are of the C that is divided by B all the same: the loss is
    scale B^2 (sum_i (1 / B - c_ii)^2 + lambd sum_{i != j} c_ij^2) in its terms.

    ``gram`` forces a form; by default it is the cheaper one.
    """
    definition = Definition(lambd, center, eps, eps_outside, unbiased, divide, scale, normalise)
    check_embeddings(z_a, z_b)
    check_options(lambd=lambd, eps=eps, scale=scale)
    if gram is None:
        gram = _gram_is_cheaper(*z_a.shape)
    if pooled:
        z_a, z_b = _pooled(z_a, z_b, definition)
        definition = definition._replace(center=False, normalise=False)
    # Without standardisation, half types may not hold the products.
    narrow = definition.normalise and _narrow(z_a.dtype, z_a.device)
    loss, components, _ = _BarlowTwins.apply(z_a, z_b, gram, narrow, *definition)
    return loss, components


def _root(x: Tensor) -> Tensor:
    """The square root, with a derivative of zero at zero."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


def _pooled(z_a: Tensor, z_b: Tensor, definition: Definition) -> tuple[Tensor, ...]:
    """Both views, standardised by statistics of their rows together; differentiable."""
    z = torch.cat((z_a, z_b)).to(_compute_dtype(z_a))
    if definition.center:
        # Relative to the first row, an offset costs no precision; the mean takes it out again.
        z = z - z[0].detach()
        z = z - z.mean(0)
    if definition.normalise:
        v = z.square().mean(0) / (1 - definition.excess(len(z)))
        w = _root(v) + definition.eps if definition.eps_outside else _root(v + definition.eps)
        r = torch.where(w > 0, 1 / torch.where(w > 0, w, 1), 0)
        z = z * (r + (v - v))
    if not torch.compiler.is_compiling() and not z.is_cuda and not z.isfinite().all():
        _refuse(z_a=z_a, z_b=z_b)
    return z.split(len(z_a))


def _narrow(dtype: torch.dtype, device: torch.device) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return half and backends.choose("barlow_twins", device) in ("cuda", "triton")


# What torch.compiler.assume_constant_result sets; that itself would import the compiler along with mmfast.
_narrow._dynamo_marked_constant = True


def _gram_is_cheaper(rows: int, columns: int) -> bool:
    # 8 B^2 D operations against 6 B D^2. With symmetric Gram matrices it is even at B = 0.9 D, but there the
    # subtraction of the diagonal may magnify rounding by 1 / (1 - B / D) = 10, here by 4 at most.
    return 4 * rows < 3 * columns


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def check_options(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"barlow_twins: {name} must be finite and at least 0, got {value}")


def check_embeddings(z_a: Tensor, z_b: Tensor) -> None:
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if not isinstance(z, Tensor):
            raise TypeError(f"barlow_twins: {name} must be a tensor, got {type(z).__name__}")
    if z_a.dim() != 2:
        raise ValueError(f"barlow_twins: z_a must have shape (B, D), got {tuple(z_a.shape)}")
    if z_b.shape != z_a.shape:
        raise ValueError(
            f"barlow_twins: z_b must have the shape of z_a {tuple(z_a.shape)}, got {tuple(z_b.shape)}"
        )
    if z_a.shape[0] < 2:
        raise ValueError(
            "barlow_twins: z_a must have at least 2 rows (a correlation over one sample is undefined), "
            f"got {tuple(z_a.shape)}"
        )
    if z_a.shape[1] < 1:
        raise ValueError(f"barlow_twins: z_a must have at least 1 column, got {tuple(z_a.shape)}")
    dtype_code("barlow_twins", "z_a", z_a)
    if z_b.dtype != z_a.dtype:
        raise TypeError(f"barlow_twins: z_b must have the dtype of z_a ({z_a.dtype}), got {z_b.dtype}")
    if z_b.device != z_a.device:
        raise ValueError(f"barlow_twins: z_b must be on the device of z_a ({z_a.device}), got {z_b.device}")


def _refuse(**views: Tensor) -> None:
    """Says which of the embeddings are not finite, or too large for their variance to be computed."""
    for name, z in views.items():
        wrong = ~z.isfinite()
        if count := int(wrong.sum()):
            row, column = wrong.nonzero()[0].tolist()
            raise UserError(
                f"barlow_twins: {name} must be finite, got {count} NaN or infinite values of {z.numel()}, "
                f"the first ({float(z[row, column])}) in row {row}, column {column}"
            )
    largest = {name: float(z.abs().max()) for name, z in views.items()}
    name = max(largest, key=largest.get)
    raise UserError(
        f"barlow_twins: {name} must have variances within the range of {_compute_dtype(views[name])}, "
        f"got values up to {largest[name]:.3g}"
    )


def _check_memory(enough: bool, rows: int) -> None:
    if not enough:
        raise MemoryError(f"barlow_twins: no memory for copies of blocks of {rows} rows")


@functools.lru_cache
def _native(definition: Definition):
    return backends._C.BarlowTwinsDefinition(*definition)


class _Cpu:
    """The passes in C++, for CPU tensors: csrc/cpu/kernels.h. Never narrow: views are the hats."""

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        rows, columns = z_a.shape
        hat = torch.empty(2, rows, columns, dtype=_compute_dtype(z_a))
        statistics = torch.empty(5, columns, dtype=hat.dtype)
        status = backends._C.barlow_twins_standardise(
            DTYPE_CODES[z_a.dtype],
            z_a.data_ptr(),
            z_a.stride(0),
            z_b.data_ptr(),
            z_b.stride(0),
            rows,
            columns,
            _native(definition),
            hat.data_ptr(),
            statistics.data_ptr(),
            torch.get_num_threads(),
        )
        _check_memory(status < 2, rows)
        if status == 1:
            _refuse(z_a=z_a, z_b=z_b)
        return hat, statistics

    @staticmethod
    def gram_energy(hat, statistics, definition, grad_a, grad_b):
        """Loss, components, and what the backward pass needs: ÂÂ' if ``grad_b``, B̂B̂' if ``grad_a``."""
        _, rows, columns = hat.shape
        kept = hat.new_empty(grad_a + grad_b, rows, rows)
        loss, components = hat.new_empty(()), hat.new_empty(5)
        done = backends._C.barlow_twins_gram_energy(
            hat.dtype == torch.float64,
            hat.data_ptr(),
            statistics.data_ptr(),
            rows,
            columns,
            _native(definition),
            grad_a,
            grad_b,
            kept.data_ptr(),
            loss.data_ptr(),
            components.data_ptr(),
            torch.get_num_threads(),
        )
        _check_memory(done, rows)
        return loss, components, kept

    @staticmethod
    def correlation_loss(p, rows, statistics, definition):
        loss, components = p.new_empty(()), p.new_empty(5)
        backends._C.barlow_twins_correlation_energy(
            p.dtype == torch.float64,
            p.data_ptr(),
            statistics.data_ptr(),
            rows,
            len(p),
            _native(definition),
            loss.data_ptr(),
            components.data_ptr(),
            torch.get_num_threads(),
        )
        return loss, components

    @staticmethod
    def gram_backward(grams, hats, statistics, upstream, definition, grads):
        """Fills ``grads``, unless None, from the matrices that :meth:`gram_energy` kept."""
        _Cpu._backward(True, (grams[-1], grams[0]), hats, statistics, upstream, definition, grads)

    @staticmethod
    def gradient(products, hats, statistics, upstream, definition, gram, exponent, grams, grads):
        _Cpu._backward(False, products, hats, statistics, upstream, definition, grads)

    @staticmethod
    def _backward(gram, matrices, hats, statistics, upstream, definition, grads):
        rows, columns = hats[0].shape
        done = backends._C.barlow_twins_backward(
            DTYPE_CODES[next(grad.dtype for grad in grads if grad is not None)],
            gram,
            *(0 if grad is None else x.data_ptr() for x, grad in zip(matrices, grads, strict=True)),
            hats[0].data_ptr(),  # the second one follows
            statistics.data_ptr(),
            upstream.data_ptr(),
            rows,
            columns,
            _native(definition),
            *map(_address, grads),
            torch.get_num_threads(),
        )
        _check_memory(done, rows)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Plain:
    """The passes in PyTorch, for any device: what they are.

    Notation as in csrc/barlow_twins.h; C is the compute type: fp64 for fp64, else fp32.
    """

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        """hat (2, B, D): Â and B̂, of z's type if ``narrow``, else of C; statistics (5, D) of C.

        z_a, z_b (B, D) have unit column stride. The statistics are r_a, r_b, 1 - c_ii without cancellation,
        and the means of view a and of view b, 0 if not ``definition.center``.
        """
        z = torch.stack((z_a, z_b)).to(_compute_dtype(z_a))
        # Relative to the first row, an offset costs no precision.
        shift = z[:, :1] if definition.center else torch.zeros_like(z[:, :1])
        d = z - shift
        mean = d.mean(1, keepdim=True) if definition.center else shift
        d = d - mean
        excess, eps = definition.excess(len(z_a)), definition.eps
        v = d.square().mean(1) / (1 - excess)
        w = v.sqrt() + eps if definition.eps_outside else v + eps
        # A column without variance correlates with nothing if eps is 0, too; one that is not finite shows.
        r = torch.where(w > 0, 1 / w if definition.eps_outside else w.rsqrt(), 0) + (w - w)
        if not definition.normalise:
            r = 1 + (v - v)
        hat = d * r[:, None]
        if definition.normalise:
            lost = eps * r * (2 - eps * r) if definition.eps_outside else eps * r * r
            shrinkage = excess + (1 - excess) * torch.where(r == 0, 1, lost)
            one_minus_c = ((hat[0] - hat[1]).square().mean(0) + shrinkage.sum(0)) / 2
        else:
            one_minus_c = 1 - (hat[0] * hat[1]).mean(0)
        statistics = torch.cat((r, one_minus_c[None], (shift + mean)[:, 0]))
        return hat.to(z_a.dtype) if narrow else hat, statistics

    @staticmethod
    def gram_loss(grams, statistics, definition):
        """Loss and components (5,) from grams (2, B, B): ÂÂ' and B̂B̂'."""
        energy = (grams[0] * grams[1]).sum() / grams.shape[1] ** 2 - (1 - statistics[2]).square().sum()
        return _Plain._finish(energy.clamp(min=0), grams.shape[1], statistics[2], definition)

    @staticmethod
    def correlation_loss(p, rows, statistics, definition):
        """The same from p = Â'B̂ (D, D), whose diagonal becomes zero."""
        energy = p.fill_diagonal_(0).square().sum() / rows**2
        return _Plain._finish(energy, rows, statistics[2], definition)

    @staticmethod
    def _finish(off_diagonal, rows, one_minus_c, definition):
        on_diagonal = (one_minus_c - definition.lack(rows)).square().sum()
        loss = definition.factor(rows) * (on_diagonal + definition.lambd * off_diagonal)
        pairs = len(one_minus_c) * (len(one_minus_c) - 1)
        rms = (off_diagonal / max(1, pairs)).sqrt()
        return loss, torch.stack((loss, on_diagonal, off_diagonal, 1 - one_minus_c.mean(), rms))

    @staticmethod
    def narrowed(matrices, dtype, exponent):
        """Operands of narrow products: matrices (..., n, n) 2^-exponent in ``dtype``, with zero diagonals."""
        scaled = matrices * 2.0**-exponent
        scaled.diagonal(dim1=-2, dim2=-1).zero_()
        return scaled.to(dtype)

    @staticmethod
    def gradient(products, views, statistics, upstream, definition, gram, exponent, grams, grads):
        """Fills grads [grad_a, grad_b] (B, D), dense, of z's type; those that are None are not wanted.

        products [m_a, m_b] (B, D) of C: B̂B̂'Â and ÂÂ'B̂ if ``gram``, else B̂p' and Âp, all times 2^-exponent.
        views: both hats of C; or, narrow, both z. upstream (): the gradient of the loss.
        grams: None; or [B̂B̂', ÂÂ'] of C, whose diagonals the products lack (narrow Gram form).
        A grad may be its own product. Where a grad is None, so may be its product and its matrix of grams.
        """
        if views[0].dtype == statistics.dtype:
            hat = views
        else:
            r, mean = statistics[:2], statistics[3:]
            hat = [(z - mean[i]) * r[i] for i, z in enumerate(views)]
        rows, one_minus_c = len(hat[0]), statistics[2]
        lambd, eps = definition.lambd, definition.eps
        weight = one_minus_c - definition.lack(rows)
        if gram:
            weight = weight + lambd * (1 - one_minus_c)
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            own, partner, m, r = hat[i], hat[1 - i], products[i] * 2.0**exponent, statistics[i]
            if grams is not None:
                m += grams[i].diagonal()[:, None] * own
            g = upstream * (2 * definition.factor(rows) / rows) * (lambd / rows * m - weight * partner)
            if definition.normalise:
                kept = 1 - eps * r if definition.eps_outside else torch.ones_like(r)
                projection = torch.where(kept > 0, 1 / (kept * (1 - definition.excess(rows))), 0)
                g = g - projection * own * (own * g).mean(0)
            grad.copy_(r * g)


class _Cuda:
    """The passes in CUDA: csrc/cuda/kernels.h."""

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        rows, columns = z_a.shape
        compute = _compute_dtype(z_a)
        hat = z_a.new_empty((2, rows, columns), dtype=z_a.dtype if narrow else compute)
        statistics = z_a.new_empty((5, columns), dtype=compute)
        words = backends._C.barlow_twins_standardise_scratch(compute == torch.float64, rows, columns)
        scratch = statistics.new_empty(words) if words else None
        call_cuda(
            "barlow_twins",
            backends._C.cuda_barlow_twins_standardise,
            z_a.device,
            DTYPE_CODES[z_a.dtype],
            narrow,
            z_a.data_ptr(),
            z_a.stride(0),
            z_b.data_ptr(),
            z_b.stride(0),
            rows,
            columns,
            _native(definition),
            hat.data_ptr(),
            statistics.data_ptr(),
            _address(scratch),
        )
        return hat, statistics

    @staticmethod
    def gram_loss(grams, statistics, definition):
        return _Cuda._loss(True, grams, grams.shape[1], statistics, definition)

    @staticmethod
    def correlation_loss(p, rows, statistics, definition):
        return _Cuda._loss(False, p, rows, statistics, definition)

    @staticmethod
    def _loss(gram, matrices, rows, statistics, definition):
        wide, columns = statistics.dtype == torch.float64, statistics.shape[1]
        loss, components = statistics.new_empty(()), statistics.new_empty(5)
        words = backends._C.barlow_twins_loss_scratch(wide, gram, rows, columns)
        scratch = statistics.new_empty(words) if words else None
        call_cuda(
            "barlow_twins",
            backends._C.cuda_barlow_twins_loss,
            statistics.device,
            wide,
            gram,
            matrices.data_ptr(),
            statistics.data_ptr(),
            rows,
            columns,
            _native(definition),
            loss.data_ptr(),
            components.data_ptr(),
            _address(scratch),
        )
        return loss, components

    @staticmethod
    def narrowed(matrices, dtype, exponent):
        n = matrices.shape[-1]
        out = torch.empty_like(matrices, dtype=dtype)
        call_cuda(
            "barlow_twins",
            backends._C.cuda_barlow_twins_narrowed,
            matrices.device,
            DTYPE_CODES[dtype],
            matrices.data_ptr(),
            matrices.numel() // (n * n),
            n,
            exponent,
            out.data_ptr(),
        )
        return out

    @staticmethod
    def gradient(products, views, statistics, upstream, definition, gram, exponent, grams, grads):
        view_a, view_b = views
        rows, columns = view_a.shape
        words = backends._C.barlow_twins_gradient_scratch(statistics.dtype == torch.float64, rows, columns)
        scratch = statistics.new_empty(words) if words else None
        call_cuda(
            "barlow_twins",
            backends._C.cuda_barlow_twins_gradient,
            statistics.device,
            DTYPE_CODES[view_a.dtype],
            DTYPE_CODES[next(grad.dtype for grad in grads if grad is not None)],
            *map(_address, products),
            view_a.data_ptr(),
            view_a.stride(0),
            view_b.data_ptr(),
            view_b.stride(0),
            statistics.data_ptr(),
            upstream.data_ptr(),
            rows,
            columns,
            _native(definition),
            gram,
            exponent,
            *((0, 0) if grams is None else map(_address, grams)),
            *map(_address, grads),
            _address(scratch),
        )


def _passes(device: torch.device, narrow: bool):
    name = backends.choose("barlow_twins", device)
    if name == "cuda":
        return _Cuda
    if name == "triton":
        from mmfast.triton import barlow_twins

        return barlow_twins
    return _Cpu if name == "cpu" and not narrow else _Plain


def _unit_stride(z: Tensor) -> Tensor:
    return z if z.stride(1) == 1 else z.contiguous()


def _check_narrow(narrow: bool, z: Tensor) -> None:
    if narrow and z.dtype == _compute_dtype(z):
        raise ValueError(f"barlow_twins: narrow must be False for {z.dtype} embeddings, got True")


def _forward(z_a, z_b, gram, narrow, grad_a, grad_b, *definition):
    definition = Definition(*definition)
    check_embeddings(z_a, z_b)
    definition.check()
    _check_narrow(narrow, z_a)
    passes = _passes(z_a.device, narrow)
    hat, statistics = passes.standardise(_unit_stride(z_a), _unit_stride(z_b), definition, narrow)
    # Asking any other device would wait for it: there the loss becomes NaN.
    if passes is not _Cpu and not z_a.is_cuda and not statistics.isfinite().all():
        _refuse(z_a=z_a, z_b=z_b)
    if not gram:
        hat_a, hat_b = hat.unbind()
        matrices = product(hat_a.t(), hat_b.t())
        loss, components = passes.correlation_loss(matrices, len(z_a), statistics, definition)
    elif passes is _Cpu:
        loss, components, matrices = _Cpu.gram_energy(hat, statistics, definition, grad_a, grad_b)
    else:
        matrices = gram_matrices(hat)
        loss, components = passes.gram_loss(matrices, statistics, definition)
        if not (grad_a and grad_b):
            # A copy, so that what is not needed can be freed.
            matrices = matrices[1 - grad_b : 1 + grad_a].clone()
    return loss, components, hat, statistics, matrices


def _forward_fake(z_a, z_b, gram, narrow, grad_a, grad_b, *definition):
    check_embeddings(z_a, z_b)
    Definition(*definition).check()
    _check_narrow(narrow, z_a)
    rows, columns = z_a.shape
    compute = _compute_dtype(z_a)
    matrices = (grad_a + grad_b, rows, rows) if gram else (columns, columns)
    return (
        z_a.new_empty((), dtype=compute),
        z_a.new_empty(5, dtype=compute),
        z_a.new_empty((2, rows, columns), dtype=z_a.dtype if narrow else compute),
        z_a.new_empty((5, columns), dtype=compute),
        z_a.new_empty(matrices, dtype=compute),
    )


def _backward(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, *definition):
    definition = Definition(*definition)
    passes = _passes(statistics.device, narrow)
    dtype, compute = views[-1].dtype, statistics.dtype
    z = [_unit_stride(z) for z in views[-2:]] if len(views) > 1 else None
    hat = passes.standardise(*z, definition, narrow)[0] if len(views) == 2 else views[0]
    hats = hat_a, hat_b = hat.unbind()
    if gram and passes is _Cpu:
        grads = [torch.empty_like(hat_a, dtype=dtype) if wanted else None for wanted in (grad_a, grad_b)]
        _Cpu.gram_backward(matrices, hats, statistics, upstream, definition, grads)
    else:
        exponent, operands = 0, matrices
        if narrow:
            # Gram matrices hold sums of D, p those of B products of about 1: this keeps them within fp16.
            exponent = (hat.shape[2] if gram else hat.shape[1]).bit_length()
            operands = passes.narrowed(matrices, dtype, exponent)
        if gram:
            m_a = matmul(operands[-1], hat_a) if grad_a else None
            m_b = matmul(operands[0], hat_b) if grad_b else None
        else:
            m_a = product(hat_b, operands) if grad_a else None
            m_b = product(hat_a, operands.t()) if grad_b else None
        products = (m_a, m_b)
        if dtype == compute:
            grads = products
        else:
            grads = [None if m is None else torch.empty_like(m, dtype=dtype) for m in products]
        elementwise = z if narrow else hats
        grams = (matrices[-1], matrices[0]) if gram and narrow else None
        passes.gradient(products, elementwise, statistics, upstream, definition, gram, exponent, grams, grads)
    return tuple(hat.new_empty(0, dtype=dtype) if grad is None else grad for grad in grads)


def _backward_fake(upstream, views, statistics, matrices, gram, narrow, grad_a, grad_b, *definition):
    z = views[-1]
    return tuple(z.new_empty(z.shape[-2:] if wanted else 0) for wanted in (grad_a, grad_b))


_library = torch.library.Library("mmfast", "FRAGMENT")
# hat (2, B, D) and statistics (5, D): see _Plain.standardise; views: hat, or z_a and z_b to standardise again,
# or, narrow, all three; matrices: in Gram form (n, B, B), ÂÂ' if grad_b and B̂B̂' if grad_a, else Â'B̂ less its
# diagonal.
_options = (
    "bool gram, bool narrow, bool grad_a, bool grad_b, float lambd, bool center, float eps, bool eps_outside, "
    "bool unbiased, bool divide, float scale, bool normalise"
)
_ops = {
    f"barlow_twins_forward(Tensor z_a, Tensor z_b, {_options})"
    " -> (Tensor loss, Tensor components, Tensor hat, Tensor statistics, Tensor matrices)": (
        _forward,
        _forward_fake,
    ),
    f"barlow_twins_backward(Tensor upstream, Tensor[] views, Tensor statistics, Tensor matrices, {_options})"
    " -> (Tensor grad_a, Tensor grad_b)": (_backward, _backward_fake),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)


# Overloads: calls through the packet would look for them every time.
_forward_op = torch.ops.mmfast.barlow_twins_forward.default
_backward_op = torch.ops.mmfast.barlow_twins_backward.default


def _gradient(options, upstream, statistics, matrices, *views):
    return _backward_op(upstream, views, statistics, matrices, *options)


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return _gradient(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "barlow_twins: the gradient must not be differentiated again (double backward); "
            "mmfast.ops.barlow_twins.reference can be"
        )


class _BarlowTwins(torch.autograd.Function):
    """Returns the loss, its components, and the standardised embeddings.

    The last are outputs so that, saved for backward, they tie a recorded gradient to this node: a second
    differentiation then meets :class:`_FinalGradient` and cannot pass it by unnoticed.
    """

    @staticmethod
    def forward(ctx, z_a, z_b, gram, narrow, *definition):
        grad_a, grad_b = ctx.needs_input_grad[:2]
        loss, components, hat, statistics, matrices = _forward_op(
            z_a, z_b, gram, narrow, grad_a, grad_b, *definition
        )
        ctx.options = gram, narrow, grad_a, grad_b, *definition
        # Half embeddings are smaller than their fp32 hats: keep those, and standardise again.
        views = (hat,) if hat.dtype == z_a.dtype else (z_a, z_b)
        if narrow:
            views += z_a, z_b
        ctx.save_for_backward(statistics, matrices, *views)
        ctx.mark_non_differentiable(components)
        ctx.set_materialize_grads(False)
        return loss, components, hat

    @staticmethod
    def backward(ctx, upstream, _components, _hat):
        unneeded = (None,) * (len(ctx.options) - 2)
        if upstream is None:
            return None, None, *unneeded
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else _gradient
        grad_a, grad_b = gradient(ctx.options, upstream, *ctx.saved_tensors)
        _, _, needs_a, needs_b, *_ = ctx.options
        return grad_a if needs_a else None, grad_b if needs_b else None, *unneeded
