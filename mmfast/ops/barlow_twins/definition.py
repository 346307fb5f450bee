"""What is computed: of which definition, over which processes."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import OP, check_options
from mmfast.ops.collectives import agree, check_group, world


class Definition(NamedTuple):
    """What published losses of this name disagree on.

    Embeddings are divided by sqrt(v + eps), or with ``eps_outside`` by sqrt(v) + eps, for the mean square v of their
    columns (less the column means if ``center``), or with ``unbiased`` the sum of squares over B - 1.
    ``normalise=False``: by nothing. ``divide=False``: C = Â'B̂. Components are of the C that is divided by B all the
    same: the loss is scale B^2 (sum_i (1 / B - c_ii)^2 + lambd sum_{i != j} c_ij^2) in its terms.
    """

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

    def target(self, rows: int) -> float:
        """What c_ii is drawn to."""
        return 1.0 if self.divide else 1 / rows

    @property
    def near(self) -> bool:
        """Whether target - c_ii comes from the distance of both views."""
        return self.normalise and self.divide

    def factor(self, rows: int) -> float:
        """Of the loss of correlations that are divided by B."""
        return self.scale if self.divide else self.scale * rows**2


class Sharing(NamedTuple):
    """How processes that work on one batch share it; :func:`mmfast.functional.barlow_twins` explains the fields."""

    stats: str | None = "global"
    grad_convention: str = "true"
    group: Any = None

    def across(self) -> Any:
        """The process group, or None where this process is alone."""
        check_group("barlow_twins", self.group)
        return None if self.stats is None else world(self.group)

    def refuse(self, error: Exception) -> NoReturn:
        """Raises on every process an error that this one met before it spoke to the others."""
        group = self.across()
        if group is not None:
            agree(OP, group, 0, {}, error)
        raise error

    def check(self) -> None:
        for name, value, choices in (
            ("stats", self.stats, ("global", "local", None)),
            ("grad_convention", self.grad_convention, ("true", "legacy")),
        ):
            if value not in choices:
                known = ", ".join(map(repr, choices))
                raise UserError(f"barlow_twins: {name} must be one of {known}, got {value!r}")


class Request(NamedTuple):
    """What is asked for, whatever the views."""

    definition: Definition = Definition()
    pooled: bool = False
    """Statistics are those of all views together."""
    debias: bool = False
    sharing: Sharing = Sharing(stats=None)


class Setting(NamedTuple):
    """What is computed: of ``pairs`` (a, b, weight) of views, standardised as ``definition`` says."""

    pairs: tuple[tuple[int, int, float], ...]
    definition: Definition
    pooled: bool = False
    """Statistics are those of all views together."""
    debias: bool = False
    shared: bool = True
    """Statistics are those of the rows of all processes, not of this one's."""
    share: float = 1.0
    """The part of the true gradient that is returned."""
    gram: bool = True
    narrow: bool = False
    """Operands of products are of the embeddings' half type."""
