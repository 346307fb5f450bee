"""The plots of a benchmark report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

OURS, THEIRS = "#D55E00", "#7F9FB6"
Races = Mapping[tuple[int, int], Mapping]


def draw(grid: Races, peaks: Mapping[str, Mapping[str, int]]) -> dict[str, bytes]:
    """File name -> PNG, of what there is data for."""
    plots = {}
    if grid:
        plots["speedup.png"] = speedups(grid)
        plots["floor.png"] = floor(grid)
    if peaks:
        plots["memory.png"] = memory(peaks)
    return plots


def speedups(grid: Races) -> bytes:
    """Blue: faster than the best peer, red: slower; the scale is logarithmic."""

    def label(e):
        ratio = e["speedup"][e["best"]]
        number = f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"
        return number + "\n" + e["best"].replace(" ", "\n")

    logs = [np.log10(e["speedup"][e["best"]]) for e in grid.values()]
    norm = TwoSlopeNorm(0, min(-0.3, *logs), max(0.3, *logs))
    return _heat_map(
        grid,
        lambda e: np.log10(e["speedup"][e["best"]]),
        label,
        "mmfast against the best peer, forward and backward, fp32\n(times faster, and which peer that was)",
        norm,
        "RdBu",
        {np.log10(x): f"{x:g}x" for x in (0.5, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)},
    )


def floor(grid: Races) -> bytes:
    return _heat_map(
        grid,
        lambda e: 100 * e["share_of_floor"],
        lambda e: f"{100 * e['share_of_floor']:.0f} %\n{_milliseconds(e['medians']['mmfast'])}",
        "Share of the speed of the floor: one copy of the embeddings\n"
        "and 6 B D min(B, D) operations, at this machine's rates",
        Normalize(0, 100),
        "viridis",
        {x: f"{x} %" for x in range(0, 101, 20)},
    )


def _milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.2g} ms" if ms < 10 else f"{ms:.0f} ms" if ms < 1e4 else f"{seconds:.0f} s"


def _heat_map(
    grid: Races, value: Callable, label: Callable, title: str, norm, colours: str, ticks: dict
) -> bytes:
    rows, columns = (sorted({shape[axis] for shape in grid}) for axis in (0, 1))
    values = np.full((len(rows), len(columns)), np.nan)
    for (b, d), e in grid.items():
        values[rows.index(b), columns.index(d)] = value(e)
    figure, ax = _figure(2.2 + 1.25 * len(columns), 1.7 + 0.85 * len(rows))
    image = ax.imshow(values, norm=norm, cmap=colours, aspect="auto", origin="lower")
    for (b, d), e in grid.items():
        y, x = rows.index(b), columns.index(d)
        red, green, blue, _ = image.cmap(norm(values[y, x]))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        ax.text(x, y, label(e), ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel="embedding size D", ylabel="batch size B")
    ax.set_title(title, fontsize=10)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    shown = {at: text for at, text in ticks.items() if norm.vmin - 1e-6 <= at <= norm.vmax}
    bar.set_ticks(list(shown), labels=list(shown.values()))
    bar.ax.minorticks_off()
    return _png(figure)


def memory(peaks: Mapping[str, Mapping[str, int]]) -> bytes:
    """A panel per shape."""
    shapes = list(next(iter(peaks.values())))
    figure, axes = _figure(3.0 * len(shapes) + 1, 1.3 + 0.27 * len(peaks), len(shapes))
    order = sorted(peaks, key=lambda name: peaks[name][shapes[-1]], reverse=True)
    largest = max(max(by_shape.values()) for by_shape in peaks.values()) / 2**20
    for ax, shape in zip(np.atleast_1d(axes), shapes, strict=True):
        values = [peaks[name][shape] / 2**20 for name in order]
        ax.barh(order, values, color=[OURS if name == "mmfast" else THEIRS for name in order])
        for y, v in enumerate(values):
            ax.text(v * 1.12, y, f"{v:.1f}" if v < 10 else f"{v:,.0f}", va="center", fontsize=8)
        ax.set_xscale("log")
        ax.set_xlim(1, largest * 8)
        ax.set_title(shape.replace("x", " x "), fontsize=10)
        ax.set_xlabel("MiB")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Peak memory above the inputs, forward and backward, fp32 (B x D)", fontsize=11)
    return _png(figure)


def _figure(width: float, height: float, panels: int = 1):
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, sharey=True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
