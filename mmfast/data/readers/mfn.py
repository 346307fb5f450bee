"""Folders of HDF5 files as pliang279/MFN and MFM keep them: ICT-MMMO, MOSI, POM, YouTube.

Source: pliang279/MFN, `new_data/*` (a file for each modality and split) and `data/` (modalities beside one another).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmfast.data.choose import choose
from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers import ict_mmmo
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.hdf5 import describe_hdf5
from mmfast.data.readers.labels import columns, outside, read_labels
from mmfast.data.readers.one_array import FILES, JOINT, LABELS, SPLITS, one_array
from mmfast.data.readers.padding import Cut, unpad
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import CLASSIFICATION
from mmfast.errors import UserError

# Of the published joint files: GloVe, a choice of COVAREP's, FACET's features.
WIDTHS = {"text": 300, "audio": 5, "visual": 20}
POM, POM_RANGE = 17, (1.0, 7.0)


def is_mfn(source: Source) -> bool:
    """Whether the folder holds files under these names; reading them tells what they are."""
    return source.is_folder and any(name in source.files for name in _names())


def contents(source: Source) -> Contents:
    """(file and key, shape, dtype) of every array in the folder."""
    return [
        (f"{name}:{key}", shape, dtype)
        for name in _names()
        if name in source.files
        for key, shape, dtype in describe_hdf5(source.file(name))
    ]


def read_mfn(source: Source, options: Options) -> MultimodalData:
    """Read the folder; any file may lack, and its modality is missing in that split.

    Labels (N,) in halves from 1 to 5 beside features of 300, 74 and 36 are those of ICT-MMMO, see `read_ict_mmmo`.
    Others stay as they are: (N,) numbers, one-hot rows for classes, (N, 17) for the ratings of POM.
    """
    joint = any(JOINT.format(split) in source.files for split in SPLITS)
    arrays = _joint(source, options.modalities) if joint else _single(source)
    labels = {}
    for split in SPLITS:
        if (name := LABELS.format(split)) in source.files:
            labels[split] = one_array(source.file(name), None, "(N,) or (N, K)", "data" if joint else "d1")
    found = {split for _, split in arrays}
    if not found:
        raise UserError(f"{source.path}: must hold features, got labels without features")
    if not joint and _is_ict_mmmo(arrays, labels):
        for name, value in options.given().items():
            if name == "labels":
                raise UserError(f"{source.path}: labels must not be chosen in ICT-MMMO, got {value!r}")
        data = ict_mmmo.read_ict_mmmo(source.path)
    else:
        data = _data(source, arrays, labels, options)
    return choose(data, options.modalities) if options.modalities and ":" not in options.modalities else data


def _names() -> list[str]:
    return [pattern.format(split) for split in SPLITS for pattern in (*FILES.values(), JOINT, LABELS)]


def _single(source: Source) -> dict[tuple[str, str], np.ndarray]:
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for split in SPLITS:
        for modality, pattern in FILES.items():
            if (name := pattern.format(split)) in source.files:
                arrays[modality, split] = one_array(source.file(name), 3, "(N, L, F)")
    return arrays


def _joint(source: Source, modalities: str | None) -> dict[tuple[str, str], np.ndarray]:
    widths = _widths(source.path, modalities) if modalities and ":" in modalities else WIDTHS
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for split in SPLITS:
        if (name := JOINT.format(split)) not in source.files:
            continue
        path = source.file(name)
        array = one_array(path, 3, "(N, L, F)", "data")
        if array.shape[2] != sum(widths.values()):
            said = ",".join(f"{m}:{w}" for m, w in widths.items())
            raise UserError(
                f"{path}: data must have the {sum(widths.values())} features of {said}, got {array.shape[2]}; "
                "say how they are divided, as in --modalities text:300,audio:74,visual:35"
            )
        ends = np.cumsum(list(widths.values()))[:-1]
        for modality, part in zip(widths, np.split(array, ends, axis=2), strict=True):
            arrays[modality, split] = part
    return arrays


def _widths(path: Path, modalities: str) -> dict[str, int]:
    widths: dict[str, int] = {}
    for item in modalities.split(","):
        name, _, width = item.strip().partition(":")
        if name not in FILES or not width.isascii() or not width.isdigit() or not 0 < int(width[:9]) < 10**8:
            raise UserError(
                f"{path}: modalities must be as in text:300,audio:74,visual:35 to divide columns, got {modalities!r}"
            )
        widths[name] = int(width)
    return widths


def _is_ict_mmmo(arrays: Mapping[tuple[str, str], np.ndarray], labels: Mapping[str, np.ndarray]) -> bool:
    sizes = all(array.shape[2] == ict_mmmo.FEATURES[m] for (m, _), array in arrays.items())
    return (
        sizes
        and bool(labels)
        and all(v.ndim == 1 and ict_mmmo.has_its_labels(v).all() for v in labels.values())
    )


def _data(source: Source, arrays, labels, options: Options) -> MultimodalData:
    path = source.path
    sizes = {split: len(array) for (_, split), array in arrays.items()}
    for split, array in labels.items():
        if sizes.setdefault(split, len(array)) != len(array):
            raise UserError(
                f"{path / LABELS.format(split)}: must have {sizes[split]} rows as the features, got {len(array)}"
            )
    for (modality, split), array in arrays.items():
        if len(array) != sizes[split]:
            raise UserError(f"{path}: {modality} of {split} must have N = {sizes[split]}, got {len(array)}")
    shown, about = _labels(path, labels, options.labels)
    warnings = (
        outside(np.concatenate([labels.ravel() for labels in shown.values()]), about["label_range"])
        if "label_range" in about
        else []
    )
    parts, cuts = {}, Cut()
    for split in SPLITS:
        if split not in sizes:
            continue
        of_split = {m: array for (m, s), array in arrays.items() if s == split}
        one_length = len({array.shape[1] for array in of_split.values()}) == 1
        values, lengths, cut = unpad(of_split, aligned=one_length)
        cuts += cut
        names = [f"{split}/{i}" for i in range(sizes[split])]
        parts[split] = Part(values, shown.get(split), names, lengths)
        if split not in labels and shown:
            warnings.append(f"{split} has no labels")
    return assemble(path, parts, layout="HDF5 folder of MFN", warnings=warnings, padding=str(cuts), **about)


def _labels(path: Path, labels: Mapping[str, np.ndarray], chosen: str | None):
    """Split -> labels, and what they are."""
    if not labels:
        return {}, {}
    shapes = {array.shape[1:] for array in labels.values()}
    if len(shapes) > 1:
        raise UserError(f"{path}: labels must have as many columns in every split, got {sorted(shapes)}")
    together = np.concatenate(list(labels.values()))
    values, task = read_labels(f"{path}: labels", together, len(together))
    ends = np.cumsum([len(array) for array in labels.values()])[:-1]
    if task == CLASSIFICATION:
        if chosen:
            raise UserError(f"{path}: labels must not be chosen among classes, got {chosen!r}")
        about = {"task": task, "targets": [f"class {k}" for k in range(together.shape[1])]}
    else:
        about = columns(f"{path}: labels", values.reshape(len(values), -1), None, chosen)
        values = about.pop("labels")
        if together.shape[1:] == (POM,):
            about["label_range"] = POM_RANGE
    return dict(zip(labels, np.split(values, ends), strict=True)), about


FORMAT = Format(
    "an HDF5 folder of MFN (audio_train.h5, y_train.h5, ... as of ICT-MMMO, MOSI, POM)",
    is_mfn,
    read_mfn,
    contents,
    frozenset({"labels", "modalities"}),
)
