"""Pickles of MISA and of MAG-BERT: splits that are lists of tuples, one a segment, visual before acoustic.

Layout: declare-lab/MISA `src/create_dataset.py`, a folder with train.pkl, dev.pkl and test.pkl; WasifurRahman/
BERT_multimodal_transformer `multimodal_driver.py`, one dict of train, dev and test.

    ((words, VISUAL, ACOUSTIC), label, segment)             MAG-BERT: words are strings
    ((words, VISUAL, ACOUSTIC, strings), label, segment)    MISA: words are numbers in a table of its own

VISUAL and ACOUSTIC are (n, F), one step a word, z-normalised in each sample; empty ones occur. The label is (1, 1),
of UR-FUNNY 0 or 1.
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
from mmfast.data.readers.labels import columns, two_classes
from mmfast.data.readers.parts import SPLIT_NAMES, Part, assemble
from mmfast.data.source import Source
from mmfast.data.targets import CLASSIFICATION
from mmfast.errors import UserError

ONLY_NUMBERS = "text is numbers of words in a table that is not in these files, and is left out"


def recognises(source: Source) -> bool:
    if not source.is_folder and source.kind not in ("pickle", "torch"):
        return False
    try:
        return _is_sample(clips.first_sample(_splits(source)))
    except UserError:
        # Of a folder no other layout has such files, and reading says what is wrong with them.
        return source.is_folder


def _files(source: Source) -> list[str]:
    """Names of the pickles in a folder that are called as a split."""
    try:
        names = [name for name in source.files if "/" not in name and Path(name).stem in SPLIT_NAMES]
    except UserError:
        return []
    return [name for name in names if _is_pickle(source, name)]


def _is_pickle(source: Source, name: str) -> bool:
    try:
        return source.inside(name).kind == "pickle"
    except UserError:
        # What leads out of the folder is told of by reading.
        return name.endswith(".pkl")


def _splits(source: Source) -> clips.Splits:
    if not source.is_folder:
        return clips.splits_of(source.object())
    found = {Path(name).stem: source.inside(name).object() for name in _files(source)}
    return found if all(isinstance(samples, (list, tuple)) for samples in found.values()) else {}


def _is_sample(sample: Any) -> bool:
    return (
        isinstance(sample, (tuple, list))
        and len(sample) == 3
        and isinstance(sample[0], (tuple, list))
        and len(sample[0]) in (3, 4)
    )


def read(source: Source, options: Options) -> MultimodalData:
    """All splits, uncut. Text comes as words; `embedding` makes vectors of them.

    `labels="classification"` makes two classes of {0, 1} or {-1, 1}; others see `labels.columns`.

    Raises:
        UserError: samples that are none of these, or do not fit together; no such labels.
    """
    path = source.path
    splits = padded.by_split(path, _splits(source))
    matrices, warnings = clips.Matrices(), []
    found: dict[str, dict[str, Any]] = {}
    for split, (key, samples) in splits.items():
        arrays, spoken = [], []
        for i, sample in enumerate(samples):
            where = f"{path}: {key}[{i}]"
            if not _is_sample(sample):
                raise UserError(
                    f"{where} must be ((words, visual, acoustic), label, segment), got {padded.kind(sample)}"
                )
            words, visual, acoustic = sample[0][:3]
            read_as = {"audio": ("acoustic", acoustic), "visual": ("visual", visual)}
            arrays.append(
                {m: matrices.read(f"{where}.{name}", value) for m, (name, value) in read_as.items()}
            )
            strings = sample[0][3] if len(sample[0]) == 4 else words
            spoken.append(
                clips.words(f"{where}.words", strings)
                if clips.are_words(strings)
                else []
                if _empty(strings)
                else None
            )
        names, groups = padded.names(
            f"{path}: {key} segments", [sample[2] for sample in samples], len(samples), f"{key} has samples"
        )
        if None in spoken:
            warnings = [ONLY_NUMBERS]
        found[split] = {
            "values": clips.present(arrays),
            "names": names,
            "groups": groups,
            "words": None if None in spoken else spoken,
        }
    labels, about = _labels(path, splits, options)
    parts = {split: Part(labels=labels[split], **given) for split, given in found.items()}
    aligned = clips.aligned({split: given["values"] for split, given in found.items()})
    layout = f"MISA {'folder' if source.is_folder else 'pickle'}, {'aligned' if aligned else 'not aligned'}"
    return assemble(path, parts, layout=layout, padding="none", warnings=warnings, **about)


def _empty(words: Any) -> bool:
    return not words.size if isinstance(words, np.ndarray) else isinstance(words, (list, tuple)) and not words


def _labels(
    path: Path, splits: Mapping[str, tuple[str, Sequence]], options: Options
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Split -> labels, and task, targets and label_range."""
    samples = {split: part for split, (_, part) in splits.items()}
    table = clips.label_table(path, samples, lambda sample: sample[1])
    if options.labels == CLASSIFICATION:
        labels = two_classes(f"{path}: label", table[:, 0] if table.shape[1] == 1 else table)
        about: dict[str, Any] = {"task": CLASSIFICATION, "targets": ("class 0", "class 1")}
    else:
        about = columns(f"{path}: --labels", table, None, options.labels)
        labels = about.pop("labels")
    return padded.apart(labels, samples), about


def contents(source: Source) -> Contents:
    kinds = ("words", "visual", "acoustic", "strings")
    return clips.listed(
        _splits(source),
        lambda sample: zip(kinds, sample[0], strict=False) if _is_sample(sample) else (),
    )


FORMAT = Format(
    "a MISA folder or a MAG-BERT pickle (train, dev, test of words, visual, acoustic, label and segment)",
    recognises,
    read,
    contents,
    frozenset({"labels"}),
)
