"""Pickles of slp, of which M3's are: splits that are lists of dicts, one a segment.

Layout: georgepar/slp `slp/data/cmusdk.py`; a tuple of train, valid, test and perhaps word2idx, or a dict of splits.

    text or glove, audio, visual    (n, F) arrays or lists of n rows; padded in front to the longest, or not at all.
                                    Text may be n words in place of vectors
    raw                             list of words, not padded, `sp` a pause
    video_id, segment_id            VIDEO, VIDEO[3]
    label                           (1, 7) of CMU-MOSEI, (1, 1), (1,) or a number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers import clips, padded
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.labels import SENTIMENT, columns
from mmfast.data.readers.padding import Cut, cut, span
from mmfast.data.readers.parts import MODALITY_NAMES, Part, assemble
from mmfast.data.source import Source
from mmfast.errors import UserError

FEATURES = {"text", "glove", "audio", "acoustic", "visual", "vision"}


def recognises(source: Source) -> bool:
    if source.kind not in ("pickle", "torch"):
        return False
    try:
        first = clips.first_sample(clips.splits_of(source.object()))
    except UserError:
        return False
    return isinstance(first, dict) and "label" in first and bool(FEATURES & first.keys())


def read(source: Source, options: Options) -> MultimodalData:
    """All splits. Steps in front of `raw`'s words are cut if they are zero; without `raw`, zeros at both ends.

    Of seven labels `labels="sentiment"` is the default; others see `labels.columns`.

    Raises:
        UserError: samples that are no dicts of these, or do not fit together; no such labels.
    """
    path = source.path
    splits = padded.by_split(path, clips.splits_of(source.object()))
    matrices, removed = clips.Matrices(), Cut()
    found: dict[str, dict[str, Any]] = {}
    for split, (key, samples) in splits.items():
        arrays, spoken = [], []
        for i, sample in enumerate(samples):
            here, words = _sample(f"{path}: {key}[{i}]", sample, matrices)
            here, gone = _unpadded(here, words)
            removed += gone
            arrays.append(here)
            spoken.append(words)
        names, groups = _names(path, key, samples)
        found[split] = {
            "values": clips.present(arrays),
            "names": names,
            "groups": groups,
            "words": [words or [] for words in spoken]
            if any(words is not None for words in spoken)
            else None,
        }
    labels, about = _labels(path, splits, options)
    parts = {split: Part(labels=labels[split], **given) for split, given in found.items()}
    aligned = clips.aligned({split: given["values"] for split, given in found.items()})
    layout = f"slp pickle, {'aligned' if aligned else 'not aligned'}"
    return assemble(path, parts, layout=layout, padding=str(removed), **about)


def _sample(
    where: str, sample: Any, matrices: clips.Matrices
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Modality -> (n, F), and words or None."""
    if not isinstance(sample, dict):
        raise UserError(f"{where} must be a dict as the first sample, got {padded.kind(sample)}")
    if "label" not in sample:
        raise UserError(f"{where} must hold label, got {padded.few(sample)}")
    arrays: dict[str, np.ndarray] = {}
    words = None if sample.get("raw") is None else clips.words(f"{where}.raw", sample["raw"])
    for key, value in sample.items():
        if key not in FEATURES or value is None:
            continue
        modality = MODALITY_NAMES[key]
        if modality == "text" and clips.are_words(value):
            words = clips.words(f"{where}.{key}", value) if words is None else words
        elif modality in arrays:
            raise UserError(f"{where} must hold {modality} once, got it under two keys, one of them {key}")
        else:
            arrays[modality] = matrices.read(f"{where}.{key}", value)
    return arrays, words


def _unpadded(
    arrays: Mapping[str, np.ndarray], words: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], Cut]:
    """The real steps of one sample."""
    filled = {m: (a != 0).any(-1) for m, a in arrays.items() if len(a)}
    steps = {len(f) for f in filled.values()}
    if len(steps) == 1:
        anywhere = np.logical_or.reduce(list(filled.values()))
        ahead = len(anywhere) - len(words) if words is not None else -1
        said = np.arange(len(anywhere)) >= ahead
        real = span(anywhere[None])[0] if ahead < 0 or anywhere[:ahead].any() else said
        spans = dict.fromkeys(filled, real)
        gone = cut([real[None]])
    else:
        spans = {m: span(f[None])[0] for m, f in filled.items()}
        gone = cut([s[None] for s in _same_size(spans.values())])
    return {m: a[spans[m]] if m in spans else a for m, a in arrays.items()}, gone


def _same_size(spans) -> list[np.ndarray]:
    """The first and last step of each, which are all that `cut` looks at."""
    return [np.array([s[0], s.any(), s[-1]]) for s in spans]


def _names(path: Path, key: str, samples: Sequence[dict]) -> tuple[list[str] | None, dict[str, list[str]]]:
    """Names from the segments, or videos, that all samples tell; and the videos."""
    like = f"{key} has samples"
    told = {
        k: [sample[k] for sample in samples]
        for k in ("segment_id", "video_id")
        if samples and all(sample.get(k) is not None for sample in samples)
    }
    if not told:
        return None, {}
    first = next(iter(told))
    names, groups = padded.names(f"{path}: {key}.{first}", told[first], len(samples), like)
    if "video_id" in told:
        videos = padded.strings(f"{path}: {key}.video_id", told["video_id"], len(samples), like)
        groups = {**groups, "video": videos}
    return names, groups


def _labels(
    path: Path, splits: Mapping[str, tuple[str, Sequence[dict]]], options: Options
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Split -> labels, and task, targets and label_range."""
    samples = {split: part for split, (_, part) in splits.items()}
    table = clips.label_table(path, samples, lambda sample: sample["label"])
    chosen = None if table.shape[1] == 1 and options.labels == SENTIMENT else options.labels
    about = columns(f"{path}: --labels", table, None, chosen)
    return padded.apart(about.pop("labels"), samples), about


def contents(source: Source) -> Contents:
    return clips.listed(
        clips.splits_of(source.object()), lambda sample: sample.items() if isinstance(sample, dict) else ()
    )


FORMAT = Format(
    "an slp pickle (train, valid, test of dicts with audio, visual and label)",
    recognises,
    read,
    contents,
    frozenset({"labels"}),
)
