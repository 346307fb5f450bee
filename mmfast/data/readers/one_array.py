"""HDF5 files of one array each, named for a modality and a split, as in a folder of pliang279/MFN."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmfast.data.readers.hdf5 import open_hdf5
from mmfast.errors import UserError

SPLITS = ("train", "valid", "test")
FILES = {"text": "text_{}_emb.h5", "audio": "audio_{}.h5", "visual": "video_{}.h5"}
LABELS = "y_{}.h5"
# All modalities beside one another.
JOINT = "X_{}.h5"


def one_array(path: Path, ndim: int | None, shape: str, key: str = "d1") -> np.ndarray:
    """The numbers of the file's only data set.

    Raises:
        UserError: no such file, another data set in it, other axes, none in one of them, no numbers.
    """
    with open_hdf5(path) as file:
        arrays = file.arrays()
        if key not in arrays:
            raise UserError(f"{path}: must hold a data set named {key}, found {file.children() or 'nothing'}")
        if len(arrays) > 1:
            raise UserError(f"{path}: must hold {key} alone, found {file.children()}")
        array = arrays[key]
        if array.is_text or array.node is None or array.dtype == "bool":
            raise UserError(f"{path}: {key} must hold numbers, got dtype {array.dtype}")
        if len(array.shape) != ndim and ndim is not None:
            raise UserError(f"{path}: {key} must have shape {shape}, got {array.shape}")
        if 0 in array.shape or not array.shape:
            raise UserError(f"{path}: {key} must not be empty, got shape {array.shape}")
        return file.read(key, array)
