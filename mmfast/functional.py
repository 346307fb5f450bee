"""Losses as functions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import check_bool, check_number, told
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import (
    OP,
    check_dense,
    check_views,
    compute_dtype,
    stacked_present,
    unusable,
)
from mmfast.ops.barlow_twins.kernels import Definition
from mmfast.ops.barlow_twins.multi_view import Sharing, barlow_twins_many
from mmfast.ops.barlow_twins.op import barlow_twins as _two_views
from mmfast.ops.barlow_twins.op import gram_is_cheaper
from mmfast.ops.native import dtype_code
from mmfast.ops.products import product


class BarlowTwinsComponents(NamedTuple):
    """What a Barlow Twins loss is made of: detached scalars of the loss's dtype and device.

    ``loss`` is ``on_diagonal + lambd * off_diagonal`` times the variant's scale (B^2 for "thesis", whose c_ij are
    divided by B here, too).
    """

    loss: Tensor
    on_diagonal: Tensor
    """sum of (1 - c_ii)^2; of (1 / B - c_ii)^2 for variant "thesis"."""
    off_diagonal: Tensor
    """sum of c_ij^2 over i != j, not weighted"""
    mean_diagonal: Tensor
    """mean of c_ii: 1 where the views agree"""
    off_diagonal_rms: Tensor
    """root of the mean of c_ij^2 over i != j: 0 where features are decorrelated; 0 for D = 1"""


# What the published losses of this name are, where they differ from the first: one process, C divided by the
# number of rows, and no running statistics. All are written out in docs/migration.md.
BARLOW_TWINS_VARIANTS: dict[str, dict[str, float | bool]] = {
    # Zbontar et al., ICML 2021: BatchNorm1d(affine=False). Their code's lambd is 0.0051.
    "official": {"lambd": 5e-3, "eps": 1e-5, "scale": 1.0},
    # lightly, BarlowTwinsLoss: functional batch norm in training mode.
    "lightly": {},
    # solo-learn, barlow_loss_func: a fresh BatchNorm1d, and scale_loss.
    "solo": {"scale": 0.025},
    # VISSL, BarlowTwinsCriterion and its configurations: one normaliser for the rows of both views.
    "vissl": {"pooled": True, "lambd": 0.0051, "scale": 0.024},
    # MONAI, BarlowTwinsLoss: torch.std, plus 1e-6.
    "monai": {"unbiased": True, "eps_outside": True, "eps": 1e-6},
    # catalyst, BarlowTwinsLoss: torch.var, plus 1e-12 under the root; off-diagonal terms with full weight.
    "catalyst": {"unbiased": True, "eps": 1e-12, "lambd": 1.0},
    # stable-pretraining, BarlowTwinsLoss: torch.std, plus 1e-5.
    "stable-pretraining": {"unbiased": True, "eps_outside": True},
    # The recipe of Lightning's tutorials: torch.std and no eps.
    "lightning": {"unbiased": True, "eps": 0.0},
    # The thesis' code: BatchNorm1d(affine=False), and C = Â'B̂ as it is.
    "thesis": {"divide": False},
}


_NOBODY = Sharing(stats=None)


def _check_weight(op: str, name: str, value: float) -> float:
    return check_number(op, name, value, 0)


_OPTIONS = {"lambd": _check_weight, "eps": _check_weight, "scale": _check_weight, "center": check_bool}


def barlow_twins_options(variant: str, **given: float | bool | None) -> dict[str, float | bool]:
    """Arguments of the op: those of the variant, where they are not given."""
    chosen = BARLOW_TWINS_VARIANTS.get(variant) if isinstance(variant, str) else None
    if chosen is None:
        names = ", ".join(BARLOW_TWINS_VARIANTS)
        raise UserError(f"barlow_twins: variant must be one of {names}, got {variant!r}")
    checked = {name: _OPTIONS[name](OP, name, value) for name, value in given.items() if value is not None}
    return {**BARLOW_TWINS_VARIANTS["official"], **chosen, **checked}


def resolved(sharing: Sharing, variant: str, debias: bool, **given: float | bool | None):
    """Arguments of the op, and ``debias``, all looked at; what is wrong is raised on every process."""
    try:
        return barlow_twins_options(variant, **given), check_bool(OP, "debias", debias)
    except (TypeError, ValueError) as error:
        sharing.refuse(error)


def evaluate_barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    options: Mapping[str, float | bool],
    debias: bool = False,
    sharing: Sharing = _NOBODY,
    gram: bool | None = None,
    op: str = OP,
    names: tuple[str, str] = ("z_a", "z_b"),
) -> tuple[Tensor, Tensor]:
    """The loss, and its components (5,), by the op for what is asked.

    ``op`` and ``names``: who asks, and what the views are called there, in errors.
    """
    pooled = options.get("pooled", False)
    views = dict(zip(names, (z_a, z_b), strict=True))
    if not (pooled or debias) and sharing.across() is None:
        sharing.check()
        if op == OP:
            return _two_views(z_a, z_b, **options, gram=gram)
        check_views(views, corresponding=True, op=op)
        try:
            return _two_views(z_a, z_b, **options, gram=gram)
        except UserError:
            raise unusable(views, op) from None
    definition = Definition(**{name: value for name, value in options.items() if name != "pooled"})
    loss, components = barlow_twins_many(
        views,
        definition=definition,
        pooled=pooled,
        debias=debias,
        sharing=sharing,
        corresponding=True,
        gram=gram,
        op=op,
    )
    return loss, components[0]


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float | None = None,
    *,
    center: bool = True,
    eps: float | None = None,
    variant: str = "official",
    scale: float | None = None,
    debias: bool = False,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Barlow Twins loss of the embeddings of two views (Zbontar et al., ICML 2021).

    .. math::
        L = \sum_i (1 - c_{ii})^2 + \lambda \sum_{i \neq j} c_{ij}^2, \qquad
        c_{ij} = \frac{1}{B} \sum_b \hat a_{bi} \hat b_{bj}, \qquad
        \hat a_{bi} = \frac{a_{bi} - \bar a_i}{\sqrt{\mathrm{var}(a_i) + \epsilon}}

    with mean and biased variance over the batch, each view on its own (an affine-free batch norm). Exact in
    O(B D min(B, D)) time; for 4 B < 3 D nothing of size D x D is stored. Runs are bit-for-bit repeatable.

    Other libraries compute other functions under this name. ``variant`` picks theirs:

    ====================  ==========================  ======  =====  ===================================
    variant               divisor of a column         lambd   scale  and
    ====================  ==========================  ======  =====  ===================================
    official, lightly     sqrt(var + 1e-5)            0.005   1
    solo                  sqrt(var + 1e-5)            0.005   0.025
    vissl                 sqrt(var + 1e-5)            0.0051  0.024  mean and var over both views pooled
    monai                 std + 1e-6, unbiased        0.005   1
    catalyst              sqrt(var + 1e-12), unbiased 1       1
    stable-pretraining    std + 1e-5, unbiased        0.005   1
    lightning             std, unbiased               0.005   1
    thesis                sqrt(var + 1e-5)            0.005   1      C is not divided by B
    ====================  ==========================  ======  =====  ===================================

    Warning:
        ``thesis`` is there to reproduce a published experiment, not for new ones. Without the division its loss is
        B^2 (sum (1/B - c_ii)^2 + lambd sum c_ij^2): correlations of corresponding features are drawn to 1/B, that
        is nearly to zero, and the size of the loss depends on the batch size. ``vissl`` is wrong for views whose
        scales or means differ, as those of two modalities do: statistics of both together standardise neither.

    Args:
        z_a, z_b: (B, D), B >= 2, on one device and of one dtype: float32, float64, bfloat16 or float16. Half
            types are computed in float32, whatever autocast says; on GPUs the operands of the matrix products are
            rounded to the half type, as tensor cores multiply those, and their results are float32. On CPUs with
            AVX512-BF16 bfloat16 operands are split into two where one would cost more than the rounding of the
            gradient itself.
        lambd: weight of the off-diagonal term, finite and >= 0; the variant's if None. A number, as eps and scale
            are: no tensor or parameter, which would never get a gradient.
        center: False leaves the mean in: c_ij = a_i . b_j / (|a_i| |b_j|) where eps is added to |a_i|^2 / B.
        eps: added to the variance or deviation, finite and >= 0; the variant's if None. A column without variance
            correlates with nothing: c = 0.
        variant: the name of a published definition.
        scale: factor of the whole loss, finite and >= 0; the variant's if None.
        debias: estimate the off-diagonal sum without its bias, as a U-statistic (B >= 4; Song et al., JMLR 13
            (2012), eq. 5, with the means taken out; pairs of different rows, B >= 2, for center=False). Each c_ij^2
            of B independent rows is 1 / (B - 1) on average, also where features are independent: at B = 8 and D =
            64 all of the off-diagonal sum may be this noise. The estimate is zero on average for independent views,
            and may be negative.
        stats: with several processes (an initialised ``torch.distributed``), whose rows the means and variances are
            of: "global", those of all processes, so that the loss is that of one process with all rows; or "local",
            those of each process, as batch norm that is not synchronised. C is the mean over all rows either way,
            and every process returns the same loss. None: processes have nothing to do with each other. Numbers of
            rows may differ; 0 and 1 are allowed for "global". Every process must call the loss, and its backward
            pass.
        grad_convention: "true": gradients that DistributedDataParallel, which averages over processes, turns into
            the gradient of the loss. "legacy": these divided by the number of processes, as the official code,
            solo-learn and VISSL have them.
        group: the process group; None for the default one.

    Returns:
        A scalar, float64 for float64 embeddings, else float32. Gradients have the dtype of the embeddings and
        are not differentiable again. ``torch.func`` transforms, forward mode and batched gradients are for two views
        of one process without ``debias`` and "vissl".

    Raises:
        ValueError: shapes or devices that do not match, B < 2, D < 1, an unknown variant, lambd, eps or scale out
            of range. On the CPU also NaN or infinite embeddings, with the view, their number and the first
            position; on GPUs, which nobody waits for, these make the loss NaN, and compiled they do in
            what is composed of PyTorch's operations (more than two views, ``debias``, "vissl").
        TypeError: unequal or unsupported dtypes, tensors that are sparse or nested, options of another type.
        Of several processes all raise the error of the lowest rank that has one, with that rank; also where
        arguments differ that must not: D, dtype, options, whether a gradient is required.
    """
    sharing = Sharing(stats, grad_convention, group)
    options, debias = resolved(sharing, variant, debias, lambd=lambd, center=center, eps=eps, scale=scale)
    return evaluate_barlow_twins(z_a, z_b, options, debias, sharing)[0]


