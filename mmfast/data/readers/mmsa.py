"""Pickles of MMSA and of its feature extraction MMSA-FET (MOSI, MOSEI, CH-SIMS), and HDF5 with the same keys.

Layout: thuiar/MMSA `src/MMSA/data_loader.py`; thuiar/MMSA-FET `src/MSA_FET/dataset.py`.

    SPLIT/text, audio, vision              (N, L, F) numbers, zeros behind short samples, or in front
    SPLIT/text_bert                        (N, 3, L): ids of tokens, mask, ids of segments
    SPLIT/audio_lengths, vision_lengths    (N,) or a list; only where the modalities are not aligned
    SPLIT/regression_labels                (N,) or a list; CH-SIMS also _T, _A, _V, of single modalities
    SPLIT/classification_labels            0 negative, 1 neutral, 2 positive; not of MMSA-FET
    SPLIT/id, raw_text                     strings; an id is VIDEO$_$CLIP or VIDEO[CLIP]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers import padded, published
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.hdf5 import describe_hdf5, open_hdf5
from mmfast.data.readers.labels import outside
from mmfast.data.readers.padding import Cut, cut, span
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import CLASSIFICATION, REGRESSION
from mmfast.errors import UserError

REGRESSIONS, CLASSES = "regression_labels", "classification_labels"
CHOICES = {"M": REGRESSIONS, **{m: f"{REGRESSIONS}_{m}" for m in "TAV"}, "classification": CLASSES}
NAMES_OF_CLASSES = ("negative", "neutral", "positive")
UNIMODAL = f"{REGRESSIONS}_T"
TEXTS = {"raw_text", "id", "annotations"}
NUMBERS = {"text", "audio", "vision", "text_bert", "audio_lengths", "vision_lengths", *CHOICES.values()}


def recognises(source: Source) -> bool:
    if source.kind == "hdf5":
        try:
            keys = {key for key, *_ in describe_hdf5(source.path)}
        except UserError:
            return False
        splits: dict[str, dict] = {}
        for key in keys:
            split, _, name = key.partition("/")
            splits.setdefault(split, {})[name] = None
        return any(_is_ours(entry) for entry in padded.splits_of(splits).values())
    return padded.holds(source, _is_ours)


def _is_ours(keys) -> bool:
    return (REGRESSIONS in keys or "text_bert" in keys) and ("audio" in keys or "vision" in keys)


@dataclass
class _Split:
    """One split as it stands in the file; real is which of the (N, L) steps of a modality are not padding."""

    key: str
    entry: Mapping[str, Any]
    arrays: dict[str, np.ndarray]
    keys: dict[str, str]
    filled: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None
    real: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[int, str]:
        return len(next(iter(self.arrays.values()))), next(iter(self.keys.values()))


def read(source: Source, options: Options) -> MultimodalData:
    """All splits.

    Real steps of text are where the mask is 1, and those of audio and vision too in files without lengths. Lengths
    count from the side where most samples have no zeros. Where there is neither, zeros at both ends are cut. A
    modality that is zero throughout a sample is missing there.

    Args:
        options: `labels` M (default), T, A, V, "all" (M, T, A, V), or "classification".

    Raises:
        UserError: arrays, lengths, masks or labels that do not fit together.
    """
    path = source.path
    content = _hdf5(path) if source.kind == "hdf5" else source.object()
    warnings: list[str] = []
    entries = padded.by_split(path, padded.splits_of(content))
    splits = {s: _split(path, key, entry, warnings) for s, (key, entry) in entries.items()}
    side = _sides(splits.values())
    is_aligned = not any(split.lengths for split in splits.values())
    for split in splits.values():
        split.real = _real(split, side, is_aligned)
    labels, about = _labels(path, splits, options.labels)
    parts, spans = {}, Cut()
    for name, split in splits.items():
        spans += cut(list(split.real.values()))
        parts[name] = _part(path, split, labels.get(name), warnings)
    sizes = [
        len(parts[s].labels) for s in ("train", "valid", "test") if s in parts and parts[s].labels is not None
    ]
    kind = "MMSA HDF5 file" if source.kind == "hdf5" else "MMSA pickle"
    about["warnings"] = [*warnings, *about.get("warnings", ()), *padded.left_out(content)]
    return assemble(
        path,
        parts,
        layout=f"{kind}, {'aligned' if is_aligned else 'not aligned'}",
        name=published.corpus(sizes),
        padding=str(spans),
        **about,
    )


def contents(source: Source) -> Contents:
    return describe_hdf5(source.path) if source.kind == "hdf5" else padded.contents(source)


def _hdf5(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that are read, as a pickle would hold them."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with open_hdf5(path) as file:
        for key, array in file.arrays().items():
            split, _, name = key.partition("/")
            if name in TEXTS | NUMBERS:
                found.setdefault(split, {})[name] = file.read(key, array)
    return found


def _split(path: Path, key: str, entry: Mapping[str, Any], warnings: list[str]) -> _Split:
    arrays, keys = padded.arrays(path, key, entry)
    split = _Split(key, entry, arrays, keys, {m: (a != 0).any(-1) for m, a in arrays.items()})
    for modality, name in keys.items():
        if entry.get(f"{name}_lengths") is not None:
            split.lengths[modality] = _lengths(path, split, modality, f"{key}.{name}_lengths", warnings)
    if entry.get("text_bert") is not None:
        split.tokens, split.mask = _bert(f"{path}: {key}.text_bert", entry["text_bert"], split)
    return split


def _lengths(path: Path, split: _Split, modality: str, where: str, warnings: list[str]) -> np.ndarray:
    steps = split.arrays[modality].shape[1]
    given = padded.label_array(
        f"{path}: {where}", split.entry[f"{split.keys[modality]}_lengths"], *split.rows
    )
    lengths = given.reshape(len(given), -1) if len(given) else np.zeros((0, 1))
    wrong = ~((lengths >= 0) & (lengths == np.floor(lengths)) & np.isfinite(lengths))
    if lengths.shape[1] != 1 or wrong.any():
        got = f"shape {given.shape}" if lengths.shape[1] != 1 else f"{lengths[wrong][0]:g}"
        raise UserError(f"{path}: {where} must be one whole number a sample, 0 or more, got {got}")
    if beyond := int((lengths > steps).sum()):
        warnings.append(
            f"{where} exceed the {steps} steps in {beyond} samples, whose steps were cut before: clipped"
        )
    return np.minimum(lengths[:, 0], steps).astype(np.int64)


def _bert(where: str, value: Any, split: _Split) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) ids of tokens, and where they are."""
    value = padded.plain(where, value)
    is_numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    if not is_numbers or value.ndim != 3 or value.shape[1] != 3:
        got = value.shape if is_numbers else type(value).__name__
        raise UserError(f"{where} must be numbers (N, 3, L), got {got}")
    if len(value) != split.rows[0]:
        raise UserError(f"{where} must have {split.rows[0]} rows as {split.rows[1]}, got {len(value)}")
    ids, mask = value[:, 0], value[:, 1]
    if not np.isin(mask, (0, 1)).all():
        odd = mask[~np.isin(mask, (0, 1))].flat[0]
        raise UserError(f"{where} must have a mask of 0 and 1 in its second row, got {odd:g}")
    here = ids[mask == 1].astype(np.float64)
    wrong = here[~((here >= 0) & (here < 2**31) & (here == np.floor(here)))]
    if wrong.size:
        raise UserError(
            f"{where} must have ids of tokens in its first row, whole numbers from 0, got {wrong[0]:g}"
        )
    return ids, mask == 1


