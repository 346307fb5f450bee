"""Data of several modalities: batches, data sets, readers."""

from mmfast.data.batch import MODALITIES, MultimodalBatch, Sample, collate
from mmfast.data.dataset import MultimodalData, MultimodalDataset
from mmfast.data.sampler import BucketSampler, make_loader

__all__ = [
    "MODALITIES",
    "BucketSampler",
    "MultimodalBatch",
    "MultimodalData",
    "MultimodalDataset",
    "Sample",
    "collate",
    "make_loader",
]
