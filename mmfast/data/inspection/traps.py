"""What a look at data should warn of: things that are legal, and make results wrong or not comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import torch

from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.inspection.facts import Found, SplitReport, found
from mmfast.data.readers.parts import NO_SPLIT

FEWEST_ZERO = 0.01
# Feature sizes that published features of a modality have, by which modalities that changed places are known.
SIZES = {"text": {300, 768, 1024}, "audio": {5, 25, 33, 74}, "visual": {20, 35, 36, 46, 47, 171, 177, 709}}
MOSI = {
    2199: "2,199 samples are all labelled segments of CMU-MOSI (1,284, 229 and 686 in MMSA's splits); results on "
    "2,183 (1,283, 214 and 686), those in which word alignment leaves a word, are of other samples",
    2183: "2,183 samples are those of CMU-MOSI's 2,199 segments in which word alignment leaves a word (1,283, 214 "
    "and 686 in MulT's splits); results on 2,199 are of other samples",
}


def traps(data: MultimodalData, reports: Mapping[str, SplitReport], divided: bool = False) -> Iterator[str]:
    """A sentence for each trap in the data that were given these reports.

    Args:
        divided: whether the splits were asked for, and are not those of the files.
    """
    samples = sum(r.samples for name, r in reports.items() if name in ("train", "valid", "test"))
    if samples in MOSI:
        yield MOSI[samples]
    yield from _swapped(data.features)
    if data.cross_validation is None and not divided and sum(len(d) > 0 for d in _parts(data).values()) == 1:
        yield NO_SPLIT
    if data.padding and not data.padding.startswith("none"):
        yield f"padding {data.padding}"
    for split, report in reports.items():
        yield from _of_split(split, report, data.label_range)
    yield from _zero_steps({name: r for name, r in reports.items() if name != "cross_validation"})
    yield from _twice(data)
    for (first, a), (second, b) in combinations(_parts(data).items(), 2):
        for kind in a.groups.keys() & b.groups.keys():
            both = sorted({*a.groups[kind]} & {*b.groups[kind]})
            if both:
                yield f"{first} and {second} share {few(kind, Found(len(both), tuple(both)))}: a group on two sides"


def _parts(data: MultimodalData) -> dict[str, MultimodalDataset]:
    # Not the pool: it may hold what is left of the others.
    return {name: getattr(data, name) for name in ("train", "valid", "test")}


def _swapped(features: Mapping[str, int]) -> Iterator[str]:
    for first, second in combinations([m for m in features if m in SIZES], 2):
        a, b = features[first], features[second]
        if a in SIZES[second] - SIZES[first] and b in SIZES[first] - SIZES[second]:
            yield (
                f"{first} has {a} features and {second} {b}, sizes that the other one has: they look swapped"
            )


def _of_split(split: str, report: SplitReport, label_range: tuple[float, float] | None) -> Iterator[str]:
    labels = report.labels
    faults = {
        "with a label outside [{:g}, {:g}], kept".format(*label_range or (0, 0)): labels.outside,
        "with modalities of different lengths, to be aligned unless the encoder takes them so": report.unaligned,
        "without any modality": report.empty,
        "with a modality that is 0 or no number throughout; what is missing has no steps": report.blank,
    }
    for what, samples in faults.items():
        if samples.count:
            yield f"{split}: {few('sample', samples)} {what}"
    if report.labelled > 1:
        if labels.counts is not None and sum(n > 0 for n in labels.counts.values()) == 1 < len(labels.counts):
            (only,) = (name for name, n in labels.counts.items() if n)
            if labels.unknown is None:
                yield f"{split}: all of {report.labelled:,} labelled samples are of one class, {only}"
        elif labels.low == labels.high:
            yield f"{split}: all of {report.labelled:,} labelled samples have the label {labels.low:g}"


def _zero_steps(reports: Mapping[str, SplitReport]) -> Iterator[str]:
    for modality in next(iter(reports.values())).modalities if reports else ():
        steps, zero = (
            sum(getattr(r.modalities[modality], name) for r in reports.values()) for name in ("steps", "zero")
        )
        if zero:
            yield (
                f"{modality}: {zero:,} of {steps:,} steps inside samples ({zero / steps:.1%}) are 0 in every "
                "feature, such as an unknown word or a face not found"
            )


def _twice(data: MultimodalData) -> Iterator[str]:
    """Names and contents that are there twice, in a split or in two of them."""
    parts = {name: part for name, part in _parts(data).items() if len(part)}
    named = {name: np.fromiter(map(hash, part.names), np.int64, len(part)) for name, part in parts.items()}
    for split, part in parts.items():
        content = part.fingerprints().numpy()
        for what, again in (
            ("a name that another one has", _repeated(named[split])),
            ("contents that another one has", _repeated(content) & (content != 0)),
        ):
            if again.any():
                yield f"{split}: {few('sample', found(part, torch.from_numpy(again)))} with {what}"
    for (first, a), (second, b) in combinations(parts.items(), 2):
        for what, mask in (
            ("equal contents", b.among(a.fingerprints())),
            ("equal names", torch.from_numpy(np.isin(named[second], named[first]))),
        ):
            if mask.any():
                yield (
                    f"{first} and {second} share {few('sample', found(b, mask))} of {what}: "
                    "what is trained on is tested"
                )


def _repeated(keys: np.ndarray) -> np.ndarray:
    """(N,) bool: which keys were there before."""
    first = np.unique(keys, return_index=True)[1]
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again


def few(kind: str, samples: Found, limit: int = 5) -> str:
    """How many, and the names of the first."""
    shown = ", ".join(samples.names[:limit]) + (", ..." if samples.count > limit else "")
    return f"{samples.count:,} {kind}{'s' if samples.count > 1 else ''} ({shown})"
