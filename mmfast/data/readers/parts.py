"""From what a reader found, split by split, to the data: names of modalities and splits, ids, sizes that fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

# Theirs -> ours.
MODALITY_NAMES = {
    "text": "text",
    "glove": "text",
    "src-text": "text",
    "audio": "audio",
    "acoustic": "audio",
    "src-audio": "audio",
    "visual": "visual",
    "vision": "visual",
    "video": "visual",
    "src-visual": "visual",
    "speech": "speech",
}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "dev": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
    "unlabelled": "unlabelled",
}
ORDER = ("train", "valid", "test", "unlabelled")
NO_SPLIT = "no split in the files: give --split"


@dataclass
class Part:
    """One split as a reader found it, of N samples.

    Attributes:
        values: modality (our name) -> one (n, F) array per sample, or, where ``lengths`` names it, the (steps, F) of
            all samples.
        lengths: modality -> (N,) steps of each sample, 0 where it is missing.
        labels: (N,) numbers or names of classes, (N, K) numbers or labels; None for none.
        names: one per sample.
        groups: kind -> one name per sample.
        words, transcripts, tokens: one item per sample, or None.
    """

    values: dict[str, Any]
    labels: Any = None
    names: Sequence[str] | None = None
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    groups: dict[str, Sequence[str]] = field(default_factory=dict)
    words: Sequence[Sequence[str]] | None = None
    transcripts: Sequence[str] | None = None
    tokens: Sequence | None = None


def assemble(
    path: str | os.PathLike,
    parts: Mapping[str, Part],
    *,
    layout: str,
    name: str | None = None,
    features: Mapping[str, int] | None = None,
    **about: Any,
) -> MultimodalData:
    """The data of the splits that a reader found.

    A modality that a split lacks is missing in its samples. Ids are numbered through in the order train, valid, test,
    unlabelled. A split that is called "all" is train, with a warning that there is no split.

    Args:
        path: of the source, for errors and for a name.
        parts: split (our name, or "all") -> what was found.
        layout: in words.
        name: of the corpus; default the path's own name without its ending.
        features: modality -> F, where no sample of it may tell.
        about: other attributes of `MultimodalData`: task, targets, label_range, warnings, padding, sample_rate,
            cross_validation.

    Raises:
        UserError: no sample, no modality, or parts that do not fit together.
    """
    path = Path(path)
    warnings = list(about.pop("warnings", ()))
    if "all" in parts:
        parts = {"train": parts["all"]}
        warnings.append(NO_SPLIT)
    parts = {split: parts[split] for split in ORDER if split in parts}
    flat = {split: {m: _flat(path, split, m, part) for m in part.values} for split, part in parts.items()}
    sizes = _features(path, flat, dict(features or {}))
    if not sizes:
        raise UserError(f"{path}: must hold features of at least one modality, got none")
    datasets, first = {}, 0
    for split, part in parts.items():
        n = len(part.names) if part.names is not None else _samples(flat[split], part)
        values = {
            m: flat[split][m][0] if m in flat[split] else np.empty((0, f), np.float32)
            for m, f in sizes.items()
        }
        lengths = {m: flat[split][m][1] if m in flat[split] else np.zeros(n, np.int64) for m in sizes}
        for modality, count in lengths.items():
            if len(count) != n:
                raise UserError(
                    f"{path}: {split}.{modality} must have {n} samples as its names, got {len(count)}"
                )
        names = [f"{split}/{i}" for i in range(n)] if part.names is None else part.names
        try:
            datasets[split] = MultimodalDataset.from_flat(
                values,
                lengths,
                part.labels,
                ids=np.arange(first, first + n),
                names=names,
                groups=part.groups or None,
                words=part.words,
                transcripts=part.transcripts,
                tokens=part.tokens,
            )
        except (UserError, TypeError) as error:
            raise UserError(f"{path}: {split} {_reason(error)}") from None
        first += n
    if not first:
        raise UserError(f"{path}: must hold at least one sample, got none")
    try:
        return MultimodalData(
            **datasets, name=name or path.resolve().stem or "data", layout=layout, warnings=warnings, **about
        )
    except UserError as error:
        raise UserError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error).removeprefix("MultimodalDataset: ").removeprefix("MultimodalData: ")


def _samples(flat: Mapping[str, tuple], part: Part) -> int:
    if flat:
        return len(next(iter(flat.values()))[1])
    return 0 if part.labels is None else len(part.labels)


def _flat(path: Path, split: str, modality: str, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """(steps, F) float32 of all samples, and (N,) lengths."""
    given = part.values[modality]
    if modality in part.lengths:
        return _float32(given), np.asarray(part.lengths[modality], np.int64)
    arrays = [_float32(np.asarray(item)) for item in given]
    widths = {a.shape[1] for a in arrays if a.ndim == 2 and len(a)}
    for i, array in enumerate(arrays):
        if array.ndim != 2 and array.size:
            raise UserError(f"{path}: {split}[{i}].{modality} must be (n, F), got {array.shape}")
        if array.ndim == 2 and len(array) and array.shape[1] != arrays[_first(arrays)].shape[1]:
            raise UserError(
                f"{path}: {split}[{i}].{modality} must have {arrays[_first(arrays)].shape[1]} features as the first "
                f"sample that has it, got {array.shape[1]}"
            )
    width = widths.pop() if widths else 0
    filled = [a for a in arrays if a.size]
    flat = np.concatenate(filled) if filled else np.empty((0, width), np.float32)
    return flat, np.array([len(a) if a.size else 0 for a in arrays], np.int64)


def _first(arrays: Sequence[np.ndarray]) -> int:
    return next(i for i, a in enumerate(arrays) if a.ndim == 2 and len(a))


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise UserError(f"features must be numbers, got {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(array, np.float32)


def _features(path: Path, flat: Mapping[str, Mapping[str, tuple]], known: dict[str, int]) -> dict[str, int]:
    """Modality -> F over all splits."""
    seen: dict[str, tuple[str, int]] = {}
    for split, modalities in flat.items():
        for modality, (values, _) in modalities.items():
            width = values.shape[1] if values.ndim == 2 else -1
            if width < 0:
                raise UserError(f"{path}: {split}.{modality} must be (steps, F), got {values.shape}")
            if not width and not len(values):
                continue  # no sample of this split has it
            where, wanted = seen.setdefault(modality, (split, width))
            if width != wanted:
                raise UserError(
                    f"{path}: {split}.{modality} must have {wanted} features as {where}.{modality}, got {width}"
                )
    return known | {modality: width for modality, (_, width) in seen.items()}
