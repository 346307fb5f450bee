"""Losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.functional import BarlowTwinsComponents, barlow_twins_components
from mmfast.ops import barlow_twins as _barlow_twins


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins loss of two views' embeddings (B, D), defined in :func:`mmfast.functional.barlow_twins`.

    >>> loss = BarlowTwinsLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss.last.mean_diagonal
    """

    def __init__(self, lambd: float = 5e-3, center: bool = True, eps: float = 1e-5):
        super().__init__()
        _barlow_twins.check_options(lambd, eps)
        self.lambd, self.center, self.eps = lambd, center, eps
        self._last: Tensor | None = None

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        loss, self._last = _barlow_twins.barlow_twins(z_a, z_b, self.lambd, self.center, self.eps)
        return loss

    @property
    def last(self) -> BarlowTwinsComponents | None:
        """Components of the latest call (None before the first), already computed, without its graph."""
        return None if self._last is None else BarlowTwinsComponents(*self._last.unbind())

    def components(self, z_a: Tensor, z_b: Tensor) -> BarlowTwinsComponents:
        """Components for other embeddings, with this loss's options; ``last`` stays as it is."""
        return barlow_twins_components(z_a, z_b, self.lambd, self.center, self.eps)

    def extra_repr(self) -> str:
        return f"lambd={self.lambd}, center={self.center}, eps={self.eps}"
