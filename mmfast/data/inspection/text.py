"""The report of an inspection for a terminal, a pipe or a file: plain text without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from mmfast.data.inspection.facts import Histogram, LabelReport, ModalityReport, SplitReport
from mmfast.data.targets import UNNAMED
from mmfast.errors import printable

# From the lowest bar to the highest; none at all where nothing is counted.
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*#@"
ARRAYS, GROUPS = 40, 5


class Writer:
    """Lines that fit into a width.

    Args:
        width: columns.
        bars: eight characters, from the lowest bar to the highest.
    """

    def __init__(self, width: int = 100, bars: str = BARS) -> None:
        self.width, self.bars = max(width, 50), bars
        self.lines: list[str] = []

    def add(self, text: str = "", hang: int = 4) -> None:
        """A line, which goes on further to the right where it is too long."""
        self.lines += textwrap.wrap(
            printable(text),
            self.width,
            subsequent_indent=" " * hang,
            drop_whitespace=True,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        ) or [""]

    def table(self, rows: Sequence[Sequence[str]], left: int = 1) -> None:
        """Columns side by side, the first ``left`` ones flush left; as lines of their cells where they do not fit."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        kept = [i for i, w in enumerate(widths) if w]
        if 2 + sum(widths[i] + 2 for i in kept) - 2 <= self.width:
            for row in rows:
                cells = (
                    f"{row[i]:<{widths[i]}}" if i < left or i == kept[-1] else f"{row[i]:>{widths[i]}}"
                    for i in kept
                )
                self.lines.append(printable(f"  {'  '.join(cells)}".rstrip()))
            return
        heads, *rest = rows
        for row in rest:
            cells = (f"{head} {cell}".strip() for head, cell in zip(heads, row, strict=True) if cell.strip())
            self.add(f"  {', '.join(cells)}")

    def bar(self, counts: Sequence[int]) -> str:
        """One character for each count, as high as the count."""
        top = max(counts, default=0)
        return "".join(self.bars[(len(self.bars) * n - 1) // top] if n else " " for n in counts)


def write(inspection, writer: Writer) -> None:
    """All of an :class:`~mmfast.data.inspection.Inspection`."""
    add = writer.add
    add(f"{inspection.name} ({inspection.source})")
    head = [
        ("layout", inspection.layout),
        ("labels", _kind(inspection)),
        ("padding", inspection.padding),
        ("aligned", _aligned(inspection)),
        *((f"{kind} groups", _groups(groups)) for kind, groups in inspection.groups.items()),
        ("fingerprint", inspection.fingerprint),
    ]
    width = max(len(name) for name, _ in head)
    for name, text in head:
        if text:
            add(f"  {name:<{width}}  {text}", hang=width + 4)
    if inspection.contents:
        add()
        rows = [(key, dtype, str(shape)) for key, shape, dtype in inspection.contents[:ARRAYS]]
        writer.table([("array", "dtype", "shape"), *rows], left=3)
        if len(inspection.contents) > ARRAYS:
            add(f"  and {len(inspection.contents) - ARRAYS:,} more")
    for split, report in inspection.splits.items():
        add()
        add(f"{split}: {report.samples:,} samples, {report.labelled:,} labelled")
        writer.table([HEADS, *(_modality(name, m, writer) for name, m in report.modalities.items())])
        if report.labelled:
            for line in _labels(report, report.labels, writer):
                add(f"  {line}")
    if inspection.warnings:
        add()
        add("warnings")
        for sentence in inspection.warnings:
            add(f"  - {sentence}")


HEADS = ("", "F", "missing", "lengths", "min / median / max", "NaN", "inf", "constant features")


def _modality(name: str, m: ModalityReport, writer: Writer) -> tuple[str, ...]:
    constant = ", ".join(map(str, m.constant[:6])) + (", ..." if len(m.constant) > 6 else "")
    return (
        name,
        str(m.features),
        f"{m.missing:.1%}",
        f"|{writer.bar(m.lengths.counts)}|" if m.lengths else "",
        f"{m.shortest:,} / {m.median:,} / {m.longest:,}",
        f"{m.nan:,}",
        f"{m.inf:,}",
        f"{len(m.constant)} ({constant})" if m.constant else "0",
    )


def _labels(report: SplitReport, labels: LabelReport, writer: Writer) -> Iterator[str]:
    if labels.columns:
        width = max(map(len, labels.columns))
        for name, (low, mean, high, counts) in labels.columns.items():
            unknown = f", unknown {labels.unknown[name]:,}" if name in (labels.unknown or ()) else ""
            bars = f"  {_bars(counts, writer)}" if counts else ""
            yield f"{name:<{width}}  {low:.2f} to {high:.2f}, mean {mean:.2f}{bars}{unknown}"
    elif labels.counts:
        bars = writer.bar(tuple(labels.counts.values()))
        parts = []
        for name, count in labels.counts.items():
            unknown = (labels.unknown or {}).get(name, 0)
            told = f", {unknown:,} unknown" if unknown else ""
            parts.append(f"{name} {count:,} ({count / max(report.labelled - unknown, 1):.1%}{told})")
        yield f"|{bars}|  {', '.join(parts)}"
        if labels.without:
            yield f"{labels.without:,} without any label ({labels.without / report.labelled:.1%})"
    else:
        span = f"labels {labels.low:.2f} to {labels.high:.2f}, mean {labels.mean:.2f}"
        yield f"{span}  {_bars(labels.histogram, writer)}"


def _bars(counts: Histogram, writer: Writer) -> str:
    whole = isinstance(counts.low, int)
    ends = (f"{n:+d}" if whole and counts.low < 0 else f"{n:g}" for n in (counts.low, counts.high))
    low, high = ends
    told = ", ".join(f"{n:,}" for n in counts.counts)
    return f"{low} |{writer.bar(counts.counts)}| {high}" + (f" ({told})" if whole else "")


def _kind(inspection) -> str:
    of = "" if inspection.targets == UNNAMED else f" of {', '.join(inspection.targets)}"
    within = "" if inspection.label_range is None else " in [{:g}, {:g}]".format(*inspection.label_range)
    return f"{inspection.task}{of}{within}"


def _aligned(inspection) -> str:
    if inspection.aligned:
        return "yes"
    names = inspection.misaligned
    count = sum(r.unaligned.count for r in inspection.splits.values())
    shown = ", ".join(names[:5]) + (", ..." if count > 5 else "")
    return f"no: modalities differ in length in {count:,} samples ({shown})"


def _groups(groups: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(groups.items())[:GROUPS])
    return f"{len(groups):,} ({shown}{', ...' if len(groups) > GROUPS else ''})"
