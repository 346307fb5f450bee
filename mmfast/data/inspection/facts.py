"""What is counted in a data set: lengths, gaps, broken cells, labels, groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmfast.data.dataset import MultimodalDataset
from mmfast.data.standardise import Standardiser
from mmfast.data.targets import CLASSIFICATION, REGRESSION, presence

BINS = 8
# Of the samples that have a fault so many are named.
NAMED = 10


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """How many samples something is true of, and the names of the first ten of them."""

    count: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModalityReport:
    """One modality of one split.

    Attributes:
        features: F.
        missing: share of the samples that lack it.
        shortest, median, longest: lengths of the samples that have it, 0 if none has.
        lengths: histogram of them.
        nan, inf: cells of real steps.
        constant: features with one value in the whole split, or no finite one.
        steps, zero: real steps, and those of them that are 0 in every feature.
    """

    features: int
    missing: float
    shortest: int
    median: int
    longest: int
    lengths: Histogram | None
    nan: int
    inf: int
    constant: tuple[int, ...]
    steps: int
    zero: int


@dataclass(frozen=True)
class LabelReport:
    """The labels of one split.

    Attributes:
        low, mean, high: of all numbers; NaN without labels, and where they are no numbers.
        histogram: of one number a sample; a bin for each whole number where they are few.
        columns: of several numbers a sample, the smallest, mean and largest of each, with their histogram.
        counts: class or label -> its samples.
        unknown: of several numbers or labels, those that are not known in samples that have others.
        without: samples whose known labels are all absent.
        outside: samples with a label outside the corpus's range.
    """

    low: float = math.nan
    mean: float = math.nan
    high: float = math.nan
    histogram: Histogram | None = None
    columns: dict[str, tuple[float, float, float, Histogram | None]] | None = None
    counts: dict[str, int] | None = None
    unknown: dict[str, int] | None = None
    without: int = 0
    outside: Found = Found()


@dataclass(frozen=True)
class SplitReport:
    """One split.

    Attributes:
        samples, labelled: how many.
        unaligned: samples whose modalities differ in length, beside those that they lack.
        empty: samples without any modality.
        blank: samples with steps of a modality in which no cell is a number other than 0.
    """

    samples: int
    labelled: int
    labels: LabelReport
    unaligned: Found
    empty: Found
    blank: Found
    modalities: dict[str, ModalityReport]


def report(dataset: MultimodalDataset, label_range: tuple[float, float] | None) -> SplitReport:
    """One split, its steps a block at a time."""
    fitted = Standardiser().fit(dataset)
    modalities, blank = {}, torch.zeros(len(dataset), dtype=torch.bool, device="cpu")
    for modality, features in dataset.features.items():
        lengths = dataset.lengths(modality)
        real = lengths[lengths > 0]
        told = torch.zeros(len(dataset), dtype=torch.bool, device="cpu")
        zero = 0
        for samples, steps in dataset.blocks(modality):
            filled = steps != 0
            zero += len(steps) - int(filled.any(1).sum())
            told[samples[(filled & steps.isfinite()).any(1)]] = True
        blank |= (lengths > 0) & ~told
        shortest, median, longest = (
            int(f(real)) if len(real) else 0 for f in (torch.min, torch.median, torch.max)
        )
        constant = torch.nonzero(fitted.scale[modality] == 0).flatten().tolist() if len(real) else []
        modalities[modality] = ModalityReport(
            features=features,
            missing=float((lengths == 0).float().mean()),
            shortest=shortest,
            median=median,
            longest=longest,
            lengths=histogram(real),
            nan=fitted.nonfinite[modality].nan,
            inf=fitted.nonfinite[modality].inf,
            constant=tuple(constant),
            steps=int(real.sum()),
            zero=zero,
        )
    return SplitReport(
        samples=len(dataset),
        labelled=int(dataset.labelled().sum()),
        labels=_labels(dataset, label_range),
        unaligned=found(dataset, dataset.unaligned()),
        empty=found(dataset, dataset.without_steps()),
        blank=found(dataset, blank),
        modalities=modalities,
    )


def found(dataset: MultimodalDataset, mask: Tensor) -> Found:
    """The samples of a mask (N,)."""
    indices = torch.nonzero(mask).flatten()
    return Found(len(indices), tuple(dataset.subset(indices[:NAMED]).names))


def histogram(numbers: Tensor) -> Histogram | None:
    """Of finite numbers; None of none."""
    if len(numbers) == 0:
        return None
    low, high = float(numbers.min()), float(numbers.max())
    counts, _ = np.histogram(numbers.double().numpy(), BINS, (low, high if high > low else low + 1))
    return Histogram(low, high, tuple(counts.tolist()))


def of_labels(numbers: Tensor) -> Histogram | None:
    """Of labels: a bin for each whole number that they round to, from first to last, where those are few."""
    rounded = numbers.round()
    if len(numbers) == 0 or float(rounded.max() - rounded.min()) > 2 * BINS:
        return histogram(numbers)
    low, high = int(rounded.min()), int(rounded.max())
    counts = torch.bincount((rounded - low).to(torch.int64), minlength=high - low + 1)
    return Histogram(low, high, tuple(counts.tolist()))


def _labels(dataset: MultimodalDataset, label_range: tuple[float, float] | None) -> LabelReport:
    labels, labelled = dataset.labels, dataset.labelled()
    told: dict = {}
    if dataset.task == REGRESSION:
        low, high = label_range or (-math.inf, math.inf)
        outside = ((labels < low) | (labels > high)).reshape(len(dataset), -1).any(1)
        told |= dict(zip(("low", "mean", "high"), _span(labels), strict=True))
        told["outside"] = found(dataset, outside)
    else:
        told["counts"] = dict(zip(dataset.targets, presence(dataset).sum(0).tolist(), strict=True))
    if labels.ndim == 2:
        unknown = labels[labelled].isnan().sum(0).tolist()
        told["unknown"] = {name: n for name, n in zip(dataset.targets, unknown, strict=True) if n}
    if dataset.task == REGRESSION and labels.ndim == 2:
        columns = {name: labels[:, k] for k, name in enumerate(dataset.targets)}
        told["columns"] = {n: (*_span(c), of_labels(c[~c.isnan()])) for n, c in columns.items()}
    elif dataset.task == REGRESSION:
        told["histogram"] = of_labels(labels[labelled])
    elif dataset.task != CLASSIFICATION:
        told["without"] = int((labelled & (labels != 1).all(1)).sum())
    return LabelReport(**told)


def _span(labels: Tensor) -> tuple[float, float, float]:
    """Smallest, mean and largest of the numbers that are known, NaN without any."""
    known = labels[~labels.isnan()]
    return tuple(float(f(known)) if len(known) else math.nan for f in (torch.min, torch.mean, torch.max))


def group_counts(datasets: Iterator[MultimodalDataset]) -> dict[str, dict[str, int]]:
    """Kind of group -> group -> its samples in all of the data sets, the largest first."""
    counts: dict[str, Counter] = {}
    for dataset in datasets:
        for kind, names in dataset.groups.items():
            counts.setdefault(kind, Counter()).update(names)
    return {kind: dict(counter.most_common()) for kind, counter in counts.items()}
