"""Losses: one file a family, functions and modules side by side; :mod:`mmfast.functional` has all functions."""

from mmfast.losses.barlow_twins import BarlowTwinsLoss
from mmfast.losses.contrastive import NTXentLoss, SupConLoss
from mmfast.losses.micro_batches import backward_in_micro_batches
from mmfast.losses.multi_view_barlow_twins import MultiViewBarlowTwinsLoss
from mmfast.losses.neighbours import SoftNearestNeighbourLoss
from mmfast.losses.paired import ClipLoss, InfoNCELoss, SigLipLoss
from mmfast.losses.queue import EmbeddingQueue
from mmfast.losses.ranking import NPairLoss, PairwiseHingeLoss
from mmfast.losses.transfer import DirectedPKTLoss, PKTLoss
from mmfast.losses.triplet import SmoothTripletLoss, TripletMarginLoss
from mmfast.losses.vicreg import VICRegLoss

__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "DirectedPKTLoss",
    "EmbeddingQueue",
    "InfoNCELoss",
    "MultiViewBarlowTwinsLoss",
    "NPairLoss",
    "NTXentLoss",
    "PKTLoss",
    "PairwiseHingeLoss",
    "SigLipLoss",
    "SmoothTripletLoss",
    "SoftNearestNeighbourLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "VICRegLoss",
    "backward_in_micro_batches",
]