@torch.no_grad()
def barlow_twins_components(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float | None = None,
    *,
    center: bool = True,
    eps: float | None = None,
    variant: str = "official",
    scale: float | None = None,
    debias: bool = False,
    stats: str | None = "global",
    group: Any = None,
) -> BarlowTwinsComponents:
    """The parts of :func:`barlow_twins`, for the same arguments and at the cost of its forward pass."""
    sharing = Sharing(stats, "true", group)
    options, debias = resolved(sharing, variant, debias, lambd=lambd, center=center, eps=eps, scale=scale)
    _, components = evaluate_barlow_twins(z_a, z_b, options, debias, sharing)
    return BarlowTwinsComponents(*components.unbind())


Views = Mapping[str, Tensor] | Sequence[Tensor]
Pair = tuple[str, str] | tuple[int, int]


def multi_view_barlow_twins(
    views: Views,
    present: Tensor | Mapping[str, Tensor] | None = None,
    *,
    weights: Mapping[Pair, float] | None = None,
    lambd: float | None = None,
    center: bool = True,
    eps: float | None = None,
    variant: str = "official",
    scale: float | None = None,
    debias: bool = False,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Sum over pairs of any number of views or modalities of the weighted :func:`barlow_twins` losses.

    .. math:: L = \sum_{(m, n)} w_{mn} L(z_m, z_n)

    Each view is standardised once and, where B is small against D, has one B x B Gram matrix for all its pairs:
    O(M B^2 D + M^2 B^2) for M views against O(M^2 B D^2) (the duality of Garrido et al., ICLR 2023).
    On CPUs pairs go one by one where that is faster: complete samples, and few views or small batches.

    Args:
        views: M >= 2 matrices (B, D_m), by name (any mapping) or in order, of one dtype and device. Where D_m differs
            from D_n no feature corresponds to another: the pair's loss is ``lambd`` times the sum of all squares of
            C, which only keeps the views from repeating each other.
        present: None if all samples have all views; or bool (B, M), or (B,) by name: whether a sample has a view.
            What it does not have is not looked at (it may be NaN) and gets a zero gradient. Means and variances of
            a view are those of the samples that have it, C_mn is the mean over the samples that have both; pairs
            that fewer than two samples have count nothing.
        weights: by pairs of names or positions, finite and >= 0; pairs that are not there are left out. None: 1 for
            all.
        others: see :func:`barlow_twins`; ``debias`` is for samples that have all views, and ``variant="vissl"``,
            which pools the statistics of two views, is not offered.

    Returns and raises what :func:`barlow_twins` does.
    """
    sharing = Sharing(stats, grad_convention, group)
    options, debias = resolved(sharing, variant, debias, lambd=lambd, center=center, eps=eps, scale=scale)
    return evaluate_multi_view(views, present, weights, options, debias, sharing)[0]


def evaluate_multi_view(
    views, present, weights, options, debias, sharing
) -> tuple[Tensor, dict[Pair, Tensor]]:
    """The loss, and its components (5,) by pair."""
    try:
        views, named, pairs, present = _prepared(views, present, weights, options, debias)
    except (TypeError, ValueError) as error:
        sharing.refuse(error)
    if present is None and not debias and sharing.across() is None and _pair_by_pair(views, len(pairs)):
        sharing.check()
        check_views(named, 2)
        # A backend that cannot serve says so here: below, what is refused is a value.
        backends.choose("barlow_twins", next(iter(views.values())).device)
        try:
            terms = {(m, n): _two_views(views[m], views[n], **options) for m, n in pairs}
        except UserError:
            raise unusable(named) from None
        loss = sum(weight * terms[pair][0] for pair, weight in pairs.items())
        return loss, {pair: components for pair, (_, components) in terms.items()}
    names = list(views)
    positions = [(names.index(m), names.index(n), weight) for (m, n), weight in pairs.items()]
    loss, components = barlow_twins_many(
        named, positions, present, Definition(**options), debias=debias, sharing=sharing
    )
    return loss, dict(zip(pairs, components.unbind(), strict=True))


def _prepared(views, present, weights, options, debias):
    """Views by name, the same by their names in errors, weights by pair, and present as one tensor or None."""
    if not isinstance(views, Mapping):
        if not isinstance(views, Iterable) or isinstance(views, (str, bytes)):
            rule = "must be a mapping or a sequence of tensors"
            raise TypeError(f"multi_view_barlow_twins: views {rule}, got {told(views)}")
        views = enumerate(views)
    views = dict(views)
    names = list(views)
    if len(names) < 2:
        raise UserError(f"multi_view_barlow_twins: there must be at least 2 views, got {len(names)}")
    if options.get("pooled"):
        raise UserError(
            'multi_view_barlow_twins: variant must not be "vissl", whose statistics are those of two views'
        )
    if debias and present is not None:
        raise UserError("multi_view_barlow_twins: debias must be False where present is given, got True")
    named = {f"views[{name!r}]": z for name, z in views.items()}
    if isinstance(present, Mapping):
        present = _present(present, names, named)
    return views, named, _pairs(names, weights), present


# Up to so many rows in Gram form, or columns in direct form, times the pairs that a view is in, kernels of two
# views are faster than what computes once what pairs share (measured on 2 CPU cores: docs/losses.md).
_PAIR_BY_PAIR = {"gram": 512, "direct": 2048}


def _pair_by_pair(views: Mapping[Any, Tensor], pairs: int) -> bool:
    tensors = list(views.values())
    z = tensors[0]
    alike = all(isinstance(x, Tensor) and x.is_cpu and x.dim() == 2 and x.shape == z.shape for x in tensors)
    if not alike:
        return False
    shared = 2 * pairs / len(tensors)
    form = "gram" if gram_is_cheaper(*z.shape) else "direct"
    return shared <= 1 or shared * min(z.shape) <= _PAIR_BY_PAIR[form]


def checked_weights(weights: Mapping[Pair, float]) -> dict[Pair, float]:
    """Weights that are finite and at least 0, of whatever pairs."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"multi_view_barlow_twins: weights must be a mapping pair -> number, got {told(weights)}"
        )
    return {
        pair: check_number("multi_view_barlow_twins", f"weights[{pair!r}]", weight, 0)
        for pair, weight in weights.items()
    }


