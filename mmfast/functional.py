"""Losses as functions; each stands beside its module in :mod:`mmfast.losses`."""

from mmfast.losses.barlow_twins import (
    BARLOW_TWINS_VARIANTS,
    BarlowTwinsComponents,
    barlow_twins,
    barlow_twins_components,
)
from mmfast.losses.diagnostics import effective_rank
from mmfast.losses.multi_view_barlow_twins import multi_view_barlow_twins

__all__ = [
    "BARLOW_TWINS_VARIANTS",
    "BarlowTwinsComponents",
    "barlow_twins",
    "barlow_twins_components",
    "effective_rank",
    "multi_view_barlow_twins",
]
