"""The Barlow Twins loss (Zbontar et al., ICML 2021), never at more work than min(B, D) asks.

For embeddings of two views (B, D) with standardised columns Â and B̂ and correlation matrix C = Â'B̂ / B::

    L = sum_i (1 - c_ii)^2 + lambd * sum_{i != j} c_ij^2

The direct form computes C, O(B D^2). The Gram form uses that the squares of C sum to <ÂÂ', B̂B̂'> / B^2, and
that the gradient needs (B̂B̂')Â where the direct form has B̂(B̂'Â): O(B^2 D), and nothing of size D x D exists.
Both are exact (the identity is the duality of Garrido et al., ICLR 2023). The Gram form subtracts the
diagonal from that sum, which is safe where the form is cheaper: C has at most rank B, so for B < D its
diagonal cannot make up nearly all of it.

The passes of both forms exist in C++ (:class:`_Native`) and in PyTorch (:class:`_Plain`): ``standardise``,
then ``gram_energy`` and ``gram_backward`` or ``correlation_energy`` and ``direct_backward``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.native import dtype_code
from mmfast.ops.products import product


def reference(
    z_a: Tensor, z_b: Tensor, lambd: float = 5e-3, center: bool = True, eps: float = 1e-5
) -> Tensor:
    """The definition, by autograd differentiable to any order: what every form and backend must equal."""

    def standardise(z):
        z = z.to(_compute_dtype(z))
        d = z - z.mean(0) if center else z
        return d / (d.square().mean(0) + eps).sqrt()

    c = standardise(z_a).T @ standardise(z_b) / len(z_a)
    off_diagonal = c - torch.diag(c.diagonal())
    return (1 - c.diagonal()).square().sum() + lambd * off_diagonal.square().sum()


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float = 5e-3,
    center: bool = True,
    eps: float = 1e-5,
    gram: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and detached (5,) the loss, its on- and off-diagonal part, the mean of c_ii, the RMS of c_ij.

    ``gram`` forces a form; by default it is the cheaper one.
    """
    check_embeddings(z_a, z_b)
    check_options(lambd, eps)
    if gram is None:
        gram = _gram_is_cheaper(*z_a.shape)
    loss, components, _ = _BarlowTwins.apply(z_a, z_b, lambd, center, eps, gram)
    return loss, components


def _gram_is_cheaper(rows: int, columns: int) -> bool:
    # 8 B^2 D operations against 6 B D^2. With symmetric Gram matrices it is even at B = 0.9 D, but there the
    # subtraction of the diagonal may magnify rounding by 1 / (1 - B / D) = 10, here by 4 at most.
    return 4 * rows < 3 * columns


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def check_options(lambd: float, eps: float) -> None:
    for name, value in (("lambd", lambd), ("eps", eps)):
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


