"""mmfast: fast kernels, losses and training for self-supervised multimodal learning.

Names are imported when they are first asked for, so that ``mmfast --help`` waits for no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mmfast import registration
from mmfast.version import __version__ as __version__

if TYPE_CHECKING:
    from mmfast import adapters as adapters
    from mmfast import data as data
    from mmfast import functional as functional
    from mmfast import metrics as metrics
    from mmfast import models as models
    from mmfast import ops as ops
    from mmfast.backends import backend, info
    from mmfast.errors import UserError
    from mmfast.losses import (
        BarlowTwinsLoss,
        ClipLoss,
        DirectedPKTLoss,
        EmbeddingQueue,
        InfoNCELoss,
        MultiViewBarlowTwinsLoss,
        NPairLoss,
        NTXentLoss,
        PairwiseHingeLoss,
        PKTLoss,
        SigLipLoss,
        SmoothTripletLoss,
        SoftNearestNeighbourLoss,
        SupConLoss,
        TripletMarginLoss,
        VICRegLoss,
        backward_in_micro_batches,
    )
    from mmfast.plan import Plan
    from mmfast.plots import plot_cross_correlation
    from mmfast.transforms import Chain, FeatureMask, GaussianNoise, SeqAug, TimeMask, TwoViews

# Module -> its names that are ours, too. Type checkers need them spelt out above and below.
EXPORTS = {
    "adapters": (),
    "backends": ("backend", "info"),
    "data": (),
    "errors": ("UserError",),
    "functional": (),
    "losses": (
        "BarlowTwinsLoss",
        "ClipLoss",
        "DirectedPKTLoss",
        "EmbeddingQueue",
        "InfoNCELoss",
        "MultiViewBarlowTwinsLoss",
        "NPairLoss",
        "NTXentLoss",
        "PairwiseHingeLoss",
        "PKTLoss",
        "SigLipLoss",
        "SmoothTripletLoss",
        "SoftNearestNeighbourLoss",
        "SupConLoss",
        "TripletMarginLoss",
        "VICRegLoss",
        "backward_in_micro_batches",
    ),
    "metrics": (),
    "models": (),
    "ops": (),
    "plan": ("Plan",),
    "plots": ("plot_cross_correlation",),
    "transforms": ("Chain", "FeatureMask", "GaussianNoise", "SeqAug", "TimeMask", "TwoViews"),
}
_HOMES = {name: module for module, names in EXPORTS.items() for name in names}
__all__ = [
    "BarlowTwinsLoss",
    "Chain",
    "ClipLoss",
    "DirectedPKTLoss",
    "EmbeddingQueue",
    "FeatureMask",
    "GaussianNoise",
    "InfoNCELoss",
    "MultiViewBarlowTwinsLoss",
    "NPairLoss",
    "NTXentLoss",
    "PKTLoss",
    "PairwiseHingeLoss",
    "Plan",
    "SeqAug",
    "SigLipLoss",
    "SmoothTripletLoss",
    "SoftNearestNeighbourLoss",
    "SupConLoss",
    "TimeMask",
    "TripletMarginLoss",
    "TwoViews",
    "UserError",
    "VICRegLoss",
    "backend",
    "backward_in_micro_batches",
    "info",
    "plot_cross_correlation",
]


def __getattr__(name: str):
    if name in EXPORTS:
        return import_module(f"mmfast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mmfast' has no attribute {name!r}")
    value = getattr(import_module(f"mmfast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS, *_HOMES})


registration.with_torch()
