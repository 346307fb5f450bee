"""A look at data before any training: sizes, lengths, gaps, broken cells, labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.load import load, recognise
from mmfast.data.options import Options
from mmfast.data.source import Source
from mmfast.data.standardise import Standardiser, count_nonfinite
from mmfast.data.targets import REGRESSION, UNNAMED, presence


@dataclass(frozen=True)
class ModalityReport:
    """One modality of one split.

    Lengths are those of the samples that have it, 0 if none has. `constant` are the features with one value
    in the whole split, or no finite one.
    """

    features: int
    missing: float
    shortest: int
    median: int
    longest: int
    nan: int
    inf: int
    constant: tuple[int, ...]


@dataclass(frozen=True)
class SplitReport:
    """One split.

    Attributes:
        label_min, label_mean, label_max: of all numbers; NaN without labels, and where they are no numbers.
        histogram: counts of one number a sample, rounded to whole numbers.
        columns: of several numbers a sample, the smallest, mean and largest of each.
        counts: class or label -> its samples.
        unknown: of several numbers or labels, those that are not known in samples that have others.
        without: samples whose known labels are all absent.
        outside: names of the samples with a label outside the corpus's range.
        unaligned: names of the samples whose modalities differ in length, beside those that they lack.
        empty: names of the samples without any modality.
        blank: names of the samples with steps of a modality in which no cell is a number other than 0.
    """

    samples: int
    labelled: int
    label_min: float
    label_mean: float
    label_max: float
    histogram: dict[int, int]
    columns: dict[str, tuple[float, float, float]]
    counts: dict[str, int]
    unknown: dict[str, int]
    without: int
    outside: tuple[str, ...]
    unaligned: tuple[str, ...]
    empty: tuple[str, ...]
    blank: tuple[str, ...]
    modalities: dict[str, ModalityReport]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `str()` of it is for people.

    Attributes:
        source: the path, or "synthetic".
        name: of the corpus.
        task, targets: what the labels are, and the names of their columns or classes.
        label_range: smallest and largest possible number; None for other tasks.
        padding: side of the padding in the files.
        contents: (key, shape, dtype) of every array in the files.
        splits: split -> its report.
        shared: (split, later split) -> names in the later one of samples whose contents are in both.
        shared_groups: (split, later split) -> the groups (speakers, videos) that are in both.
    """

    source: str
    name: str
    task: str
    targets: tuple[str, ...]
    label_range: tuple[float, float] | None
    padding: str
    contents: list[tuple[str, tuple[int, ...], str]]
    splits: dict[str, SplitReport]
    shared: dict[tuple[str, str], tuple[str, ...]]
    shared_groups: dict[tuple[str, str], tuple[str, ...]]

    def __str__(self) -> str:
        kind = f"{self.task} of {', '.join(self.targets)}"
        if self.label_range is not None:
            kind = "" if self.targets == UNNAMED else f"{kind}: "
            kind += "labels in [{:g}, {:g}]".format(*self.label_range)
        lines = [f"{self.name} ({self.source})", f"{kind}; padding {self.padding}"]
        if self.contents:
            width = max(len(key) for key, _, _ in self.contents)
            lines += ["", "arrays"]
            lines += [f"  {key:<{width}}  {dtype:<8} {shape}" for key, shape, dtype in self.contents]
        for split, report in self.splits.items():
            lines += ["", *_split_lines(split, report, self.label_range)]
        if self.shared or self.shared_groups:
            lines.append("")
        for (first, second), names in self.shared.items():
            lines.append(f"{first} and {second} share {_few('sample', names)} of equal contents")
        for (first, second), names in self.shared_groups.items():
            lines.append(f"{first} and {second} share {_few('group', names)}")
        return "\n".join(lines)


def inspect(source) -> Inspection:
    """Look at "synthetic" or at a path, in any format that `load` reads.

    Raises:
        UserError: as `load`.
    """
    if source == "synthetic":
        data, contents = load(source), []
    else:
        place = Source(source)
        kind = recognise(place)
        data, contents = kind.read(place, Options()), kind.contents(place)
    padding, kind = data.padding, (data.task, data.targets, data.label_range)
    return Inspection(str(source), data.name, *kind, padding, contents, _splits(data), *_shared(data))


def _splits(data: MultimodalData) -> dict[str, SplitReport]:
    # A pool that is the training split needs no report of its own.
    splits = {n: d for n, d in data.splits().items() if n != "unlabelled" or d is not data.train}
    if data.cross_validation is not None:
        splits["cross_validation"] = data.cross_validation
    return {name: _report(dataset, data.label_range) for name, dataset in splits.items()}


def _shared(data: MultimodalData) -> tuple[dict[tuple[str, str], tuple[str, ...]], ...]:
    """What two splits have in common: contents, groups."""
    samples, groups = {}, {}
    # Not the pool: it may hold what is left of the others.
    for first, second in combinations(("train", "valid", "test"), 2):
        a, b = getattr(data, first), getattr(data, second)
        samples[first, second] = _names(b, b.among(a.fingerprints()))
        of_a, of_b = a.groups, b.groups
        common = {name for kind in of_a.keys() & of_b.keys() for name in {*of_a[kind]} & {*of_b[kind]}}
        groups[first, second] = tuple(sorted(common))
    return tuple({pair: names for pair, names in found.items() if names} for found in (samples, groups))


def _names(dataset: MultimodalDataset, mask: Tensor) -> tuple[str, ...]:
    return tuple(dataset.names[i] for i in torch.nonzero(mask).flatten().tolist())


