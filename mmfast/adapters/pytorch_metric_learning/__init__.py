"""``from pytorch_metric_learning import losses``: the same from ``mmfast.adapters.pytorch_metric_learning``."""

from mmfast.adapters.pytorch_metric_learning import distances, losses, reducers
from mmfast.adapters.pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from mmfast.adapters.pytorch_metric_learning.losses import (
    CrossBatchMemory,
    NPairsLoss,
    NTXentLoss,
    SelfSupervisedLoss,
    SupConLoss,
)
from mmfast.adapters.pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    DoNothingReducer,
    MeanReducer,
    SumReducer,
)

__all__ = [
    "AvgNonZeroReducer",
    "CosineSimilarity",
    "CrossBatchMemory",
    "DoNothingReducer",
    "DotProductSimilarity",
    "MeanReducer",
    "NPairsLoss",
    "NTXentLoss",
    "SelfSupervisedLoss",
    "SumReducer",
    "SupConLoss",
    "distances",
    "losses",
    "reducers",
]
