"""Data of several modalities: batches, data sets, readers."""

from mmfast.data.batch import MODALITIES, MultimodalBatch, Sample, collate
from mmfast.data.combine import combine
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.folds import Fold, folds
from mmfast.data.inspection import Inspection, inspect
from mmfast.data.load import load
from mmfast.data.readers.ict_mmmo import read_ict_mmmo
from mmfast.data.sampler import BucketSampler, make_loader
from mmfast.data.shares import label_share
from mmfast.data.split import divide
from mmfast.data.standardise import NonFinite, Standardiser, count_nonfinite
from mmfast.data.synthetic import synthetic
from mmfast.data.writing import DataWriter, planned, save

__all__ = [
    "MODALITIES",
    "BucketSampler",
    "DataWriter",
    "Fold",
    "Inspection",
    "MultimodalBatch",
    "MultimodalData",
    "MultimodalDataset",
    "NonFinite",
    "Sample",
    "Standardiser",
    "collate",
    "combine",
    "count_nonfinite",
    "divide",
    "folds",
    "inspect",
    "label_share",
    "load",
    "make_loader",
    "planned",
    "read_ict_mmmo",
    "save",
    "synthetic",
]
