"""What lies between the matrix products of the Barlow Twins loss: the passes of every backend.

:class:`Plain` (PyTorch), :class:`Cuda` and ``mmfast/triton/barlow_twins.py`` have the same five; :class:`Cpu`, in
C++, puts the products of the Gram form into its own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmfast import backends
from mmfast.ops.barlow_twins.checks import compute_dtype, unusable
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.native import DTYPE_CODES, call_cuda


def _check_status(status: int, z_a: Tensor, z_b: Tensor) -> None:
    """Of kernels: see csrc/cpu/kernels.h."""
    if status == 1:
        raise unusable({"z_a": z_a, "z_b": z_b})
    _check_memory(status != 2, len(z_a))


def _check_memory(enough: bool, rows: int) -> None:
    if not enough:
        raise MemoryError(f"barlow_twins: no memory for copies of blocks of {rows} rows")


@functools.lru_cache
def _native(definition: Definition):
    return backends._C.BarlowTwinsDefinition(*definition)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _both(z_a: Tensor, z_b: Tensor) -> tuple[int, ...]:
    """Address and row stride of each view, and the rows and columns of both."""
    return z_a.data_ptr(), z_a.stride(0), z_b.data_ptr(), z_b.stride(0), *z_a.shape


class Plain:
    """The passes in PyTorch, for any device: what they are.

    Notation as in csrc/barlow_twins.h; C is the compute type: fp64 for fp64, else fp32.
    """

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        """hat (2, B, D): Â and B̂, of z's type if ``narrow``, else of C; statistics (5, D) of C.

        z_a, z_b (B, D) have unit column stride. The statistics are r_a, r_b, target - c_ii without
        cancellation, and the means of view a and of view b, 0 if not ``definition.center``.
        """
        z = torch.stack((z_a, z_b)).to(compute_dtype(z_a))
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
        if definition.near:
            lost = eps * r * (2 - eps * r) if definition.eps_outside else eps * r * r
            shrinkage = excess + (1 - excess) * torch.where(r == 0, 1, lost)
            gap = ((hat[0] - hat[1]).square().mean(0) + shrinkage.sum(0)) / 2
        else:
            gap = definition.target(len(z_a)) - (hat[0] * hat[1]).mean(0)
        statistics = torch.cat((r, gap[None], (shift + mean)[:, 0]))
        return hat.to(z_a.dtype) if narrow else hat, statistics

    @staticmethod
    def gram_loss(grams, statistics, definition):
        """Loss and components (5,) from grams (2, B, B): ÂÂ' and B̂B̂'."""
        rows = grams.shape[1]
        diagonal = definition.target(rows) - statistics[2]
        energy = (grams[0] * grams[1]).sum() / rows**2 - diagonal.square().sum()
        return Plain._finish(energy.clamp(min=0), rows, statistics[2], definition)

    @staticmethod
    def correlation_loss(p, rows, statistics, definition):
        """The same from p = Â'B̂ (D, D), whose diagonal becomes zero."""
        energy = p.fill_diagonal_(0).square().sum() / rows**2
        return Plain._finish(energy, rows, statistics[2], definition)

    @staticmethod
    def _finish(off_diagonal, rows, gap, definition):
        on_diagonal = gap.square().sum()
        loss = definition.factor(rows) * (on_diagonal + definition.lambd * off_diagonal)
        pairs = len(gap) * (len(gap) - 1)
        rms = (off_diagonal / max(1, pairs)).sqrt()
        return loss, torch.stack((loss, on_diagonal, off_diagonal, definition.target(rows) - gap.mean(), rms))

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
        rows, gap = len(hat[0]), statistics[2]
        lambd, eps = definition.lambd, definition.eps
        weight = gap + lambd * (definition.target(rows) - gap) if gram else gap
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


