"""VICReg of two views: variance, invariance and covariance of their embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from mmfast.checks import check_number
from mmfast.losses.similarity import choice
from mmfast.ops.barlow_twins.vicreg import VICRegDefinition
from mmfast.ops.barlow_twins.vicreg import vicreg as _vicreg
from mmfast.ops.similarity.shared import Sharing

# What the hinges of both views are multiplied by.
VICREG_VARIANTS = {
    # Bardes et al., ICLR 2022, their code; lightly; pytorch-metric-learning.
    "official": 0.5,
    # solo-learn, vicreg_loss_func.
    "solo": 1.0,
}


class VICRegComponents(NamedTuple):
    """What a VICReg loss is made of: detached scalars, its terms without their weights."""

    loss: Tensor
    invariance: Tensor
    """mean of (a - b)^2"""
    variance: Tensor
    """mean of both views' hinges; for variant "solo" their sum"""
    covariance: Tensor
    """sum of the squares of both views' covariances, over D"""


class Options(NamedTuple):
    """What can be chosen about VICReg; :func:`vicreg` explains it."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    eps: float = 1e-4
    variant: str = "official"
    stats: str | None = "global"
    grad_convention: str = "true"
    group: Any = None

    def definition(self, op: str = "vicreg") -> VICRegDefinition:
        names = "invariance", "variance", "covariance", "eps"
        numbers = [check_number(op, name, getattr(self, name), 0) for name in names]
        return VICRegDefinition(*numbers, hinge=choice(op, "variant", self.variant, VICREG_VARIANTS))

    def sharing(self, op: str = "vicreg") -> Sharing:
        return Sharing(op, self.stats, self.grad_convention, self.group)


def evaluate_vicreg(
    z_a: Tensor,
    z_b: Tensor,
    options: Options,
    op: str = "vicreg",
    names: tuple[str, str] = ("z_a", "z_b"),
) -> tuple[Tensor, Tensor]:
    """The loss, and detached (4,) its :class:`VICRegComponents`.

    ``op`` and ``names``: who asks, and what the views are called there, in errors.
    """
    definition, sharing = options.definition(op), options.sharing(op)
    share = 1.0 if sharing.convention == "true" else None
    return _vicreg(dict(zip(names, (z_a, z_b), strict=True)), definition, sharing.group, share, op=op)


def vicreg(
    z_a: Tensor,
    z_b: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
    variant: str = "official",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""VICReg of the embeddings of two views (Bardes, Ponce and LeCun, ICLR 2022, eq. 1-6 and their code).

    .. math::
        L = \frac{\lambda}{B D} \sum_{bi} (a_{bi} - b_{bi})^2
        + \frac{\mu}{2 D} \sum_{z \in \{a, b\}} \sum_i \max(0, 1 - \sqrt{\mathrm{var}(z_i) + \epsilon})
        + \frac{\nu}{D} \sum_{z \in \{a, b\}} \sum_{i \neq j} \mathrm{cov}(z_i, z_j)^2

    with variances and covariances over the batch, divided by B - 1. Exact in O(B D min(B, D)) time; for 4 B < 3 D
    nothing of size D x D is stored.

    Args:
        z_a, z_b: (B, D), B >= 2, on one device and of one dtype: float32, float64, bfloat16 or float16. Half types
            are computed in float32, whatever autocast says.
        invariance, variance, covariance: the weights lambda, mu and nu, finite and >= 0.
        eps: added to the variances, finite and >= 0. With 0 a constant column gets no gradient from its variance.
        variant: "official", which is also lightly's and pytorch-metric-learning's; or "solo", solo-learn's, whose
            variance term is twice as large: the sum of both views' hinges, not their mean.
        stats: with several processes (an initialised ``torch.distributed``) "global": the loss of the rows of all of
            them, which every process returns; numbers of rows may differ, and be 0. Every process must call the loss,
            and its backward pass. None: processes have nothing to do with each other.
        grad_convention: "true": gradients that DistributedDataParallel, which averages over processes, turns into
            the gradient of the loss. "legacy": these divided by the number of processes.
        group: the process group; None for the default one.

    Returns:
        A scalar, float64 for float64 embeddings, else float32. Gradients have the dtype of the embeddings and are
        not differentiable again.

    Raises:
        ValueError: shapes or devices that do not match, B < 2, D < 1, an unknown variant, numbers out of range. On
            the CPU also NaN or infinite embeddings, with the view, their number and the first position; on GPUs,
            which nobody waits for, and compiled, these make the loss NaN.
        TypeError: unequal or unsupported dtypes, tensors that are sparse or nested, options of another type.
        Of several processes all raise the error about embeddings of the lowest rank that has one; also where D,
        dtype, options or whether a gradient is required differ.
    """
    options = Options(invariance, variance, covariance, eps, variant, stats, grad_convention, group)
    return evaluate_vicreg(z_a, z_b, options)[0]


class KeepsVICReg(nn.Module):
    """A loss that keeps the components of its latest call."""

    _last: Tensor | None = None

    @property
    def last(self) -> VICRegComponents | None:
        """Components of the latest call (None before the first), already computed, without its graph."""
        return None if self._last is None else VICRegComponents(*self._last.unbind())

    def _kept(self, found: tuple[Tensor, Tensor]) -> Tensor:
        self._last = found[1]
        return found[0]


class VICRegLoss(KeepsVICReg):
    """VICReg of two views' embeddings (B, D), defined in :func:`mmfast.functional.vicreg`.

    >>> loss = VICRegLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss.last.variance

    Options are attributes, which may be set at any time. In an initialised process group of several processes the
    loss is that of all their rows: every process must call it (``stats=None``: each has its own).
    """

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        *,
        eps: float = 1e-4,
        variant: str = "official",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        options = Options(invariance, variance, covariance, eps, variant, stats, grad_convention, group)
        options.definition()
        options.sharing()
        for name, value in options._asdict().items():
            setattr(self, name, value)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss; see :func:`mmfast.functional.vicreg`."""
        return self._kept(evaluate_vicreg(z_a, z_b, self._options()))

    def _options(self) -> Options:
        return Options(*(getattr(self, name) for name in Options._fields))

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in self._options()._asdict().items() if n != "group")