def _sides(splits) -> dict[str, str]:
    """Modality -> side of the padding: back, unless most padded samples are zero first and not last."""
    votes: dict[str, list[np.ndarray]] = {}
    for split in splits:
        for modality, lengths in split.lengths.items():
            filled = split.filled[modality]
            padded_ = (lengths < filled.shape[1]) & filled.any(1)
            votes.setdefault(modality, []).append((~filled[:, 0] & filled[:, -1])[padded_])
    found = {m: np.concatenate(v) for m, v in votes.items()}
    return {m: "front" if v.size and v.mean() > 0.5 else "back" for m, v in found.items()}


def _real(split: _Split, side: Mapping[str, str], is_aligned: bool) -> dict[str, np.ndarray]:
    """Modality -> (N, L) bool."""
    real = {}
    for modality, lengths in split.lengths.items():
        steps = split.filled[modality].shape[1]
        position = np.arange(steps)
        real[modality] = position < lengths[:, None]
        if side[modality] == "front":
            real[modality] = position >= steps - lengths[:, None]
    if split.mask is not None:
        for modality in split.arrays.keys() - real.keys():
            fits = split.filled[modality].shape[1] == split.mask.shape[1]
            if fits and (is_aligned or modality == "text"):
                real[modality] = split.mask
    rest = [m for m in split.arrays if m not in real]
    if len({split.filled[m].shape[1] for m in rest}) == 1 and is_aligned:
        together = span(np.logical_or.reduce([split.filled[m] for m in rest]))
        return real | dict.fromkeys(rest, together)
    return real | {m: span(split.filled[m]) for m in rest}


