"""A look at data before any training: sizes, lengths, gaps, broken cells, labels, traps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmfast.data.combine import distinct
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.inspection import facts, text, traps
from mmfast.data.inspection.facts import (
    NAMED,
    Found,
    Histogram,
    LabelReport,
    ModalityReport,
    SplitReport,
)
from mmfast.data.load import load, recognise
from mmfast.data.readers import published
from mmfast.data.source import Source
from mmfast.errors import UserError

__all__ = ["Found", "Histogram", "Inspection", "LabelReport", "ModalityReport", "SplitReport", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `str()` of it is for people, `json()` for programs.

    Attributes:
        source: the path, or "synthetic".
        layout: of the files, and by what it was known.
        name: of the corpus.
        task, targets: what the labels are, and the names of their columns or classes.
        label_range: smallest and largest possible number; None for other tasks.
        aligned: whether in every sample all modalities that are there have one length.
        misaligned: names of the first ten samples in which they have not.
        padding: in the files.
        contents: (key, shape, dtype) of every array in the files.
        groups: kind of group -> group -> its samples.
        splits: split that holds samples -> its report.
        warnings: what is legal, and makes results wrong or not comparable.
        fingerprint: of the contents, whatever the layout.
    """

    source: str
    layout: str
    name: str
    task: str
    targets: tuple[str, ...]
    label_range: tuple[float, float] | None
    aligned: bool
    misaligned: tuple[str, ...]
    padding: str
    contents: list[tuple[str, tuple[int, ...], str]]
    groups: dict[str, dict[str, int]]
    splits: dict[str, SplitReport]
    warnings: tuple[str, ...]
    fingerprint: str

    def text(self, width: int = 100, bars: str = text.BARS) -> str:
        """For people, in lines of at most `width` columns; `bars` are eight characters of growing height."""
        writer = text.Writer(width, bars)
        text.write(self, writer)
        return "\n".join(writer.lines)

    def __str__(self) -> str:
        return self.text()

    def json(self) -> dict[str, Any]:
        """Plain values for programs; what is undefined is NaN, which `mmfast inspect --json` writes as null.

        The keys are a promise: layout, name, task, targets, label_range, aligned, misaligned (names, at most ten),
        padding, fingerprint, warnings, groups {G: {value: count}} and splits {S: {samples, labelled, labels {min,
        mean, max}, modalities {M: {features, missing (share), lengths {min, median, max} over the samples that have
        it, 0 if none has, nan, inf, constant [..]}}}}, S being a split that holds samples.
        """
        same = ("layout", "name", "task", "targets", "label_range", "aligned", "misaligned", "padding")
        told = {name: getattr(self, name) for name in (*same, "fingerprint", "warnings", "groups")}
        return {**told, "splits": {name: _split_json(report) for name, report in self.splits.items()}}


def inspect(source, verify: bool = False, **options) -> Inspection:
    """Look at "synthetic" or at a path, in any layout that `load` reads and with its `options`.

    Args:
        verify: whether fingerprints that are stored in the file are compared with its values.

    Raises:
        UserError: as `load`; values that are not those of the stored fingerprints.
    """
    place, contents, said = source, [], ""
    if source != "synthetic":
        place = Source(source)
        kind = recognise(place)
        contents = kind.contents(place)
        said = f" ({place.path.name})"
        if place.kind == "pickle":
            said += f", {published.told(place.path)}"
    data = load(place, **options)
    if verify:
        _verify(str(source), data)
    parts = _parts(data)
    splits = {name: facts.report(part, data.label_range) for name, part in parts.items()}
    names = [name for report in splits.values() for name in report.unaligned.names]
    return Inspection(
        source=str(source),
        layout=f"{data.layout or 'data'}{said}",
        name=data.name,
        task=data.task,
        targets=data.targets,
        label_range=data.label_range,
        aligned=not names,
        misaligned=tuple(dict.fromkeys(names))[:NAMED],
        padding=data.padding,
        contents=contents,
        groups=facts.group_counts(distinct(data)),
        splits=splits,
        warnings=tuple(dict.fromkeys([*data.warnings, *traps.traps(data, splits, "split" in options)])),
        fingerprint=data.fingerprint(),
    )


def _parts(data: MultimodalData) -> dict[str, MultimodalDataset]:
    """The splits to report on: those with samples, a pool that is the training split not twice."""
    return {name: d for name, d in data.datasets().items() if name != "unlabelled" or d is not data.train}


def _verify(source: str, data: MultimodalData) -> None:
    for split, part in _parts(data).items():
        other = part.fingerprints() != part.computed_fingerprints()
        if other.any():
            samples = traps.few("sample", facts.found(part, other))
            raise UserError(
                f"{source}: {split} must hold the values of its fingerprints, got others in {samples}"
            )


def _split_json(report: SplitReport) -> dict[str, Any]:
    return {
        "samples": report.samples,
        "labelled": report.labelled,
        "labels": {"min": report.labels.low, "mean": report.labels.mean, "max": report.labels.high},
        "modalities": {
            modality: {
                "features": m.features,
                "missing": m.missing,
                "lengths": {"min": m.shortest, "median": m.median, "max": m.longest},
                "nan": m.nan,
                "inf": m.inf,
                "constant": m.constant,
            }
            for modality, m in report.modalities.items()
        },
    }