def _pairs(names: list, weights: Mapping[Pair, float] | None) -> dict[Pair, float]:
    if weights is None:
        return dict.fromkeys(itertools.combinations(names, 2), 1.0)
    pairs = {}
    for pair, weight in checked_weights(weights).items():
        known = isinstance(pair, tuple) and len(pair) == 2 and pair[0] != pair[1] and set(pair) <= set(names)
        if not known or pair[::-1] in pairs:
            rule = "must name each pair of different views once"
            raise UserError(
                f"multi_view_barlow_twins: weights {rule} ({', '.join(map(repr, names))}), got {pair!r}"
            )
        pairs[pair] = weight
    if not pairs:
        raise UserError("multi_view_barlow_twins: weights must name at least one pair, got none")
    return pairs


def _present(present: Mapping[str, Tensor], names: list, views: Mapping[str, Tensor]) -> Tensor:
    if set(present) != set(names):
        raise UserError(
            f"multi_view_barlow_twins: present must name the views ({', '.join(map(repr, names))}), "
            f"got {', '.join(map(repr, present))}"
        )
    return stacked_present({name: present[name] for name in names}, views)


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    r"""How many dimensions embeddings fill: the participation ratio of their centred covariance's eigenvalues.

    .. math::
        r = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2} = \frac{(\mathrm{tr}\, S)^2}{\|S\|_F^2}, \qquad
        S = \frac{1}{B} \sum_b (z_b - \bar z)(z_b - \bar z)'

    It is n where n directions share the variance evenly, and falls towards 1 as embeddings collapse into a line.
    Unlike the loss it depends on the scales of the features.

    With :math:`p_i = \lambda_i / \sum_j \lambda_j` it is :math:`\exp(H_2(p))` for the Rényi entropy of order 2,
    and so never above :math:`\exp(H_1(p))`, Shannon's. The effective rank of Roy & Vetterli (EUSIPCO 2007), which
    RankMe (Garrido et al., ICML 2023) computes of embeddings that are not centred, is the latter with the singular
    values :math:`\sqrt{\lambda_i}` in place of :math:`\lambda_i`, which is never smaller. They need a decomposition;
    order 2 needs traces only, one matrix product of O(B D min(B, D)), and can be paid at every step.

    Args:
        z: (B, D), B >= 2, float32, float64, bfloat16 or float16. Computed in float32 or better, relative to the
            first row: an offset common to all rows costs no precision.

    Returns:
        A detached scalar from 1 to min(B - 1, D), float64 for float64 embeddings, else float32; 0 where all rows
        are the same, NaN where values are not finite. Nothing waits for the device.

    Raises:
        ValueError: a shape other than (B, D), B < 2 or D < 1.
        TypeError: no tensor, or an unsupported dtype.
    """
    check_dense("effective_rank", "z", z)
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise UserError(f"effective_rank: z must have shape (B, D), B >= 2 and D >= 1, got {tuple(z.shape)}")
    dtype_code("effective_rank", "z", z)
    z = z.to(compute_dtype(z))
    z = z - z[0]
    z = z - z.mean(0)
    if z.shape[0] > z.shape[1]:
        z = z.t()
    s = product(z, z)
    trace = s.diagonal().sum()
    # Divided by the trace, squares stay within the range of floating-point numbers whatever the scale of z.
    energy = (s / trace).square().sum()
    return torch.where(trace == 0, 0, 1 / energy)