class _Native:
    """The passes in C++, for CPU tensors: csrc/cpu/kernels.h.

    statistics (3, D) are 1 / sqrt(v + eps) of view a and of view b, and 1 - c_ii without cancellation.
    """

    @staticmethod
    def standardise(z_a, z_b, center, eps):
        """Standardised embeddings (2, B, D), statistics, and whether these are finite."""
        rows, columns = z_a.shape
        z_a, z_b = (z if z.stride(1) == 1 else z.contiguous() for z in (z_a, z_b))
        hat = torch.empty(2, rows, columns, dtype=_compute_dtype(z_a))
        statistics = torch.empty(3, columns, dtype=hat.dtype)
        status = backends._C.barlow_twins_standardise(
            dtype_code("barlow_twins", "z_a", z_a),
            z_a.data_ptr(),
            z_a.stride(0),
            z_b.data_ptr(),
            z_b.stride(0),
            rows,
            columns,
            center,
            eps,
            hat.data_ptr(),
            statistics.data_ptr(),
            torch.get_num_threads(),
        )
        _check_memory(status < 2, rows)
        return hat, statistics, status == 0

    @staticmethod
    def gram_energy(hat, statistics, lambd, grad_a, grad_b):
        """Loss, components, and what the backward pass needs: B̂B̂' if ``grad_a``, ÂÂ' if ``grad_b``."""
        _, rows, columns = hat.shape
        kept = hat.new_empty(grad_a + grad_b, rows, rows)
        loss, components = hat.new_empty(()), hat.new_empty(5)
        done = backends._C.barlow_twins_gram_energy(
            hat.dtype == torch.float64,
            hat.data_ptr(),
            statistics.data_ptr(),
            rows,
            columns,
            lambd,
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
    def correlation_energy(p, rows, statistics, lambd):
        """Loss, components, and p = Â'B̂ less its diagonal (in place)."""
        loss, components = p.new_empty(()), p.new_empty(5)
        backends._C.barlow_twins_correlation_energy(
            p.dtype == torch.float64,
            p.data_ptr(),
            statistics.data_ptr(),
            rows,
            len(p),
            lambd,
            loss.data_ptr(),
            components.data_ptr(),
            torch.get_num_threads(),
        )
        return loss, components, p

    @staticmethod
    def gram_backward(kept, hat, statistics, upstream, lambd, grad_a, grad_b):
        """Fills ``grad_a`` and ``grad_b``, unless None, from the Gram matrices."""
        gram_b, gram_a = kept[0], kept[-1]
        _Native._backward(True, gram_b, gram_a, hat, statistics, upstream, lambd, grad_a, grad_b)

    @staticmethod
    def direct_backward(m_a, m_b, hat, statistics, upstream, lambd, grad_a, grad_b):
        """The same from m_a = B̂p' and m_b = Âp, each of which may be its own gradient."""
        _Native._backward(False, m_a, m_b, hat, statistics, upstream, lambd, grad_a, grad_b)

    @staticmethod
    def _backward(gram, matrix_a, matrix_b, hat, statistics, upstream, lambd, grad_a, grad_b):
        _, rows, columns = hat.shape
        done = backends._C.barlow_twins_backward(
            dtype_code("barlow_twins", "z_a", grad_b if grad_a is None else grad_a),
            gram,
            0 if grad_a is None else matrix_a.data_ptr(),
            0 if grad_b is None else matrix_b.data_ptr(),
            hat.data_ptr(),
            statistics.data_ptr(),
            upstream.data_ptr(),
            rows,
            columns,
            lambd,
            0 if grad_a is None else grad_a.data_ptr(),
            0 if grad_b is None else grad_b.data_ptr(),
            torch.get_num_threads(),
        )
        _check_memory(done, rows)


class _Plain:
    """The same passes in PyTorch, for any device."""

    @staticmethod
    def standardise(z_a, z_b, center, eps):
        d = torch.stack((z_a, z_b)).to(_compute_dtype(z_a))
        if center:
            # Relative to the first row, an offset costs no precision.
            d = d - d[:, :1]
            d = d - d.mean(1, keepdim=True)
        w = d.square().mean(1) + eps
        # A column without variance correlates with nothing if eps is 0, too.
        r = torch.where(w > 0, w.rsqrt(), w * 0)
        hat = d * r[:, None]
        shrinkage = torch.where(r == 0, 1, eps * r * r)
        one_minus_c = ((hat[0] - hat[1]).square().mean(0) + shrinkage.sum(0)) / 2
        # Asking a device would wait for it.
        finite = hat.device.type != "cpu" or bool(w.isfinite().all())
        return hat, torch.cat((r, one_minus_c[None])), finite

    @staticmethod
    def gram_energy(hat, statistics, lambd, grad_a, grad_b):
        rows = hat.shape[1]
        # With ``out``, autocast leaves the product alone.
        gram_a, gram_b = torch.bmm(hat, hat.mT, out=hat.new_empty(2, rows, rows))
        energy = (gram_a * gram_b).sum() / rows**2 - (1 - statistics[2]).square().sum()
        kept = hat.new_empty(grad_a + grad_b, rows, rows)
        for place, gram in zip(kept, [gram_b] * grad_a + [gram_a] * grad_b, strict=True):
            place.copy_(gram)
        return *_Plain._finish(energy.clamp(min=0), statistics[2], lambd), kept

    @staticmethod
    def correlation_energy(p, rows, statistics, lambd):
        energy = p.fill_diagonal_(0).square().sum() / rows**2
        return *_Plain._finish(energy, statistics[2], lambd), p

    @staticmethod
    def _finish(off_diagonal, one_minus_c, lambd):
        on_diagonal = one_minus_c.square().sum()
        loss = on_diagonal + lambd * off_diagonal
        pairs = len(one_minus_c) * (len(one_minus_c) - 1)
        rms = (off_diagonal / max(1, pairs)).sqrt()
        return loss, torch.stack((loss, on_diagonal, off_diagonal, 1 - one_minus_c.mean(), rms))

    @staticmethod
    def gram_backward(kept, hat, statistics, upstream, lambd, grad_a, grad_b):
        one_minus_c = statistics[2]
        weight = one_minus_c + lambd * (1 - one_minus_c)
        for i, gram, grad in ((0, kept[0], grad_a), (1, kept[-1], grad_b)):
            if grad is not None:
                m = torch.mm(gram, hat[i], out=torch.empty_like(hat[i]))
                _Plain._standardise_backward(i, m, weight, hat, statistics, upstream, lambd, grad)

    @staticmethod
    def direct_backward(m_a, m_b, hat, statistics, upstream, lambd, grad_a, grad_b):
        for i, m, grad in ((0, m_a, grad_a), (1, m_b, grad_b)):
            if grad is not None:
                _Plain._standardise_backward(i, m, statistics[2], hat, statistics, upstream, lambd, grad)

    @staticmethod
    def _standardise_backward(i, m, weight, hat, statistics, upstream, lambd, grad):
        rows, own, partner = len(m), hat[i], hat[1 - i]
        g = upstream * (2 / rows) * (lambd / rows * m - weight * partner)
        grad.copy_(statistics[i] * (g - own * (own * g).mean(0)))


def _passes(device: torch.device):
    return _Native if backends.choose("barlow_twins", device) == "cpu" else _Plain


def _forward(z_a, z_b, lambd, center, eps, gram, grad_a, grad_b):
    check_embeddings(z_a, z_b)
    check_options(lambd, eps)
    passes = _passes(z_a.device)
    hat, statistics, finite = passes.standardise(z_a, z_b, center, eps)
    if not finite:
        _refuse(z_a=z_a, z_b=z_b)
    if gram:
        energy = passes.gram_energy(hat, statistics, lambd, grad_a, grad_b)
    else:
        p = product(hat[0].t(), hat[1].t())
        energy = passes.correlation_energy(p, len(z_a), statistics, lambd)
    loss, components, matrices = energy
    return loss, components, hat, statistics, matrices


def _forward_fake(z_a, z_b, lambd, center, eps, gram, grad_a, grad_b):
    check_embeddings(z_a, z_b)
    check_options(lambd, eps)
    rows, columns = z_a.shape
    matrices = (grad_a + grad_b, rows, rows) if gram else (columns, columns)
    shapes = ((), (5,), (2, rows, columns), (3, columns), matrices)
    return tuple(z_a.new_empty(shape, dtype=_compute_dtype(z_a)) for shape in shapes)


def _backward(upstream, views, statistics, matrices, lambd, center, eps, gram, grad_a, grad_b):
    passes = _passes(statistics.device)
    dtype = views[0].dtype
    hat = views[0] if len(views) == 1 else passes.standardise(*views, center, eps)[0]
    if gram:
        grads = [torch.empty_like(hat[0], dtype=dtype) if wanted else None for wanted in (grad_a, grad_b)]
        passes.gram_backward(matrices, hat, statistics, upstream, lambd, *grads)
    else:
        m_a = product(hat[1], matrices) if grad_a else None
        m_b = product(hat[0], matrices.t()) if grad_b else None
        in_place = dtype == hat.dtype
        grads = [m if m is None or in_place else torch.empty_like(m, dtype=dtype) for m in (m_a, m_b)]
        passes.direct_backward(m_a, m_b, hat, statistics, upstream, lambd, *grads)
    return tuple(hat.new_empty(0, dtype=dtype) if grad is None else grad for grad in grads)


def _backward_fake(upstream, views, statistics, matrices, lambd, center, eps, gram, grad_a, grad_b):
    z = views[0]
    return tuple(z.new_empty(z.shape[-2:] if wanted else 0) for wanted in (grad_a, grad_b))


_library = torch.library.Library("mmfast", "FRAGMENT")
# hat (2, B, D): standardised embeddings; views: hat, or z_a and z_b to standardise; statistics (3, D): see
# _Native; matrices: in Gram form (n, B, B), B̂B̂' if grad_a and ÂÂ' if grad_b, else Â'B̂ less its diagonal.
_options = "float lambd, bool center, float eps, bool gram, bool grad_a, bool grad_b"
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


def _gradient(options, upstream, statistics, matrices, *views):
    return torch.ops.mmfast.barlow_twins_backward(upstream, views, statistics, matrices, *options)


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
    def forward(ctx, z_a, z_b, lambd, center, eps, gram):
        grad_a, grad_b = ctx.needs_input_grad[:2]
        loss, components, hat, statistics, matrices = torch.ops.mmfast.barlow_twins_forward(
            z_a, z_b, lambd, center, eps, gram, grad_a, grad_b
        )
        ctx.options = lambd, center, eps, gram, grad_a, grad_b
        # Half embeddings are smaller than their standardised forms: keep those, and standardise again.
        views = (hat,) if hat.dtype == z_a.dtype else (z_a, z_b)
        ctx.save_for_backward(statistics, matrices, *views)
        ctx.mark_non_differentiable(components)
        ctx.set_materialize_grads(False)
        return loss, components, hat

    @staticmethod
    def backward(ctx, upstream, _components, _hat):
        if upstream is None:
            return (None,) * 6
        gradient = _FinalGradient.apply if torch.is_grad_enabled() else _gradient
        grad_a, grad_b = gradient(ctx.options, upstream, *ctx.saved_tensors)
        *_, needs_a, needs_b = ctx.options
        return grad_a if needs_a else None, grad_b if needs_b else None, None, None, None, None
