"""Computational sequences of CMU-MultimodalSDK (.csd): a folder of them, or one file.

Source: CMU-MultiComp-Lab/CMU-MultimodalSDK, `mmdatasdk/computational_sequence`, `mmdatasdk/dataset/dataset.py`. Each
row of the file of labels is a segment of a video, and a sample; of the other files it gets the rows that overlap it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmfast.data.corpus import MultimodalData
from mmfast.data.options import Options
from mmfast.data.readers.folds import standard_folds
from mmfast.data.readers.format import Contents, Format
from mmfast.data.readers.hdf5 import open_hdf5
from mmfast.data.readers.intervals import averages, last, overlapping
from mmfast.data.readers.labels import columns, outside
from mmfast.data.readers.parts import Part, assemble
from mmfast.data.readers.sequences import CORPUS, NAMES, Sequence, root_of
from mmfast.data.source import HDF5, Source, regular
from mmfast.errors import UserError

MODALITIES = ("text", "audio", "visual")
PAUSE = "sp"


@dataclass
class Segments:
    """The samples: (N, 2) seconds, (N, K) labels, names, and the samples of each video, one after another."""

    spans: np.ndarray
    labels: np.ndarray
    names: list[str]
    videos: dict[str, slice]


def is_csd(source: Source) -> bool:
    """Whether the file, or one at least in the folder, has one root group that holds `data`."""
    return any(_has_root(source, name) for name in _names(source))


def _names(source: Source) -> list[str]:
    if not source.is_folder:
        return [""] if source.kind == "hdf5" else []
    return [name for name in source.files if "/" not in name and _is_hdf5(source, name)]


def _is_hdf5(source: Source, name: str) -> bool:
    try:
        with source.file(name).open("rb") as file:
            return file.read(len(HDF5)) == HDF5
    except (UserError, OSError):
        return False


def _has_root(source: Source, name: str) -> bool:
    try:
        with open_hdf5(source.file(name) if name else source.path) as file:
            return root_of(file) is not None
    except UserError:
        return False


def _sequences(source: Source) -> list[Sequence]:
    if source.is_folder:
        for name in source.files:
            if name.endswith(".csd") and "/" not in name and not _is_hdf5(source, name):
                raise UserError(f"{source.file(name)}: must be HDF5 as its name says, got something else")
    paths = [source.file(name) if name else regular(source.path) for name in _names(source)]
    return [found for path in paths if (found := Sequence.find(path)) is not None]


def contents(source: Source) -> Contents:
    """One row a file: its root, how many videos, and the shape of all their rows together."""
    return [sequence.about() for sequence in _sequences(source)]


def read_csd(source: Source, options: Options) -> MultimodalData:
    """Read a folder of computational sequences.

    Without `align`, every modality is cut by the segment and keeps its own rate. With it, the rows of one of them
    ("text", or "words", which also stand in for text) are the steps, and the others get the mean of their rows that
    overlap a step by more than 1e-5 s, NaN where none does. What no row of a segment overlaps is missing there.
    """
    path, warnings = source.path, []
    roles = _roles(source, options, warnings)
    labels = roles.pop("labels", None)
    if labels is None:
        raise UserError(
            f"{path}: must hold labels, whose rows are the segments, got {_listed(roles.values())}"
        )
    if not roles:
        found = f"{labels.root}: {len(labels.videos):,} videos, {labels.rows():,} segments"
        raise UserError(f"{path}: holds labels only ({found}); features are wanted beside them")
    segments = _segments(labels, roles, warnings)
    reference = _reference(path, roles, options.align)
    steps = _steps(segments, reference) if reference else None
    values, found = {}, {}
    for role, sequence in sorted(roles.items()):
        cut = _words if role == "words" else _features
        items = cut(segments, sequence, steps)
        if role == "words":
            found["words"] = items
        else:
            values[role] = items
    for sequence in roles.values():
        if sequence.skipped:
            warnings.append(
                f"{sequence.root}: {sequence.skipped:,} intervals that end no later than they start, skipped"
            )
    if "words" in roles:
        without = sum(all(word == PAUSE for word in words) for words in found["words"])
        warnings += [f"{without:,} of {len(segments.names):,} segments have no word; kept"] if without else []
    if steps is not None and (none := sum(not len(s) for s in steps)):
        warnings.append(f"{none:,} segments have no row of {reference.root}, and so no step; kept")
    return _assembled(path, labels, segments, values, found, options, warnings)


def _roles(source: Source, options: Options, warnings: list[str]) -> dict[str, Sequence]:
    """Role -> file; what has none is left out with a warning."""
    wanted = {}
    for item in (options.modalities or "").split(","):
        name, _, root = item.strip().partition("=")
        if name:
            wanted[name.strip()] = root.strip()
    sequences, roles = _sequences(source), {}
    by_root = {s.root.lower(): s for s in sequences}
    for name, root in wanted.items():
        if root and root.lower() not in by_root:
            raise UserError(f"{source.path}: {name} must be one of {_listed(sequences)}, got {root!r}")
    for sequence in sequences:
        named = [n for n, root in wanted.items() if root and by_root[root.lower()] is sequence]
        role = named[0] if named else sequence.role
        if role is None:
            warnings.append(
                f"{sequence.root} is of no known kind, left out; --modalities NAME={sequence.root} takes it"
            )
        elif role and (named or not wanted.get(role)):
            if role in roles:
                others = f"{roles[role].root}, {sequence.root}"
                raise UserError(
                    f"{source.path}: {role} must be one file, got {others}; say which, as in --modalities "
                    f"{role}={sequence.root}"
                )
            roles[role] = sequence
    kept = {"labels", "words", *wanted}
    for name in wanted:
        if name not in roles:
            known = ", ".join(sorted(roles.keys() - {"labels", "words"}))
            raise UserError(f"{source.path}: modalities must be among {known}, got {name!r}")
    return {role: s for role, s in roles.items() if not wanted or role in kept}


def _listed(sequences) -> str:
    return ", ".join(s.root for s in sequences) or "nothing"


def _segments(labels: Sequence, roles: dict[str, Sequence], warnings: list[str]) -> Segments:
    spans, values, names, videos = [], [], [], {}
    lost = [video for video in labels.videos if not any(video in s.videos for s in roles.values())]
    with labels.opened() as file:
        for video in labels.videos:
            if video in lost:
                continue
            rows = labels.read(file, video, as_filed=True)
            if rows.features.dtype.kind not in "biuf":
                raise UserError(f"{labels.path}: {labels.root} must hold numbers, got text")
            own = rows.keys.all() and len(set(rows.keys)) == len(rows.keys)
            videos[video] = slice(len(names), len(names) + len(rows.intervals))
            names += list(rows.keys) if own else [f"{video}[{i}]" for i in range(len(rows.intervals))]
            spans.append(rows.intervals)
            values.append(rows.features)
    if lost:
        warnings.append(f"{len(lost):,} videos of which no other file knows are left out with their segments")
    width = {value.shape[1] for value in values if len(value)}
    if len(width) != 1:
        got = f"{sorted(width)} columns" if width else "none"
        raise UserError(f"{labels.path}: {labels.root} must hold labels of one width, got {got}")
    filled, spans = [value for value in values if len(value)], np.concatenate(spans)
    if wrong := int((~last(spans)).sum()):
        warnings.append(f"{wrong:,} segments end no later than they start, and so have no step; kept")
    return Segments(spans, np.concatenate(filled).astype(np.float64), names, videos)


def _reference(path, roles: dict[str, Sequence], align: str | None) -> Sequence | None:
    """The file whose rows are the steps."""
    if align is None:
        return None
    name = "words" if align == "text" and "text" not in roles else align
    if name not in roles:
        raise UserError(f"{path}: align must be one of {', '.join(sorted(roles))}, got {align!r}")
    return roles[name]


def _steps(segments: Segments, reference: Sequence) -> list[np.ndarray]:
    """(n, 2) seconds of the steps of each sample."""
    steps = [np.zeros((0, 2))] * len(segments.names)
    with reference.opened() as file:
        for video, samples in segments.videos.items():
            if video in reference.videos:
                rows = reference.read(file, video)
                counts, index = _overlapping(reference, segments.spans[samples], rows.intervals)
                file.allowance.take(video, len(index) * 16)
                steps[samples] = np.split(rows.intervals[index], np.cumsum(counts)[:-1])
    reference.skipped = 0
    return steps


def _overlapping(sequence: Sequence, spans: np.ndarray, rows: np.ndarray):
    try:
        return overlapping(spans, rows)
    except ValueError as error:
        raise UserError(f"{sequence.path}: intervals must follow one another, got {error}") from None


def _features(segments: Segments, sequence: Sequence, steps) -> list[np.ndarray]:
    """(n, F) of each sample, (0, F) where it has none."""
    none = np.zeros((0, 0), np.float32)
    items, width = [none] * len(segments.names), None
    with sequence.opened() as file:
        for video, samples in segments.videos.items():
            if video not in sequence.videos:
                continue
            rows = sequence.read(file, video)
            features = rows.features.astype(np.float32)
            if len(features) and width not in (None, features.shape[1]):
                raise UserError(
                    f"{sequence.path}: {sequence.root} must have {width} features in all videos, "
                    f"got {features.shape[1]} in {video}"
                )
            width = features.shape[1] if len(features) else width
            counts, index = _overlapping(sequence, segments.spans[samples], rows.intervals)
            if steps is None:
                file.allowance.take(video, len(index) * features.shape[1] * 4)
                items[samples] = np.split(features[index], np.cumsum(counts)[:-1])
                continue
            spans = steps[samples]
            file.allowance.take(video, sum(map(len, spans)) * features.shape[1] * 4)
            try:
                means = averages(np.concatenate(spans), rows.intervals, features)
            except ValueError as error:
                raise UserError(f"{sequence.path}: intervals must follow one another, got {error}") from None
            split = np.split(means, np.cumsum([len(s) for s in spans])[:-1])
            items[samples] = [m if count else none for m, count in zip(split, counts, strict=True)]
    return items


def _words(segments: Segments, sequence: Sequence, steps) -> list[list[str]]:
    """The words of each sample, one a step where there are steps."""
    items: list[list[str]] = [[] for _ in segments.names]
    with sequence.opened() as file:
        for video, samples in segments.videos.items():
            if video not in sequence.videos:
                if steps is not None:
                    items[samples] = [[PAUSE] * len(s) for s in steps[samples]]
                continue
            rows = sequence.read(file, video)
            words = rows.features[:, 0] if len(rows.features) else np.zeros(0, object)
            if steps is None:
                counts, index = _overlapping(sequence, segments.spans[samples], rows.intervals)
                file.allowance.take(video, len(index) * 8)
                items[samples] = [part.tolist() for part in np.split(words[index], np.cumsum(counts)[:-1])]
                continue
            spans = steps[samples]
            counts, index = _overlapping(sequence, np.concatenate(spans), rows.intervals)
            # Of several words the first in the step; features of words have their very intervals.
            first = np.full(len(counts), PAUSE, object)
            first[counts > 0] = words[index[(np.cumsum(counts) - counts)[counts > 0]]]
            items[samples] = [
                part.tolist() for part in np.split(first, np.cumsum([len(s) for s in spans])[:-1])
            ]
    return items


def _assembled(path, labels, segments, values, found, options, warnings) -> MultimodalData:
    names = labels.metadata.get(NAMES)
    names = names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
    corpus = labels.metadata.get(CORPUS)
    corpus = corpus if isinstance(corpus, str) and corpus else path.resolve().stem
    about = columns(f"{path}: labels", segments.labels, names, options.labels)
    if "label_range" in about:
        of_mosi = "mos" in corpus.lower() or segments.labels.shape[1] == 7
        about["label_range"] = (-3.0, 3.0) if of_mosi else about["label_range"]
        warnings += outside(about["labels"], about["label_range"])
    video_of = [video for video, s in segments.videos.items() for _ in range(s.stop - s.start)]
    folds = standard_folds(segments.videos)
    splits = [folds[1].get(video, "") if folds else "all" for video in video_of]
    if folds:
        left = splits.count("")
        warnings.append(
            f"split by the standard folds of {folds[0]}"
            + (f"; {left:,} segments in none left out" if left else "")
        )
    all_labels = about.pop("labels")
    parts = {}
    for split in dict.fromkeys(filter(None, splits)):
        rows = [i for i, s in enumerate(splits) if s == split]
        parts[split] = Part(
            values={m: [items[i] for i in rows] for m, items in values.items()},
            labels=all_labels[rows],
            names=[segments.names[i] for i in rows],
            groups={"video": [video_of[i] for i in rows]},
            words=[found["words"][i] for i in rows] if "words" in found else None,
        )
    return assemble(
        path,
        parts,
        layout="computational sequences of CMU-MultimodalSDK (.csd)",
        name=corpus,
        warnings=warnings,
        padding="none, stored without",
        **about,
    )


FORMAT = Format(
    "a folder of CMU-MultimodalSDK's .csd files",
    is_csd,
    read_csd,
    contents,
    frozenset({"labels", "modalities", "align"}),
)