def _span(labels: Tensor) -> tuple[float, float, float]:
    """Smallest, mean and largest of the numbers that are known, NaN without any."""
    known = labels[~labels.isnan()]
    return tuple(float(f(known)) if len(known) else math.nan for f in (torch.min, torch.mean, torch.max))


def _labels(dataset: MultimodalDataset, label_range: tuple[float, float] | None) -> dict[str, Any]:
    labels, labelled = dataset.labels, dataset.labelled()
    found = dict.fromkeys(("label_min", "label_mean", "label_max"), math.nan)
    found |= {"histogram": {}, "columns": {}, "counts": {}, "unknown": {}, "without": 0, "outside": ()}
    if dataset.task == REGRESSION:
        found |= dict(zip(("label_min", "label_mean", "label_max"), _span(labels), strict=True))
        outside = (labels < label_range[0]) | (labels > label_range[1])
        found["outside"] = _names(dataset, outside.reshape(len(dataset), -1).any(1))
    else:
        there = presence(dataset).sum(0).tolist()
        found["counts"] = dict(zip(dataset.targets, there, strict=True))
    if labels.ndim == 2:
        unknown = labels[labelled].isnan().sum(0).tolist()
        found["unknown"] = {name: n for name, n in zip(dataset.targets, unknown, strict=True) if n}
        if dataset.task == REGRESSION:
            found["columns"] = {name: _span(labels[:, k]) for k, name in enumerate(dataset.targets)}
        else:
            found["without"] = int((labelled & (labels != 1).all(1)).sum())
    elif dataset.task == REGRESSION:
        values, counts = labels[labelled].round().to(torch.int64).unique(return_counts=True)
        found["histogram"] = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return {"labelled": int(labelled.sum()), **found}


def _report(dataset: MultimodalDataset, label_range: tuple[float, float] | None) -> SplitReport:
    nonfinite, scale = count_nonfinite(dataset), Standardiser().fit(dataset).scale
    modalities = {}
    for modality, features in dataset.features.items():
        lengths = dataset.lengths(modality)
        real = lengths[lengths > 0]
        shortest, median, longest = (
            int(f(real)) if len(real) else 0 for f in (torch.min, torch.median, torch.max)
        )
        constant = torch.nonzero(scale[modality] == 0).flatten().tolist() if len(real) else []
        modalities[modality] = ModalityReport(
            features=features,
            missing=float((lengths == 0).float().mean()),
            shortest=shortest,
            median=median,
            longest=longest,
            nan=nonfinite[modality].nan,
            inf=nonfinite[modality].inf,
            constant=tuple(constant),
        )
    return SplitReport(
        samples=len(dataset),
        **_labels(dataset, label_range),
        unaligned=_names(dataset, dataset.unaligned()),
        empty=_names(dataset, dataset.without_steps()),
        blank=_names(dataset, torch.stack([_blank(dataset, m) for m in dataset.modalities]).any(0)),
        modalities=modalities,
    )


def _blank(dataset: MultimodalDataset, modality: str) -> Tensor:
    """(N,) bool: which samples have steps of the modality that are 0, NaN or inf throughout."""
    flat, lengths = dataset.flat(modality), dataset.lengths(modality)
    told = ((flat != 0) & flat.isfinite()).any(1)
    sample = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
    return (lengths > 0) & (torch.bincount(sample[told], minlength=len(lengths)) == 0)


def _few(kind: str, names: tuple[str, ...], limit: int = 5) -> str:
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({shown})"


def _label_lines(report: SplitReport) -> list[str]:
    if not report.labelled:
        return []
    lines = []
    if report.columns:
        width = max(map(len, report.columns))
        for name, (low, mean, high) in report.columns.items():
            unknown = f", unknown {report.unknown[name]}" if name in report.unknown else ""
            lines.append(f"  {name:<{width}}  {low:.2f} to {high:.2f}, mean {mean:.2f}{unknown}")
    elif report.counts:
        parts = []
        for name, count in report.counts.items():
            known = report.labelled - report.unknown.get(name, 0)
            unknown = f", {report.unknown[name]} unknown" if name in report.unknown else ""
            parts.append(f"{name} {count} ({count / max(known, 1):.1%}{unknown})")
        lines.append(f"  {'  '.join(parts)}")
        if report.without:
            lines.append(f"  {report.without} without any label ({report.without / report.labelled:.1%})")
    else:
        bars = "  ".join(f"{value:+d}: {count}" for value, count in report.histogram.items())
        lines.append(
            f"  labels {report.label_min:.2f} to {report.label_max:.2f}, mean {report.label_mean:.2f}; "
            f"rounded {bars}"
        )
    return lines


def _split_lines(name: str, report: SplitReport, label_range: tuple[float, float] | None) -> list[str]:
    lines = [f"{name}: {report.samples} samples, {report.labelled} labelled", *_label_lines(report)]
    for modality, m in report.modalities.items():
        text = f"  {modality:<8} F {m.features:<4} missing {m.missing:6.1%}"
        text += f"  length {m.shortest} / {m.median} / {m.longest} (min / median / max)"
        text += f"  NaN {m.nan}  inf {m.inf}"
        if m.constant:
            shown = ", ".join(map(str, m.constant[:8])) + (", ..." if len(m.constant) > 8 else "")
            text += f"  constant features {len(m.constant)} ({shown})"
        lines.append(text)
    faults = {
        "with a label outside [{:g}, {:g}]".format(*label_range or (0, 0)): report.outside,
        "with modalities of different lengths, to be aligned unless the encoder takes them so": report.unaligned,
        "without any modality": report.empty,
        "with a modality that is 0 or no number throughout; what is missing has no steps": report.blank,
    }
    lines += [f"  {_few('sample', names)} {what}" for what, names in faults.items() if names]
    return lines
