"""Archives (.npz) and HDF5 files of padded arrays with keys SPLIT/NAME, SPLIT_NAME, SPLIT.NAME or NAME."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers.archive import SUFFIX, describe_archive, read_archive
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.hdf5 import describe_hdf5, open_hdf5, text
from mmfast.data.readers.labels import columns, read_labels
from mmfast.data.readers.padding import Cut, unpad
from mmfast.data.readers.parts import MODALITY_NAMES, SPLIT_NAMES, Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import CLASSIFICATION
from mmfast.errors import UserError

KINDS = {
    "labels": "labels",
    "label": "labels",
    "y": "labels",
    "names": "names",
    "ids": "ids",
    "lengths": "lengths",
}
OWN = "mmfast-data 1"
KEY = re.compile(rf"(?:({'|'.join(SPLIT_NAMES)})[/._])?(.+)", re.IGNORECASE)
LENGTHS = re.compile(r"(.+)[/._]lengths")


def is_foreign(source: Source) -> bool:
    """Whether keys name a modality and labels."""
    try:
        kinds = {what[1:] for key in _keys(source) if (what := _meaning(key))}
    except UserError:
        return False
    return any(kind == "values" for kind, _ in kinds) and ("labels", "") in kinds


def _keys(source: Source) -> list[str]:
    if source.kind == "zip":
        # By their names alone, so that what is wrong in them is told of by the reader.
        arrays = all(name.endswith(SUFFIX) for name in source.members)
        return [name.removesuffix(SUFFIX) for name in source.members] if arrays else []
    return [key for key, *_ in contents(source)]


def contents(source: Source) -> Contents:
    """(key, shape, dtype) of every array."""
    if source.kind == "zip":
        return describe_archive(source.path)
    return describe_hdf5(source.path) if source.kind == "hdf5" else []


def _meaning(key: str) -> tuple[str, str, str] | None:
    """(split, kind, modality), the split "all" where the key names none, or None for another key."""
    found = KEY.fullmatch(key)
    if not found:
        return None
    split, name = SPLIT_NAMES.get((found[1] or "").lower(), "all"), found[2].lower()
    if name in KINDS:
        return split, KINDS[name], ""
    if name in MODALITY_NAMES:
        return split, "values", MODALITY_NAMES[name]
    of = LENGTHS.fullmatch(name)
    if of and of[1] in MODALITY_NAMES:
        return split, "lengths", MODALITY_NAMES[of[1]]
    # The package's own form without the key that says so.
    return (split, "own", "") if re.fullmatch(r".+/values", name) else None


@contextmanager
def _arrays(source: Source) -> Iterator[Any]:
    """Key -> array, read when asked for."""
    if source.kind == "zip":
        yield read_archive(source.path).__getitem__
        return
    with open_hdf5(source.path) as file:
        known = file.arrays()
        yield lambda key: file.read(key, known[key])


def read_foreign(source: Source, options: Options) -> MultimodalData:
    """Read the arrays: modalities (N, L, F), labels, lengths or else zeros for padding, names or ids."""
    path, found, unknown = source.path, {}, []
    for key, *_ in contents(source):
        meaning = _meaning(key)
        if meaning is None:
            unknown.append(key)
        elif meaning[1] == "own":
            raise UserError(f'{path}: format is missing; write "{OWN}"')
        elif meaning in found:
            raise UserError(f"{path}: {key} must be there once, got {found[meaning]} too")
        else:
            found[meaning] = key
    splits = {split for split, *_ in found}
    if len(splits) > 1 and "all" in splits:
        odd = [key for (split, *_), key in found.items() if split == "all"]
        unknown += odd
        found = {meaning: key for meaning, key in found.items() if meaning[0] != "all"}
        splits.discard("all")
    warnings = [f"unknown keys, left out: {', '.join(sorted(unknown)[:6])}"] if unknown else []
    parts, raw, cuts, clipped = {}, {}, Cut(), 0
    with _arrays(source) as read:
        for split in sorted(splits):
            parts[split], raw[split], cut, more = _part(path, split, found, read)
            cuts, clipped = cuts + cut, clipped + more
    if clipped:
        warnings.append(
            f"{clipped:,} lengths are larger than the steps of their arrays, taken for all of them"
        )
    about = _labels(path, parts, raw, options.labels)
    return assemble(
        path, parts, layout="arrays by split and modality", warnings=warnings, padding=str(cuts), **about
    )


def _part(path, split: str, found, read):
    """One split, its labels as they are, what was cut, and how many lengths were too large."""
    said = "" if split == "all" else f"{split}."
    own = {(kind, m): key for (s, kind, m), key in found.items() if s == split}
    arrays = {m: read(key) for (kind, m), key in own.items() if kind == "values"}
    n = len(next(iter(arrays.values()))) if arrays and next(iter(arrays.values())).ndim else 0
    for modality, array in arrays.items():
        if array.ndim != 3 or array.dtype.kind not in "biuf":
            raise UserError(
                f"{path}: {said}{modality} must be (N, L, F) numbers, got {array.shape} of {array.dtype}"
            )
        if len(array) != n:
            raise UserError(
                f"{path}: {said}{modality} must have {n} samples as {next(iter(arrays))}, got {len(array)}"
            )
    given = {}
    for modality in arrays:
        key = own.get(("lengths", modality), own.get(("lengths", "")))
        if key is not None:
            given[modality] = _lengths(path, key, read(key), n)
    one_length = len({array.shape[1] for array in arrays.values()}) == 1
    rest = {m: array for m, array in arrays.items() if m not in given}
    values, lengths, cut = unpad(rest, aligned=one_length)
    clipped = 0
    for modality, count in given.items():
        steps = arrays[modality].shape[1]
        clipped += int((count > steps).sum())
        lengths[modality] = np.minimum(count, steps)
        values[modality] = arrays[modality][_real(arrays[modality], lengths[modality])]
    labels = read(own["labels", ""]) if ("labels", "") in own else None
    names = own.get(("names", ""), own.get(("ids", "")))
    return (
        Part(values, None, _names(path, names, read(names), n) if names else None, lengths),
        labels,
        cut,
        clipped,
    )


def _real(array: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(N, L) bool: the steps that count, at the back if those in front are zero in more samples, else in front."""
    step = np.arange(array.shape[1])
    front, back = step >= step.size - lengths[:, None], step < lengths[:, None]
    padded = lengths < step.size
    zero = ~(array != 0).any(2)
    outside_front, outside_back = (np.all(zero | real, axis=1)[padded].sum() for real in (front, back))
    return front if outside_front > outside_back else back


