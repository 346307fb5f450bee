"""Pickles of the Multimodal Transformer (MulT) and of MultiBench: splits of padded arrays with `labels`.

Layout: yaohungt/Multimodal-Transformer `src/dataset.py`; pliang279/MultiBench `datasets/affect/get_data.py`.

    SPLIT/text, audio, vision    (N, L, F) numbers, zeros in front of short samples; audio may hold -inf. One L
                                 for all modalities says that they are aligned
    SPLIT/labels                 (N, 1, 1), (N, 1) or (N,) numbers; IEMOCAP (N, 4, 2): each emotion absent or present
    SPLIT/id                     (N, 3) video, start, end; (N, 1) or (N,); none in IEMOCAP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers import padded, tailor
from mmfast.data.readers.format import Format
from mmfast.data.readers.labels import outside, range_of, two_classes
from mmfast.data.readers.padding import Cut, unpad
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import CLASSIFICATION, MULTILABEL, REGRESSION
from mmfast.errors import UserError

MODALITIES = {"text", "audio", "vision"}
EMOTIONS = ("neutral", "happy", "sad", "angry")
SENTIMENT = (-3.0, 3.0)
# A few labels of MOSEI lie beyond 3 (10/3, 11/3, 5); where more do, they are no sentiment.
WITHIN = 0.9


def recognises(source: Source) -> bool:
    return padded.holds(source, lambda keys: "labels" in keys and keys & MODALITIES)


def read(source: Source, options: Options) -> MultimodalData:
    """All splits; the steps cut are those that are zero at both ends (see `padding.unpad`).

    Labels are numbers, of sentiment in [-3, 3] unless more than a tenth lies outside. `labels="classification"`
    makes two classes of {0, 1} or {-1, 1} (humor, sarcasm). `labels_from` names a TAILOR file with emotions of the
    same samples.

    Raises:
        UserError: arrays that do not fit together, or labels that are none of these.
    """
    path, content = source.path, source.object()
    splits = padded.by_split(path, padded.splits_of(content))
    arrays, keys = {}, {}
    for split, (key, entry) in splits.items():
        arrays[split], keys[split] = padded.arrays(path, key, entry)
    aligned = all(len({a.shape[1] for a in found.values()}) == 1 for found in arrays.values())
    rows = {s: (len(next(iter(found.values()))), next(iter(keys[s].values()))) for s, found in arrays.items()}
    labels, about = _labels(source, options, splits, rows)
    parts, cut = {}, Cut()
    for split, (key, entry) in splits.items():
        values, lengths, here = unpad(arrays[split], aligned)
        cut += here
        names, groups = None, {}
        if entry.get("id") is not None:
            names, groups = padded.names(f"{path}: {key}.id", entry["id"], *rows[split])
        parts[split] = Part(values, labels[split], names, lengths, groups)
    about["warnings"] = [*about.get("warnings", ()), *padded.left_out(content)]
    layout = f"MulT pickle, {'aligned' if aligned else 'not aligned'}"
    return assemble(path, parts, layout=layout, padding=str(cut), **about)


def _labels(source: Source, options: Options, splits, rows) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Split -> labels, and task, targets, label_range and warnings."""
    path = source.path
    if options.labels not in (None, "classification"):
        raise UserError(f"{path}: --labels must be classification or left out, got {options.labels!r}")
    if options.labels_from is not None:
        if options.labels is not None:
            raise UserError(f"{path}: --labels must be left out with --labels-from, got {options.labels!r}")
        return _emotions_of(path, options.labels_from, splits, rows)
    for key, entry in splits.values():
        if "labels" not in entry:
            raise UserError(f"{path}: {key} must hold labels, got {padded.few(entry)}")
    given = {split: (f"{key}.labels", entry["labels"]) for split, (key, entry) in splits.items()}
    arrays = {s: padded.label_array(f"{path}: {key}", value, *rows[s]) for s, (key, value) in given.items()}
    if options.labels is None and all(
        a.ndim == 3 and a.shape[1:] != (1, 1) and a.shape[2] == 2 for a in arrays.values()
    ):
        return _present(path, given, arrays)
    labels, task = padded.labels_of(path, {s: (given[s][0], a) for s, a in arrays.items()}, rows)
    known = np.concatenate([part.reshape(-1) for part in labels.values()])
    known = known[~np.isnan(known)]
    if options.labels == "classification" and task == REGRESSION:
        joint = two_classes(f"{path}: labels", np.concatenate(list(labels.values())))
        return padded.apart(joint, labels), {"task": CLASSIFICATION, "targets": ("class 0", "class 1")}
    if task == CLASSIFICATION:
        count = next(a.shape[1] for a in arrays.values() if a.ndim > 1)
        return labels, {"task": CLASSIFICATION, "targets": tuple(f"class {k}" for k in range(count))}
    several = next(iter(labels.values())).ndim > 1
    within = (np.abs(known) <= SENTIMENT[1]).mean() if known.size else 1.0
    sentiment = within >= WITHIN and not several
    label_range = SENTIMENT if sentiment else range_of(known)
    return labels, {"task": REGRESSION, "label_range": label_range, "warnings": outside(known, label_range)}


def _present(path: Path, given, arrays) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(N, K, 2): whether each of K labels is absent or present."""
    columns = {a.shape[1] for a in arrays.values()}
    if len(columns) > 1:
        found = " and ".join(str(a.shape) for a in arrays.values())
        raise UserError(f"{path}: {given[next(iter(given))][0]} must have one K in all splits, got {found}")
    labels = {s: np.where(np.isnan(a).any(-1), np.nan, a.argmax(-1)) for s, a in arrays.items()}
    targets = EMOTIONS if columns == {len(EMOTIONS)} else tuple(f"label{k}" for k in range(columns.pop()))
    return labels, {"task": MULTILABEL, "targets": targets}


def _emotions_of(path: Path, file: str, splits, rows) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The emotions of another file, row by row."""
    other = Source(file)
    emotions = tailor.emotions(other, {split: (n, f"{path.name} has") for split, (n, _) in rows.items()})
    return emotions, {"task": MULTILABEL, "targets": tailor.EMOTIONS}


FORMAT = Format(
    "a MulT pickle (train, valid, test of text, audio, vision and labels)",
    recognises,
    read,
    padded.contents,
    frozenset({"labels", "labels_from"}),
)