def _part(path: Path, split: _Split, labels, warnings: list[str]) -> Part:
    values, lengths = {}, {}
    for modality, array in split.arrays.items():
        filled, real = split.filled[modality], split.real[modality]
        name = f"{split.key}.{split.keys[modality]}"
        if cut_off := int((filled & ~real).any(1).sum()):
            warnings.append(
                f"{name} has steps that are not zero beyond its length or mask in {cut_off} samples: cut"
            )
        if absent := int((real.any(1) & ~filled.any(1)).sum()):
            warnings.append(f"{name} is zero at every step in {absent} samples: missing there")
        real = real & filled.any(1, keepdims=True)
        values[modality], lengths[modality] = array[real], real.sum(1)
    entry, tokens, names, groups = split.entry, None, None, {}
    if split.tokens is not None:
        tokens = [ids[mask].astype(np.int32) for ids, mask in zip(split.tokens, split.mask, strict=True)]
    if entry.get("id") is not None:
        names, groups = padded.names(f"{path}: {split.key}.id", entry["id"], *split.rows)
    texts = entry.get("raw_text")
    if texts is not None:
        texts = padded.strings(f"{path}: {split.key}.raw_text", texts, *split.rows)
    return Part(values, labels, names, lengths, groups, transcripts=texts, tokens=tokens)


def _labels(path: Path, splits: Mapping[str, _Split], choice: str | None):
    """Split -> labels, and task, targets, label_range and warnings."""
    known = [*CHOICES, "all"]
    if choice is not None and choice not in known:
        raise UserError(f"{path}: --labels must be one of {', '.join(known)}, got {choice!r}")
    if choice is None:
        held = [c for c in ("M", "classification") if any(CHOICES[c] in s.entry for s in splits.values())]
        if not held:
            return {}, {"task": REGRESSION, "warnings": ["no labels in the file"]}
        choice = held[0]
    columns = [_column(path, splits, CHOICES[c]) for c in ("MTAV" if choice == "all" else [choice])]
    if choice == "classification":
        for split, part in columns[0].items():
            odd = part[~np.isnan(part) & ~np.isin(part, range(len(NAMES_OF_CLASSES)))]
            if odd.size:
                raise UserError(f"{path}: {splits[split].key}.{CLASSES} must be 0, 1 or 2, got {odd[0]:g}")
        return columns[0], {"task": CLASSIFICATION, "targets": NAMES_OF_CLASSES}
    labels = {s: np.stack([c[s] for c in columns], 1) if len(columns) > 1 else columns[0][s] for s in splits}
    label_range = (-1.0, 1.0) if any(UNIMODAL in s.entry for s in splits.values()) else (-3.0, 3.0)
    everything = np.concatenate([part.reshape(-1) for part in labels.values()])
    about = {"task": REGRESSION, "label_range": label_range, "warnings": outside(everything, label_range)}
    return labels, about | ({"targets": tuple("MTAV")} if choice == "all" else {})


def _column(path: Path, splits: Mapping[str, _Split], key: str) -> dict[str, np.ndarray]:
    """Split -> (N,) numbers."""
    given = {}
    for name, split in splits.items():
        if key not in split.entry:
            held = [k for k in split.entry if isinstance(k, str) and "labels" in k]
            raise UserError(f"{path}: {split.key} must hold {key}, got {', '.join(held[:6]) or 'no labels'}")
        given[name] = f"{split.key}.{key}", split.entry[key]
    labels, _ = padded.labels_of(path, given, {name: split.rows for name, split in splits.items()})
    if any(part.ndim > 1 for part in labels.values()):
        raise UserError(f"{path}: {given[next(iter(given))][0]} must be one number a sample, got several")
    return labels


FORMAT = Format(
    "an MMSA pickle (regression_labels, text_bert)", recognises, read, contents, frozenset({"labels"})
)
