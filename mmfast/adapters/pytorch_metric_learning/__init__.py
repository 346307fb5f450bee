"""``from pytorch_metric_learning import losses``: the same from ``mmfast.adapters.pytorch_metric_learning``."""

from mmfast.adapters.pytorch_metric_learning import distances, losses, miners, reducers
from mmfast.adapters.pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
)
from mmfast.adapters.pytorch_metric_learning.losses import (
    CrossBatchMemory,
    NPairsLoss,
    NTXentLoss,
    SelfSupervisedLoss,
    SupConLoss,
    TripletMarginLoss,
    VICRegLoss,
)
from mmfast.adapters.pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from mmfast.adapters.pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    DoNothingReducer,
    MeanReducer,
    SumReducer,
)

__all__ = [
    "AvgNonZeroReducer",
    "BatchHardMiner",
    "CosineSimilarity",
    "CrossBatchMemory",
    "DoNothingReducer",
    "DotProductSimilarity",
    "LpDistance",
    "MeanReducer",
    "NPairsLoss",
    "NTXentLoss",
    "SelfSupervisedLoss",
    "SumReducer",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletMarginMiner",
    "VICRegLoss",
    "distances",
    "losses",
    "miners",
    "reducers",
]
