"""Losses as functions; each stands beside its module in :mod:`mmfast.losses`."""

from mmfast.losses.barlow_twins import (
    BARLOW_TWINS_VARIANTS,
    BarlowTwinsComponents,
    barlow_twins,
    barlow_twins_components,
)
from mmfast.losses.contrastive import nt_xent, sup_con
from mmfast.losses.diagnostics import effective_rank
from mmfast.losses.multi_view_barlow_twins import multi_view_barlow_twins
from mmfast.losses.neighbours import soft_nearest_neighbour
from mmfast.losses.paired import clip, info_nce, siglip
from mmfast.losses.ranking import n_pair, pairwise_hinge
from mmfast.losses.transfer import directed_pkt, pkt
from mmfast.losses.triplet import smooth_triplet, triplet_margin
from mmfast.losses.vicreg import vicreg

__all__ = [
    "BARLOW_TWINS_VARIANTS",
    "BarlowTwinsComponents",
    "barlow_twins",
    "barlow_twins_components",
    "clip",
    "directed_pkt",
    "effective_rank",
    "info_nce",
    "multi_view_barlow_twins",
    "n_pair",
    "nt_xent",
    "pairwise_hinge",
    "pkt",
    "siglip",
    "smooth_triplet",
    "soft_nearest_neighbour",
    "sup_con",
    "triplet_margin",
    "vicreg",
]
