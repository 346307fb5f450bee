"""Barlow Twins of two views: the function, the module, and the definitions that were published under the name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from mmfast import backends
from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import OP, check_views, unusable
from mmfast.ops.barlow_twins.definition import Definition, Request, Sharing
from mmfast.ops.barlow_twins.multi_view import barlow_twins_of_pairs
from mmfast.ops.barlow_twins.op import barlow_twins as _two_views

T = TypeVar("T")


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


def _check_weight(op: str, name: str, value: Any) -> float:
    return check_number(op, name, value, 0)


class Options(NamedTuple):
    """What can be chosen about a Barlow Twins loss; :func:`barlow_twins` explains it. None: as the variant has it."""

    lambd: float | None = None
    center: bool = True
    eps: float | None = None
    variant: str = "official"
    scale: float | None = None
    debias: bool = False
    stats: str | None = "global"
    grad_convention: str = "true"
    group: Any = None

    @classmethod
    def of(cls, call: str, given: Mapping[str, Any]) -> Options:
        """Those of a ``call`` that takes them by keyword."""
        for name in given:
            if name not in cls._fields:
                raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
        return cls(**given)

    @property
    def sharing(self) -> Sharing:
        return Sharing(self.stats, self.grad_convention, self.group)

    def resolved(self) -> dict[str, float | bool]:
        """Fields of the definition, and whether statistics are ``pooled``, the variant's where they are not given."""
        chosen = BARLOW_TWINS_VARIANTS.get(self.variant) if isinstance(self.variant, str) else None
        if chosen is None:
            names = ", ".join(BARLOW_TWINS_VARIANTS)
            raise UserError(f"barlow_twins: variant must be one of {names}, got {self.variant!r}")
        resolved = {**BARLOW_TWINS_VARIANTS["official"], **chosen}
        for name, check in _CHECKS.items():
            if (value := getattr(self, name)) is not None:
                resolved[name] = check(OP, name, value)
        return resolved

    def request(self) -> Request:
        """The same for the ops, all looked at; what is wrong is raised on every process."""
        sharing = self.sharing
        try:
            resolved, debias = self.resolved(), check_bool(OP, "debias", self.debias)
        except (TypeError, ValueError) as error:
            sharing.refuse(error)
        pooled = resolved.pop("pooled", False)
        return Request(Definition(**resolved), pooled, debias, sharing)


_TYPES = get_type_hints(Options)
_CHECKS = {"lambd": _check_weight, "center": check_bool, "eps": _check_weight, "scale": _check_weight}


def takes_options(function: Callable[..., T]) -> Callable[..., T]:
    """Shows each of the :class:`Options` in the signature instead of ``**options``."""
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_TYPES[name])
        for name, default in Options()._asdict().items()
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])
    return function


def evaluate_barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    request: Request,
    gram: bool | None = None,
    op: str = OP,
    names: tuple[str, str] = ("z_a", "z_b"),
) -> tuple[Tensor, Tensor]:
    """The loss, and its components (5,), by the op for what is asked.

    ``op`` and ``names``: who asks, and what the views are called there, in errors.
    """
    definition, pooled, debias, sharing = request
    views = dict(zip(names, (z_a, z_b), strict=True))
    if not (pooled or debias) and sharing.across() is None:
        sharing.check()
        if op == OP:
            return _two_views(z_a, z_b, *definition, gram=gram)
        check_views(views, corresponding=True, op=op)
        # A backend that cannot serve says so here: below, what is refused is a value.
        backends.choose("barlow_twins", z_a.device)
        try:
            return _two_views(z_a, z_b, *definition, gram=gram)
        except UserError:
            raise unusable(views, op) from None
    loss, components = barlow_twins_of_pairs(views, request=request, corresponding=True, gram=gram, op=op)
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
    options = Options(lambd, center, eps, variant, scale, debias, stats, grad_convention, group)
    return evaluate_barlow_twins(z_a, z_b, options.request())[0]


@takes_options
@torch.no_grad()
def barlow_twins_components(
    z_a: Tensor, z_b: Tensor, lambd: float | None = None, **options: Any
) -> BarlowTwinsComponents:
    """The parts of :func:`barlow_twins`, for the same arguments and at the cost of its forward pass."""
    request = Options.of("barlow_twins_components", {"lambd": lambd, **options}).request()
    _, components = evaluate_barlow_twins(z_a, z_b, request)
    return BarlowTwinsComponents(*components.unbind())


class WithOptions(nn.Module):
    """A loss whose :class:`Options` are its attributes; they may be set at any time."""

    def _take(self, options: Options) -> None:
        resolved = options.resolved()
        numbers = {name: resolved[name] for name in _CHECKS}
        options = options._replace(**numbers, debias=check_bool(OP, "debias", options.debias))
        options.sharing.check()
        for name, value in options._asdict().items():
            setattr(self, name, value)

    def _request(self) -> Request:
        return Options(*[getattr(self, name) for name in Options._fields]).request()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in Options._fields if name != "group")


class TwoViewLoss(nn.Module):
    """A loss of two views that keeps the components of its latest call."""

    _last: Tensor | None = None

    @property
    def last(self) -> BarlowTwinsComponents | None:
        """Components of the latest call (None before the first), already computed, without its graph."""
        return None if self._last is None else BarlowTwinsComponents(*self._last.unbind())

    def _kept(self, loss: Tensor, components: Tensor) -> Tensor:
        self._last = components
        return loss


class BarlowTwinsLoss(WithOptions, TwoViewLoss):
    """Barlow Twins loss of two views' embeddings (B, D), defined in :func:`mmfast.functional.barlow_twins`.

    >>> loss = BarlowTwinsLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss.last.mean_diagonal

    ``variant`` names the published definition, from which lambd, eps and scale come where they are not given; it is
    described there, with a warning about "thesis" and "vissl". In an initialised process group of several processes
    the loss is that of all their rows: every process must call it (``stats=None``: each has its own).
    """

    def __init__(
        self,
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
    ):
        super().__init__()
        self._take(Options(lambd, center, eps, variant, scale, debias, stats, grad_convention, group))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return self._kept(*evaluate_barlow_twins(z_a, z_b, self._request()))

    @torch.no_grad()
    def components(self, z_a: Tensor, z_b: Tensor) -> BarlowTwinsComponents:
        """Components for other embeddings, with this loss's options; ``last`` stays as it is."""
        _, components = evaluate_barlow_twins(z_a, z_b, self._request())
        return BarlowTwinsComponents(*components.unbind())