def _lengths(path, key: str, value: np.ndarray, n: int) -> np.ndarray:
    value = value.reshape(-1) if value.size == len(value if value.ndim else [0]) else value
    whole = value.dtype.kind in "iuf" and value.shape == (n,) and np.isfinite(value).all()
    if not whole or (value < 0).any() or (value % 1 != 0).any():
        raise UserError(
            f"{path}: {key} must be {n} whole numbers, one per sample, got {value.shape} of {value.dtype}"
        )
    return np.minimum(value, 2**62).astype(np.int64)


def _names(path, key: str, value: np.ndarray, n: int) -> list[str]:
    if value.ndim == 0 or len(value) != n:
        raise UserError(f"{path}: {key} must have {n} rows, one per sample, got {value.shape}")
    value = text(value) if value.dtype.kind in "SUO" else value
    rows = value.reshape(n, -1).tolist()
    return [str(row[0]) if len(row) == 1 else ",".join(map(str, row)) for row in rows]


def _labels(path, parts: dict[str, Part], raw: dict[str, Any], chosen: str | None) -> dict[str, Any]:
    """What the labels are; puts them into the parts."""
    raw = {split: array for split, array in raw.items() if array is not None}
    if not raw:
        return {}
    for split, array in raw.items():
        n = len(next(iter(parts[split].lengths.values()), ()))
        if array.ndim == 0 or (parts[split].lengths and len(array) != n):
            raise UserError(
                f"{path}: labels of {split} must have {n} rows as its features, got {array.shape}"
            )
    if {array.shape[1:] for array in raw.values()} != {next(iter(raw.values())).shape[1:]}:
        raise UserError(
            f"{path}: labels must have as many columns in every split, got {[a.shape for a in raw.values()]}"
        )
    if all(array.dtype.kind in "SUO" and array[0:].ndim == 1 for array in raw.values()):
        for split, array in raw.items():
            parts[split].labels = text(array).tolist()
        return {"task": CLASSIFICATION}
    together = np.concatenate(list(raw.values()))
    values, task = read_labels(f"{path}: labels", together, len(together))
    if task == CLASSIFICATION:
        about = {"task": task, "targets": [f"class {k}" for k in range(together.shape[-1])]}
    else:
        about = columns(f"{path}: labels", values.reshape(len(values), -1), None, chosen)
        values = about.pop("labels")
    for split, part in zip(
        raw, np.split(values, np.cumsum([len(a) for a in raw.values()])[:-1]), strict=True
    ):
        parts[split].labels = part
    return about


FORMAT = Format(
    "an .npz or HDF5 file with keys such as train/text and train/labels",
    is_foreign,
    read_foreign,
    contents,
    frozenset({"labels"}),
)
