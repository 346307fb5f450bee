"""Losses as modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool
from mmfast.functional import (
    BarlowTwinsComponents,
    Pair,
    Views,
    barlow_twins_options,
    checked_weights,
    evaluate_barlow_twins,
    evaluate_multi_view,
    resolved,
)
from mmfast.ops.barlow_twins.checks import OP
from mmfast.ops.barlow_twins.multi_view import Sharing


class _BarlowTwins(nn.Module):
    """Options of Barlow Twins losses; :func:`mmfast.functional.barlow_twins` explains them."""

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
        options = barlow_twins_options(variant, lambd=lambd, center=center, eps=eps, scale=scale)
        self.variant, self.debias = variant, check_bool(OP, "debias", debias)
        self.lambd, self.center, self.eps, self.scale = (
            options[name] for name in ("lambd", "center", "eps", "scale")
        )
        self.stats, self.grad_convention, self.group = stats, grad_convention, group
        Sharing(stats, grad_convention).check()

    def _settings(self) -> tuple[dict[str, float | bool], bool, Sharing]:
        """Options, ``debias`` and ``sharing`` of a call: attributes may have been set since."""
        sharing = Sharing(self.stats, self.grad_convention, self.group)
        names = ("variant", "debias", "lambd", "center", "eps", "scale")
        return *resolved(sharing, **{name: getattr(self, name) for name in names}), sharing

    def extra_repr(self) -> str:
        names = ("lambd", "center", "eps", "variant", "scale", "debias", "stats", "grad_convention")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


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


class BarlowTwinsLoss(_BarlowTwins, TwoViewLoss):
    """Barlow Twins loss of two views' embeddings (B, D), defined in :func:`mmfast.functional.barlow_twins`.

    >>> loss = BarlowTwinsLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss.last.mean_diagonal

    ``variant`` names the published definition, from which lambd, eps and scale come where they are not given; it is
    described there, with a warning about "thesis" and "vissl". In an initialised process group of several processes
    the loss is that of all their rows: every process must call it (``stats=None``: each has its own).
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return self._kept(*evaluate_barlow_twins(z_a, z_b, *self._settings()))

    @torch.no_grad()
    def components(self, z_a: Tensor, z_b: Tensor) -> BarlowTwinsComponents:
        """Components for other embeddings, with this loss's options; ``last`` stays as it is."""
        _, components = evaluate_barlow_twins(z_a, z_b, *self._settings())
        return BarlowTwinsComponents(*components.unbind())


class MultiViewBarlowTwinsLoss(_BarlowTwins):
    """Weighted Barlow Twins losses of all pairs of any number of views:
    :func:`mmfast.functional.multi_view_barlow_twins`.

    >>> loss = MultiViewBarlowTwinsLoss({("text", "audio"): 1.0, ("text", "visual"): 0.5})
    >>> loss({"text": z_t, "audio": z_a, "visual": z_v}, present={"text": t, "audio": a, "visual": v}).backward()
    >>> loss.last["text", "audio"].mean_diagonal

    Without ``weights`` every pair counts once. Other options are those of :class:`BarlowTwinsLoss`, by keyword.
    """

    _last: dict[Pair, Tensor] | None = None

    def __init__(self, weights: Mapping[Pair, float] | None = None, **options: Any):
        super().__init__(**options)
        self.weights = None if weights is None else checked_weights(weights)

    def forward(self, views: Views, present: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        loss, self._last = evaluate_multi_view(views, present, self.weights, *self._settings())
        return loss

    @property
    def last(self) -> dict[Pair, BarlowTwinsComponents] | None:
        """Components of the latest call by pair (None before the first), already computed, without its graph."""
        if self._last is None:
            return None
        return {pair: BarlowTwinsComponents(*components.unbind()) for pair, components in self._last.items()}

    def extra_repr(self) -> str:
        return f"weights={self.weights}, {super().extra_repr()}"
