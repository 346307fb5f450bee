"""mmfast: fast kernels, losses and training for self-supervised multimodal learning."""

from mmfast.backends import backend, info
from mmfast.errors import UserError
from mmfast.losses import BarlowTwinsLoss, MultiViewBarlowTwinsLoss
from mmfast.micro_batches import backward_in_micro_batches
from mmfast.plan import Plan
from mmfast.plots import plot_cross_correlation
from mmfast.transforms import Chain, FeatureMask, GaussianNoise, SeqAug, TimeMask, TwoViews

__version__ = "0.1.0"
__all__ = [
    "BarlowTwinsLoss",
    "Chain",
    "FeatureMask",
    "GaussianNoise",
    "MultiViewBarlowTwinsLoss",
    "Plan",
    "SeqAug",
    "TimeMask",
    "TwoViews",
    "UserError",
    "backend",
    "backward_in_micro_batches",
    "info",
    "plot_cross_correlation",
]
