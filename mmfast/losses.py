"""Losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.functional import BarlowTwinsComponents, barlow_twins_components, barlow_twins_options
from mmfast.ops import barlow_twins as _barlow_twins


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins loss of two views' embeddings (B, D), defined in :func:`mmfast.functional.barlow_twins`.

    >>> loss = BarlowTwinsLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss.last.mean_diagonal

    ``variant`` names the published definition, from which lambd, eps and scale come where they are not given; it is
    described there, with a warning about "thesis" and "vissl".
    """

    def __init__(
        self,
        lambd: float | None = None,
        center: bool = True,
        eps: float | None = None,
        variant: str = "official",
        scale: float | None = None,
    ):
        super().__init__()
        options = barlow_twins_options(variant, lambd=lambd, center=center, eps=eps, scale=scale)
        self.variant, self.center = variant, center
        self.lambd, self.eps, self.scale = (options[name] for name in ("lambd", "eps", "scale"))
        _barlow_twins.check_options(lambd=self.lambd, eps=self.eps, scale=self.scale)
        self._last: Tensor | None = None

    def _options(self) -> dict[str, float | bool]:
        names = ("variant", "lambd", "center", "eps", "scale")
        return {name: getattr(self, name) for name in names}

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        options = barlow_twins_options(**self._options())
        loss, self._last = _barlow_twins.barlow_twins(z_a, z_b, **options)
        return loss

    @property
    def last(self) -> BarlowTwinsComponents | None:
        """Components of the latest call (None before the first), already computed, without its graph."""
        return None if self._last is None else BarlowTwinsComponents(*self._last.unbind())

    def components(self, z_a: Tensor, z_b: Tensor) -> BarlowTwinsComponents:
        """Components for other embeddings, with this loss's options; ``last`` stays as it is."""
        return barlow_twins_components(z_a, z_b, **self._options())

    def extra_repr(self) -> str:
        options = f"lambd={self.lambd}, center={self.center}, eps={self.eps}"
        return f"{options}, variant={self.variant!r}, scale={self.scale}"