class Cpu:
    """The passes in C++, for CPU tensors: csrc/cpu/kernels.h. Not narrow: views are the hats."""

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        rows, columns = z_a.shape
        hat = z_a.new_empty((2, rows, columns), dtype=compute_dtype(z_a))
        statistics = hat.new_empty(5, columns)
        status = backends._C.barlow_twins_standardise(
            DTYPE_CODES[z_a.dtype],
            *_both(z_a, z_b),
            _native(definition),
            hat.data_ptr(),
            statistics.data_ptr(),
            torch.get_num_threads(),
        )
        _check_status(status, z_a, z_b)
        return hat, statistics

    @staticmethod
    def gram_forward(z_a, z_b, definition, grad_a, grad_b):
        """Loss, components, hat, statistics, and for the backward pass ÂÂ' if ``grad_b``, B̂B̂' if ``grad_a``."""
        rows, columns = z_a.shape
        hat = z_a.new_empty((2, rows, columns), dtype=compute_dtype(z_a))
        kept = hat.new_empty(grad_a + grad_b, rows, rows)
        statistics, loss, components = hat.new_empty(5, columns), hat.new_empty(()), hat.new_empty(5)
        status = backends._C.barlow_twins_gram_forward(
            DTYPE_CODES[z_a.dtype],
            *_both(z_a, z_b),
            _native(definition),
            grad_a,
            grad_b,
            hat.data_ptr(),
            kept.data_ptr(),
            statistics.data_ptr(),
            loss.data_ptr(),
            components.data_ptr(),
            torch.get_num_threads(),
        )
        _check_status(status, z_a, z_b)
        return loss, components, hat, statistics, kept

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
        """Fills ``grads``, unless None, from the matrices that :meth:`gram_forward` kept."""
        Cpu._backward(True, (grams[-1], grams[0]), hats, statistics, upstream, definition, grads)

    @staticmethod
    def gradient(products, hats, statistics, upstream, definition, gram, exponent, grams, grads):
        Cpu._backward(False, products, hats, statistics, upstream, definition, grads)

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


class NarrowCpu:
    """The Gram form in C++ for bf16 CPU tensors, narrow, from z alone: csrc/cpu/barlow_twins_narrow.cpp."""

    @staticmethod
    def gram_forward(z_a, z_b, definition, grad_a, grad_b):
        """What :meth:`Cpu.gram_forward` returns, without hats."""
        rows, columns = z_a.shape
        kept = z_a.new_empty((grad_a + grad_b, rows, rows), dtype=torch.float32)
        statistics = kept.new_empty(5, columns)
        loss, components = kept.new_empty(()), kept.new_empty(5)
        status = backends._C.barlow_twins_narrow_forward(
            *_both(z_a, z_b),
            _native(definition),
            grad_a,
            grad_b,
            kept.data_ptr(),
            statistics.data_ptr(),
            loss.data_ptr(),
            components.data_ptr(),
            torch.get_num_threads(),
        )
        _check_status(status, z_a, z_b)
        return loss, components, z_a.new_empty(0, rows, columns), statistics, kept

    @staticmethod
    def gram_backward(grams, views, statistics, upstream, definition, grads):
        """Fills ``grads``, unless None, from the matrices that :meth:`gram_forward` kept, and z_a and z_b."""
        z_a, z_b = views
        done = backends._C.barlow_twins_narrow_backward(
            z_a.data_ptr(),
            z_a.stride(0),
            z_b.data_ptr(),
            z_b.stride(0),
            grams[-1].data_ptr(),
            grams[0].data_ptr(),
            statistics.data_ptr(),
            upstream.data_ptr(),
            *z_a.shape,
            _native(definition),
            *map(_address, grads),
            torch.get_num_threads(),
        )
        _check_memory(done, len(z_a))


class Cuda:
    """The passes in CUDA: csrc/cuda/kernels.h."""

    @staticmethod
    def standardise(z_a, z_b, definition, narrow):
        rows, columns = z_a.shape
        compute = compute_dtype(z_a)
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
            *_both(z_a, z_b),
            _native(definition),
            hat.data_ptr(),
            statistics.data_ptr(),
            _address(scratch),
        )
        return hat, statistics

    @staticmethod
    def gram_loss(grams, statistics, definition):
        return Cuda._loss(True, grams, grams.shape[1], statistics, definition)

    @staticmethod
    def correlation_loss(p, rows, statistics, definition):
        return Cuda._loss(False, p, rows, statistics, definition)

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


def passes_for(device: torch.device, narrow: bool, bf16_gram: bool = False):
    """The passes for tensors on ``device``; ``bf16_gram``: for the Gram form of bf16 embeddings."""
    name = backends.choose("barlow_twins", device)
    if name == "cuda":
        return Cuda
    if name == "triton":
        from mmfast.triton import barlow_twins

        return barlow_twins
    if name == "cpu" and narrow:
        return NarrowCpu if bf16_gram else Plain
    return Cpu if name == "cpu" else Plain
